"""Small models of every family of Hugging Face transformers that runs on packed tokens, and what its own layers make of merged and halted tokens.

``python tests/transformers_models.py`` (with tests/ and the checkout on the path) prints the table of families in docs/transformers.md.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_timm import timm  # noqa: F401  # transformers imports torchvision, too
from static_runs import UndefinedTails
from tensors import close, on_grid
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers, which pip install -e '.[dev]' brings", allow_module_level=True)

import transformers

from step_kernels import SupertokenLayout
from step_kernels.model import LinearExit, StepEncoder, Trace, VariancePolicy

DIM, PATCH, GRID = 32, 8, (6, 6)
SIZES: dict[str, Any] = {
    "hidden_size": DIM,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": PATCH * GRID[0],
    "patch_size": PATCH,
}
HIDDEN = {"intermediate_size": 48}

# Family: the class, and what its config differs in. Positions for 6 x 6 patches of 8 pixels.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTModel", HIDDEN),
    "DINOv2": ("Dinov2Model", {"mlp_ratio": 2, "hidden_act": "gelu_new"}),
    "DINOv2, SwiGLU": ("Dinov2Model", {"mlp_ratio": 2, "use_swiglu_ffn": True, "qkv_bias": False}),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {"mlp_ratio": 2, "num_register_tokens": 2}),
    "DINOv3": ("DINOv3ViTModel", {**HIDDEN, "num_register_tokens": 2, "pos_embed_rescale": None}),
    "DINOv3, gated": (
        "DINOv3ViTModel",
        {**HIDDEN, "use_gated_mlp": True, "rope_theta": 30.0, "pos_embed_rescale": None},
    ),
    "CLIP": ("CLIPVisionModel", HIDDEN),
    "SigLIP": ("SiglipVisionModel", HIDDEN),
    "SigLIP 2": ("Siglip2VisionModel", {**HIDDEN, "num_patches": math.prod(GRID)}),
    "EoMT": (
        "EomtForUniversalSegmentation",
        {"mlp_ratio": 2, "num_blocks": 1, "num_queries": 3, "num_upscale_blocks": 1},
    ),
}
INTERPOLATING = {"ViT", "CLIP", "SigLIP"}
# Square, oblong with as many cells as the model has positions, no multiples of the patch, another size.
PIXELS = {"own": (48, 48), "oblong": (32, 72), "uneven": (50, 61), "larger": (80, 64)}


def build(family: str, dtype: torch.dtype = torch.float64, *, kind: str | None = None, **changes: Any) -> Any:
    """A randomised model in eval mode; ``kind``: another of the family's classes."""
    name, differences = FAMILIES[family]
    maker = getattr(transformers, kind or name)
    settings = {**SIZES, **differences, **changes}
    if family == "SigLIP 2":
        del settings["image_size"]
    return randomised(maker(maker.config_class(**settings))).to(dtype).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter redrawn: at the initial values (zeros, ones, a LayerScale of 1) a lost one would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lambda" in name or ("norm" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(std=0.15, generator=generator)
        for name, tensor in model.named_buffers():
            if name == "attn_mask_probs":
                tensor.fill_(1.0)  # EoMT's masked attention, without the random part
    return model


