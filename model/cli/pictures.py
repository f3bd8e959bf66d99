"""Picture files: which ones are meant, their pixels, and where their labels go."""

from __future__ import annotations

import glob
import io
import os
import tempfile
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from step_kernels_cli import UsageError

from ...files import replacing
from .palettes import distinct_colours

__all__ = ["Task", "check_writable", "find_pictures", "plan", "read_picture", "write"]

PNG = b"\x89PNG\r\n\x1a\n"  # how each begins
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value


@dataclass(frozen=True)
class Task:
    """One picture and where its results go."""

    picture: Path
    labels: Path
    overlay: Path | None  # None: not wanted


def find_pictures(words: Sequence[str]) -> list[Path]:
    """Files as they are named, the pictures in folders, what patterns match; UsageError for a word that brings nothing."""
    from PIL import Image

    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = dict[Path, None]()
    for word in words:
        path = Path(word)
        if path.is_dir():
            pictures = [file for file in sorted(path.iterdir()) if file.suffix.lower() in known and file.is_file()]
            if not pictures:
                raise UsageError(
                    f"no picture is in the folder {word} (for folders below it: '{path / '**' / '*.jpg'}')"
                )
        elif glob.has_magic(word) and not path.exists():
            pictures = [file for file in map(Path, sorted(glob.glob(word, recursive=True))) if file.is_file()]
            if not pictures:
                raise UsageError(f"no file is called as {word}")
        else:
            pictures = [path]
        found |= dict.fromkeys(pictures)
    return list(found)


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
        raise UsageError(f"--out {out} cannot be written: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """The system's words, else the error's own; its class, too, where those are a number or none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or os.strerror(error.errno)
    text = str(error)
    return text if text.lstrip("-0123456789") else repr(error)


def read_picture(path: Path) -> np.ndarray:
    """One file as uint8 [height, width, 3], red, green, blue: turned as EXIF says, on white where it is transparent.

    ValueError, whose message is the reason alone: it cannot be read, is not a picture, is broken, or is not safe to decode.
    """
    from PIL import Image

    try:
        # Anything else is named here; opening a pipe would wait for ever.
        if not path.exists():
            raise ValueError("a link to nothing" if path.is_symlink() else "not there")
        if not path.is_file():
            raise ValueError("neither a file nor a folder")
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; an unattended run should not decode either.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return decoded(path)
            except Exception:
                plain = undecorated(path)
                if plain is None:
                    raise
                return decoded(plain)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError("decompression bomb: too many pixels to decode safely") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None
    except ValueError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file provokes: OSError, SyntaxError, struct.error
        # Only the system numbers its errors: no permission, a failing disk. Decoders raise OSError without a number.
        what = "cannot be read" if getattr(error, "errno", None) is not None else "broken file"
        raise ValueError(f"{what}: {reason_of(error)}") from None


def decoded(file: Path | io.BytesIO) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as opened:
        opened.load()  # says what is broken in the pixels
        return np.asarray(turned(to_rgb(opened), opened))


def undecorated(path: Path) -> io.BytesIO | None:
    """A PNG without what draws nothing (profiles, texts, a damaged EXIF), at whose faults Pillow gives up; None: no PNG."""
    with path.open("rb") as file:
        if file.read(len(PNG)) != PNG:
            return None
        data = file.read()
    kept, start = [PNG], 0
    while start < len(data):
        kind, end = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4])
        is_whole = zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and is_whole):
            kept.append(data[start:end])
        start = end
    return io.BytesIO(b"".join(kept))


def turned(image: Any, opened: Any) -> Any:
    """As EXIF or XMP of the opened file say; as it lies where they are damaged, which no other program minds either."""
    from PIL import Image

    try:
        way = opened.getexif().get(0x0112)
    except Exception:  # parsers raise whatever a damaged file provokes, as decoders do
        way = None
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turns |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    return image.transpose(Image.Transpose[turns[way]]) if way in turns else image


def to_rgb(image: Any) -> Any:
    """Scales 16-bit grey to 8 bit, which Pillow itself would clip to white, and of which it leaves white and clear to the caller."""
    from PIL import Image

    if image.mode.startswith("I"):
        values, tags = np.asarray(image).astype(np.int64), getattr(image, "tag_v2", {})  # of a TIFF
        bits = min(tags.get(BITS_PER_SAMPLE, (16,))[0], 16)
        white = (1 << bits) - 1
        if values.min() < 0 or values.max() > white:
            raise ValueError(f"32-bit pixels have no fixed white (mode {image.mode})")
        clear = values == image.info.get("transparency", -1)
        values = white - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values
        image = Image.fromarray(np.where(clear, 255, (255 * values + white // 2) // white).astype(np.uint8))
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
    with replacing(path) as part:
        image.save(part, format="PNG")
