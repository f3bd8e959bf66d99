"""Pictures: every awkward file is handled or named, nothing is enlarged, no picture appears twice."""

from __future__ import annotations

import errno
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import images
from bench.errors import UsageError
from bench.images import IMAGENET_MEAN, IMAGENET_STD, load_photographs, read_picture
from step_kernels.model import VariancePolicy

Image = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra bench")

SIZE = 32


def colours(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(folder: Path, name: str, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(folder / name, **options)
    return folder / name


def test_rgb_is_read_unchanged(tmp_path: Path) -> None:
    pixels = colours(5, 7)
    picture = read_picture(save(tmp_path, "colour.png", pixels))
    assert picture.name == "colour"
    np.testing.assert_array_equal(picture.pixels, pixels)


def test_greyscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = colours(5, 7)[:, :, 0]
    pixels = read_picture(save(tmp_path, "grey.png", grey)).pixels
    np.testing.assert_array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    deep = np.array([[0, 257, 300], [32768, 65535, 514]], np.uint16)
    pixels = read_picture(save(tmp_path, name, deep)).pixels
    np.testing.assert_array_equal(pixels[:, :, 0], [[0, 1, 1], [128, 255, 2]])
    np.testing.assert_array_equal(pixels[:, :, 0], pixels[:, :, 2])


def test_thirty_two_bits_are_refused_with_their_mode(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"32-bit .* \(mode I\)"):
        read_picture(tmp_path / "deep.tif")


def test_floating_point_pixels_are_refused_with_their_mode(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="mode F"):
        read_picture(tmp_path / "float.tif")


def test_palette_is_resolved(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 2:] = (200, 30, 60)
    Image.fromarray(pixels).quantize(2).save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as stored:
        assert stored.mode == "P"
    np.testing.assert_array_equal(read_picture(tmp_path / "palette.png").pixels, pixels)


def test_transparent_palette_entry_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((2, 1), 0)
    image.save(tmp_path / "holes.gif", transparency=0)
    pixels = read_picture(tmp_path / "holes.gif").pixels
    assert pixels[1, 2].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == [40, 50, 60]


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))])
def test_transparency_is_composited_on_white(tmp_path: Path, mode: str, colour: tuple[int, ...]) -> None:
    image = Image.new(mode, (4, 4), colour)
    image.putpixel((0, 0), (*colour[:-1], 255))
    image.save(tmp_path / "clear.png")
    pixels = read_picture(tmp_path / "clear.png").pixels
    assert pixels[3, 3].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == ([10, 20, 30] if mode == "RGBA" else [10, 10, 10])


def test_cmyk_ink_becomes_light(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 0, 8, 8))
    image.save(tmp_path / "print.tif")
    pixels = read_picture(tmp_path / "print.tif").pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 7].tolist() == [0, 0, 0]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    save(tmp_path, "turned.png", pixels, exif=exif)
    turned = read_picture(tmp_path / "turned.png").pixels
    assert turned.shape == (6, 4, 3)
    assert turned[0, 3].tolist() == [255, 255, 255]


def test_truncated_file_is_broken(tmp_path: Path) -> None:
    path = save(tmp_path, "half.jpg", colours(64, 64))
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(ValueError, match="broken file"):
        read_picture(path)


def test_file_that_cannot_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, "private.png", colours(4, 4))

    def refuse(*arguments: object) -> None:  # root may read everything, so permissions alone would not stop the test
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"^cannot be read: Permission denied$"):
        read_picture(path)


