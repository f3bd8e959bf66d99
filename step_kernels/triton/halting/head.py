"""The linear exit in one kernel: LayerNorm, matmul, softmax, decision; the survivors' scores never leave the registers.

Equivalent PyTorch: ``exit_head`` of ``reference/halting.py``. The LayerNorm's mean and centred variance are taken in two passes over a program's
tokens, the matmul reads them a third time: only the first comes from memory. Logits of up to 256 classes stay in registers, in two tiles;
more are taken in blocks and computed again for the canvas, by programs that write to it.
A block's log-probabilities go to its top-left cell; ``compaction.py`` copies them to its other cells, where the work is shared out evenly.
Bytes: the tokens once; on the canvas one cell per halted token.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..common.cells import multiple
from ..common.launch import architecture_class, power_of_2, uses_descriptors
from ..common.live_rows import live_count
from ..common.matrix import add_dot, load_vector
from ..common.tuned import Row
from .decision import finish_softmax, no_scores, record_decision, take_scores, threshold_of

# Not measured on a GPU yet. Rows of a program and columns of a step of its matmul, by what matmuls read: shared memory (wgmma and tcgen05, from
# 64 rows), registers (mma.sync), or fp32 numbers.
HEAD_TILES = {"shared": (64, 64), "registers": (32, 32), "float": (16, 32)}
HEAD_CLASSES = 128  # of one accumulator; there are two


@triton.jit
def _row_statistics(
    tokens_ptr, row, token_stride, dim, stop, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):
    """LayerNorm's mean and 1 / sqrt(variance + eps) of each row, [ROWS]. ``stop`` is ``dim``, or 0 to read nothing."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, stop, COLUMNS):
        total += _tokens(tokens_ptr, row, token_stride, start + tl.arange(0, COLUMNS), dim, EVEN)
    count = tl.cast(dim, tl.float32)
    mean = tl.div_rn(tl.sum(total, 1), count)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, stop, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        centred = _tokens(tokens_ptr, row, token_stride, column, dim, EVEN) - mean[:, None]
        if not EVEN:
            centred = tl.where((column < dim)[None, :], centred, 0.0)
        squares += centred * centred
    variance = tl.div_rn(tl.sum(squares, 1), count)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))


