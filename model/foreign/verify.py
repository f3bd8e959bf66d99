"""The comparison of an encoder with the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Run", "check_equal"]

# Relative error (root of mean squares) that two orders of summation may bring over many blocks; other networks differ by more than half.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 1e-2  # PyTorch's convolutions on a GPU round to TF32 by default

Run = Callable[[Tensor], Sequence[Tensor]]


@torch.no_grad()
def check_equal(vit: Any, size: Sequence[int], ours: Run, theirs: Run) -> None:
    """RuntimeError where the results of the two on one image of this size, in eval mode, differ by more than rounding."""
    name, weight = type(vit.model).__name__, vit.embedding.weight
    library = type(vit.model).__module__.partition(".")[0]
    if weight.is_meta:
        raise RuntimeError("verify: expected parameters with values, got ones on the meta device; pass verify=False")
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, weight.shape[1], *size, generator=generator, device="cpu").to(weight.device, weight.dtype)
    modes = {module: module.training for module in vit.modules()}
    vit.eval()
    try:
        with torch.autocast(weight.device.type, enabled=False), weight.device:  # where other libraries make tensors
            pairs = list(zip(ours(image), theirs(image), strict=True))
    finally:
        for module, mode in modes.items():
            module.training = mode
    allowed = TOLERANCE[weight.dtype] if weight.device.type == "cpu" else max(TF32_TOLERANCE, TOLERANCE[weight.dtype])
    for found, expected in pairs:
        if found.shape != expected.shape:
            raise RuntimeError(
                f"verify: expected features {list(expected.shape)} as {library}'s, got {list(found.shape)}"
            )
        error = float((found - expected).double().norm() / expected.double().norm())
        if not error <= allowed:
            by = f"{name} differs by {error:.2e} of their norm ({allowed:.0e} allowed)"
            raise RuntimeError(f"verify: expected {library}'s own features, got others: {by}; please report the model")
