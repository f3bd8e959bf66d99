"""Merging pixels and tokens, and its gradients."""

from .backward import merge_patches_backward
from .launch import embed_patches, embed_patches_backward, merge_tokens, merge_tokens_backward
from .patches import merge_patches

__all__ = [
    "embed_patches",
    "embed_patches_backward",
    "merge_patches",
    "merge_patches_backward",
    "merge_tokens",
    "merge_tokens_backward",
]
