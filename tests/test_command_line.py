"""The command lines read their words before PyTorch is imported, and each command is there."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

import step_kernels_cli
from bench.__main__ import main as bench
from bench.__main__ import parser as words_of_bench
from bench.jobs import JOBS
from step_kernels import __version__
from step_kernels.model.vit import PRESETS

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = """
import sys
from {module} import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code or 0
assert "torch" not in sys.modules and "numpy" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("module", "words", "status", "told"),
    [
        ("step_kernels_cli", "--help", 0, "predict "),
        ("step_kernels_cli", "", 0, "predict "),
        ("step_kernels_cli", "--version", 0, "step-kernels 0."),
        ("step_kernels_cli", "predict --help", 0, "--reduction"),
        ("step_kernels_cli", "paint", 2, "invalid choice: 'paint'"),
        ("step_kernels_cli", "predict a.pth b.png --out c --fats", 2, "unrecognized arguments: --fats"),
        ("bench.__main__", "--help", 0, "peers: rivals"),
        ("bench.__main__", "--fats", 2, "unrecognized arguments: --fats"),
    ],
)
def test_help_and_typing_errors_need_no_pytorch(module: str, words: str, status: int, told: str) -> None:
    code = [sys.executable, "-c", WITHOUT_TORCH.format(module=module), *words.split()]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status and told in " ".join((done.stdout + done.stderr).split()), done.stderr
    assert done.stderr.count("\n") == (1 if status else 0)


@pytest.mark.parametrize("module", ["step_kernels", "step_kernels.model"])
@pytest.mark.parametrize("words", ["--help", "--version", "predict --help", "paint"])
def test_the_modules_are_the_same_command_line(
    module: str, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As docs/install.md says; PyTorch is there already here, as it is when ``python -m`` gets to the words."""

    def told(run: Callable[[], object]) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            run()
        return (ended.value.code or 0, *capfd.readouterr())

    monkeypatch.setattr(sys, "argv", ["step-kernels", *words.split()])
    expected = told(lambda: sys.exit(step_kernels_cli.main()))
    assert told(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)) == expected
    assert expected[0] == (2 if words == "paint" else 0) and "".join(expected[1:]).startswith(
        ("usage: ", "step-kernels")
    )


def test_a_checkout_that_is_not_installed_has_a_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(SystemExit) as ended:
        step_kernels_cli.main(["--version"])
    assert not ended.value.code and capsys.readouterr().out == f"step-kernels {__version__}\n"


def test_every_command_is_there() -> None:
    for name, command in step_kernels_cli.COMMANDS.items():
        assert callable(importlib.import_module(command.module).run), name


def test_what_the_words_name_is_there() -> None:
    assert tuple(PRESETS) == step_kernels_cli.PRESETS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in step_kernels_cli.DTYPES)
    assert {*JOBS, "report", "all"} == {*next(action.choices for action in words_of_bench()._actions if action.choices)}
    assert bench(["paint"]) == 2


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "one"}, "environment variable RANK: expected a whole number, got 'one'"),
        ({"WORLD_SIZE": "-2"}, "environment variable WORLD_SIZE: expected a whole number, got '-2'"),
        ({"RANK": "3"}, "environment variable RANK: expected a number below WORLD_SIZE, 1, got 3"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but the processes cannot meet: "),
    ],
)
@pytest.mark.parametrize(
    "words", ["predict a.pth b.png --out {out}", "train --out {out} --init a --data scenes:1:64:0 --stage heads"]
)
def test_what_torchrun_tells_is_checked(
    words: str,
    variables: dict[str, str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong RANK would silently leave pictures out."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert step_kernels_cli.main(words.format(out=tmp_path).split()) == 2
    assert told in capsys.readouterr().err
