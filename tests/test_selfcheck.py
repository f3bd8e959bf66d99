"""``python -m step_kernels``: passes here, and fails where an op, or the model on a GPU, is wrong."""

from __future__ import annotations

import functools
import os
import runpy
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import info as command
from step_kernels import selfcheck, selfcheck_gpu

CPU = torch.device("cpu")
BLOCK = "Please open an issue of this project with these lines:\n\nstep_kernels "


@pytest.fixture
def only_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_devices", lambda: [CPU])


def test_command_passes_on_this_machine(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["step-kernels"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("step_kernels", run_name="__main__", alter_sys=True)
    printed = capfd.readouterr().out
    assert not ended.value.code, printed
    assert f"torch {torch.__version__}" in printed and printed.rstrip().endswith("OK")


def test_every_public_op_is_checked():
    described = ", ".join(selfcheck.CASES)
    ops = {
        name
        for name in sk.__all__
        if name.islower() and name not in {"current_backend", "selected_backend", "use_backend"}
    }
    missing = {name for name in ops if name not in described}
    assert not missing


@pytest.mark.parametrize("size", [1.001, float("nan")])
def test_a_wrong_op_is_a_mismatch_and_exit_status_1(monkeypatch, capsys, only_the_cpu, size):
    right = selfcheck.CASES["ragged_linear"]

    def wrong_in_float32(inputs):
        (out,) = right(inputs)
        return (out * size if inputs.dtype == torch.float32 and sk.current_backend() == "auto" else out,)

    monkeypatch.setitem(selfcheck.CASES, "ragged_linear", wrong_in_float32)
    failed = [outcome.op for outcome in selfcheck.run(CPU, torch.float32) if not outcome.passed]
    assert failed == ["ragged_linear"]
    assert command.run() == 1
    printed = capsys.readouterr().out
    assert "FAILED ragged_linear: error" in printed and "FAILED: 1." in printed and BLOCK in printed
    assert "\n- cpu float32, ragged_linear: error " in printed


def test_an_op_that_raises_is_one_failure_and_the_others_still_run(monkeypatch, capsys, only_the_cpu):
    def raises(inputs):
        if inputs.dtype == torch.bfloat16:
            raise RuntimeError(f"no such kernel\n1/2 of {__file__}:3")
        return (torch.zeros(1),)

    monkeypatch.setitem(selfcheck.CASES, "merge_tokens", raises)
    assert command.run() == 1
    printed = capsys.readouterr().out
    assert f"bfloat16: {len(selfcheck.CASES) - 1} of {len(selfcheck.CASES)} cases agree" in printed
    assert "FAILED merge_tokens: RuntimeError: no such kernel\n" in printed
    assert (
        "\n- cpu bfloat16, merge_tokens: RuntimeError: no such kernel\n1/2 of test_selfcheck.py:3 (in selfcheck.py:"
        in printed
    )
    assert BLOCK in printed and __file__ not in printed and "test_selfcheck.py:" in printed


def test_a_process_that_dies_is_one_failure_and_the_others_still_run():
    jobs = {"float16": functools.partial(os._exit, 3), "model": functools.partial(list, "x")}
    found = dict(command._side_by_side(jobs))
    assert found["model"] == ["x"]
    (died,) = found["float16"]
    assert not died.passed and died.op == "its process" and "BrokenProcessPool" in died.raised


def test_forced_triton_where_it_cannot_run_fails_in_one_line(monkeypatch, capsys, only_the_cpu):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with sk.use_backend("triton"):
        assert command.run() == 1
    assert capsys.readouterr().out.count("cannot run on cpu") == 1


def test_the_gpu_check_sees_four_token_counts_and_no_decision_is_a_matter_of_rounding():
    segmenter, batches = selfcheck_gpu.small_segmenter(), selfcheck_gpu.pictures()
    (head,) = segmenter.encoder.exit_heads().values()
    found = []
    for shift in (0, 1e-3, -2e-3):
        head.threshold += shift
        found.append([segmenter.trace(images).token_counts() for images in batches])
    assert found[0] == found[1] == found[2]
    assert len({merged for merged, _ in found[0]}) == len(batches)
    assert all(0.3 * merged < left < 0.7 * merged for merged, left in found[0])
    with torch.no_grad():
        for images in batches:
            first, second = segmenter(images).topk(2, dim=1).values.unbind(1)
            assert (first - second).min() > 1e-4  # a hundred times what fp32 rounds


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: object) -> list[selfcheck.Outcome]:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return selfcheck_gpu.run(CPU)


def test_a_capture_that_fails_is_one_failure_and_the_others_still_run(monkeypatch):
    predicted, replayed, compiled = compiled_by(monkeypatch, "aot_eager")
    assert predicted.passed and predicted.error == 0 and compiled.passed
    assert not replayed.passed and "capture: expected images on a CUDA device, got cpu" in replayed.raised


def test_a_compiler_that_fails_is_one_failure(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    last = "torch.compile of the segmenter"
    monkeypatch.setattr(selfcheck_gpu, "CASES", {last: selfcheck_gpu.CASES[last]})
    (compiled,) = compiled_by(monkeypatch, broken)
    assert not compiled.passed and "no compiler" in compiled.raised


def test_the_gpu_check_sees_a_few_wrong_labels(monkeypatch):
    def shifted(segmenter, batches, device):
        labels = segmenter.predict(batches[0])
        return labels.roll(1, dims=2), labels

    monkeypatch.setattr(selfcheck_gpu, "CASES", {"shifted": shifted})
    (outcome,) = selfcheck_gpu.run(CPU)
    assert not outcome.passed and 0.01 < outcome.error < 1
