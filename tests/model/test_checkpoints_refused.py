"""What load_checkpoint refuses: damaged, dangerous, incomplete and unsupported files, each by the name of what is wrong."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_cases import (
    HEADS,
    draw,
    mmseg_config,
    mmseg_shapes,
    save_mmengine,
    save_segmenter,
    segmenter_shapes,
    variant,
    vit_shapes,
)
from torch import Tensor

from step_kernels.model import load_checkpoint

VIT = draw(vit_shapes())


def saved(tmp_path: Path, content: object, name: str = "file.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def refused(path: object, message: str, error: type[Exception] = ValueError, **hints: object) -> None:
    with pytest.raises(error, match=message):
        load_checkpoint(path, **hints)  # type: ignore[arg-type]


def changed(state: dict[str, Tensor], drop: str = "", **new: Tensor | None) -> dict[str, Tensor]:
    """``state`` without the keys that the pattern ``drop`` matches, with new tensors under names whose dots are ``__``."""
    state = {name: tensor for name, tensor in state.items() if not drop or not re.fullmatch(drop, name)}
    return state | {name.replace("__", "."): tensor for name, tensor in new.items() if tensor is not None}


def test_paths(tmp_path: Path) -> None:
    refused(3, "path: expected a str or a path, got int 3", TypeError)
    refused(
        tmp_path / "none.pth",
        "path: expected a checkpoint file or a folder with one, got .*none.pth",
        FileNotFoundError,
    )
    refused(tmp_path, "path: expected a folder with one file of weights .* with none")
    saved(tmp_path, VIT, "a.pth"), saved(tmp_path, VIT, "b.pt")
    refused(tmp_path, "path: expected a folder with one file of weights .* with a.pth, b.pt")
    (tmp_path / "weights.npz").write_bytes(b"")
    refused(tmp_path / "weights.npz", r"path: expected a file named \*.safetensors, .*, got .*weights.npz")


def test_damaged_files(tmp_path: Path) -> None:
    whole = saved(tmp_path, {"model": VIT}).read_bytes()
    safetensors.torch.save_file(VIT, tmp_path / "whole.safetensors")
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "short.pth").write_bytes(whole[:length])
        refused(tmp_path / "short.pth", "short.pth: expected a file of torch.save, got one that cannot be read")
    (tmp_path / "short.pth").write_bytes(b"<!DOCTYPE html>" * 99)
    refused(tmp_path / "short.pth", "short.pth: expected a file of torch.save, got one that cannot be read")
    for length in (0, 10, 2000, 90000):
        (tmp_path / "short.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:length])
        refused(
            tmp_path / "short.safetensors",
            "short.safetensors: expected a safetensors file, got one that cannot be read",
        )


class Dangerous:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("ran code of a checkpoint",)


@pytest.mark.parametrize("zipped", [True, False])
def test_other_pickled_classes_are_named_and_never_run(zipped: bool, tmp_path: Path, capsys) -> None:
    content = {"model": VIT, "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "args.pth", _use_new_zipfile_serialization=zipped)
    refused(
        tmp_path / "args.pth", "args.pth: expected tensors, .*got pickled argparse.Namespace, which this loader refuses"
    )
    torch.save({**content, "hook": Dangerous()}, tmp_path / "code.pth", _use_new_zipfile_serialization=zipped)
    both = "argparse.Namespace, builtins.print" if zipped else "argparse.Namespace"
    refused(tmp_path / "code.pth", f"got pickled {both}, which this loader refuses")
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.15 likewise
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 about the sparse tensor
def test_contents_that_are_no_state_dict(tmp_path: Path) -> None:
    refused(saved(tmp_path, [VIT]), "expected a dict of tensors, got list")
    refused(saved(tmp_path, {"model": {}}), "expected tensors by name.*got nothing")
    refused(saved(tmp_path, {"model": VIT | {"step": 3}}), "expected tensors by name.*got no tensors at step")
    refused(
        saved(tmp_path, {"net": VIT}), "by name, at the top or under one of state_dict, model, .* no tensors at net"
    )
    both = saved(tmp_path, {"state_dict": VIT, "state_dict_ema": VIT})
    refused(both, "expected one state dict, got state_dict, state_dict_ema; save the wanted one alone")
    refused(
        saved(tmp_path, changed(VIT, norm__bias=VIT["norm.bias"].to(torch.float8_e4m3fn))), "got norm.bias of .*float8"
    )
    refused(saved(tmp_path, changed(VIT, norm__bias=VIT["norm.bias"].to_sparse())), "got norm.bias of .*sparse")
    convolutions = {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    refused(saved(tmp_path, convolutions), "expected a timm ViT, Segmenter, .* got tensors conv1.weight, fc.bias")


FORMATS = {
    "timm ViT": vit_shapes(),
    "Segmenter": segmenter_shapes("mask_transformer"),
    "mmsegmentation Segmenter": mmseg_shapes("mask_transformer"),
}


CLASSIFIER = r"(encoder\.)?head\..*|decode_head\.conv_seg\..*"  # may be there or not
OTHER_BLOCKS = r"(\w+\.)?(blocks|layers)\.[02]\."  # than the ones numbered 1, which have the same parts
TELLING = r".*patch_embed\.proj(ection)?\.weight"  # without it nothing tells the format
ONE_OF_A_KIND = (
    r"(encoder\.)?(cls_token|pos_embed|patch_embed\.proj\.bias)"  # another architecture, as far as one can tell
)


@pytest.mark.parametrize("name", FORMATS)
def test_every_missing_key_is_named(name: str, tmp_path: Path) -> None:
    state = draw(FORMATS[name])
    for key in state:
        if re.match(OTHER_BLOCKS, key):
            continue
        path = saved(tmp_path, {"model": changed(state, re.escape(key))})
        if re.fullmatch(CLASSIFIER, key):
            load_checkpoint(path, num_heads=HEADS)
        elif re.fullmatch(TELLING, key):
            refused(path, "expected a timm ViT, Segmenter, CTS-Segmenter or mmsegmentation Segmenter checkpoint")
        elif re.fullmatch(ONE_OF_A_KIND, key):
            refused(path, r"got one with .* \(keys that are missing\)", NotImplementedError, num_heads=HEADS)
        else:
            refused(path, rf"missing keys?: {re.escape(key)}$", num_heads=HEADS)


@pytest.mark.parametrize("name", FORMATS)
def test_unused_keys_are_named(name: str, tmp_path: Path) -> None:
    state = changed(draw(FORMATS[name]), "", neck__weight=torch.zeros(1), blocks__9__more=torch.zeros(1))
    message = f"expected the tensors of a {name} checkpoint, got 2 unused keys: blocks.9.more, neck.weight"
    if name != "timm ViT":
        refused(saved(tmp_path, state), message, num_heads=HEADS)
    many = state | {f"neck.{number}": torch.zeros(1) for number in range(100)}
    refused(saved(tmp_path, many), "neck.1, .* and [0-9]+ more", num_heads=HEADS)


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_shapes_are_named(name: str, tmp_path: Path) -> None:
    """Each tensor in turn, longer or narrower; also where sizes are read from it."""
    state = draw(FORMATS[name])
    for key, tensor in state.items():
        if re.match(OTHER_BLOCKS, key) or re.fullmatch(CLASSIFIER, key):
            continue
        wrong = torch.cat((tensor, tensor[:1])) if tensor.dim() == 1 else tensor[..., :-2]
        tells_size = re.search(r"cls_token|cls_emb|pos_embed|patch_embed\..*weight", key)
        named = (
            "wrong shapes|expected square patches|expected width"
            if tells_size
            else rf"wrong shapes: .*{re.escape(key)} \(expected"
        )
        refused(saved(tmp_path, {**state, key: wrong}), named, num_heads=HEADS)
        if tensor.dim() > 1 and not re.search(r"\.[12]\.", key):
            refused(saved(tmp_path, {**state, key: tensor.flatten()}), re.escape(key), num_heads=HEADS)
    key = next(key for key in state if key.endswith("1.bias"))
    integers = {**state, key: state[key].long()}
    refused(saved(tmp_path, integers), rf"{key} \(expected float32 \[64\], got int64 \[64\]\)", num_heads=HEADS)


PARTS = {
    "register tokens": {"reg_token": (1, 4, 64)},
    "LayerScale": {"blocks.0.ls1.gamma": (64,), "blocks.0.ls2.gamma": (64,)},
    "norms of queries and keys": {"blocks.0.attn.q_norm.weight": (32,)},
    "separate projections of q, k and v": {"blocks.0.attn.q_bias": (64,)},
    "a distillation token": {"dist_token": (1, 1, 64)},
    "a norm before the blocks": {"norm_pre.weight": (64,)},
    "a norm after pooling in place of the final one": {"fc_norm.weight": (64,)},
    "attention pooling": {"attn_pool.latent": (1, 1, 64)},
    "relative positions": {"blocks.0.attn.rel_pos_h": (7, 32)},
    "a gated MLP": {"blocks.0.mlp.fc1_g.weight": (64, 64)},
    "norms or gates inside attention or MLP": {"blocks.0.attn.norm.weight": (64,)},
    "another patch embedding": {"patch_embed.norm.weight": (64,)},
    "rotary positions": {"rope.periods": (8,)},
}
LACKS = {
    "no class token": "cls_token",
    "no stored position embeddings": "pos_embed",
    "a patch embedding without bias": r"patch_embed\.proj\.bias",
    "qkv without bias": r"blocks\.\d\.attn\.qkv\.bias",
    "norms without bias": r".*norm\d?\.bias",
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_the_plain_vit_has_not(part: str, tmp_path: Path) -> None:
    keys = list(PARTS[part])
    more = {name.replace(".", "__"): torch.ones(shape) for name, shape in PARTS[part].items()}
    refused(saved(tmp_path, changed(VIT, **more)), f"{part} .*{re.escape(keys[0])}.*from_timm", NotImplementedError)
    inside = {f"encoder__{name}": tensor for name, tensor in more.items()}
    state = changed(draw(segmenter_shapes("linear")), **inside)
    refused(saved(tmp_path, {"model": state}), f"{part} .*encoder.{re.escape(keys[0])}", NotImplementedError)


@pytest.mark.parametrize("part", LACKS)
def test_parts_that_only_the_plain_vit_has(part: str, tmp_path: Path) -> None:
    refused(saved(tmp_path, changed(VIT, LACKS[part])), rf"got one with {part} .*from_timm", NotImplementedError)


def test_positions_without_a_class_slot(tmp_path: Path) -> None:
    """DeiT III and FlexiViT: as many positions as patches."""
    path = saved(tmp_path, changed(VIT, pos_embed=VIT["pos_embed"][:, 1:]))
    for size in (None, (32, 32), (16, 64)):
        refused(
            path, "pos_embed with a slot for the class token, got 16", NotImplementedError, img_size=size, num_heads=2
        )


def test_sizes_that_no_one_tells(tmp_path: Path) -> None:
    path = saved(tmp_path, VIT)
    refused(path, "num_heads: expected the number of attention heads, which .*width 64, depth 3")
    refused(path, "num_heads", TypeError, num_heads="3")
    refused(path, "embed_dim: expected a multiple of num_heads=3, got 64", num_heads=3)
    refused(path, "img_size: expected one of 16 patches of 8 pixels.*got 32 x 48, which has 24", img_size=(32, 48))
    refused(path, "img_size: expected a pair", TypeError, img_size=32)
    refused(path, "quota: expected None, as .* holds no CTS policy, got 3", quota=3, num_heads=2)
    odd = saved(tmp_path, changed(VIT, pos_embed=torch.zeros(1, 13, 64)))
    refused(odd, r"img_size: expected \(height, width\) in pixels, as .* has 12 positions", num_heads=2)
    oblong = saved(tmp_path, changed(VIT, patch_embed__proj__weight=torch.zeros(64, 3, 8, 4)))
    refused(oblong, "expected square patches, got 8 x 4", num_heads=2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"n_heads": 8}, "num_heads: expected 8, as the config of .* tells, got 2"),
        ({"image_size": (32, 48)}, "img_size: expected one of 16 patches"),
        ({"n_layers": 12}, "n_layers: expected 12, as the config of .* tells, got 3"),
        ({"d_model": 192}, "d_model: expected 192"),
        ({"patch_size": 16}, "patch_size: expected 16"),
        ({"n_cls": 150}, "n_cls: expected 150"),
    ],
)
def test_a_variant_of_another_model(entry: dict[str, object], message: str, tmp_path: Path) -> None:
    text = variant(
        "linear", **{name: value for name, value in entry.items() if name not in ("d_model", "patch_size", "n_cls")}
    )
    for name, value in entry.items():
        text = re.sub(rf"^  {name}: \d+$", f"  {name}: {value}", text, flags=re.MULTILINE)
    path = save_segmenter(tmp_path, "linear", text)
    refused(path, message, num_heads=2)


@pytest.mark.parametrize(
    "text", ["net_kwargs: !!python/object/apply:os.getcwd []", "a: [", "- 1", "a: !!python/name:os.system ''"]
)
def test_variants_that_are_no_plain_yaml(text: str, tmp_path: Path) -> None:
    refused(save_segmenter(tmp_path, "linear", text), "variant.yml: expected (plain YAML|a YAML mapping), got")


def test_mmseg_configs_of_other_models(tmp_path: Path) -> None:
    state = draw(mmseg_shapes("mask_transformer"))
    for name, value in (("act_cfg", {"type": "ReLU"}), ("num_fcs", 3)):
        path = save_mmengine(tmp_path / "a.pth", state, mmseg_config(**{name: value}))
        refused(path, f"expected a backbone with {name}=", NotImplementedError)
    for theirs, message in (
        ("num_heads=4, norm_cfg=dict(type='LN', eps=0.1)", "expected a decode_head with eps 1e-5"),
        ("num_heads=4, align_corners=True", "expected a decode_head with align_corners=False, got True"),
    ):
        path = save_mmengine(tmp_path / "a.pth", state, mmseg_config().replace("num_heads=4", theirs))
        refused(path, message, NotImplementedError)
    refused(save_mmengine(tmp_path / "a.pth", state, mmseg_config(num_heads=5)), "num_heads: expected 5", num_heads=2)
    # Text that is no config counts as none; nothing in it is run.
    for text in ("model = (", "model = dict(backbone=__import__('os').abort())", "model = dict(backbone=3)"):
        path = save_mmengine(tmp_path / "a.pth", state, text)
        refused(path, "num_heads: expected the number")
        assert load_checkpoint(path, num_heads=HEADS).encoder.vit.config.eps == 1e-6


@pytest.mark.parametrize(("missing", "package"), [("safetensors", "safetensors"), ("yaml", "pyyaml")])
def test_a_missing_package_is_named(missing: str, package: str, tmp_path: Path, monkeypatch) -> None:
    safetensors.torch.save_file(VIT, tmp_path / "vit.safetensors")
    save_segmenter(tmp_path, "linear", variant("linear"))
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    file = tmp_path / ("vit.safetensors" if missing == "safetensors" else "checkpoint.pth")
    refused(
        file, rf"{package} is needed .*pip install {package}, or pip install 'step-kernels\[checkpoints\]'", ImportError
    )
