"""Early exits in a plain attention module: only the kept tokens attend, one changed line.

`DenseAttention` is what most ViT code has. `PrunedAttention` shares its parameters and calls `masked_attention` in
place of PyTorch's own: rows that are not kept take no part, and are zeros before the projection. So code that works
on dense [batch, length, dim] tensors drops tokens without gathers, padding or a loop over images, however many each
image keeps.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import masked_attention


class DenseAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        batch, length, _ = tokens.shape
        return self.qkv(tokens).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, tokens: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads(tokens))
        return self.proj(out.transpose(1, 2).flatten(2))


class PrunedAttention(DenseAttention):
    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        out = masked_attention(*self.heads(tokens), keep)  # the changed line
        return self.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="tokens per image")
    parser.add_argument("--dim", type=int, default=384)
    options = parser.parse_args()

    torch.manual_seed(0)
    dense = DenseAttention(options.dim, num_heads=options.dim // 64)
    pruned = PrunedAttention(options.dim, num_heads=options.dim // 64)
    pruned.load_state_dict(dense.state_dict())

    tokens = torch.randn(3, options.length, options.dim)
    shares = torch.tensor([0.8, 0.6, 0.3])  # of the tokens that each image keeps
    keep = torch.rand(3, options.length) < shares[:, None]

    out = pruned(tokens, keep)
    alone = [
        dense(image[kept][None])[0] for image, kept in zip(tokens, keep, strict=True)
    ]  # each image without the others
    difference = (out[keep] - torch.cat(alone)).abs().max().item()
    assert difference < 1e-5, difference

    counts = keep.sum(1).tolist()
    pairs = sum(count**2 for count in counts) / keep.numel() / options.length
    print(f"{counts} of {options.length} tokens kept: {pairs:.0%} of the query-key pairs computed")
    print(f"largest difference from running each image on its kept tokens alone: {difference:.1e}")


if __name__ == "__main__":
    main()
