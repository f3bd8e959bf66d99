"""Recorded decisions of every kind: how many tokens, who halts, and what one image's part of them is."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench.errors import UsageError
from bench.generated import draw_pictures
from bench.images import Photographs
from bench.model import realistic
from bench.model.layouts import (
    ALL_HALTED,
    EMPTY_IMAGE,
    FIXED,
    KINDS,
    NONE_HALTED,
    REALISTIC,
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
        if kind == REALISTIC:
            continue
        assert counts.mean() == pytest.approx(32 * 32 / 2.5, rel=0.03)
        variation = float(counts.std(correction=0) / counts.mean())
        assert variation < 0.02 if kind == FIXED else variation == pytest.approx(0.3, abs=0.03)


def test_photographs_keep_a_2_5th_together_and_differ_more_than_drawn_layouts() -> None:
    counts = torch.cat([blocks(trace) for trace in draw(REALISTIC)]).double()
    assert counts.mean() == pytest.approx(32 * 32 / 2.5, rel=0.03)
    assert counts.std() > 0.3 * counts.mean()


def test_no_picture_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight views of each crop, then no more."""
    drawn = Photographs(("one", "two"), draw_pictures(64, 2), ())
    monkeypatch.setattr(realistic, "load_photographs", lambda folder, **options: drawn)
    pictures, patch = realistic._pictures(16, 16)
    assert patch == 4
    assert len({picture.numpy().tobytes() for picture in pictures}) == 16
    with pytest.raises(UsageError, match="need 17 different pictures, 2 crops give 16"):
        realistic._pictures(17, 16)


def test_generated_pictures_are_no_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (realistic.source() is None) == (importlib.util.find_spec("skimage") is not None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no photographs: scikit-image is not installed" in realistic.source()
    (trace, _) = draw(REALISTIC)
    assert blocks(trace).sum() < BATCH * 32 * 32


@pytest.mark.parametrize(
    ("kind", "share"),
    [(SPREAD, 0.4), (FIXED, 0.4), (REALISTIC, 0.4), (NONE_HALTED, 0.0), (ALL_HALTED, 1.0), (EMPTY_IMAGE, None)],
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
