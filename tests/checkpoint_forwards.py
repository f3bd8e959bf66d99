"""What each format's own code computes, in plain PyTorch on its own state dict: a second implementation to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def timm_features(state: State, images: Tensor, *, heads: int, patch: int, grid: tuple[int, int]) -> Tensor:
    """timm's ``forward_features``: [B, 1 + cells, D]."""
    positions = grid_positions(state["pos_embed"], grid, new_grid(images, patch), mode="bicubic", antialias=True)
    x = embed(state, "patch_embed.proj", images, positions, state["cls_token"], patch)
    for prefix in numbered(state, "blocks"):
        x = block(state, prefix, x, heads, 1e-6)
    return norm(state, "norm", x, 1e-6)


def segmenter_logits(state: State, images: Tensor, *, heads: int, patch: int, grid: tuple[int, int]) -> Tensor:
    """Segmenter's masks before the upsampling: [B, classes, rows, cols]."""
    state_vit = inside(state, "encoder.")
    size = new_grid(images, patch)
    prefix = torch.cat([state_vit[name] for name in ("cls_token", "dist_token") if name in state_vit], 1)
    positions = grid_positions(state_vit["pos_embed"], grid, size, mode="bilinear", slots=prefix.shape[1])
    x = embed(state_vit, "patch_embed.proj", images, positions, prefix, patch)
    for name in numbered(state_vit, "blocks"):
        x = block(state_vit, name, x, heads, 1e-5)
    masks = segmenter_decoder(inside(state, "decoder."), norm(state_vit, "norm", x, 1e-5)[:, prefix.shape[1] :])
    return masks.transpose(1, 2).unflatten(2, size)


