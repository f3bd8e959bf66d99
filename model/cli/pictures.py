"""Picture files to pixels and back. Pillow is optional; what needs it says so.

Transparent pictures are composited on white, EXIF rotation is applied, 16-bit greyscale is scaled to 8 bit.
"""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import import_extra

__all__ = ["pillow", "read_picture", "write_png"]


def pillow(module: str = "Image") -> Any:
    """A module of Pillow.

    Raises:
        ImportError: it is missing; tells what to install.
    """
    return import_extra(f"PIL.{module}", "Pillow", "predict")


def read_picture(path: Path) -> np.ndarray:
    """One file as uint8 [height, width, 3], red, green, blue.

    Raises:
        ValueError: the file cannot be read, is not a picture, is broken, or is not safe to decode; the message is the
            reason alone.
        ImportError: Pillow is missing.
    """
    images, operations = pillow(), pillow("ImageOps")
    require_regular_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit; an unattended run should not decode either.
            warnings.simplefilter("error", images.DecompressionBombWarning)
            with images.open(path) as opened:
                return np.asarray(to_rgb(operations.exif_transpose(opened)))
    except (images.DecompressionBombError, images.DecompressionBombWarning):
        raise ValueError("decompression bomb: too many pixels to decode safely") from None
    except images.UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None
    except ValueError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file provokes: OSError, SyntaxError, struct.error
        # Only the system numbers its errors: no permission, a failing disk. Decoders raise OSError without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        raise ValueError(f"broken file ({type(error).__name__})") from None


def write_png(image: Any, path: Path) -> None:
    """Write a Pillow image under its final name only when it is complete.

    Raises:
        OSError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def require_regular_file(path: Path) -> None:
    """Anything else is named here; opening a pipe would wait for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError("a link to nothing" if path.is_symlink() else "not there") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ValueError("a folder, not a picture")
    if not stat.S_ISREG(mode):
        raise ValueError("neither a file nor a folder")


def to_rgb(image: Any) -> Any:
    if image.mode.startswith("I"):
        return sixteen_bit_to_rgb(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white (mode F)")
    if image.has_transparency_data:
        white = pillow().new("RGBA", image.size, "white")
        return pillow().alpha_composite(white, image.convert("RGBA")).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(f"no conversion to RGB (mode {image.mode})") from None


def sixteen_bit_to_rgb(image: Any) -> Any:
    """Scales 0..65535 to 0..255; Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"32-bit pixels have no fixed white (mode {image.mode})")
    return pillow().fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
