"""The whole model on a GPU in both modes: equal at replayed decisions, static mode without a host sync."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from cases.upsample import check_labels, exact_scores
from gpu.syncs import no_sync
from small_models import DECODERS, enlarge, photographs
from static_runs import (
    Run,
    UndefinedTails,
    decided,
    every_other,
    everybody,
    nobody,
    of_image,
    ragged_net,
    run,
    same_decisions,
)
from tensors import error_rule

import step_kernels as sk
from step_kernels.model import CosineExit, LinearExit, StepEncoder, StepSegmenter, Trace, VariancePolicy, ViT

pytestmark = pytest.mark.gpu

DIM, CLASSES, PATCH = 384, 20, 16
HEIGHT, WIDTH = 256, 380  # 16 x 24 patches, the last column padded
DTYPES = [torch.float32, torch.bfloat16]
FORCED = {
    "an image emptied": {2: of_image(1), 3: every_other},
    "all halted": {2: everybody, 3: everybody},
    "none halted": {2: nobody, 3: nobody},
}


def segmenter_of(decoder: str, dtype: torch.dtype) -> StepSegmenter:
    """ViT-S of four blocks, exits of both kinds, one of which keeps context; drawn on the CPU: the same on every GPU."""
    torch.manual_seed(0)
    vit = ViT.preset("small", img_size=(256, 384), depth=4)
    exits = {2: LinearExit(DIM, CLASSES, 0.3, 1), 3: CosineExit(DIM, CLASSES, 0.25)}
    segmenter = StepSegmenter(StepEncoder(vit, VariancePolicy(0.1), exits), DECODERS[decoder](DIM, CLASSES))
    for part in (vit, segmenter.encoder.exits, segmenter.decoder):
        enlarge(part, std=DIM**-0.5)
    torch.nn.init.constant_(exits[3].scale, 40.0)
    return segmenter.to("cuda", dtype).eval()


def images_of(dtype: torch.dtype) -> torch.Tensor:
    return photographs(3, HEIGHT, WIDTH).to("cuda", dtype)


def on_cpu(trace: Trace) -> Trace:
    stages = (dataclasses.replace(s, halted=s.halted.cpu(), layout=s.layout.to("cpu")) for s in trace.stages)
    return Trace(trace.layout.to("cpu"), tuple(stages))


def truth(segmenter: StepSegmenter, images: torch.Tensor, replay: Trace) -> torch.Tensor:
    """Scores by the reference in fp64 on the CPU, from the parameters as rounded."""
    return run(copy.deepcopy(segmenter).to("cpu", torch.float64), images.cpu().double(), on_cpu(replay)).scores


def static_run(segmenter: StepSegmenter, images: torch.Tensor, replay: Trace | None = None) -> Run:
    """Compiled by a first run; the second has NaN in every tail, and a wait for the device raises."""
    run(segmenter, images, replay, static=True)
    with no_sync(), UndefinedTails() as tails:
        found = run(segmenter, images, replay, static=True)
    assert tails.poisoned.keys() >= {"ragged_linear", "ragged_layer_norm", "ragged_attention", "gather_tokens"}
    return found


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_both_modes_obey_the_error_rule(decoder, dtype, name):
    segmenter, images = segmenter_of(decoder, dtype), images_of(dtype)
    replay = decided(segmenter.trace(images).layout, FORCED[name])
    with sk.use_backend("reference"):
        plain = run(segmenter, images, replay).scores.cpu()
        expected = truth(segmenter, images, replay)
    for ours in (run(segmenter, images, replay), static_run(segmenter, images, replay)):
        error_rule(ours.scores.cpu(), plain, expected)
        scores = exact_scores(ours.scores, (HEIGHT, 384))[..., :WIDTH]
        check_labels(ours.labels, scores.contiguous())
        same_decisions(ours.trace, replay)


@pytest.mark.parametrize("policy", ["variance", "net"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_free_running_static_mode_merges_as_exact_mode_does(dtype, policy):
    """The policy computes the same in both; an exit sees tokens of other roundings, so few of its decisions may differ."""
    segmenter, images = segmenter_of("linear", dtype), images_of(dtype)
    if policy == "net":
        segmenter.encoder.policy = ragged_net(torch.nn.functional.pad(images, (0, 4)), PATCH)
    exact, static = run(segmenter, images), static_run(segmenter, images)
    layout = static.trace.layout.trim()
    assert layout.capacity < 3 * layout.max_seqlen and torch.equal(layout.cells, exact.trace.layout.cells)
    ours = static.trace.stages[0].halted[: layout.capacity]
    assert (ours != exact.trace.stages[0].halted).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_expected_counts_change_nothing_beyond_rounding(decoder, dtype):
    segmenter, images = segmenter_of(decoder, dtype), images_of(dtype)
    trace = segmenter.trace(images)
    with sk.use_backend("reference"):
        plain = run(segmenter, images, trace).scores.cpu()
        expected = truth(segmenter, images, trace)
    for counts in (trace.token_counts(), (0, 0, 0), (10**6, 10**6, 10**6)):
        run(segmenter, images, trace, static=True, expected_tokens=counts)
        with no_sync():
            ours = run(segmenter, images, trace, static=True, expected_tokens=counts)
        error_rule(ours.scores.cpu(), plain, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_ten_runs_are_one_and_leave_no_memory_behind(decoder, dtype):
    segmenter, images = segmenter_of(decoder, dtype), images_of(dtype)
    first = run(segmenter, images, static=True)
    torch.cuda.synchronize()
    before, peaks = torch.cuda.memory_allocated(), []
    for _ in range(9):
        torch.cuda.empty_cache()  # a cached larger block would be booked whole
        torch.cuda.reset_peak_memory_stats()
        again = run(segmenter, images, static=True)
        assert torch.equal(again.scores, first.scores) and torch.equal(again.labels, first.labels)
        same_decisions(again.trace, first.trace.trim())
        del again
        peaks.append(torch.cuda.max_memory_allocated())
        assert torch.cuda.memory_allocated() == before
    assert len(set(peaks)) == 1, peaks
