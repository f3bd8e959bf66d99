"""The public functions as kernels inside torch.compile(fullgraph=True), gradients included; dynamic sizes are the reference floor's claim."""

from collections.abc import Callable

import pytest
from cases.compiled import COMPILED, attention_compiles_with_gradients, compiles, compiles_as_a_whole


def test_compile_of_everything() -> None:
    compiles_as_a_whole(dynamic=False)


def test_attention_with_gradients() -> None:
    attention_compiles_with_gradients(dynamic=False)


@pytest.mark.parametrize("function", COMPILED)
def test_compile(function: Callable) -> None:
    compiles(function, dynamic=False)
