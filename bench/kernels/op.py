"""An op of step_kernels beside what PyTorch offers for the same job: cases forward, and forward + backward where it has a gradient.

Necessary bytes, of the ops that move numbers and compute little: each input once as read, each output once as written, live rows only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from step_kernels import selected_backend

from ..engine import Case, Contender, NotRun, as_tuple
from ..gate import Expected, Outputs
from ..options import Options
from .inputs import STATIC, Example, Source

OURS, TIGHT, COPY = "step_kernels", "step_kernels, capacity M", "copy"
BACKWARD, LARGE = ", forward + backward", "large"
Ready = Callable[[Example], Callable[[], Any]]  # from an example to what is timed; what it builds on the way is not


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def everything(e: Example) -> float:
    """Every tensor and the layout; the output is as large as its gradient."""
    return nbytes(*e.tensors.values(), e.layout.cu_seqlens, e.layout.cells)


@dataclass(frozen=True)
class Op:
    """One comparison."""

    name: str  # of its cases
    make: Callable[[Source], Example]  # an exact example
    ours: Ready
    plain: Mapping[str, Callable[..., Any]]  # PyTorch; the first one: truth in fp64, yardstick in the run's dtype
    arguments: Callable[[Example], Sequence[Any]]  # of `plain`
    shape: Callable[[Example], Mapping[str, Any]] = lambda e: {}  # names the rows, beside images and mean live rows
    rivals: Mapping[str, Ready] = field(default_factory=dict)  # further ones, with something to make ready
    compiled: Sequence[str] | None = None  # which of `plain` torch.compile makes a further rival of; None: all
    how: Mapping[str, Any] = field(default_factory=dict)  # it does
    registered: str = ""  # the op that runs, if it is not the one of that name
    view: Callable[[Any, Example], Outputs] = lambda result, e: (result[: e.layout.num_tokens],)  # of `ours`
    gradients: tuple[str, ...] = ()  # tensors that a forward + backward case differentiates
    bytes: Callable[[Example], float] | None = None  # necessary ones, of the forward pass of an op that moves numbers
    flops: Callable[[Example], float] | None = None  # of the forward pass, where they count; backward 2.5 times as many
    tight: bool = False  # on a GPU, ours once more at a capacity of exactly the live rows, which it is not told either
    copy: bool = False  # a copy of as many bytes takes part

    def beyond_any_cache(self) -> Op:
        """The forward pass beside a copy, for inputs so large that a share of the copy's bandwidth says something."""
        return dataclasses.replace(self, name=f"{self.name}, {LARGE}", registered=self.name, gradients=(), copy=True)

    def composed(self, function: Callable[..., Any]) -> Ready:
        return lambda e: functools.partial(function, *self.arguments(e))

    def cases(self, options: Options, sources: Sequence[Source]) -> Iterator[Case]:
        """Each to be run before the next one is asked for, which takes its tensors away."""
        for gradients in ((), self.gradients) if self.gradients else ((),):
            examples = [self.make(source) for source in sources]
            yield case_of(self, options, examples, gradients)
            examples.clear()


def case_of(op: Op, options: Options, examples: Sequence[Example], gradients: Sequence[str]) -> Case:
    static, backward, inputs = options.device.type in STATIC, bool(gradients), len(examples)
    moved = sum(map(op.bytes, examples)) / inputs if op.bytes and not backward else None
    flops = op.flops and sum(map(op.flops, examples)) / inputs * (3.5 if backward else 1.0)

    def ours(*, tight: bool = False) -> Contender:
        if tight and not static:
            raise NotRun("needs a GPU: here, step_kernels gets exactly the live rows anyway")
        own = [e.static(e.layout.capacity if tight else None) for e in examples] if static else examples
        made = contender(op.ours, op.view, own, gradients)
        return dataclasses.replace(
            warmed(made, inputs), ours=True, note=selected_backend(op.registered or op.name, options.device)
        )

    def rival(ready: Ready) -> Contender:
        return warmed(contender(ready, as_tuple, examples, gradients), inputs)

    def compiled_rival(function: Callable[..., Any]) -> Contender:
        return rival(op.composed(compiled(options, function, **op.how)))

    def outputs(e: Example) -> Outputs:
        first = next(iter(op.plain.values()))
        one = contender(op.composed(first), as_tuple, [e], gradients)
        one.prepare(0)
        return one.view(one.call(0), 0)

    found: dict[str, Callable[[], Contender]] = {OURS: ours}
    for name, function in op.plain.items():
        found[name] = functools.partial(rival, op.composed(function))
        if op.compiled is None or name in op.compiled:
            found[name.replace("PyTorch", "PyTorch compiled")] = functools.partial(compiled_rival, function)
    found |= {name: functools.partial(rival, ready) for name, ready in op.rivals.items()}
    found |= {TIGHT: functools.partial(ours, tight=True)} if op.tight else {}
    found |= {COPY: functools.partial(copy, options.device, moved)} if op.copy and moved else {}
    rows = round(sum(e.layout.capacity for e in examples) / inputs)
    return Case(
        op.name + (BACKWARD if backward else ""),
        {"images": examples[0].layout.batch_size, "rows": rows, **op.shape(examples[0])},
        inputs,
        Expected(lambda i: outputs(examples[i].double()), lambda i: outputs(examples[i])),
        found,
        flops=flops,
        bytes=moved,
        fixed=options.fixed,
    )


def contender(
    ready: Ready, view: Callable[[Any, Example], Outputs], examples: Sequence[Example], gradients: Sequence[str]
) -> Contender:
    """One implementation on examples whose leaves and whose canvas are its own."""
    background = examples[0].tensors.get("background")
    canvas = {} if background is None else {"canvas": torch.empty_like(background)}
    own = [e.having({name: e[name].detach().requires_grad_() for name in gradients} | canvas) for e in examples]
    runs = [ready(e) for e in own]

    def prepare(number: int) -> None:
        for painted in canvas.values():
            painted.copy_(own[number]["background"])

    def call(number: int) -> Any:
        if not gradients:
            return runs[number]()
        with torch.enable_grad():
            output = runs[number]()
        return output.detach(), *torch.autograd.grad(output, own[number].of(*gradients), own[number]["gradient"])

    def judged(result: Any, number: int) -> Outputs:
        e = own[number]
        if not gradients:
            return view(result, e)
        found, rows = zip(gradients, result[1:], strict=True), e.layout.num_tokens
        return *view(result[0], e), *(one[:rows] if name in e.packed else one for name, one in found)

    return Contender(call, judged, prepare=prepare)


def warmed(made: Contender, inputs: int) -> Contender:
    """After a call on each input: layouts differ, and what is compiled or loaded for one of them must not be timed."""
    for number in range(inputs):
        made.prepare(number)
        made.call(number)
    return made


def compiled(options: Options, function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    if not options.compile:
        raise NotRun("needs --compile")
    return torch.compile(function, **how)


def copy(device: torch.device, moved: float) -> Contender:
    """What share of a copy's speed an op reaches is read from this row; random numbers, as zeros may travel faster."""
    numbers = torch.randn(int(moved) // 8, device=device)
    written = torch.empty_like(numbers)
    expected = Expected(lambda i: (numbers,), lambda i: (numbers,))
    return Contender(lambda i: written.copy_(numbers), expected=expected, note="half of the bytes read, half written")


def asked(options: Options, name: str) -> bool:
    """On a CPU, what says little where no kernel of ours runs takes part only where it is named."""
    return options.device.type == "cuda" or any(part in name for part in options.only)
