"""Functions of every public op, and the comparison of what they return compiled and not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from layouts import build
from samples import (
    BATCH,
    CLASSES,
    COLUMNS,
    DIM,
    PATCH,
    PLAIN,
    PREFIX,
    ROWS,
    canvas,
    heads,
    matrix,
    metadata,
    queries,
    rows,
)
from torch import Tensor

import step_kernels as sk


def pipeline(pixels: Tensor, scores: Tensor, embed: tuple[Tensor, ...], qkv: Tensor, classifier: Tensor) -> tuple:
    """Every public op once, in the order of a forward pass, its layout decided inside."""
    weight, bias, pos_embed, prefix = embed
    columns = (pixels.shape[2] // PATCH, pixels.shape[3] // PATCH)
    layout = sk.resolve_layout([scores], sides=(2,), thresholds=0.5, grid=columns, num_prefix=PREFIX)
    x = sk.embed_patches(pixels, layout, weight, bias, pos_embed=pos_embed, prefix=prefix)
    x = x + sk.merge_tokens(
        sk.merge_patches(pixels, layout, PATCH)[None, : columns[0] * columns[1], :DIM]
        .expand(pixels.shape[0], -1, -1)
        .contiguous(),
        layout,
    )
    normed = sk.ragged_layer_norm(x, bias, None, 1e-6, layout=layout)
    q, k, v = sk.ragged_linear(normed, qkv, layout=layout).unflatten(1, (3, 2, -1)).unbind(1)
    attended = sk.ragged_attention(q, k, v, layout.cu_seqlens, layout.max_seqlen).flatten(1)
    x = sk.ragged_linear(attended, weight.flatten(1)[:, :DIM], layout=layout, activation="gelu", residual=x)
    logits = sk.ragged_linear(x, classifier, layout=layout)
    halting = sk.halt_tokens(logits, layout, 0.4, keep_per_class=1)
    canvas = sk.scatter_back(logits, layout, where=halting.halted)
    tokens = sk.gather_tokens(x, halting)
    tokens, survivors = sk.replace_prefix(tokens, halting.layout, classifier)
    scattered = sk.scatter_back(sk.ragged_linear(tokens, classifier, layout=survivors), survivors)
    labels = sk.upsample_argmax((canvas + scattered).detach(), (24, 40))
    return canvas + scattered, tokens, halting.layout.sides(), labels


def pipeline_inputs(grid: tuple[int, int] = (ROWS, COLUMNS)) -> tuple:
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    embed = random(DIM, 3, PATCH, PATCH), random(DIM), random(grid[0] * grid[1], DIM), random(PREFIX, DIM)
    pixels = random(BATCH, 3, grid[0] * PATCH, grid[1] * PATCH)
    return pixels, random(BATCH, grid[0] // 2, grid[1] // 2), embed, random(3 * DIM, DIM), random(CLASSES, DIM)


def same_as_eager(compiled: Callable, function: Callable, inputs: tuple) -> None:
    """Outputs, and the gradients of the first output."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    results = []
    for call in (compiled, function):
        outputs = call(*inputs)
        cotangent = torch.linspace(-1, 1, outputs[0].numel()).view(outputs[0].shape)
        results.append((*outputs, *torch.autograd.grad(outputs[0], leaves, cotangent, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def writes(canvas: Tensor, values: Tensor, tokens: Tensor, weight: Tensor) -> tuple:
    """The ops that write in place, on a layout built inside."""
    layout = sk.SupertokenLayout.uniform(BATCH, (ROWS, COLUMNS), side=2, num_prefix=1)
    first = sk.halt_tokens(values, layout, 0.5, keep_per_class=1, canvas=canvas)
    second = sk.exit_head(tokens, None, None, weight, None, layout, torch.tensor(0.4), canvas=canvas)
    sk.scatter_into(canvas, values, layout, where=second.halted)
    return canvas, first.rows, second.layout.cells, second.confidence


def construction(cu_seqlens: Tensor, cells: Tensor, tokens: Tensor) -> tuple:
    layout = sk.SupertokenLayout(cu_seqlens, cells, (ROWS, COLUMNS), PREFIX)
    return sk.scatter_back(tokens, layout), layout.lengths(), layout.sides()


def round_trip(sides: Tensor) -> tuple:
    layout = sk.SupertokenLayout.from_sides(sides, num_prefix=1)
    return layout.sides(), layout.cells


def trimming(cu_seqlens: Tensor, cells: Tensor, tokens: Tensor) -> tuple:
    layout = sk.SupertokenLayout(cu_seqlens, cells, (ROWS, COLUMNS), PREFIX)
    halting = sk.halt_tokens(tokens, layout, 0.5).trim()
    return (sk.gather_tokens(tokens, halting),)


def attends(
    cu_seqlens: Tensor, cells: Tensor, q: Tensor, k: Tensor, v: Tensor, class_queries: Tensor, turns: Tensor
) -> tuple:
    """Rotary positions and every attention op; one output, through which all have gradients."""
    layout = sk.SupertokenLayout(cu_seqlens, cells, (ROWS, COLUMNS), PREFIX)
    q, k = sk.ragged_rope(q, k, sk.rope_table(layout, turns), layout=layout)
    schedule = sk.attention_schedule(cu_seqlens, q.shape[0])
    attended = sk.ragged_attention(q, k, v, cu_seqlens, layout.max_seqlen, schedule=schedule)
    of_classes = sk.class_attention(class_queries, k, v, cu_seqlens, layout.max_seqlen, return_scores=True)
    dense = class_queries.transpose(1, 2)
    kept = sk.masked_attention(dense, dense, dense, torch.ones_like(dense[:, 0, :, 0], dtype=torch.bool))
    scores = sk.class_scores(class_queries.flatten(2), k.flatten(1), cu_seqlens)
    return (torch.cat([x.flatten() for x in (attended, *of_classes, kept, scores)]),)


COMPILED = {
    attends: lambda: (*metadata(), heads(), heads(), heads(), queries(), torch.randn(4, 2)),
    writes: lambda: (canvas(), rows(CLASSES)[:14], rows()[:14], matrix(CLASSES, grad=False)),
    construction: lambda: (*metadata(), rows()),
    round_trip: lambda: (build(PLAIN).sides(),),
    trimming: lambda: (*metadata(), rows(CLASSES)),
}


def compiles_as_a_whole(dynamic: bool) -> None:
    """``pipeline``; with dynamic sizes on a second grid, too."""
    torch._dynamo.reset()
    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    same_as_eager(compiled, pipeline, pipeline_inputs())
    if dynamic:
        same_as_eager(compiled, pipeline, pipeline_inputs((6, 10)))


def compiles(function: Callable, dynamic: bool) -> None:
    """One of COMPILED: the same outputs, and the same left in what it was given."""
    torch._dynamo.reset()
    inputs = COMPILED[function]()
    copies = torch.utils._pytree.tree_map(torch.clone, inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ours, theirs in zip(compiled(*inputs), function(*copies), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(inputs, copies, strict=True):
        assert torch.equal(ours, theirs)


def attention_compiles_with_gradients(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attends, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    cu_seqlens, cells, *floats, turns = COMPILED[attends]()
    leaves = [x.requires_grad_() for x in floats]
    out, truth = compiled(cu_seqlens, cells, *leaves, turns)[0], attends(cu_seqlens, cells, *leaves, turns)[0]
    cotangent = torch.randn_like(truth)
    for ours, theirs in zip(
        (out, *torch.autograd.grad(out, leaves, cotangent)),
        (truth, *torch.autograd.grad(truth, leaves, cotangent)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
