"""Recorded decisions have the mean, the variation and the share of halted tokens that their kind names."""

from __future__ import annotations

import functools

import pytest
import torch

from bench.layouts import (
    ALL_HALTED,
    EMPTY_IMAGE,
    FIXED,
    KINDS,
    NONE_HALTED,
    QUOTA,
    QUOTA_SHARE,
    REALISTIC,
    SPREAD,
    draw_layouts,
    draw_traces,
    gone_at,
    resolved,
    without_merging,
)
from step_kernels import use_backend
from step_kernels.model import Trace

GRID, BLOCK, COUNT, BATCH = (32, 32), 8, 3, 4


def draw(kind: str, batch: int = BATCH) -> tuple[Trace, ...]:
    return draw_traces(kind, COUNT, batch, GRID, block=BLOCK)


drawn = functools.cache(draw)


def tokens(traces: tuple[Trace, ...]) -> torch.Tensor:
    """[COUNT, batch], prefix tokens left out."""
    return torch.stack([trace.layout.lengths() - trace.layout.num_prefix for trace in traces]).double()


@pytest.mark.parametrize("kind", [*KINDS, QUOTA])
def test_traces_are_valid(kind: str) -> None:
    for trace in drawn(kind):
        assert (trace.layout.batch_size, trace.layout.grid, trace.layout.num_prefix) == (BATCH, GRID, 1)
        assert trace.layout.trimmed and trace.final_layout.trimmed
        trace.layout.validate()
        trace.final_layout.validate()
        assert bool((trace.layout.sides() > 0).all())
        (stage,) = trace.stages
        assert stage.block == BLOCK
        assert not bool(stage.halted[trace.layout.cells[:, 3] == 0].any()), "a prefix token halts"
        assert torch.equal(stage.layout.cells, trace.layout.cells[~stage.halted])


@pytest.mark.parametrize(("kind", "variation", "tolerance"), [(SPREAD, 0.3, 0.02), (FIXED, 0.0, 0.02)])
def test_mean_and_variation_in_every_batch(kind: str, variation: float, tolerance: float) -> None:
    found = tokens(drawn(kind))
    assert found.mean(1) == pytest.approx([1024 / 2.5] * COUNT, rel=0.02)
    assert (found.std(1, correction=0) / found.mean(1)).tolist() == pytest.approx([variation] * COUNT, abs=tolerance)


def test_batches_of_one_image_vary_together() -> None:
    found = tokens(drawn(SPREAD, batch=1)).flatten()
    assert float(found.mean()) == pytest.approx(1024 / 2.5, rel=0.02)
    assert float(found.std(correction=0) / found.mean()) == pytest.approx(0.3, abs=0.02)


def test_realistic_ones_have_the_mean_and_vary_as_pictures_do() -> None:
    found = tokens(drawn(REALISTIC))
    assert float(found.mean()) == pytest.approx(1024 / 2.5, rel=0.02)
    assert len(set(found.flatten().tolist())) > COUNT


def test_quota_is_the_same_in_every_image() -> None:
    assert set(tokens(drawn(QUOTA)).flatten().tolist()) == {1024 - 3 * round(QUOTA_SHARE * 256)}


@pytest.mark.parametrize("kind", [SPREAD, REALISTIC, FIXED, QUOTA])
def test_two_fifths_halt(kind: str) -> None:
    for trace, own in zip(drawn(kind), tokens(drawn(kind)), strict=True):
        assert int(trace.stages[0].halted.sum()) == round(0.4 * int(own.sum()))


def test_adversarial_kinds() -> None:
    for nobody, everybody, one in zip(*map(drawn, (NONE_HALTED, ALL_HALTED, EMPTY_IMAGE)), strict=True):
        assert not bool(nobody.stages[0].halted.any())
        assert everybody.final_layout.lengths().tolist() == [1] * BATCH
        assert (one.final_layout.lengths() == 1).tolist() == [image == BATCH // 2 for image in range(BATCH)]


def test_draws_can_be_repeated() -> None:
    first, again = drawn(SPREAD), draw(SPREAD)
    assert all(torch.equal(a, b) for a, b in zip(first[0].tensors(), again[0].tensors(), strict=True))
    assert not torch.equal(first[0].layout.sides(), first[1].layout.sides())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_resolve_to_the_layout(dtype: torch.dtype) -> None:
    for own in draw_layouts(2, BATCH, GRID, dtype=dtype):
        assert all(score.dtype == dtype for score in own.scores)
        assert torch.equal(resolved(own.scores, own.sides, GRID).trim().cells, own.layout.cells)


def test_every_patch_halts_where_its_token_does() -> None:
    for trace in drawn(SPREAD):
        unmerged = without_merging(trace)
        assert unmerged.layout.num_tokens == BATCH * 1025
        assert torch.equal(gone_at(unmerged, unmerged.stages[0]), gone_at(trace, trace.stages[0]))


@pytest.mark.parametrize("kind", [*KINDS, QUOTA])
def test_drawing_needs_no_kernels(kind: str) -> None:
    """Layouts are drawn on the CPU also where ops are to run as kernels, on the GPU."""
    expected = drawn(kind)
    with use_backend("triton"):
        found = draw(kind)
    assert all(torch.equal(a.layout.cells, b.layout.cells) for a, b in zip(found, expected, strict=True))
