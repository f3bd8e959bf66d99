"""The attentions: ragged at spread, wide, equal and adversarial lengths, masked, and by class queries.

FLOPs are those of the two matmuls on the true lengths, 4 * sum(L^2) * heads * head_dim, whatever padding or a dense batch computes besides.
What depends on lengths or masks alone is ready before the clock starts, as in a model that builds it once for all of its blocks.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from step_kernels import attention_schedule, class_attention, masked_attention, ragged_attention

from .. import layouts
from ..engine import Case, NotRun, as_tuple
from ..layouts import Padding, has_varlen
from ..options import Options
from .inputs import CLASSES, Example, Source, of_lengths, spread
from .op import Op, Ready, asked, compiled

QKV = ("q", "k", "v")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Attend = Callable[..., Tensor]  # of q, k and v
sdpa: Attend = torch.nn.functional.scaled_dot_product_attention


def cases(options: Options) -> Iterator[Case]:
    sources = spread(options)
    yield from ragged("ragged_attention", options).cases(options, sources)
    for name, lengths in other_lengths(options.batch[0], sources[0].cells):
        if asked(options, name):
            op = ragged(name, options)
            yield from op.cases(options, of_lengths(options, lengths))
    for op in (MASKED_ATTENTION, CLASS_ATTENTION):
        if asked(options, op.name):
            yield from op.cases(options, sources)


def other_lengths(batch: int, cells: int) -> Iterator[tuple[str, list[int]]]:
    wide = np.linspace(0.1 * cells, cells, max(2, batch))
    yield "ragged_attention, wide lengths", wide.astype(int).tolist()
    for length in (cells // 4, cells):
        yield "ragged_attention, equal lengths", [length] * batch
    images = max(4, batch)  # one long among short ones, and an empty one at the end
    lengths = [cells if image == images // 2 else cells // 64 or 1 for image in range(images - 1)]
    yield "ragged_attention, adversarial lengths", [*lengths, 0]


def packed(s: Source) -> Example:
    names = (*QKV, "gradient")
    return s.example(names, dict.fromkeys(names, (s.live, *s.heads)))


def dense_batch(s: Source) -> Example:
    """Of each image as many tokens are kept as merging leaves blocks; [B, L, H, D] in memory, as a projection writes them."""
    counts = s.layout.lengths() - s.layout.num_prefix
    order = torch.rand((s.batch, s.cells), generator=s.generator, device=counts.device).argsort(1).argsort(1)
    numbers = {name: s.random(s.batch, s.cells, *s.heads).transpose(1, 2) for name in (*QKV, "gradient")}
    return Example(s.layout, {**numbers, "keep": order < counts[:, None]})


def with_classes(s: Source) -> Example:
    queries, keys = (s.batch, CLASSES, *s.heads), (s.live, *s.heads)
    return s.example({"k", "v"}, {"q": queries, "k": keys, "v": keys, "gradient": queries})


def on_packed(function: Callable[..., Any], e: Example, **more: Any) -> Callable[[], Any]:
    inputs = *e.of(*QKV), e.layout.cu_seqlens, e.layout.max_seqlen
    return functools.partial(function, *inputs, tail="undefined", **more)


def scheduled(e: Example) -> Callable[[], Tensor]:
    return on_packed(ragged_attention, e, schedule=attention_schedule(e.layout.cu_seqlens, e.layout.capacity))


def flops(e: Example, pairs: Tensor) -> float:
    return 4 * int(pairs.sum()) * e["k"].shape[1] * e["k"].shape[-1]


def dense_masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """SDPA with a key mask on the whole dense batch; rows that are not kept become zero."""
    return torch.where(keep[:, None, :, None], sdpa(q, k, v, attn_mask=keep[:, None, None]), 0)


def on_qkv(prepare: Callable[[Example], Attend]) -> Ready:
    return lambda e: functools.partial(prepare(e), *e.of(*QKV))


@on_qkv
def gathered(e: Example) -> Attend:
    """index_select of the kept rows, padded SDPA, and back into zeros."""
    keep = e["keep"]
    padding, rows = Padding(keep.sum(1)), keep.flatten().nonzero().flatten()

    def attend(*qkv: Tensor) -> Tensor:
        out = padding.self_attend(*(x.transpose(1, 2).flatten(0, 1).index_select(0, rows) for x in qkv))
        room = out.new_zeros(keep.numel(), *out.shape[1:]).index_copy(0, rows, out)
        return room.unflatten(0, keep.shape).transpose(1, 2)

    return attend


def on_rows(attend: Callable[..., Any], starts: str, longest: str, e: Example) -> Attend:
    """FlashAttention's like on packed rows; how they name the starts of images and the longest one."""
    if not has_varlen(e["q"]):
        raise NotRun("needs a CUDA device and bfloat16 or float16")
    bounds = {starts: e.layout.cu_seqlens, longest: int(e.layout.lengths().max())}
    named = {f"{name}_{side}": value for name, value in bounds.items() for side in "qk"}
    return lambda *qkv: as_tuple(attend(*qkv, **named), e)[0]


