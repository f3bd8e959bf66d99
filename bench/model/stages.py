"""What merging and exiting cost by themselves, as parts of the dense model's time: two cases of their own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels import gather_tokens
from step_kernels.model import LinearExit, Trace

from .. import oracle
from ..engine import Case, Contender
from ..gate import Expected, Outputs
from ..options import PATCH_SIZE
from ..ratios import SPEEDUP
from ..segmenters import DENSE, MERGED, MERGED_EXITS, SEED, Segmenters
from .graphs import Graphed

Compute = Callable[[Tensor, Trace], Any]  # an input and its decisions -> what comes out
A_PART = {SPEEDUP: "a part of it"}
TAIL = "undefined"  # as in the model: rows past the live ones are read by nobody


def exit_stage(
    segmenters: Segmenters, dense: Callable[[], Contender], shape: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Case:
    """Packed tokens -> the canvas with the halted ones' log-probabilities, and the survivors."""
    (head,) = segmenters.weights.exits.values()
    exact, traces = copy.deepcopy(head).double(), segmenters.decisions(MERGED_EXITS)
    generator = torch.Generator(segmenters.device).manual_seed(SEED)
    sizes = [(trace.layout.capacity, head.dim) for trace in traces]
    drawn = (torch.randn(size, generator=generator, device=segmenters.device) for size in sizes)
    tokens = [own.to(segmenters.inputs[0].dtype) for own in drawn]

    def compute(own: Tensor, trace: Trace) -> tuple[Tensor, Tensor]:
        (stage,), layout = trace.stages, trace.layout
        canvas = own.new_zeros(layout.batch_size, *layout.grid, head.num_classes).permute(0, 3, 1, 2)
        halting = head.halt(own, layout, canvas=canvas, halted=stage.halted)
        halting = halting.trim() if layout.trimmed else halting
        return canvas, gather_tokens(own, halting, tail=TAIL)

    def expected(head: LinearExit, own: Tensor, number: int) -> Outputs:
        image = segmenters.judged(number)
        trace = traces[number].image(image)
        (stage,), own = trace.stages, own[traces[number].layout.image_rows(image)]
        normed = F.layer_norm(own, (head.dim,), head.norm.weight, head.norm.bias, head.norm.eps)
        values = oracle.log_softmax(F.linear(normed, head.head.weight, head.head.bias))
        values = torch.where(stage.halted[:, None], values, 0)[trace.layout.num_prefix :]
        canvas = oracle.assemble(values[None], oracle.blocks_of_images(trace, 1), trace.layout.grid)
        return canvas, own[~stage.halted]

    def view(result: tuple[Tensor, Tensor], number: int) -> Outputs:
        image, (stage,) = segmenters.judged(number), traces[number].stages
        return result[0][image : image + 1], result[1][stage.layout.image_rows(image)]

    truths = Expected(
        lambda number: expected(exact, tokens[number].double(), number),
        lambda number: expected(head, tokens[number], number),
    )
    rows = traces[0].untrim().layout.capacity
    ours = functools.partial(built, segmenters, compute, tokens, MERGED_EXITS, rows, view)
    contenders: dict[str, Callable[[], Contender]] = {DENSE: dense, "step_kernels": ours}
    return Case("exit stage", shape, len(traces), truths, contenders, fixed=fixed)


def front(
    segmenters: Segmenters, dense: Callable[[], Contender], shape: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Case:
    """Images -> packed tokens of the recorded layouts; the policy decides, and its answer is dropped."""
    weights, traces = segmenters.weights, segmenters.decisions(MERGED)

    def compute(images: Tensor, trace: Trace) -> Tensor:
        decided = weights.policy(images, patch_size=PATCH_SIZE, num_prefix=weights.vit.num_prefix)
        if trace.layout.trimmed:
            decided.trim()
        return weights.vit.packed_embedding(images, trace.layout, "area")

    def expected(dtype: torch.dtype, number: int) -> Outputs:
        image = segmenters.judged(number)
        model, images = segmenters.model(MERGED), segmenters.inputs[number][image : image + 1]
        encoder, trace = copy.deepcopy(model.encoder).to(dtype), traces[number].image(image)
        blocks = oracle.blocks_of_images(trace, 1)
        tokens, keys = oracle.embed(encoder, images.to(dtype), trace.layout.grid, blocks)
        return (tokens[keys],)

    def view(result: Tensor, number: int) -> Outputs:
        return (result[traces[number].layout.image_rows(segmenters.judged(number))],)

    truths = Expected(
        functools.partial(expected, torch.float64), functools.partial(expected, segmenters.inputs[0].dtype)
    )
    ours = functools.partial(built, segmenters, compute, segmenters.inputs, MERGED, segmenters.batch, view)
    contenders: dict[str, Callable[[], Contender]] = {DENSE: dense, "step_kernels": ours}
    return Case("policy + layout + merge", shape, len(traces), truths, contenders, fixed=fixed)


def built(
    segmenters: Segmenters,
    compute: Compute,
    inputs: Sequence[Tensor],
    family: str,
    rows: int,
    view: Callable[[Any, int], Outputs],
) -> Contender:
    """`compute` at exact sizes, op by op; on a GPU in static mode, as one CUDA graph that reads copies of this many rows."""
    traces = segmenters.decisions(family)
    if segmenters.device.type != "cuda":
        return Contender(lambda number: compute(inputs[number], traces[number]), view, True, "op by op", facts=A_PART)
    held, decisions = traces[0].untrim().clone(), [trace.untrim().tensors() for trace in traces]
    expecting = dataclasses.replace(held.layout, expected_tokens=traces[0].layout.capacity)
    buffer = inputs[0].new_full(
        (rows, *inputs[0].shape[1:]), math.nan
    )  # who reads past the live rows gives himself away
    buffer[: inputs[0].shape[0]].copy_(inputs[0])
    graph = Graphed(functools.partial(compute, buffer, dataclasses.replace(held, layout=expecting)), segmenters.device)

    def call(number: int) -> Any:
        torch._foreach_copy_(held.tensors(), decisions[number])
        buffer[: inputs[number].shape[0]].copy_(inputs[number])
        return graph()

    held_bytes = graph.held_bytes + buffer.nbytes
    return Contender(call, view, True, "CUDA graph", facts=A_PART, held_bytes=held_bytes)
