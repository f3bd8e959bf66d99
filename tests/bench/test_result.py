"""One schema, one JSON file a run; machines are never mixed."""

from __future__ import annotations

import getpass
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import result
from bench.result import Row, Run, doubts, environment, read, refuse_another_machine, runs_in
from step_kernels_cli import UsageError

ROW = Row("double", "ours", {"elements": 5}, "cpu", "float32", ours=True, note="as is")
WHERE: dict[str, Any] = {
    "device": "a",
    "cpu": "a",
    "cores": 2,
    "threads": 2,
    "torch": "2.13",
    "commit": "1",
    "clean": True,
}


def write(folder: Path, name: str, **where: Any) -> None:
    Run("python -m bench", {**WHERE, **where}, [ROW]).write(folder / name)


def test_round_trip(tmp_path: Path) -> None:
    row = ROW.having(gate="passed", facts={"tokens": 3}).timed([1.0, 2.0, 3.0, 4.0, 5.0], flops=2e9, bytes=None)
    assert (row.median_ms, row.p20_ms, row.p80_ms, row.rounds, row.gflops, row.gbytes) == (3, 1.8, 4.2, 5, 2.0, None)
    run = Run("python -m bench", WHERE, (row,), ("a note",))
    run.write(tmp_path / "deep" / "main.json")
    assert read(tmp_path / "deep" / "main.json") == run
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["main.json"]


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    Run("", WHERE, [ROW.having(error=math.inf, allowed=math.nan)]).write(tmp_path / "main.json")
    text = (tmp_path / "main.json").read_text(encoding="utf-8")
    assert json.loads(text)["rows"][0]["error"] is None and "Infinity" not in text


def test_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "main.json"
    write(tmp_path, "main.json")
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(Path, "replace", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "main.json", cores=4)
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [{}], "command": "", "environment": {}, "notes": []}', "\x00"]
)
def test_what_holds_no_results_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "main.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"main\.json: expected results of bench"):
        read(tmp_path / "main.json")


def test_environment_names_the_machine_and_nobody() -> None:
    where = environment(torch.device("cpu"))
    assert where["torch"] == torch.__version__ and where["cores"] >= 1 and where["device"] == where["cpu"]
    told = json.dumps(where)
    assert str(result.REPOSITORY) not in told and socket.gethostname() not in told
    assert getpass.getuser() not in {str(value) for value in where.values()}


@pytest.mark.parametrize("other", [{"device": "b"}, {"cores": 4}, {"threads": 1}, {"torch": "2.14"}])
def test_machines_are_not_mixed(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, "main.json")
    write(tmp_path, "model.json", **other)
    with pytest.raises(ValueError, match=r"main\.json and model\.json"):
        runs_in(tmp_path)
    with pytest.raises(UsageError, match=r"model\.json is of another machine"):
        refuse_another_machine(tmp_path, "main.json", WHERE)
    refuse_another_machine(tmp_path, "model.json", WHERE)  # the one that is about to be replaced may be of any


def test_clean_and_changed_checkouts_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, "main.json")
    write(tmp_path, "model.json", commit="2")
    assert list(runs_in(tmp_path)) == ["main.json", "model.json"]
    write(tmp_path, "model.json", clean=False)
    with pytest.raises(ValueError, match="clean commit"):
        runs_in(tmp_path)


def test_busy_machines_are_told_of() -> None:
    assert "busy with other work (load 1.5" in doubts({**WHERE, "load": 1.5})[0]
    assert doubts({**WHERE, "load": 0.5}) == []
    assert doubts({**WHERE, "load": None}) == []
    assert doubts({**WHERE, "device": "a GPU", "load": 1.5}) == []


def test_a_copy_without_git_says_so_or_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(result, "REPOSITORY", tmp_path)
    monkeypatch.delenv(result.COMMIT, raising=False)
    where = environment(torch.device("cpu"))
    assert where["commit"] is None and not where["clean"]
    assert any("NO COMMIT IS KNOWN" in doubt and result.COMMIT in doubt for doubt in doubts(where))
    monkeypatch.setenv(result.COMMIT, "0123456789")
    where = environment(torch.device("cpu"))
    assert where["commit"] == "0123456789" and where["clean"]
    assert not any("COMMIT" in doubt for doubt in doubts(where))


def test_a_checkout_knows_its_commit_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "output", lambda *command: "M file" if "status" in command else "of git")
    monkeypatch.setenv(result.COMMIT, "0123456789")
    where = environment(torch.device("cpu"))
    assert where["commit"] == "of git" and not where["clean"]
