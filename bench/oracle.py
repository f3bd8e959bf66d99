"""What a StepSegmenter must compute, as a dense ViT: merged and halted tokens are simulated with padding and key masks.

A supertoken is its block of pixels shrunk by plain pooling; a token that halts stays in the tensor but is masked as a key from then on,
and its prediction is written down. No op of the package takes part: decisions are read from a trace as plain numbers, parameters from the
modules by name. In fp64 it is the truth that benchmarks and tests compare with; in a lower dtype, what plain PyTorch makes of it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.model import StepSegmenter, Trace

Block = tuple[int, int, int]
Parameters = Any  # a module, read for its parameters and sizes by name


@torch.no_grad()
def segment(segmenter: StepSegmenter, images: Tensor, trace: Trace) -> Tensor:
    """The segmenter's map of class scores at the decisions of a trace.

    Args:
        segmenter: read for its parameters and sizes; its forward is not called.
        images: [B, C, H, W] in the parameters' dtype, padded with zeros to the patch size.
        trace: the layout at the input, and which tokens halt at each exit.

    Returns:
        [B, num_classes, rows, cols]: logits without exits, log-probabilities with exits; zero in cells that no token covers.

    Raises:
        ValueError: the trace contradicts itself, or belongs to other exits or to images of another size.
    """
    encoder = segmenter.encoder
    images = pad(images, encoder.vit.patch_embed.proj.kernel_size[0])
    blocks = blocks_of_images(trace, images.shape[0])
    x, keys = embed(encoder, images, trace.layout.grid, blocks)
    prefix = x.shape[1] - max(map(len, blocks))
    stages = {stage.block: stage for stage in trace.stages}
    exits = {int(number): head for number, head in encoder.exits.items()}
    if set(stages) != set(exits):
        raise ValueError(f"trace: expected decisions after blocks {sorted(exits)}, got {sorted(stages)}")
    predictions = x.new_zeros(*x.shape[:2], segmenter.decoder.num_classes)
    for number, block in enumerate(encoder.vit.blocks, start=1):
        x = transformer_block(block, x, keys)
        if number in exits:
            halted = torch.zeros_like(keys)
            halted[keys] = stages[number].halted  # packed rows are the live tokens in order
            written = log_softmax(exit_scores(exits[number], x))
            predictions = torch.where(halted[..., None], written, predictions)
            keys = keys & ~halted
            if keys.sum(1).tolist() != lengths(stages[number].layout.cu_seqlens):
                raise ValueError(f"trace: halted and layout of the stage after block {number} do not agree")
    scores = decode(segmenter.decoder, layer_norm(encoder.vit.norm, x), keys, prefix)
    if exits:
        scores = log_softmax(scores)
    predictions[:, prefix:] = torch.where(keys[:, prefix:, None], scores, predictions[:, prefix:])
    return assemble(predictions[:, prefix:], blocks, trace.layout.grid)


def pad(images: Tensor, patch_size: int) -> Tensor:
    """Zeros at the bottom and the right up to the patch size."""
    return F.pad(images, (0, -images.shape[3] % patch_size, 0, -images.shape[2] % patch_size))


def lengths(cu_seqlens: Tensor) -> list[int]:
    """Tokens of each image."""
    return [end - start for start, end in itertools.pairwise(cu_seqlens.tolist())]


def blocks_of_images(trace: Trace, batch_size: int) -> list[list[Block]]:
    """(row, column, side) of each image's supertokens, from the trace's numbers."""
    layout = trace.layout
    images: list[list[Block]] = [[] for _ in range(batch_size)]
    for image, row, column, side in layout.cells.tolist():
        if side:
            images[image].append((row, column, side))
    if lengths(layout.cu_seqlens) != [layout.num_prefix + len(blocks) for blocks in images]:
        raise ValueError("trace: cu_seqlens and cells of its layout do not agree")
    return images


def embed(
    encoder: Parameters, images: Tensor, grid: tuple[int, int], blocks: list[list[Block]]
) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D], prefix tokens first, and the mask [B, L] of those that are not padding."""
    vit = encoder.vit
    projection, patch_size = vit.patch_embed.proj, vit.patch_embed.proj.kernel_size[0]
    if tuple(images.shape[2:]) != (grid[0] * patch_size, grid[1] * patch_size):
        raise ValueError(f"trace: expected a grid that fits images of {list(images.shape[2:])} pixels, got {grid}")
    num_prefix = vit.num_prefix
    positions = position_map(vit, grid)
    longest = max(map(len, blocks))
    x = images.new_zeros(len(blocks), num_prefix + longest, projection.out_channels)
    keys = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for image, of_image in enumerate(blocks):
        patches, places = [], []
        for row, column, side in of_image:
            top, left, size = row * patch_size, column * patch_size, side * patch_size
            pixels = images[image : image + 1, :, top : top + size, left : left + size]
            patches.append(shrink(pixels, side, encoder.resample))
            place = positions[:, :, row : row + side, column : column + side]
            places.append(shrink(place, side, encoder.resample).flatten())
        end = num_prefix + len(of_image)
        x[image, :num_prefix] = vit.cls_token[0] + vit.pos_embed[0, :num_prefix]
        if of_image:
            embedded = F.conv2d(torch.cat(patches), projection.weight, projection.bias, stride=patch_size)
            x[image, num_prefix:end] = embedded.flatten(1) + torch.stack(places)
        keys[image, :end] = True
    return x, keys


