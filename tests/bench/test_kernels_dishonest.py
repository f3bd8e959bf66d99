"""Contenders of `bench kernels` that keep answers: they show FAILED and no time, or they gain nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import ATTENTION_TASKS, CPU, GATED_TASKS, sources, task_name

from bench.kernels import gate, measure
from bench.kernels.answers import Answers, renewal
from bench.kernels.contenders import BACKWARD, EAGER, FORWARD, OURS, Contender, build_contenders, reference_of
from bench.kernels.examples import NUM_PREFIX, Example, Source
from bench.kernels.layouts import draw_layouts
from bench.kernels.operation import Operation, Outputs
from bench.kernels.ops_canvas import SCATTER_INTO, UPSAMPLE_ARGMAX
from bench.kernels.ops_exits import GATHER_TOKENS
from bench.kernels.ops_merging import MERGE_TOKENS
from bench.kernels.rows import LATER, STALE, TIMED
from bench.kernels.schema import TIMING_FIELDS
from bench.kernels.settings import CPU_DEFAULTS, Settings
from bench.schema import FAILED, PASSED

every_task = pytest.mark.parametrize(("operation", "direction"), GATED_TASKS + ATTENTION_TASKS, ids=task_name)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[measure.Bench]:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    values = {**CPU_DEFAULTS, "model": "tiny", "size": 64, "classes": 5, "minutes": None, "compile_minutes": 0.0}
    yield measure.Bench(Settings(device="cpu", repeats=4, out=tmp_path, **values))


def kept_under(key: Callable[[Example], object]) -> Callable[[Contender], Contender]:
    """The contender, but it computes once for each key."""

    def change(honest: Contender) -> Contender:
        kept: dict[object, Outputs] = {}

        def call(example: Example) -> Outputs:
            asked = key(example)
            if asked not in kept:
                outputs = honest.live(honest.call(example), example)
                kept[asked] = tuple(output.detach().clone() for output in outputs)
            return kept[asked]

        return dataclasses.replace(honest, call=call, live=lambda result, example: result)

    return change


def by_address(example: Example) -> object:
    return next(iter(example.tensors.values())).data_ptr()


def by_all_addresses(example: Example) -> object:
    return tuple(tensor.data_ptr() for tensor in example.tensors.values())


@every_task
def test_unseen_numbers_fail_who_kept_an_answer_and_nobody_else(
    operation: Operation, direction: str, bench: measure.Bench
) -> None:
    first, last = sources()
    exact = [operation.make(source) for source in (first, last)]
    truths = gate.find_truths(operation, direction, exact, torch.float32)
    honest = [reference_of(operation, direction, form) for form in (exact, [example.static() for example in exact])]
    lazy = [kept_under(by_address)(contender) for contender in honest]
    for contender in (*honest, *lazy):
        assert gate.check(operation, contender, truths).passed
    masks = {name: tensor.clone() for name, tensor in exact[1].tensors.items() if tensor.dtype == torch.bool}
    fresh = Source(last.shape, (first if operation.makes_layout else last).drawn, 9)
    (unseen,) = bench.rewrite_last(operation, direction, exact, fresh, [*honest, *lazy], truths)
    assert unseen.number == 1
    for contender in honest:
        assert gate.check(operation, contender, [unseen]).passed
        assert gate.check(operation, contender, truths[:1]).passed, "the other input has changed, too"
        assert not gate.check(operation, contender, truths[1:]).passed
    for contender in lazy:
        assert not gate.check(operation, contender, [unseen]).passed
    assert all(torch.equal(exact[1][name], mask) for name, mask in masks.items())
    for limit, before in zip(unseen.limits, truths[1].limits, strict=True):
        assert limit.plain >= before.plain


@pytest.mark.parametrize("operation", [MERGE_TOKENS, GATHER_TOKENS], ids=task_name)
def test_tails_stay_tails(operation: Operation) -> None:
    (source,) = sources(count=1)
    exact = operation.make(source)
    static = exact.static()
    fresh = operation.make(dataclasses.replace(source, seed=9))
    for form in (exact, static):
        form.take_over(fresh)
    for name in exact.packed:
        live = exact[name].shape[0]
        if exact[name].is_floating_point():
            assert torch.equal(static[name][:live], fresh[name]) and torch.equal(exact[name], fresh[name])
            assert static[name][live:].isnan().all()


def test_drawn_scores_are_not_written_over(bench: measure.Bench) -> None:
    """Every op of a run starts from them."""
    operation = next(operation for operation in measure.OPERATIONS if operation.name == "resolve_layout")
    drawn = draw_layouts(
        measure.INPUTS["cpu"], 2, (4, 4), num_prefix=NUM_PREFIX, dtype=torch.float32, seed=0, device=CPU
    )
    before = [score.clone() for one in drawn for score in one.scores]
    rows = bench.measure(operation, FORWARD, drawn)
    assert [row.gate for row in rows[:2]] == [PASSED, PASSED]
    assert all(map(torch.equal, before, (score for one in drawn for score in one.scores)))


# The job


def rows_of(
    bench: measure.Bench,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Contender], Contender],
    name: str = OURS,
    operation: Operation = MERGE_TOKENS,
) -> dict[str, Any]:
    """Rows of an op where a change has been made to one contender."""

    def changed(*arguments: Any) -> list[Contender]:
        return [change(one) if one.name == name else one for one in build_contenders(*arguments)]

    monkeypatch.setattr(measure, "build_contenders", changed)
    drawn = draw_layouts(
        measure.INPUTS["cpu"], 2, (4, 4), num_prefix=NUM_PREFIX, dtype=torch.float32, seed=0, device=CPU
    )
    return {row.contender: row for row in bench.measure(operation, FORWARD, drawn)}


def by_number(contender: Contender) -> Contender:
    numbers = {id(example): number for number, example in enumerate(contender.examples)}
    return kept_under(lambda example: numbers[id(example)])(contender)


@pytest.mark.parametrize("name", [OURS, EAGER])
@pytest.mark.parametrize(
    "change", [by_number, kept_under(by_address), kept_under(by_all_addresses)], ids=["number", "address", "addresses"]
)
def test_who_keeps_answers_is_failed_and_not_timed(
    change: Callable[[Contender], Contender], name: str, bench: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(bench, monkeypatch, change, name)
    (other,) = {OURS, EAGER} - {name}
    assert (rows[name].gate, rows[name].problem) == (FAILED, STALE)
    assert all(getattr(rows[name], field) is None for field in TIMING_FIELDS)
    assert rows[name].max_error > rows[name].allowed_error
    assert rows[other].gate == PASSED and rows[other].median_ms is not None
    assert (rows[OURS].speedup, rows[EAGER].speedup) == ((None, 1.0) if name == OURS else (None, None))


def test_an_answer_kept_by_version_is_computed_in_every_timed_call(
    bench: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []

    def by_version(example: Example) -> object:
        return tuple((tensor.data_ptr(), tensor._version) for tensor in example.tensors.values())

    def change(honest: Contender) -> Contender:
        def counted(example: Example) -> Any:
            computed.append(by_version(example))
            return honest.call(example)

        return kept_under(by_version)(dataclasses.replace(honest, call=counted))

    row = rows_of(bench, monkeypatch, change)[OURS]
    assert row.gate == PASSED
    assert len(computed) >= measure.INPUTS["cpu"] + row.rounds  # the gate before the clock, and each call under it


@pytest.mark.parametrize("operation", [MERGE_TOKENS, SCATTER_INTO, UPSAMPLE_ARGMAX], ids=task_name)
@pytest.mark.parametrize("name", [OURS, EAGER])
def test_who_works_for_the_gate_alone_is_failed(
    name: str, operation: Operation, bench: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a canvas, too, on which somebody else has painted the right answer before."""
    under_the_clock: list[bool] = []
    real = bench.time

    def time(*arguments: Any) -> Any:
        under_the_clock.append(True)
        try:
            return real(*arguments)
        finally:
            under_the_clock.clear()

    def change(honest: Contender) -> Contender:
        def call(example: Example) -> Any:
            if not under_the_clock:
                return honest.call(example)
            return example["canvas"] if "canvas" in example.tensors else torch.zeros_like(honest.call(example))

        return dataclasses.replace(honest, call=call)

    monkeypatch.setattr(bench, "time", time)
    rows = rows_of(bench, monkeypatch, change, name, operation)
    (other,) = {OURS, EAGER} - {name}
    assert (rows[name].gate, rows[name].problem, rows[other].gate) == (FAILED, TIMED, PASSED)
    assert all(getattr(rows[name], field) is None for field in TIMING_FIELDS)


