"""`python -m step_kernels.model predict CHECKPOINT IMAGES... --out DIR`: pictures to label PNGs of the same size."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...extras import import_extra
from ..checkpoints import load_checkpoint
from ..checkpoints.formats import MMSEG
from ..segmenter import StepSegmenter
from ..windows import predict_windows
from .errors import OneLineParser, UsageError, channel_values, checked_device, image_size
from .palettes import NAMES, distinct_colours, find_palette

__all__ = ["main", "read_picture"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
MOST_CLASSES = 1 << 16  # that a 16-bit PNG can tell apart

DESCRIPTION = """
Label pictures with a checkpoint that load_checkpoint reads. Each IMAGE becomes DIR/NAME.png, of the picture's size
(as it is seen: EXIF rotation applied), whose values are class numbers: 8-bit, with a palette if one is given or the
checkpoint has one; 16-bit for more than 256 classes. Files of these names are overwritten. What cannot be labelled is
named at the end, and the exit status is 1.
"""


@dataclass(frozen=True)
class Task:
    """One picture and where its results go."""

    picture: Path
    labels: Path
    overlay: Path | None  # None: not wanted


@dataclass(frozen=True)
class Labeller:
    """A segmenter with what turns pixels into its input."""

    segmenter: StepSegmenter  # on its device, in its dtype
    mean: tuple[float, ...]  # for pixels scaled to 0..1
    std: tuple[float, ...]
    window: tuple[int, int] | None  # None: the whole picture at once
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
    """Label the pictures: 0, or 1 when some could not be labelled; UsageError where nothing can be as asked."""
    options = parse(arguments)
    tasks = plan(options.images, options.out, options.overlay)
    import_extra("PIL", "Pillow", "predict")
    device = checked_device(options.device)
    segmenter = load(options)
    info = segmenter.info
    palette = find_palette(options.palette, info.palette, segmenter.num_classes)
    check_writable(options.out)
    segmenter = segmenter.to(device, None if options.dtype is None else DTYPES[options.dtype])
    mean, std = options.mean or info.mean or IMAGENET["mean"], options.std or info.std or IMAGENET["std"]
    labeller = Labeller(segmenter, mean, std, options.window, options.stride, options.max_crops)
    print(summary(labeller, options))
    started, failed = time.monotonic(), []
    shown: Iterable[Task] = tasks
    with suppress(ImportError):  # no bar without tqdm
        from tqdm import tqdm

        shown = tqdm(tasks, "labelling", unit=" pictures", disable=None)  # None: silent without a terminal
    for task in shown:
        if (reason := label(labeller, task, palette)) is not None:
            failed.append((task.picture, reason))
    seconds = time.monotonic() - started
    print(f"{len(tasks) - len(failed)} of {len(tasks)} pictures labelled in {seconds:.1f} s: {options.out}")
    for picture, reason in failed:
        print("not labelled: " + " ".join(f"{picture}: {reason}".splitlines()), file=sys.stderr)
    return 1 if failed else 0


def label(labeller: Labeller, task: Task, palette: np.ndarray | None) -> str | None:
    """Label one picture; the reason where it cannot be."""
    try:
        pixels = read_picture(task.picture)
        write(labeller.labels(pixels), pixels, task, labeller.segmenter.num_classes, palette)
    except torch.OutOfMemoryError:
        return "out of GPU memory: try --window, or a smaller --max-crops"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return "out of memory: try --window"
        raise
    except ValueError as error:  # the picture, or a size that the model refuses
        return str(error)
    except OSError as error:
        return f"the result cannot be written: {error.strerror or error}"
    return None


def read_picture(path: Path) -> np.ndarray:
    """One file as uint8 [height, width, 3], red, green, blue: turned as EXIF says, on white where it is transparent.

    ValueError, whose message is the reason alone: it cannot be read, is not a picture, is broken, or is not safe to decode.
    """
    from PIL import Image, ImageOps

    try:
        # Anything else is named here; opening a pipe would wait for ever.
        if not path.exists():
            raise ValueError("a link to nothing" if path.is_symlink() else "not there")
        if not path.is_file():
            raise ValueError("a folder, not a picture" if path.is_dir() else "neither a file nor a folder")
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; an unattended run should not decode either.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                return np.asarray(to_rgb(ImageOps.exif_transpose(opened)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("decompression bomb: too many pixels to decode safely") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None
    except ValueError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file provokes: OSError, SyntaxError, struct.error
        # Only the system numbers its errors: no permission, a failing disk. Decoders raise OSError without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        raise ValueError(f"broken file ({type(error).__name__})") from None


def to_rgb(image: Any) -> Any:
    """Scales 16-bit grey to 8 bit, which Pillow itself would clip to white."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit pixels have no fixed white (mode {image.mode})")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white (mode F)")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(f"no conversion to RGB (mode {image.mode})") from None


