"""Pictures of all kinds become pixels as they are seen, or are refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageOps
from predict_cases import Image, save_picture

from step_kernels.model.cli import pictures


def test_pixels_of_other_kinds_of_pictures(tmp_path: Path) -> None:
    """Grey of 16 bits keeps its range, transparency shows white, palettes and grey become colours."""
    grey = np.array([[0, 255, 257, 32768, 65535]], np.uint16)
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 8, 7])
    for name, image, wanted in (
        ("deep", Image.fromarray(grey), [[0], [1], [1], [128], [255]]),
        ("clear", clear, [[255]]),
        ("palette", palette, [[9, 8, 7]]),
        ("grey", Image.new("L", (1, 1), 77), [[77]]),
    ):
        image.save(tmp_path / f"{name}.png")
        pixels = pictures.read_picture(tmp_path / f"{name}.png")
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        assert (pixels[0] == wanted).all(), name
    for mode, value, message in (("F", 0.5, "no fixed white .mode F"), ("I", 1 << 20, "32-bit pixels")):
        Image.new(mode, (1, 1), value).save(tmp_path / "odd.tif")
        with pytest.raises(ValueError, match=message):
            pictures.read_picture(tmp_path / "odd.tif")


def tiff(values: list[int], white_is_zero: bool, bits: int = 16) -> bytes:
    """One row of grey, uncompressed, as Pillow does not write it."""
    if bits == 12:
        data = b"".join(((a << 12) + b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    else:
        data = struct.pack(f"<{len(values)}H", *values)
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: 1 - white_is_zero, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data += bytes(len(data) % 2)
    return struct.pack("<4sI", b"II*\0", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_grey_of_more_than_8_bits_keeps_its_white_and_what_is_clear(tmp_path: Path) -> None:
    values, twelve = [0, 257, 32768, 65535], [0, 16, 2048, 4095]
    (tmp_path / "a.tif").write_bytes(tiff(values, False))
    (tmp_path / "b.tif").write_bytes(tiff(values, True))
    (tmp_path / "c.tif").write_bytes(tiff(twelve, False, 12))
    Image.fromarray(np.array([values], np.uint16)).save(tmp_path / "d.png", transparency=257)
    for name, wanted in (
        ("a.tif", [0, 1, 128, 255]),
        ("b.tif", [255, 254, 127, 0]),
        ("c.tif", [0, 1, 128, 255]),
        ("d.png", [0, 255, 128, 255]),
    ):
        pixels = pictures.read_picture(tmp_path / name)
        assert pixels.tolist() == [[[value] * 3 for value in wanted]], name


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "chunk",
    [
        *(b"eXIfgarbage!", b"eXIfII*\0\x08\0\0\0\xff\xff", b"eXIfMM", b"gAMA\0", b"iCCPno profile", b"tEXtno end"),
        b"zTXtbomb\0\0" + zlib.compress(bytes(1 << 23)),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_decoration_does_not_cost_the_picture(tmp_path: Path, chunk: bytes, whole: bool) -> None:
    pixels = save_picture(tmp_path / "a.png", 8, 12)
    plain = (tmp_path / "a.png").read_bytes()
    checksum = zlib.crc32(chunk) if whole else 1
    damaged = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", checksum)
    (tmp_path / "a.png").write_bytes(plain[:33] + damaged + plain[33:])  # behind the header
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "a.png"), pixels)
    (tmp_path / "a.png").write_bytes((plain[:33] + damaged + plain[33:])[:-40])
    with pytest.raises(ValueError, match="broken file"):
        pictures.read_picture(tmp_path / "a.png")


def test_a_turn_outlasts_other_damage(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save_picture(tmp_path / "a.png", 8, 12, exif=exif)
    plain, wanted = (tmp_path / "a.png").read_bytes(), pictures.read_picture(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(plain[:33] + struct.pack(">I4sII", 4, b"gAMA", 1, 2) + plain[33:])
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "a.png"), wanted)
    assert wanted.shape == (12, 8, 3)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_way_a_photograph_lies(tmp_path: Path, suffix: str) -> None:
    for way in range(10):
        exif = Image.Exif()
        exif[0x0112] = way
        save_picture(tmp_path / f"a.{suffix}", 8, 12, exif=exif)
        with Image.open(tmp_path / f"a.{suffix}") as opened:
            wanted = np.asarray(ImageOps.exif_transpose(opened))
        np.testing.assert_array_equal(pictures.read_picture(tmp_path / f"a.{suffix}"), wanted)


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch) -> None:
    save_picture(tmp_path / "a.png", 40, 40)
    for limit in (1500, 700):  # Pillow warns above its limit, and refuses above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="decompression bomb"):
            pictures.read_picture(tmp_path / "a.png")
