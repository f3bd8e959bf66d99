"""The dense baseline of `bench model`: which forms are compiled, in which order, and what its row and the bars say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bench_model_cases import contender, eager_graphs, model_row, nano_case, nano_preset

from bench.compiling import MOST_VARIANTS, CompileBudget
from bench.model import dense, graphs
from bench.model.bars import bars
from bench.model.registry import DENSE, MERGED_STATIC, UNSEARCHED, Built

NO_TIME = "not compiled in what was left of --compile-minutes 2"


@pytest.fixture(autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


class Budget:
    """Answers in the order given; what it was asked is kept."""

    def __init__(self, *answers: str | None) -> None:
        self.answers, self.asked, self.spent = list(answers), list[bool](), 0.0

    def spend(self, call: Callable[[], object], *, baseline: bool = False) -> str | None:
        self.asked.append(baseline)
        self.spent += 10.0
        call()
        return self.answers.pop(0)


def built(monkeypatch: pytest.MonkeyPatch, budget: Budget, fastest: Callable[[dict[str, Any]], str]) -> Built:
    """Of a GPU's two forms, without a compiler."""
    monkeypatch.setattr(dense, "COMPILE_MODES", {"cpu": dense.COMPILE_MODES["cuda"]})
    monkeypatch.setattr(dense, "compiled_when_called", lambda function, **options: function)
    monkeypatch.setattr(dense, "fastest", lambda runs, device: fastest(runs))
    case = nano_case()
    monkeypatch.setattr(case, "compiling", budget)
    with eager_graphs():
        return contender(DENSE).build(case)


def test_the_quick_form_comes_first_and_the_search_gets_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, raced = Budget(None, None), list[str]()
    found = built(monkeypatch, budget, lambda runs: raced.extend(runs) or "max-autotune, CUDA graph")  # type: ignore[func-returns-value]
    assert budget.asked == [True, False]  # the second one leaves what other baselines need
    assert raced == ["compiled", "max-autotune", "compiled, CUDA graph", "max-autotune, CUDA graph"]
    assert (found.variant, found.note, found.compile_seconds) == ("max-autotune, CUDA graph", None, 20.0)
    assert found.held_bytes > 0


def test_without_time_to_search_it_still_is_a_baseline_and_the_bars_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = built(monkeypatch, Budget(None, NO_TIME), lambda runs: "compiled, CUDA graph")
    assert found.variant == f"compiled, CUDA graph, {UNSEARCHED} ({NO_TIME})" and found.note is None
    times = {DENSE: 30.0, MERGED_STATIC: 10.0}
    shown = {}
    for variant in (found.variant, "max-autotune, CUDA graph"):
        rows = [model_row(name, ms, batch=8) for name, ms in times.items()]
        rows[0] = model_row(DENSE, times[DENSE], batch=8, variant=variant, compile_seconds=found.compile_seconds)
        (bar,) = (bar for bar in bars(rows) if bar.number == "P1" and bar.value is not None)
        shown[variant] = bar.what
        assert bar.value == 3.0
    assert list(shown.values()) == [
        "ViT-L, merged vs dense, B=8 (dense without max-autotune)",
        "ViT-L, merged vs dense, B=8",
    ]


def test_nothing_compiled_is_eager_and_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(NO_TIME)
    found = built(monkeypatch, budget, lambda runs: "eager")
    assert budget.asked == [True]  # no search where the quick form has found no time
    assert (found.variant, found.note, found.compile_seconds) == ("eager", NO_TIME, None)


@pytest.mark.parametrize("failing", [1, 2])
def test_one_graph_is_enough(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    made: list[int] = []

    class Graphed(graphs.Graphed):
        def __init__(self, *arguments: Any) -> None:
            made.append(1)
            if len(made) <= failing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().__init__(*arguments)

    monkeypatch.setattr(dense, "Graphed", Graphed)
    found = built(monkeypatch, Budget(None, None), lambda runs: list(runs)[-1])
    if failing == 1:
        assert (found.variant, found.note) == ("max-autotune, CUDA graph", None)
    else:
        expected = "no CUDA graph: OutOfMemoryError: CUDA out of memory."
        assert (found.variant, found.note) == ("max-autotune", f"{expected}; {expected}")


def test_many_batch_sizes_and_modes_compile_all_the_same() -> None:
    """PyTorch's own limit is eight for one function; then it would run eagerly and a warning would be all."""
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    budget = CompileBudget(5.0, torch.device("cpu"))
    assert MOST_VARIANTS > 3 * 2 * 3
    try:
        for size in range(2, 14):
            assert budget.spend(lambda size=size: compiled(torch.ones(size))) is None  # type: ignore[misc]
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in range(2, 14):
                compiled(torch.ones(size))
    finally:
        torch.compiler.reset()
