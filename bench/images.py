"""Square pictures as model input: photographs out of scikit-image's wheel, or a folder's, or generated ones where neither can be read.

Of a picture its largest centred square is taken and reduced to the size that is asked for, never enlarged; where there are fewer pictures
than that, they come again, mirrored and turned. What cannot be used is named.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.extras import how_to_install
from step_kernels_cli import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# motorcycle_right is left out: it is motorcycle_left from a few centimetres further on.
PHOTOGRAPHS = (
    "astronaut.png", "retina.jpg", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "coffee.png", "rocket.jpg", "chelsea.png"
)  # fmt: skip
VIEWS = 8  # of a square: as it is, mirrored, turned
MOST_NAMED = 8  # of unusable files; a folder may hold thousands


@dataclass(frozen=True)
class Pictures:
    """Square pictures."""

    names: tuple[str, ...]  # one for each; a number is added where one file gives several
    pixels: Tensor  # uint8 [count, 3, size, size]
    messages: tuple[str, ...] = ()  # what a reader should know about where they are from

    def tensor(self) -> Tensor:
        """float32 [count, 3, size, size], normalised with ImageNet's mean and standard deviation."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (self.pixels / 255 - mean) / std


def view(pictures: Tensor, number: int) -> Tensor:
    """One of the `VIEWS` ways to lay down squares [..., size, size], contiguous; number 0 leaves them as they are."""
    turned = pictures.rot90(number % VIEWS // 2, (-2, -1))
    return (turned.flip(-1) if number % 2 else turned).contiguous()


def squares(count: int, size: int, folder: Path | None = None) -> Pictures:
    """`count` pictures of `size` x `size` pixels, of a folder (UsageError where none in it can be used), scikit-image's, or generated."""
    source = folder or folder_of("skimage")
    needed = {"Pillow": folder_of("PIL"), "tqdm": folder_of("tqdm"), "scikit-image": source}
    missing = [name for name, found in needed.items() if found is None]
    if folder and missing:
        raise UsageError(f"--images needs {' and '.join(missing)}: {how_to_install(' '.join(missing), 'bench')}")
    if missing or source is None:
        message = f"Generated pictures take the place of photographs, which need {' and '.join(missing)}."
        return Pictures(tuple(f"generated {n + 1}" for n in range(count)), generated(count, size), (message,))
    try:
        paths = sorted(folder.iterdir()) if folder else [source / "data" / name for name in PHOTOGRAPHS]
    except OSError as error:
        raise UsageError(f"--images expects a folder of pictures, {folder} cannot be read: {error.strerror}") from None
    found, left_out = usable(paths, size, count)
    reasons = ", ".join(left_out[:MOST_NAMED]) + ", and more" * (len(left_out) > MOST_NAMED)
    if not found:
        where = f"--images {folder}" if folder else "scikit-image"
        raise UsageError(f"no usable picture of at least {size}x{size} px in {where}: {reasons or 'it holds no files'}")
    messages = [f"left out: {reasons}"] if folder and left_out else []  # which photographs are too small is no news
    if len(found) < count:
        messages.append(f"{count} pictures from {len(found)} files: the same ones mirrored and turned")
    times = [(n // len(found), list(found)[n % len(found)]) for n in range(count)]
    names = [f"{name} {time + 1}" if time else name for time, name in times]
    return Pictures(tuple(names), torch.stack([view(found[name], time) for time, name in times]), tuple(messages))


def folder_of(package: str) -> Path | None:
    """Where a package lies, or None. It is not imported: scikit-image's start takes a second."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def usable(paths: list[Path], size: int, enough: int) -> tuple[dict[str, Tensor], list[str]]:
    """The squares, uint8 [3, size, size] by name, of the first pictures that are large enough; and why others before them are not used."""
    from PIL import Image

    from step_kernels.model.cli.predict import read_picture  # needs Pillow

    found, left_out = dict[str, Tensor](), []
    for path in paths:
        try:
            picture = Image.fromarray(read_picture(path))
        except ValueError as reason:
            left_out.append(f"{path.name} ({reason})")
            continue
        side, left, top = min(picture.size), *((extent - min(picture.size)) // 2 for extent in picture.size)
        if side < size:
            left_out.append(f"{path.name} ({picture.width}x{picture.height}, never enlarged)")
            continue
        own = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        found[path.stem if path.stem not in found else path.name] = torch.from_numpy(np.array(own)).permute(2, 0, 1)
        if len(found) == enough:
            break
    return found, left_out


def generated(count: int, size: int) -> Tensor:
    """uint8 [count, 3, size, size]: calm ground with rough shapes on it; no two alike."""
    generator = torch.Generator().manual_seed(0)
    ground, shapes, noise = (
        F.interpolate(torch.rand(count, channels, side, side, generator=generator), (size, size), mode="bilinear")
        for channels, side in ((3, 6), (1, 9), (3, size))
    )
    return (255 * torch.where(shapes > 0.6, noise, ground)).to(torch.uint8)
