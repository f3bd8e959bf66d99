"""Every op of the dispatcher runs as kernels as its schema and its fake say, on the samples that it passes all of opcheck with as its reference.

Autograd and tracing see the op, not the floor beneath it.
"""

import pytest
import torch
from samples import SAMPLES
from torch.library import opcheck


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op = getattr(torch.ops.step_kernels, name).default
    for arguments in SAMPLES[name]():
        if not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in arguments):  # the reference's
            opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
