"""What every launcher shares: the current device, its size and kind, and arguments that each launch passes."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

# Triton 3.10 turns FMA contraction off by default; asking for it keeps kernels the same in every version.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
MULTIPROCESSORS = 4  # taken for a GPU's where there is none: in the interpreter and ahead of time
INTERPRETED_ARCHITECTURE = (
    90  # what the interpreter, which has no target, takes itself for; tests set it to go through either route
)


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


def architecture() -> int:
    """Compute capability of the current target, times ten; also ahead of time, where a fake driver gives it."""
    if knobs.runtime.interpret:
        return INTERPRETED_ARCHITECTURE
    return driver.active.get_current_target().arch


def architecture_class(architecture: int) -> str:
    """Architectures that share rows: by their matmul instructions and the shared memory of a block."""
    if architecture == 80:
        return "ampere"  # mma.sync, cp.async, 163 KiB
    if architecture == 90:
        return "hopper"  # wgmma, TMA, 227 KiB
    if 100 <= architecture < 110:
        return "blackwell"  # tcgen05, TMA, 227 KiB
    return "consumer"  # sm_86, 89, 120 and whatever is not known: mma.sync, 99 KiB


def uses_descriptors(architecture: int) -> bool:
    """Whether host descriptors (TMA) are taken where alignment allows: where matmuls read shared memory (wgmma, tcgen05).

    Below sm_90 they compile to plain loads without cp.async; sm_120 has TMA, but the kernels spill with it (8 bytes, Triton 3.6.0).
    """
    return architecture_class(architecture) in ("hopper", "blackwell")


def fp32_precision() -> str:
    """How fp32 products are formed by torch's own setting: "ieee" or "tf32".

    Read where both of torch's interfaces show; ``torch.get_float32_matmul_precision`` raises once the newer one was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def stride(tensor: Tensor | None) -> int:
    """Of the first dimension; 0 for an argument that is not given."""
    return 0 if tensor is None else tensor.stride(0)
