"""Who halts: each token's confidence and label, the decision, and with ``keep_per_class`` the context that stays behind.

Equivalent PyTorch: ``_confidence`` and ``_most_confident`` of ``reference/halting.py``. ``decide_kernel`` reads the scores once, in blocks of
classes (any number of them), by an online softmax. ``keep_kernel`` counts, for each confident token, those of its image and class that rank
above it: L^2 comparisons of an image's L tokens out of cache are cheaper than a sort and need no order between programs.
Both leave the survivors of each block of rows counted, which is all that the compaction needs.
Bytes: the scores, 4 of each token's 16 bytes of cells; 9 bytes written per token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.cells import multiple
from ..common.live_rows import live_count, within

# Not measured on a GPU yet. The first row runs where `tune` has measured none; the others are its candidates.
# Rows of a program, classes at a time, warps. Pairs of 64 classes are one warp's, so no row is shared among warps; all classes at once, as 256, need
# 164 registers. Fewer rows leave the compaction more counts to sum.
DECIDE_ROWS = (16, 64, 4), (32, 64, 4), (4, 256, 1)
KEEP_ROWS = 32
KEEP_RIVALS = 64  # tokens that a block of rows is compared with at a time; 128 take half as many instructions more for each, and 255 registers


@triton.jit
def threshold_of(threshold, DEVICE_THRESHOLD: tl.constexpr):
    """The threshold as fp32, be it a number or a pointer to one."""
    return tl.load(threshold).to(tl.float32) if DEVICE_THRESHOLD else tl.cast(threshold, tl.float32)


@triton.jit
def no_scores(ROWS: tl.constexpr):
    """best, label and total, [ROWS] each, before any class was seen: see ``take_scores``."""
    best = tl.full([ROWS], float("-inf"), tl.float32)
    return best, tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.float32)


@triton.jit
def take_best(best, label, scores, column):
    """The largest score [ROWS] and its class, the lowest where several are largest, one block [ROWS, CLASSES] further; NaN is no score."""
    # What a maximum makes of NaN differs between the compiler and versions of the interpreter.
    block_best = tl.max(tl.where(scores == scores, scores, float("-inf")), 1)
    block_label = tl.min(tl.where(scores == block_best[:, None], column[None, :], 2147483647), 1)
    label = tl.where(block_best > best, block_label, label)
    return tl.where(block_best > best, block_best, best), label


@triton.jit
def take_scores(best, label, total, scores, column):
    """Online softmax, one block of fp32 scores further; total [ROWS]: the sum of exp(score - best), NaN behind a NaN or +inf."""
    new_best, label = take_best(best, label, scores, column)
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # -inf - -inf would be NaN
    total = total * tl.exp(best - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
    return new_best, label, total


@triton.jit
def finish_softmax(best, total):
    """The total, NaN also where all scores are -inf; and the largest entry of the softmax, exactly 1 where the other classes vanish."""
    total = tl.where(best == float("-inf"), float("nan"), total)
    return total, tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)


@triton.jit
def record_decision(
    confidence_ptr, labels_ptr, halted_ptr, counts_ptr, forced_ptr, confidence, label, row, is_block, threshold,
    forced_stride, live, capacity, RANKED: tl.constexpr,
):  # fmt: skip
    """Store what is decided of a program's rows; -> bool, the rows whose values go to the canvas.

    With RANKED the decision waits for ``keep_kernel``: confident tokens are written to the canvas whether they halt or stay as context.
    """
    confidence = tl.where(is_block, confidence, 0.0)
    label = tl.where(is_block & (confidence == confidence), label, -1)
    tl.store(confidence_ptr + row, confidence, mask=row < capacity)
    tl.store(labels_ptr + row, label, mask=row < capacity)
    confident = is_block & (confidence > threshold)  # NaN exceeds nothing
    written = confident
    if not RANKED:
        halted = confident
        if forced_ptr is not None:
            halted = is_block & (tl.load(forced_ptr + row * forced_stride, mask=is_block, other=0) != 0)
            written = halted | confident
        record_halted(halted_ptr, counts_ptr, halted, row, live, capacity)
    return written


@triton.jit
def record_halted(halted_ptr, counts_ptr, halted, row, live, capacity):
    """Store a program's halting decisions and how many of its live rows survive."""
    tl.store(halted_ptr + row, halted, mask=row < capacity)
    survives = (row < live) & (halted == 0)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(survives.to(tl.int32), 0))


