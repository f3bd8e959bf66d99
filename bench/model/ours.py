"""The contenders that run on step_kernels' model layer, in exact and in static mode."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from step_kernels import SupertokenLayout, embed_patches, upsample_argmax
from step_kernels.model import StepSegmenter, Trace
from step_kernels.model.graph.cuda_graph import GraphPool
from step_kernels.model.packed import TAIL

from ..settings import PATCH_SIZE
from .case import DENSE, EXITS, MERGED, MERGED_EXITS, Case
from .graphs import Graphed, Outputs, Replayed, largest_first
from .recorded import RecordedModel, decide_freely, decision_tensors, own_copy
from .registry import Built, Decide


def merged_exact(case: Case) -> Built:
    return _eager(case, MERGED, static=False)


def exits_exact(case: Case) -> Built:
    return _eager(case, MERGED_EXITS, static=False)


def exits_static_eager(case: Case) -> Built:
    return _eager(case, MERGED_EXITS, static=True)


def merged_static(case: Case) -> Built:
    return static_graph(case, MERGED)


def exits_static(case: Case) -> Built:
    return static_graph(case, MERGED_EXITS)


def unmerged_exits_exact(case: Case) -> Built:
    return _eager(case, EXITS, static=False)


def unmerged_exits_static(case: Case) -> Built:
    return static_graph(case, EXITS)


def dense_static(case: Case) -> Built:
    """Every patch a token, in an untrimmed layout: else the vendor's matmuls would run instead of ours."""
    return static_graph(case, DENSE)


def recorded_model(case: Case, family: str) -> RecordedModel:
    """A model that works as a free run of that family does and repeats recorded decisions."""
    return RecordedModel(case.weights.vit, case.weights.decoder, *case.decided_by(family))


def _eager(case: Case, family: str, *, static: bool) -> Built:
    """Launched op by op; static mode is told the counts, as a capture finds them out at warm-up."""
    model, traces = recorded_model(case, family), case.decisions(family)
    untrimmed = [trace.untrim() for trace in traces]
    counts = [trace.token_counts() if static else None for trace in traces]

    def run(function: Callable[..., Tensor]) -> Callable[[int], Tensor]:
        @torch.no_grad()
        def call(number: int) -> Tensor:
            model.hold(untrimmed[number])
            return function(case.inputs[number], static=static, expected_tokens=counts[number])

        return call

    return Built(
        labels=run(model.segmenter.predict),
        scores=run(model.segmenter),
        variant="eager",
        decide=free_decisions(case, family, static=static),
    )


def free_decisions(case: Case, family: str, *, static: bool) -> Decide | None:
    """How a contender of ours halts when nothing is replayed; merging stays as recorded: random policies decide nothing of use."""
    if family != MERGED_EXITS:
        return None
    weights = case.weights

    def decide(images: Tensor, layout: SupertokenLayout, threshold: float) -> Trace:
        own = Trace(layout).untrim().layout if static else layout
        return decide_freely(weights.vit, weights.decoder, weights.exits, images, own, threshold, static=static)

    return decide


def static_graph(
    case: Case,
    family: str,
    patched: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Built:
    """`StepSegmenter.capture`, recorded on the first input and replayed on all.

    A capture returns labels only; the scores that the gate compares are those of the same code, launched op by op.

    Args:
        patched: makes a context in which the graph is recorded and the scores are computed.
    """
    model, traces = recorded_model(case, family), case.decisions(family)
    decisions = [decision_tensors(trace.untrim()) for trace in traces]
    counts = traces[0].token_counts()
    model.hold(own_copy(traces[0]))
    with patched():
        captured = model.segmenter.capture(case.inputs[0])

    def labels(number: int) -> Tensor:
        model.load(decisions[number])
        return captured.predict(case.inputs[number])

    @torch.no_grad()
    def scores(number: int) -> Tensor:
        model.load(decisions[number])
        with patched():
            return model.segmenter(case.inputs[number], static=True, expected_tokens=counts)

    return Built(
        labels,
        scores,
        variant="CUDA graph",
        compile_seconds=captured.compile_seconds,
        held_bytes=captured.memory_bytes,
        decide=free_decisions(case, family, static=True),
    )


def exact_size_graph(case: Case) -> Built:
    """One graph for each input, at exactly its sizes, which the host knows: exact mode, so the vendor's matmuls.

    The graphs never run at once, so they share their memory, and results are copied out of it (as a capture's `predict` does).
    """
    buffer, pool, graphs = case.inputs[0].clone(), GraphPool(), dict[int, Replayed]()
    traces = case.decisions(MERGED_EXITS)
    for number in largest_first(traces):
        model = recorded_model(case, MERGED_EXITS)
        model.hold(traces[number])
        buffer.copy_(case.inputs[number])
        run = functools.partial(scores_and_labels(model.segmenter), buffer)
        graphs[number] = Replayed(run, case.device, pool=pool)

    def replay(number: int) -> Outputs:
        buffer.copy_(case.inputs[number])
        return graphs[number]()

    return Built(
        labels=lambda number: replay(number)[1].clone(),
        scores=lambda number: replay(number)[0].clone(),
        variant=f"{len(graphs)} CUDA graphs",
        compile_seconds=sum(graph.seconds for graph in graphs.values()),
        held_bytes=buffer.nbytes + sum(graph.memory_bytes for graph in graphs.values()),
        note="one graph for each input, all in one memory pool",
    )


def scores_and_labels(segmenter: StepSegmenter) -> Callable[[Tensor], Outputs]:
    """images -> class scores and labels, in exact mode."""

    @torch.no_grad()
    def run(images: Tensor) -> Outputs:
        scores = segmenter(images)
        return scores, upsample_argmax(scores, (images.shape[2], images.shape[3]))

    return run


def front(case: Case) -> Built:
    """Policy, layout and merge alone: images -> packed tokens. The tokens are those of the recorded layouts."""
    vit, policy = case.weights.vit, case.weights.policy
    embedding = vit.patch_embed.proj

    @torch.no_grad()
    def tokens(images: Tensor, trace: Trace) -> Tensor:
        decided = policy(images, patch_size=PATCH_SIZE, num_prefix=vit.num_prefix)
        if trace.layout.trimmed:
            decided.trim()
        positions, prefix = vit.grid_positions(case.grid), vit.prefix_tokens()
        return embed_patches(
            images, trace.layout, embedding.weight, embedding.bias, pos_embed=positions, prefix=prefix, tail=TAIL
        )

    traces = case.decisions(MERGED)
    if not case.static:

        def run(number: int) -> Tensor:
            return tokens(case.inputs[number], traces[number])

        return Built(labels=run, scores=run, variant="eager")
    held, decisions = own_copy(traces[0]), [decision_tensors(trace.untrim()) for trace in traces]
    held = dataclasses.replace(
        held, layout=dataclasses.replace(held.layout, expected_tokens=traces[0].token_counts()[0])
    )
    graph = Graphed(lambda images: (tokens(images, held),), case.inputs[0])

    def call(number: int) -> Tensor:
        torch._foreach_copy_(decision_tensors(held), decisions[number])
        return graph(case.inputs[number])[0]

    return Built(call, call, "CUDA graph", graph.seconds, graph.memory_bytes)
