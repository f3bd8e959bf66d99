"""Pictures of the asked size, never enlarged, mirrored and turned where there are too few; what cannot be used is named; something stands in for what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import images
from bench.images import VIEWS, Pictures, generated, squares, view
from step_kernels_cli import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one too small, and two files that are none."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("tqdm")
    random = np.random.default_rng(0)
    for name, size in (("first", (40, 64)), ("second", (90, 70)), ("small", (20, 300))):
        image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "torn.png").write_bytes((tmp_path / "first.png").read_bytes()[:300])
    return tmp_path


def distinct(pictures: Pictures) -> int:
    return len({picture.numpy().tobytes() for picture in pictures.pixels})


def test_folder_names_what_it_leaves_out(folder: Path) -> None:
    pictures = squares(3, 32, folder)
    assert pictures.names == ("first", "second", "first 2") and pictures.pixels.shape == (3, 3, 32, 32)
    told = " ".join(pictures.messages)
    assert "notes.txt (not a picture" in told and "torn.png (broken file" in told
    assert "small.png (300x20, never enlarged)" in told
    assert not squares(1, 32, folder).messages, "the first one is enough"


def test_more_pictures_than_files_are_other_views(folder: Path) -> None:
    pictures = squares(7, 32, folder)
    assert distinct(pictures) == 7 and pictures.names[:4] == ("first", "second", "first 2", "second 2")
    assert "7 pictures from 2 files" in " ".join(pictures.messages)


def test_largest_centred_square_is_reduced(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("tqdm")
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 16:48] = 200  # all of the centred square
    image.fromarray(pixels).save(tmp_path / "one.png")
    assert bool((squares(1, 16, tmp_path).pixels == 200).all())


def test_unusable_folders_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="--images expects a folder"):
        squares(1, 32, folder / "nowhere")
    with pytest.raises(UsageError, match=r"no usable picture of at least 300x300 px in --images .*notes\.txt"):
        squares(1, 300, folder)


def test_photographs() -> None:
    for package in ("skimage", "PIL", "tqdm"):
        if images.folder_of(package) is None:
            pytest.skip(f"without {package}")
    pictures = squares(4, 512)
    assert pictures.names == ("astronaut", "retina", "hubble_deep_field", "ihc") and not pictures.messages
    assert distinct(squares(20, 256)) == 20


@pytest.mark.parametrize(("missing", "named"), [("skimage", "scikit-image"), ("PIL", "Pillow"), ("tqdm", "tqdm")])
def test_generated_ones_stand_in(missing: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "folder_of", lambda package: None if package == missing else tmp_path)
    pictures = squares(3, 48)
    assert pictures.pixels.shape == (3, 3, 48, 48) and distinct(pictures) == 3
    assert named in pictures.messages[0]
    if missing != "skimage":
        with pytest.raises(
            UsageError,
            match=rf"--images needs {named}: pip install {named}, or, in a checkout, pip install -e '\.\[bench\]'",
        ):
            squares(3, 48, tmp_path)


def test_views_are_distinct_and_undone() -> None:
    picture = torch.arange(9.0).view(1, 3, 3)
    views = [view(picture, number) for number in range(VIEWS)]
    assert len({tuple(one.flatten().tolist()) for one in views}) == VIEWS
    assert torch.equal(views[0], picture) and torch.equal(view(views[1], 1), picture)


def test_tensor_is_normalised() -> None:
    tensor = Pictures(("one",), generated(1, 32)).tensor()
    assert tensor.shape == (1, 3, 32, 32) and tensor.is_contiguous() and 0.3 < float(tensor.std()) < 3
    grey = Pictures(("grey",), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).tensor()
    assert grey[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
