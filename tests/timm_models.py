"""Small timm models of every family that runs on packed tokens, and what timm's own blocks make of merged and halted tokens.

``python tests/timm_models.py`` (with tests/ and the checkout on the path) prints the table of families in docs/timm.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from real_timm import timm
from static_runs import UndefinedTails
from tensors import close, on_grid
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import LinearExit, StepEncoder, Trace, VariancePolicy

CLASSES = 5
SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": CLASSES}

PATCH_NORM = {"embed_norm_layer": nn.LayerNorm}

# Family: timm's name, and what differs from SMALL. Patch 16 or 14; grids of 6 x 8 patches.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "AugReg": ("vit_base_patch16_224.augreg_in21k", {}),
    "DeiT": ("deit_small_patch16_224", {}),
    "DeiT, distilled": ("deit_small_distilled_patch16_224", {"global_pool": "token"}),
    "DeiT3": ("deit3_small_patch16_224", {"dynamic_img_size": True}),
    "MAE": ("vit_base_patch16_224.mae", {"dynamic_img_size": True}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"dynamic_img_size": True}),
    "SO400M": ("vit_so400m_patch14_siglip_224", {"num_heads": 4}),
    "DINOv2": ("vit_small_patch14_dinov2", {}),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", {"mlp_ratio": 3}),
    "DINOv2 registers": ("vit_small_patch14_reg4_dinov2", {"dynamic_img_size": True}),
    "AIMv2": ("aimv2_large_patch14_224", {"dynamic_img_size": True}),
    "ViT, norms everywhere": (
        "vit_base_patch16_224",
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "final_norm": False, "global_pool": "max"}
        | PATCH_NORM,
    ),
    "EVA": ("eva_giant_patch14_224", {}),
    "EVA02": ("eva02_base_patch14_224", {"ref_feat_shape": (4, 5)}),
    "EVA02 tiny": ("eva02_tiny_patch14_224", {"dynamic_img_size": True}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3 plus": ("vit_small_plus_patch16_dinov3", {"qkv_bias": True, "qkv_fused": False}),
    "PE": ("vit_pe_core_base_patch16_224", {}),
    "ViT with RoPE": ("vit_medium_patch16_rope_reg1_gap_256", {"scale_attn_inner": True, "rope_grid_offset": 0.5}),
}
ROTARY = {"EVA02", "EVA02 tiny", "DINOv3", "DINOv3 plus", "PE", "ViT with RoPE"}


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """A randomised model in eval mode whose img_size is a grid of 6 x 8 patches."""
    name, differences = FAMILIES[family]
    patch = 14 if "patch14" in name else 16
    settings = {**SMALL, "img_size": (6 * patch, 8 * patch), **differences, **changes}
    return randomised(timm.create_model(name, pretrained=False, **settings), seed).to(dtype).eval()


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and k_bias redrawn: at timm's initial values (zeros, ones, LayerScale of 1e-5) a lost one would not show."""
    generator = torch.Generator().manual_seed(seed)
    named = [*model.named_parameters(), *((name, x) for name, x in model.named_buffers() if name.endswith("k_bias"))]
    with torch.no_grad():
        for name, tensor in named:
            if "gamma" in name or ("norm" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(std=0.15, generator=generator)
    return model


def pictures(model: Any, batch_size: int = 2, *, scale: int = 1, seed: int = 0) -> Tensor:
    """Noise with calm regions that differ from image to image, so that a variance policy merges raggedly."""
    height, width = (scale * size for size in model.patch_embed.img_size)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, height, width, generator=generator)
    for number, image in enumerate(images):
        image[:, : height * (number + 1) // (batch_size + 1)] *= 0.01
        image[:, :, : width // 3] *= 0.01
    return images.to(model.patch_embed.proj.weight.dtype)


def encoder_of(model: nn.Module, *, merged: bool = True, exits: bool = False) -> StepEncoder:
    """Unverified; merges what is calm; exits after blocks 1 and 2 halt some tokens and leave some."""
    policy = VariancePolicy(0.1) if merged else None
    heads = {}
    if exits:
        for block in (1, 2):
            heads[block] = LinearExit(model.embed_dim, CLASSES, threshold=0.5).to(model.patch_embed.proj.weight.dtype)
            nn.init.normal_(heads[block].head.weight, std=0.15, generator=torch.Generator().manual_seed(block))
    return StepEncoder.from_timm(model, policy, heads, verify=False).eval()


# timm's own modules on a padded batch with a key mask: no ragged op takes part.


def padded_features(model: Any, images: Tensor, trace: Trace) -> Tensor:
    """``forward_features`` at the decisions of ``trace``: [B, prefix + rows * cols, D]."""
    layout = trace.layout
    tokens = [model.norm_pre(rows) for rows in merged_tokens(model, images, layout)]
    x = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    alive = nn.utils.rnn.pad_sequence([torch.ones(len(rows), dtype=torch.bool) for rows in tokens], batch_first=True)
    stages = {stage.block: stage.halted for stage in trace.stages}
    final = torch.zeros_like(x)
    rope = {} if getattr(model, "rope", None) is None else {"rope": merged_rotations(model.rope, layout, x)}
    for number, block in enumerate(model.blocks, start=1):
        x = block(x, attn_mask=alive[:, None, None, :], **rope)
        if number in stages:
            halted = torch.zeros_like(alive)
            halted[alive] = stages[number]
            final = torch.where(halted[..., None], model.norm(x), final)
            alive = alive & ~halted
    final = torch.where(alive[..., None], model.norm(x), final)
    return on_grid(final, layout)


def merged_tokens(model: Any, images: Tensor, layout: SupertokenLayout) -> list[Tensor]:
    """For each image the tokens that enter the model: pooled pixels, embedded and normed, and pooled positions."""
    (rows, cols), prefix, patch = layout.grid, model.num_prefix_tokens, model.patch_embed.patch_size[0]
    zeros = images.new_zeros(1, rows * cols, model.embed_dim)
    positions = model._pos_embed(zeros.unflatten(1, (rows, cols)) if model.dynamic_img_size else zeros)
    positions = positions[0] if isinstance(positions, tuple) else positions
    grid = positions[:, prefix:].transpose(1, 2).unflatten(2, (rows, cols))
    found = []
    for number, (start, end) in enumerate(
        zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True)
    ):
        tokens = [positions[0, :prefix]]
        for _, row, column, side in layout.cells[start + prefix : end].tolist():
            pixels = images[number, :, row * patch : (row + side) * patch, column * patch : (column + side) * patch]
            embedded = model.patch_embed.proj(F.avg_pool2d(pixels, side)[None]).flatten(1)
            position = F.avg_pool2d(grid[:, :, row : row + side, column : column + side], side).flatten(1)
            tokens.append(model.patch_embed.norm(embedded) + position)
        found.append(torch.cat(tokens))
    return found


def merged_rotations(rope: Any, layout: SupertokenLayout, x: Tensor) -> Tensor:
    """[B, 1, L - prefix, 2 * head_dim] for a padded batch x: timm's table of the cells, moved to the centres of blocks."""
    tables = {side: rotations_of(rope, layout.grid, (side - 1) / 2) for side in (1, 2, 4, 8, 16)}
    found = x.new_zeros(len(x), 1, x.shape[1] - layout.num_prefix, tables[1].shape[1])
    starts = layout.cu_seqlens.tolist()
    for number, (image, row, column, side) in enumerate(layout.cells.tolist()):
        if side:
            position = number - starts[image] - layout.num_prefix
            found[image, 0, position] = tables[side][row * layout.grid[1] + column]
    return found


def rotations_of(rope: Any, grid: tuple[int, int], offset: float) -> Tensor:
    """timm's own sines and cosines of all cells: [rows * cols, 2 * head_dim]; each cell moved down and right by ``offset``."""
    moved = rope.grid_offset + offset
    if isinstance(rope, timm.layers.RotaryEmbeddingDinoV3):
        rope = copy.copy(rope)  # which shares its buffers
        rope.grid_offset = moved
        return rope.get_embed(shape=grid)
    settings = {name: getattr(rope, name) for name in ("dim", "temperature", "ref_feat_shape", "grid_indexing")}
    return torch.cat(timm.layers.build_rotary_pos_embed(grid, in_pixels=False, grid_offset=moved, **settings), -1)


# The README's table: what the tests hold every family to


def tolerance(family: str) -> float:
    """fp64; timm keeps rotary positions in fp32."""
    return 1e-5 if family in ROTARY else 1e-11


@torch.no_grad()
def check_features(family: str) -> None:
    """Nothing merged: ``forward_features`` and class scores are timm's."""
    model = build(family)
    images, encoder = pictures(model), StepEncoder.from_timm(model)
    features, expected = encoder.forward_features(images), model.forward_features(images)
    assert features.shape == expected.shape and features.is_contiguous()
    close(features, expected, tolerance(family))
    close(encoder.classify(images), model(images), tolerance(family))


@torch.no_grad()
def check_intermediates(family: str) -> None:
    """Nothing merged: feature maps are timm's, whatever is asked for."""
    model = build(family)
    images, encoder = pictures(model), encoder_of(model, merged=False)
    prefix = bool(model.num_prefix_tokens)
    for settings in (
        {"indices": [0, -1], "return_prefix_tokens": prefix},
        {"indices": 2, "norm": True, "output_fmt": "NLC", "intermediates_only": True},
        {"indices": [1], "stop_early": True},
    ):
        found, expected = (one.forward_intermediates(images, **settings) for one in (encoder, model))
        ours, timms = leaves(found), leaves(expected)
        assert len(ours) == len(timms) > 0
        for one, other in zip(ours, timms, strict=True):
            assert one.stride() == other.stride() or not other.is_contiguous()
            close(one, other, tolerance(family))


@torch.no_grad()
def check_merged(family: str) -> None:
    """Merged tokens give what timm's blocks give for them, padded and masked; so do maps after a block."""
    model = build(family)
    images, encoder = pictures(model, 3), encoder_of(model)
    trace = encoder(images).trace
    assert set(trace.layout.cells[:, 3].tolist()) >= {1, 2, 4} and len(set(trace.layout.lengths().tolist())) == 3
    features = encoder.forward_features(images)
    close(features, padded_features(model, images, trace), tolerance(family))
    last = encoder.forward_intermediates(images, indices=1, norm=True, output_fmt="NLC", intermediates_only=True)[0]
    close(last, features[:, model.num_prefix_tokens :])


@torch.no_grad()
def check_exits(family: str) -> None:
    """Halted tokens keep what they were; the others see them no more."""
    model = build(family)
    images, encoder = pictures(model, 3), encoder_of(model, exits=True)
    trace = encoder(images).trace
    assert all(stage.halted.any() and stage.layout.lengths().min() > model.num_prefix_tokens for stage in trace.stages)
    features = encoder.forward_features(images)
    close(features, padded_features(model, images, trace), tolerance(family))
    for norm in (True, False):
        settings = {"indices": 1, "norm": norm, "output_fmt": "NLC", "intermediates_only": True}
        cells = encoder.forward_intermediates(images, **settings)[0]
        close(cells if norm else model.norm(cells), features[:, model.num_prefix_tokens :])


@torch.no_grad()
def check_static(family: str) -> None:
    """Nothing trimmed, tails full of NaN: the same features and scores."""
    model = build(family)
    images, encoder = pictures(model, 3), encoder_of(model, exits=True)
    expected, trace = encoder.forward_features(images), encoder(images).trace
    with UndefinedTails() as tails:
        features = encoder.forward_features(images, static=True)
        scores = encoder.classify(images, replay=trace, static=True)
    assert tails.poisoned
    close(features, expected)
    close(scores, encoder.classify(images))


CHECKS: dict[str, Callable[[str], None]] = {
    "features": check_features,
    "intermediates": check_intermediates,
    "merged": check_merged,
    "exits": check_exits,
    "static": check_static,
}


def leaves(value: Any) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    return [value] if isinstance(value, Tensor) else [leaf for item in value for leaf in leaves(item)]


def passes(family: str, check: Callable[[str], None]) -> bool:
    try:
        check(family)
    except (AssertionError, NotImplementedError, RuntimeError):
        return False
    return True


def table(passes: Callable[[str, Callable[[str], None]], bool] = passes) -> str:
    """Markdown; a cell says yes where the check passes."""
    lines = [f"| family (timm) | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"]
    for family, (name, _) in FAMILIES.items():
        cells = ("yes" if passes(family, check) else "no" for check in CHECKS.values())
        lines.append(f"| {family} (`{name.partition('.')[0]}`) | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
