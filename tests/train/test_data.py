"""Labelled pictures: layouts of folders, label rules, what is drawn at random, and files that are not as they should be."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from step_kernels.model.train import LabelledPictures, Prepared, Recipe, Scenes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def save(path: Path, pixels: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def pair(picture: Path, labels: Path, values: object = ((0, 1), (2, 255))) -> None:
    save(labels, values)
    save(picture, np.arange(12).reshape(2, 2, 3))


@pytest.mark.parametrize("folders", ["{split}/images {split}/labels", "images/{split} labels/{split}", "images labels"])
def test_folders_of_pictures_and_labels(folders: str, tmp_path: Path) -> None:
    split = "val" if "split" in folders else None
    pictures, labels = (tmp_path / each for each in folders.format(split=split).split())
    for name in ("b", "a/c"):
        pair(pictures / f"{name}.png", labels / f"{name}.png")
    data = LabelledPictures(tmp_path, split, num_classes=3)
    assert [pair.name for pair in data.pairs] == ["a/c", "b"] and data.layout == "folders"
    picture, found = data[1]
    assert picture.dtype == torch.uint8 and picture[:, 0, 1].tolist() == [3, 4, 5]
    assert found.tolist() == [[0, 1], [2, 255]]


def test_cityscapes_ids_become_its_classes(tmp_path: Path) -> None:
    stem = "val/ulm/ulm_000001_000019"
    values = [[7, 33], [0, 10]]  # road, bicycle; unlabelled, sky's neighbour rail track
    pair(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", values)
    save(tmp_path / f"gtFine/{stem}_gtFine_color.png", np.zeros((2, 2, 3)))
    assert LabelledPictures(tmp_path, "val", num_classes=19)[0][1].tolist() == [[0, 18], [255, 255]]


def test_ade20k_has_no_class_zero(tmp_path: Path) -> None:
    pair(tmp_path / "images/training/x.jpg", tmp_path / "annotations/training/x.png", [[0, 1], [150, 255]])
    data = LabelledPictures(tmp_path, "training", num_classes=150)
    assert data[0][1].tolist() == [[255, 0], [149, 255]]
    plain = LabelledPictures(tmp_path, "training", num_classes=151, reduce_zero_label=False)
    assert plain[0][1].tolist() == [[0, 1], [150, 255]]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    def opened(**named: object) -> LabelledPictures:
        return LabelledPictures(tmp_path, **{"num_classes": 3, **named})  # type: ignore[arg-type]

    with pytest.raises(FileNotFoundError, match=r"root: expected a folder, got .*nowhere"):
        LabelledPictures(tmp_path / "nowhere", num_classes=3)
    with pytest.raises(FileNotFoundError, match=r"root: expected one of .*images.* got none of them"):
        opened()
    pair(tmp_path / "images/a.png", tmp_path / "labels/a.png")
    save(tmp_path / "images/b.png", np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"images/b.png: expected labels in .*, named b.png, got none"):
        opened()
    save(tmp_path / "labels/b.png", np.zeros((2, 3)))
    save(tmp_path / "labels/c.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"labels/c.png: expected a picture in .*, got none"):
        opened()
    (tmp_path / "labels/c.png").unlink()
    with pytest.raises(ValueError, match=r"labels/b.png: expected labels of the picture's size, 2 x 2, got 2 x 3"):
        opened()[1]
    with pytest.raises(ValueError, match=r"labels/a.png: expected labels below 2, or 255, got 2 in row 1, column 0"):
        opened(num_classes=2)[0]
    save(tmp_path / "labels/b.png", np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"labels/b.png: expected class numbers .*, got mode RGB"):
        opened()[1]
    (tmp_path / "images/a.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"images/a.png: broken file"):
        opened()[0]
    pair(tmp_path / "images/a.png", tmp_path / "labels/a.png")
    (tmp_path / "labels/a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"labels/a.png: expected class numbers, got a file that cannot be read: "):
        opened()[0]
    short = struct.pack(">I4s4s", 4, b"IHDR", bytes(4))  # of 13 bytes
    (tmp_path / "labels/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + short + struct.pack(">I", zlib.crc32(short[4:])))
    with pytest.raises(ValueError, match=r"labels/a.png: expected class numbers, got a file that cannot be read: "):
        opened()[0]
    with pytest.raises(ValueError, match="layout: expected one of"):
        opened(layout="voc")


def test_scenes_are_the_same_each_time_and_of_any_size() -> None:
    picture, labels = Scenes(3, (50, 70), seed=4)[2]
    again, same = Scenes(9, (50, 70), seed=4)[2]
    assert torch.equal(picture, again) and torch.equal(labels, same)
    assert not torch.equal(picture, Scenes(3, (50, 70), seed=5)[2][0])
    assert picture.shape == (3, 50, 70) and labels.shape == (50, 70) and labels.max() < len(Scenes.classes)
    counts = sum(torch.bincount(Scenes(8, 96)[i][1].flatten(), minlength=6) for i in range(8))
    assert counts.min() > 100  # every class is there
    with pytest.raises(IndexError):
        Scenes(3)[3]


def test_prepared_pictures_are_normalised_and_drawn_by_epoch_and_number_alone() -> None:
    data = [Scenes(4, 48)[i] for i in range(4)]
    plain, labels = Prepared(data, MEAN, STD)[1]
    expected = (data[1][0].double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(plain, expected.float())
    assert torch.equal(labels, data[1][1].long())
    drawn = Prepared(data, MEAN, STD, Recipe(crop=(32, 64)), seed=3)
    first, again = drawn[2], Prepared(data, MEAN, STD, Recipe(crop=(32, 64)), seed=3)[2]
    assert first[0].shape == (3, 32, 64) and torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    drawn.epoch = 1
    assert not torch.equal(first[0], drawn[2][0])


def test_labels_follow_their_pixels_through_every_draw() -> None:
    """A picture whose red is its label: after scale, crop, flip and padding it still is, but at borders."""
    labels = Scenes(1, 64)[0][1]
    picture = torch.stack([labels * 40] * 3)
    for epoch in range(12):
        drawn = Prepared([(picture, labels)], (0, 0, 0), (1, 1, 1), Recipe(crop=(80, 56), colour=False))
        drawn.epoch = epoch
        pixels, found = drawn[0]
        inside = found != 255
        assert (pixels[0][~inside] == 0).all() and found.shape == (80, 56)
        right = (pixels[0] * 255 / 40 - found).abs()[inside] < 0.5
        assert right.float().mean() > 0.9


def test_crops_shun_one_class() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, :16] = 1
    data = [(torch.zeros(3, 64, 64, dtype=torch.uint8), labels)] * 40
    drawn = Prepared(data, MEAN, STD, Recipe(crop=(24, 24), scale=(1, 1), flip=0, colour=False))
    assert sum(len(drawn[i][1].unique()) == 2 for i in range(40)) > 30


def test_colours_change_and_labels_do_not() -> None:
    data = [Scenes(1, 32)[0]] * 8
    drawn = Prepared(data, (0, 0, 0), (1, 1, 1), Recipe(scale=(1, 1), flip=0))
    changed = 0
    for i in range(8):
        pixels, labels = drawn[i]
        assert torch.equal(labels, data[0][1].long()) and 0 <= pixels.min() <= pixels.max() <= 1
        changed += not torch.allclose(pixels, data[0][0] / 255, atol=1e-3)
    assert changed > 5
