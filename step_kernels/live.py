"""The number of live rows as an op, for compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define


def _fake(cu_seqlens: Tensor) -> int:
    """A number that no graph knows. An op may return it where PyTorch breaks graphs, but for fullgraph=True, at the ``item()`` of a tensor."""
    return torch.library.get_ctx()._shape_env.create_unbacked_symint()


live_count = define("live_count(Tensor cu_seqlens) -> SymInt", module="layout", fake=_fake)
