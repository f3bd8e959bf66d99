"""The Triton floor: one module per op file, each holding kernels and the launcher that the op calls.

``KERNELS`` names the registered ops that have a kernel; every other op runs its PyTorch reference. It is a plain table, so that
asking which ops have kernels never imports Triton.
"""

from __future__ import annotations

KERNELS: frozenset[str] = frozenset(
    {
        "layout_from_sides",
        "layout_sides",
        "merge_tokens",
        "merge_tokens_backward",
        "resolve_layout",
        "scatter_back",
        "scatter_back_backward",
        "scatter_into",
    }
)
