"""Static mode as one CUDA graph."""
