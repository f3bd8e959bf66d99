"""Every kernel compiles where all sizes are 1: Triton makes such a number a constant of the kernel, of another type than numbers have elsewhere."""

import importlib
from typing import Any

import pytest
import samples
import torch
from aot.ahead_of_time import compiled, meta
from device_kernels import without_checks_of_values
from torch import Tensor

from step_kernels.library import op_modules

EXACT_MODE = {"ragged_linear": {1, 2}, "ragged_linear_backward": {1}}  # samples that PyTorch's own kernels run


def of_ones(value: Any) -> Any:
    """The same argument for one image of one token of one channel."""
    if isinstance(value, (list, tuple)):
        return type(value)(of_ones(item) for item in value)
    if isinstance(value, Tensor):
        ones = [min(size, 1) for size in value.shape]
        of_layouts = {1: [2], 2: [1, 4]} if value.dtype == torch.int32 else {}  # cu_seqlens, cells
        return meta(*of_layouts.get(value.dim(), ones), dtype=value.dtype)
    return min(value, 1) if type(value) is int else value


@pytest.mark.parametrize("op", samples.SAMPLES)
def test_every_op(op):
    floor = getattr(importlib.import_module(f"step_kernels.triton.{op_modules[op]}"), op)
    for number, arguments in enumerate(samples.SAMPLES[op]()):
        with compiled(90) as launches, without_checks_of_values(), torch.no_grad():
            floor(*of_ones(arguments))
        assert bool(launches) == (number not in EXACT_MODE.get(op, ()))