@pytest.mark.parametrize("kind", ["pipe", "missing"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "strange.png"
    if kind == "pipe":
        os.mkfifo(path)  # opening it would never return
    with pytest.raises(ValueError, match="neither a file nor a folder" if kind == "pipe" else "not there"):
        read_picture(path)


def test_text_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="not a picture"):
        read_picture(tmp_path / "notes.txt")


@pytest.mark.parametrize("limit", [60, 20], ids=["where Pillow only warns", "where Pillow raises"])
def test_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = save(tmp_path, "bomb.png", colours(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="decompression bomb"):
        read_picture(path)


def test_folder_of_awkward_files_goes_on_and_names_what_is_left_out(tmp_path: Path) -> None:
    broken = save(tmp_path, "broken.jpg", colours(64, 64))
    broken.write_bytes(broken.read_bytes()[:700])
    save(tmp_path, "pixel.png", colours(1, 1))
    save(tmp_path, "small.png", colours(SIZE, SIZE - 1))
    save(tmp_path, "grey.png", colours(40, 50, seed=1)[:, :, 0])
    save(tmp_path, "palette.png", colours(40, 50, seed=2), "P")
    save(tmp_path, "print.jpg", colours(40, 50, seed=3), "CMYK")
    save(tmp_path, "deep.png", colours(40, 50, seed=4)[:, :, 0].astype(np.uint16) * 257)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    photographs = load_photographs(tmp_path, size=SIZE, batch=None, most=8)
    assert photographs.names == ("deep", "grey", "palette", "print")
    assert photographs.pixels.shape == (4, SIZE, SIZE, 3)
    text = "\n".join(photographs.messages)
    for name in ("broken.jpg (broken file", "notes.txt (not a picture", "pixel.png (1x1)", "small.png (31x32)"):
        assert name in text
    for name in ("folder.png (a folder, not", "dangling.png (a link to nothing)"):
        assert name in photographs.messages[0]
    assert len(photographs.messages) == 3  # left out, too small, fewer than eight
    assert ".hidden" not in text


def test_long_lists_of_unusable_files_are_shortened(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("no picture")
    save(tmp_path, "colour.png", colours(SIZE, SIZE))
    (message, _) = load_photographs(tmp_path, size=SIZE, batch=None, most=2).messages
    assert message.count("not a picture") == images.MOST_NAMED
    assert message.endswith("and 12 more")


def test_pictures_beyond_the_batch_are_judged_and_named(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path, f"{name}.png", colours(SIZE, SIZE, seed=ord(name)))
    save(tmp_path, "small.png", colours(8, 8))
    photographs = load_photographs(tmp_path, size=SIZE, batch=2)
    assert photographs.names == ("a", "b")
    assert any("small.png (8x8)" in message for message in photographs.messages)
    assert "not needed for a batch of 2: c.png" in photographs.messages


def test_large_folder_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(images.FEWEST_LOOKED_AT + 5):
        save(tmp_path, f"{number:02}.png", colours(2, 2, seed=number))
    read = []
    monkeypatch.setattr(images, "read_picture", lambda path: read.append(path) or read_picture(path))
    photographs = load_photographs(tmp_path, size=2, batch=1)
    assert len(read) == images.FEWEST_LOOKED_AT
    assert "not looked at: 5 more files" in photographs.messages


def test_picture_of_exactly_the_size_is_used_unchanged(tmp_path: Path) -> None:
    pixels = colours(SIZE, SIZE)
    save(tmp_path, "colour.png", pixels)
    np.testing.assert_array_equal(load_photographs(tmp_path, size=SIZE, batch=1).pixels[0], pixels)


def test_centre_is_cropped(tmp_path: Path) -> None:
    pixels = colours(SIZE, SIZE + 10)
    save(tmp_path, "wide.png", pixels)
    np.testing.assert_array_equal(load_photographs(tmp_path, size=SIZE, batch=1).pixels[0], pixels[:, 5 : 5 + SIZE])


def test_large_picture_is_reduced_whole(tmp_path: Path) -> None:
    pixels = np.zeros((4 * SIZE, 4 * SIZE, 3), np.uint8)
    pixels[:, 2 * SIZE :] = 200
    save(tmp_path, "large.png", pixels)
    crop = load_photographs(tmp_path, size=SIZE, batch=1).pixels[0]
    assert crop.shape == (SIZE, SIZE, 3)
    assert crop[:, : SIZE // 2 - 3].max() == 0
    assert crop[:, SIZE // 2 + 3 :].min() == 200


def test_larger_batch_takes_crops_that_share_no_pixel(tmp_path: Path) -> None:
    height, width = 2 * SIZE + 5, 3 * SIZE + 7
    places = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    pixels = np.stack([places % 256, places // 256 % 256, places // 65536], axis=2).astype(np.uint8)
    save(tmp_path, "large.png", pixels)
    photographs = load_photographs(tmp_path, size=SIZE, batch=6)
    assert photographs.names == tuple(f"large {number}" for number in range(1, 7))
    seen = photographs.pixels.astype(np.uint32) @ np.array([1, 256, 65536], np.uint32)
    assert len(np.unique(seen)) == 6 * SIZE * SIZE


def test_batch_is_spread_over_the_pictures(tmp_path: Path) -> None:
    save(tmp_path, "a.png", colours(2 * SIZE, 2 * SIZE, seed=1))
    save(tmp_path, "b.png", colours(SIZE, SIZE, seed=2))
    assert load_photographs(tmp_path, size=SIZE, batch=3).names == ("a 1", "a 2", "b")


def test_same_pixels_under_two_names_count_once(tmp_path: Path) -> None:
    save(tmp_path, "a.png", colours(SIZE, SIZE))
    save(tmp_path, "b.bmp", colours(SIZE, SIZE))
    photographs = load_photographs(tmp_path, size=SIZE, batch=None)
    assert photographs.names == ("a",)
    assert "b.bmp (same pixels as a.png)" in photographs.messages[0]


def test_too_large_a_batch_says_how_many_there_are(tmp_path: Path) -> None:
    save(tmp_path, "a.png", colours(SIZE, 2 * SIZE))
    with pytest.raises(UsageError, match=r"--batch 3 .* gives 2 .*at most --batch 2"):
        load_photographs(tmp_path, size=SIZE, batch=3)


def test_folder_without_anything_usable_names_the_reasons(tmp_path: Path) -> None:
    save(tmp_path, "small.png", colours(8, 8))
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UsageError, match=r"no usable picture .*notes\.txt .*small\.png \(8x8\)"):
        load_photographs(tmp_path, size=SIZE, batch=None)


def test_empty_missing_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_text("")
    (tmp_path / "empty").mkdir()
    for folder, reason in (("empty", "no files"), ("missing", "not there"), ("file.png", "is a file")):
        with pytest.raises(UsageError, match=reason):
            load_photographs(tmp_path / folder, size=SIZE, batch=None)


def test_tensor_is_normalised_as_imagenet(tmp_path: Path) -> None:
    pixels = colours(SIZE, SIZE)
    save(tmp_path, "colour.png", pixels)
    tensor = load_photographs(tmp_path, size=SIZE, batch=1).tensor()
    expected = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor[0], torch.from_numpy(expected).permute(2, 0, 1).float())


def test_photographs_of_scikit_image_are_different_and_never_enlarged() -> None:
    pytest.importorskip("skimage", reason="scikit-image comes with the extra bench")
    photographs = load_photographs(None, size=512, batch=4)
    assert len(set(photographs.names)) == 4
    assert len({crop.tobytes() for crop in photographs.pixels}) == 4
    with pytest.raises(UsageError, match=r"coffee\.png \(600x400\)"):
        load_photographs(None, size=4096, batch=None)


@pytest.mark.parametrize("missing", ["scikit-image", "Pillow"])
def test_generated_pictures_where_there_are_no_photographs(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "Pillow":
        monkeypatch.setattr(images, "Image", None)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    drawn = load_photographs(None, size=64, batch=3)
    assert drawn.generated and drawn.names == ("generated 1", "generated 2", "generated 3")
    assert drawn.pixels.shape == (3, 64, 64, 3) and drawn.pixels.dtype == np.uint8
    assert len({picture.tobytes() for picture in drawn.pixels}) == 3
    (message,) = drawn.messages
    assert message.startswith(f"{missing} is not installed") and "generated pictures" in message
    assert len(load_photographs(None, size=16, batch=None, most=5).names) == 5
    tokens = VariancePolicy.calibrate(drawn.tensor(), reduction=2.0)(drawn.tensor(), patch_size=16).lengths()
    assert tokens.sum() < 48  # something merges, and not everything
    assert tokens.max() > 1


def test_missing_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "Image", None)
    with pytest.raises(UsageError, match=r"Pillow is not installed.*\[bench\]"):
        load_photographs(tmp_path, size=SIZE, batch=None)
