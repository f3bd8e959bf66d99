"""Kernels compiled ahead of time. Needs a Triton that compiles: not one that was imported under TRITON_INTERPRET=1."""

import importlib.util
import os

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
