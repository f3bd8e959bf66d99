"""Square pictures as model input: photographs out of scikit-image's wheel, or a folder's, or generated ones where neither can be read.

A picture is reduced to the size that is asked for, never enlarged. The first time it gives its largest centred square, then other squares
of it, mirrored and turned, so that no image comes twice. What cannot be used is named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from step_kernels.model.cli.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# motorcycle_right is left out: it is motorcycle_left from a few centimetres further on.
PHOTOGRAPHS = (
    "astronaut.png", "retina.jpg", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "coffee.png", "rocket.jpg", "chelsea.png"
)  # fmt: skip
VIEWS = 8  # of a square: as it is, mirrored, turned
FEWEST_LOOKED_AT, MOST_NAMED = 32, 8  # unusable files are named, but not all of a folder of thousands


@dataclass(frozen=True)
class Pictures:
    """Different square pictures.

    Attributes:
        names: one for each; a number is added where one file gives several.
        pixels: uint8 [count, size, size, 3].
        messages: what a reader should know about where they are from.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    messages: tuple[str, ...] = ()

    def tensor(self) -> Tensor:
        """float32 [count, 3, size, size], normalised with ImageNet's mean and standard deviation."""
        images = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return ((images - mean) / std).contiguous()


def view(pictures: Tensor, number: int) -> Tensor:
    """One of the `VIEWS` ways to lay down squares [..., size, size]; number 0 leaves them as they are."""
    turned = pictures.rot90(number // 2, (-2, -1))
    return turned.flip(-1) if number % 2 else turned


def squares(count: int, size: int, folder: Path | None = None) -> Pictures:
    """`count` pictures of `size` x `size` pixels.

    Args:
        count, size: of the pictures.
        folder: of pictures (its subfolders are not searched); None: scikit-image's photographs, or generated pictures without it.

    Raises:
        UsageError: the folder cannot be read, or nothing in it can be used.
    """
    source = folder or folder_of("skimage")
    needed = {"Pillow": folder_of("PIL"), "tqdm": folder_of("tqdm"), "scikit-image": source}
    missing = " and ".join(name for name, found in needed.items() if found is None)
    if folder and missing:
        raise UsageError(f"--images needs {missing}: pip install 'step-kernels[bench]'")
    if missing or source is None:
        message = f"Generated pictures take the place of photographs, which need {missing}."
        return Pictures(tuple(f"generated {n}" for n in range(1, count + 1)), generated(count, size), (message,))
    try:
        paths = sorted(folder.iterdir()) if folder else [source / "data" / name for name in PHOTOGRAPHS]
    except OSError as error:
        raise UsageError(f"--images expects a folder of pictures, {folder} cannot be read: {error.strerror}") from None
    found, messages = usable(paths, size, count)
    if not found:
        where, reasons = f"--images {folder}" if folder else "scikit-image", "; ".join(messages) or "it holds no files"
        raise UsageError(f"no usable picture of at least {size}x{size} px in {where}: {reasons}")
    if not folder:
        messages = []  # which of the photographs are too small for this size is no news
    if len(found) < count:
        messages.append(f"{count} pictures from {len(found)} files: several squares of each, mirrored and turned")
    generator, names, pixels = np.random.default_rng(0), [], []
    for number in range(count):
        time, (name, picture) = number // len(found), list(found.items())[number % len(found)]
        names.append(f"{name} {time + 1}" if time else name)
        pixels.append(square(picture, size, time, generator))
    return Pictures(tuple(names), np.stack(pixels), tuple(messages))


def folder_of(package: str) -> Path | None:
    """Where a package lies, or None. It is not imported: scikit-image's start takes a second."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def usable(paths: Sequence[Path], size: int, enough: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Up to `enough` pictures that are large enough, uint8 [height, width, 3] by name; and a line for each reason that left others out."""
    from step_kernels.model.cli.predict import read_picture  # needs Pillow

    found: dict[str, np.ndarray] = {}
    left_out: dict[str, list[str]] = {"left out": [], f"smaller than {size}x{size} px, never enlarged": []}
    broken, small = left_out.values()
    for number, path in enumerate(paths):
        if len(found) == enough and number >= FEWEST_LOOKED_AT:
            break
        try:
            picture = read_picture(path)
        except ValueError as reason:
            broken.append(f"{path.name} ({reason})")
            continue
        if min(picture.shape[:2]) < size:
            small.append(f"{path.name} ({picture.shape[1]}x{picture.shape[0]})")
        elif len(found) < enough:
            found[path.stem if path.stem not in found else path.name] = picture
    return found, [
        f"{reason}: {', '.join(names[:MOST_NAMED])}" + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")
        for reason, names in left_out.items()
        if names
    ]  # fmt: skip


def square(picture: np.ndarray, size: int, time: int, generator: np.random.Generator) -> np.ndarray:
    """The largest centred square at first, later one of any place and extent in another view; uint8 [size, size, 3]."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if time:
        side = int(generator.integers(size, side + 1))
        top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
    own = picture[top : top + side, left : left + side]
    if side != size:
        from PIL import Image

        own = np.asarray(Image.fromarray(own).resize((size, size), Image.Resampling.LANCZOS))
    turned = np.rot90(own, time % VIEWS // 2)
    return turned[:, ::-1] if time % 2 else turned


def generated(count: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, size, size, 3]: calm ground, flat shapes, rough shapes; no two alike."""
    generator = np.random.default_rng(seed)
    down, across = np.mgrid[0:size, 0:size] / size
    pictures = np.empty((count, size, size, 3), np.uint8)
    for picture in pictures:
        top, bottom = generator.uniform(30, 225, (2, 3))
        pixels = top + (bottom - top) * down[..., None]
        for _ in range(14):
            centre, axes = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.28, 2)
            inside = ((down - centre[0]) / axes[0]) ** 2 + ((across - centre[1]) / axes[1]) ** 2 < 1
            noise = generator.choice([0, 70]) * generator.uniform(-1, 1, (int(inside.sum()), 3))
            pixels[inside] = generator.uniform(20, 235, 3) + noise
        picture[:] = pixels.clip(0, 255)
    return pictures
