"""What merging and exiting cost by themselves, as parts of the dense model's time: two cases of their own."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from step_kernels import gather_tokens
from step_kernels.model import LinearExit, Trace

from .. import oracle
from ..engine import Case, Contender
from ..gate import Expected, Outputs
from ..kernels.inputs import padded
from ..options import PATCH_SIZE
from ..ratios import SPEEDUP
from ..segmenters import DENSE, MERGED, SEED, Segmenters
from .graphs import Graphed

Compute = Callable[[Tensor, Trace], Outputs]  # a canvas and packed tokens, or these alone
Expect = Callable[[Any, Tensor, Trace], Outputs]  # what a module must compute of one image, in its own dtype
Part = tuple[Sequence[Trace], Sequence[Tensor], Compute, Expect, torch.nn.Module]


def exit_stage(own: Segmenters) -> Part:
    """Packed tokens -> the canvas with the halted ones' log-probabilities, and the survivors."""
    (head,), generator = own.weights.exits.values(), torch.Generator(own.device).manual_seed(SEED)
    sizes = [(trace.layout.capacity, head.dim) for trace in own.traces]
    drawn = [torch.randn(size, generator=generator, device=own.device) for size in sizes]
    tokens = [one.to(own.inputs[0].dtype) for one in drawn]

    def compute(x: Tensor, trace: Trace) -> Outputs:
        halting, canvas = head.take(x, trace.layout, None, trace.stages[0].halted)
        halting = halting.trim() if trace.layout.trimmed else halting
        return canvas, gather_tokens(x, halting, tail="undefined")

    def expected(head: LinearExit, x: Tensor, trace: Trace) -> Outputs:
        halted, blocks = trace.stages[0].halted, oracle.blocks_of_images(trace, 1)
        written = torch.where(halted[:, None], oracle.log_softmax(oracle.exit_scores(head, x)), 0)
        return oracle.assemble(written[None, trace.layout.num_prefix :], blocks, trace.layout.grid), x[~halted]

    return own.traces, tokens, compute, expected, head


def front(own: Segmenters) -> Part:
    """Images -> packed tokens of the recorded layouts; the policy decides, and its answer is dropped."""
    encoder, vit = own.model(MERGED).encoder, own.weights.vit

    def compute(images: Tensor, trace: Trace) -> Outputs:
        decided = own.weights.policy(images, patch_size=PATCH_SIZE, num_prefix=vit.num_prefix)
        if trace.layout.trimmed:
            decided.trim()
        return (vit.packed_embedding(images, trace.layout, encoder.resample),)

    def expected(encoder: Any, images: Tensor, trace: Trace) -> Outputs:
        tokens, keys = oracle.embed(encoder, images, trace.layout.grid, oracle.blocks_of_images(trace, 1))
        return (tokens[keys],)

    return own.decisions(MERGED), own.inputs, compute, expected, encoder


PARTS: dict[str, Callable[[Segmenters], Part]] = {"exit stage": exit_stage, "policy + layout + merge": front}


def part(name: str, own: Segmenters, whole: Case) -> Case:
    """Beside the dense model: op by op at exact sizes, on a GPU in static mode, as one CUDA graph that reads copies of its inputs."""
    traces, inputs, compute, expected, module = PARTS[name](own)

    packed = inputs is not own.inputs

    def of_judged(module: torch.nn.Module, number: int) -> Outputs:
        image, dtype = own.judged(number), next(module.parameters()).dtype
        rows = traces[number].layout.image_rows(image) if packed else slice(image, image + 1)
        return expected(module, inputs[number][rows].to(dtype), traces[number].image(image))

    def view(result: Outputs, number: int) -> Outputs:
        image = own.judged(number)
        tokens = result[-1][traces[number].final_layout.image_rows(image)]
        return *(canvas[image : image + 1] for canvas in result[:-1]), tokens

    @torch.no_grad()
    def ours() -> Contender:
        facts = {SPEEDUP: "a part of it"}
        if own.device.type != "cuda":
            return Contender(lambda n: compute(inputs[n], traces[n]), view, True, "op by op", facts=facts)
        held, decisions = traces[0].untrim().clone(), [trace.untrim().tensors() for trace in traces]
        layout = dataclasses.replace(held.layout, expected_tokens=traces[0].layout.capacity)
        buffer = padded(inputs[0], layout.capacity) if packed else inputs[0].clone()
        function = functools.partial(compute, buffer, dataclasses.replace(held, layout=layout))
        graph = Graphed(function, buffer, *held.tensors())
        named: dict[str, Any] = {"facts": facts, "held_bytes": graph.held_bytes + buffer.nbytes}
        return Contender(lambda n: graph(inputs[n], *decisions[n]), view, True, "CUDA graph", **named)

    truths = Expected(*(functools.partial(of_judged, one) for one in (copy.deepcopy(module).double(), module)))
    contenders = {DENSE: whole.contenders[DENSE], "step_kernels": ours}
    return dataclasses.replace(whole, name=name, expected=truths, contenders=contenders)
