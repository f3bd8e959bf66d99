"""The examples run, on small sizes, and show what they claim."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from small_models import small_segmenter

from step_kernels.model import CheckpointInfo, save_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "examples"

SMALL = {
    "photograph_to_labels": ["--height", "128", "--preset", "tiny", "--times", "1"],
    "timm_by_hand": ["--model", "vit_tiny_patch16_224"],
    "transformers_attention": ["--hidden-size", "128", "--grid", "16"],
    "masked_attention": ["--length", "50", "--dim", "128"],
    "merge_around_an_encoder": ["--size", "256", "--dim", "64", "--depth", "2"],
    "one_exit": ["--size", "128", "--block", "6"],
    "dinov3_segmentation": ["--size", "64"],
    "dinov2_transformers": ["--size", "90"],
    "depth_anything": ["--size", "112"],
    "eomt": ["--size", "64"],
}


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALL[name], *options])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(pattern: str, text: str) -> tuple[float, ...]:
    match = re.search(pattern, text)
    assert match, text
    return tuple(map(float, match.groups()))


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SMALL)


def test_masked_attention(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("masked_attention", monkeypatch, capsys)
    *kept, pairs = numbers(r"\[(\d+), (\d+), (\d+)\] of 50 tokens kept: (\d+)%", out)
    assert pairs == round(100 * sum(count**2 for count in kept) / (3 * 50**2)) and 20 < pairs < 60
    assert numbers(r"difference from .*: (\S+)", out)[0] < 1e-5


def test_merge_around_an_encoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("merge_around_an_encoder", monkeypatch, capsys)
    first, second, saved = numbers(r"\[(\d+), (\d+)\] tokens instead of \[256, 256\]: (\S+)x fewer", out)
    assert first != second and saved == pytest.approx(512 / (first + second), abs=0.05) and 2.2 < saved < 2.8
    (cosine,) = numbers(r"feature maps \[2, 64, 16, 16\] either way, mean cosine (\S+)", out)
    assert 0.7 < cosine < 1


def test_one_exit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("one_exit", monkeypatch, capsys)
    assert numbers(r": (\d+)% halted after block 6", out)[0] == pytest.approx(40, abs=2)
    dense, merged, exited = numbers(r"dense (\S+), merged (\S+), merged with the exit (\S+)", out)
    assert dense > 1.3 * merged > 1.3 * 1.1 * exited
    assert "labels [2, 128, 128]" in out


def test_dinov3_segmentation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timm = pytest.importorskip("real_timm", reason="needs timm").timm
    if not timm.is_model("vit_small_patch16_dinov3"):
        pytest.skip(f"timm {timm.__version__} has no DINOv3")
    tokens, dense = numbers(
        r"labels \[1, 64, 96\] from (\d+) tokens instead of (\d+)", run("dinov3_segmentation", monkeypatch, capsys)
    )
    assert dense == 4 * 6 + 5 and tokens < 0.8 * dense


@pytest.mark.parametrize(
    ("name", "result", "dense"),
    [
        ("dinov2_transformers", r"labels \[1, 90, 135\] from", 6 * 9 + 1),
        ("depth_anything", r"depth \[1, 112, 168\] from", 8 * 12 + 1),
        ("eomt", r"masks \[1, 20, \d+, \d+\]; 4 of 6 blocks on", 4 * 4 + 5),
    ],
)
def test_transformers(
    name: str, result: str, dense: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("real_timm", reason="needs timm")  # so that transformers imports beside any build of PyTorch
    pytest.importorskip("transformers", reason="needs transformers")
    out = run(name, monkeypatch, capsys)
    tokens, told = numbers(result + r" (\d+) tokens instead of (\d+)", out)
    assert told == dense and tokens < 0.8 * dense
    if name == "eomt":
        assert numbers(r"where nothing merges: (\S+)", out)[0] < 1e-4
    if name == "depth_anything":
        assert 0 < numbers(r"; (\S+)% off", out)[0] < 100


def test_photograph_to_labels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("skimage", reason="the photograph comes with scikit-image")
    out = run("photograph_to_labels", monkeypatch, capsys)
    (dense,), (merged,) = numbers(r"dense:  (\d+) tokens", out), numbers(r"merged: (\d+) tokens", out)
    assert dense == 65 and 2 < dense / merged < 3
    assert 20 < numbers(r"(\S+)% of the labels agree", out)[0] < 100
    trained = save_checkpoint(small_segmenter(), tmp_path, info=CheckpointInfo("any", mean=(0.5,) * 3, std=(0.5,) * 3))
    assert "dense:  257 tokens" in run("photograph_to_labels", monkeypatch, capsys, "--checkpoint", str(trained))


def test_transformers_attention(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("transformers_attention", monkeypatch, capsys)
    assert (
        "[137, 257] tokens instead of [257, 257]" in out and numbers(r"own forward on each image: (\S+)", out)[0] < 1e-5
    )


def test_timm_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("real_timm", reason="needs timm")
    out = run("timm_by_hand", monkeypatch, capsys)
    first, second, images, dim = numbers(r"\[(\d+), (\d+)\] tokens; class tokens \[(\d+), (\d+)\]", out)
    assert first < 150 and (second, images, dim) == (197, 2, 192)
    assert numbers(r"class token from timm's: (\S+)", out)[0] < 1e-4
