"""torch.compile(fullgraph=True) of the model layer: the host code traces, the ops stay whole."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling import SAMPLE
from small_models import CLASSES, DECODERS, DIM, enlarge, photographs, ragged_tokens, small_vit
from tensors import with_tail
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import (
    AtmDecoder,
    AtmExit,
    CosineExit,
    Decoder,
    ExitHead,
    LinearDecoder,
    LinearExit,
    MaskTransformerDecoder,
    PolicyNet,
    QuotaPolicy,
    StepEncoder,
    StepSegmenter,
    VariancePolicy,
)


def compiled(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, backend="aot_eager")


def policy_cells(policy: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: policy(images, patch_size=8, num_prefix=1).cells


def merged_replay(images: Tensor) -> Callable[[Tensor], Tensor]:
    encoder = StepEncoder(small_vit(depth=2), VariancePolicy(0.1))
    trace = encoder(images).trace
    return lambda images: encoder(images, replay=trace).tokens


def with_exit(head: ExitHead, decoder: Decoder) -> StepSegmenter:
    """One block and one exit behind it, which some tokens leave."""
    segmenter = StepSegmenter(StepEncoder(small_vit(depth=1), VariancePolicy(0.1), {1: head}), decoder)
    for part in (segmenter.encoder.exits, segmenter.decoder):
        enlarge(part)
    for part in (head, decoder):
        if isinstance(part, (AtmExit, AtmDecoder)):
            part.head.class_embed.bias.data = torch.tensor([3.0, 0.0])
    return segmenter


WITH_EXITS: dict[str, Callable[[], StepSegmenter]] = {
    "linear": lambda: with_exit(LinearExit(DIM, CLASSES, 0.6), LinearDecoder(DIM, CLASSES)),
    "mask transformer": lambda: with_exit(
        CosineExit(DIM, CLASSES, 0.35), MaskTransformerDecoder(DIM, CLASSES, 1, num_heads=3)
    ),
    "ATM": lambda: with_exit(
        AtmExit(DIM, CLASSES, 0.5, 1, depth=1, num_heads=3), AtmDecoder(DIM, CLASSES, depth=1, num_heads=3)
    ),
}

CASES: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "vit": lambda images: small_vit(depth=2),
    "variance policy": lambda images: policy_cells(VariancePolicy(0.1)),
    "quota policy": lambda images: policy_cells(QuotaPolicy(VariancePolicy(0.1), 5)),
    "policy net": lambda images: policy_cells(PolicyNet(width=2).eval()),
    "replayed merged encoder": merged_replay,
    **{
        f"segmenter, {name}": lambda images, kind=kind: StepSegmenter(
            StepEncoder(small_vit(depth=2)), kind(DIM, CLASSES)
        )
        for name, kind in DECODERS.items()
    },
}


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_a_graph_break(name: str) -> None:
    images = photographs(2, 64, 96)
    run = CASES[name](images)
    with torch.no_grad():
        torch.testing.assert_close(compiled(run)(images), run(images))  # tracing may decompose an op: fp32 rounding


@pytest.mark.parametrize(("decoder", "batches"), [("linear", (2, 4, 3)), ("mask transformer", (2, 2, 2))])
def test_training_compiles_as_one_graph(decoder: str, batches: tuple[int, ...]) -> None:
    """Policy, exit and decoder; other token counts with each batch; of one, other batches too. Gradients are eager mode's."""
    segmenter, compilations = WITH_EXITS[decoder](), 0
    torch.compiler.reset()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    one_graph = torch.compile(segmenter.train(), fullgraph=True, backend=backend)
    counts = set()
    for seed, batch in enumerate(batches, 1):
        images, results = photographs(batch, 48, 64, seed=seed), []
        counts.add(segmenter.trace(images).token_counts())
        for run in (segmenter, one_graph):
            segmenter.zero_grad()
            scores = run(images)
            scores.square().mean().backward()
            results.append((scores.detach(), [parameter.grad for parameter in segmenter.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert compilations == (1 if len(set(batches)) == 1 else 2) and len(counts) == 3


@pytest.mark.parametrize(("decoder", "strict"), [("linear", True), ("mask transformer", False), ("ATM", False)])
@torch.no_grad()
def test_exported_with_any_batch(decoder: str, strict: bool) -> None:
    segmenter = WITH_EXITS[decoder]()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(segmenter, (photographs(2, 48, 64),), dynamic_shapes=({0: batch},), strict=strict)
    assert "live_count" not in program.graph_module.code, "AOTInductor knows no op that returns a number"
    for size, seed in ((2, 1), (5, 2)):
        images = photographs(size, 48, 64, seed=seed)
        torch.testing.assert_close(program.module()(images), segmenter(images))


@pytest.mark.skipif(SAMPLE != "1", reason="half a minute: when the folder runs whole")
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch's own code
@torch.no_grad()
def test_aotinductor_serves_other_token_counts(tmp_path: Path) -> None:
    segmenter, counts = WITH_EXITS["ATM"](), set()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(segmenter, (photographs(2, 48, 64),), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "segmenter.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for size, seed in ((2, 1), (5, 2), (2, 7)):
        images = photographs(size, 48, 64, seed=seed)
        counts.add(segmenter.trace(images).token_counts())
        torch.testing.assert_close(run(images), segmenter(images))
    assert len(counts) == 3


def test_the_tracer_is_refused() -> None:
    """It would bake the first images' token counts in."""
    with pytest.raises(RuntimeError, match=r"tracing: .* use torch\.export"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        torch.jit.trace(WITH_EXITS["linear"](), (photographs(1, 48, 64),))


@pytest.mark.parametrize("kind", DECODERS)
def test_an_untrimmed_layout_compiles_without_a_graph_break(kind: str) -> None:
    decoder, (tokens, layout) = enlarge(DECODERS[kind](DIM, CLASSES)).double(), ragged_tokens()
    layout = SupertokenLayout.from_sides(layout.sides(), num_prefix=1)
    tokens, grid = with_tail(tokens, layout.capacity), layout.grid

    def run(tokens: Tensor, cu_seqlens: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        scores, own = decoder(tokens, SupertokenLayout(cu_seqlens, cells, grid, num_prefix=1))
        return scores, own.cu_seqlens

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        results = [call(tokens, layout.cu_seqlens, layout.cells) for call in (compiled, run)]
    live = int(results[1][1][-1])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours[:live], theirs[:live])
