"""Modules whose thresholds survive ``model.to(torch.bfloat16)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

__all__ = ["ThresholdModule"]


class ThresholdModule(nn.Module):
    """A module whose own buffers named ``threshold*`` stay fp32 when the module is cast.

    ``module.to(dtype)`` casts every floating-point buffer, and 0.95 rounded to bf16 is 0.9492: another threshold.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if name.startswith("threshold")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            cast = self._buffers[name]
            if cast is not None and cast.dtype != torch.float32:
                self._buffers[name] = buffer.to(cast.device)
        return self
