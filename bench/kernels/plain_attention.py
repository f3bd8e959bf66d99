"""The PyTorch contenders of the attentions, each with a row of its own.

Each is built for one input: what depends on the lengths or the mask alone (indices, masks, block masks) is ready before the
clock starts, as in a model that builds it once for all of its blocks. What is timed takes q, k and v, and gives the output.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .contenders import compiled_when_called
from .examples import Example
from .operation import Attention, Rival, Unavailable

PADDED, VARLEN, NESTED, FLEX = "padded SDPA, key mask", "varlen_attn", "nested SDPA", "FlexAttention compiled"
DENSE_MASKED, GATHERED = "dense SDPA, key mask", "gathered + padded SDPA"
VARLEN_RUNS_ON = {("cuda", "bfloat16"), ("cuda", "float16")}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Padding:
    """A packed batch as [B, longest] rows.

    Attributes:
        shape: B and the longest image.
        rows: int64 [T], where each packed row stands.
        mask: bool [B, 1, 1, longest], the rows that hold a token.
    """

    shape: tuple[int, int]
    rows: Tensor
    mask: Tensor

    @classmethod
    def of(cls, example: Example) -> Padding:
        """The padding of an exact example; it waits for the device once."""
        lengths = example.layout.lengths()
        batch, longest = lengths.shape[0], max(1, int(lengths.max()))
        mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        return cls((batch, longest), mask.flatten().nonzero().flatten(), mask[:, None, None])

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, longest, D], zeros between the images."""
        batch, longest = self.shape
        room = packed.new_zeros(batch * longest, *packed.shape[1:])
        return room.index_copy(0, self.rows, packed).unflatten(0, self.shape).transpose(1, 2)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, H, longest, D] -> [T, H, D]."""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


def padded(example: Example) -> Attention:
    """Pad, SDPA with a key mask, and back."""
    padding = Padding.of(example)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = padding.pad(q), padding.pad(k), padding.pad(v)
        return padding.pack(F.scaled_dot_product_attention(queries, keys, values, attn_mask=padding.mask))

    return run


def varlen(example: Example) -> Attention:
    """`torch.nn.attention.varlen.varlen_attn`: FlashAttention on packed rows."""
    device, dtype = example["q"].device.type, str(example["q"].dtype).removeprefix("torch.")
    if (device, dtype) not in VARLEN_RUNS_ON:
        raise Unavailable(f"needs a CUDA device and bfloat16 or float16, this is {device} and {dtype}")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    cu_seqlens, longest = example.layout.cu_seqlens, int(example.layout.lengths().max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest))

    return run


def nested(example: Example) -> Attention:
    """SDPA on nested tensors in the jagged layout."""
    offsets = example.layout.cu_seqlens.long()
    lengths = example.layout.lengths()
    shortest, longest = int(lengths.min()), int(lengths.max())

    def jagged(packed: Tensor) -> Tensor:
        made = torch.nested.nested_tensor_from_jagged(packed, offsets, min_seqlen=shortest, max_seqlen=longest)
        return made.transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v)).transpose(1, 2).values()

    with torch.no_grad(), warnings.catch_warnings():  # "prototype stage", said once by the first call
        warnings.simplefilter("ignore")
        run(example["q"], example["k"], example["v"])
    return run


def flex(example: Example) -> Attention:
    """FlexAttention on the whole batch as one sequence; its block mask keeps images apart."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, rows = example.layout, example.layout.capacity
    image = torch.repeat_interleave(layout.lengths())

    def same_image(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return image[query] == image[key]

    block_mask = create_block_mask(same_image, None, None, rows, rows, device=str(layout.device))
    # One kernel per size: with dynamic sizes, torch 2.13 generates C++ that does not compile.
    attend = compiled_when_called(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return cast(Tensor, attend(*batched, block_mask=block_mask))[0].transpose(0, 1)

    return run


def dense(backend: SDPBackend, example: Example) -> Attention:
    """SDPA on [B, L] rows: equal lengths only, where it needs no mask."""
    lengths = example.layout.lengths()
    batch, length = lengths.shape[0], int(lengths[0])
    if not bool((lengths == length).all()):
        raise Unavailable("needs equal lengths")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batched = [x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*batched)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def dense_masked(example: Example) -> Attention:
    """SDPA with a key mask on the whole dense batch; rows that are not kept become zero."""
    keep = example["keep"]
    mask, kept = keep[:, None, None, :], keep[:, None, :, None]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(kept, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 0)

    return run


def gathered(example: Example) -> Attention:
    """index_select of the kept rows, padded SDPA, and back into zeros."""
    attend, rows = padded(example), example["keep"].flatten().nonzero().flatten()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(*(x.transpose(1, 2).flatten(0, 1).index_select(0, rows) for x in (q, k, v)))
        batch, _, length, _ = q.shape
        dense_rows = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, rows, out)
        return dense_rows.unflatten(0, (batch, length)).transpose(1, 2)

    return run


def padded_classes(example: Example) -> Attention:
    """Class queries [B, C, H, D] against padded keys and values, by SDPA with a key mask."""
    padding = Padding.of(example)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = padding.pad(k), padding.pad(v)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=padding.mask)
        return out.transpose(1, 2)

    return run


# The first one is the row that speed-ups are over.
RAGGED = (Rival(PADDED, padded), Rival(VARLEN, varlen), Rival(NESTED, nested), Rival(FLEX, flex, compiled=True))
DENSE = tuple(Rival(f"dense SDPA, {name}", functools.partial(dense, backend)) for name, backend in BACKENDS.items())
MASKED = (Rival(DENSE_MASKED, dense_masked), Rival(GATHERED, gathered))
CLASSES = (Rival(PADDED, padded_classes),)
NAMES = tuple(dict.fromkeys(rival.name for rival in (*RAGGED, *DENSE, *MASKED, *CLASSES)))