def position_map(vit: Parameters, grid: tuple[int, int]) -> Tensor:
    """Position embeddings as a picture [1, D, rows, cols], resized when the grid is not the stored one."""
    stored = vit.pos_embed[0, vit.num_prefix :].T.unflatten(1, vit.config.grid)[None]
    if tuple(grid) == tuple(vit.config.grid):
        return stored
    rule = vit.config.position_rule
    wide = stored if stored.dtype == torch.float64 else stored.float()
    resized = F.interpolate(wide, tuple(grid), mode=rule, align_corners=False, antialias=rule == "bicubic")
    return resized.to(stored.dtype)


def shrink(picture: Tensor, side: int, resample: str) -> Tensor:
    """[1, C, H, W] -> [1, C, H / side, W / side]."""
    if resample == "area":
        return F.avg_pool2d(picture, side)
    return F.interpolate(picture, scale_factor=1 / side, mode="bilinear", align_corners=False)


def layer_norm(norm: Parameters, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def linear(layer: Parameters, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def log_softmax(scores: Tensor) -> Tensor:
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.log_softmax(-1).to(scores.dtype)


def transformer_block(block: Parameters, x: Tensor, keys: Tensor) -> Tensor:
    """Pre-norm attention and MLP; only tokens in ``keys`` [B, L] are attended to."""
    batch, length, dim = x.shape
    heads = block.attn.num_heads
    qkv = linear(block.attn.qkv, layer_norm(block.norm1, x)).view(batch, length, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
    x = x + linear(block.attn.proj, mixed.transpose(1, 2).flatten(2))
    hidden = F.gelu(linear(block.mlp.fc1, layer_norm(block.norm2, x)))
    return x + linear(block.mlp.fc2, hidden)


def exit_scores(head: Parameters, x: Tensor) -> Tensor:
    """Class logits of every token: a linear head, or scaled cosines to the classes' vectors."""
    normed = layer_norm(head.norm, x)
    if hasattr(head, "classes"):
        return head.scale * (F.normalize(normed, dim=-1) @ F.normalize(head.classes, dim=-1).T)
    return linear(head.head, normed)


def decode(decoder: Parameters, x: Tensor, keys: Tensor, prefix: int) -> Tensor:
    """Logits [B, L - prefix, C] of the patch tokens; the decoder sees those in ``keys`` only."""
    patches, live = x[:, prefix:], keys[:, prefix:]
    if hasattr(decoder, "head"):
        return linear(decoder.head, patches)
    batch, classes = x.shape[0], decoder.cls_emb.shape[1]
    joint = torch.cat([linear(decoder.proj_dec, patches), decoder.cls_emb.expand(batch, -1, -1)], dim=1)
    live = torch.cat([live, live.new_ones(batch, classes)], dim=1)
    for block in decoder.blocks:
        joint = transformer_block(block, joint, live)
    joint = layer_norm(decoder.decoder_norm, joint)
    patches = F.normalize(joint[:, :-classes] @ decoder.proj_patch, dim=-1)
    prototypes = F.normalize(joint[:, -classes:] @ decoder.proj_classes, dim=-1)
    return layer_norm(decoder.mask_norm, patches @ prototypes.mT)


def assemble(predictions: Tensor, blocks: list[list[Block]], grid: tuple[int, int]) -> Tensor:
    """Each token's prediction in every cell that it covers."""
    canvas = predictions.new_zeros(len(blocks), predictions.shape[2], *grid)
    for image, of_image in enumerate(blocks):
        for index, (row, column, side) in enumerate(of_image):
            canvas[image, :, row : row + side, column : column + side] = predictions[image, index, :, None, None]
    return canvas
