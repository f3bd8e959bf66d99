"""What the tests of exits share: random scores, heads and canvases, and the check of a whole Halting."""

from __future__ import annotations

import brute_force
import torch
from layouts import PlainLayout, read, same_layout
from tensors import poison
from torch import Tensor

import step_kernels as sk

NAN = float("nan")


def check_halting(
    halting: sk.Halting,
    expected: brute_force.Halted,
    values: Tensor,
    plain: PlainLayout,
    before: Tensor | None,
) -> None:
    """Every field, including what rows past the live count hold."""
    live, capacity = len(expected.labels), len(halting.halted)
    assert not halting.layout.trimmed and halting.layout.capacity == capacity
    assert read(halting.layout) == expected.layout
    count = len(expected.survivors)
    assert halting.rows.dtype == torch.int32 and halting.rows[:count].tolist() == expected.survivors
    assert not halting.rows[count:].any()
    assert halting.halted.dtype == torch.bool and halting.halted[:live].tolist() == expected.halted
    assert not halting.halted[live:].any()
    assert halting.labels.dtype == torch.int32 and halting.labels[:live].tolist() == expected.labels
    assert (halting.labels[live:] == -1).all()
    assert halting.confidence.dtype == torch.float32
    confidence = torch.tensor(expected.confidence, dtype=torch.float32)
    torch.testing.assert_close(halting.confidence[:live], confidence, rtol=3e-6, atol=0, equal_nan=True)
    assert not halting.confidence[live:].any()
    if before is None:
        assert halting.canvas is None
    else:
        wanted = brute_force.scatter_into(before, values, plain, expected.written)
        assert torch.equal(halting.canvas.nan_to_num(-7.0), wanted.nan_to_num(-7.0))


def make_scores(plain: PlainLayout, capacity: int, classes: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Confidences all over (1 / classes, 1), a NaN row now and then, NaN where nobody may look."""
    live = len(plain.tokens())
    scores = poison(3 * torch.randn(capacity, classes, dtype=torch.float64).to(dtype), live)
    for index, token in enumerate(plain.tokens()):
        if token.side == 0 or index % 11 == 7:
            scores[index, index % classes] = NAN
    return scores


def make_canvas(plain: PlainLayout, classes: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(len(plain.images), classes, *plain.grid, dtype=torch.float64).to(dtype)


def head_inputs(capacity: int, live: int, dim: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    """tokens (NaN past the live rows), norm_weight, norm_bias, weight, bias; logits of about two."""
    tokens = poison(2 * torch.randn(capacity, dim) + 0.5, live)
    weight = 2 * torch.randn(classes, dim) / dim**0.5
    inputs = [tokens, 1 + 0.2 * torch.randn(dim), 0.2 * torch.randn(dim), weight, torch.randn(classes)]
    return [x.to(dtype) for x in inputs]


def same_decisions(ours: sk.Halting, theirs: sk.Halting, *, labels: bool = True) -> None:
    """All but confidences and canvas, bit for bit, on whatever devices."""
    for name in ("halted", "rows", "labels") if labels else ("halted", "rows"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name).cpu()), name
    same_layout(ours.layout, theirs.layout)
