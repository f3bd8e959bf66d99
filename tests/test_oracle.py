"""The benchmarks' oracle is right, and StepSegmenter equals it at replayed decisions."""

from __future__ import annotations

import dataclasses
import itertools

import brute_force
import pytest
import torch
import torch.nn.functional as F
from layouts import PlainLayout, build, read, tile
from small_models import CLASSES, DECODERS, DIM, enlarge, photographs, small_segmenter, small_vit
from torch import Tensor, nn

import step_kernels as sk
from bench import oracle
from step_kernels.model import (
    LinearDecoder,
    LinearExit,
    PolicyNet,
    QuotaPolicy,
    Stage,
    StepEncoder,
    StepSegmenter,
    Trace,
    VariancePolicy,
)

# fp64: some 100 matmuls and norms deep, a few hundred roundings of 1e-16 each, amplified by the redrawn weights.
EXACT = 1e-10


def largest_difference(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape and truth.isfinite().all()
    return float((result.detach().double() - truth.detach().double()).abs().max())


# The oracle against still plainer code


@pytest.mark.parametrize("height, width", [(64, 64), (40, 72), (37, 61), (8, 8)])
def test_without_decisions_it_is_the_dense_vit(height: int, width: int) -> None:
    vit = small_vit(dtype=torch.float64)
    decoder = enlarge(LinearDecoder(DIM, CLASSES)).double()
    images = photographs(2, height, width, dtype=torch.float64)
    grid = (-(-height // 8), -(-width // 8))
    trace = Trace(sk.SupertokenLayout.uniform(2, grid, num_prefix=1))
    logits = F.linear(vit(images)[:, 1:], decoder.head.weight, decoder.head.bias)
    expected = logits.transpose(1, 2).unflatten(2, grid)
    result = oracle.segment(StepSegmenter(StepEncoder(vit), decoder), images, trace)
    assert largest_difference(result, expected) < EXACT


def naive_block(block: nn.Module, x: Tensor) -> Tensor:
    """One image's tokens [L, D], with an explicit softmax."""
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(0, 1).flatten(1))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def naive_scores(head: nn.Module, x: Tensor) -> Tensor:
    if isinstance(head, LinearExit):
        return head.head(head.norm(x))
    return head.scale * F.cosine_similarity(head.norm(x)[:, None], head.classes[None], dim=2)


def naive_decode(decoder: nn.Module, patches: Tensor) -> Tensor:
    if isinstance(decoder, LinearDecoder):
        return decoder.head(patches)
    x = torch.cat([decoder.cls_emb[0], decoder.proj_dec(patches)])
    for block in decoder.blocks:
        x = naive_block(block, x)
    x = decoder.decoder_norm(x)
    classes, patches = (x[:CLASSES] @ decoder.proj_classes, x[CLASSES:] @ decoder.proj_patch)
    return decoder.mask_norm(F.normalize(patches, dim=1) @ F.normalize(classes, dim=1).T)


@torch.no_grad()
def naive_segment(
    segmenter: StepSegmenter, image: Tensor, blocks: list, decisions: list[list[bool]]
) -> tuple[Tensor, list[Tensor]]:
    """One image; a halted token is physically dropped. The canvas, and each exit's scores."""
    vit = segmenter.encoder.vit
    canvas = torch.zeros(CLASSES, *vit.config.grid, dtype=image.dtype)
    positions = vit.pos_embed[0, 1:].T.unflatten(1, vit.config.grid)
    rows = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
    for row, column, side in blocks:
        pixels = image[:, row * 8 : (row + side) * 8, column * 8 : (column + side) * 8]
        small = pixels.unflatten(2, (8, side)).unflatten(1, (8, side)).mean(dim=(2, 4))
        position = positions[:, row : row + side, column : column + side].mean(dim=(1, 2))
        rows.append(vit.patch_embed.proj(small[None]).flatten() + position)
    x, alive, decided, exit_scores = torch.stack(rows), list(blocks), iter(decisions), []

    def write(block: tuple[int, int, int], values: Tensor) -> None:
        row, column, side = block
        canvas[:, row : row + side, column : column + side] = values[:, None, None]

    for number, block in enumerate(vit.blocks, start=1):
        x = naive_block(block, x)
        if str(number) not in segmenter.encoder.exits:
            continue
        head, gone = segmenter.encoder.exits[str(number)], next(decided)
        assert not gone[0]
        exit_scores.append(naive_scores(head, x))
        for index, halted in enumerate(gone):
            if halted:
                write(alive[index - 1], exit_scores[-1][index].log_softmax(0))
        keep = [index for index, halted in enumerate(gone) if not halted]
        alive, x = [alive[index - 1] for index in keep[1:]], x[keep]
    scores = naive_decode(segmenter.decoder, vit.norm(x)[1:])
    for block, values in zip(alive, scores, strict=True):
        write(block, values.log_softmax(0) if decisions else values)
    return canvas, exit_scores


def decisions_of(trace: Trace, image: int) -> list[list[bool]]:
    """Who of one image's tokens halts at each exit."""
    decisions, previous = [], trace.layout
    for stage in trace.stages:
        rows = slice(int(previous.cu_seqlens[image]), int(previous.cu_seqlens[image + 1]))
        decisions.append(stage.halted[rows].tolist())
        previous = stage.layout
    return decisions


def mixed_layout(batch_size: int) -> PlainLayout:
    """An 8 x 8 grid, tiled differently for each image, sides up to 8."""
    tiles = [
        tile((8, 8), lambda row, column, side: (row + column) % 3 == 0 and side < 8),
        tile((8, 8), lambda row, column, side: side == 8),
        tile((8, 8), lambda row, column, side: False),
    ]
    return PlainLayout(tuple(tiles[index % 3] for index in range(batch_size)), (8, 8), 1)


def make_trace(segmenter: StepSegmenter, layout: PlainLayout, halt) -> Trace:
    """Decisions given by ``halt(stage, image, index)`` for each patch token still alive."""
    stages, current = [], layout
    for number, block in enumerate(map(int, segmenter.encoder.exits)):
        dropped: list[bool] = []
        for image, blocks in enumerate(current.images):
            dropped += [False] * current.num_prefix + [halt(number, image, index) for index in range(len(blocks))]
        current = current.without(dropped)
        stages.append(Stage(block, torch.tensor(dropped), build(current)))
    return Trace(build(layout), tuple(stages))


HALTS = {
    "none": lambda stage, image, index: False,
    "some": lambda stage, image, index: (index + stage + image) % 3 == 0,
    "all_at_once": lambda stage, image, index: True,
    "one_image_emptied": lambda stage, image, index: image == 0 or index % 4 == stage,
    "emptied_at_the_second": lambda stage, image, index: stage == 1,
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", ("linear", "cosine"))
@pytest.mark.parametrize("halt", HALTS)
def test_masking_equals_dropping(halt: str, head: str, decoder: str) -> None:
    segmenter = small_segmenter(head, decoder, dtype=torch.float64)
    layout = mixed_layout(3)
    trace = make_trace(segmenter, layout, HALTS[halt])
    images = photographs(3, 64, 64, dtype=torch.float64)
    result = oracle.segment(segmenter, images, trace)
    for image, blocks in enumerate(layout.images):
        expected, _ = naive_segment(segmenter, images[image], list(blocks), decisions_of(trace, image))
        assert largest_difference(result[image], expected) < EXACT


def test_what_is_masked_does_not_matter() -> None:
    """Batch mates and halted tokens: an image alone gives the same."""
    segmenter = small_segmenter("linear", "mask_transformer", dtype=torch.float64)
    images = photographs(3, 64, 64, dtype=torch.float64)
    whole = oracle.segment(segmenter, images, make_trace(segmenter, mixed_layout(3), HALTS["some"]))
    alone = make_trace(segmenter, mixed_layout(1), HALTS["some"])
    assert largest_difference(oracle.segment(segmenter, images[:1], alone), whole[:1]) < EXACT


def test_a_contradictory_trace_is_refused() -> None:
    segmenter = small_segmenter(dtype=torch.float64)
    images = photographs(2, 64, 64, dtype=torch.float64)
    trace = make_trace(segmenter, mixed_layout(2), HALTS["some"])
    with pytest.raises(ValueError, match="after blocks"):
        oracle.segment(segmenter, images, dataclasses.replace(trace, stages=trace.stages[:1]))
    wrong = dataclasses.replace(trace.stages[0], halted=torch.zeros_like(trace.stages[0].halted))
    with pytest.raises(ValueError, match="after block 1"):
        oracle.segment(segmenter, images, dataclasses.replace(trace, stages=(wrong, trace.stages[1])))
    with pytest.raises(ValueError, match="grid"):
        oracle.segment(segmenter, images[:, :, :56], trace)


# StepSegmenter against the oracle


def policies() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    scorer = PolicyNet(sides=(2,))
    return {
        "variance": VariancePolicy(0.1),
        "quota": QuotaPolicy(scorer, count=5),
        "network": PolicyNet(sides=(2, 4, 8), thresholds=0.5),
    }


POLICIES = ("variance", "quota", "network")


@pytest.mark.parametrize(
    ("policy", "head", "decoder", "size"),
    [
        *itertools.product(POLICIES, ("linear", "cosine", None), DECODERS, [(45, 70)]),
        *itertools.product(POLICIES, ("linear",), ("mask_transformer",), [(64, 64), (48, 80)]),
    ],
)
def test_own_decisions(policy: str, head: str | None, decoder: str, size: tuple[int, int]) -> None:
    segmenter = small_segmenter(head, decoder, dtype=torch.float64, policy=policies()[policy], keep_per_class=1)
    images = photographs(3, *size, dtype=torch.float64)
    with torch.no_grad():
        trace = segmenter.trace(images)
        result = segmenter(images, replay=trace)
        free = segmenter(images)
    assert largest_difference(result, oracle.segment(segmenter, images, trace)) < EXACT
    assert torch.equal(free, result)
    if head is not None:
        halted = [int(stage.halted.sum()) for stage in trace.stages]
        assert any(halted), "nobody halted: this test would show nothing"


@pytest.mark.parametrize(
    ("halt", "head", "decoder", "resample"),
    [
        *itertools.product(HALTS, ("linear", "cosine"), DECODERS, ("area",)),
        *itertools.product(("some",), ("linear", "cosine"), DECODERS, ("bilinear",)),
    ],
)
def test_forced_decisions(halt: str, head: str, decoder: str, resample: str) -> None:
    segmenter = small_segmenter(head, decoder, dtype=torch.float64)
    segmenter.encoder.resample = resample
    trace = make_trace(segmenter, mixed_layout(3), HALTS[halt])
    images = photographs(3, 64, 64, dtype=torch.float64)
    truth = oracle.segment(segmenter, images, trace)
    with torch.no_grad():
        assert largest_difference(segmenter(images, replay=trace), truth) < EXACT
    differentiable = segmenter(images, replay=trace)
    assert differentiable.requires_grad
    assert largest_difference(differentiable, truth) < EXACT


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", ("linear", "cosine"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_low_precision(dtype: torch.dtype, head: str, decoder: str) -> None:
    """The design's rule: at most twice the error of plain PyTorch in the same dtype, plus one ulp."""
    segmenter = small_segmenter(head, decoder, dtype=dtype)
    images = photographs(3, 64, 64, dtype=dtype)
    trace = make_trace(segmenter, mixed_layout(3), HALTS["some"])
    with torch.no_grad():
        result = segmenter(images, replay=trace)
    plain = oracle.segment(segmenter, images, trace)
    truth = oracle.segment(segmenter.double(), images.double(), trace)
    ours, theirs = largest_difference(result, truth), largest_difference(plain, truth)
    one_ulp = torch.finfo(dtype).eps * float(truth.abs().max())
    assert result.dtype == dtype and ours <= 2 * theirs + one_ulp


def test_gradients_reach_every_parameter() -> None:
    """Autograd through the dense simulation and through the packed model agree."""
    segmenter = small_segmenter("linear", "mask_transformer", dtype=torch.float64)
    trace = make_trace(segmenter, mixed_layout(2), HALTS["some"])
    images = photographs(2, 64, 64, dtype=torch.float64).requires_grad_()
    tensors = [images, *segmenter.parameters()]
    simulate = oracle.segment.__wrapped__  # without no_grad
    results = [segmenter(images, replay=trace), simulate(segmenter, images, trace)]
    cotangent = torch.randn_like(results[0])
    found = [torch.autograd.grad(result, tensors, cotangent) for result in results]
    for ours, theirs in zip(*found, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert largest_difference(ours, theirs) < EXACT * scale


def test_layouts_of_the_stages_are_what_the_masks_say() -> None:
    """The recorded survivors' layouts follow from the recorded masks, so a trace cannot contradict itself."""
    segmenter = small_segmenter("linear", dtype=torch.float64, keep_per_class=1)
    trace = segmenter.trace(photographs(3, 64, 64, dtype=torch.float64))
    current = read(trace.layout)
    for stage in trace.stages:
        current = current.without(stage.halted.tolist())
        assert read(stage.layout) == current
    counts = [trace.layout.num_tokens, *(stage.layout.num_tokens for stage in trace.stages)]
    assert all(after < before for before, after in itertools.pairwise(counts))


@pytest.mark.parametrize("keep_per_class", (0, 2))
@pytest.mark.parametrize("head", ("linear", "cosine"))
def test_decisions_follow_from_plain_scores(head: str, keep_per_class: int) -> None:
    """The trace halts exactly those whose confidence, computed image by image without the package, says so."""
    segmenter = small_segmenter(head, dtype=torch.float64, keep_per_class=keep_per_class)
    images = photographs(3, 64, 64, dtype=torch.float64)
    trace = segmenter.trace(images)
    free, replayed = segmenter(images), segmenter(images, replay=trace)
    assert free.requires_grad and torch.equal(free, replayed), "training takes other decisions than inference"
    halted = 0
    for image, blocks in enumerate(read(trace.layout).images):
        decisions = decisions_of(trace, image)
        _, scores = naive_segment(segmenter, images[image], list(blocks), decisions)
        current = PlainLayout((blocks,), (8, 8), 1)
        for stage_scores, own, decided in zip(scores, segmenter.encoder.exits.values(), decisions, strict=True):
            expected = brute_force.halt(stage_scores, current, float(own.threshold), "softmax", keep_per_class)
            assert decided == expected.halted
            current, halted = expected.layout, halted + sum(decided)
    assert halted
