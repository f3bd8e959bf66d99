"""What every launcher shares: the current device, its size, and arguments that each launch passes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

# Triton 3.10 turns FMA contraction off by default; asking for it keeps kernels the same in every version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
MULTIPROCESSORS = 4  # taken for a GPU's where there is none: in the interpreter and ahead of time


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def multiprocessors(device: torch.device) -> int:
    """Of the GPU: what the programs of persistent kernels are counted by."""
    return _multiprocessors(device) if device.type == "cuda" else MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def fp32_precision() -> str:
    """How fp32 products are formed by torch's own setting: "ieee" or "tf32".

    Read where both of torch's interfaces show; ``torch.get_float32_matmul_precision`` raises once the newer one was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def stride(tensor: Tensor | None) -> int:
    """Of the first dimension; 0 for an argument that is not given."""
    return 0 if tensor is None else tensor.stride(0)