def write(labels: np.ndarray, pixels: np.ndarray, task: Task, num_classes: int, palette: np.ndarray | None) -> None:
    """The label PNG, and the overlay if one is wanted."""
    from PIL import Image

    image = Image.fromarray(labels if labels.dtype == np.uint8 else labels.astype(np.uint16))
    if palette is not None and labels.dtype == np.uint8:
        image.putpalette(palette.tobytes())
    write_png(image, task.labels)
    if task.overlay is not None:
        colours = distinct_colours(num_classes) if palette is None else palette
        write_png(Image.blend(Image.fromarray(pixels), Image.fromarray(colours[labels]), 0.5), task.overlay)


def write_png(image: Any, path: Path) -> None:
    """Under its final name only when it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def plan(pictures: Sequence[Path], out: Path, overlay: bool) -> list[Task]:
    """Where each picture's results go; UsageError where two would have one name, or overwrite a picture."""
    tasks = [
        Task(picture, out / f"{picture.stem}.png", out / f"{picture.stem}_overlay.png" if overlay else None)
        for picture in pictures
    ]
    sources, taken = {picture.resolve() for picture in pictures}, dict[Path, Path]()
    for task in tasks:
        for path in filter(None, (task.labels, task.overlay)):
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


def load(options: argparse.Namespace) -> StepSegmenter:
    """The checkpoint's segmenter."""
    path, hints = options.checkpoint, {name: getattr(options, name) for name in ("img_size", "num_heads", "quota")}
    try:
        segmenter = load_checkpoint(path, **hints)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    if not isinstance(segmenter, StepSegmenter):
        raise UsageError(
            f"{path} is a {segmenter.info.format} checkpoint without decoder: it has no classes to label with"
        )
    if (channels := segmenter.encoder.vit.embedding.in_channels) != 3:
        raise UsageError(f"{path} takes {channels} channels, pictures have 3")
    if segmenter.num_classes > MOST_CLASSES:
        raise UsageError(f"{path} has {segmenter.num_classes} classes, a PNG holds at most {MOST_CLASSES}")
    if segmenter.info.format == MMSEG.name and not (options.mean and options.std):
        raise UsageError(
            f"--mean and --std are needed, as {path} does not tell them: those of its training config, "
            "divided by 255 (0.5,0.5,0.5 in mmsegmentation's own Segmenter configs)"
        )
    return segmenter


def summary(labeller: Labeller, options: argparse.Namespace) -> str:
    """One line: what runs, and where its normalisation comes from."""
    weight, info = labeller.segmenter.encoder.vit.embedding.weight, labeller.segmenter.info
    normalisation = []
    for name, given, told in (("mean", options.mean, info.mean), ("std", options.std, info.std)):
        source = "as given" if given else "the checkpoint's" if told else "ImageNet's, as the checkpoint tells none"
        normalisation.append(f"{name} {', '.join(f'{value:.3g}' for value in getattr(labeller, name))} ({source})")
    return (
        f"{info.format} checkpoint, {labeller.segmenter.num_classes} classes, {weight.device} "
        f"{str(weight.dtype).removeprefix('torch.')}, {', '.join(normalisation)}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; UsageError where an option or its value is unknown, or two contradict."""
    parser = OneLineParser(prog="python -m step_kernels.model predict", description=DESCRIPTION)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder")
    add("images", type=Path, nargs="+", metavar="IMAGE", help="picture files")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if missing")
    add("--palette", help=f"{', '.join(NAMES)}, none, or a file of lines R G B or #rrggbb (default: the checkpoint's)")
    add("--overlay", action="store_true", help="also write DIR/NAME_overlay.png: picture and colours, half and half")
    add("--window", type=image_size, help="run on crops of this size, such as 512 or 512x1024 (height x width)")
    add("--stride", type=image_size, help="pixels from crop to crop; overlaps are averaged (default: --window)")
    add("--max-crops", type=int, help="crops that run at a time (default: all of a picture)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=tuple(DTYPES), help="of weights and images (default: the checkpoint's)")
    add("--mean", type=channel_values, help="red,green,blue in 0..1 (default: the checkpoint's, else ImageNet's)")
    add("--std", type=channel_values, help="standard deviations likewise")
    add("--img-size", type=image_size, help="that position embeddings are for, where the checkpoint does not tell")
    add("--num-heads", type=int, help="attention heads, where the checkpoint does not tell")
    add("--quota", type=int, help="CTS-Segmenter: 2x2 blocks merged per image, where no variant.yml tells")
    options = parser.parse_args(arguments)
    if options.std is not None and 0 in options.std:
        raise UsageError(f"--std expects positive values, got {','.join(f'{value:g}' for value in options.std)}")
    for flag, value in (("--stride", options.stride), ("--max-crops", options.max_crops)):
        if value is not None and options.window is None:
            raise UsageError(f"{flag} needs --window")
    if options.stride and any(step > side for step, side in zip(options.stride, options.window, strict=True)):
        window, stride = ("x".join(map(str, size)) for size in (options.window, options.stride))
        raise UsageError(f"--stride expects at most --window ({window}), or pixels get no label, got {stride}")
    if options.max_crops is not None and options.max_crops < 1:
        raise UsageError(f"--max-crops expects at least 1, got {options.max_crops}")
    return options
