"""The first layer of a timm ViT on supertokens, by hand: where class token and position embeddings go.

`StepEncoder.from_timm` does all this. By hand it is:

- ``vit.pos_embed`` is [1, 1 + rows * cols, dim]: the class token's position, then one for each patch, row by row. The patches' part is
  ``embed_patches``' ``pos_embed``, [rows * cols, dim], for this grid: resize it first where the images have another one.
- ``prefix``, [num_prefix, dim], is what the first rows of every image hold: the class token plus its position (registers follow likewise).
- ``num_prefix`` is the policy's to know: it leaves these rows free. Forgotten, `embed_patches` says that it expected [0, dim] and got [1, dim].
- The class tokens are rows ``layout.cu_seqlens[:-1]`` of every tensor of tokens.
"""

import argparse

import timm
import torch

from step_kernels import embed_patches, ragged_attention, ragged_layer_norm, ragged_linear, scatter_back
from step_kernels.model import VariancePolicy


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--threshold", type=float, default=0.1, help="of the variance policy; 0 merges nothing")
    options = parser.parse_args()

    torch.manual_seed(0)
    vit = timm.create_model(options.model, pretrained=False).eval()
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    images[0, :, : images.shape[2] // 2] *= 0.01  # the upper half of the first one is calm
    num_prefix = vit.num_prefix_tokens  # 1

    layout = VariancePolicy(options.threshold)(images, patch_size=16, num_prefix=num_prefix).trim()
    class_position, positions = vit.pos_embed[0].split([num_prefix, vit.patch_embed.num_patches])
    projection = vit.patch_embed.proj
    prefix = vit.cls_token[0] + class_position
    tokens = embed_patches(images, layout, projection.weight, projection.bias, pos_embed=positions, prefix=prefix)

    for block in vit.blocks:
        norm1, attention, norm2, mlp = block.norm1, block.attn, block.norm2, block.mlp
        x = ragged_layer_norm(tokens, norm1.weight, norm1.bias, norm1.eps)
        q, k, v = attention.qkv(x).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
        x = ragged_attention(q, k, v, layout).flatten(1)
        tokens = ragged_linear(x, attention.proj.weight, attention.proj.bias, residual=tokens)
        x = ragged_layer_norm(tokens, norm2.weight, norm2.bias, norm2.eps)
        x = ragged_linear(x, mlp.fc1.weight, mlp.fc1.bias, activation="gelu")
        tokens = ragged_linear(x, mlp.fc2.weight, mlp.fc2.bias, residual=tokens)
    tokens = vit.norm(tokens)

    class_tokens = tokens[layout.cu_seqlens[:-1]]  # [2, dim]
    feature_map = scatter_back(tokens, layout)  # [2, dim, 14, 14]: class tokens cover no cell
    expected = vit.forward_features(images)  # [2, 1 + 196, dim]
    print(
        f"{layout.lengths().tolist()} tokens; class tokens {list(class_tokens.shape)}, features {list(feature_map.shape)}"
    )
    # Only the second image has all its patches: its tokens are timm's.
    difference = (class_tokens[1] - expected[1, 0]).abs().max().item()
    print(f"largest difference of the second image's class token from timm's: {difference:.1e}")


if __name__ == "__main__":
    main()
