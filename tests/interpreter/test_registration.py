"""Every op of the dispatcher passes opcheck as kernels, on the samples that it passes it with as its reference."""

import pytest
import torch
from samples import SAMPLES
from torch.library import opcheck


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op = getattr(torch.ops.step_kernels, name).default
    for arguments in SAMPLES[name]():
        if not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in arguments):  # the reference's
            opcheck(op, arguments)
