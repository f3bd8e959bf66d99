"""What users do to a library that nobody planned for: huge arguments, odd numbers, saving, pickling."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from layouts import AWKWARD, build

import step_kernels as sk
from step_kernels import selfcheck
from step_kernels.reference import linear

LAYOUT = build(AWKWARD["prefix_5"], 3)


def test_messages_stay_short_whatever_comes():
    for value in (torch.zeros(2, 3, 64, 64).tolist(), np.zeros((2, 3, 64, 64)), LAYOUT, "x" * 10_000):
        with pytest.raises(TypeError, match="images: expected a tensor") as caught:
            sk.merge_patches(value, LAYOUT, 4)
        assert len(str(caught.value)) < 200


def test_numpy_numbers_are_numbers():
    tokens = torch.randn(LAYOUT.capacity, 8)
    assert torch.equal(
        sk.ragged_layer_norm(tokens, None, None, np.float32(1e-6)), sk.ragged_layer_norm(tokens, None, None, 1e-6)
    )
    assert sk.SupertokenLayout.uniform(np.int64(2), (np.int32(3), 4)).num_tokens == 24


def test_layouts_and_decisions_can_be_saved_copied_and_pickled():
    halting = sk.halt_tokens(torch.randn(LAYOUT.capacity, 4), LAYOUT, 0.4)
    file = io.BytesIO()
    torch.save((LAYOUT, halting), file)
    file.seek(0)
    for layout, decision in (
        torch.load(file),
        copy.deepcopy((LAYOUT, halting)),
        pickle.loads(pickle.dumps((LAYOUT, halting))),
    ):
        assert torch.equal(layout.cells, LAYOUT.cells) and layout.grid == LAYOUT.grid
        assert torch.equal(decision.rows, halting.rows)


def test_a_canvas_that_overlaps_itself_is_refused():
    values = torch.randn(LAYOUT.capacity, 4)
    canvas = torch.zeros(400).as_strided((2, 4, 4, 6), (50, 10, 2, 1))
    with pytest.raises(ValueError, match="canvas: expected memory of its own"):
        sk.scatter_into(canvas, values, LAYOUT)


def test_an_idle_channel_costs_no_second_attention(monkeypatch):
    """Only rows that are zero throughout are computed again, and only a chunk of them at a time."""
    from step_kernels.reference import attention

    calls = []
    sdpa = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, *rest, **named: calls.append(q.shape[2]) or sdpa(q, *rest, **named),
    )
    monkeypatch.setattr(attention, "QUERY_CHUNK", 16)
    q, k, v = torch.randn(3, 40, 2, 8)
    v[:, :, 0] = 0
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    sk.ragged_attention(q, k, v, cu_seqlens, 40)
    assert calls == [40]
    v[:, 0] = 0
    assert not sk.ragged_attention(q, k, v, cu_seqlens, 40)[:, 0].any()
    assert calls == [40, 40, 16, 16, 8]


def test_the_self_check_sees_an_error_that_the_reference_shares(monkeypatch):
    """On a CPU the op and its peer are one function."""
    right = linear.F.linear

    def wrong(x, *rest):
        return right(x, *rest) * (1.5 if x.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(linear.F, "linear", wrong)
    failed = {outcome.op for outcome in selfcheck.run(torch.device("cpu"), torch.float32) if not outcome.passed}
    assert "ragged_linear" in failed