def test_wrong_after_the_clock_is_told_from_wrong_under_it(
    bench: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[bool] = []
    real = bench.time

    def time(*arguments: Any) -> Any:
        timings = real(*arguments)
        stopped.append(True)
        return timings

    def change(honest: Contender) -> Contender:
        return dataclasses.replace(honest, call=lambda example: honest.call(example) + len(stopped))

    monkeypatch.setattr(bench, "time", time)
    assert rows_of(bench, monkeypatch, change)[OURS].problem == LATER not in (STALE, TIMED)


def test_any_timed_call_with_a_truth_may_be_the_one_that_is_compared() -> None:
    (source,) = sources(count=1)
    honest = reference_of(MERGE_TOKENS, FORWARD, [MERGE_TOKENS.make(source)] * 4)
    found = set()
    for _ in range(200):
        answers, result = Answers([honest], {0, 1, 3}), torch.zeros(1000, 1)
        for number in range(4):
            answers.keep(honest.name, number, result.fill_(number))
            answers.keep("copy", number, None)
        (answer,) = answers.of.values()
        assert answer.outputs[0].eq(answer.number).all()  # a copy of its own
        assert answer.outputs[0].shape == (source.live, 1)
        found.add(answer.number)
    assert found == {0, 1, 3}, "of input 2 there is no truth"


def test_one_that_raises_on_unseen_numbers_says_so(bench: measure.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten: list[bool] = []
    real = bench.rewrite_last

    def rewrite(*arguments: Any) -> Any:
        rewritten.append(True)
        return real(*arguments)

    def change(honest: Contender) -> Contender:
        def call(example: Example) -> Any:
            if rewritten:
                raise RuntimeError("stale handle")
            return honest.call(example)

        return dataclasses.replace(honest, call=call)

    monkeypatch.setattr(bench, "rewrite_last", rewrite)
    row = rows_of(bench, monkeypatch, change)[OURS]
    assert (row.gate, row.problem, row.max_error) == ("NOT RUN", "RuntimeError: stale handle", None)


@pytest.mark.parametrize(("operation", "direction"), [(MERGE_TOKENS, BACKWARD), (SCATTER_INTO, FORWARD)], ids=task_name)
def test_renewal_reaches_every_form_of_one_input_and_changes_no_number(operation: Operation, direction: str) -> None:
    """But for what has been painted on a canvas."""
    exact = [operation.make(source) for source in sources()]
    forms = [exact, [example.static() for example in exact]]
    contenders = [reference_of(operation, direction, form) for form in forms]
    tensors = [[item for form in forms for item in form[number].tensors.items()] for number in (0, 1)]
    versions = [[tensor._version for _, tensor in own] for own in tensors]
    before = [[tensor.clone() for _, tensor in own] for own in tensors]
    for example in exact if operation is SCATTER_INTO else ():
        example["canvas"].zero_()
    renewal(contenders)(1)
    for number, own in enumerate(tensors):
        for (name, tensor), version, value in zip(own, versions[number], before[number], strict=True):
            renewed, wiped = number == 1 and tensor.dtype != torch.bool, name == "canvas"
            assert tensor._version == version + renewed + wiped + (renewed and wiped)
            untouched = torch.zeros_like(value) if wiped and not renewed else value
            assert torch.equal(tensor.nan_to_num(7.0), untouched.nan_to_num(7.0))
