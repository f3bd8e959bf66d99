"""``python -m step_kernels.model``."""
