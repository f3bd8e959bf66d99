"""A case of bench that costs nothing: twice the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.engine import Case, Contender
from bench.gate import Expected, Outputs

Build = Callable[[], Contender]
NANO = {"embed_dim": 48, "depth": 3, "num_heads": 3}  # for ViT.preset, where a model's size proves nothing more


class Doubling:
    """Inputs, and what must come out of them.

    Attributes:
        inputs: float32 [5] each, no two alike.
        asked: how often the truth of an input was asked for.
    """

    def __init__(self, inputs: int = 3) -> None:
        self.inputs = [torch.arange(5.0) + 10 * number for number in range(inputs)]
        self.asked: Counter[int] = Counter()

    def truth(self, number: int) -> Outputs:
        self.asked[number] += 1
        return (2 * self.inputs[number].double(),)

    def plain(self, number: int) -> Outputs:
        return (2 * self.inputs[number],)

    def right(self, number: int) -> Tensor:
        return self.inputs[number] + self.inputs[number]

    def case(self, contenders: dict[str, Build], **changes: Any) -> Case:
        values = {"shape": {"elements": 5}, "fixed": {"device": "cpu", "dtype": "float32"}, **changes}
        return Case(
            "double",
            inputs=len(self.inputs),
            expected=Expected(self.truth, self.plain),
            contenders=contenders,
            **values,
        )


def contender(call: Callable[[int], Any], **values: Any) -> Build:
    return lambda: Contender(call, **values)


def no_time(call: Callable[[int], Any], number: int) -> tuple[float, Any]:
    """A clock that says one millisecond."""
    return 1.0, call(number)


class BreakableDevice:
    """Of PyTorch's view of a GPU what bench asks it: after an error that a CUDA context does not survive, every call raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.answer())

    def answer(self) -> None:
        if self.error is not None:
            raise self.error

    def break_down(self, error: type[Exception] = torch.AcceleratorError) -> None:
        self.error = error("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later")
        raise self.error

    def contender(self, double: Doubling, **values: Any) -> Build:
        """A right one, on this device."""

        def call(number: int) -> Tensor:
            self.answer()
            return double.right(number)

        return contender(call, **values)

    def poison(self, double: Doubling) -> Build:
        """One that breaks the device when it is timed."""

        def build() -> Contender:
            calls: list[int] = []

            def call(number: int) -> Tensor:
                self.answer()
                calls.append(number)
                if len(calls) > 3:
                    self.break_down()
                return double.right(number)

            return Contender(call)

        return build

    def cases(self, *poisons: str) -> Iterator[Case]:
        """Three, of which the second holds contenders that break the device."""
        double = Doubling()
        sound = {"plain": self.contender(double), "ours": self.contender(double, ours=True)}
        yield double.case(sound, shape={"elements": 1})
        yield double.case(sound | dict.fromkeys(poisons, self.poison(double)))
        yield double.case(sound, shape={"elements": 2})
