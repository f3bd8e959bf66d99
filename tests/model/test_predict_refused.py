"""The predict command: what it refuses, and how; pictures that cannot be labelled are named, the others are labelled."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from predict_cases import read, run, save_picture, save_small
from small_models import CLASSES, DIM, small_segmenter, small_vit

import step_kernels.model
from step_kernels.model import CheckpointInfo, LinearDecoder, StepEncoder, StepSegmenter, cli, save_checkpoint
from step_kernels.model.cli import pictures, predict
from step_kernels_cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path


def test_bad_files_are_named_at_the_end_and_the_others_are_labelled(checkpoint: Path, folder: Path, capsys) -> None:
    inside = folder / "in"
    for number, name in enumerate(["first.png", "last.png"]):
        save_picture(inside / name, 40, 40, number)
    (inside / "text.jpg").write_text("no picture")
    (inside / "cut.jpg").write_bytes((inside / "first.png").read_bytes()[:400])
    save_picture(inside / "whole.jpg", 40, 40)
    (inside / "half.jpg").write_bytes((inside / "whole.jpg").read_bytes()[:900])
    os.mkfifo(inside / "pipe.png")
    names = ["first.png", "missing.png", "text.jpg", "cut.jpg", "half.jpg", "pipe.png", "new\nline.png", "last.png"]
    assert run(checkpoint, folder, *names) == 1
    captured = capsys.readouterr()
    assert "2 of 8 pictures labelled" in captured.out
    named = [re.sub(r"\d+ bytes", "some bytes", line) for line in captured.err.splitlines()]
    assert named == [
        f"not labelled: {inside}/missing.png: not there",
        f"not labelled: {inside}/text.jpg: not a picture that Pillow can read",
        f"not labelled: {inside}/cut.jpg: broken file: image file is truncated",
        f"not labelled: {inside}/half.jpg: broken file: image file is truncated (some bytes not processed)",
        f"not labelled: {inside}/pipe.png: neither a file nor a folder",
        f"not labelled: {inside}/new line.png: not there",
    ]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["first.png", "last.png"]


ERRORS = [
    (ValueError("count: expected at most 4"), "count: expected at most 4"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory: try --window, or a smaller --max-crops"),
    (MemoryError(), "out of memory: try --window"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory: try --window"),
    (RuntimeError("a bug"), ""),
]


@pytest.mark.parametrize(("error", "message"), ERRORS)
def test_a_picture_that_the_model_cannot_take_is_named(
    checkpoint: Path, folder: Path, monkeypatch, capsys, error: Exception, message: str
) -> None:
    labels = predict.Labeller.labels

    def refuse_large(self: predict.Labeller, pixels: np.ndarray) -> object:
        if pixels.shape[0] > 60:
            raise error
        return labels(self, pixels)

    monkeypatch.setattr(predict.Labeller, "labels", refuse_large)
    for name, height in (("good.png", 40), ("large.png", 64)):
        save_picture(folder / "in" / name, height, 40)
    if not message:  # is not taken for a bad picture
        with pytest.raises(type(error)) as raised:
            run(checkpoint, folder, "large.png", "good.png")
        assert raised.value is error
        return
    assert run(checkpoint, folder, "large.png", "good.png") == 1
    assert f"large.png: {message}\n" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["good.png"]


def test_a_result_that_cannot_be_written_is_named_and_leaves_nothing(checkpoint: Path, folder: Path, capsys) -> None:
    save_picture(folder / "in" / "a.png", 16, 16)
    (folder / "out" / "a.png").mkdir(parents=True)
    assert run(checkpoint, folder, "a.png") == 1
    assert "a.png: the result cannot be written: Is a directory" in capsys.readouterr().err
    assert [path.name for path in (folder / "out").iterdir()] == ["a.png"]


MISUSE = [
    ("", "the following arguments are required: IMAGE"),
    ("a.png --window 0", "--window: expects positive pixels such as 512"),
    ("a.png --window 1x2x3", "got '1x2x3'"),
    ("a.png --window 32 --stride 33", "--stride expects at most --window (32x32)"),
    ("a.png --stride 8", "--stride needs --window"),
    ("a.png --window whole --stride 8", "--stride needs --window"),
    ("a.png --resize 0", "--resize: expects positive pixels such as 512"),
    ("a.png --scales 1,b", "--scales: expects numbers such as 1.5,2"),
    ("a.png --window 8 --max-crops 0", "--max-crops: expects a number of at least 1"),
    ("a.png --palette rainbow", "--palette expects cityscapes, voc, none or a file, got 'rainbow'"),
    ("a.png --device toaster", "--device expects cpu, cuda or cuda:N, got 'toaster'"),
    ("a.png --device=", "--device expects cpu, cuda or cuda:N, got ''"),
    ("a.png --device meta", "--device expects cpu, cuda or cuda:N, got 'meta'"),
    ("a.png --device cuda:99", "--device cuda:99 is not there"),
    ("a.png --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ("a.png --mean 0.5", "expects red,green,blue"),
    ("a.png --mean 123.7,116.3,103.5", "for pixels scaled to 0..1"),
    ("a.png --mean nan,0,0", "for pixels scaled to 0..1"),
    ("a.png --std 0.5,0,0.5", "--std: expects positive values"),
    ("a.png --fast", "unrecognized arguments: --fast"),
    ("a.png a.jpg", "would both become"),
    ("a.png a_overlay.jpg --overlay", "would both become"),
    ("a.png --num-heads 3", "num_heads: expected None"),
    ("a.png --reduction 0.5", "--reduction: expects a number of at least 1"),
    ("a.png --reduction 2", "--reduction: none of 1 pictures can be read, a.png first"),
    ("no/*.png", "no file is called as no/*.png"),
    ("docs", "no picture is in the folder docs"),
]


@pytest.mark.parametrize(("arguments", "message"), MISUSE)
def test_misuse_gets_one_line_and_status_2(
    checkpoint: Path, tmp_path: Path, capsys, arguments: str, message: str
) -> None:
    assert main(["predict", str(checkpoint), "--out", str(tmp_path / "out"), *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("step-kernels: ") and message in captured.err
    assert not list(tmp_path.glob("out/*"))


def test_what_cannot_be_coloured_is_not_labelled(folder: Path, capsys) -> None:
    info = CheckpointInfo("any", palette=((1, 2, 3),))
    file = save_checkpoint(small_segmenter(None), folder / "model", info=info)
    save_picture(folder / "in" / "a.png", 16, 16)
    assert run(file, folder, "a.png") == 2
    assert "the checkpoint's palette" in capsys.readouterr().err
    assert not (folder / "out").exists(), "made for nothing"
    assert run(file, folder, "a.png", options=("--palette", "none")) == 0


def test_out_must_be_a_folder_that_can_be_written(checkpoint: Path, folder: Path, monkeypatch, capsys) -> None:
    command = ["predict", str(checkpoint), "a.png", "--out"]
    (folder / "file").write_text("")
    assert main([*command, str(folder / "file" / "below")]) == 2
    assert "below cannot be written: Not a directory" in capsys.readouterr().err

    def read_only(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pictures.tempfile, "TemporaryFile", read_only)
    assert main([*command, str(folder)]) == 2
    assert f"--out {folder} cannot be written: Permission denied" in capsys.readouterr().err


def test_a_picture_is_never_overwritten(checkpoint: Path, folder: Path, capsys) -> None:
    pixels = save_picture(folder / "in" / "a.png", 16, 16)
    (folder / "out").symlink_to(folder / "in")
    assert run(checkpoint, folder, "a.png") == 2
    assert "would overwrite a picture" in capsys.readouterr().err
    np.testing.assert_array_equal(read(folder / "in" / "a.png")[1], pixels)


@pytest.mark.parametrize("kind", ["missing", "text", "empty folder", "no decoder", "four channels"])
def test_checkpoints_that_cannot_label(folder: Path, capsys, kind: str) -> None:
    path = folder / "model.pth"
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "no decoder":
        path = save_checkpoint(StepEncoder(small_vit(1)), folder / "model", info=CheckpointInfo("any"))
    elif kind == "four channels":
        vit = type(small_vit(1)).preset("tiny", img_size=64, embed_dim=DIM, depth=1, num_heads=3, in_chans=4)
        path = save_checkpoint(
            StepSegmenter(StepEncoder(vit), LinearDecoder(DIM, CLASSES)), folder / "model", info=CheckpointInfo("any")
        )
    assert run(path, folder, "a.png") == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(path) in captured.err
    expected = {"no decoder": "without decoder", "four channels": "takes 4 channels", "missing": "does not exist"}
    assert expected.get(kind, "expected") in captured.err


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["--help"], 0, "usage: "),
        ([], 2, "required: CHECKPOINT"),
        (["no.pth", "a.png", "--out", "out"], 2, "Pillow is needed for this .*pip install Pillow, .*'.\\[predict\\]'"),
    ],
)
def test_only_pictures_need_pillow(arguments: list[str], status: int, shown: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(step_kernels.model, "cli", cli)  # back to this one, after its modules were imported anew
    for name in [name for name in sys.modules if name.startswith(cli.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("PIL", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    try:
        ended = main(["predict", *arguments])
    except SystemExit as error:
        ended = error.code
    captured = capsys.readouterr()
    assert ended == status and re.search(shown, captured.out + captured.err)
    assert captured.err.count("\n") == (1 if status else 0)


def test_without_tqdm_there_is_no_bar(checkpoint: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    save_picture(folder / "in" / "a.png", 16, 16)
    assert run(checkpoint, folder, "a.png") == 0


def test_what_was_done_before_ctrl_c_is_told(checkpoint: Path, folder: Path, monkeypatch, capsys) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save_picture(folder / "in" / name, 16, 16)
    read_picture, seen = predict.read_picture, []

    def interrupt(path: Path) -> np.ndarray:
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read_picture(path)

    monkeypatch.setattr(predict, "read_picture", interrupt)
    assert run(checkpoint, folder, "a.png", "b.png", "c.png") == 130
    captured = capsys.readouterr()
    assert "2 of 3 pictures labelled in" in captured.out and captured.err == "step-kernels: interrupted\n"


def test_a_model_too_large_for_the_gpu_is_one_line(checkpoint: Path, folder: Path, monkeypatch, capsys) -> None:
    def refuse(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    save_picture(folder / "in" / "a.png", 16, 16)
    monkeypatch.setattr(StepSegmenter, "to", refuse)
    assert run(checkpoint, folder, "a.png") == 2
    assert capsys.readouterr().err == "step-kernels: out of GPU memory (CUDA out of memory.)\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
        (OSError(13, None), "cannot be read: Permission denied"),
        (OSError(101), "broken file: OSError(101)"),
        (SyntaxError("not a TIFF file"), "broken file: not a TIFF file"),
        (RuntimeError(), "broken file: RuntimeError()"),
    ],
)
def test_a_reason_always_tells_something(tmp_path: Path, monkeypatch, error: Exception, told: str) -> None:
    def broken(image: object) -> None:
        raise error

    save_picture(tmp_path / "a.png", 16, 16)
    monkeypatch.setattr(pictures, "to_rgb", broken)
    with pytest.raises(ValueError) as raised:
        pictures.read_picture(tmp_path / "a.png")
    assert str(raised.value) == told
