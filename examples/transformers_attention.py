"""Ragged attention in an attention module of Hugging Face's kind: query, key and value are linear layers of their own.

`SelfAttention` below has the names and shapes of transformers' ViTSelfAttention (which need not be installed). Its parameters work on packed tokens
as they are; all that changes is the forward pass, which is told where each image's rows begin. A class of transformers itself is patched the same
way: ``layer.attention.attention.forward = MethodType(ragged_forward, layer.attention.attention)``, and its blocks are called with packed rows.
"""

import argparse
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import SupertokenLayout, ragged_attention


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_attention_heads: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[batch, tokens, hidden_size], the same."""
        q, k, v = (
            layer(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def ragged_forward(self: SelfAttention, hidden_states: Tensor, layout: SupertokenLayout) -> Tensor:
    """[rows, hidden_size], the tokens of all images one after another."""
    q, k, v = (
        layer(hidden_states).unflatten(1, (self.num_attention_heads, -1))  # [rows, heads, head_dim]
        for layer in (self.query, self.key, self.value)
    )
    return ragged_attention(q, k, v, layout).flatten(1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--grid", type=int, default=32, help="patches per side of an image")
    options = parser.parse_args()

    torch.manual_seed(0)
    sides = torch.ones(2, options.grid, options.grid, dtype=torch.int32)
    sides[0, : options.grid // 2] = 4  # the upper half of the first image merges in blocks of 4 x 4 patches
    layout = SupertokenLayout.from_sides(sides, num_prefix=1).trim()  # and every image has a class token
    tokens = torch.randn(layout.num_tokens, options.hidden_size)

    attention = SelfAttention(options.hidden_size, options.hidden_size // 64).eval()
    alone = [attention(rows[None])[0] for rows in tokens.split(layout.lengths().tolist())]  # each image by itself
    attention.forward = MethodType(ragged_forward, attention)
    mixed = attention(tokens, layout)

    difference = (mixed - torch.cat(alone)).abs().max().item()
    assert difference < 1e-5, difference
    print(f"{layout.lengths().tolist()} tokens instead of {[layout.max_seqlen] * layout.batch_size}")
    print(f"largest difference from the module's own forward on each image: {difference:.1e}")


if __name__ == "__main__":
    main()
