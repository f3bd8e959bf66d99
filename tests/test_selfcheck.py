"""``python -m step_kernels``: passes here, and fails where an op is wrong."""

import subprocess
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import __main__ as command
from step_kernels import selfcheck

CPU = torch.device("cpu")


def test_command_passes_on_this_machine():
    done = subprocess.run([sys.executable, "-m", "step_kernels"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert done.stdout.rstrip().endswith("OK")


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
def test_a_wrong_op_is_a_mismatch_and_exit_status_1(monkeypatch, capsys, size):
    right = selfcheck.CASES["ragged_linear"]

    def wrong_in_float32(inputs):
        (out,) = right(inputs)
        return (out * size if inputs.dtype == torch.float32 and sk.current_backend() == "auto" else out,)

    monkeypatch.setitem(selfcheck.CASES, "ragged_linear", wrong_in_float32)
    failed = [outcome.op for outcome in selfcheck.run(CPU, torch.float32) if not outcome.passed]
    assert failed == ["ragged_linear"]
    monkeypatch.setattr(command, "_devices", lambda: [CPU])
    assert command.main([]) == 1
    printed = capsys.readouterr().out
    assert "MISMATCH ragged_linear" in printed and "FAILED: 1 mismatches" in printed


def test_forced_triton_where_it_cannot_run_fails_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "_devices", lambda: [CPU])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with sk.use_backend("triton"):
        assert command.main([]) == 1
    assert "cannot run on cpu" in capsys.readouterr().out
