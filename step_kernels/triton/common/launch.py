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
INTERPRETED = knobs.runtime.interpret  # settled when Triton is imported
# What the interpreter, which has no target, takes itself for; tests set it to go through either route.
INTERPRETED_ARCHITECTURE = 90
_NO_DEVICE = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device.index) if tensor.is_cuda else _NO_DEVICE


def multiprocessors(device: torch.device) -> int:
    """Of the GPU: what the programs of persistent kernels are counted by."""
    return _multiprocessors(device) if device.type == "cuda" else MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def architecture(device: torch.device) -> int:
    """Compute capability of the GPU, times ten; ahead of time, where there is none, that of Triton's current target."""
    if INTERPRETED:
        return INTERPRETED_ARCHITECTURE
    return _architecture(device) if device.type == "cuda" else driver.active.get_current_target().arch


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
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


def input_precision(dtype: torch.dtype) -> str:
    """How products are formed: of fp32 by torch's own setting, "ieee" or "tf32"; of 16 bits, exact in either, "ieee".

    Read where both of torch's interfaces show; ``torch.get_float32_matmul_precision`` raises once the newer one was used.
    """
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def ceil_div(size: int, block: int) -> int:
    """Blocks that hold ``size``. (``triton.cdiv`` and ``triton.next_power_of_2`` take ten times as long on the host.)"""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least that is not below ``size``, which is at least 1."""
    return 1 << (size - 1).bit_length()


def batch_of(cu_seqlens: Tensor | None) -> int:
    """Images, which is where the live count stands; 0 without."""
    return 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def stride(tensor: Tensor | None) -> int:
    """Of the first dimension; 0 for an argument that is not given."""
    return 0 if tensor is None else tensor.stride(0)
