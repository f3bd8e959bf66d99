"""Supertokens around an encoder of your own: merge patches, run it on packed tokens, scatter its features back.

Blocks of patches whose pixels hardly vary become one token each. The encoder below is any encoder: its linear layers
and norms see packed rows [tokens, dim] as they would see a dense batch, and only attention has to know which rows
belong to which image: `ragged_attention`. `scatter_back` restores the feature map that a segmentation or depth head
expects.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step_kernels import SupertokenLayout, merge_patches, ragged_attention, scatter_back
from step_kernels.model import VariancePolicy

PATCH = 16


class OwnBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
        q, k, v = self.qkv(self.norm1(tokens)).view(len(tokens), 3, -1, 64).unbind(1)  # [tokens, heads, 64] each
        mixed = ragged_attention(q, k, v, layout.cu_seqlens, layout.max_seqlen)
        tokens = tokens + self.proj(mixed.flatten(1))
        return tokens + self.mlp(self.norm2(tokens))


class OwnEncoder(nn.Module):
    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH * PATCH, dim)
        self.place = nn.Linear(3, dim)
        self.blocks = nn.ModuleList(OwnBlock(dim) for _ in range(depth))

    def forward(self, images: Tensor, layout: SupertokenLayout) -> Tensor:
        """[B, 3, H, W] -> feature maps [B, dim, rows, cols]."""
        row, column, side = layout.cells[:, 1:].float().unbind(1)
        place = torch.stack([row + side / 2, column + side / 2, side], 1) / max(
            layout.grid
        )  # a block's centre and size
        tokens = self.embed(merge_patches(images, layout, PATCH)) + self.place(place)
        for block in self.blocks:
            tokens = block(tokens, layout)
        return scatter_back(tokens, layout)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    images = torch.randn(2, 3, options.size, options.size)
    blurred = F.avg_pool2d(images, 9, stride=1, padding=4)
    images[0, :, : options.size // 2] = 0.1 * blurred[0, :, : options.size // 2]  # a calm upper half
    images[1, :, :, options.size // 4 :] = 0.1 * blurred[1, :, :, options.size // 4 :]

    encoder = OwnEncoder(options.dim, options.depth).eval()
    grid = (options.size // PATCH, options.size // PATCH)
    unmerged = SupertokenLayout.uniform(2, grid)
    policy = VariancePolicy.calibrate(images, reduction=2.5, patch_size=PATCH)
    merged = policy(images, patch_size=PATCH).trim()

    features = {layout: encoder(images, layout) for layout in (unmerged, merged)}
    assert features[merged].shape == features[unmerged].shape == (2, options.dim, *grid)
    saved = unmerged.num_tokens / merged.num_tokens
    similarity = F.cosine_similarity(features[merged], features[unmerged], dim=1).mean().item()
    print(f"{merged.lengths().tolist()} tokens instead of {unmerged.lengths().tolist()}: {saved:.1f}x fewer")
    print(
        f"feature maps {list(features[merged].shape)} either way, mean cosine {similarity:.2f} to those without merging"
    )


if __name__ == "__main__":
    main()
