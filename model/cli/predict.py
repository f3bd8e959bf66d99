"""`python -m step_kernels.model predict CHECKPOINT IMAGES... --out DIR`: pictures to label PNGs of the same size."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoints import CheckpointInfo, checkpoint_info, load_checkpoint
from ..segmenter import StepSegmenter
from ..windows import predict_windows
from .errors import DTYPES, OneLineParser, UsageError, channel_values, checked_device, image_size
from .palettes import NAMES, checked_palette, distinct_colours, named_palette, read_palette
from .pictures import pillow, read_picture, write_png
from .progress import Progress

__all__ = ["main"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_CLASSES = 1 << 16  # that a 16-bit PNG can tell apart

DESCRIPTION = """
Label pictures with a checkpoint that load_checkpoint reads. Each IMAGE becomes DIR/NAME.png, of the picture's size
(as it is seen: EXIF rotation applied), whose values are class numbers: 8-bit, with a palette if one is given or the
checkpoint has one; 16-bit for more than 256 classes. Files of these names are overwritten. What cannot be labelled is
named at the end, and the exit status is 1.
"""


@dataclass(frozen=True)
class Task:
    """One picture and where its results go; `overlay` is None when none is wanted."""

    picture: Path
    labels: Path
    overlay: Path | None

    def outputs(self) -> Iterator[Path]:
        yield from (path for path in (self.labels, self.overlay) if path is not None)


@dataclass(frozen=True)
class Labeller:
    """A segmenter with what turns pixels into its input.

    Attributes:
        segmenter: on its device, in its dtype.
        mean, std: per channel, for pixels scaled to 0..1.
        window, stride, max_crops: as `predict_windows` takes them; no window: the whole picture at once.
    """

    segmenter: StepSegmenter
    mean: tuple[float, ...]
    std: tuple[float, ...]
    window: tuple[int, int] | None
    stride: tuple[int, int] | None
    max_crops: int | None

    def labels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> class numbers [H, W], uint8 up to 256 classes, else int32."""
        weight = self.segmenter.encoder.vit.embedding.weight
        image = torch.tensor(pixels, device=weight.device).permute(2, 0, 1)[None].float() / 255
        mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        image = ((image - mean) / std).to(weight.dtype)
        if self.window is None:
            found = self.segmenter.predict(image)
        else:
            found = predict_windows(self.segmenter, image, self.window, self.stride, max_crops=self.max_crops)
        return found[0].cpu().numpy()


def main(arguments: Sequence[str]) -> int:
    """Label the pictures.

    Returns:
        0; 1 when some pictures could not be labelled.

    Raises:
        UsageError: nothing can be labelled as asked.
        ImportError: Pillow, or a package that the checkpoint needs, is missing.
    """
    options = parse(arguments)
    pillow()
    tasks = plan(options.images, options.out, options.overlay)
    device = checked_device(options.device)
    segmenter, info = load(options)
    palette = find_palette(options.palette, info, segmenter.num_classes)
    check_writable(options.out)
    segmenter = segmenter.to(device, None if options.dtype is None else DTYPES[options.dtype])
    mean, std = options.mean or info.mean or IMAGENET_MEAN, options.std or info.std or IMAGENET_STD
    labeller = Labeller(segmenter, mean, std, options.window, options.stride, options.max_crops)
    print(summary(labeller, info, options))
    started = time.monotonic()
    failed = label_all(labeller, tasks, palette)
    seconds = time.monotonic() - started
    print(f"{len(tasks) - len(failed)} of {len(tasks)} pictures labelled in {seconds:.1f} s: {options.out}")
    for task, reason in failed:
        print(f"not labelled: {one_line(str(task.picture))}: {one_line(reason)}", file=sys.stderr)
    return 1 if failed else 0


def label_all(labeller: Labeller, tasks: Sequence[Task], palette: np.ndarray | None) -> list[tuple[Task, str]]:
    """Label every picture that can be; the others with the reason."""
    failed = []
    with Progress("labelling", len(tasks)) as progress:
        for task in tasks:
            try:
                pixels = read_picture(task.picture)
                write(labeller.labels(pixels), pixels, task, labeller.segmenter.num_classes, palette)
            except torch.OutOfMemoryError:
                failed.append((task, "out of GPU memory: try --window, or a smaller --max-crops"))
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
                    raise
                failed.append((task, "out of memory: try --window"))
            except ValueError as error:  # the picture, or a size that the model refuses
                failed.append((task, str(error)))
            except OSError as error:
                failed.append((task, f"the result cannot be written: {error.strerror or error}"))
            progress.advance(task.picture.name)
    return failed


def write(labels: np.ndarray, pixels: np.ndarray, task: Task, num_classes: int, palette: np.ndarray | None) -> None:
    """The label PNG, and the overlay if one is wanted."""
    images = pillow()
    if labels.dtype == np.uint8:
        image = images.fromarray(labels)
        if palette is not None:
            image.putpalette(palette.tobytes())
    else:
        image = images.fromarray(labels.astype(np.uint16))
    write_png(image, task.labels)
    if task.overlay is not None:
        colours = distinct_colours(num_classes) if palette is None else palette
        write_png(images.blend(images.fromarray(pixels), images.fromarray(colours[labels]), 0.5), task.overlay)


