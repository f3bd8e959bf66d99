"""Real photographs as model input: cropped to a square, reduced where they are larger, never upscaled, never one twice.

Two sources: the colour photographs inside scikit-image's wheel (read from its data folder: no network), or a folder. Where
scikit-image or Pillow is missing and no folder is named, generated pictures take their place, and the run says so.
Transparent pictures are composited on white, EXIF rotation is applied, 16-bit greyscale is scaled to 8 bit. What cannot
be used is named, and the run goes on with the rest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from step_kernels.model.cli import pictures as _pictures

from .errors import UsageError, need_extra
from .generated import draw_pictures

try:
    from PIL import Image
except ImportError:  # Pillow comes with the extra; `_require_pillow` says so where it is needed
    Image = None  # type: ignore[assignment]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The colour photographs of scikit-image's wheel. motorcycle_right is left out: it is motorcycle_left from a few
# centimetres further on, too close to the same picture twice.
SKIMAGE_PHOTOGRAPHS = (
    "astronaut.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "coffee.png",
    "rocket.jpg",
    "chelsea.png",
)

VIEWS = 8  # of a square: as it is, mirrored, turned

MOST_NAMED = 8  # a folder of thousands of unusable files must not scroll the report away
FEWEST_LOOKED_AT = 32


@dataclass(frozen=True)
class Picture:
    """One decoded picture; `pixels` is uint8 [height, width, 3]."""

    name: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Photographs:
    """A batch of different square crops.

    Attributes:
        names: one per crop; a number is added where one picture gives several crops.
        pixels: uint8 [batch, size, size, 3].
        messages: one line per kind of picture that was left out.
        generated: they are no photographs.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    messages: tuple[str, ...]
    generated: bool = False

    def tensor(self) -> torch.Tensor:
        """float32 [batch, 3, size, size], normalised with ImageNet's mean and standard deviation."""
        images = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return ((images - mean) / std).contiguous()


