"""Linear layers on the live rows."""

from .launch import ragged_linear, ragged_linear_backward

__all__ = ["ragged_linear", "ragged_linear_backward"]
