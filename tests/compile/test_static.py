"""torch.compile of both modes: one compilation serves every number of tokens. torch.export of both, too."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import (
    CLASSES,
    DECODERS,
    DIM,
    HEADS,
    THRESHOLDS,
    enlarge,
    photographs,
    small_atm_segmenter,
    small_vit,
)
from static_runs import run
from torch import Tensor

from step_kernels.model import StepEncoder, StepSegmenter, Trace, VariancePolicy

PARTS = [("linear", "linear", True), ("cosine", "mask_transformer", None)]  # and torch.compile's dynamic


class Counted:
    """A function compiled, as one graph if nothing else is said; ``compilations`` so far."""

    def __init__(self, function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> None:
        torch.compiler.reset()
        self.compilations, self.backend = 0, backend
        self.run = torch.compile(function, backend=self._backend, **{"fullgraph": True, **options})

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.compilations += 1
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

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


def different(segmenter: StepSegmenter, count: int = 6) -> list[tuple[Tensor, Trace]]:
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
    compiled = Counted(segmenter, dynamic=dynamic)
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


@torch.no_grad()
def test_a_plain_compile_breaks_no_graph() -> None:
    """As a user types it. The second compilation is that of another batch size, the third of other image sizes."""
    segmenter = segmenter_of("linear", "linear").with_policy(VariancePolicy(0.1, sides=(2, 4)))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    live_count = torch.ops.step_kernels_host.live_count.default
    torch.library.opcheck(live_count, (segmenter.trace(images_with(1)).layout.cu_seqlens,), test_utils=checks)
    compiled = Counted(segmenter, "eager", fullgraph=False)
    torch._dynamo.utils.counters.clear()
    for images, _ in different(segmenter, 4):
        torch.testing.assert_close(compiled(images), segmenter(images))
    assert compiled.compilations == 1
    for batch, *size in ((3, 64, 96), (4, 64, 96), (4, 96, 64), (2, 128, 128), (3, 64, 160)):
        images = photographs(batch, *size)
        torch.testing.assert_close(compiled(images), segmenter(images))
        assert compiled.compilations == (2 if size == [64, 96] else 3)
    assert not torch._dynamo.utils.counters["graph_break"]


class Labels(torch.nn.Module):
    def __init__(self, segmenter: StepSegmenter, static: bool) -> None:
        super().__init__()
        self.segmenter, self.static = segmenter, static

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter.predict(images, static=self.static)


@pytest.mark.parametrize("static", [True, False])
@torch.no_grad()
def test_an_exported_program_is_saved_and_read_back(static: bool) -> None:
    segmenter, file = segmenter_of("linear", "linear"), io.BytesIO()
    sizes = {"images": {0: torch.export.Dim("batch", min=2, max=64)}}
    torch.export.save(torch.export.export(Labels(segmenter, static), (images_with(3),), dynamic_shapes=sizes), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for images in (images_with(3), images_with(11), photographs(5, 64, 96)):
        assert torch.equal(program(images), segmenter.predict(images))


def test_atm_compiles_as_one_graph() -> None:
    segmenter, images = small_atm_segmenter(blocks=(1,)), photographs(2, 56, 64)
    expected = run(segmenter, images)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: segmenter.predict(x, static=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), expected.labels)
