"""What Triton would compile of each kernel over many token counts and batch sizes: its own keys, without a compiler or a GPU.

Triton compiles a kernel anew where an integer becomes 1 or (in)divisible by 16, unless ``do_not_specialize`` names it. Nobody chose such a
variant; what launchers do choose (``tl.constexpr``, compile options, arguments that are None) is kept apart as a kernel's *choice*.
``PYTHONPATH=tests:. python tests/variants.py`` prints a table.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from aot.ahead_of_time import FakeDriver, meta
from device_kernels import without_checks_of_values
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelInterface

from step_kernels.library import op_modules

ARCHITECTURE = 90
DTYPE = torch.bfloat16
# Tokens of an image: a grid of that many cells, or of one less and a prefix token.
TOKENS = {1: 1, 17: 4, 196: 14, 197: 14, 577: 24, 1024: 32, 4097: 64}
BATCHES = (1, 2, 8)
HEADS, HEAD_DIM, CLASSES, PATCH = 16, 64, 150, 16
WIDTH = HEADS * HEAD_DIM
_devices = itertools.count()

Choice = tuple[str, str]  # name of a kernel, what its launcher chose
Variants = dict[Choice, set[str]]


class _Driver(FakeDriver):
    """A device of its own, so that no kernel has been compiled for it."""

    def __init__(self) -> None:
        super().__init__(ARCHITECTURE)
        self.device = f"{super().get_current_device()}-{next(_devices)}"

    def get_current_device(self) -> str:
        return self.device


@contextlib.contextmanager
def counted() -> Iterator[Variants]:
    """The variants that would be compiled inside, by kernel and choice; nothing is compiled, nothing runs."""
    found: Variants = defaultdict(set)
    active, getitem, compile_ = driver._active, KernelInterface.__getitem__, JITFunction._do_compile

    def record(self: Any, key: str, signature: Any, device: str, constants: Any, options: Any, *_: Any) -> object:
        chosen = {
            path: value for path, value in constants.items() if value is None or self.params[path[0]].is_constexpr
        }
        found[self.fn.__name__, f"{sorted(chosen.items())} {options}"].add(key)
        return self.device_caches[device][0].setdefault(key, object())

    def launcher(self: Any, grid: Any) -> Any:
        return lambda *arguments, **named: self.warmup(*arguments, grid=grid, **named)

    driver._active, KernelInterface.__getitem__, JITFunction._do_compile = _Driver(), launcher, record
    try:
        yield found
    finally:
        driver._active, KernelInterface.__getitem__, JITFunction._do_compile = active, getitem, compile_


@dataclass(frozen=True)
class Batch:
    """Images of as many tokens each, in bfloat16."""

    tokens: int
    size: int

    @property
    def side(self) -> int:
        return TOKENS[self.tokens]

    @property
    def prefix(self) -> int:
        return self.tokens - self.side**2

    @property
    def cu_seqlens(self) -> Tensor:
        return meta(self.size + 1, dtype=torch.int32)

    @property
    def layout(self) -> tuple[Tensor, Tensor]:
        return self.cu_seqlens, self.rows(4, dtype=torch.int32)

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    def rows(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return meta(self.tokens * self.size, *shape, dtype=dtype)

    def per_image(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return meta(self.size, *shape, dtype=dtype)

    def qkv(self) -> tuple[Tensor, ...]:
        return self.rows(3, HEADS, HEAD_DIM).unbind(1)

    def dense(self) -> tuple[Tensor, ...]:
        return self.per_image(self.tokens, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)

    def canvas(self) -> Tensor:
        return self.per_image(*self.grid, CLASSES).permute(0, 3, 1, 2)

    def images(self) -> Tensor:
        return self.per_image(3, PATCH * self.side, PATCH * self.side)

    def queries(self) -> Tensor:
        return self.per_image(CLASSES, HEADS, HEAD_DIM)

    def kept(self) -> tuple[Tensor, Tensor]:
        return self.per_image(self.tokens, dtype=torch.int32), self.per_image(dtype=torch.int32)

    def prefix_rows(self, count: int | None = None) -> Tensor:
        return meta(self.prefix if count is None else count, WIDTH, dtype=DTYPE)


def vector(size: int = WIDTH) -> Tensor:
    return meta(size, dtype=DTYPE)


def matrix(outputs: int, inputs: int = WIDTH) -> Tensor:
    return meta(outputs, inputs, dtype=DTYPE)


def _attention(x: Batch) -> tuple[Any, ...]:
    return *x.qkv(), x.cu_seqlens, None, None, None, True, False


def _attention_backward(x: Batch) -> tuple[Any, ...]:
    out, lse = x.rows(HEADS, HEAD_DIM), meta(HEADS, x.tokens * x.size)
    return out, *x.qkv(), out, lse, x.cu_seqlens, None, None, None


def _masked_attention_backward(x: Batch) -> tuple[Any, ...]:
    like = x.per_image(x.tokens, HEADS, HEAD_DIM).transpose(1, 2)
    lse = x.per_image(HEADS, x.tokens, dtype=torch.float32)
    return like, *x.dense(), like, lse, *x.kept(), False, None


CASES: dict[str, Callable[[Batch], tuple[Any, ...]]] = {
    "attention_schedule": lambda x: (x.cu_seqlens, x.tokens * x.size),
    "ragged_attention": _attention,
    "ragged_attention_backward": _attention_backward,
    "kept_rows": lambda x: (x.per_image(x.tokens, dtype=torch.bool),),
    "masked_attention": lambda x: (*x.dense(), *x.kept(), False, None, True),
    "masked_attention_backward": _masked_attention_backward,
    "class_attention": lambda x: (x.queries(), *x.qkv()[1:], x.cu_seqlens, None, True, True, False),
    "class_attention_backward": lambda x: (
        x.queries(), x.rows(CLASSES), x.queries(), *x.qkv()[1:], x.queries(),
        x.per_image(HEADS, CLASSES, dtype=torch.float32), x.cu_seqlens, None, False,
    ),
    "class_scores": lambda x: (x.per_image(CLASSES, WIDTH), x.rows(WIDTH), x.cu_seqlens, 1.0, False),
    "class_scores_backward": lambda x: (
        x.rows(CLASSES), x.per_image(CLASSES, WIDTH), x.rows(WIDTH), x.cu_seqlens, 1.0, False, [True, True],
    ),
    "ragged_layer_norm": lambda x: (x.rows(WIDTH), vector(), vector(), 1e-6, x.cu_seqlens, False),
    "ragged_layer_norm_backward": lambda x: (
        x.rows(WIDTH), x.rows(WIDTH), vector(), vector(), 1e-6, x.cu_seqlens, [True] * 3
    ),
    "ragged_linear": lambda x: (
        x.rows(WIDTH), matrix(WIDTH), vector(), x.cu_seqlens, "gelu", vector(), x.rows(WIDTH), False, None,
    ),
    "ragged_linear_backward": lambda x: (
        x.rows(WIDTH), x.rows(WIDTH), matrix(WIDTH), vector(), x.cu_seqlens, "gelu", vector(), [True] * 5,
    ),
    "rope_table": lambda x: (*x.layout, meta(HEAD_DIM // 2, 2), None, False),
    "ragged_rope": lambda x: (*x.qkv()[:2], meta(x.tokens * x.size, HEAD_DIM), x.cu_seqlens, True, False),
    "ragged_rope_backward": lambda x: (*x.qkv()[:2], meta(x.tokens * x.size, HEAD_DIM), x.cu_seqlens, True),
    "layout_from_sides": lambda x: (x.per_image(*x.grid, dtype=torch.int32), x.prefix),
    "layout_sides": lambda x: (*x.layout, *x.grid),
    "resolve_layout": lambda x: (
        [x.per_image(x.side // side, x.side // side) for side in (2, 4, 8)], [2, 4, 8], [0.5] * 3, [], *x.grid, x.prefix
    ),
    "merge_patches": lambda x: (x.images(), *x.layout, PATCH, False, None, None, False),
    "merge_patches_backward": lambda x: (
        x.rows(3 * PATCH**2), *x.layout, list(x.images().shape), PATCH, False, None
    ),
    "embed_patches": lambda x: (
        x.images(), meta(WIDTH, 3, PATCH, PATCH, dtype=DTYPE), vector(), matrix(x.side**2), x.prefix_rows(), None, None,
        *x.layout, False, False, False, None,
    ),
    "embed_patches_backward": lambda x: (
        x.rows(WIDTH), x.images(), meta(WIDTH, 3, PATCH, PATCH, dtype=DTYPE), None, None, *x.layout, False, x.prefix,
        [True] * 5,
    ),
    "merge_tokens": lambda x: (x.per_image(x.side**2, WIDTH), *x.layout, *x.grid, x.prefix_rows(), False),
    "merge_tokens_backward": lambda x: (x.rows(WIDTH), *x.layout, *x.grid, x.prefix),
    "scatter_back": lambda x: (x.rows(CLASSES), *x.layout, *x.grid, None),
    "scatter_back_backward": lambda x: (x.canvas().permute(0, 2, 3, 1), *x.layout, None),
    "scatter_into": lambda x: (x.canvas(), x.rows(CLASSES), *x.layout, None),
    "halt_tokens": lambda x: (x.rows(CLASSES), *x.layout, 0.9, None, True, 5, None, x.rows(CLASSES), x.canvas()),
    "exit_head": lambda x: (
        x.rows(WIDTH), vector(), vector(), matrix(CLASSES), vector(CLASSES), 1e-6, *x.layout, 0.9, None, 5, None,
        x.canvas(),
    ),
    "gather_tokens": lambda x: (x.rows(WIDTH), x.rows(dtype=torch.int32), x.cu_seqlens, False),
    "gather_tokens_backward": lambda x: (
        x.rows(WIDTH), x.rows(dtype=torch.int32), x.cu_seqlens, x.tokens * x.size
    ),
    "replace_prefix": lambda x: (
        x.rows(WIDTH), *x.layout, x.per_image(CLASSES, WIDTH) if x.size > 1 else matrix(CLASSES), x.prefix, False
    ),
    "replace_prefix_backward": lambda x: (
        x.rows(WIDTH), x.cu_seqlens, x.tokens * x.size, CLASSES, x.prefix, x.size > 1
    ),
    "upsample_argmax": lambda x: (x.canvas(), PATCH * x.side, PATCH * x.side),
}  # fmt: skip


def variants(op: str) -> Variants:
    """Over all token counts and batch sizes."""
    floor = getattr(importlib.import_module(f"step_kernels.triton.{op_modules[op]}"), op)
    with without_checks_of_values(), counted() as found:
        for tokens, size in itertools.product(TOKENS, BATCHES):
            floor(*CASES[op](Batch(tokens, size)))
    return found


def table() -> str:
    """Markdown: of each op's kernels, choices of its launcher, variants of the choice that has most, and all of them."""
    lines = ["| op | kernel | choices | variants of one, at most | in all |", "|---|---|---:|---:|---:|"]
    for op in sorted(CASES):
        found = variants(op)
        for name in sorted({name for name, _ in found}):
            counts = [len(keys) for (kernel, _), keys in found.items() if kernel == name]
            lines.append(f"| `{op}` | {name} | {len(counts)} | {max(counts)} | {sum(counts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
