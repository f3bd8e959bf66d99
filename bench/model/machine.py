"""What the device reaches at all: the two rates that a roofline needs, measured before anything else."""

from __future__ import annotations

import torch

from ..settings import DTYPES
from ..timing import DeviceClock, interleave

# Copied: several times the cache, as in bench kernels. Multiplied: large enough for the vendor's best rate.
SIZES = {"cuda": (512 * 2**20, 8192), "cpu": (64 * 2**20, 1024)}
ROUNDS = 6


def rates(device: torch.device, dtype: str) -> dict[str, float]:
    """Copy bandwidth (bytes read plus bytes written, 1e9 to the GB) and the rate of a square matmul (1e12 to the TFLOP)."""
    amount, side = SIZES[device.type]
    source, target = torch.randint(0, 256, (2, amount), dtype=torch.uint8, device=device).unbind()
    left, right = torch.randn(2, side, side, device=device).to(DTYPES[dtype]).unbind()
    timings = interleave(
        {"copy": lambda number: target.copy_(source), "matmul": lambda number: left @ right},
        inputs=1,
        clock=DeviceClock(device),
        rounds=ROUNDS,
    )
    return {
        "copy_gigabytes_per_second": 2 * amount / timings["copy"].median / 1e6,
        "matmul_teraflops_per_second": 2 * side**3 / timings["matmul"].median / 1e9,
    }