def plan(pictures: Sequence[Path], out: Path, overlay: bool) -> list[Task]:
    """Where each picture's results go.

    Raises:
        UsageError: two results would have one name, or a result would overwrite a picture.
    """
    tasks = [
        Task(picture, out / f"{picture.stem}.png", out / f"{picture.stem}_overlay.png" if overlay else None)
        for picture in pictures
    ]
    sources, taken = {picture.resolve(): picture for picture in pictures}, dict[Path, Path]()
    for task in tasks:
        for path in task.outputs():
            if path.resolve() in sources:
                raise UsageError(f"{path} would overwrite a picture: choose another --out")
            if path in taken:
                raise UsageError(f"{taken[path]} and {task.picture} would both become {path}: label them apart")
            taken[path] = task.picture
    return tasks


def check_writable(out: Path) -> None:
    """Make the folder and try it before hours of work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None


def load(options: argparse.Namespace) -> tuple[StepSegmenter, CheckpointInfo]:
    """The checkpoint's segmenter, and what else it tells."""
    hints = {"img_size": options.img_size, "num_heads": options.num_heads, "quota": options.quota}
    try:
        info = checkpoint_info(options.checkpoint, **hints)
        segmenter = load_checkpoint(options.checkpoint, **hints)
    except (ValueError, NotImplementedError, OSError) as error:
        raise UsageError(str(error)) from None
    if not isinstance(segmenter, StepSegmenter):
        raise UsageError(
            f"{options.checkpoint} is a {info.format} checkpoint without decoder: it has no classes to label with"
        )
    if segmenter.encoder.vit.embedding.in_channels != 3:
        raise UsageError(
            f"{options.checkpoint} takes {segmenter.encoder.vit.embedding.in_channels} channels, pictures have 3"
        )
    if segmenter.num_classes > MOST_CLASSES:
        raise UsageError(
            f"{options.checkpoint} has {segmenter.num_classes} classes, a PNG holds at most {MOST_CLASSES}"
        )
    return segmenter, info


def find_palette(wanted: str | None, info: CheckpointInfo, num_classes: int) -> np.ndarray | None:
    """Colours uint8 [num_classes, 3]: the wanted ones, else the checkpoint's; None where there are or shall be none."""
    if wanted == "none" or (wanted is None and info.palette is None):
        return None
    if wanted is None:
        return checked_palette(info.palette or (), num_classes, "the checkpoint's palette (see --palette none)")
    if wanted in NAMES:
        return named_palette(wanted, num_classes)
    if not Path(wanted).exists():
        raise UsageError(f"--palette expects {', '.join(NAMES)}, none or a file, got {wanted!r}, which does not exist")
    return read_palette(Path(wanted), num_classes)


def summary(labeller: Labeller, info: CheckpointInfo, options: argparse.Namespace) -> str:
    """One line: what runs, and where its normalisation comes from."""
    weight = labeller.segmenter.encoder.vit.embedding.weight
    normalisation = []
    for name, given, told in (("mean", options.mean, info.mean), ("std", options.std, info.std)):
        source = "as given" if given else "the checkpoint's" if told else "ImageNet's, as the checkpoint tells none"
        normalisation.append(f"{name} {', '.join(f'{value:.3g}' for value in getattr(labeller, name))} ({source})")
    return (
        f"{info.format} checkpoint, {labeller.segmenter.num_classes} classes, {weight.device} "
        f"{str(weight.dtype).removeprefix('torch.')}, {', '.join(normalisation)}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: an option or its value is unknown, or two contradict.
    """
    parser = OneLineParser(prog="python -m step_kernels.model predict", description=DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="picture files")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if missing")
    add(
        "--palette",
        help=f"{', '.join(NAMES)}, none, or a file: one line R G B or #rrggbb per class (default: the checkpoint's)",
    )
    add("--overlay", action="store_true", help="also write DIR/NAME_overlay.png: picture and colours, half and half")
    add("--window", type=image_size, help="run on crops of this size, such as 512 or 512x1024 (height x width)")
    add(
        "--stride",
        type=image_size,
        help="pixels from one crop to the next; scores are averaged where crops overlap (default: --window)",
    )
    add("--max-crops", type=int, help="crops that run at a time (default: all of a picture)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=tuple(DTYPES), help="of weights and images (default: the checkpoint's)")
    add(
        "--mean",
        type=channel_values,
        help="red,green,blue of pixels in 0..1 (default: the checkpoint's, else ImageNet's)",
    )
    add("--std", type=channel_values, help="standard deviations likewise")
    add(
        "--img-size",
        type=image_size,
        help="size that the position embeddings are made for, where the checkpoint does not tell",
    )
    add("--num-heads", type=int, help="attention heads, where the checkpoint does not tell")
    add("--quota", type=int, help="CTS-Segmenter: 2x2 blocks merged per image, where no variant.yml tells")
    options = parser.parse_args(arguments)
    check_window(options)
    if options.std is not None and 0 in options.std:
        raise UsageError(f"--std expects positive values, got {','.join(f'{value:g}' for value in options.std)}")
    return options


def check_window(options: argparse.Namespace) -> None:
    """Refuse crops that leave pixels out, or that nothing asks for."""
    if options.window is None:
        for flag, value in (("--stride", options.stride), ("--max-crops", options.max_crops)):
            if value is not None:
                raise UsageError(f"{flag} needs --window")
        return
    stride = options.stride or options.window
    if stride[0] > options.window[0] or stride[1] > options.window[1]:
        (down, right), (height, width) = stride, options.window
        raise UsageError(
            f"--stride expects at most --window ({height}x{width}), or pixels get no label, got {down}x{right}"
        )
    if options.max_crops is not None and options.max_crops < 1:
        raise UsageError(f"--max-crops expects at least 1, got {options.max_crops}")


def one_line(text: str) -> str:
    """Without the line breaks that a file name can have."""
    return " ".join(text.splitlines())
