"""The output tail: bilinear upsampling and argmax in one kernel, the scores of a pixel living in registers only.

Equivalent PyTorch: ``F.interpolate(canvas, size, mode="bilinear", align_corners=False).argmax(1)``; see ``reference/upsample.py``.
Grid: one program per image and tile of pixels. Bytes: the canvas once (from L1 and L2 after that), labels once.

Between two neighbouring source rows and columns (a *quad*) all pixels share four sources, so where the output is much larger a tile is
(a part of) one quad: a class costs four scalar loads and a handful of operations per pixel. And a class whose four sources are all below
the smallest source of some other class wins nowhere in the quad and is left out. Other ratios load four sources per pixel.

Source positions are exact (integers over ``2 * outputs``), so every pixel belongs to one quad, whatever the sizes. A source of weight zero
takes no part: PyTorch's ``0 * inf`` is NaN, and would label pixels with a class that is impossible there.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.cells import multiple
from .common.launch import OPTIONS, ceil_div, on_device_of, power_of_2

# Not measured on a GPU yet. Counted in the sm_90 PTX of 16 x 16 quads: 6.5 instructions per pixel and class that is computed. In its machine
# code a class costs another 24 per thread (8 pixels), whether computed or left out: its loads, conversions and the comparison.
QUAD_PIXELS = 16  # a quad of fewer pixels leaves most of a warp without work: then sources are loaded per pixel
# At most: 16 pixels for a thread of the one warp, all of one column, so that they share horizontal sums.
QUAD_BLOCK = (32, 16)
# Of a quad: enough loads at a time to hide their latency. In pairs of classes, a [2] for tl.split, bf16 takes half as many, and as many more
# instructions to take the pairs apart: of four classes as many as now on sm_80 to 90, 258 for 250 on sm_100; on sm_80 28 programs fit for 32.
CLASSES_PER_STEP = 4
CLASSES_AT_A_TIME = 256  # in the search for a quad's bound: 8 per thread and source
TILE = (16, 32)  # of pixels that load their own sources: 4 per thread keep 16 loads in flight
TILE_WARPS = 4


@triton.jit
def first_output(quad, sources, outputs):
    """First output of a quad: quad q lies between sources q - 1 and q, output d at (2 * d + 1) * sources / (2 * outputs) - 1/2."""
    return tl.maximum(outputs * (2 * quad - 1) + sources - 1, 0) // (2 * sources)


@triton.jit
def _axis(tile, sources, outputs, parts, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """Along one axis of a tile: its first output and how many it has; per output [BLOCK], two sources (QUADS: one pair for all) and the
    second one's weight."""
    sources = tl.cast(sources, tl.int64)
    outputs = tl.cast(outputs, tl.int64)
    step = tl.arange(0, BLOCK)
    if QUADS:
        quad = tl.cast(tile // parts, tl.int64)
        start = first_output(quad, sources, outputs) + tile % parts * BLOCK
        stop = tl.minimum(first_output(quad + 1, sources, outputs), outputs)
        # How far beyond the first source, in units of 1 / (2 * outputs): exact in fp32 up to 2^23 outputs.
        beyond = ((2 * start + 1) * sources + outputs - quad * (2 * outputs)).to(tl.float32)
        beyond += step.to(tl.float32) * (2 * sources).to(tl.float32)
    else:
        start = tl.cast(tile, tl.int64) * BLOCK
        stop = outputs
        output = tl.minimum(start + step, outputs - 1)  # lanes past the end load, too
        position = (2 * output + 1) * sources + outputs
        quad = position // (2 * outputs)
        beyond = (position - quad * (2 * outputs)).to(tl.float32)
    weight = beyond / (2 * outputs).to(tl.float32)
    return start, stop - start, tl.maximum(quad - 1, 0), tl.minimum(quad, sources - 1), weight


@triton.jit
def _mix(first, second, weight, TOUCHES: tl.constexpr):
    """Weighted sum of two sources: not ``first + weight * (second - first)``, which is NaN where both are infinite."""
    mixed = (1.0 - weight) * first + weight * second
    if TOUCHES:
        mixed = tl.where(weight == 0.0, first, mixed)
    return mixed


@triton.jit
def _largest(sources):
    """The largest of four; NaN if there is one."""
    first = tl.maximum(sources[0], sources[1], propagate_nan=tl.PropagateNan.ALL)
    second = tl.maximum(sources[2], sources[3], propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quad_bound(corners, stride_class, classes, BLOCK: tl.constexpr):
    """Largest, over the classes, of the smallest of a quad's four sources: no winning score lies below it.

    That holds whatever minimum and maximum make of a NaN: a score without NaN is never below the smallest source that is a number.
    """
    bound = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, classes, BLOCK):
        index = start + tl.arange(0, BLOCK)
        address = index.to(tl.int64) * stride_class
        a = tl.load(corners[0] + address, mask=index < classes, other=float("-inf")).to(tl.float32)
        b = tl.load(corners[1] + address, mask=index < classes, other=float("-inf")).to(tl.float32)
        c = tl.load(corners[2] + address, mask=index < classes, other=float("-inf")).to(tl.float32)
        d = tl.load(corners[3] + address, mask=index < classes, other=float("-inf")).to(tl.float32)
        bound = tl.maximum(bound, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
    return tl.max(bound, 0)


@triton.jit
def _better(sources, across, down, best, label, candidate, TOUCHES_Y: tl.constexpr, TOUCHES_X: tl.constexpr):
    """Best score and its class so far [BLOCK_Y, BLOCK_X], after one more class."""
    upper = _mix(sources[0], sources[1], across, TOUCHES_X)
    lower = _mix(sources[2], sources[3], across, TOUCHES_X)
    score = _mix(upper, lower, down, TOUCHES_Y)
    better = ~(score <= best) & (best == best)  # as torch.argmax: the first of equals; the first NaN beats all
    return tl.where(better, score, best), tl.where(better, candidate, label)


@triton.jit
def _race(
    corners, stride_class, candidate, bound, across, down, best, label,
    QUADS: tl.constexpr, TOUCHES_Y: tl.constexpr, TOUCHES_X: tl.constexpr,
):  # fmt: skip
    """``_better``, unless the class can win nowhere in the quad: all its sources lie below the bound, and none is NaN."""
    address = tl.cast(candidate, tl.int64) * stride_class
    a = tl.load(corners[0] + address).to(tl.float32)
    b = tl.load(corners[1] + address).to(tl.float32)
    c = tl.load(corners[2] + address).to(tl.float32)
    d = tl.load(corners[3] + address).to(tl.float32)
    sources = (a, b, c, d)
    if QUADS:
        if ~(_largest(sources) < bound):
            best, label = _better(sources, across, down, best, label, candidate, TOUCHES_Y, TOUCHES_X)
    else:
        best, label = _better(sources, across, down, best, label, candidate, TOUCHES_Y, TOUCHES_X)
    return best, label


@triton.jit(do_not_specialize=["rows", "cols", "height", "tiles_y", "tiles_x"])
def label_kernel(
    labels_ptr, canvas_ptr, stride_image, stride_class, stride_row, stride_col,
    classes, rows, cols, height, width, tiles_y, tiles_x, parts_y, parts_x,
    QUADS: tl.constexpr, TOUCHES_Y: tl.constexpr, TOUCHES_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """labels [B, height, width]. Grid: B * tiles_y * tiles_x."""
    program = tl.program_id(0)
    image = (program // (tiles_y * tiles_x)).to(tl.int64)
    y, count_y, top, bottom, down = _axis(program // tiles_x % tiles_y, rows, height, parts_y, QUADS, BLOCK_Y)
    x, count_x, left, right, across = _axis(program % tiles_x, cols, width, parts_x, QUADS, BLOCK_X)
    if not QUADS:
        top, bottom, left, right = top[:, None], bottom[:, None], left[None, :], right[None, :]
    upper = image * stride_image + top * stride_row
    lower = image * stride_image + bottom * stride_row
    # Pointers to the first class of the four sources: scalars, or [BLOCK_Y, BLOCK_X].
    corners = (
        canvas_ptr + multiple(upper + left * stride_col, VECTOR), canvas_ptr + multiple(upper + right * stride_col, VECTOR),
        canvas_ptr + multiple(lower + left * stride_col, VECTOR), canvas_ptr + multiple(lower + right * stride_col, VECTOR),
    )  # fmt: skip
    bound = float("-inf")
    if QUADS:
        bound = _quad_bound(corners, stride_class, multiple(classes, VECTOR), BLOCK_C)
    across, down = across[None, :], down[:, None]
    best = tl.full([BLOCK_Y, BLOCK_X], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    whole = classes // STEP * STEP
    for start in range(0, whole, STEP):
        for i in tl.static_range(STEP):
            best, label = _race(
                corners, stride_class, start + i, bound, across, down, best, label, QUADS, TOUCHES_Y, TOUCHES_X
            )
    for candidate in range(whole, classes):
        best, label = _race(
            corners, stride_class, candidate, bound, across, down, best, label, QUADS, TOUCHES_Y, TOUCHES_X
        )
    step_y, step_x = tl.arange(0, BLOCK_Y)[:, None], tl.arange(0, BLOCK_X)[None, :]
    address = labels_ptr + (image * height + y + step_y) * width + x + step_x
    tl.store(address, label.to(labels_ptr.dtype.element_ty), mask=(step_y < count_y) & (step_x < count_x))


def upsample_argmax(canvas: Tensor, height: int, width: int) -> Tensor:
    batch_size, classes, rows, cols = canvas.shape
    labels = canvas.new_empty(batch_size, height, width, dtype=torch.uint8 if classes <= 256 else torch.int32)
    if batch_size == 0:
        return labels
    longest_y, longest_x = ceil_div(height, rows), ceil_div(width, cols)  # outputs of one quad
    quads = min(longest_y, longest_x) > 1 and longest_y * longest_x >= QUAD_PIXELS
    if quads:
        block_y = min(power_of_2(longest_y), QUAD_BLOCK[0])
        block_x = min(power_of_2(longest_x), QUAD_BLOCK[1])
        parts_y, parts_x = ceil_div(longest_y, block_y), ceil_div(longest_x, block_x)
        tiles_y, tiles_x = (rows + 1) * parts_y, (cols + 1) * parts_x
    else:
        block_y, block_x = TILE
        parts_y = parts_x = 1
        tiles_y, tiles_x = ceil_div(height, block_y), ceil_div(width, block_x)
    with on_device_of(canvas):
        label_kernel[(batch_size * tiles_y * tiles_x,)](
            labels, canvas, *canvas.stride(), classes, rows, cols, height, width, tiles_y, tiles_x, parts_y, parts_x,
            QUADS=quads, TOUCHES_Y=_touches(rows, height), TOUCHES_X=_touches(cols, width),
            BLOCK_Y=block_y, BLOCK_X=block_x, BLOCK_C=CLASSES_AT_A_TIME, STEP=CLASSES_PER_STEP if quads else 1,
            VECTOR=math.gcd(8, classes, *canvas.stride()[::2], canvas.stride(3)) if quads and canvas.stride(1) == 1 else 1,
            num_warps=1 if quads else TILE_WARPS, **OPTIONS,
        )  # fmt: skip
    return labels


def _touches(sources: int, outputs: int) -> bool:
    """Whether some output lies exactly at a source, where the other source's weight is zero."""
    common = math.gcd(sources, outputs)
    return sources // common % 2 == outputs // common % 2 == 1
