"""What the tests of rotary positions share: every rotation by hand, one token and one pair at a time; the calls held to the error rule."""

from __future__ import annotations

import math

import torch
from layouts import PlainLayout
from torch import Tensor

import step_kernels as sk


def table_by_hand(plain: PlainLayout, capacity: int, frequencies: Tensor, phases: Tensor | None) -> Tensor:
    """fp64 [capacity, 2 * P]."""
    pairs = len(frequencies)
    table = torch.zeros(capacity, 2 * pairs, dtype=torch.float64)
    for row, token in enumerate(plain.tokens()):
        for pair, (down, right) in enumerate(frequencies.tolist()):
            turns = (token.row + (token.side - 1) / 2) * down + (token.column + (token.side - 1) / 2) * right
            turns += 0.0 if phases is None else float(phases[pair])
            angle = 2 * math.pi * turns if token.side else 0.0
            table[row, pair], table[row, pairs + pair] = math.sin(angle), math.cos(angle)
    return table


def rotate_by_hand(x: Tensor, table: Tensor, live: int, rotate_half: bool) -> Tensor:
    """x [T, H, D] as complex numbers times exp(i * angle); zeros past the live rows."""
    pairs = x.shape[2] // 2
    first = torch.arange(pairs) if rotate_half else 2 * torch.arange(pairs)
    second = first + (pairs if rotate_half else 1)
    rotation = torch.complex(table[:live, pairs:], table[:live, :pairs])[:, None]
    turned = torch.complex(x[:live, :, first].double(), x[:live, :, second].double()) * rotation
    out = torch.zeros(x.shape, dtype=torch.float64)
    out[:live, :, first], out[:live, :, second] = turned.real, turned.imag
    return out


def table_of(layout: sk.SupertokenLayout, frequencies: Tensor, phases: Tensor | None) -> list[Tensor]:
    return [sk.rope_table(layout, frequencies, phases)]


def with_gradients(
    q: Tensor, k: Tensor, table: Tensor, cotangents: list[Tensor], rotate_half: bool, layout: sk.SupertokenLayout | None
) -> tuple[Tensor, ...]:
    """Both rotated, and the gradients of both."""
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = sk.ragged_rope(*leaves, table, rotate_half=rotate_half, layout=layout)
    return *(each.detach() for each in out), *torch.autograd.grad(out, leaves, cotangents)
