"""ToMe in `bench peers`, on timm itself and a stand-in for ToMe's package: gated at r = 0, timed and told in a note at r > 0."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tome_standin
import torch
from bench_model_cases import nano_preset
from bench_peer_cases import peer, peer_case
from real_timm import timm
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import table
from bench.__main__ import main
from bench.kernels.operation import Unavailable
from bench.kernels.schema import NOT_RUN
from bench.model import gate, machine, measure
from bench.model.case import DENSE as DENSE_FAMILY
from bench.model.case import MERGED, Case
from bench.model.layouts import QUOTA, SPREAD
from bench.model.registry import DENSE
from bench.model.schema import TIMING_FIELDS, ModelResult
from bench.peers.measure import PeerBench
from bench.peers.registry import CTS, TOME
from bench.peers.settings import PeerSettings
from bench.peers.tome import LABELS, TOKENS, Beside, ToMe, patched, plan, plan_like_merged
from bench.schema import FAILED, PASSED
from bench.timing import Timings

R = 3  # of 16 tokens, 3 blocks: 6, 3 and none are merged
LEFT = 17 - 6 - 3


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in tome_standin.package().items():
        monkeypatch.setitem(sys.modules, name, module)


def verdict(case: Case) -> gate.Verdict:
    return gate.check(case, peer(TOME), peer(TOME).build(case), gate.Truths(case))


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"size": 112}, {"kind": SPREAD, "batch": 1}], ids=str)
def test_it_passes_where_it_merges_nothing(changes: dict[str, Any]) -> None:
    case = peer_case(**{"batch": 3, **changes})
    found = verdict(case)
    assert found.passed, found
    assert peer(TOME).build(case).variant == f"timm {timm.__version__}, eager"


def test_it_has_the_parameters_of_the_case() -> None:
    case = peer_case()
    of_timm = {parameter.data_ptr() for parameter in patched(case)._model.parameters()}
    assert of_timm == {parameter.data_ptr() for parameter in case.weights.vit.parameters()}
    assert patched(case) is patched(case)


Patch = Callable[[pytest.MonkeyPatch], None]


def merging_nevertheless(patch: pytest.MonkeyPatch) -> None:
    start = tome_standin.patch

    def merge_one(model: Any, **arguments: Any) -> None:
        start(model, **arguments)
        model.blocks.register_forward_pre_hook(lambda *_: model._tome_info.update(r=[1, 0, 0]))

    patch.setattr(sys.modules["tome.patch"], "timm", merge_one)


def unscaled_attention(patch: pytest.MonkeyPatch) -> None:
    real = tome_standin.patch

    def unscaled(model: Any, **arguments: Any) -> None:
        for block in model.blocks:
            block.attn.scale = 1.0
        real(model, **arguments)

    patch.setattr(sys.modules["tome.patch"], "timm", unscaled)


def class_token_among_the_patches(patch: pytest.MonkeyPatch) -> None:
    real = ToMe.decoded
    patch.setattr(ToMe, "decoded", lambda *arguments, **others: real(*arguments, **others).roll(1, 1))


@pytest.mark.parametrize("fault", [merging_nevertheless, unscaled_attention, class_token_among_the_patches])
def test_one_thing_wrong_fails(fault: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    case = peer_case()
    truths = gate.Truths(case)
    truths.of(DENSE_FAMILY)
    fault(monkeypatch)
    assert not gate.check(case, peer(TOME), peer(TOME).build(case), truths).passed


@pytest.mark.parametrize("r", [0, 1, R, 8])
def test_flops_and_tokens_are_those_of_a_run(r: int) -> None:
    case = peer_case(batch=1)
    planned = plan(case, r)
    with FlopCounterMode(display=False) as counter:
        scores = ToMe(case, planned.merged).decoded(0)
    assert scores.shape == (1, planned.lengths[-1], 5)
    assert planned.gigaflops * 1e9 == pytest.approx(counter.get_total_flops())
    assert [before - after for before, after in zip(planned.lengths, planned.lengths[1:], strict=False)] == [
        *planned.merged
    ]


def test_the_schedule() -> None:
    case = peer_case()
    assert plan(case, 0).merged == (0, 0, 0)
    assert plan(case, R).merged == (6, 3, 0)
    assert plan(case, 8).merged == (8, 4, 0)  # every second token at most, the class token not counted
    assert plan(case, 0).gigaflops == pytest.approx(case.gigaflops(DENSE_FAMILY))


@pytest.mark.parametrize("kind", [QUOTA, SPREAD])
def test_r_is_the_closest_to_the_merged_family(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = peer_case(kind, size=256)
    monkeypatch.setattr(Case, "gigaflops", lambda case, family: {MERGED: 0.6 * plan(case, 0).gigaflops}[family])
    r, chosen = plan_like_merged(case)
    goal = case.gigaflops(MERGED)
    assert 1 < r < 128
    assert chosen == plan(case, r)
    assert plan(case, r - 1).gigaflops > goal > plan(case, r + 1).gigaflops
    assert all(abs(plan(case, other).gigaflops - goal) >= abs(chosen.gigaflops - goal) for other in range(1, 128))


def test_every_patch_has_the_scores_of_its_token() -> None:
    case = peer_case(batch=3)
    model = ToMe(case, plan(case, R).merged)
    tokens = model.decoded(1, traced=True)
    source = patched(case).source()
    assert source is not None and tuple(source.shape) == (3, LEFT, 17)
    scores = model.scores(1)
    assert torch.equal(scores.flatten(2).mT, source[:, :, 1:].mT @ tokens)
    assert len(scores[0].flatten(1).unique(dim=1).T) < 16  # some were merged
    assert tuple(model.labels(1).shape) == (3, 64, 64)
    model.check(LEFT)
    model.decoded(1)
    assert patched(case).source() is None  # not traced where nobody asks


def spoilt(how: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """A package whose tokens come out of `how`."""

    def fault(patch: pytest.MonkeyPatch) -> None:
        real = tome_standin.patch

        def spoil(model: Any, **arguments: Any) -> None:
            real(model, **arguments)
            model.register_forward_hook(lambda module, inputs, tokens: how(tokens))

        patch.setattr(sys.modules["tome.patch"], "timm", spoil)

    return fault


def keeping_its_answer() -> Callable[[Tensor], Tensor]:
    kept: dict[torch.Size, Tensor] = {}
    return lambda tokens: kept.setdefault(tokens.shape, tokens)


def tracing_wrongly(patch: pytest.MonkeyPatch) -> None:
    real = tome_standin.gathered_at
    patch.setattr(tome_standin, "gathered_at", lambda places, values, r: real(places, values, r).clamp(min=0.1))


FAULTS = [
    (spoilt(keeping_its_answer()), "expected other scores"),
    (spoilt(lambda tokens: tokens * torch.nan), "expected finite scores"),
    (tracing_wrongly, "expected every token to be in one"),
]


@pytest.mark.parametrize(("fault", "problem"), FAULTS, ids=[problem for _, problem in FAULTS])
def test_what_can_be_checked_at_r_is_checked(fault: Patch, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    case = peer_case()
    with pytest.raises(RuntimeError, match=problem):
        ToMe(case, plan(case, R).merged).check(LEFT)


def test_less_merged_than_planned_is_found() -> None:
    case = peer_case()
    with pytest.raises(RuntimeError, match=f"expected {LEFT} tokens to be left, got {LEFT + 1}"):
        ToMe(case, (6, 2, 0)).check(LEFT)
    with pytest.raises(RuntimeError, match="got None"):
        ToMe(case, (0, 0, 0)).check(LEFT)


def test_a_note_without_times(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(lambda tokens: tokens * torch.nan)(monkeypatch)
    beside = Beside(peer_case())
    assert beside.contenders == {}
    assert beside.note({}).endswith("not timed: RuntimeError: expected finite scores")


def test_a_note_with_times() -> None:
    case = peer_case(SPREAD, batch=3)
    beside = Beside(case)
    assert set(beside.contenders) == {LABELS, TOKENS}
    note = beside.note({LABELS: Timings((2.0, 3.0, 4.0)), TOKENS: Timings((1.0, 1.5, 2.0))})
    for text in (
        "ToMe at r = 1 (ViT nano, 64 px, batch 3, spread layouts;",
        f"{plan(case, 1).gigaflops:.3g} GFLOPs/image",
        "13 of 16 tokens left; 3 ms/batch (2.4 - 3.6), 1000 images/s",
        "without labels 1.5 ms/batch (1.2 - 1.8), 2000 images/s.",
        "no speed-up is stated",
    ):
        assert text in note


NANO = ["--device", "cpu", "--model", "nano", "--size", "64", "--batch", "2", "--classes", "5", "--repeats", "2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, ModelResult]]:
    monkeypatch.setitem(machine.SIZES, "cpu", (1024, 16))

    def call(*arguments: str) -> tuple[int, ModelResult]:
        status = main(["peers", *NANO, "--layout", QUOTA, *arguments, "--out", str(tmp_path)])
        return status, ModelResult.read(tmp_path / "peers.json")

    return call


def test_the_command(
    run: Callable[..., tuple[int, ModelResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = run("--contender", DENSE, "--contender", TOME, "--contender", CTS)
    printed = capsys.readouterr().out
    assert status == 0
    assert [row.contender for row in result.rows] == [DENSE, TOME, CTS]
    dense, tome, _ = result.rows
    assert (tome.gate, tome.gflops, tome.flop_reduction) == (PASSED, dense.gflops, 1.0)
    assert tome.speedup == pytest.approx(dense.median_ms / tome.median_ms)
    assert tome.note is not None and "ToMe at r = 1" in tome.note
    assert f"- {TOME}: {tome.note}" in printed
    assert f"- {TOME}: {tome.note}" in table.render((tmp_path / "peers.json").read_text())
    # What was timed at r > 0 is in the note alone: the file has no number of it that a table or a plot could take.
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert all("r = 1" not in str(value) for row in rows for name, value in row.items() if name != "note")


def test_where_r_0_is_wrong_nothing_is_told(
    run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    unscaled_attention(monkeypatch)
    status, result = run("--contender", DENSE, "--contender", TOME)
    dense, tome = result.rows
    assert (status, dense.gate, tome.gate, tome.note) == (1, PASSED, FAILED, None)
    assert all(getattr(tome, name) is None for name in TIMING_FIELDS)


def test_where_r_0_is_wrong_after_the_clock_nothing_is_told(
    run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PeerBench.time

    def time(*arguments: Any) -> dict[str, Timings]:
        timings = real(*arguments)
        class_token_among_the_patches(monkeypatch)
        return timings

    monkeypatch.setattr(PeerBench, "time", time)
    status, result = run("--contender", DENSE, "--contender", TOME)
    assert (status, result.rows[1].gate, result.rows[1].note) == (1, FAILED, None)


def test_the_others_are_timed_where_r_does_not_run(
    run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToMe, "check", lambda model, left: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    status, result = run("--contender", DENSE, "--contender", TOME)
    assert (status, [row.gate for row in result.rows]) == (0, [PASSED, PASSED])
    assert result.rows[1].note is not None and result.rows[1].note.endswith("not timed: OutOfMemoryError: no memory")


def test_the_others_are_timed_where_r_raises_under_the_clock(
    run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ToMe.labels, []

    def labels(model: ToMe, number: int) -> Tensor:
        if model._merged[0]:
            calls.append(number)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("no memory")
        return real(model, number)

    monkeypatch.setattr(ToMe, "labels", labels)
    status, result = run("--contender", DENSE, "--contender", TOME)
    assert (status, [row.gate for row in result.rows], len(calls)) == (0, [PASSED, PASSED], 3)
    assert result.rows[1].note is not None and result.rows[1].note.endswith("not timed: OutOfMemoryError: no memory")


def test_another_that_raises_is_not_taken_for_it(
    run: Callable[..., tuple[int, ModelResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(contenders: Any, **others: Any) -> None:
        next(iter(contenders.values()))(0)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(measure, "interleave", refuse)
    _, result = run("--contender", DENSE, "--contender", TOME)
    assert [(row.gate, row.problem) for row in result.rows] == [
        (NOT_RUN, "not timed: OutOfMemoryError: no memory"),
        (NOT_RUN, "not timed: OutOfMemoryError: no memory"),
    ]
    assert result.rows[1].note is None


def test_a_note_is_of_its_own_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PeerSettings("cpu", "float32", ("nano",), (64,), (2,), 5, contenders=(DENSE, TOME), repeats=2)
    bench = PeerBench(settings)
    first, second = (bench.measure(peer_case(kind), 1.0)[1].note for kind in (QUOTA, SPREAD))
    assert first is not None and "quota layouts" in first
    assert second is not None and "spread layouts" in second
    monkeypatch.setattr(PeerBench, "timed", lambda *arguments: {})
    assert bench.measure(peer_case(), 1.0)[1].note is None


def test_timm_of_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "__version__", "0.4.12")
    with pytest.raises(Unavailable, match=r"needs timm 1.0 or newer, got 0.4.12: pip install 'timm>=1.0.16'"):
        peer(TOME).build(peer_case())


def test_another_package_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tome.patch", types.ModuleType("tome.patch"))
    with pytest.raises(
        Unavailable, match=r"needs timm and ToMe's own package \(AttributeError: .*--no-deps git\+https"
    ):
        peer(TOME).build(peer_case())