@triton.jit(do_not_specialize=["batch_size", "capacity"])
def decide_kernel(
    confidence_ptr, labels_ptr, halted_ptr, counts_ptr,
    scores_ptr, forced_ptr, threshold, cu_seqlens_ptr, cells_ptr,
    score_stride, forced_stride, batch_size, capacity, num_classes,
    SOFTMAX: tl.constexpr, DEVICE_THRESHOLD: tl.constexpr, RANKED: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Confidence, label and, unless RANKED, halted of ROWS rows, the tail's included. Grid: cdiv(capacity, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    is_block = tl.load(cells_ptr + row * 4 + 3, mask=row < live, other=0) > 0
    best, label, total = no_scores(ROWS)
    undefined = tl.zeros([ROWS], tl.int32)
    stop = tl.max(is_block.to(tl.int32), 0) * num_classes  # a program of tail rows reads no scores
    for start in range(0, stop, CLASSES):
        column = start + tl.arange(0, CLASSES)
        address = scores_ptr + row[:, None] * multiple(score_stride, VECTOR) + column[None, :]
        mask = is_block[:, None] & (column < multiple(num_classes, VECTOR))[None, :]
        scores = tl.load(address, mask=mask, other=float("-inf")).to(tl.float32)
        if SOFTMAX:
            best, label, total = take_scores(best, label, total, scores, column)
        else:
            best, label = take_best(best, label, scores, column)
            undefined |= tl.max((scores != scores).to(tl.int32), 1)
    if SOFTMAX:
        total, confidence = finish_softmax(best, total)
    else:
        confidence = tl.where(undefined == 0, best, float("nan"))
    record_decision(
        confidence_ptr, labels_ptr, halted_ptr, counts_ptr, forced_ptr, confidence, label, row, is_block,
        threshold_of(threshold, DEVICE_THRESHOLD), forced_stride, live, capacity, RANKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch_size", "capacity", "keep_per_class"])
def keep_kernel(
    halted_ptr, counts_ptr, confidence_ptr, labels_ptr, threshold, cu_seqlens_ptr, cells_ptr,
    batch_size, capacity, keep_per_class, DEVICE_THRESHOLD: tl.constexpr, ROWS: tl.constexpr, RIVALS: tl.constexpr,
):  # fmt: skip
    """halted: confident tokens that at least ``keep_per_class`` of their image and class rank above. Grid: cdiv(capacity, ROWS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = live_count(cu_seqlens_ptr, batch_size, capacity)
    confidence = tl.load(confidence_ptr + row, mask=row < live, other=0.0)
    label = tl.load(labels_ptr + row, mask=row < live, other=-1)
    confident = (label >= 0) & (confidence > threshold_of(threshold, DEVICE_THRESHOLD))
    image = tl.load(cells_ptr + row * 4, mask=confident, other=0)
    first = within(tl.load(cu_seqlens_ptr + image, mask=confident, other=0), live)
    end = within(tl.load(cu_seqlens_ptr + image + 1, mask=confident, other=0), live)
    above = tl.zeros([ROWS], tl.int32)
    stop = tl.max(end, 0)  # 0, so that nothing is compared, where no row is confident
    for start in range(tl.min(tl.where(confident, first, live), 0), stop, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        other_confidence = tl.load(confidence_ptr + rival, mask=rival < stop, other=0.0)[None, :]
        other_label = tl.load(labels_ptr + rival, mask=rival < stop, other=-1)[None, :]
        rival = rival[None, :]
        same_group = (rival >= first[:, None]) & (rival < end[:, None]) & (other_label == label[:, None])
        tie_won = (other_confidence == confidence[:, None]) & (rival < row[:, None])
        ranks_above = same_group & ((other_confidence > confidence[:, None]) | tie_won)
        above += tl.sum(ranks_above.to(tl.int32), 1)
    record_halted(halted_ptr, counts_ptr, confident & (above >= keep_per_class), row, live, capacity)
