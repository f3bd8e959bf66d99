"""Linear layers on packed tokens, with the epilogues of a transformer block fused."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from .checks import Tail, check_choice, check_optional, check_tail, check_tensor
from .layout import SupertokenLayout
from .library import define, empty_of, those
from .packed import check_rows

Activation = Literal["gelu", "gelu_tanh"]
ACTIVATIONS = (None, *get_args(Activation))


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: SupertokenLayout | None = None,
    activation: Activation | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    tail: Tail = "zero",
) -> Tensor:
    """Matmul, bias, GELU, LayerScale and residual, for the rows up to the live count. Differentiable in every tensor.

    Equivalent PyTorch::

        y = F.linear(x, weight, bias)
        y = F.gelu(y, approximate="none" | "tanh")      # activation "gelu" | "gelu_tanh"
        y = y * gamma + residual

    Args:
        x: [T, K], floating point.
        weight: [N, K].
        bias: [N] or None.
        layout: the tokens' layout, whose capacity is T. None: all rows are live.
        activation: None, ``"gelu"`` (exact, by erf) or ``"gelu_tanh"``.
        gamma: LayerScale [N] or None.
        residual: [T, N] or None, added last.
        tail: rows past the live count: ``"zero"`` or ``"undefined"``.

    Returns:
        [T, N] in x's dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device.
    """
    cu_seqlens = check_rows("x", x, ("T", "K"), layout)
    check_tensor("weight", weight, ("N", x.shape[1]), like=x, like_name="x")
    outputs = (weight.shape[0],)
    check_optional("bias", bias, outputs, like=x, like_name="x")
    check_choice("activation", activation, ACTIVATIONS)
    check_optional("gamma", gamma, outputs, like=x, like_name="x")
    if residual is not None:
        shape = (x.shape[0], weight.shape[0])
        check_tensor("residual", residual, shape, like=x, like_name="x", contiguous_last=True)
    expected = None if layout is None else layout.expected_tokens
    fill = check_tail(tail)
    return _ragged_linear(x, weight, bias, cu_seqlens, activation, gamma, residual, fill, expected)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, cu_seqlens, activation, gamma, *_ = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens, gamma)
    ctx.activation = activation


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, cu_seqlens, gamma = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needed = [wanted[0], wanted[1], wanted[2], wanted[5], wanted[6]]
    grads = _ragged_linear_backward(grad, x, weight, bias, cu_seqlens, ctx.activation, gamma, needed)
    of_inputs, of_epilogue = those(needed[:3], grads[:3]), those(needed[3:], grads[3:])
    return *of_inputs, None, None, *of_epilogue, None, None


_ragged_linear_backward = define(
    "ragged_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, str? activation, "
    "Tensor? gamma, bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    module="linear",
    fake=lambda grad, x, weight, *rest: empty_of(
        rest[-1], grad, (x.shape, weight.shape, weight.shape[:1], weight.shape[:1], grad.shape)
    ),
)
_ragged_linear = define(
    "ragged_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, str? activation, Tensor? gamma, "
    "Tensor? residual, bool fill_tail, SymInt? expected_tokens) -> Tensor",
    module="linear",
    fake=lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
    setup_context=_setup,
    backward=_gradients,
)
