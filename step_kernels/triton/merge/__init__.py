"""Merging pixels and tokens, and its gradients."""

from .launch import (
    embed_patches,
    embed_patches_backward,
    merge_patches,
    merge_patches_backward,
    merge_tokens,
    merge_tokens_backward,
)

__all__ = [
    "embed_patches",
    "embed_patches_backward",
    "merge_patches",
    "merge_patches_backward",
    "merge_tokens",
    "merge_tokens_backward",
]
