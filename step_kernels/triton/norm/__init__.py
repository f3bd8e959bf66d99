"""LayerNorm on the live rows."""

from .launch import ragged_layer_norm, ragged_layer_norm_backward

__all__ = ["ragged_layer_norm", "ragged_layer_norm_backward"]
