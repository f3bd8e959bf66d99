"""Whatever stands in cu_seqlens, kernels touch no memory beside their arguments': the supervision checks every address."""

from __future__ import annotations

import importlib

import pytest
import torch
from samples import SAMPLES
from torch import Tensor

from step_kernels import library

MOST = 2**31 - 1


def position(op: str, argument: str) -> int | None:
    names = [given.name for given in getattr(torch.ops.step_kernels, op).default._schema.arguments]
    return names.index(argument) if argument in names else None


def wild(rows: int) -> list[list[int]]:
    """Falling, negative, overlapping, past the last row, as far as an int32 goes; images of several tiles among them."""
    numbers = [[0, rows, rows // 2], [-7, rows // 2, -rows], [rows, 0, rows], [0, 1, rows + 1]]
    return [*numbers, [0, 700, MOST], [-MOST - 1, MOST, MOST // 2], [MOST, MOST - 300, -MOST]]


def call(op: str, *arguments: object) -> None:
    """The kernels' floor itself: the public functions would refuse such values on a CPU."""
    floor = getattr(importlib.import_module(f"step_kernels.triton.{library.op_modules[op]}"), op)
    floor(*[x.detach() if isinstance(x, Tensor) else x for x in arguments])


@pytest.mark.parametrize("op", [op for op in library.schemas if position(op, "cu_seqlens") is not None])
def test_lengths(op: str) -> None:
    at, fill = position(op, "cu_seqlens"), position(op, "fill_tail")
    sample = list(next(sample for sample in SAMPLES[op]() if sample[at] is not None))
    for number, lengths in enumerate(wild(rows=int(sample[at][-1]))):
        sample[at] = torch.tensor(lengths[: len(sample[at])], dtype=torch.int32)
        if fill is not None:
            sample[fill] = number % 2 == 0
        call(op, *sample)


@pytest.mark.parametrize("op", ["ragged_attention", "ragged_attention_backward"])
def test_schedules(op: str, route: str) -> None:
    at = position(op, "schedule")
    sample = next(sample for sample in SAMPLES[op]() if sample[at] is not None)
    for first, begin, end in ((-9, 0, 5), (0, -9, 5), (0, 0, MOST), (MOST, MOST - 5, MOST), (1, MOST, MOST)):
        schedule = torch.tensor([first, begin, end, 0], dtype=torch.int32).repeat(len(sample[at]), 1)
        call(op, *sample[:at], schedule, *sample[at + 1 :])


def test_images_of_several_tiles(route: str) -> None:
    """Which overlap: without and with a schedule made of the same numbers."""
    q, lse = torch.randn(140, 1, 16), torch.zeros(1, 140)
    for numbers in ([0, 140, 0, 140], [-300, 300, 900, 139]):
        lengths = torch.tensor(numbers, dtype=torch.int32)
        schedule = importlib.import_module("step_kernels.triton.attention").attention_schedule(lengths, 140)
        call("ragged_attention", q, q, q, lengths, None, None, None, True, True)
        call("ragged_attention_backward", q, q, q, q, q, lse, lengths, None, None, schedule)
