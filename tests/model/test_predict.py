"""The predict command: what it writes equals the segmenter's own labels."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import (
    HEADS,
    draw,
    mmseg_shapes,
    older_pipeline,
    save_mmengine,
    save_segmenter,
    segmenter_shapes,
    training_config,
    variant,
)
from predict_cases import MEAN, ROOT, STD, Image, model_input, read, run, save_picture, save_small
from small_models import CLASSES, DIM, small_segmenter, small_vit

from step_kernels.model import (
    CheckpointInfo,
    LinearDecoder,
    StepEncoder,
    StepSegmenter,
    VariancePolicy,
    load_checkpoint,
    predict_windows,
    save_checkpoint,
)
from step_kernels.model.cli import labeller, pictures, predict

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
COLOURS = tuple((50 * i, 255 - 50 * i, 7 * i) for i in range(CLASSES))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path


def test_labels_are_the_segmenters_at_the_pictures_size(checkpoint: Path, folder: Path) -> None:
    """Sizes that no patch divides, portrait and landscape, in one run."""
    sizes = {"a.png": (61, 90), "b.png": (75, 33), "c.png": (64, 64)}
    pixels = {name: save_picture(folder / "in" / name, *size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    assert run(checkpoint, folder, *sizes) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(sizes)
    segmenter = load_checkpoint(checkpoint)
    for name, size in sizes.items():
        mode, labels = read(folder / "out" / name)
        assert mode == "L" and labels.shape == size and len(np.unique(labels)) > 1
        np.testing.assert_array_equal(labels, segmenter.predict(model_input(pixels[name]))[0])


def test_a_photograph_is_labelled_as_it_is_seen(checkpoint: Path, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    pixels = save_picture(folder / "in" / "turned.png", 40, 64, exif=exif)
    assert run(checkpoint, folder, "turned.png") == 0
    expected = load_checkpoint(checkpoint).predict(model_input(np.rot90(pixels, -1)))[0]
    np.testing.assert_array_equal(read(folder / "out" / "turned.png")[1], expected)


@pytest.mark.parametrize(
    ("options", "window", "stride", "crops"),
    [
        ("--window 32x48 --stride 20x30 --max-crops 3", (32, 48), (20, 30), 3),
        ("--window 40", (40, 40), None, None),
    ],
)
def test_windows(
    checkpoint: Path,
    folder: Path,
    monkeypatch,
    options: str,
    window: tuple[int, int],
    stride: tuple[int, int] | None,
    crops: int | None,
) -> None:
    asked = []

    def listen(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(options)
        return predict_windows(*arguments, **options)

    monkeypatch.setattr(labeller, "predict_windows", listen)
    pixels = save_picture(folder / "in" / "large.png", 61, 90)
    assert run(checkpoint, folder, "large.png", options=tuple(options.split())) == 0
    assert [{key: options[key] for key in ("window", "stride", "max_crops")} for options in asked] == [
        {"window": window, "stride": stride, "max_crops": crops}
    ]
    segmenter, image = load_checkpoint(checkpoint), model_input(pixels)
    labels = read(folder / "out" / "large.png")[1]
    np.testing.assert_array_equal(labels, predict_windows(segmenter, image, window, stride)[0])
    assert (labels != segmenter.predict(image)[0].numpy()).any()


@pytest.mark.parametrize(
    ("told", "options", "mean", "std", "printed"),
    [
        (True, (), MEAN, STD, "mean 0.5, 0.4, 0.3 (the checkpoint's), std 0.2, 0.3, 0.25 (the checkpoint's)"),
        (True, ("--mean", "0.1,0.2,0.3"), (0.1, 0.2, 0.3), STD, "mean 0.1, 0.2, 0.3 (as given), std 0.2"),
        (True, ("--std", "1,0.5,0.9"), MEAN, (1.0, 0.5, 0.9), "std 1, 0.5, 0.9 (as given)"),
        (False, (), *IMAGENET, "std 0.229, 0.224, 0.225 (ImageNet's, as the checkpoint tells none)"),
        (True, ("--dtype", "bfloat16"), MEAN, STD, "step-kernels checkpoint, 5 classes, cpu bfloat16, mean 0.5"),
    ],
)
def test_normalisation_and_dtype(folder: Path, capsys, told: bool, options, mean, std, printed: str) -> None:
    info = CheckpointInfo("any", mean=MEAN, std=STD) if told else CheckpointInfo("any")
    file = save_checkpoint(small_segmenter(None), folder / "model", info=info)
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(file, folder, "a.png", options=options) == 0
    assert printed in capsys.readouterr().out
    dtype = torch.bfloat16 if "bfloat16" in options else torch.float32
    expected = load_checkpoint(file).to(dtype).predict(model_input(pixels, mean, std).to(dtype))[0]
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)


@pytest.mark.parametrize("wanted", ["cityscapes", "none", None])
def test_palettes_colour_the_labels_and_leave_their_values(folder: Path, wanted: str | None) -> None:
    file = save_checkpoint(small_segmenter(), folder / "model", info=CheckpointInfo("any", palette=COLOURS))
    pixels = save_picture(folder / "in" / "a.png", 40, 64)
    assert run(file, folder, "a.png", options=() if wanted is None else ("--palette", wanted)) == 0
    mode, labels = read(folder / "out" / "a.png")
    np.testing.assert_array_equal(labels, load_checkpoint(file).predict(model_input(pixels, *IMAGENET))[0])
    assert mode == ("L" if wanted == "none" else "P") and {0, 1} <= set(np.unique(labels))
    if mode == "P":
        colours = ((128, 64, 128), (244, 35, 232)) if wanted else COLOURS
        with Image.open(folder / "out" / "a.png") as image:
            shown = np.asarray(image.convert("RGB"))
        assert all((shown[labels == number] == colour).all() for number, colour in enumerate(colours))


@pytest.mark.parametrize("palette", ["none", "cityscapes"])
def test_overlay(checkpoint: Path, folder: Path, palette: str) -> None:
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(checkpoint, folder, "a.png", options=("--overlay", "--palette", palette)) == 0
    mode, overlay = read(folder / "out" / "a_overlay.png")
    labels = read(folder / "out" / "a.png")[1]
    first = (128, 64, 128) if palette == "cityscapes" else (0, 0, 0)
    half = (pixels.astype(float) + first) / 2
    assert mode == "RGB" and (labels == 0).any()
    assert np.abs(overlay - half)[labels == 0].max() <= 0.5


def test_more_than_256_classes_become_sixteen_bits(folder: Path) -> None:
    torch.manual_seed(0)
    decoder = LinearDecoder(DIM, 300)
    torch.nn.init.normal_(decoder.head.weight)
    file = save_checkpoint(
        StepSegmenter(StepEncoder(small_vit(1)), decoder), folder / "model", info=CheckpointInfo("any")
    )
    pixels = save_picture(folder / "in" / "a.png", 40, 40)
    assert run(file, folder, "a.png", options=("--palette", "voc", "--overlay")) == 0
    mode, labels = read(folder / "out" / "a.png")
    expected = load_checkpoint(file).predict(model_input(pixels, *IMAGENET))[0]
    assert mode == "I;16" and labels.max() > 255
    np.testing.assert_array_equal(labels, expected)
    assert read(folder / "out" / "a_overlay.png")[1].shape == (40, 40, 3)


def test_a_checkpoint_of_segmenters_own_format(folder: Path, capsys) -> None:
    """Its variant.yml names the normalisation; without it the number of heads has to be given."""
    pixels = save_picture(folder / "in" / "a.png", 30, 44)
    file = save_segmenter(folder / "model", "mask_transformer", variant("mask_transformer", normalization="vit"))
    assert run(file, folder, "a.png") == 0
    assert (
        "Segmenter checkpoint, 7 classes, cpu float32, mean 0.5, 0.5, 0.5 (the checkpoint's)" in capsys.readouterr().out
    )
    half = (0.5, 0.5, 0.5)
    expected = load_checkpoint(file).predict(model_input(pixels, half, half))[0]
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)
    bare = save_segmenter(folder / "bare", "mask_transformer", None)
    assert run(bare, folder, "a.png") == 2
    assert "num_heads" in capsys.readouterr().err
    options = ("--num-heads", str(HEADS), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert run(bare, folder, "a.png", options=options) == 0
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)


def test_from_a_shell(checkpoint: Path, folder: Path) -> None:
    """As a user runs it: no traceback, and no bar where there is no terminal."""
    save_picture(folder / "in" / "a.png", 16, 16)
    good, bad, out = (str(folder / name) for name in ("in/a.png", "in/b.png", "out"))
    command = [sys.executable, "-m", "step_kernels.model", "predict", str(checkpoint), good, bad, "--out", out]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.stderr == f"not labelled: {bad}: not there\n"
    assert finished.returncode == 1
    lines = finished.stdout.splitlines()
    assert lines[1].startswith("1 of 2 pictures labelled in ") and lines[1].endswith(f": {out}")
    assert len(lines) == 3 and re.fullmatch(r"a picture: \d+ tokens, \d+ ms without files", lines[2])


def test_folders_and_patterns(checkpoint: Path, folder: Path) -> None:
    """Once each, whatever names them; other files of a folder are none of the pictures."""
    (folder / "in" / "deep").mkdir()
    for name in ("b.png", "a.jpg", "[c].png", "deep/d.png"):
        save_picture(folder / "in" / name, 16, 16)
    (folder / "in" / "notes.txt").write_text("no picture")
    found = pictures.find_pictures(
        [str(folder / "in" / name) for name in ("b.png", "", "[c].png", "**/*.png", "no.png")]
    )
    assert [path.name for path in found] == ["b.png", "[c].png", "a.jpg", "d.png", "no.png"]
    assert run(checkpoint, folder, "") == 0
    assert {path.name for path in (folder / "out").iterdir()} == {"a.png", "b.png", "[c].png"}


def test_fewer_tokens_compared_with_dense(folder: Path, capsys) -> None:
    """Whole and in windows: tokens as they were asked for, labels the segmenter's own with that policy."""
    file = save_checkpoint(
        small_segmenter(None).with_policy(None), folder / "model", info=CheckpointInfo("any", mean=MEAN, std=STD)
    )
    pixels = [save_picture(folder / "in" / f"{seed}.png", 64, 96, seed=seed) for seed in range(3)]
    for window in ((), ("--window", "64")):
        assert run(file, folder, "", options=("--reduction", "2", "--compare", *window)) == 0
        first, _, merged, dense, same = capsys.readouterr().out.splitlines()
        threshold = float(re.search(r"VariancePolicy\(threshold=([\d.]+), .*\), calibrated on these", first)[1])
        tokens = [int(re.search(r": (\d+) tokens, \d+ ms", line)[1]) for line in (merged, dense)]
        assert tokens[1] == (2 * 65 if window else 97) and 0.4 < tokens[0] / tokens[1] < 0.6
    assert re.fullmatch(r"\d+\.\d+% of the pixels have the same label either way", same)
    assert run(file, folder, "", options=("--reduction", "2")) == 0
    threshold = float(re.search(r"threshold=([\d.]+)", capsys.readouterr().out)[1])
    segmenter = load_checkpoint(file)
    merged = segmenter.with_policy(VariancePolicy(threshold))
    for seed, values in enumerate(pixels):
        np.testing.assert_array_equal(read(folder / "out" / f"{seed}.png")[1], merged.predict(model_input(values))[0])
    assert run(file, folder, "", options=("--compare",)) == 2
    assert "neither merges nor exits" in capsys.readouterr().err


