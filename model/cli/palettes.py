"""Colours of classes: named palettes, palette files, and a checkpoint's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from step_kernels_cli import UsageError

__all__ = ["NAMES", "distinct_colours", "find_palette"]

NAMES = ("cityscapes", "voc")

# https://github.com/mcordts/cityscapesScripts, the 19 training classes.
CITYSCAPES = bytes.fromhex("""
804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98
4682b4 dc143c ff0000 00008e 000046 003c64 005064 0000e6 770b20
""")


def distinct_colours(count: int) -> np.ndarray:
    """PASCAL VOC's colours, uint8 [count, 3]: the class number's bits in turn are top bits of red, green and blue."""
    classes = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((classes >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def find_palette(wanted: str | None, told: Sequence[Sequence[int]] | None, num_classes: int) -> np.ndarray | None:
    """Colours uint8 [num_classes, 3]: the wanted ones, else those ``told`` by the checkpoint; None where there shall be none.

    ``wanted`` is one of `NAMES`, "none", or a file, see `read_palette`.
    """
    if wanted == "none" or (wanted is None and told is None):
        return None
    if wanted is None:
        return checked_palette(told or (), num_classes, "the checkpoint's palette (see --palette none)")
    if wanted == "voc":
        return distinct_colours(num_classes)
    if wanted == "cityscapes":
        colours = np.frombuffer(CITYSCAPES, np.uint8).reshape(-1, 3).tolist()
        return checked_palette(colours, num_classes, "palette cityscapes")
    if not Path(wanted).exists():
        raise UsageError(f"--palette expects {', '.join(NAMES)}, none or a file, got {wanted!r}, which does not exist")
    return read_palette(Path(wanted), num_classes)


def read_palette(path: Path, num_classes: int) -> np.ndarray:
    """A text file with one class per line: ``R G B`` (0..255; blanks or commas between) or ``#rrggbb``, then anything."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--palette {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--palette {path} is no text file") from None
    colours = [colour_of(line, f"--palette {path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    return checked_palette(colours, num_classes, f"--palette {path}")


def colour_of(line: str, place: str) -> tuple[int, ...]:
    """The colour at the beginning of a line."""
    if match := re.match(r"\s*#([0-9a-fA-F]{6})(?![^\s,])", line):
        return tuple(bytes.fromhex(match[1]))
    if match := re.match(r"\s*(\d+)[\s,]+(\d+)[\s,]+(\d+)(?![^\s,])", line):
        return tuple(map(int, match.groups()))
    raise UsageError(f"{place}: expects R G B or #rrggbb, got {line.strip()[:40]!r}")


def checked_palette(colours: Sequence[Sequence[int]], num_classes: int, source: str) -> np.ndarray:
    """uint8 [num_classes, 3] of at least so many colours; UsageError where there are fewer, or something is no colour."""
    for number, colour in enumerate(colours):
        if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
            raise UsageError(f"{source} has {tuple(colour)} for class {number}, expected red, green, blue in 0..255")
    if len(colours) < num_classes:
        raise UsageError(f"{source} has {len(colours)} colours, the checkpoint has {num_classes} classes")
    return np.array(colours[:num_classes], np.uint8)
