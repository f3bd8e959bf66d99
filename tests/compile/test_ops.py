"""The public functions inside torch.compile(fullgraph=True), layouts built inside included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases.compiled import COMPILED, attention_compiles_with_gradients, compiles, compiles_as_a_whole
from torch import Tensor

import step_kernels as sk


def test_dynamic_sizes_compile_once() -> None:
    """Row counts change with every image; a recompilation each time would cost minutes."""
    torch._dynamo.reset()
    count = 0

    def counting(graph, example_inputs):
        nonlocal count
        count += 1
        return graph.forward

    def block(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = sk.ragged_linear(x, weight).unflatten(1, (3, 2, -1)).unbind(1)
        return sk.ragged_attention(q, k, v, cu_seqlens, 1000).flatten(1)

    compiled = torch.compile(block, fullgraph=True, backend=counting, dynamic=True)
    weight = torch.randn(3 * 8, 8)
    for length in (5, 9, 2, 77):
        x, cu_seqlens = torch.randn(length, 8), torch.tensor([0, 1, length], dtype=torch.int32)
        torch.testing.assert_close(compiled(x, weight, cu_seqlens), block(x, weight, cu_seqlens))
    assert count == 1


def test_another_bound_on_the_tokens_compiles_once_more_at_most() -> None:
    """As PyTorch's own varlen_attn does: the bound becomes a symbol."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    attend = torch.compile(
        lambda q, *segments: sk.ragged_attention(q, q, q, *segments), fullgraph=True, backend=counter
    )
    q, cu_seqlens = torch.randn(9, 2, 8), torch.tensor([0, 3, 9], dtype=torch.int32)
    for bound in range(6, 16):
        torch.testing.assert_close(attend(q, cu_seqlens, bound), sk.ragged_attention(q, q, q, cu_seqlens, bound))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", (False, True))
def test_compile_of_everything(dynamic: bool) -> None:
    compiles_as_a_whole(dynamic)


@pytest.mark.parametrize("dynamic", (False, True))
def test_attention_with_gradients(dynamic: bool) -> None:
    attention_compiles_with_gradients(dynamic)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("function", COMPILED)
def test_compile(function: Callable, dynamic: bool) -> None:
    compiles(function, dynamic)


@pytest.mark.parametrize("dynamic", (False, True))
def test_masked_attention(dynamic: bool) -> None:
    torch._dynamo.reset()

    def block(x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = x.unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return (sk.masked_attention(q, k, v, keep) + sk.masked_attention(q, k, v, keep, keys="all")).transpose(1, 2)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (9, 13) if dynamic else (9,):
        x = torch.randn(3, length, 24, requires_grad=True)
        keep = torch.rand(3, length) < torch.tensor([[2.0], [0.6], [-1.0]])  # a whole image, an empty one
        ours, theirs = compiled(x, keep), block(x, keep)
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
        cotangent = torch.randn_like(theirs)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in (ours, theirs)))


@pytest.mark.parametrize("dynamic", (False, True))
def test_class_attention(dynamic: bool) -> None:
    torch._dynamo.reset()

    def head(queries: Tensor, x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = x.unflatten(1, (2, 2, 4)).unbind(1)
        q = queries.expand(cu_seqlens.shape[0] - 1, -1, -1, -1)
        out, scores = sk.class_attention(q, k, v, cu_seqlens, 100, return_scores=True)
        return out, scores, sk.class_attention(q, v, k, cu_seqlens, 100)

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (9, 14) if dynamic else (9,):
        queries, x = torch.randn(3, 2, 4, requires_grad=True), torch.randn(length, 16, requires_grad=True)
        cu_seqlens = torch.tensor([0, 2, 2, length], dtype=torch.int32)
        results = [call(queries, x, cu_seqlens) for call in (compiled, head)]
        cotangents = [torch.randn_like(y) for y in results[1]]
        found = [torch.autograd.grad(ys, (queries, x), cotangents) for ys in results]
        for ours, theirs in zip((*results[0], *found[0]), (*results[1], *found[1]), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_an_export_takes_a_layout_by_its_tensors() -> None:
    """torch.export knows no layouts as inputs."""

    class Mixed(torch.nn.Module):
        def forward(self, tokens: Tensor, cu_seqlens: Tensor, cells: Tensor) -> Tensor:
            layout = sk.SupertokenLayout(cu_seqlens, cells, (4, 6), trimmed=True)
            q, k, v = tokens.unflatten(1, (3, 2, 4)).unbind(1)
            return sk.scatter_back(sk.ragged_attention(q, k, v, layout).flatten(1), layout)

    def inputs(side: int) -> tuple[Tensor, Tensor, Tensor]:
        sides = torch.ones(2, 4, 6, dtype=torch.int32)
        sides[0, :4, :4] = side
        layout = sk.SupertokenLayout.from_sides(sides).trim()
        return torch.randn(layout.capacity, 24), layout.cu_seqlens, layout.cells

    rows = {0: torch.export.Dim("rows", min=2, max=48)}
    program = torch.export.export(Mixed(), inputs(2), dynamic_shapes=(rows, None, rows)).module()
    other = inputs(4)
    torch.testing.assert_close(program(*other), Mixed()(*other))
