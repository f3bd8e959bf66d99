"""``python -m step_kernels tune``: picks the fastest right row, never a wrong one, loses nothing, and kernels read what it wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="rows are those of Triton's kernels")

from step_kernels.triton.common import tuned
from step_kernels.tune import file_to_write
from step_kernels.tune.measure import Found, Work, measure, tune, write
from step_kernels_cli import main

GPU, DEVICE = "a GPU", torch.device("cuda", 0)
# What a kernel with row (number,) does: its result's error in units of its bound, and the time it takes.
RIGHT, SLOW, WRONG, RAISES = (4,), (2,), (8,), (16,)
TIMES = {RIGHT: 1.0, SLOW: 2.0, WRONG: 0.5, RAISES: 0.1}


def kernel(dtype: torch.dtype) -> tuple[Tensor, ...]:
    row = tuned.row(torch.device("cpu"), "kernel")
    if row == RAISES:
        raise RuntimeError("out of resource: shared memory")
    return (torch.linspace(-1, 1, 9, dtype=torch.float64).to(dtype) * (1.1 if row == WRONG else 1),)


def clock(call: Callable[[], Any]) -> float:
    call()
    return TIMES[tuned.row(torch.device("cpu"), "kernel")]


def work(*candidates: tuple[int, ...]) -> Work:
    return Work("kernel", candidates, kernel, "sizes")


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of this test's own, on a machine with one GPU."""
    path = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv("STEP_KERNELS_TUNED", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    tuned.rows.cache_clear()
    tuned._mentions_varlen.cache_clear()
    yield path
    tuned.rows.cache_clear()
    tuned._mentions_varlen.cache_clear()


def test_the_fastest_right_one_is_found():
    found = measure(work(SLOW, WRONG, RAISES, RIGHT), torch.float32, clock, 0)
    assert found.best == RIGHT and found.milliseconds == {SLOW: 2.0, RIGHT: 1.0}
    assert "error 0.1" in found.refused[WRONG] and "out of resource" in found.refused[RAISES]


def test_the_default_stays_where_nobody_is_clearly_faster(monkeypatch):
    monkeypatch.setitem(TIMES, SLOW, 1.01)
    assert measure(work(SLOW, RIGHT), torch.float32, clock, 0).best == SLOW
    monkeypatch.setitem(TIMES, SLOW, 1.03)
    assert measure(work(SLOW, RIGHT), torch.float32, clock, 0).best == RIGHT


def test_turns_go_forwards_and_backwards(monkeypatch):
    seen = []
    measure(work(SLOW, RIGHT), torch.float32, lambda call: seen.append(tuned.row(DEVICE, "kernel")) or 1.0, 0)
    assert seen[:4] == [SLOW, RIGHT, RIGHT, SLOW]


def test_kernels_read_what_was_found(forgetful, capsys):
    assert tune([work(SLOW, WRONG, RIGHT)], DEVICE, torch.float32, 60, clock, forgetful) == 0
    assert tuned.row(DEVICE, "kernel") == RIGHT and "1 rows measured on this GPU" in tuned.describe(DEVICE)
    assert (
        tuned.row(torch.device("cpu"), "kernel") is None
        and tuned.describe(torch.device("cpu")) == "the committed tables"
    )
    told = capsys.readouterr().out
    assert "2000.0 us  1000.0 us" in told and "left out: (8,)" in told and str(forgetful) in told
    measured = json.loads(forgetful.read_text())["gpus"][GPU]["measured"]["kernel"]
    assert measured["default"] == [2] and measured["milliseconds"] == [[[2], 2.0], [[4], 1.0]]


def test_a_kernel_without_a_right_candidate_is_told_and_not_written(forgetful, capsys):
    assert tune([work(WRONG, RAISES)], DEVICE, torch.float32, 60, clock, forgetful) == 1
    assert not tuned.rows(DEVICE)
    assert "failed" in capsys.readouterr().out


def test_another_provider_may_be_the_fastest(forgetful):
    assert not tuned.may_name_varlen()
    tuned._mentions_varlen.cache_clear()
    with tuned.forced("kernel", tuned.VARLEN):
        assert tuned.may_name_varlen()
    found = Found(work(SLOW, tuned.VARLEN), {SLOW: 2.0, tuned.VARLEN: 1.0})
    write(forgetful, GPU, found)
    assert tuned.row(DEVICE, "kernel") == tuned.VARLEN and tuned.may_name_varlen()


def test_ctrl_c_keeps_what_is_there(forgetful, capsys):
    def stopped(dtype: torch.dtype) -> tuple[Tensor, ...]:
        raise KeyboardInterrupt

    works = [work(SLOW, RIGHT), Work("second", [(1,)], stopped)]
    assert tune(works, DEVICE, torch.float32, 60, clock, forgetful) == 130
    assert dict(tuned.rows(DEVICE)) == {"kernel": RIGHT}
    assert "stopped" in capsys.readouterr().out and len(list(forgetful.parent.iterdir())) == 1


def test_without_time_the_rest_is_not_measured(forgetful, capsys):
    assert tune([work(SLOW)], DEVICE, torch.float32, -1, clock, forgetful) == 0
    assert "out of time" in capsys.readouterr().out and not forgetful.exists()


def test_other_gpus_and_kernels_stay_in_the_file_and_old_rows_do_not(forgetful):
    forgetful.parent.mkdir()
    old = {"made_for": {"triton": "0", "source": "0"}, "rows": {"old": [1]}}
    other = {"made_for": tuned.made_for(), "rows": {"kernel": [3]}}
    forgetful.write_text(json.dumps({"format": tuned.FORMAT, "gpus": {GPU: old, "another": other}}))
    tune([work(SLOW, RIGHT)], DEVICE, torch.float32, 60, clock, forgetful)
    assert dict(tuned.rows(DEVICE)) == {"kernel": RIGHT}
    assert tuned.read(forgetful)["another"] == other


STALE = {"format": tuned.FORMAT, "gpus": {GPU: {"made_for": {"triton": "0", "source": "0"}, "rows": {"kernel": [1]}}}}
BROKEN = {
    "no JSON": ("{", "Expecting property name"),
    "another format": ('{"format": 99}', "format 1"),
    "no numbers": (
        json.dumps({"format": 1, "gpus": {GPU: {"made_for": {}, "rows": {"kernel": ["x"]}}}}),
        "rows for each",
    ),
    "measured with others": (json.dumps(STALE), "measured with Triton 0 and kernels 0"),
    "a missing file": (None, "no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_is_left_alone_with_one_warning(forgetful, name):
    text, reason = BROKEN[name]
    if text is not None:
        forgetful.parent.mkdir()
        forgetful.write_text(text)
    with pytest.warns(tuned.UnusedTuningWarning, match=reason) as caught:
        assert [tuned.row(DEVICE, "kernel") for _ in range(3)] == [None] * 3
    assert len(caught) == 1


def test_off_and_the_users_cache(monkeypatch, forgetful, tmp_path):
    monkeypatch.setenv("STEP_KERNELS_TUNED", "off")
    assert tuned.location() is None and not tuned.rows(DEVICE)
    monkeypatch.setenv("STEP_KERNELS_TUNED", "no")
    tuned.rows.cache_clear()
    with pytest.raises(ValueError, match=r"STEP_KERNELS_TUNED: expected off or a file \*\.json, got 'no'"):
        tuned.row(DEVICE, "kernel")
    with pytest.raises(ValueError, match=r"--out: expected a file \*\.json"):
        file_to_write(tmp_path / "rows")
    monkeypatch.delenv("STEP_KERNELS_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.rows.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.location() == tmp_path / "step_kernels/tuned.json" and not tuned.rows(DEVICE)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--batch", "0"], "at least 1"), (["--minutes", "nan"], "at least 0.01"), (["--dtype", "int8"], "int8")],
)
def test_misuse(arguments, told, capsys):
    assert main(["tune", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "results.json"
    assert file_to_write(path) == path
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"results\.json would be overwritten .*format 1"):
        file_to_write(path)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no GPU" in capsys.readouterr().err
