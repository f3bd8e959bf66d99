"""train, calibrate and evaluate as commands: from a dense checkpoint to a curve, and what cannot be run."""

from __future__ import annotations

import argparse
import csv
import io
import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import HEADS, save_segmenter
from predict_cases import save_picture
from train_cases import INFO, SIZE, small_segmenter

import step_kernels_cli
from bench.__main__ import main as bench
from step_kernels.model import CheckpointInfo, StepSegmenter, load_checkpoint, save_checkpoint
from step_kernels.model.checkpoints.formats import IMAGENET, MMSEG
from step_kernels.model.cli.evaluate import plot
from step_kernels.model.cli.sources import normalised
from step_kernels.model.train import Scenes

ROOT = Path(__file__).resolve().parents[2]
DATA = ["--data", f"scenes:6:{SIZE}:1", "--batch", "3", "--device", "cpu"]
AS_THEY_ARE = ["--scale", "1,1", "--no-flip", "--no-colour"]


def run(*words: object) -> int:
    return step_kernels_cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_checkpoint(small_segmenter(None, ()), folder, info=INFO)
    return folder


def test_from_dense_to_a_curve(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert (
        run(
            "train", "--init", dense, "--out", a, *DATA, *AS_THEY_ARE, "--stage", "heads", "--exits", "1", "--epochs", 1
        )
        == 0
    )
    words = ["--stage", "policy", "--sides", "2,4", "--epochs", 1]
    assert run("train", "--init", a, "--out", b, *DATA, *AS_THEY_ARE, *words) == 0
    assert run("calibrate", b, "--out", c, *DATA, "--reduction", 1.5, "--halted", 0.3) == 0
    words = ["--stage", "all", "--epochs", 1, "--val-split", "val"]
    assert run("train", "--init", c, "--out", d, *DATA, *AS_THEY_ARE, *words) == 0
    told = capsys.readouterr().out
    assert "policy: thresholds" in told and "exits: threshold" in told and "miou" in told and str(d) in told
    made = load_checkpoint(d)
    assert (
        isinstance(made, StepSegmenter)
        and list(made.encoder.exit_heads()) == [1]
        and made.encoder.policy.sides == (2, 4)
    )
    report = tmp_path / "reports/curve.json"
    assert run("evaluate", d, *DATA, "--out", report, "--reductions", "1.2,2", "--halts", "0.5") == 0
    found = json.loads(report.read_text())["variants"]
    assert list(found) == [
        "dense",
        "merged",
        "merged + exits",
        "merged, 1.2x",
        "merged, 2x",
        "merged + exits, 50% halted",
    ]
    assert found["merged + exits, 50% halted"]["tokens"] == found["merged"]["tokens"]
    assert found["merged, 1.2x"]["tokens"] > found["merged, 2x"]["tokens"]
    assert report.with_suffix(".png").stat().st_size > 1000
    table = capsys.readouterr().out
    for name, figures in found.items():
        (row,) = [line.split("|") for line in table.splitlines() if name in line and line.split("|")[1].strip() == name]
        assert row[2].strip() == f"{figures['miou']:g}"


def test_the_log_of_exits_alone_is_of_what_they_halt(tmp_path: Path) -> None:
    save_checkpoint(small_segmenter(None, threshold=0.35), tmp_path / "a", info=INFO)
    words = ["--stage", "exits", "--epochs", 1, "--lr", 1e-9, "--val-split", "val"]
    assert run("train", "--init", tmp_path / "a", "--out", tmp_path / "b", *DATA, *AS_THEY_ARE, *words) == 0
    (row,) = csv.DictReader((tmp_path / "b/log.csv").read_text().splitlines())
    assert float(row["halted"]) > 0


def test_a_dry_run_writes_nothing(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--crop", "48", "--stage", "all", "--ignore-index", 5, "--dry-run"]
    assert run("train", "--init", dense, "--out", tmp_path, *DATA, *words) == 0
    told = capsys.readouterr().out
    assert "6 pictures, batches [3, 3, 48, 48] float32" in told and "s an epoch of 2 steps" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_a_letter_shows_its_number(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of paths, after the work; and the list of what failed is told."""
    model, name = tmp_path / "model", "Z\u00fcrich \u6771"
    save_checkpoint(small_segmenter(), model, info=INFO)
    save_picture(tmp_path / f"{name}.png", 64, 64)
    (tmp_path / f"{name} b.jpg").write_text("no picture")
    results = shutil.copytree(ROOT / "bench/results/cpu-2-cores", tmp_path / name)
    streams = {"stdout": "strict", "stderr": "backslashreplace"}  # as Python opens them
    for stream, errors in streams.items():
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding, errors))
    pictures = [tmp_path / f"{name}.png", tmp_path / f"{name} b.jpg"]
    assert run("predict", model, *pictures, "--out", tmp_path / f"{name} 1") == 1
    data = ["--data", f"scenes:2:{SIZE}:1", "--device", "cpu"]
    train = ["--init", model, "--out", tmp_path / f"{name} 2", "--stage", "heads", "--epochs", 1]
    assert run("train", *train, *data, *AS_THEY_ARE) == 0
    assert run("calibrate", model, "--out", tmp_path / f"{name} 3", *data, "--halted", 0.3) == 0
    assert run("evaluate", model, *data) == 0
    assert bench(["report", str(results)]) == 0
    told, failed = ((stream.seek(0), stream.read())[1] for stream in (sys.stdout, sys.stderr))
    shown = name.encode(encoding, "backslashreplace").decode(encoding)
    assert [number for number in "123" if f"{shown} {number}" in told] == [*"123"] and "\\u6771" in shown
    assert f"# {shown}\n" in told and "| dense" in told
    assert f"not labelled: {tmp_path}/{shown} b.jpg: not a picture that Pillow can read\n" in failed


def test_exits_are_calibrated_on_pictures_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for number in range(2):
        Image.fromarray(Scenes(2, SIZE)[number][0].permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    save_checkpoint(small_segmenter(), tmp_path / "a", info=INFO)
    words = ["--unlabelled", tmp_path, "--points", 5, "--reduction", 1.5, "--device", "cpu"]
    assert run("calibrate", tmp_path / "a", "--out", tmp_path / "b", *words) == 0
    assert "exits: threshold" in capsys.readouterr().out
    assert run("calibrate", tmp_path / "a", "--out", tmp_path / "b", "--unlabelled", tmp_path, "--purity", 0.9) == 2
    assert "expected labels, which purity needs" in capsys.readouterr().err


def test_a_normalisation_that_no_one_tells_is_asked_for() -> None:
    options = argparse.Namespace(mean=None, std=None)
    with pytest.raises(step_kernels_cli.UsageError, match=r"--mean and --std are needed, as a\.pth does not tell them"):
        normalised(CheckpointInfo(MMSEG.name, mean=INFO.mean, stretch=True), options, "a.pth")
    told = CheckpointInfo(MMSEG.name, mean=INFO.mean, std=INFO.std, stretch=True)
    assert normalised(told, options, "a.pth").std == INFO.std
    assert normalised(CheckpointInfo("timm ViT"), options, "a.pth").mean == IMAGENET["mean"]


def test_what_a_file_does_not_tell_the_words_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare, out = save_segmenter(tmp_path / "bare", "linear", None), tmp_path / "out"
    save_picture(tmp_path / "a.png", 40, 40)
    for words in (
        ["evaluate", bare, *DATA],
        ["tokens", bare, tmp_path / "a.png", "--out", tmp_path / "tokens", "--device", "cpu"],
        ["train", "--init", bare, "--out", out, *DATA, *AS_THEY_ARE, "--stage", "heads", "--epochs", 1],
    ):
        assert run(*words) == 2 and "num_heads: expected the number of attention heads" in capsys.readouterr().err
        assert run(*words, "--num-heads", HEADS, "--mean", "0.4,0.5,0.5", "--std", "0.5,0.5,0.25") == 0
    assert load_checkpoint(out).info.mean == (0.4, 0.5, 0.5) and load_checkpoint(out).info.std == (0.5, 0.5, 0.25)
    assert run("calibrate", out, "--out", out, *DATA, "--halted", 0.5, "--num-heads", HEADS) == 2
    assert "num_heads: expected None, as" in capsys.readouterr().err
    words = ["--data", "scenes:6:64:1", "--stage", "heads", "--num-heads", 3]
    assert run("train", "--init", "timm:vit_tiny_patch16_224", "--out", out, *words) == 2
    assert "tells all sizes: it takes no --num-heads" in capsys.readouterr().err


def test_a_timm_file_with_layer_scale_is_where_training_starts(tmp_path: Path) -> None:
    """DINOv2's factors are folded into the projections before them: the same function."""
    from safetensors.torch import save_file

    encoder = small_segmenter(None, ()).encoder
    tensors = {name.removeprefix("vit."): tensor.clone() for name, tensor in encoder.state_dict().items()}
    expected = small_segmenter(None, ()).encoder
    for number in range(2):
        for scale, projection in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = tensors[f"blocks.{number}.{scale}.gamma"] = torch.randn(24)
            linear = expected.vit.blocks[number].get_submodule(projection)
            with torch.no_grad():
                linear.weight *= gamma[:, None]
                linear.bias *= gamma
    save_file(tensors, tmp_path / "vit.safetensors")
    read, images = load_checkpoint(tmp_path / "vit.safetensors", num_heads=2), torch.randn(1, 3, SIZE, SIZE)
    torch.testing.assert_close(read(images).tokens, expected(images).tokens)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--data, --init, --stage is needed (or --smoke)"),
        (["--init", "{dense}", "--stage", "policy", "--data", "scenes:6"], "--data expects a folder, or scenes:COUNT:SIZE:SEED"),
        (["--init", "{dense}", "--stage", "all", "--data", "{dense}"], "--data: root: expected one of"),
        (["--init", "{dense}/no", "--stage", "all", "--data", "scenes:6:64:1"], "expected a checkpoint file or a folder"),
        (["--init", "{dense}", "--stage", "all", "--data", "scenes:6:64:1", "--exits", "7"], "exits' block number"),
        (["--init", "{dense}", "--stage", "all", "--data", "scenes:6:64:1", "--exits", "1.5"], "expects whole numbers"),
        (["--init", "{dense}", "--stage", "policy", "--data", "scenes:6:64:1", "--sides", "3"], "expected a power of two"),
        (["--init", "{dense}", "--stage", "all", "--data", "scenes:6:64:1", "--classes", "3"], "6 scenes of 6 classes, not 3"),
        (["--init", "{dense}", "--stage", "all", "--data", "scenes:6:64:1", "--ema", "2"], "ema: expected a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_told_in_one_line(
    words: list[str], told: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--out", tmp_path / "out", *[word.format(dense=dense) for word in words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_plot_of_pictures_without_labels_is_empty(tmp_path: Path) -> None:
    plot({"dense": {"miou": None, "tokens": 64, "gflops": 1.0}}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_other_commands_refuse_in_one_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["calibrate", dense, "--out", tmp_path / "x", *DATA], "one of --reduction, --purity, --halted, --points is needed"),
        (["calibrate", dense, "--out", tmp_path / "x", *DATA, "--reduction", 2], "expected one with a PolicyNet, got NoneType"),
        (["calibrate", dense, "--out", tmp_path / "x", "--points", 1], "--data is needed"),
        (["calibrate", dense, "--out", tmp_path / "x", *DATA, "--points", 1, "--unlabelled", dense], "not both"),
        (["evaluate", dense, *DATA, "--out", dense / "config.json/x.json"], "cannot be written: "),
        (["calibrate", dense, "--out", tmp_path / "x.pth", *DATA, "--points", 1], "--out expects a folder or a file named *.safetensors"),
        (["calibrate", dense, "--out", dense / "config.json", *DATA, "--points", 1], "--out expects a folder or a file named"),
        (["evaluate", dense, *DATA, "--out", dense], "--out expects a file such as run.json"),
        (["evaluate", dense, *DATA, "--out", tmp_path / "x.png"], "--out expects a file such as run.json"),
        (["evaluate", dense, *DATA, "--variants", "best"], "--variants expects some of dense, merged"),
        (["evaluate", dense, *DATA, "--variants", "merged"], "with a policy for the variant 'merged'"),
    ):  # fmt: skip
        assert run(*words) == 2
        assert told in capsys.readouterr().err


def test_a_full_disk_is_told_in_one_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        assert run("evaluate", dense, *DATA, "--out", tmp_path / "x.json") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr()
    assert "| dense" in told.out and told.err == f"step-kernels: [Errno 27] File too large: '{tmp_path / 'x.json'}'\n"
    assert not list(tmp_path.iterdir())
