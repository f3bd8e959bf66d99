"""torch.compile(fullgraph=True) of both modes: one compilation serves every number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CLASSES, DECODERS, DIM, HEADS, THRESHOLDS, enlarge, photographs, small_vit
from torch import Tensor

from step_kernels.model import StepEncoder, StepSegmenter, Trace, VariancePolicy

PARTS = [("linear", "linear", True), ("cosine", "mask_transformer", None)]  # and torch.compile's dynamic


class Counted:
    """A function compiled as one graph; ``compilations`` so far."""

    def __init__(self, function: Callable[..., Any], dynamic: bool | None = None) -> None:
        torch.compiler.reset()
        self.compilations = 0
        self.run = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=self._backend)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


def segmenter_of(head: str, decoder: str) -> StepSegmenter:
    """Two blocks, an exit between them."""
    exits = {1: HEADS[head](DIM, CLASSES, THRESHOLDS[head])}
    encoder = StepEncoder(small_vit(depth=2), VariancePolicy(0.1), exits)
    segmenter = StepSegmenter(encoder, DECODERS[decoder](DIM, CLASSES))
    enlarge(segmenter.encoder.exits)
    enlarge(segmenter.decoder)
    return segmenter.eval()


def images_with(flat: int) -> Tensor:
    """Two images, 4 x 6 blocks of 2 x 2 patches: so many of the first one's are flat, so that the policy merges them."""
    images = photographs(2, 64, 96, seed=flat)
    images[0] = torch.randn(3, 64, 96)
    blocks = images[0].view(3, 4, 16, 6, 16).permute(1, 3, 0, 2, 4)  # [4, 6, C, 16, 16]
    blocks[torch.arange(24).view(4, 6) < flat] *= 0.01
    return images


def different(segmenter: StepSegmenter, count: int = 20) -> list[tuple[Tensor, Trace]]:
    """Images, and their traces, no two of which agree in the tokens that leave the merge."""
    found = [(images, segmenter.trace(images)) for images in (images_with(flat) for flat in range(count))]
    assert len({trace.token_counts()[0] for _, trace in found}) == count
    assert all(0 < trace.token_counts()[1] < trace.token_counts()[0] for _, trace in found)
    return found


@torch.no_grad()
def test_static_mode_compiles_once() -> None:
    """Policy, exits and labels inside; shapes do not depend on the images."""
    segmenter = segmenter_of("cosine", "mask_transformer")
    compiled = Counted(lambda images: segmenter.predict(images, static=True))
    for images, _ in different(segmenter, 4):
        assert torch.equal(compiled(images), segmenter.predict(images, static=True))
    assert compiled.compilations == 1


@torch.no_grad()
def test_static_mode_compiles_once_for_all_replays() -> None:
    segmenter = segmenter_of("linear", "linear")
    compiled = Counted(lambda images, trace: segmenter(images, replay=trace, static=True))
    for images, trace in different(segmenter, 4):
        torch.testing.assert_close(compiled(images, trace.untrim()), segmenter(images))
    assert compiled.compilations == 1


@pytest.mark.parametrize(("head", "decoder", "dynamic"), PARTS)
@torch.no_grad()
def test_exact_mode_compiles_once(head: str, decoder: str, dynamic: bool | None) -> None:
    """Its token counts, read on the way, are symbols of the graph."""
    segmenter = segmenter_of(head, decoder)
    compiled = Counted(segmenter, dynamic)
    seen = set()
    for images, _ in different(segmenter):
        torch.testing.assert_close(compiled(images), segmenter(images))
        seen.add(compiled.compilations)
    # With dynamic=True, PyTorch starts its first compilation over.
    assert len(seen) == 1 and seen <= ({1, 2} if dynamic else {1})


@torch.no_grad()
def test_exact_mode_compiles_once_for_all_replays() -> None:
    """Of traces whose lengths are marked as dynamic; without the marks the second length compiles once more."""
    segmenter = segmenter_of("linear", "linear")
    compiled = Counted(lambda images, trace: segmenter(images, replay=trace))
    for images, trace in different(segmenter):
        for tensor in (trace.layout.cells, *(x for stage in trace.stages for x in (stage.halted, stage.layout.cells))):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(images, trace), segmenter(images))
    assert compiled.compilations == 1
