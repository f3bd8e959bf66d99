"""Two processes of gloo, as torchrun starts them: see train_processes.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "train_processes.py"), str(made)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=300)
    return made


def test_processes_with_unequal_tokens_are_one_with_the_joint_batch(folder: Path) -> None:
    joint, first, second = (torch.load(folder / f"gradients {name}") for name in ("0 of 1", "0 of 2", "1 of 2"))
    assert first[0] != second[0] and first[0] + second[0] == joint[0]
    for name, grad in joint[1].items():
        for part in (first, second):
            torch.testing.assert_close(part[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_processes_train_a_policy_one_of_whose_sides_fits_no_picture(folder: Path) -> None:
    first, second = (torch.load(folder / f"policy {rank}", weights_only=False) for rank in range(2))
    assert {name: value for name, value in first[0].items() if name != "seconds"} == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
