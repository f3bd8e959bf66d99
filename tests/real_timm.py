"""timm itself, for the tests that run real timm models: ``from real_timm import timm``.

timm needs torchvision, whose wheel on PyPI is built for CUDA and does not import beside a PyTorch without it: its own operators
are missing, and the registration of their shapes fails. Two of these operators, declared but never run, are all that timm's
vision transformers need. Users install what docs/install.md says; CI runs an example so, without this file.
"""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

if importlib.util.find_spec("timm") is None:
    pytest.skip("needs timm, which pip install -e '.[test]' brings", allow_module_level=True)

_operators = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as the module


def _import_torchvision() -> None:
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        for name in ("nms", "qnms"):
            _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_import_torchvision()
import timm  # noqa: E402

__all__ = ["timm"]