def test_a_large_picture_without_window_says_how_long_it_takes(
    checkpoint: Path, folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(predict, "MANY_PATCHES", 200)
    for name, width in (("small.png", 64), ("large.png", 256), ("larger.png", 320)):
        save_picture(folder / "in" / name, 128, width)
    assert run(checkpoint, folder, "small.png", "large.png", "larger.png") == 0
    told = rf"{folder}/in/large.png: 256 x 128 pixels at once will take about \S+ seconds; about (\S+) seconds with --window 64x64\n"
    assert re.fullmatch(told, capsys.readouterr().err)
    for options in (("--window", "64"), ("--resize", "64")):
        assert run(checkpoint, folder, "large.png", options=options) == 0
        assert not capsys.readouterr().err
    assert run(checkpoint, folder, "small.png", options=("--resize", "128")) == 0
    assert f"{folder}/in/small.png: 128 x 256 pixels at once will take about" in capsys.readouterr().err


PROCESSES = """
import os, sys
from step_kernels_cli import main
import step_kernels.model.cli.predict
os.environ["RANK"] = "0" if (child := os.fork()) else "1"
status = main(sys.argv[1:])
sys.stdout.flush()
if child:
    status += 10 * os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
os._exit(status)
"""


def test_processes_share_the_pictures_and_sum_up_once(checkpoint: Path, folder: Path) -> None:
    for number in range(5):
        save_picture(folder / "in" / f"{number}.png", 16, 16)
    (folder / "in" / "5.png").write_text("no picture")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = ["predict", str(checkpoint), str(folder / "in"), "--out", str(folder / "out"), "--device", "cpu"]
    command = [sys.executable, "-c", PROCESSES, *words, "--reduction", "2"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **meeting}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr  # the first one's; the other's is 0
    assert done.stdout.count("labelled in") == 1 and "5 of 6 pictures labelled in" in done.stdout
    assert done.stderr == f"not labelled: {folder}/in/5.png: not a picture that Pillow can read\n"
    assert len(list((folder / "out").iterdir())) == 5


def test_a_checkpoint_of_mmsegmentation(folder: Path, capsys) -> None:
    """Its training config tells normalisation, channel order and windows, which are obeyed and told; none tells none, so they are asked for."""
    pixels = save_picture(folder / "in" / "a.png", 30, 44)
    test_cfg = {"mode": "slide", "crop_size": (24, 32), "stride": (16, 16)}
    data = {"mean": [102, 127.5, 51], "std": [51, 102, 127.5]}
    config = training_config(test_cfg=test_cfg, data_preprocessor=data)
    file = save_mmengine(folder / "a.pth", draw(mmseg_shapes("linear")), config)
    assert run(file, folder, "a.png", options=("--palette", "none")) == 0
    told = capsys.readouterr().out
    assert (
        "mean 0.2, 0.5, 0.4 (the checkpoint's), std 0.5, 0.4, 0.2 (the checkpoint's), windows 24x32, stride 16x16 (the checkpoint's)"
        in told
    )
    assert "scores stretched over the picture, its order BGR became RGB in the patch embedding" in told
    segmenter, image = load_checkpoint(file), model_input(pixels, (0.2, 0.5, 0.4), (0.5, 0.4, 0.2))
    labels = read(folder / "out" / "a.png")[1]
    np.testing.assert_array_equal(labels, predict_windows(segmenter, image, (24, 32), 16)[0])
    assert run(file, folder, "a.png", options=("--palette", "none", "--window", "whole")) == 0
    whole = read(folder / "out" / "a.png")[1]
    np.testing.assert_array_equal(whole, segmenter.predict(image)[0])
    assert "windows" not in capsys.readouterr().out and (whole != labels).any()
    views = ("--palette", "none", "--resize", "40", "--scales", "0.75,1", "--mirror")
    assert run(file, folder, "a.png", options=views) == 0
    expected = predict_windows(segmenter, image, resize=40, scales=(0.75, 1), mirror=True)[0]
    np.testing.assert_array_equal(read(folder / "out" / "a.png")[1], expected)
    bare = save_mmengine(folder / "b.pth", draw(mmseg_shapes("linear")), None)
    options = ("--num-heads", str(HEADS), "--palette", "none", "--mean", "0.5,0.5,0.5")
    with pytest.warns(UserWarning, match="neither tensors nor a config tell"):
        assert run(bare, folder, "a.png", options=options) == 2
    assert f"--mean and --std are needed, as {bare} does not tell them" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="b.pth: neither"):
        assert run(bare, folder, "a.png", options=(*options, "--std", "0.5,0.5,0.5")) == 0