def segmenter_decoder(state: State, x: Tensor) -> Tensor:
    """[B, tokens, D] -> [B, tokens, classes]."""
    if "head.weight" in state:
        return F.linear(x, state["head.weight"], state["head.bias"])
    classes = state["cls_emb"].shape[1]
    x = F.linear(x, state["proj_dec.weight"], state["proj_dec.bias"])
    x = torch.cat((x, state["cls_emb"].expand(len(x), -1, -1)), 1)
    for prefix in numbered(state, "blocks"):
        x = block(state, prefix, x, x.shape[2] // 64, 1e-5)
    x = norm(state, "decoder_norm", x, 1e-5)
    masks = cosines(x[:, :-classes] @ state["proj_patch"], x[:, -classes:] @ state["proj_classes"])
    return norm(state, "mask_norm", masks, 1e-5)


def cts_logits(
    state: State, images: Tensor, shares: Tensor, *, heads: int, patch: int, grid: tuple[int, int], quota: int
) -> Tensor:
    """CTS-Segmenter's masks before the upsampling; ``shares`` [B, 2, rows / 2, cols / 2]: the policy network's logits."""
    vit, rows, cols = inside(state, "encoder."), images.shape[2] // patch, images.shape[3] // patch
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False, recompute_scale_factor=False)
    fine_positions = grid_positions(vit["pos_embed"], grid, (rows, cols), mode="bilinear")[:, 1:]
    position_map = fine_positions.transpose(1, 2).unflatten(2, (rows, cols))
    coarse_positions = F.interpolate(position_map, scale_factor=0.5, mode="bilinear", align_corners=False)
    weight, bias = vit["patch_embed.proj.weight"], vit["patch_embed.proj.bias"]
    fine = F.conv2d(images, weight, bias, stride=patch) + position_map
    coarse = F.conv2d(small, weight, bias, stride=patch) + coarse_positions
    out = []
    for b in range(len(images)):
        score = shares[b].softmax(0)[1].flatten()
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[score.argsort(descending=True)[:quota]] = True
        chosen = chosen.view(rows // 2, cols // 2)
        kept = ~chosen.repeat_interleave(2, 0).repeat_interleave(2, 1)
        cls = vit["cls_token"][0] + vit["pos_embed"][0, :1]
        x = torch.cat((cls, fine[b][:, kept].t(), coarse[b][:, chosen].t()))[None]  # unshared first, then shared
        for prefix in numbered(vit, "blocks"):
            x = block(vit, prefix, x, heads, 1e-5)
        masks = segmenter_decoder(inside(state, "decoder."), norm(vit, "norm", x, 1e-5)[:, 1:])[0]
        image = masks.new_zeros(masks.shape[1], rows, cols)
        image[:, kept] = masks[: int(kept.sum())].t()
        blocks = masks.new_zeros(masks.shape[1], rows // 2, cols // 2)
        blocks[:, chosen] = masks[int(kept.sum()) :].t()
        shared = chosen.repeat_interleave(2, 0).repeat_interleave(2, 1)
        image[:, shared] = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, shared]
        out.append(image)
    return torch.stack(out)


def mmseg_logits(
    state: State, images: Tensor, *, heads: int, patch: int, grid: tuple[int, int], mode: str = "bicubic",
    with_cls_token: bool = True, final_norm: bool = True, eps: float = 1e-6, head_heads: int | None = None,
) -> Tensor:  # fmt: skip
    """mmsegmentation's ``decode_head(backbone(x))``: [B, classes, rows, cols]."""
    body, head, size = inside(state, "backbone."), inside(state, "decode_head."), new_grid(images, patch)
    positions = grid_positions(body["pos_embed"], grid, size, mode=mode)
    x = embed(body, "patch_embed.projection", images, positions, body["cls_token"], patch)
    x = x if with_cls_token else x[:, 1:]
    for prefix in numbered(body, "layers"):
        x = mmseg_layer(body, prefix, x, heads, eps)
    x = norm(body, "ln1", x, eps) if final_norm else x
    x = x[:, 1:] if with_cls_token else x
    if "cls_emb" not in head:
        return F.conv2d(x.transpose(1, 2).unflatten(2, size), head["conv_seg.weight"], head["conv_seg.bias"])
    classes = head["cls_emb"].shape[1]
    x = F.linear(x, head["dec_proj.weight"], head["dec_proj.bias"])
    x = torch.cat((x, head["cls_emb"].expand(len(x), -1, -1)), 1)
    for prefix in numbered(head, "layers"):
        x = mmseg_layer(head, prefix, x, head_heads or heads, 1e-5)
    x = norm(head, "decoder_norm", x, 1e-5)
    patches = F.linear(x[:, :-classes], head["patch_proj.weight"])
    masks = cosines(patches, F.linear(x[:, -classes:], head["classes_proj.weight"]))
    return norm(head, "mask_norm", masks, 1e-5).transpose(1, 2).unflatten(2, size)


def mmseg_layer(state: State, prefix: str, x: Tensor, heads: int, eps: float) -> Tensor:
    part = inside(state, prefix)
    y = norm(part, "ln1", x, eps).transpose(0, 1)
    names = ("attn.attn.in_proj_weight", "attn.attn.in_proj_bias")
    attended, _ = F.multi_head_attention_forward(
        y, y, y, x.shape[2], heads, *(part[name] for name in names), None, None, False, 0.0,
        part["attn.attn.out_proj.weight"], part["attn.attn.out_proj.bias"], training=False, need_weights=False,
    )  # fmt: skip
    x = x + attended.transpose(0, 1)
    hidden = F.gelu(F.linear(norm(part, "ln2", x, eps), part["ffn.layers.0.0.weight"], part["ffn.layers.0.0.bias"]))
    return x + F.linear(hidden, part["ffn.layers.1.weight"], part["ffn.layers.1.bias"])


def block(state: State, prefix: str, x: Tensor, heads: int, eps: float) -> Tensor:
    part = inside(state, prefix)
    qkv = F.linear(norm(part, "norm1", x, eps), part["attn.qkv.weight"], part["attn.qkv.bias"])
    q, k, v = (piece.unflatten(2, (heads, -1)).transpose(1, 2) for piece in qkv.chunk(3, 2))
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
    x = x + F.linear((weights @ v).transpose(1, 2).flatten(2), part["attn.proj.weight"], part["attn.proj.bias"])
    hidden = F.gelu(F.linear(norm(part, "norm2", x, eps), part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
    return x + F.linear(hidden, part["mlp.fc2.weight"], part["mlp.fc2.bias"])


def embed(state: State, name: str, images: Tensor, positions: Tensor, cls_token: Tensor, patch: int) -> Tensor:
    images = F.pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    patches = F.conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    return torch.cat((cls_token.expand(len(images), -1, -1), patches), 1) + positions


def grid_positions(
    stored: Tensor, old: tuple[int, int], new: tuple[int, int], *, mode: str, antialias: bool = False, slots: int = 1
) -> Tensor:
    """[1, slots + cells, D] on the new grid."""
    if old == new:
        return stored
    image = stored[:, slots:].transpose(1, 2).unflatten(2, old)
    image = F.interpolate(image, size=new, mode=mode, align_corners=False, antialias=antialias)
    return torch.cat((stored[:, :slots], image.flatten(2).transpose(1, 2)), 1)


def cosines(patches: Tensor, classes: Tensor) -> Tensor:
    patches = patches / patches.norm(dim=-1, keepdim=True)
    return patches @ (classes / classes.norm(dim=-1, keepdim=True)).transpose(1, 2)


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def inside(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def numbered(state: State, name: str) -> list[str]:
    """Prefixes ``name.0.``, ``name.1.``, ..."""
    count = len({key.removeprefix(f"{name}.").split(".")[0] for key in state if key.startswith(f"{name}.")})
    return [f"{name}.{number}." for number in range(count)]


def new_grid(images: Tensor, patch: int) -> tuple[int, int]:
    return -(-images.shape[2] // patch), -(-images.shape[3] // patch)


def dtop_predictions(
    state: State,
    images: Tensor,
    *,
    heads: int,
    patch: int,
    grid: tuple[int, int],
    exits: dict[int, float],
    atm_heads: int,
) -> Tensor:
    """DToP's ViT_prune and PruneHead image by image: [B, classes, rows, cols]; ``exits``: thresholds after blocks (1-based)."""
    body, size = inside(state, "backbone."), new_grid(images, patch)
    positions = grid_positions(body["pos_embed"], grid, size, mode="bicubic")
    embedded = embed(body, "patch_embed.projection", images, positions, body["cls_token"], patch)[
        :, 1:
    ]  # no class token
    auxiliary = [inside(state, f"auxiliary_head.{number}.") for number in range(len(exits))]
    out = []
    for x in embedded:
        halted = torch.zeros(len(x), dtype=torch.bool)
        canvas = x.new_zeros(state["decode_head.q.weight"].shape[0], len(x))
        for number, prefix in enumerate(numbered(body, "layers"), start=1):
            left = mmseg_layer(body, prefix, x[None, ~halted], heads, 1e-6)[0]
            x = x.index_put((~halted,), left)
            if number in exits:
                masks, classes = prune_head(auxiliary[list(exits).index(number)], left, atm_heads)
                canvas[:, ~halted] = masks
                if exits[number] == 1:
                    continue
                confidence, best = (classes.softmax(-1)[:, :1] * masks.sigmoid()).max(0)
                leave = confidence > exits[number]
                for label in best[leave].unique():
                    rivals = (leave & (best == label)).nonzero().flatten()
                    leave[rivals[confidence[rivals].topk(min(5, len(rivals))).indices]] = False
                halted[(~halted).nonzero().flatten()[leave]] = True
        masks, classes = prune_head(inside(state, "decode_head."), x[~halted], atm_heads)
        canvas[:, ~halted] = masks
        out.append((classes.softmax(-1)[:, :1] * canvas.sigmoid()).unflatten(1, size))
    return torch.stack(out)


def prune_head(state: State, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of one image's tokens [N, D]: mask logits [classes, N] and class logits [classes, 2]."""
    memory = norm(state, "proj_norm", F.linear(x, state["input_proj.weight"], state["input_proj.bias"]), 1e-5)
    q, masks = state["q.weight"], memory
    for prefix in numbered(state, "decoder.layers"):
        part = inside(state, prefix)
        attended, _ = F.multi_head_attention_forward(
            q, q, q, q.shape[1], heads, part["self_attn.in_proj_weight"], part["self_attn.in_proj_bias"], None, None,
            False, 0.0, part["self_attn.out_proj.weight"], part["self_attn.out_proj.bias"], training=False, need_weights=False,
        )  # fmt: skip
        q = norm(part, "norm1", q + attended, 1e-5)
        mixed = [(q, "q"), (memory, "k"), (memory, "v")]
        one, two, three = (
            F.linear(source, part[f"multihead_attn.{name}.weight"], part[f"multihead_attn.{name}.bias"])
            .unflatten(1, (heads, -1))
            .transpose(0, 1)
            for source, name in mixed
        )
        scores = one @ two.mT * one.shape[2] ** -0.5
        cross = (scores.softmax(-1) @ three).transpose(0, 1).flatten(1)
        projection = part["multihead_attn.proj.weight"], part["multihead_attn.proj.bias"]
        q = norm(part, "norm2", q + F.linear(cross, *projection), 1e-5)
        hidden = F.relu(F.linear(q, part["linear1.weight"], part["linear1.bias"]))
        q = norm(part, "norm3", q + F.linear(hidden, part["linear2.weight"], part["linear2.bias"]), 1e-5)
        masks = scores.mean(0)
    return masks, F.linear(q, state["class_embed.weight"], state["class_embed.bias"])
