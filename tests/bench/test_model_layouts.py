"""Recorded decisions of every kind: how many tokens, who halts, and what one image's part of them is."""

from __future__ import annotations

import pytest
import torch

from bench.model.layouts import (
    ALL_HALTED,
    EMPTY_IMAGE,
    FIXED,
    KINDS,
    NONE_HALTED,
    SPREAD,
    draw_traces,
    image_of,
    rows_of,
    survivors_of,
    without_exits,
)
from step_kernels.model import Trace

GRID, BATCH, COUNT, BLOCK = (32, 32), 4, 2, 16
CPU = torch.device("cpu")


def draw(kind: str, seed: int = 0, batch: int = BATCH) -> tuple[Trace, ...]:
    return draw_traces(kind, COUNT, batch, GRID, block=BLOCK, seed=seed, device=CPU)


def blocks(trace: Trace) -> torch.Tensor:
    """Tokens of each image without its prefix token."""
    return trace.layout.lengths() - 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_image_keeps_a_2_5th(kind: str) -> None:
    for trace in draw(kind):
        trace.check(batch_size=BATCH, grid=GRID, num_prefix=1, device=CPU, exits=(BLOCK,))
        trace.layout.validate()
        counts = blocks(trace).double()
        assert counts.mean() == pytest.approx(32 * 32 / 2.5, rel=0.03)
        variation = float(counts.std(correction=0) / counts.mean())
        assert variation < 0.02 if kind == FIXED else variation == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("kind", "share"), [(SPREAD, 0.4), (FIXED, 0.4), (NONE_HALTED, 0.0), (ALL_HALTED, 1.0), (EMPTY_IMAGE, None)]
)
def test_who_halts(kind: str, share: float | None) -> None:
    for trace in draw(kind):
        (stage,) = trace.stages
        stage.layout.validate()
        assert stage.block == BLOCK
        assert not stage.halted[trace.layout.cells[:, 3] == 0].any()
        left = stage.layout.lengths() - 1
        halted = 1 - left / blocks(trace)
        if share is not None:
            assert float(stage.halted.sum() / blocks(trace).sum()) == pytest.approx(share, abs=0.005)
        else:
            assert int(left[BATCH // 2]) == 0
            assert float(halted[0]) == pytest.approx(0.4, abs=0.15)


def test_draws_differ_and_repeat() -> None:
    one, other = draw(SPREAD)
    assert not torch.equal(one.layout.cu_seqlens, other.layout.cu_seqlens)
    assert torch.equal(one.stages[0].halted, draw(SPREAD)[0].stages[0].halted)
    assert not torch.equal(one.layout.cu_seqlens, draw(SPREAD, seed=1)[0].layout.cu_seqlens)


def test_survivors_by_hand() -> None:
    layout = draw(SPREAD)[0].layout
    halted = torch.zeros(layout.capacity, dtype=torch.bool)
    halted[[1, 3]] = True
    left = survivors_of(layout, halted)
    assert left.trimmed and left.capacity == layout.capacity - 2
    assert torch.equal(left.cells[:3], layout.cells[[0, 2, 4]])
    assert torch.equal(left.cu_seqlens[1:], layout.cu_seqlens[1:] - 2)


@pytest.mark.parametrize("kind", [SPREAD, EMPTY_IMAGE])
def test_one_image_of_a_batch(kind: str) -> None:
    trace = draw(kind)[0]
    parts = [image_of(trace, image) for image in range(BATCH)]
    for part in parts:
        part.check(batch_size=1, grid=GRID, num_prefix=1, device=CPU, exits=(BLOCK,))
        part.layout.validate()
        assert not part.layout.cells[:, 0].any()
    for layout, own in (
        (trace.layout, [part.layout for part in parts]),
        (trace.stages[0].layout, [part.stages[0].layout for part in parts]),
    ):
        assert torch.equal(torch.cat([part.cells for part in own])[:, 1:], layout.cells[:, 1:])
        assert [rows_of(layout, image).stop - rows_of(layout, image).start for image in range(BATCH)] == [
            part.capacity for part in own
        ]
    assert torch.equal(torch.cat([part.stages[0].halted for part in parts]), trace.stages[0].halted)


def test_without_exits() -> None:
    trace = draw(SPREAD)[0]
    assert without_exits(trace).layout is trace.layout and without_exits(trace).stages == ()