def test_a_test_pipelines_resize_is_the_default(folder: Path, capsys) -> None:
    pixels = save_picture(folder / "in" / "a.png", 30, 44)
    config = training_config(test_cfg={"mode": "whole"}) + "\n" + older_pipeline("img_scale=(64, 40), flip=False")
    file = save_mmengine(folder / "a.pth", draw(mmseg_shapes("linear")), config)
    segmenter, image = load_checkpoint(file), model_input(pixels, (0.5,) * 3, (0.5,) * 3)
    for words, resize, told in (
        ((), (40, 64), "run at 40 pixels of the shorter side, at most 64 of the longer (the checkpoint's)"),
        (("--resize", "48"), 48, "run at 48 pixels of the shorter side (as given)"),
        (("--resize", "own"), "own", None),
    ):
        assert run(file, folder, "a.png", options=("--palette", "none", *words)) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert told in line if told else "shorter side" not in line
        labels = read(folder / "out" / "a.png")[1]
        np.testing.assert_array_equal(labels, predict_windows(segmenter, image, resize=resize)[0])


def test_a_small_picture_of_segmenters_own_format_is_enlarged(folder: Path, capsys) -> None:
    pixels = save_picture(folder / "in" / "a.png", 30, 44)
    text = variant("linear") + "inference_kwargs:\n  im_size: 40\n  window_size: 40\n  window_stride: 24\n"
    file = save_segmenter(folder / "model", "linear", text)
    assert run(file, folder, "a.png") == 0
    told = capsys.readouterr().out
    assert "windows 40x40, stride 24x24 (the checkpoint's), smaller pictures enlarged to them" in told
    segmenter, image = load_checkpoint(file), model_input(pixels, (0.5,) * 3, (0.5,) * 3)
    labels = read(folder / "out" / "a.png")[1]
    np.testing.assert_array_equal(labels, predict_windows(segmenter, image)[0])
    assert (labels != segmenter.predict(image)[0].numpy()).any()


def test_a_model_among_several_is_named(folder: Path) -> None:
    save_picture(folder / "in" / "a.png", 16, 16)
    tensors = draw(segmenter_shapes("linear"))
    torch.save({"student": tensors, "teacher": dict(tensors)}, folder / "a.pth")
    assert run(folder / "a.pth", folder, "a.png", options=("--num-heads", str(HEADS))) == 2
    assert run(folder / "a.pth", folder, "a.png", options=("--num-heads", str(HEADS), "--prefix", "teacher.")) == 0
