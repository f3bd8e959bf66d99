"""The Triton floor: a module per op file, or a folder of that name where an op has several kernels, with the launchers that the op calls.

``KERNELS`` names the registered ops that have a kernel; every other op runs its PyTorch reference. It is a plain table, so that
asking which ops have kernels never imports Triton.
"""

from __future__ import annotations

KERNELS: frozenset[str] = frozenset(
    {
        "attention_schedule",
        "class_attention",
        "class_attention_backward",
        "class_scores",
        "class_scores_backward",
        "embed_patches",
        "embed_patches_backward",
        "exit_head",
        "gather_tokens",
        "gather_tokens_backward",
        "halt_tokens",
        "kept_rows",
        "layout_from_sides",
        "layout_sides",
        "masked_attention",
        "masked_attention_backward",
        "merge_patches",
        "merge_patches_backward",
        "merge_tokens",
        "merge_tokens_backward",
        "ragged_attention",
        "ragged_attention_backward",
        "ragged_layer_norm",
        "ragged_layer_norm_backward",
        "ragged_linear",
        "ragged_linear_backward",
        "ragged_rope",
        "ragged_rope_backward",
        "replace_prefix",
        "replace_prefix_backward",
        "resolve_layout",
        "rope_table",
        "scatter_back",
        "scatter_back_backward",
        "scatter_into",
        "upsample_argmax",
    }
)
