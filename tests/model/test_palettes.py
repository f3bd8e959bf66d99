"""Colours of classes: named palettes, palette files, and a checkpoint's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from step_kernels.model.cli.palettes import distinct_colours, find_palette
from step_kernels_cli import UsageError

COLOURS = tuple((50 * i, 255 - 50 * i, 7 * i) for i in range(5))


def test_the_wanted_palette_comes_before_the_checkpoints(tmp_path: Path) -> None:
    lines = "\n".join(f"{r} {g}, {b} class {r}" for r, g, b in COLOURS) + "\n\n1 2 3 more than needed\n"
    (tmp_path / "numbers.txt").write_text(lines)
    (tmp_path / "hex.txt").write_text("\n".join(f"#{bytes(colour).hex()} name" for colour in COLOURS))
    for wanted, told in (
        (None, COLOURS),
        (str(tmp_path / "numbers.txt"), None),
        (str(tmp_path / "hex.txt"), ((1, 2),)),
    ):
        palette = find_palette(wanted, told, 5)
        assert palette.dtype == np.uint8 and (palette == COLOURS).all()
    assert find_palette("cityscapes", COLOURS, 2).tolist() == [[128, 64, 128], [244, 35, 232]]
    assert find_palette("voc", COLOURS, 2).tolist() == [[0, 0, 0], [128, 0, 0]]
    assert find_palette("none", COLOURS, 5) is None and find_palette(None, None, 5) is None


def test_distinct_colours_are_pascal_vocs() -> None:
    """Its published map: background, aeroplane, bicycle, ..., tvmonitor, border."""
    colours = distinct_colours(1000)
    known = {1: (128, 0, 0), 2: (0, 128, 0), 5: (128, 0, 128), 8: (64, 0, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert all(tuple(colours[number]) == colour for number, colour in known.items())
    assert len({tuple(colour) for colour in colours}) == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n" * 4, "palette.txt has 4 colours, the checkpoint has 5 classes"),
        ("1 2 3\nred\n", "palette.txt, line 2: expects R G B or #rrggbb, got 'red'"),
        ("1 2 3\n#12345\n", "line 2: expects R G B or #rrggbb"),
        ("1 2 3\n1 2 3.5\n", "line 2: expects R G B or #rrggbb"),
        ("1 2 3\n0 0 256\n", r"has \(0, 0, 256\) for class 1, expected red, green, blue in 0..255"),
        ("", "has 0 colours"),
        (b"\xff\xfe", "palette.txt is no text file"),
    ],
)
def test_palette_files_are_checked(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "palette.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        find_palette(str(tmp_path / "palette.txt"), None, 5)


@pytest.mark.parametrize(
    ("wanted", "told", "message"),
    [
        (None, ((1, 2, 3),), "the checkpoint's palette .see --palette none. has 1 colours"),
        (None, ((1, 2),) * 5, "the checkpoint's palette"),
        ("rainbow", None, "--palette expects cityscapes, voc, none or a file, got 'rainbow'"),
        ("/", None, "--palette / cannot be read: Is a directory"),
    ],
)
def test_palettes_that_cannot_be(wanted: str | None, told: tuple[tuple[int, ...], ...] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_palette(wanted, told, 5)
