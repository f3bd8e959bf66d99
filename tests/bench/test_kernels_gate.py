"""The gate of `bench kernels`: honest contenders pass on every op, whoever is wrong or skips work fails and is not timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import CPU, GATED_TASKS, examples, task_name
from torch import Tensor

from bench.kernels import gate, measure
from bench.kernels.contenders import (
    COMPILED,
    EAGER,
    FORWARD,
    OURS,
    Contender,
    build_contenders,
    plain_contender,
)
from bench.kernels.examples import NUM_PREFIX, Example
from bench.kernels.layouts import draw_layouts
from bench.kernels.operation import Operation
from bench.kernels.ops_canvas import SCATTER_INTO, UPSAMPLE_ARGMAX
from bench.kernels.ops_exits import EXIT_HEAD, HALT_TOKENS
from bench.kernels.ops_merging import MERGE_TOKENS
from bench.kernels.plain import merge_tokens, merge_tokens_by_pooling
from bench.kernels.schema import TIMING_FIELDS
from bench.kernels.settings import CPU_DEFAULTS, Settings
from bench.schema import PASSED

every_task = pytest.mark.parametrize(("operation", "direction"), GATED_TASKS, ids=task_name)


def contenders_of(operation: Operation, direction: str, exact: list[Example]) -> dict[str, Contender]:
    built = build_contenders(operation, direction, exact, CPU, operation.plain[0])
    return {contender.name: contender for contender in built}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_task
def test_ours_passes_in_both_forms(operation: Operation, direction: str, dtype: torch.dtype) -> None:
    exact = examples(operation, dtype)
    truths = gate.find_truths(operation, direction, exact, dtype)
    contenders = contenders_of(operation, direction, exact)
    assert gate.check(operation, contenders[OURS], truths).passed
    static = [example.static() for example in exact]
    untrimmed = contenders_of(operation, direction, static)[OURS]
    assert untrimmed.examples[0].layout.capacity > exact[0].layout.capacity
    assert gate.check(operation, untrimmed, truths).passed


COMPOSITIONS = [(*task, function) for task in GATED_TASKS for function in task[0].plain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operation", "direction", "function"), COMPOSITIONS, ids=lambda value: getattr(value, "__name__", task_name(value))
)
def test_every_composition_of_plain_pytorch_is_right(
    operation: Operation, direction: str, function: Callable[..., Any], dtype: torch.dtype
) -> None:
    exact = examples(operation, dtype)
    truths = gate.find_truths(operation, direction, exact, dtype)
    rival = plain_contender(EAGER, function, operation, direction, exact)
    assert gate.check(operation, rival, truths).passed


@every_task
def test_static_form_gives_away_who_reads_past_the_live_rows(operation: Operation, direction: str) -> None:
    (exact,) = examples(operation, count=1)
    static = exact.static()
    assert static.layout.num_tokens == exact.layout.capacity < static.layout.capacity == static.layout.max_seqlen * 3
    assert exact.static(exact.layout.capacity).layout.capacity == exact.layout.capacity
    for name in exact.packed:
        live = exact[name].shape[0]
        assert torch.equal(static[name][:live], exact[name])
        assert static[name].shape[0] == static.layout.capacity
        assert static[name].dtype in (torch.bool, torch.int32) or static[name][live:].isnan().all()


@every_task
def test_every_single_output_is_checked(operation: Operation, direction: str) -> None:
    exact = examples(operation, count=1)
    truths = gate.find_truths(operation, direction, exact, torch.float32)
    honest = contenders_of(operation, direction, exact)[OURS]
    for number in range(len(truths[0].outputs)):

        def live(result: Any, example: Example, changed: int = number) -> tuple[Tensor, ...]:
            outputs = [output.clone() for output in honest.live(result, example)]
            outputs[changed] = slightly_wrong(outputs[changed])
            return tuple(outputs)

        assert not gate.check(operation, dataclasses.replace(honest, live=live), truths).passed, number


def slightly_wrong(output: Tensor) -> Tensor:
    """One entry is off."""
    flat = output.flatten()
    if output.dtype == torch.bool:
        flat[-1] = ~flat[-1]
    elif output.is_floating_point():
        flat[-1] += 1e-3
    elif output.dtype == torch.uint8:
        flat[-1] = (flat[-1] + 1) % 7  # the next of the seven classes
    else:
        flat[-1] += 1
    return flat.view(output.shape)


@every_task
def test_answer_kept_from_the_first_input_fails(operation: Operation, direction: str) -> None:
    exact = examples(operation)
    truths = gate.find_truths(operation, direction, exact, torch.float32)
    honest = contenders_of(operation, direction, exact)[EAGER]
    kept: list[Any] = []

    def call(example: Example) -> Any:
        if not kept:
            result = honest.live(honest.call(example), example)
            kept.append(tuple(output.clone() for output in result))
        return kept[0]

    lazy = dataclasses.replace(honest, call=call, live=lambda result, example: result)
    assert not gate.check(operation, lazy, truths).passed


@pytest.mark.parametrize("operation", [HALT_TOKENS, EXIT_HEAD, SCATTER_INTO], ids=task_name)
def test_canvas_that_is_not_written_fails_although_an_earlier_call_wrote_it(operation: Operation) -> None:
    exact = examples(operation, count=1)
    truths = gate.find_truths(operation, FORWARD, exact, torch.float32)
    honest = contenders_of(operation, FORWARD, exact)[EAGER]
    assert gate.check(operation, honest, truths).passed

    def call(example: Example) -> Any:
        scratch = {**example.tensors, "canvas": example["canvas"].clone()}
        result = honest.live(honest.call(dataclasses.replace(example, tensors=scratch)), example)
        return tuple(example["canvas"] if output.dim() == 4 else output for output in result)

    skipping = dataclasses.replace(honest, call=call, live=lambda result, example: result)
    assert not gate.check(operation, skipping, truths).passed


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:-1], lambda x: x * float("nan"), lambda x: torch.cat([x, x[:1]]), lambda x: x.bfloat16().float()],
    ids=["a row missing", "NaN", "a row too many", "rounded to bfloat16"],
)
def test_other_ways_to_be_wrong(change: Callable[[Tensor], Tensor]) -> None:
    exact = examples(MERGE_TOKENS, count=1)
    truths = gate.find_truths(MERGE_TOKENS, FORWARD, exact, torch.float32)
    honest = contenders_of(MERGE_TOKENS, FORWARD, exact)[OURS]
    wrong = dataclasses.replace(honest, live=lambda result, example: (change(honest.live(result, example)[0]),))
    verdict = gate.check(MERGE_TOKENS, wrong, truths)
    assert not verdict.passed
    assert verdict.max_error > verdict.allowed_error


def test_rivals_get_more_room_for_rounding() -> None:
    limit = gate.Limit(plain=1.0, rounding=0.5)
    ours, rival = (Contender(name, [], lambda example: None, lambda result, example: ()) for name in (OURS, EAGER))
    assert (limit.of(ours), limit.of(rival)) == (2.5, 8.5)


def test_missing_output_fails() -> None:
    exact = examples(HALT_TOKENS, count=1)
    truths = gate.find_truths(HALT_TOKENS, FORWARD, exact, torch.float32)
    honest = contenders_of(HALT_TOKENS, FORWARD, exact)[OURS]
    short = dataclasses.replace(honest, live=lambda result, example: honest.live(result, example)[:-1])
    assert not gate.check(HALT_TOKENS, short, truths).passed


def test_label_that_is_no_class_fails() -> None:
    exact = examples(UPSAMPLE_ARGMAX, count=1)
    truths = gate.find_truths(UPSAMPLE_ARGMAX, FORWARD, exact, torch.float32)
    honest = contenders_of(UPSAMPLE_ARGMAX, FORWARD, exact)[OURS]
    for change in (lambda x: x + 100, lambda x: x[:, 1:]):
        wrong = dataclasses.replace(honest, live=lambda result, example, c=change: (c(result),))
        assert not gate.check(UPSAMPLE_ARGMAX, wrong, truths).passed


# The job: who fails is not timed


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[measure.Bench]:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    values = {**CPU_DEFAULTS, "model": "tiny", "size": 64, "classes": 5, "minutes": None, "compile_minutes": 0.0}
    yield measure.Bench(Settings(device="cpu", repeats=2, out=tmp_path, **values))


def rows_of(
    bench: measure.Bench, monkeypatch: pytest.MonkeyPatch, change: Callable[[Contender], Contender]
) -> dict[str, Any]:
    """Rows of `merge_tokens` where a change has been made to every contender."""

    def changed(*arguments: Any) -> list[Contender]:
        return [change(contender) for contender in build_contenders(*arguments)]

    monkeypatch.setattr(measure, "build_contenders", changed)
    keywords = {"num_prefix": NUM_PREFIX, "dtype": torch.float32, "seed": 0, "device": CPU}
    drawn = draw_layouts(measure.INPUTS["cpu"], 2, (4, 4), **keywords)
    return {row.contender: row for row in bench.measure(MERGE_TOKENS, FORWARD, drawn)}


def only(name: str, **changes: Any) -> Callable[[Contender], Contender]:
    return lambda contender: dataclasses.replace(contender, **changes) if contender.name == name else contender


@pytest.mark.parametrize("slow", [merge_tokens, merge_tokens_by_pooling], ids=lambda function: function.__name__)
def test_fastest_composition_that_is_right_is_the_contender(
    bench: measure.Bench, monkeypatch: pytest.MonkeyPatch, slow: Callable[..., Any]
) -> None:
    def slowed(*arguments: Any) -> Tensor:
        time.sleep(0.05)
        return slow(*arguments)

    def wrong(*arguments: Any) -> Tensor:
        return merge_tokens(*arguments).zero_()

    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError

    (other,) = {merge_tokens, merge_tokens_by_pooling} - {slow}
    rivals = dataclasses.replace(MERGE_TOKENS, plain=(slowed, wrong, broken, other))
    exact = examples(MERGE_TOKENS, count=measure.INPUTS["cpu"])
    truths = gate.find_truths(rivals, FORWARD, exact, torch.float32)
    assert bench.fastest(rivals, FORWARD, exact, truths) is other
    nobody = dataclasses.replace(MERGE_TOKENS, plain=(wrong, broken))
    assert bench.fastest(nobody, FORWARD, exact, truths) is wrong


def test_wrong_contender_gets_no_time(bench: measure.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = only(OURS, live=lambda result, example: (result[: example.layout.num_tokens] + 1,))
    rows = rows_of(bench, monkeypatch, wrong)
    assert (rows[OURS].gate, rows[EAGER].gate) == ("FAILED", "PASSED")
    assert all(getattr(rows[OURS], name) is None for name in TIMING_FIELDS)
    assert rows[EAGER].speedup == 1.0


def test_no_speed_up_over_a_wrong_baseline(bench: measure.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(bench, monkeypatch, only(EAGER, live=lambda result, example: (result + 1,)))
    assert (rows[OURS].gate, rows[EAGER].gate) == ("PASSED", "FAILED")
    assert rows[OURS].median_ms is not None
    assert rows[OURS].speedup is None


def test_contender_that_stops_working_under_the_clock_fails(
    bench: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def call(example: Example) -> Tensor:
        calls.append(1)
        rows = torch.zeros(example.layout.capacity, example["tokens"].shape[2])
        return MERGE_TOKENS.ours(example) if len(calls) <= measure.INPUTS["cpu"] else rows

    rows = rows_of(bench, monkeypatch, only(OURS, call=call))
    assert rows[OURS].gate == "FAILED"
    assert rows[OURS].problem == "right before the clock, wrong under it"
    assert rows[OURS].median_ms is None
    assert rows[EAGER].median_ms is not None


def test_contender_that_raises_is_a_row_with_a_reason(bench: measure.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(example: Example) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    rows = rows_of(bench, monkeypatch, only(EAGER, call=call))
    assert (rows[EAGER].gate, rows[EAGER].problem) == ("NOT RUN", "RuntimeError: no such kernel")
    assert rows[OURS].gate == "PASSED"


@pytest.mark.parametrize(("count", "compared"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 1, 7])])
def test_inputs_that_are_compared(count: int, compared: list[int]) -> None:
    """The first, which every clock reaches, and the last, which is rewritten after it."""
    truths = gate.find_truths(MERGE_TOKENS, FORWARD, examples(MERGE_TOKENS, count=count), torch.float32)
    assert [truth.number for truth in truths] == compared


def test_a_gpu_rotates_eight_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are timed, three are compared; on a CPU there are three."""
    monkeypatch.setattr(measure, "INPUTS", {"cpu": 8})
    bench = measure.Bench(Settings("cpu", "float32", "tiny", 64, 1, 5, ops=("merge_tokens",), repeats=8))
    seen: set[int] = set()
    real = measure.interleave

    def interleave(calls: Any, **options: Any) -> Any:
        counted = {name: lambda number, call=call: (seen.add(number), call(number))[1] for name, call in calls.items()}
        return real(counted, **options)

    monkeypatch.setattr(measure, "interleave", interleave)
    assert {row.gate for row in bench.rows() if row.contender != COMPILED} == {PASSED}
    assert seen == set(range(8))