def pictures(
    batch_size: int = 3, pixels: tuple[int, int] = PIXELS["own"], dtype: torch.dtype = torch.float64
) -> Tensor:
    """Noise with calm regions that differ from image to image, so that a variance policy merges raggedly."""
    height, width = pixels
    images = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))
    for number, image in enumerate(images):
        image[:, : height * (number + 1) // (batch_size + 1)] *= 0.01
        image[:, :, : width // 3] *= 0.01
    return images.to(dtype)


def inputs(family: str, images: Tensor) -> dict[str, Any]:
    """What the model is called with."""
    if family in INTERPOLATING:
        return {"pixel_values": images, "interpolate_pos_encoding": True}
    if family != "SigLIP 2":
        return {"pixel_values": images}
    rows, cols = (size // PATCH for size in images.shape[2:])
    columns = F.unfold(images[:, :, : rows * PATCH, : cols * PATCH], PATCH, stride=PATCH).transpose(1, 2)
    patches = (
        columns.unflatten(2, (3, PATCH * PATCH)).transpose(2, 3).flatten(2)
    )  # the channels of a pixel side by side
    ones = torch.ones(patches.shape[:2], dtype=torch.int64)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": ones,
        "spatial_shapes": torch.tensor([[rows, cols]] * len(images)),
    }


def exits_of(dim: int, dtype: torch.dtype) -> dict[int, LinearExit]:
    """After blocks 1 and 2: halt some tokens and leave some."""
    heads = {}
    for block in (1, 2):
        heads[block] = LinearExit(dim, 5, threshold=0.5).to(dtype)
        nn.init.normal_(heads[block].head.weight, std=0.15, generator=torch.Generator().manual_seed(block))
    return heads


def encoder_of(model: nn.Module, *, merged: bool = True, exits: bool = False) -> StepEncoder:
    """Unverified; merges what is calm."""
    heads = exits_of(DIM, next(model.parameters()).dtype) if exits else None
    return StepEncoder.from_transformers(model, VariancePolicy(0.1) if merged else None, heads, verify=False).eval()


def leaves(value: Any) -> list[Tensor]:
    """The tensors of nested outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value or ()) for leaf in leaves(item)]


def same(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """The same class with the same entries, in shape and value."""
    assert type(ours) is type(expected)
    if isinstance(expected, dict):
        assert list(ours) == list(expected)
    pairs = list(zip(leaves(ours), leaves(expected), strict=True))
    assert pairs
    for one, other in pairs:
        close(one, other, tolerance)


# transformers' own layers on the tokens that an image has left, image by image: no ragged op and no mask takes part.


def root_and_layers(model: Any) -> tuple[Any, Any]:
    root = getattr(model, "vision_model", model)
    holder = next((found for name in ("encoder", "model") if (found := getattr(root, name, None)) is not None), root)
    return root, holder.layer if hasattr(holder, "layer") else holder.layers


def dense_states(family: str, model: Any, images: Tensor, trace: Trace, last: int) -> Tensor:
    """What every cell holds after block ``last`` at the decisions of ``trace``: [B, prefix + rows * cols, D]."""
    layout, (root, layers) = trace.layout, root_and_layers(model)
    states = merged_tokens(family, root, images, layout)
    states = [root.pre_layrnorm(rows) for rows in states] if family == "CLIP" else states
    left = [torch.arange(len(rows)) for rows in states]
    stages = {stage.block: stage.halted for stage in trace.stages}
    dinov3 = family.startswith("DINOv3")
    turns = rotations(root.rope_embeddings, layout).split([len(rows) for rows in states]) if dinov3 else ()
    for number, layer in enumerate(layers[:last], start=1):
        # Some layers want the argument; those of transformers 5.0's ViT and DINOv2 do not know it.
        named: dict[str, Any] = dict.fromkeys({"attention_mask"} & inspect.signature(layer.forward).parameters.keys())
        for image, rows in enumerate(left):
            if dinov3:
                angles = turns[image][rows[layout.num_prefix :]]
                named["position_embeddings"] = angles.cos(), angles.sin()
            states[image][rows] = layer(states[image][rows][None], **named)[0]
        if number in stages and number < last:
            halted = stages[number].split([len(rows) for rows in left])
            left = [rows[~gone] for rows, gone in zip(left, halted, strict=True)]
    return on_grid(nn.utils.rnn.pad_sequence(states, batch_first=True), layout)


def merged_tokens(family: str, root: Any, images: Tensor, layout: SupertokenLayout) -> list[Tensor]:
    """For each image the tokens that enter the first layer: pooled pixels, embedded, and pooled positions; the grid is the model's own."""
    (rows, cols), prefix = layout.grid, layout.num_prefix
    blank = torch.zeros(1, 3, rows * PATCH, cols * PATCH, dtype=images.dtype)
    embed, named = root.embeddings, inputs(family, blank)
    named.pop("interpolate_pos_encoding", None)
    if family == "SigLIP 2":
        del named["pixel_attention_mask"]
    layer = embed.patch_embedding if hasattr(embed, "patch_embedding") else embed.patch_embeddings
    conv = getattr(layer, "projection", layer)
    bias = 0 if conv.bias is None else conv.bias
    others = embed(**named)[0]  # of a blank image: prefix tokens and positions, and the convolution's bias
    grid = (others[prefix:] - bias).T.unflatten(1, (rows, cols))[None]
    found = []
    for number, (start, end) in enumerate(
        zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True)
    ):
        tokens = [others[:prefix]]
        for _, row, column, side in layout.cells[start + prefix : end].tolist():
            pixels = images[number, :, row * PATCH : (row + side) * PATCH, column * PATCH : (column + side) * PATCH]
            small = F.avg_pool2d(pixels, side)
            embedded = (
                conv(small.permute(1, 2, 0).reshape(1, -1))
                if isinstance(conv, nn.Linear)
                else conv(small[None]).flatten(1)
            )
            tokens.append(
                embedded + F.avg_pool2d(grid[:, :, row : row + side, column : column + side], side).flatten(1)
            )
        found.append(torch.cat(tokens))
    return found


def rotations(rope: Any, layout: SupertokenLayout) -> Tensor:
    """Angles [tokens, head_dim], zero for prefix tokens: DINOv3's formula at the centres of blocks."""
    angles = torch.zeros(layout.num_tokens, 4 * len(rope.inv_freq), dtype=torch.float64)
    for token, (_, row, column, side) in enumerate(layout.cells.tolist()):
        if side:
            centre = [2 * (first + side / 2) / size - 1 for first, size in zip((row, column), layout.grid, strict=True)]
            angles[token] = torch.cat([2 * math.pi * place * rope.inv_freq.double() for place in centre]).repeat(2)
    return angles


def checkpointed(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Gradient checkpointing on; the older name will be gone in transformers 6."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def dinov2_of_timm(model: Any) -> Any:
    """transformers' DINOv2 with the weights of timm's."""
    depth, width = len(model.blocks), model.embed_dim
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    state = {"embeddings.cls_token": model.cls_token, "embeddings.position_embeddings": model.pos_embed}
    state["embeddings.mask_token"] = torch.zeros_like(model.cls_token[0])
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        where, _, part = stem.removeprefix("blocks.").partition(".")
        layer = f"encoder.layer.{where}"
        if part == "attn.qkv":
            for one, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{layer}.attention.{one}_proj.{kind}"] = rows
        elif part in ("ls1", "ls2"):
            state[f"{layer}.layer_scale{part[-1]}.lambda1"] = tensor
        elif part in names:
            state[f"{layer}.{names[part]}.{kind}"] = tensor
        elif stem in ("norm", "patch_embed.proj"):
            state[f"{'layernorm' if stem == 'norm' else 'embeddings.patch_embeddings.projection'}.{kind}"] = tensor
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": model.blocks[0].attn.num_heads}
    size, ratio = model.patch_embed.img_size, model.blocks[0].mlp.fc1.out_features // width
    found = transformers.Dinov2Model(
        transformers.Dinov2Config(**sizes, image_size=size[0], patch_size=14, mlp_ratio=ratio, layer_norm_eps=1e-6)
    )
    if "encoder.layer.0.attention.o_proj.weight" not in found.state_dict():  # transformers 5.0's names
        older = {
            f"{name}_proj": f"attention.{word}" for name, word in zip("qkv", ("query", "key", "value"), strict=True)
        }
        for new, old in (older | {"o_proj": "output.dense"}).items():
            state = {name.replace(f"attention.{new}", f"attention.{old}"): tensor for name, tensor in state.items()}
    found.load_state_dict(state)
    return found.to(model.pos_embed.dtype).eval()


# The table: what the tests hold every family to


@torch.no_grad()
def check_features(family: str) -> None:
    """Nothing merged: outputs are those of transformers, on four grids (EoMT has one)."""
    model = build(family)
    stand_in = StepEncoder.from_transformers(model).as_transformers()
    for pixels in PIXELS.values() if family != "EoMT" else (PIXELS["own"],):
        given = inputs(family, pictures(2, pixels))
        same(stand_in(**given), model(**given))


@torch.no_grad()
def check_hidden_states(family: str) -> None:
    model = build(family)
    given, encoder = inputs(family, pictures(2)), encoder_of(model, merged=False)
    if family != "EoMT":
        same(encoder.as_transformers()(**given, output_hidden_states=True), model(**given, output_hidden_states=True))
    expected = model(**given, output_hidden_states=True).hidden_states
    for block, state in encoder.hidden_states(pictures(2), range(encoder.vit.depth + 1)).items():
        close(state, expected[block], 1e-5)


@torch.no_grad()
def check_merged(family: str, exits: bool = False) -> None:
    """Merged tokens give what transformers' layers give for them, image by image."""
    model, images = build(family), pictures()
    encoder = encoder_of(model, exits=exits)
    trace, depth = encoder(images).trace, encoder.vit.depth
    assert set(trace.layout.cells[:, 3].tolist()) >= {1, 2} and len(set(trace.layout.lengths().tolist())) == 3
    assert all(stage.halted.any() and stage.layout.lengths().min() > layout_prefix(trace) for stage in trace.stages)
    expected = dense_states(family, model, images, trace, depth)
    close(encoder.hidden_states(images, [depth])[depth], expected, 1e-5)
    output = encoder.as_transformers()(**inputs(family, images))
    if family != "EoMT":
        root, _ = root_and_layers(model)
        norms = [getattr(root, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(root, name)]
        close(output.last_hidden_state, expected if family == "CLIP" else norms[0](expected), 1e-5)
    assert not torch.allclose(
        output[next(iter(output))], model(**inputs(family, images))[next(iter(output))], atol=1e-3
    )


def layout_prefix(trace: Trace) -> int:
    return trace.layout.num_prefix


def check_exits(family: str) -> None:
    """Halted tokens keep what they were; the others see them no more."""
    check_merged(family, exits=True)


@torch.no_grad()
def check_static(family: str) -> None:
    """Nothing trimmed, tails full of NaN: the same states."""
    model, images = build(family), pictures()
    encoder = encoder_of(model, exits=True)
    blocks = range(encoder.vit.depth + 1)
    expected = encoder.hidden_states(images, blocks)
    with UndefinedTails() as tails:
        states = encoder.hidden_states(images, blocks, static=True)
    assert tails.poisoned
    for block in blocks:
        close(states[block], expected[block])


CHECKS: dict[str, Callable[[str], None]] = {
    "features": check_features,
    "hidden states": check_hidden_states,
    "merged": check_merged,
    "exits": check_exits,
    "static": check_static,
}


def table() -> str:
    """Markdown of what test_family proves."""
    lines = [f"| library | family (class) | {' | '.join(CHECKS)} |", f"|---|---|{'---|' * len(CHECKS)}"]
    for family, (name, _) in FAMILIES.items():
        lines.append(f"| transformers | {family} (`{name}`) | {' | '.join('yes' for _ in CHECKS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for check in CHECKS.values():
        for family in FAMILIES:
            check(family)
    print(table())
