"""Who runs each op: step_kernels on the backend in force; plain PyTorch and that through torch.compile, or named rivals."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, selected_backend

from .examples import Example
from .operation import Attention, Operation, Outputs, Rival, Unavailable

OURS, EAGER, COMPILED = "step_kernels", "PyTorch eager", "PyTorch compiled"
TIGHT = "step_kernels, capacity M"
FORWARD, BACKWARD = "forward", "forward + backward"
# A search for the fastest kernels; without CUDA graphs, because `bench.kernels.clock` leaves the time to launch out anyway.
COMPILE_MODE = {"cuda": "max-autotune-no-cudagraphs", "cpu": "default"}


@dataclass(frozen=True)
class Contender:
    """One implementation of one op.

    Attributes:
        name: `OURS`, `TIGHT`, `EAGER`, `COMPILED`, or a rival's.
        examples: its inputs.
        call: what is timed, on one of them.
        live: what the gate looks at: the call's result without tails; not timed.
        composition: of a PyTorch contender, the function that runs.
        floor: of step_kernels, what ran: "triton" or "reference", or op by op where they differ.
        problem: why it cannot run at all.
        compiled: through torch.compile, under its budget.
    """

    name: str
    examples: Sequence[Example]
    call: Callable[[Example], Any]
    live: Callable[[Any, Example], Outputs]
    composition: str | None = None
    floor: str | None = None
    problem: str | None = None
    compiled: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is step_kernels that runs."""
        return self.name in (OURS, TIGHT)

    def __call__(self, number: int) -> Any:
        return self.call(self.examples[number])


def build_contenders(
    operation: Operation,
    direction: str,
    exact: Sequence[Example],
    device: torch.device,
    plain: Callable[..., Any] | None,
) -> list[Contender]:
    """Ours, eager and compiled, or ours and the rivals, in this order; then ours at capacity M, where that is asked.

    On a GPU, ours gets the static form of the examples.
    """
    on_gpu = device.type == "cuda"
    static = [example.static() for example in exact] if on_gpu else exact
    contenders = [_ours(operation, direction, static, device)]
    if plain is None:
        contenders += [rival_contender(rival, operation, direction, exact) for rival in operation.rivals]
    else:
        options = {"mode": COMPILE_MODE[device.type], "dynamic": False} if operation.autotuned else {}
        compiled = plain_contender(COMPILED, compiled_when_called(plain, **options), operation, direction, exact)
        eager = plain_contender(EAGER, plain, operation, direction, exact)
        contenders += [eager, dataclasses.replace(compiled, compiled=True)]
    if operation.tight:
        tight = [example.static(example.layout.capacity) for example in exact] if on_gpu else exact
        problem = None if on_gpu else "needs a GPU: here, step_kernels gets exactly the live rows anyway"
        contenders.append(_ours(operation, direction, tight, device, name=TIGHT, problem=problem))
    return contenders


def reference_of(operation: Operation, direction: str, exact: Sequence[Example]) -> Contender:
    """The public op, for use under `use_backend("reference")`: in fp64 the truth, in another dtype its yardstick."""
    return Contender("reference", *_calls(operation, direction, exact, operation.ours, operation.live))


def _ours(
    operation: Operation,
    direction: str,
    examples: Sequence[Example],
    device: torch.device,
    *,
    name: str = OURS,
    problem: str | None = None,
) -> Contender:
    calls = _calls(operation, direction, examples, operation.ours, operation.live)
    contender = Contender(name, *calls, problem=problem)
    try:
        return dataclasses.replace(contender, floor=floors(operation, direction, device))
    except RuntimeError as refused:
        return dataclasses.replace(contender, problem=str(refused))


def floors(operation: Operation, direction: str, device: torch.device) -> str:
    """The floor of the registered ops that run; named op by op where they are not on the same one."""
    ops = operation.registered + (operation.registered_backward if direction == BACKWARD else ())
    found = {op: selected_backend(op, device) for op in ops}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{op} {floor}" for op, floor in found.items())


def plain_contender(
    name: str, function: Callable[..., Any], operation: Operation, direction: str, examples: Sequence[Example]
) -> Contender:
    """A PyTorch contender, from a function that takes what `operation.arguments` gives."""

    def call(example: Example) -> Any:
        return function(*operation.arguments(example))

    calls = _calls(operation, direction, examples, call, _as_outputs)
    return Contender(name, *calls, composition=function.__name__)


def rival_contender(rival: Rival, operation: Operation, direction: str, examples: Sequence[Example]) -> Contender:
    """A rival, prepared for every example; its own gradients are those of autograd."""
    attentions: dict[SupertokenLayout, Attention] = {}  # layouts compare by identity

    def call(example: Example) -> Tensor:
        return attentions[example.layout](example["q"], example["k"], example["v"])

    contender = Contender(
        rival.name, *_calls(operation, direction, examples, call, _as_outputs), compiled=rival.compiled
    )
    try:
        for example in examples:
            attentions[example.layout] = rival.prepare(example)
    except Unavailable as reason:
        return dataclasses.replace(contender, problem=str(reason))
    except Exception as error:  # no memory for a mask, say; the other rows are still worth having
        return dataclasses.replace(contender, problem=in_one_line(error))
    return contender


def _as_outputs(result: Any, example: Example) -> Outputs:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def in_one_line(error: Exception) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _calls(
    operation: Operation,
    direction: str,
    examples: Sequence[Example],
    forward: Callable[[Example], Any],
    live: Callable[[Any, Example], Outputs],
) -> tuple[Sequence[Example], Callable[[Example], Any], Callable[[Any, Example], Outputs]]:
    """Inputs, what is timed and what the gate looks at, in one direction or in both."""
    if direction == FORWARD:
        return examples, torch.no_grad()(forward), live

    def both(example: Example) -> tuple[Tensor, tuple[Tensor, ...]]:
        output = forward(example)
        leaves = [example[name] for name in operation.gradients]
        return output.detach(), torch.autograd.grad(output, leaves, example["gradient"])

    def live_both(result: tuple[Tensor, tuple[Tensor, ...]], example: Example) -> Outputs:
        output, gradients = result
        rows = example.layout.num_tokens
        cut = zip(operation.gradients, gradients, strict=True)
        return *live(output, example), *(g[:rows] if name in example.packed else g for name, g in cut)

    return [example.differentiable(operation.gradients) for example in examples], both, live_both


def compiled_when_called(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(function, **options)`, not before the first call: where it cannot even be set up, that is the row's problem."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*arguments, **keywords)

    return call


class OutOfTime(BaseException):
    """Not an Exception: torch.compile must not take it for a reason to fall back."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block after that time; where there is no alarm clock (Windows, other threads), afterwards."""
    started = time.monotonic()
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        if time.monotonic() - started > seconds:
            raise OutOfTime
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    # It rings again: Python drops an exception that happens to be raised inside a destructor.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
