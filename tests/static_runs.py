"""What the tests of static mode share: runs with all they return, decisions of one's own, and tails made NaN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from small_models import enlarge, small_segmenter
from tensors import close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from step_kernels import SupertokenLayout, halt_tokens
from step_kernels.model import PolicyNet, Stage, StepSegmenter, Trace, VariancePolicy

# (head, keep_per_class); one cosine exit writes the scores of confident tokens that stay, one does not
HEADS = [(None, 0), ("linear", 0), ("linear", 1), ("cosine", 0), ("cosine", 1)]
POLICIES = ("none", "variance", "net")

# Which outputs of an op have rows that ``tail="undefined"`` leaves as they are
RAGGED_OUTPUT: dict[str, int | tuple[int, ...]] = {
    "class_attention": 1,
    "class_scores": 0,
    "embed_patches": 0,
    "gather_tokens": 0,
    "merge_tokens": 0,
    "ragged_attention": 0,
    "ragged_layer_norm": 0,
    "ragged_linear": 0,
    "ragged_rope": (0, 1),
    "replace_prefix": 0,
    "rope_table": 0,
}


class UndefinedTails(TorchDispatchMode):
    """Rows past the live count become NaN in every result that was asked for with ``tail="undefined"``.

    The reference leaves zeros there, which many a wrong read would survive. ``poisoned`` counts the ops with such rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.poisoned: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "step_kernels":
            return result
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=True))
        if given.get("fill_tail", True):
            return result
        name = func._schema.name.partition("::")[2]
        outputs = result if isinstance(result, tuple) else (result,)
        cu_seqlens = outputs[1] if name == "replace_prefix" else given["cu_seqlens"]
        places = RAGGED_OUTPUT[name]
        for place in (places,) if isinstance(places, int) else places:
            if cu_seqlens is not None:
                self._poison(name, outputs[place], cu_seqlens)
        return result

    def _poison(self, name: str, rows: Tensor, cu_seqlens: Tensor) -> None:
        """Without a read of the count, so that it serves where a host sync is an error."""
        past = torch.arange(rows.shape[0], device=rows.device) >= cu_seqlens[-1]
        rows.masked_fill_(past.view(-1, *[1] * (rows.ndim - 1)), math.nan)
        if rows.shape[0] > 0:
            self.poisoned[name] = self.poisoned.get(name, 0) + 1


class Run(NamedTuple):
    """What a segmenter computes of images."""

    labels: Tensor
    scores: Tensor
    trace: Trace


@torch.no_grad()
def run(segmenter: StepSegmenter, images: Tensor, replay: Trace | None = None, **named: Any) -> Run:
    """Labels and the decisions behind them, and class scores."""
    labels, trace = segmenter.decide_and_predict(images, replay, **named)
    scores, _ = segmenter.run(images, replay, **named)
    return Run(labels, scores, trace)


def ragged_net(images: Tensor, patch_size: int = 8) -> nn.Module:
    """A network that merges half of the blocks of each side on these (padded) images."""
    net = enlarge(PolicyNet(width=2), std=0.5).to(images.device, images.dtype).eval()
    with torch.no_grad():
        for threshold, scores in zip(net.thresholds, net.scores(images, patch_size=patch_size), strict=False):
            threshold.copy_(scores.median())
    return net


def segmenter_of(
    images: Tensor, head: str | None = "linear", decoder: str = "linear", policy: str = "variance", keep: int = 0
) -> StepSegmenter:
    """A small segmenter in the images' dtype; ``images`` are padded."""
    segmenter = small_segmenter(head, decoder, dtype=images.dtype, keep_per_class=keep)
    policies: dict[str, Callable[[], nn.Module | None]] = {
        "none": lambda: None,
        "variance": lambda: VariancePolicy(0.1),
        "net": lambda: ragged_net(images),
    }
    segmenter.encoder.policy = policies[policy]()
    return segmenter


def decided(layout: SupertokenLayout, decisions: Mapping[int, Callable[[SupertokenLayout], Tensor]]) -> Trace:
    """The trace of a run on ``layout`` in which each exit (by its block) halts what its function says, but no prefix token."""
    trace = Trace(layout)
    for block, choose in decisions.items():
        before = trace.final_layout
        scores = torch.zeros(before.capacity, 1, device=before.device)
        halting = halt_tokens(scores, before, 2.0, halted=choose(before)).trim()
        trace = Trace(layout, (*trace.stages, Stage(block, halting.halted, halting.layout)))
    return trace


def of_image(number: int) -> Callable[[SupertokenLayout], Tensor]:
    """All tokens of one image."""
    return lambda layout: layout.cells[:, 0] == number


def every_other(layout: SupertokenLayout) -> Tensor:
    return torch.arange(layout.capacity, device=layout.device) % 2 == 0


def everybody(layout: SupertokenLayout) -> Tensor:
    return torch.ones(layout.capacity, dtype=torch.bool, device=layout.device)


def nobody(layout: SupertokenLayout) -> Tensor:
    return ~everybody(layout)


def faked(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers have shapes only."""
    copy = deepcopy(module)
    for part in copy.modules():
        for store in (part._parameters, part._buffers):
            store.update({name: mode.from_tensor(x) for name, x in store.items() if x is not None})
    return copy


def faked_trace(trace: Trace, mode: FakeTensorMode) -> Trace:
    def layout(real: SupertokenLayout) -> SupertokenLayout:
        fakes = {name: mode.from_tensor(getattr(real, name)) for name in ("cu_seqlens", "cells")}
        return dataclasses.replace(real, **fakes)

    stages = (dataclasses.replace(s, halted=mode.from_tensor(s.halted), layout=layout(s.layout)) for s in trace.stages)
    return Trace(layout(trace.layout), tuple(stages))


def assert_same_layout(ours: SupertokenLayout, expected: SupertokenLayout) -> None:
    assert torch.equal(ours.cu_seqlens, expected.cu_seqlens) and torch.equal(ours.cells, expected.cells)
    assert (ours.grid, ours.num_prefix, ours.trimmed) == (expected.grid, expected.num_prefix, expected.trimmed)


def assert_same_trace(ours: Trace, expected: Trace) -> None:
    assert_same_layout(ours.layout, expected.layout)
    for mine, stage in zip(ours.stages, expected.stages, strict=True):
        assert mine.block == stage.block and torch.equal(mine.halted, stage.halted)
        assert_same_layout(mine.layout, stage.layout)
        if mine.confidence is not None and stage.confidence is not None:  # not of decisions made by hand
            close(mine.confidence, stage.confidence)
            assert mine.labels is not None and stage.labels is not None and torch.equal(mine.labels, stage.labels)


def same_decisions(ours: Trace, expected: Trace) -> None:
    ours = ours.trim()
    assert torch.equal(ours.layout.cells, expected.layout.cells)
    for mine, stage in zip(ours.stages, expected.stages, strict=True):
        assert torch.equal(mine.halted, stage.halted) and torch.equal(mine.layout.cells, stage.layout.cells)


def assert_same_run(ours: Run, exact: Run) -> None:
    """The same decisions, labels and, to fp64 rounding, scores."""
    assert_same_trace(ours.trace.trim(), exact.trace)
    close(ours.scores, exact.scores)
    assert ours.scores.stride() == exact.scores.stride()
    assert torch.equal(ours.labels, exact.labels)
