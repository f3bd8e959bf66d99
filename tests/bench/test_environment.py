"""The environment record: complete, JSON-ready, and about the machine only."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
from pathlib import Path

import torch

from bench.environment import REPOSITORY, describe, git_state, one_line


def test_record_is_json_and_tells_what_a_reader_needs() -> None:
    facts = describe(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    for name in ("date", "cpu", "cores", "threads", "memory_gib", "python", "torch", "numpy", "step_kernels"):
        assert facts[name], name
    assert facts["threads"] == torch.get_num_threads()
    assert facts["gpu"] is None
    assert str(facts["torch"]) in one_line(facts)


def test_record_names_no_host_person_or_path() -> None:
    text = json.dumps(describe(torch.device("cpu")))
    for secret in (platform.node(), str(Path.home()), str(REPOSITORY)):
        assert len(secret) < 3 or secret not in text
    assert f'"{getpass.getuser()}"' not in text


def test_git_state_outside_before_and_after_a_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new").write_text("")
    assert git_state(tmp_path)["dirty"] is True
