"""Where fp32 products may be of tf32, both factors are rounded to it: matmul units would cut the other bits off."""

import importlib
import re
from collections.abc import Iterator

import pytest
import samples
import torch
from aot.ahead_of_time import compiled
from device_kernels import without_checks_of_values
from tensors import matmuls_in
from torch import Tensor
from torch.utils._pytree import tree_map_only

from step_kernels.library import op_modules

PRODUCTS = [  # ragged_linear's gradients are PyTorch's own products
    "ragged_linear",
    "ragged_attention",
    "ragged_attention_backward",
    "masked_attention",
    "masked_attention_backward",
    "class_attention",
    "class_attention_backward",
    "class_scores",
    "class_scores_backward",
    "exit_head",
]


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta", torch.float32 if x.is_floating_point() else x.dtype)


def factors(assembly: str) -> Iterator[str]:
    """Of each product: what its factors are results of, the nearest of their names above it."""
    for product in re.finditer(r"tt\.dot (%\w+), (%\w+),", assembly):
        for name in product.groups():
            yield assembly[: product.start()].rpartition(f" {name} = ")[2].partition("\n")[0]


@pytest.mark.parametrize("op", PRODUCTS)
def test_both_factors_are_rounded(op):
    floor = getattr(importlib.import_module(f"step_kernels.triton.{op_modules[op]}"), op)
    found = []
    for arguments in samples.SAMPLES[op]():
        with matmuls_in("tf32"), compiled(90) as launches, without_checks_of_values(), torch.no_grad():
            floor(*tree_map_only(Tensor, on_meta, arguments))
        found += [factor for launch in launches for factor in factors(launch.kernel.asm["ttir"])]
    assert found and all(factor.startswith('tt.elementwise_inline_asm "cvt.rna.tf32.f32') for factor in found)