@triton.jit
def _tokens(tokens_ptr, row, token_stride, column, dim, EVEN: tl.constexpr):
    """A tile of tokens in fp32, [ROWS, COLUMNS]; zeros past ``dim``."""
    address = tokens_ptr + row[:, None] * token_stride + column[None, :]
    value = tl.load(address) if EVEN else tl.load(address, mask=(column < dim)[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def _weights(weight_ptr, stride, column_stride, label, column, dim, num_classes, EVEN: tl.constexpr):
    """The weights' tile [COLUMNS, CLASSES], transposed for the matmul; zeros past ``dim``, the last class for what is none."""
    address = weight_ptr + tl.minimum(label, num_classes - 1).to(tl.int64)[None, :] * stride
    address += column.to(tl.int64)[:, None] * column_stride
    return tl.load(address) if EVEN else tl.load(address, mask=(column < dim)[:, None], other=0.0)


@triton.jit
def _first_sum(bias_ptr, bias_stride, label, num_classes, ROWS: tl.constexpr):
    """What the products are added to, [ROWS, CLASSES]: the bias, or -inf for what is no class. Added last it would take registers beside them."""
    first = tl.zeros([1, label.shape[0]], tl.float32)
    if bias_ptr is not None:
        first = load_vector(bias_ptr, bias_stride, label, num_classes)
    first = tl.where((label < num_classes)[None, :], first, float("-inf"))
    return tl.broadcast_to(first, [ROWS, label.shape[0]])


@triton.jit
def _logits(
    inputs, strides, row, mean, scale, label, more_label, dim, stop, num_classes, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, MORE: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """LayerNorm(tokens) @ weight.T + bias in fp32 for the classes ``label`` [CLASSES] and ``more_label`` [MORE]; -inf for no class."""
    tokens_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr = inputs
    token_stride, norm_weight_stride, norm_bias_stride, weight_stride, weight_column_stride, bias_stride = strides
    logits = _first_sum(bias_ptr, bias_stride, label, num_classes, ROWS)
    more = _first_sum(bias_ptr, bias_stride, more_label, num_classes, ROWS)
    for start in range(0, stop, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        normed = (_tokens(tokens_ptr, row, token_stride, column, dim, EVEN) - mean[:, None]) * scale[:, None]
        if norm_weight_ptr is not None:
            normed *= load_vector(norm_weight_ptr, norm_weight_stride, column, dim)
        if norm_bias_ptr is not None:
            normed += load_vector(norm_bias_ptr, norm_bias_stride, column, dim)
        # Rounded to the tokens' dtype, as PyTorch's LayerNorm hands it to the matmul. Past dim an infinity times zero would be NaN.
        if not EVEN:
            normed = tl.where((column < dim)[None, :], normed, 0.0)
        normed = normed.to(tokens_ptr.dtype.element_ty)
        # In this order mma.sync's warps share out the classes; in the other, two of them form each product.
        if MORE > 1:
            weight = _weights(
                weight_ptr, weight_stride, weight_column_stride, more_label, column, dim, num_classes, EVEN
            )
            more = add_dot(more, normed, weight, PRECISION)
        weight = _weights(weight_ptr, weight_stride, weight_column_stride, label, column, dim, num_classes, EVEN)
        logits = add_dot(logits, normed, weight, PRECISION)
    return logits, more


@triton.jit
def _store_log_probabilities(
    canvas_ptr, logits, more, start, place, written, norm, class_stride, num_classes, MORE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """log-softmax of two tiles of ``written`` rows, of the classes from ``start`` on, into the cell of the canvas that each row's ``place`` names."""
    CLASSES: tl.constexpr = logits.shape[1]
    if VECTOR == 1 and CLASSES > 64:
        # Addresses of one half: the other one's are a constant further. Those of a whole tile of single classes take twice the registers.
        left, right = tl.split(tl.permute(tl.reshape(logits, [logits.shape[0], 2, CLASSES // 2]), (0, 2, 1)))
        _store_tile(canvas_ptr, left, start, place, written, norm, class_stride, num_classes)
        _store_tile(canvas_ptr, right, start + CLASSES // 2, place, written, norm, class_stride, num_classes)
    else:
        _store_tile(canvas_ptr, logits, start, place, written, norm, class_stride, num_classes)
    if MORE > 1:
        _store_tile(canvas_ptr, more, start + CLASSES, place, written, norm, class_stride, num_classes)


@triton.jit
def _store_tile(canvas_ptr, logits, start, place, written, norm, class_stride, num_classes):
    best, log_total = norm
    label = start + tl.arange(0, logits.shape[1])
    value = ((logits - best[:, None]) - log_total[:, None]).to(canvas_ptr.dtype.element_ty)
    address = canvas_ptr + place[:, None] + label.to(tl.int64)[None, :] * class_stride
    tl.store(address, value, mask=written[:, None] & (label < num_classes)[None, :])


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def head_kernel(
    confidence_ptr, labels_ptr, halted_ptr, counts_ptr, canvas_ptr,
    inputs, forced_ptr, threshold, cu_seqlens_ptr, cells_ptr,
    strides, forced_stride, canvas_strides, eps, batch_size, capacity, dim, num_classes,
    DEVICE_THRESHOLD: tl.constexpr, RANKED: tl.constexpr, IN_REGISTERS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, MORE: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What ``decide_kernel`` does, from tokens; log-probabilities to each block's top-left cell. Grid: cdiv(capacity, ROWS).

    ``inputs``: tokens, norm_weight, norm_bias, weight, bias; ``strides``: theirs. MORE, a second tile of classes, is for IN_REGISTERS only.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    is_block = tl.load(cells_ptr + row * 4 + 3, mask=row < live, other=0) > 0
    any_block = tl.max(is_block.to(tl.int32), 0)  # a program of tail rows reads no tokens
    stop = any_block * dim
    source = tl.minimum(row, live - 1)  # rows that are no block are read, too, and ignored
    mean, scale = _row_statistics(inputs[0], source, strides[0], dim, stop, eps, ROWS, COLUMNS, EVEN)
    best, label, total = no_scores(ROWS)
    first = tl.arange(0, CLASSES)
    second = CLASSES + tl.arange(0, MORE)
    logits = tl.zeros([ROWS, CLASSES], tl.float32)
    more = tl.zeros([ROWS, MORE], tl.float32)
    if IN_REGISTERS:
        # The branch is also for Triton 3.6, which for sm_100 compiles no reduction of a matmul in straight code.
        if any_block > 0:
            logits, more = _logits(
                inputs, strides, source, mean, scale, first, second, dim, stop, num_classes,
                PRECISION, ROWS, CLASSES, MORE, COLUMNS, EVEN,
            )  # fmt: skip
            best, label, total = take_scores(best, label, total, logits, first)
            if MORE > 1:
                best, label, total = take_scores(best, label, total, more, second)
    else:
        for start in range(0, any_block * num_classes, CLASSES):
            block, _ = _logits(
                inputs, strides, source, mean, scale, start + first, second, dim, stop, num_classes,
                PRECISION, ROWS, CLASSES, MORE, COLUMNS, EVEN,
            )  # fmt: skip
            best, label, total = take_scores(best, label, total, block, start + first)
    total, confidence = finish_softmax(best, total)
    written = record_decision(
        confidence_ptr, labels_ptr, halted_ptr, counts_ptr, forced_ptr, confidence, label, row, is_block,
        threshold_of(threshold, DEVICE_THRESHOLD), forced_stride, live, capacity, RANKED,
    )  # fmt: skip
    if canvas_ptr is not None:
        any_written = tl.max(written.to(tl.int32), 0)
        if any_written > 0:
            # A sum rather than three loads, which would be done again by every thread that stores a part of the row.
            column = tl.arange(0, 4)[None, :]
            cell = tl.load(cells_ptr + row[:, None] * 4 + column, mask=written[:, None], other=0).to(tl.int64)
            step = tl.where(column == 1, canvas_strides[2], tl.where(column == 2, canvas_strides[3], 0))
            step = tl.where(column == 0, canvas_strides[0], step)
            place = multiple(tl.sum(cell * step, 1), VECTOR)
            classes = multiple(num_classes, VECTOR)  # another name: where num_classes is 1, Triton makes it a constant
            norm = (best, tl.log(total))
            if IN_REGISTERS:
                _store_log_probabilities(
                    canvas_ptr, logits, more, 0, place, written, norm, canvas_strides[1], classes, MORE, VECTOR
                )
            else:
                for start in range(0, classes, CLASSES):
                    block, _ = _logits(
                        inputs, strides, source, mean, scale, start + first, second, dim, stop, classes,
                        PRECISION, ROWS, CLASSES, MORE, COLUMNS, EVEN,
                    )  # fmt: skip
                    _store_log_probabilities(
                        canvas_ptr, block, more, start, place, written, norm, canvas_strides[1], classes, MORE, VECTOR
                    )  # fmt: skip


@functools.lru_cache  # exit_head asks at each call
def row_of(num_classes: int, dim: int, dtype: torch.dtype, architecture: int) -> Row:
    """The table's rows of a program, columns of one step of its matmul, warps, and the most registers of a thread: 0, as many as it takes."""
    shared = "shared" if uses_descriptors(architecture) else "registers"
    rows, columns = HEAD_TILES["float" if dtype == torch.float32 else shared]
    in_registers, classes, more = _class_tiles(num_classes)
    even, limit = dim % columns == 0, 0
    if rows == 64:
        # sm_100 holds sums in tensor memory up to the end; a canvas in NCHW spills 16 bytes of them there.
        few = 160 if even and architecture_class(architecture) == "blackwell" else 64
        warps = 4 if in_registers and classes + more <= few else 8
        # With 128 registers two programs of 8 warps share a multiprocessor. Kept to as many where nothing spills for it.
        odd = num_classes % 2 == 1
        if warps == 8 and even and architecture_class(architecture) == "hopper":
            if (classes + more > 160 and num_classes % 16) or (odd and not in_registers):
                columns, limit = 32, 128
        elif warps == 8 and even and not (odd and in_registers):
            limit = 128
    else:
        warps = 8 if dtype == torch.float32 and ((classes == 128 and more == 1) or not in_registers) else 4
    return rows, columns, warps, limit


def candidates(num_classes: int, dim: int, dtype: torch.dtype, architecture: int) -> list[Row]:
    """Rows to be measured, the table's first; not in fp32. Fewer rows of a program leave more programs to even out."""
    found = [row_of(num_classes, dim, dtype, architecture)]
    if dtype != torch.float32:
        even, many = num_classes % 2 == 0, found[0][0] == 64
        found += [(16, 64, 4, 0)] if even or many else []  # else 8 bytes spill on sm_86
        found += [(64, 32, 8, 0)] if many else [(16, 32, 4, 0)]
        found += [(32, 32, 4, 0)] if even else []  # else 8 bytes spill on sm_90
    return [*dict.fromkeys(found)]


def _class_tiles(num_classes: int) -> tuple[bool, int, int]:
    """Whether the logits of all classes stay in registers, and the columns of their two tiles."""
    in_registers = num_classes <= 2 * HEAD_CLASSES
    widest = HEAD_CLASSES if in_registers else HEAD_CLASSES // 2  # the loop over classes holds more than the classes
    classes = max(16, min(power_of_2(num_classes), widest))
    rest = min(num_classes - classes, widest) if in_registers else 0  # 150 classes: 128 + 32 columns instead of 256
    return in_registers, classes, max(16, power_of_2(rest)) if rest > 0 else 1


def head_tiles(num_classes: int, dim: int, row: Row) -> dict[str, int | bool]:
    """Tile sizes, warps and stages of ``head_kernel`` by a row such as ``row_of``."""
    in_registers, classes, more = _class_tiles(num_classes)
    rows, columns, warps, limit = row
    return {
        "IN_REGISTERS": in_registers,
        "ROWS": rows,
        "CLASSES": classes,
        "MORE": more,
        "COLUMNS": columns,
        "EVEN": dim % columns == 0,
        "num_warps": warps,
        "num_stages": 2,
        **({"maxnreg": limit} if limit else {}),
    }
