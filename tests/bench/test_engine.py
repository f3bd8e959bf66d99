"""One engine for all jobs: who is wrong has no time, who breaks costs one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from bench_cases import BreakableDevice, Doubling, contender, no_time
from torch import Tensor

from bench import costs
from bench.engine import Case, Contender, NotRun, compete
from bench.gate import Expected
from bench.result import BROKE, FAILED, LATER, LOST, NOT_RUN, PASSED, UNFINISHED, Row


def rows_of(case: Case, **options: Any) -> dict[str, Row]:
    return {row.contender: row for row in compete(case, no_time, **{"seconds": 0.0, **options})}


def beside(call: Callable[[int], Any], **values: Any) -> dict[str, Row]:
    """The rows of a contender between two that are right."""
    double = Doubling()
    right = contender(double.right)
    return rows_of(double.case({"first": right, "under test": contender(call, **values), "last": right}))


def test_right_contenders_are_timed_in_order() -> None:
    double = Doubling()
    ours = contender(double.right, ours=True, note="as is", facts={"tokens": 3})
    rows = rows_of(double.case({"plain": contender(double.right), "ours": ours}, flops=4e9, bytes=2e9))
    assert list(rows) == ["plain", "ours"]
    row = rows["ours"]
    assert (row.case, row.shape, row.device, row.dtype) == ("double", {"elements": 5}, "cpu", "float32")
    assert (row.gate, row.ours, row.note, row.facts, row.problem) == (PASSED, True, "as is", {"tokens": 3}, None)
    assert (row.rounds, row.p20_ms, row.median_ms, row.p80_ms, row.gflops, row.gbytes) == (4, 1.0, 1.0, 1.0, 4.0, 2.0)
    assert not rows["plain"].ours


def test_wrong_contender_fails_and_is_not_timed() -> None:
    double = Doubling()
    row = beside(lambda number: 3 * double.inputs[number])["under test"]
    assert row.gate == FAILED and row.failed and row.median_ms is None
    assert row.error is not None and row.allowed is not None and row.error > row.allowed


def test_wrong_on_the_last_input_alone_fails() -> None:
    double = Doubling()
    row = beside(lambda number: 2 * double.inputs[0 if number == 2 else number])["under test"]
    assert row.gate == FAILED


def test_right_only_for_the_gate_fails_after_the_clock() -> None:
    double, calls = Doubling(), []

    def keeps_an_answer(number: int) -> Tensor:
        calls.append(number)
        return double.right(number if len(calls) <= 2 else 0)

    rows = beside(keeps_an_answer)
    row = rows["under test"]
    assert row.gate == LATER and row.failed and row.median_ms is None and row.rounds is None
    assert rows["first"].median_ms is not None and rows["last"].median_ms is not None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda right: right.index_fill(0, torch.tensor([1]), float("nan")),
        lambda right: right.index_fill(0, torch.tensor([1]), float("inf")),
        lambda right: right[:4],
        lambda right: right[None],
        lambda right: (right, right),
        lambda right: (),
        lambda right: torch.zeros_like(right),
    ],
    ids=["NaN", "infinity", "shorter", "one more dimension", "two outputs", "no output", "zeros"],
)
def test_what_is_no_answer_fails(spoil: Callable[[Tensor], Any]) -> None:
    double = Doubling()
    assert beside(lambda number: spoil(double.right(number)))["under test"].gate == FAILED


def test_fewer_outputs_than_expected_fail() -> None:
    double = Doubling()
    expected = Expected(lambda number: double.truth(number) * 2, lambda number: double.plain(number) * 2)
    rows = rows_of(double.case({"one": contender(double.right, expected=expected)}))
    assert rows["one"].gate == FAILED


def test_builder_that_raises_costs_its_own_row(capsys: pytest.CaptureFixture[str]) -> None:
    double = Doubling()

    def broken() -> Contender:
        raise RuntimeError("no memory\nfor this")

    rows = rows_of(double.case({"broken": broken, "right": contender(double.right)}))
    assert rows["broken"].gate == NOT_RUN and rows["broken"].problem == "RuntimeError: no memory"
    assert not rows["broken"].failed and rows["right"].median_ms is not None
    assert "Traceback" in capsys.readouterr().err


def test_first_call_that_raises_costs_its_own_row() -> None:
    def divides(number: int) -> Tensor:
        raise ZeroDivisionError

    rows = beside(divides, note="eager")
    assert rows["under test"].gate == NOT_RUN and rows["under test"].problem == "ZeroDivisionError"
    assert rows["under test"].note == "eager" and rows["last"].median_ms is not None


def test_what_cannot_run_here_says_why_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def unavailable() -> Contender:
        raise NotRun("needs a CUDA device")

    rows = rows_of(Doubling().case({"graph": unavailable}))
    assert rows["graph"].gate == NOT_RUN and rows["graph"].problem == "needs a CUDA device"
    assert capsys.readouterr().err == ""


def test_raising_under_the_clock_costs_its_own_row() -> None:
    double, calls = Doubling(), []

    def tires(number: int) -> Tensor:
        calls.append(number)
        if len(calls) > 4:
            raise RuntimeError("tired")
        return double.right(number)

    rows = beside(tires)
    row = rows["under test"]
    assert row.problem == "RuntimeError: tired" and row.median_ms is None
    assert rows["first"].rounds == rows["last"].rounds == 4


def test_raising_in_the_last_judgement_costs_its_own_row() -> None:
    double, seen = Doubling(), []

    def view(result: Tensor, number: int) -> tuple[Tensor, ...]:
        seen.append(number)
        if len(seen) > 2:
            raise torch.OutOfMemoryError("no memory for one more truth")
        return (result,)

    rows = beside(double.right, view=view)
    row = rows["under test"]
    assert row.problem == "OutOfMemoryError: no memory for one more truth" and row.median_ms is None
    assert rows["first"].median_ms is not None and rows["last"].median_ms is not None


def test_truth_is_asked_for_once_for_each_judged_input() -> None:
    double = Doubling(inputs=8)
    rows = rows_of(double.case({f"contender {n}": contender(double.right) for n in range(4)}), rounds=6)
    assert all(row.gate == PASSED for row in rows.values())
    assert double.asked == {0: 1, 7: 1, 5: 1}  # first, last, and the one that the clock saw last


def test_prepare_runs_before_every_call_and_is_not_timed() -> None:
    double = Doubling()
    canvas, prepared, during = torch.zeros(5), [], []

    def prepare(number: int) -> None:
        prepared.append(number)
        canvas.copy_(double.inputs[number])

    def clock(call: Callable[[int], Any], number: int) -> tuple[float, Any]:
        before = len(prepared)
        result = call(number)
        during.append(len(prepared) - before)
        return 1.0, result

    in_place = contender(lambda number: canvas.add_(double.inputs[number]), prepare=prepare)
    rows = compete(double.case({"in place": in_place}), clock, seconds=0)
    assert rows[0].gate == PASSED
    assert during == [0] * 5 and len(prepared) == 2 + 5


def test_view_is_judged_and_not_timed() -> None:
    double, seen = Doubling(), []

    def view(result: list[Tensor], number: int) -> tuple[Tensor, ...]:
        seen.append(number)
        return (result[0],)

    assert beside(lambda number: [double.right(number), None], view=view)["under test"].gate == PASSED
    assert seen == [0, 2, 2]  # gate, gate, and what the clock saw last


def test_contender_may_compute_something_of_its_own() -> None:
    double = Doubling()
    thrice = Expected(lambda n: (3 * double.inputs[n].double(),), lambda n: (3 * double.inputs[n],))
    rows = rows_of(
        double.case(
            {
                "double": contender(double.right),
                "thrice": contender(lambda n: 3 * double.inputs[n], expected=thrice, flops=8e9),
            },
            flops=4e9,
        )
    )
    assert rows["thrice"].gate == PASSED and rows["thrice"].gflops == 8.0 and rows["double"].gflops == 4.0


def test_recompile_limit_is_a_reason_and_no_silent_eager_run() -> None:
    double = Doubling(inputs=2)
    double.inputs[1] = torch.arange(7.0)
    compiled = torch.compile(lambda x: x + x, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = rows_of(double.case({"compiled": contender(lambda number: compiled(double.inputs[number]))}))
    assert rows["compiled"].median_ms is None
    assert "recompile_limit" in str(rows["compiled"].problem) or "RecompileLimit" in str(rows["compiled"].problem)


def test_compiled_code_of_one_case_does_not_count_against_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    double = Doubling()
    compete(double.case({"right": contender(double.right)}), no_time, seconds=0)
    assert resets == [1]


def test_gradients_are_off() -> None:
    enabled = []
    beside(lambda number: enabled.append(torch.is_grad_enabled()))
    assert enabled == [False]


def test_profile_leaves_a_trace(tmp_path: Any) -> None:
    double = Doubling()
    rows_of(double.case({"right one": contender(double.right)}), profile_to=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["double-right-one.trace.json"]


def test_a_measurement_that_fails_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*given: Any) -> dict[str, int]:
        raise torch.OutOfMemoryError("no memory for one more call")

    monkeypatch.setattr(costs, "measure", measure)
    row = beside(Doubling().right)["under test"]
    assert (
        row.gate == PASSED and row.median_ms == 1.0 and row.problem == "OutOfMemoryError: no memory for one more call"
    )


def test_what_is_known_is_kept_before_each_step() -> None:
    double, kept = Doubling(), list[list[tuple[str, str, str | None]]]()

    def keep(rows: Iterable[Row]) -> None:
        kept.append([(row.contender, row.gate, row.problem) for row in rows])

    rows = rows_of(double.case({"A": contender(double.right), "B": contender(double.right)}), keep=keep)
    begun, passed = [(name, NOT_RUN, UNFINISHED) for name in "AB"], [(name, PASSED, UNFINISHED) for name in "AB"]
    assert kept == [[begun[0]], [passed[0], begun[1]], passed]
    assert [row.problem for row in rows.values()] == [None, None]


BREAKS_AT = {"the gate": 1, "the clock": 4, "the last call": 7}  # number of the call


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError])
@pytest.mark.parametrize("when", BREAKS_AT)
def test_who_breaks_the_device_is_named_and_nobody_is_timed(
    when: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device, double, calls = BreakableDevice(monkeypatch), Doubling(), list[int]()
    monkeypatch.setattr(costs, "measure", lambda call, *given: {"peak_bytes": int(call()[0])})

    def poison(number: int) -> Tensor:
        device.answer()
        calls.append(number)
        if len(calls) == BREAKS_AT[when]:
            device.break_down(error)
        return double.right(number)

    case = double.case(
        {"first": device.contender(double), "poison": contender(poison), "last": device.contender(double)}
    )
    rows = rows_of(case)
    assert list(rows) == ["first", "poison", "last"]
    assert rows["poison"].problem == f"{BROKE}{error.__name__}: CUDA error: device-side assert triggered"
    assert rows["poison"].gate == (NOT_RUN if when == "the gate" else PASSED)
    for name in ("first", "last"):
        assert rows[name].problem == f"{LOST}poison" and rows[name].gate == NOT_RUN
    assert not any(row.median_ms or row.failed for row in rows.values())
    assert "device-side assert" in capsys.readouterr().err


def test_a_builder_that_hides_the_error_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    device, double = BreakableDevice(monkeypatch), Doubling()

    def hides() -> Contender:
        try:
            device.break_down()
        except Exception as error:
            raise NotRun("nothing runs") from error
        raise AssertionError

    rows = rows_of(double.case({"hides": hides, "last": device.contender(double)}))
    assert (
        rows["hides"].problem == f"{BROKE}AcceleratorError: CUDA error: device-side assert triggered"
        and rows["last"].problem == f"{LOST}hides"
    )


def test_an_error_that_the_device_survives_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    device, double = BreakableDevice(monkeypatch), Doubling()

    def refused(number: int) -> Tensor:
        raise torch.AcceleratorError("CUDA error: invalid configuration argument")

    rows = rows_of(double.case({"refused": contender(refused), "last": device.contender(double)}))
    assert "invalid configuration" in str(rows["refused"].problem) and rows["last"].median_ms == 1.0
