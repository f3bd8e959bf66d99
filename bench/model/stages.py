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

A_PART = {SPEEDUP: "a part of it"}


def exit_stage(segmenters: Segmenters, dense: Callable[[], Contender], shape: Mapping[str, Any]) -> Case:
    """Packed tokens -> the canvas with the halted ones' log-probabilities, and the survivors."""
    ((_, head),) = segmenters.weights.exits.items()
    exact, traces = copy.deepcopy(head).double(), segmenters.decisions(MERGED_EXITS)
    generator = torch.Generator(segmenters.device).manual_seed(SEED)
    sizes = [(trace.layout.capacity, head.dim) for trace in traces]
    drawn = [torch.randn(size, generator=generator, device=segmenters.device) for size in sizes]
    tokens = [own.to(segmenters.inputs[0].dtype) for own in drawn]

    def compute(own: Tensor, trace: Trace) -> tuple[Tensor, Tensor]:
        (stage,), layout = trace.stages, trace.layout
        halting, canvas = head.take(own, layout, None, stage.halted)
        halting = halting.trim() if layout.trimmed else halting
        return canvas, gather_tokens(own, halting, tail="undefined")

    def expected(head: LinearExit, tokens: Sequence[Tensor], number: int) -> Outputs:
        trace, rows = of_image(number)
        (stage,), own = trace.stages, tokens[number][rows].to(head.norm.weight.dtype)
        normed = F.layer_norm(own, (head.dim,), head.norm.weight, head.norm.bias, head.norm.eps)
        values = oracle.log_softmax(F.linear(normed, head.head.weight, head.head.bias))
        written = torch.where(stage.halted[:, None], values, 0)[None, trace.layout.num_prefix :]
        canvas = oracle.assemble(written, oracle.blocks_of_images(trace, 1), trace.layout.grid)
        return canvas, own[~stage.halted]

    def of_image(number: int) -> tuple[Trace, slice]:
        image = segmenters.judged(number)
        return traces[number].image(image), traces[number].layout.image_rows(image)

    def view(result: tuple[Tensor, Tensor], number: int) -> Outputs:
        image = segmenters.judged(number)
        return result[0][image : image + 1], result[1][traces[number].final_layout.image_rows(image)]

    truths = Expected(*(functools.partial(expected, own, tokens) for own in (exact, head)))
    full = segmenters.batch * traces[0].layout.max_seqlen
    ours = functools.partial(built, compute, tokens, traces, full, view)
    return Case("exit stage", shape, len(traces), truths, {DENSE: dense, "step_kernels": ours})


def front(segmenters: Segmenters, dense: Callable[[], Contender], shape: Mapping[str, Any]) -> Case:
    """Images -> packed tokens of the recorded layouts; the policy decides, and its answer is dropped."""
    traces, encoder = segmenters.decisions(MERGED), segmenters.model(MERGED).encoder
    exact, inputs, vit = copy.deepcopy(encoder).double(), segmenters.inputs, segmenters.weights.vit

    def compute(images: Tensor, trace: Trace) -> Tensor:
        decided = segmenters.weights.policy(images, patch_size=PATCH_SIZE, num_prefix=vit.num_prefix)
        if trace.layout.trimmed:
            decided.trim()
        return vit.packed_embedding(images, trace.layout, encoder.resample)

    @torch.no_grad()
    def expected(encoder: Any, number: int) -> Outputs:
        image = segmenters.judged(number)
        images = inputs[number][image : image + 1].to(encoder.vit.cls_token.dtype)
        blocks = oracle.blocks_of_images(traces[number].image(image), 1)
        tokens, keys = oracle.embed(encoder, images, traces[number].layout.grid, blocks)
        return (tokens[keys],)

    def view(result: Tensor, number: int) -> Outputs:
        return (result[traces[number].layout.image_rows(segmenters.judged(number))],)

    truths = Expected(*(functools.partial(expected, own) for own in (exact, encoder)))
    ours = functools.partial(built, compute, inputs, traces, segmenters.batch, view)
    return Case("policy + layout + merge", shape, len(traces), truths, {DENSE: dense, "step_kernels": ours})


@torch.no_grad()
def built(
    compute: Callable[[Tensor, Trace], Any],
    inputs: Sequence[Tensor],
    traces: Sequence[Trace],
    rows: int,
    view: Callable[[Any, int], Outputs],
) -> Contender:
    """`compute` at exact sizes, op by op; on a GPU in static mode, as one CUDA graph that reads copies of this many rows."""
    if inputs[0].device.type != "cuda":
        return Contender(lambda number: compute(inputs[number], traces[number]), view, True, "op by op", facts=A_PART)
    held, decisions = traces[0].untrim().clone(), [trace.untrim().tensors() for trace in traces]
    expecting = dataclasses.replace(held.layout, expected_tokens=traces[0].layout.capacity)
    buffer = inputs[0].new_full(
        (rows, *inputs[0].shape[1:]), math.nan
    )  # who reads past the live rows gives himself away
    buffer[: inputs[0].shape[0]].copy_(inputs[0])
    graph = Graphed(functools.partial(compute, buffer, dataclasses.replace(held, layout=expecting)), buffer.device)

    def call(number: int) -> Any:
        torch._foreach_copy_(held.tensors(), decisions[number])
        buffer[: inputs[number].shape[0]].copy_(inputs[number])
        return graph()

    return Contender(call, view, True, "CUDA graph", facts=A_PART, held_bytes=graph.held_bytes + buffer.nbytes)