def varlen(backend: SDPBackend, e: Example) -> Attend:
    module: Any = torch.nn.attention.varlen
    if not hasattr(module, "_select_backend"):  # torch 2.14 chooses by itself, before there is FlashAttention 2 alone
        longest = int(e.layout.lengths().max())
        cudnn = hasattr(module, "_can_use_cudnn") and module._can_use_cudnn(*(e[x] for x in QKV), longest, [-1, -1])
        if cudnn != (backend == SDPBackend.CUDNN_ATTENTION):
            raise NotRun("needs torch 2.15: before, nobody chooses, and varlen_attn takes the other one here")
    return on_rows(by(backend, layouts.varlen_attn), "cu_seq", "max", e)


def installed(module: str, e: Example) -> Attend:
    try:
        attend = importlib.import_module(module).flash_attn_varlen_func
    except ImportError:
        raise NotRun(f"needs {module}") from None
    if module == "fa3_fwd_interface" and e["q"].requires_grad:
        raise NotRun("has no gradient")
    return on_rows(attend, "cu_seqlens", "max_seqlen", e)


def by(backend: SDPBackend, attend: Callable[..., Any]) -> Callable[..., Any]:
    def told(*qkv: Tensor, **named: Any) -> Any:
        try:
            with sdpa_kernel(backend):
                return attend(*qkv, **named)
        except RuntimeError as error:
            if str(error).startswith(("No viable backend", "No available kernel", f"{backend} was requested")):
                raise NotRun("needs another device or dtype: here, PyTorch has no such kernel") from None
            raise

    return told


def dense(backend: SDPBackend, e: Example) -> Attend:
    """SDPA on [B, L] rows, which needs no mask where all images are as long."""
    shape, attend = (e.layout.batch_size, int(e.layout.lengths()[0])), by(backend, sdpa)
    return lambda *qkv: attend(*(x.unflatten(0, shape).transpose(1, 2) for x in qkv)).transpose(1, 2).flatten(0, 1)


def flex(options: Options) -> Ready:
    """FlexAttention on the whole batch as one sequence; its block mask keeps images apart."""

    def prepare(e: Example) -> Attend:
        # One kernel per size: with dynamic sizes, torch 2.13 generates C++ that does not compile.
        run = compiled(options, flex_attention, dynamic=False)
        rows, image = e.layout.capacity, torch.repeat_interleave(e.layout.lengths())
        inside = create_block_mask(
            lambda batch, head, q, k: image[q] == image[k], None, None, rows, rows, device=str(image.device)
        )
        return lambda *qkv: run(*(x.transpose(0, 1)[None] for x in qkv), block_mask=inside)[0].transpose(0, 1)

    return on_qkv(prepare)


DENSE = {f"dense SDPA, {name}": on_qkv(functools.partial(dense, backend)) for name, backend in BACKENDS.items()}
FLASH = {
    "FlashAttention 3": "flash_attn_interface",
    "FlashAttention 3, fa3-fwd": "fa3_fwd_interface",
    "FlashAttention 4": "flash_attn.cute",
}
PACKED = {name: on_qkv(functools.partial(installed, module)) for name, module in FLASH.items()}
PACKED |= {f"varlen_attn, {x}": on_qkv(functools.partial(varlen, BACKENDS[x])) for x in ("flash", "cuDNN")}
ATTENTION: dict[str, Any] = {"compiled": (), "gradients": QKV}


def ragged(name: str, options: Options) -> Op:
    rivals = {
        **PACKED,
        "FlexAttention": flex(options),
    }
    return Op(
        name,
        packed,
        scheduled,
        {"SDPA, padded": lambda q, k, v, padding: padding.self_attend(q, k, v)},
        lambda e: (*e.of(*QKV), Padding(e.layout.lengths())),
        shape=lambda e: {"longest": int(e.layout.lengths().max()), "heads": e["q"].shape[1]},
        rivals={**rivals, **(DENSE if "equal" in name else {})},
        registered="ragged_attention",
        flops=lambda e: flops(e, e.layout.lengths().square()),
        **ATTENTION,
    )


MASKED_ATTENTION = Op(
    "masked_attention",
    dense_batch,
    lambda e: lambda: masked_attention(*e.of(*QKV, "keep")),
    {"dense SDPA, key mask": dense_masked},
    lambda e: e.of(*QKV, "keep"),
    rivals={"SDPA, gathered and padded": gathered},
    view=as_tuple,
    flops=lambda e: flops(e, e["keep"].sum(1).square()),
    **ATTENTION,
)
CLASS_ATTENTION = Op(
    "class_attention",
    with_classes,
    lambda e: on_packed(class_attention, e),
    {"SDPA, padded": lambda q, k, v, padding: padding.attend(q.transpose(1, 2), k, v).transpose(1, 2)},
    lambda e: (*e.of(*QKV), Padding(e.layout.lengths())),
    view=as_tuple,
    flops=lambda e: flops(e, CLASSES * e.layout.lengths()),
    **ATTENTION,
)
