"""Attention within each image: forward, backward and the tile schedule."""

from .launch import attention_schedule, ragged_attention, ragged_attention_backward

__all__ = ["attention_schedule", "ragged_attention", "ragged_attention_backward"]
