"""The number of live rows as an op, for compiled graphs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

# Apart from the ops that have floors: the host reads on any.
_library = torch.library.Library("step_kernels_host", "DEF")
_library.define("live_count(Tensor cu_seqlens) -> SymInt")


def _fake(cu_seqlens: Tensor) -> int:
    """A number that no graph knows. An op may return it where PyTorch breaks graphs, but for fullgraph=True, at the ``item()`` of a tensor;
    there the context's public ``new_dynamic_size`` raises, too."""
    return torch.library.get_ctx()._shape_env.create_unbacked_symint()


_library.impl("live_count", lambda cu_seqlens: int(cu_seqlens[-1]), "CompositeExplicitAutograd")
torch.library.register_fake("step_kernels_host::live_count", _fake, lib=_library)


def live_count(cu_seqlens: Tensor) -> int:
    """The last of ``cu_seqlens``, while a graph is made. An export takes ``item()``, which breaks none there and which AOTInductor knows."""
    if torch.compiler.is_exporting():
        return cast(int, cu_seqlens[-1].item())
    return torch.ops.step_kernels_host.live_count.default(cu_seqlens)