def view(pictures: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight ways to lay down squares [..., size, size], by number below `VIEWS`; 0 leaves them as they are."""
    turned = pictures.rot90(number // 2, (-2, -1))
    return turned.flip(-1) if number % 2 else turned


def load_photographs(folder: Path | None, *, size: int, batch: int | None, most: int = 4) -> Photographs:
    """Different crops of `size` x `size` pixels for one batch.

    Every picture gives its largest centred square, reduced to `size`. A batch larger than the number of pictures takes
    several crops that do not overlap, at full resolution, from pictures that are large enough for that.

    Args:
        folder: a folder of pictures (its subfolders are not searched), or None for scikit-image's photographs, or for
            generated pictures where those cannot be read.
        size: side of a crop in pixels.
        batch: number of crops, or None for as many as there are up to `most`.
        most: see `batch`.

    Raises:
        UsageError: the folder cannot be read, nothing in it is usable, or it gives fewer crops than `batch`.
    """
    data = _skimage_data()
    if folder is None and (Image is None or data is None):
        return _generated("Pillow" if Image is None else "scikit-image", size=size, count=batch or most)
    _require_pillow()
    if folder is not None:
        paths, source = _folder_paths(folder)
    else:
        paths, source = _photographs_in(data), "scikit-image's photographs"
    pictures, messages = _usable_pictures(paths, size=size, enough=batch or most)
    available = sum(_tile_count(picture, size) for picture in pictures)
    if not pictures:
        reasons = "; ".join(messages) or "it holds no files"
        raise UsageError(f"no usable picture of at least {size}x{size} px in {source}: {reasons}")
    if batch is not None and available < batch:
        raise UsageError(
            f"--batch {batch} needs {batch} different crops of {size}x{size} px, {source} gives {available} "
            f"(from {len(pictures)} pictures): ask for at most --batch {available}, or add pictures with --images"
        )
    count = min(available, most) if batch is None else batch
    if batch is None and count < most:
        messages.append(f"batch of {count} instead of {most}: {source} gives no more crops of {size}x{size} px")
    names, crops = _take_crops(pictures, size, count)
    return Photographs(names, np.stack(crops), tuple(messages))


def read_picture(path: Path) -> Picture:
    """Decodes one file to 8-bit RGB.

    Raises:
        ValueError: it is none that can be decoded; the message is the reason alone.
    """
    _require_pillow()
    return Picture(path.stem, _pictures.read_picture(path))


def _generated(missing: str, *, size: int, count: int) -> Photographs:
    names = tuple(f"generated {number}" for number in range(1, count + 1))
    message = f"{need_extra(missing, 'photographs')}; generated pictures take their place"
    return Photographs(names, draw_pictures(size, count), (message,), generated=True)


def _photographs_in(data: Path | None) -> list[Path]:
    paths = [data / name for name in SKIMAGE_PHOTOGRAPHS] if data is not None else []
    return [path for path in paths if path.is_file()]


def _skimage_data() -> Path | None:
    # find_spec does not import scikit-image, so its start-up time and its optional downloader stay out of the run.
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _folder_paths(folder: Path) -> tuple[list[Path], str]:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise UsageError(f"--images expects a folder of pictures, {folder} is {found}")
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"--images {folder} cannot be read: {error.strerror}") from None
    return paths, f"--images {folder}"


def _usable_pictures(paths: Sequence[Path], *, size: int, enough: int) -> tuple[list[Picture], list[str]]:
    """Up to `enough` different pictures that are large enough, and a line per reason for the others."""
    pictures: list[Picture] = []
    left_out, too_small, not_needed = [], [], []
    seen: dict[bytes, str] = {}
    looked_at = 0
    for path in paths:
        # Small folders are judged whole, so that every unusable file is named; large ones would take minutes.
        if len(pictures) == enough and looked_at >= FEWEST_LOOKED_AT:
            break
        looked_at += 1
        try:
            picture = read_picture(path)
        except ValueError as reason:
            left_out.append(f"{path.name} ({reason})")
            continue
        height, width = picture.pixels.shape[:2]
        digest = hashlib.sha256(picture.pixels.tobytes() + bytes(f"{height}x{width}", "ascii")).digest()
        if min(height, width) < size:
            too_small.append(f"{path.name} ({width}x{height})")
        elif digest in seen:
            left_out.append(f"{path.name} (same pixels as {seen[digest]})")
        elif len(pictures) == enough:
            not_needed.append(path.name)
        else:
            seen[digest] = path.name
            pictures.append(picture)
    messages = []
    if left_out:
        messages.append(f"left out: {_some_of(left_out)}")
    if too_small:
        messages.append(f"smaller than {size}x{size} px, never upscaled: {_some_of(too_small)}")
    if not_needed:
        messages.append(f"not needed for a batch of {enough}: {_some_of(not_needed)}")
    if looked_at < len(paths):
        messages.append(f"not looked at: {len(paths) - looked_at} more files")
    return pictures, messages


def _some_of(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"


def _tile_count(picture: Picture, size: int) -> int:
    height, width = picture.pixels.shape[:2]
    return (height // size) * (width // size)


def _take_crops(pictures: Sequence[Picture], size: int, count: int) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """`count` crops spread over the pictures as evenly as their sizes allow."""
    shares = [0] * len(pictures)
    while sum(shares) < count:
        for index, picture in enumerate(pictures):
            if sum(shares) < count and shares[index] < _tile_count(picture, size):
                shares[index] += 1
    names: list[str] = []
    crops: list[np.ndarray] = []
    for picture, share in zip(pictures, shares, strict=True):
        if share == 1:
            names.append(picture.name)
            crops.append(_centre_square(picture.pixels, size))
        else:
            names += [f"{picture.name} {number}" for number in range(1, share + 1)]
            crops += _central_tiles(picture.pixels, size, share)
    return tuple(names), crops


def _centre_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, reduced to `size` so that it still shows the whole subject."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS))


def _central_tiles(pixels: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """The `count` tiles nearest to the centre of a grid of tiles that is itself centred."""
    height, width = pixels.shape[:2]
    rows, columns = height // size, width // size
    top, left = (height - rows * size) // 2, (width - columns * size) // 2
    corners = [(top + row * size, left + column * size) for row in range(rows) for column in range(columns)]

    def distance_to_centre(corner: tuple[int, int]) -> float:
        return math.hypot(corner[0] + size / 2 - height / 2, corner[1] + size / 2 - width / 2)

    nearest = sorted(corners, key=distance_to_centre)[:count]
    return [pixels[top : top + size, left : left + size] for top, left in nearest]


def _require_pillow() -> None:
    if Image is None:
        raise need_extra("Pillow", "reading pictures")
