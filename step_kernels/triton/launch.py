"""What every launcher shares: the current device, and arguments that each launch passes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# Triton 3.10 turns FMA contraction off by default; asking for it keeps kernels the same in every version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
