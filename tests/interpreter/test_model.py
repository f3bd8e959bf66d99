"""The whole model as kernels, in both modes, against the reference floor's exact mode at the same decisions."""

from __future__ import annotations

import functools

import pytest
import torch
from cases.upsample import check_labels, exact_scores
from interpreter import supervision
from small_models import CLASSES, DECODERS, enlarge, photographs
from static_runs import Run, UndefinedTails, decided, every_other, of_image, run, same_decisions
from tensors import error_rule

import step_kernels as sk
from step_kernels.model import CosineExit, LinearExit, StepEncoder, StepSegmenter, Trace, VariancePolicy, ViT

DIM, PATCH = 32, 8
HEIGHT, WIDTH = 32, 45  # 4 x 6 patches, the last column padded
KERNELS = {  # of both modes, a layout being given
    "attention_forward_kernel",
    "attention_schedule_kernel",
    "compact_kernel",
    "decide_kernel",
    "expand_blocks_kernel",
    "gather_kernel",
    "head_kernel",
    "label_kernel",
    "layer_norm_kernel",
    "merge_patches_kernel",
    "reduce_blocks_kernel",
}
OF_DECODER = {"linear": set(), "mask_transformer": {"class_scores_kernel", "swap_prefix_kernel"}}


@functools.cache
def segmenter_of(decoder: str, dtype: torch.dtype = torch.float32) -> StepSegmenter:
    """Three blocks, exits of both kinds after the first two, one of which keeps context; a CLS token."""
    torch.manual_seed(0)
    vit = ViT.preset("tiny", img_size=(32, 48), embed_dim=DIM, depth=3, num_heads=2, patch_size=PATCH)
    exits = {1: LinearExit(DIM, CLASSES, 0.5, 1), 2: CosineExit(DIM, CLASSES, 0.3)}
    segmenter = StepSegmenter(StepEncoder(vit, VariancePolicy(0.1), exits), DECODERS[decoder](DIM, CLASSES))
    for part in (vit, segmenter.encoder.exits, segmenter.decoder):
        enlarge(part)
    return segmenter.to(dtype).eval()


def images_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return photographs(2, HEIGHT, WIDTH, dtype=dtype)


def reference(decoder: str, replay: Trace | None = None, dtype: torch.dtype = torch.float32) -> Run:
    """The reference floor in exact mode."""
    with sk.use_backend("reference"):
        return run(segmenter_of(decoder, dtype), images_of(dtype), replay)


@functools.cache
def emptying() -> Trace:
    """Image 1 empties at the first exit, half of image 0 halts at the second."""
    layout = reference("linear").trace.layout
    with sk.use_backend("reference"):
        trace = decided(layout, {1: of_image(1), 2: every_other})
    assert trace.token_counts()[0] < 50 and trace.stages[0].layout.lengths()[1] == 1  # merged; only CLS is left
    return trace


def hold(ours: Run, decoder: str, replay: Trace, dtype: torch.dtype) -> None:
    """The error rule on scores; labels as those scores have them; the decisions that were replayed."""
    plain, truth = reference(decoder, replay, dtype), reference(decoder, replay, torch.float64)
    error_rule(ours.scores, plain.scores, truth.scores)
    check_labels(ours.labels, exact_scores(ours.scores, (4 * PATCH, 6 * PATCH))[:, :, :HEIGHT, :WIDTH])
    same_decisions(ours.trace, replay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", DECODERS)
def test_static_mode(decoder, dtype, kernels):
    """With NaN in every tail; in fp32 with the programs in another order too."""
    replay, runs = emptying(), []
    for order in (None, 1) if dtype == torch.float32 else (None,):
        supervision.shuffle_programs(order)
        with UndefinedTails() as tails:
            runs.append(run(segmenter_of(decoder, dtype), images_of(dtype), replay, static=True))
        hold(runs[-1], decoder, replay, dtype)
    assert set(kernels) == KERNELS | {"linear_kernel"} | OF_DECODER[decoder]
    assert tails.poisoned.keys() >= {"ragged_linear", "ragged_layer_norm", "ragged_attention", "gather_tokens"}
    assert torch.equal(runs[0].scores, runs[-1].scores) and torch.equal(runs[0].labels, runs[-1].labels)


@pytest.mark.parametrize("decoder", DECODERS)
def test_exact_mode(decoder, kernels):
    """Its matmuls are PyTorch's."""
    replay = emptying()
    hold(run(segmenter_of(decoder), images_of(), replay), decoder, replay, torch.float32)
    assert set(kernels) == KERNELS | OF_DECODER[decoder]


def test_batch_mates_do_not_matter(kernels):
    """Free-running: the reference's decisions. At one choice of tiles, which follows the expected counts, no bit differs."""
    segmenter, images = segmenter_of("linear"), images_of()
    counts = reference("linear").trace.token_counts()
    together = run(segmenter, images, static=True, expected_tokens=counts)
    same_decisions(together.trace, reference("linear").trace)
    for number in range(2):
        alone = run(segmenter, images[number : number + 1], static=True, expected_tokens=counts)
        assert torch.equal(alone.scores[0], together.scores[number])
        assert torch.equal(alone.labels[0], together.labels[number])
    assert {"count_kernel", "scan_kernel", "write_kernel"} <= set(kernels), "the layout was resolved by kernels"
