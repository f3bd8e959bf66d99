"""How many variants of a kernel Triton would compile over 7 token counts x 3 batch sizes, in one dtype: see variants.py."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import variants
from aot.ahead_of_time import meta

from step_kernels.library import schemas
from step_kernels.triton.common.launch import OPTIONS

MOST = 2  # with rows that all start at multiples of 16, or not
# Strides decide how wide loads and stores are, so they stay specialised. Those of a map of sides or scores, and of a canvas of 150 classes,
# depend on the grid; a mask of one token per image has rows of one.
MOST_OF = {
    "count_kernel": 4, "write_kernel": 4, "label_kernel": 3, "compact_kernel": 3, "head_kernel": 3,
    "reduce_blocks_kernel": 3, "kept_rows_kernel": 3,
}  # fmt: skip


@pytest.mark.parametrize("op", sorted(variants.CASES))
def test_variants_of_a_kernel(op):
    """Counted per op, kernel and choice of its launcher: constants, options of the compiler, which arguments are None."""
    found = variants.variants(op)
    assert found
    for (kernel, choice), keys in found.items():
        assert len(keys) <= MOST_OF.get(kernel, MOST), f"{kernel} with {choice}:\n" + "\n".join(sorted(keys))


def test_every_op_is_counted():
    assert set(variants.CASES) == set(schemas)


def test_what_counts_as_a_variant():
    """1, a multiple of 16 and another number are three; a constant or a missing tensor is another choice."""

    @triton.jit
    def kernel(x_ptr, y_ptr, size, SIZE: triton.language.constexpr):
        pass

    with variants.counted() as found:
        for size in (1, 2, 16, 32):
            kernel[(1,)](meta(1), None, size, SIZE=1, **OPTIONS)
        kernel[(1,)](meta(1), None, 2, SIZE=2, **OPTIONS)
        kernel[(1,)](meta(1), meta(1), 2, SIZE=1, **OPTIONS)
    assert sorted(map(len, found.values())) == [1, 1, 3]
