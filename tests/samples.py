"""Arguments for every registered op, also strided ones: what opcheck runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layouts import AWKWARD, build
from tensors import channels_last, every_other_row, offset, swapped, wide_rows
from torch import Tensor

from step_kernels import attention_schedule

PLAIN = AWKWARD["prefix_5"]
BATCH, (ROWS, COLUMNS), CELLS = len(PLAIN.images), PLAIN.grid, PLAIN.grid[0] * PLAIN.grid[1]
PREFIX, DIM, CLASSES, PATCH = PLAIN.num_prefix, 6, 4, 2


def metadata(spare: int = 3) -> tuple[Tensor, Tensor]:
    layout = build(PLAIN, spare)
    return layout.cu_seqlens, layout.cells


def rows(width: int = DIM, grad: bool = False) -> Tensor:
    return torch.randn(len(PLAIN.tokens()) + 3, width, requires_grad=grad)


def heads(grad: bool = False) -> Tensor:
    return torch.randn(len(PLAIN.tokens()) + 3, 2, 8, requires_grad=grad)


def schedule() -> Tensor:
    return attention_schedule(metadata()[0], len(heads()))


def log_sums() -> Tensor:
    return torch.randn(2, len(heads()))


def dense(grad: bool = False) -> Tensor:
    return torch.randn(BATCH, 2, 9, 8, requires_grad=grad)


def keep() -> Tensor:
    return torch.tensor([[True] * 9, [True, False, False, True, True, False, True, False, True]])


def queries(grad: bool = False) -> Tensor:
    return torch.randn(BATCH, CLASSES, 2, 8, requires_grad=grad)


def class_vectors(grad: bool = False) -> Tensor:
    return torch.randn(BATCH, CLASSES, DIM, requires_grad=grad)


def per_class() -> Tensor:
    return torch.randn(BATCH, 2, CLASSES)


def images(grad: bool = False) -> Tensor:
    return torch.randn(BATCH, 3, ROWS * PATCH, COLUMNS * PATCH, requires_grad=grad)


def canvas() -> Tensor:
    return torch.randn(BATCH, CLASSES, ROWS, COLUMNS)


def where() -> Tensor:
    return torch.rand(len(PLAIN.tokens()) + 3) < 0.5


def parameters(grad: bool = True) -> tuple[Tensor, ...]:
    """weight, bias, pos_embed and prefix of embed_patches."""
    shapes = (DIM, 3, PATCH, PATCH), (DIM,), (CELLS, DIM), (PREFIX, DIM)
    return tuple(torch.randn(shape, requires_grad=grad) for shape in shapes)


def vector(size: int = DIM, grad: bool = True) -> Tensor:
    return torch.randn(size, requires_grad=grad)


def matrix(outputs: int, inputs: int = DIM, grad: bool = True) -> Tensor:
    return torch.randn(outputs, inputs, requires_grad=grad)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


KEPT = torch.ops.step_kernels.kept_rows(keep())
Samples = Callable[[], list[tuple[Any, ...]]]
STATISTICS = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
SAMPLES: dict[str, Samples] = {
    "layout_from_sides": lambda: [
        (build(PLAIN).sides(), 1),
        (build(PLAIN).sides().transpose(1, 2).contiguous().transpose(1, 2), 0),
    ],
    "layout_sides": lambda: [(*metadata(), ROWS, COLUMNS)],
    "resolve_layout": lambda: [
        ([torch.rand(2, 2, 3), torch.rand(2, 1, 1)], [2, 4], [0.5, 0.2], [], 4, 6, 1),
        ([torch.rand(2, 3, 2).mT], [2], [], [torch.tensor(0.5)], 4, 6, 0),
    ],
    "merge_patches": lambda: [
        (images(True), *metadata(), PATCH, False, None, None, True),
        (leaf(channels_last(images())), *metadata(), PATCH, True, *STATISTICS, True),
        (torch.zeros_like(images()).byte(), *metadata(), PATCH, False, *STATISTICS, True),
    ],
    "merge_patches_backward": lambda: [
        (rows(3 * PATCH**2), *metadata(), list(images().shape), PATCH, False, None),
        (wide_rows(rows(3 * PATCH**2)), *metadata(), list(images().shape), PATCH, True, STATISTICS[1]),
    ],
    "embed_patches": lambda: [
        (images(True), *parameters(), None, None, *metadata(), False, False, True, 5),
        (leaf(channels_last(images())), *parameters(), *STATISTICS, *metadata(0), True, True, True, None),
        (images(), parameters()[0], None, None, None, None, None, *metadata(0), False, True, True, None),
        (torch.zeros_like(images()).byte(), *parameters(), *STATISTICS, *metadata(), False, False, True, 5),
    ],
    "embed_patches_backward": lambda: [
        (rows(), images(), parameters(False)[0], None, None, *metadata(), False, PREFIX, [True] * 5),
        (
            every_other_row(rows()),
            channels_last(images()),
            parameters(False)[0],
            *STATISTICS,
            *metadata(),
            True,
            PREFIX,
            [False, True, False, True, False],
        ),
    ],
    "merge_tokens": lambda: [
        (torch.randn(BATCH, CELLS, DIM, requires_grad=True), *metadata(), ROWS, COLUMNS, matrix(PREFIX), True),
        (leaf(swapped(torch.randn(BATCH, CELLS, DIM))), *metadata(), ROWS, COLUMNS, None, True),
    ],
    "merge_tokens_backward": lambda: [(wide_rows(rows()), *metadata(), ROWS, COLUMNS, PREFIX)],
    "attention_schedule": lambda: [(metadata()[0], 40), (torch.zeros(1, dtype=torch.int32), 0)],
    "ragged_attention": lambda: [
        (heads(True), heads(True), heads(True), metadata()[0], None, None, None, True, True),
        (heads(), heads(), heads(), metadata()[0], None, None, schedule(), False, True),
        (
            leaf(offset(heads())),
            leaf(swapped(heads())),
            leaf(wide_rows(heads())),
            metadata()[0],
            0.3,
            rows(1)[:, 0],
            schedule(),
            True,
            True,
        ),
    ],
    "ragged_attention_backward": lambda: [
        (*[heads() for _ in range(5)], log_sums(), metadata()[0], None, None, None),
        (
            swapped(heads()),
            wide_rows(heads()),
            swapped(heads()),
            heads(),
            wide_rows(heads()),
            log_sums(),
            metadata()[0],
            0.3,
            rows(1)[:, 0],
            schedule(),
        ),
    ],
    "kept_rows": lambda: [(keep(),), (keep().T.contiguous().T,)],
    "masked_attention": lambda: [
        (dense(True), dense(True), dense(True), *KEPT, False, None, True),
        (leaf(offset(dense())), leaf(swapped(dense())), leaf(wide_rows(dense())), *KEPT, True, 0.3, True),
        (dense(), dense(), dense(), *KEPT, False, None, False),
    ],
    "masked_attention_backward": lambda: [
        (*(dense() for _ in range(5)), dense()[..., 0].contiguous(), *KEPT, False, None),
        (
            swapped(dense()),
            wide_rows(dense()),
            swapped(dense()),
            *(dense() for _ in range(2)),
            torch.randn(BATCH, 2, 9),
            *KEPT,
            True,
            0.3,
        ),
    ],
    "class_attention": lambda: [
        (queries(True), heads(True), heads(True), metadata()[0], None, True, True, True),
        (
            leaf(wide_rows(queries())),
            leaf(swapped(heads())),
            leaf(offset(heads())),
            metadata()[0],
            0.3,
            False,
            True,
            True,
        ),
        (queries()[:1].expand(BATCH, -1, -1, -1), heads(), heads(), metadata()[0], None, True, False, True),
    ],
    "class_attention_backward": lambda: [
        (queries(), rows(CLASSES), queries(), heads(), heads(), queries(), per_class(), metadata()[0], None, True),
        (
            None,
            wide_rows(rows(CLASSES)),
            queries()[:1].expand(BATCH, -1, -1, -1),
            wide_rows(heads()),
            swapped(heads()),
            queries(),
            per_class(),
            metadata()[0],
            0.3,
            True,
        ),
        (swapped(queries()), None, queries(), heads(), heads(), queries(), per_class(), metadata()[0], None, True),
    ],
    "class_scores": lambda: [
        (class_vectors(True), rows(grad=True), metadata()[0], 1.0, True),
        (leaf(class_vectors()[:1].expand(BATCH, -1, -1)), leaf(wide_rows(rows())), metadata()[0], 0.3, True),
    ],
    "class_scores_backward": lambda: [
        (rows(CLASSES), class_vectors(), rows(), metadata()[0], 1.0, True, [True, True]),
        (
            wide_rows(rows(CLASSES)),
            wide_rows(class_vectors()),
            wide_rows(rows()),
            metadata()[0],
            0.3,
            True,
            [False, True],
        ),
        (rows(CLASSES), class_vectors(), rows(), metadata()[0], 1.0, True, [True, False]),
    ],
    "scatter_back": lambda: [
        (rows(CLASSES, True), *metadata(), ROWS, COLUMNS, None),
        (leaf(wide_rows(rows(CLASSES))), *metadata(), ROWS, COLUMNS, where()),
    ],
    "scatter_back_backward": lambda: [
        (canvas().permute(0, 2, 3, 1), *metadata(), None),
        (channels_last(canvas()).permute(0, 2, 3, 1), *metadata(), where()),
    ],
    "scatter_into": lambda: [
        (canvas(), rows(CLASSES), *metadata(), None),
        (channels_last(canvas()), every_other_row(rows(CLASSES)), *metadata(), where()),
    ],
    "halt_tokens": lambda: [
        (rows(CLASSES), *metadata(), 0.5, None, True, 0, None, rows(CLASSES), canvas()),
        (rows(3).abs(), *metadata(), 0.0, torch.tensor(0.9), False, 2, None, rows(CLASSES), channels_last(canvas())),
        (wide_rows(rows(CLASSES)), *metadata(), 0.5, None, True, 1, where(), wide_rows(rows(CLASSES)), None),
    ],
    "exit_head": lambda: [
        (*head(), 1e-6, *metadata(), 0.5, None, 0, None, canvas()),
        (*head(), 1e-6, *metadata(), 0.0, torch.tensor(0.6), 1, where(), channels_last(canvas())),
        (*head(), 1e-6, *metadata(), 0.3, None, 1, None, canvas()),
        (wide_rows(rows()), None, None, matrix(CLASSES, grad=False), None, 1e-6, *metadata(), 0.5, None, 0, None, None),
    ],
    "gather_tokens": lambda: [
        (rows(grad=True), torch.tensor([0, 3, 4, 9, 0, 0], dtype=torch.int32), torch.tensor([0, 2, 4]).int(), True),
        (leaf(every_other_row(rows())), torch.tensor([1, 2], dtype=torch.int32), None, True),
    ],
    "gather_tokens_backward": lambda: [
        (rows()[:6], torch.tensor([0, 3, 4, 9, 0, 0], dtype=torch.int32), torch.tensor([0, 2, 4]).int(), len(rows())),
        (wide_rows(rows()[:2]), torch.tensor([1, 2], dtype=torch.int32), None, len(rows())),
    ],
    "replace_prefix": lambda: [
        (rows(grad=True), *metadata(), matrix(2), PREFIX, True),
        (leaf(wide_rows(rows())), *metadata(), matrix(7), PREFIX, True),
        (rows(grad=True), *metadata(), leaf(swapped(class_vectors())), PREFIX, False),
    ],
    "replace_prefix_backward": lambda: [
        (wide_rows(rows()), metadata()[0], len(rows()) + 6, 2, PREFIX, per_image) for per_image in (False, True)
    ],
    "rope_table": lambda: [
        (*metadata(), torch.randn(4, 2), torch.randn(4), True),
        (*metadata(0), torch.randn(2, 5, dtype=torch.float64).T, None, True),
    ],
    "ragged_rope": lambda: [
        (heads(True), heads(True), rows(8), metadata()[0], False, True),
        (leaf(swapped(heads())), leaf(wide_rows(heads())[:, :1]), wide_rows(rows(8)), metadata()[0], True, True),
        (offset(heads()), heads(), rows(8), None, True, True),
    ],
    "ragged_rope_backward": lambda: [
        (swapped(heads()), heads()[:, :1], wide_rows(rows(8)), metadata()[0], False),
        (heads()[:1].expand(len(heads()), -1, -1), heads(), rows(8), None, True),
    ],
    "upsample_argmax": lambda: [
        (canvas(), 9, 15),
        (channels_last(canvas()), 3, 4),
        (torch.randn(1, 257, 2, 3), 5, 5),
    ],
    "ragged_layer_norm": lambda: [
        (rows(grad=True), vector(), vector(), 1e-6, metadata()[0], True),
        (leaf(every_other_row(rows())), None, None, 1e-6, None, True),
    ],
    "ragged_layer_norm_backward": lambda: [
        (rows(), rows(), vector(grad=False), vector(grad=False), 1e-6, metadata()[0], [True] * 3),
        (wide_rows(rows()), every_other_row(rows()), None, None, 1e-6, None, [True, False, False]),
    ],
    "ragged_linear": lambda: [
        (
            rows(grad=True),
            matrix(CLASSES),
            vector(CLASSES),
            metadata()[0],
            "gelu",
            vector(CLASSES),
            rows(CLASSES, True),
            True,
            5,
        ),
        (leaf(wide_rows(rows())), matrix(CLASSES), None, None, None, None, None, True, None),
        (leaf(wide_rows(rows())), leaf(wide_rows(matrix(CLASSES))), None, None, "gelu_tanh", None, None, True, None),
    ],
    "ragged_linear_backward": lambda: [
        (
            rows(CLASSES),
            rows(),
            matrix(CLASSES, grad=False),
            vector(CLASSES, False),
            metadata()[0],
            "gelu",
            vector(CLASSES, False),
            [True] * 5,
        ),
        (
            wide_rows(rows(CLASSES)),
            wide_rows(rows()),
            matrix(CLASSES, grad=False),
            None,
            None,
            None,
            None,
            [True, False, False, False, False],
        ),
    ],
}


def head() -> tuple[Tensor, ...]:
    """tokens, norm_weight, norm_bias, weight and bias of exit_head."""
    return rows(), vector(grad=False), vector(grad=False), matrix(CLASSES, grad=False), vector(CLASSES, False)
