"""``python -m step_kernels`` on a GPU: it passes, and what fails of the model is told with what a report needs."""

from __future__ import annotations

import re

import pytest
import torch

from step_kernels import info as command
from step_kernels import selfcheck, selfcheck_gpu, use_backend
from step_kernels.model import StepSegmenter
from step_kernels.model.graph.capture import CapturedSegmenter

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
CAPTURE = "capture, replayed with other token counts"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One op, on the GPU alone, in this process, and no torch.compile: the command itself runs all of it."""
    monkeypatch.setattr(command, "_devices", lambda: [GPU])
    monkeypatch.setattr(command, "_side_by_side", lambda jobs: ((what, job()) for what, job in jobs.items()))
    monkeypatch.setattr(selfcheck, "CASES", {"scatter_back": selfcheck.CASES["scatter_back"]})
    monkeypatch.delitem(selfcheck_gpu.CASES, "torch.compile of the segmenter")


def printed_by_a_failure(capsys: pytest.CaptureFixture[str]) -> str:
    with use_backend("auto"):
        assert command.run() == 1
    printed, report = capsys.readouterr().out.split("Please open an issue of this project with these lines:")
    assert re.search(r"driver \S+, Linux", report) and f"cuda:0 ({torch.cuda.get_device_name(0)})" in report
    assert "model: 1 of 2 cases agree" in printed
    return report


def test_it_passes(capsys: pytest.CaptureFixture[str]) -> None:
    with use_backend("auto"):
        assert command.run() == 0
    printed = capsys.readouterr().out
    assert printed.count("1 of 1 cases agree") == 3 and "model: 2 of 2 cases agree" in printed
    assert printed.endswith("\nOK\n")


def test_a_capture_that_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted")

    monkeypatch.setattr(StepSegmenter, "capture", refuse)
    assert f"- cuda:0 model, {CAPTURE}: RuntimeError: CUDA error: operation not" in printed_by_a_failure(capsys)


def test_a_replay_that_repeats_the_recorded_labels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict, first = CapturedSegmenter.predict, list[torch.Tensor]()

    def stale(self: CapturedSegmenter, images: torch.Tensor) -> torch.Tensor:
        first.append(predict(self, images))
        return first[0]

    monkeypatch.setattr(CapturedSegmenter, "predict", stale)
    assert re.search(rf"- cuda:0 model, {CAPTURE}: error 0\.\d+, allowed 0\.001", printed_by_a_failure(capsys))
