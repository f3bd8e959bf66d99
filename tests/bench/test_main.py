"""The main job at a small size: three families on the same pictures, recorded decisions, the policy's work inside the time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import no_time

from bench import images, main
from bench.engine import Case, Contender, compete
from bench.options import Options
from bench.result import FAILED, LATER, PASSED, Row
from bench.segmenters import DENSE, MERGED, MERGED_EXITS, Segmenters

OPTIONS = Options(torch.device("cpu"), torch.float32, ("tiny",), (128,), (2,))


@pytest.fixture(scope="module")
def case() -> Case:
    (found,) = main.cases(OPTIONS)
    return found


def segmenters() -> Segmenters:
    return main.photographed(OPTIONS, "tiny", 128, 2)[1]


def rows_of(case: Case, **contenders: Callable[[], Contender]) -> dict[str, Row]:
    case = dataclasses.replace(case, contenders=contenders or case.contenders)
    return {row.contender: row for row in compete(case, no_time, rounds=2)}


def test_every_family_passes(case: Case) -> None:
    rows = rows_of(case)
    assert case.inputs == 8 and list(rows) == [DENSE, MERGED, MERGED_EXITS]
    assert all(row.gate == PASSED and row.median_ms for row in rows.values())
    assert not rows[DENSE].ours and rows[MERGED].ours
    flops = [row.gflops or 0 for row in rows.values()]
    assert flops[0] > 2 * flops[1] and flops[1] > flops[2] > 0
    assert rows[DENSE].facts == {"tokens_mean": 64, "tokens_min": 64, "tokens_max": 64, "halted_share": 0}
    assert rows[MERGED].facts["tokens_mean"] == pytest.approx(64 / 2.5, rel=0.1)
    assert rows[MERGED_EXITS].facts["halted_share"] == pytest.approx(0.4, abs=0.01)
    assert rows[MERGED_EXITS].facts["share_decided_differently"] < 0.02


@pytest.mark.parametrize(("policy", "calls"), [("variance", 1), ("given", 0)])
def test_policy_works_inside_the_time(policy: str, calls: int) -> None:
    asked, options = [], dataclasses.replace(OPTIONS, policy=policy)
    own = segmenters()
    contender = main.ours_of(options, own, MERGED)
    hook = own.weights.policy.register_forward_hook(lambda *_: asked.append(1))
    contender.call(3)
    hook.remove()
    assert len(asked) == calls and ("given" in contender.note) == (calls == 0)


def test_dense_labels_are_wrong_for_merged(case: Case) -> None:
    own = segmenters()
    dense = own.contender(MERGED, main.dense(own).call, ours=True)
    assert rows_of(case, wrong=lambda: dense)["wrong"].gate == FAILED


def test_right_only_for_the_gate_is_found_after_the_clock(case: Case) -> None:
    own, calls = segmenters(), []
    honest = main.dense(own).call

    def keeps_an_answer(number: int) -> Any:
        calls.append(number)
        return honest(number if len(calls) <= 2 else 0)

    dishonest = own.contender(DENSE, keeps_an_answer, ours=False)
    assert rows_of(case, dishonest=lambda: dishonest)["dishonest"].gate == LATER


def test_thresholds_halt_whom_the_traces_say() -> None:
    """A free run takes the recorded decisions, on all inputs."""
    own = segmenters()
    for inputs, trace in zip(own.inputs, own.traces, strict=True):
        free = own.model(MERGED_EXITS).trace(inputs)
        assert torch.equal(free.layout.cells, trace.layout.cells)
        assert float((free.stages[0].halted != trace.stages[0].halted).double().mean()) < 0.05


def test_picture_and_notes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = main.picture(dataclasses.replace(OPTIONS, out=tmp_path))
    assert path.read_bytes().startswith(b"\x89PNG")
    notes = " ".join(main.notes(OPTIONS))
    assert "8 inputs rotate" in notes and "variance policy runs inside the time" in notes


def test_generated_pictures_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "folder_of", lambda package: None)
    notes = " ".join(main.notes(dataclasses.replace(OPTIONS, size=(64,), policy="given")))
    assert "Generated pictures" in notes and "scikit-image" in notes and "no policy is timed" in notes
