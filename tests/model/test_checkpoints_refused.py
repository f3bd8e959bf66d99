"""What load_checkpoint refuses: damaged, dangerous, incomplete and unsupported files, and a variant.yml that makes no sense or
tells of another network; each by the name of what is wrong."""

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
    changed_config,
    draw,
    mmseg_shapes,
    refused,
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


def changed(state: dict[str, Tensor], drop: str = "", **new: Tensor) -> dict[str, Tensor]:
    """``state`` without the keys that the pattern ``drop`` matches, with new tensors under names whose dots are ``__``."""
    state = {name: tensor for name, tensor in state.items() if not drop or not re.fullmatch(drop, name)}
    return state | {name.replace("__", "."): tensor for name, tensor in new.items()}


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
    for content in (b"", whole[:10], whole[: len(whole) // 2], whole[:-30], b"<!DOCTYPE html>" * 99):
        (tmp_path / "short.pth").write_bytes(content)
        refused(tmp_path / "short.pth", "short.pth: expected a file of torch.save, got one that cannot be read")
    safetensors.torch.save_file(VIT, tmp_path / "whole.safetensors")
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
    for content, name in ((argparse.Namespace(lr=1), "argparse.Namespace"), (Dangerous(), r"\S*print")):
        torch.save({"model": VIT, "more": content}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "a.pth", f"a.pth: expected tensors, .*got a pickled {name}, which this loader refuses")
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.15 likewise
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11 about the sparse tensor
def test_contents_that_are_no_state_dict(tmp_path: Path) -> None:
    bias = VIT["norm.bias"]
    for content, message in (
        ([VIT], "expected a dict of tensors, got list"),
        ({"model": {}}, "expected tensors by name, got nothing"),
        ({"model": VIT | {"step": 3}}, "expected tensors by name.*got int at 'step'"),
        (changed(VIT, norm__bias=bias.to(torch.float8_e4m3fn)), "got torch.float8_e4m3fn, .* at 'norm.bias'"),
        (changed(VIT, norm__bias=bias.to_sparse()), "got .*sparse.* at 'norm.bias'"),
        (
            {"conv1.weight": bias, "fc.bias": bias},
            "expected a timm ViT, Segmenter, .* got tensors conv1.weight, fc.bias",
        ),
    ):
        refused(saved(tmp_path, content), f"file.pth: .*{message}")


FORMATS = {
    "timm ViT": vit_shapes(depth=2),
    "Segmenter": segmenter_shapes("mask_transformer", depth=2),
    "mmsegmentation Segmenter": mmseg_shapes("mask_transformer", depth=2),
}
CLASSIFIER = r"(encoder\.)?head\..*|decode_head\.conv_seg\..*"  # may be there or not
OTHER_BLOCKS = r"(\w+\.)?(blocks|layers)\.0\."  # than the ones numbered 1, which have the same parts
TELLING = r".*patch_embed\.proj(ection)?\.weight"  # without it nothing tells the format


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
@pytest.mark.parametrize("name", FORMATS)
def test_every_missing_key_is_named(name: str, tmp_path: Path) -> None:
    state = draw(FORMATS[name])
    for key in state:
        if re.match(OTHER_BLOCKS, key):
            continue
        path = saved(tmp_path, {"model": changed(state, re.escape(key))})
        if re.fullmatch(rf"{CLASSIFIER}|backbone.patch_embed.projection.bias", key):
            load_checkpoint(path, num_heads=HEADS)
        elif re.fullmatch(TELLING, key):
            refused(path, "expected a timm ViT, Segmenter, CTS-Segmenter, mmsegmentation Segmenter or DToP checkpoint")
        else:
            refused(path, rf"missing keys?: {re.escape(key)}(;.*from_timm)?$", num_heads=HEADS)


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
@pytest.mark.parametrize("name", FORMATS)
def test_unused_keys_are_named(name: str, tmp_path: Path) -> None:
    state = changed(draw(FORMATS[name]), "", neck__weight=torch.zeros(1), block__9__more=torch.zeros(1))
    message = f"expected the tensors of a {name} checkpoint, got 2 unused keys: block.9.more, neck.weight"
    refused(saved(tmp_path, state), message, num_heads=HEADS)
    many = state | {f"neck.{number}": torch.zeros(1) for number in range(100)}
    refused(saved(tmp_path, many), "neck.1, .* and [0-9]+ more", num_heads=HEADS)


@pytest.mark.filterwarnings("ignore:.*neither tensors nor a config")
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


def test_vits_that_are_not_the_plain_one(tmp_path: Path) -> None:
    for key in ("reg_token", "blocks.0.ls1.gamma.x", "norm_pre.weight", "rope.periods"):
        refused(saved(tmp_path, VIT | {key: torch.ones(64)}), f"1 unused keys: {key}; .*from_timm", num_heads=2)
    path = saved(tmp_path, changed(VIT, pos_embed=VIT["pos_embed"][:, 1:]))  # as DeiT III and FlexiViT have them
    for size in (None, (32, 32), (16, 64)):
        message = "pos_embed with a slot for the class token, got 16 .*from_timm"
        refused(path, message, img_size=size, num_heads=2)


def test_sizes_that_no_one_tells(tmp_path: Path) -> None:
    path = saved(tmp_path, VIT)
    refused(path, "num_heads: expected the number of attention heads, which .*width 64, depth 3")
    refused(path, "num_heads", TypeError, num_heads="3")
    refused(path, "img_size: expected a pair", TypeError, img_size=32)
    refused(path, "embed_dim: expected a multiple of num_heads=3, got 64", num_heads=3)
    refused(path, r"img_size: expected .* of 16 patches of 8 x 8, .*got \(32, 48\)", img_size=(32, 48))
    refused(path, "quota: expected None, as .* holds no CTS policy, got 3", quota=3, num_heads=2)
    odd = saved(tmp_path, changed(VIT, pos_embed=torch.zeros(1, 13, 64)))
    refused(odd, r"img_size: expected \(height, width\) in pixels of 12 patches .*got None", num_heads=2)
    oblong = saved(tmp_path, changed(VIT, patch_embed__proj__weight=torch.zeros(64, 3, 8, 4)))
    refused(oblong, "expected square patches, got 8 x 4", num_heads=2)


VARIANTS = {  # what variant.yml says instead
    "n_heads: 8": "num_heads: expected 8, as the config of .* tells, got 2",
    "n_heads: '2'": "num_heads: expected 2, as the config of .* tells, got 2",
    "image_size: [32, 48]": r"img_size: expected .* of 16 patches of 8 x 8, .*got \(32, 48\)",
    "image_size: [32]": "img_size: expected a pair",
    "image_size: 32.0": "img_size: expected a pair.*got float 32.0",
    "n_layers: 12": "expected variant.yml to tell n_layers=3, got 12",
    "d_model: 192": "expected variant.yml to tell d_model=64, got 192",
    "patch_size: 16": "expected variant.yml to tell patch_size=8, got 16",
    "n_cls: 150": "expected variant.yml to tell n_cls=7, got 150",
    "normalization: clip": "expected normalization in variant.yml to be vit or deit, got str 'clip'",
    "normalization: [1]": r"expected normalization in variant.yml to be vit or deit, got list \[1\]",
}


@pytest.mark.parametrize("line", VARIANTS)
def test_a_variant_of_another_model_or_of_none(line: str, tmp_path: Path) -> None:
    text = changed_config(variant("linear"), line.split(":")[0], line)
    refused(save_segmenter(tmp_path, "linear", text), VARIANTS[line], num_heads=2)


@pytest.mark.parametrize("line", ["d_model: null", "n_cls:", "policy_schedule: many", "policy_schedule: [5]"])
def test_a_variant_that_leaves_out_what_is_not_needed(line: str, tmp_path: Path) -> None:
    text = changed_config(variant("linear"), line.split(":")[0], line)
    load_checkpoint(save_segmenter(tmp_path, "linear", text), img_size=[32, 32])


def test_algm_is_not_taken_for_a_dense_segmenter(tmp_path: Path) -> None:
    text = variant("linear").replace("dataset_kwargs:\n", "dataset_kwargs:\n  patch_type: algm\n  threshold: 0.88\n")
    message = "patch_type in variant.yml to be pure, got 'algm', which is not supported"
    refused(save_segmenter(tmp_path, "linear", text), message)
    load_checkpoint(save_segmenter(tmp_path, "linear", text.replace("algm", "pure")))


@pytest.mark.parametrize("schedule", ["many", "[5]"])
def test_an_odd_policy_schedule(schedule: str, tmp_path: Path) -> None:
    tensors = {**draw(segmenter_shapes("linear")), "policy_net.head.0.weight": torch.zeros(1)}
    path = save_segmenter(tmp_path, "linear", variant("linear", policy_schedule=schedule), tensors)
    refused(path, "expected policy_schedule in variant.yml to be a pair of numbers, got ")


@pytest.mark.parametrize(
    "text", ["net_kwargs: !!python/object/apply:os.getcwd []", "a: [", "- 1", "a: !!python/name:os.system ''"]
)
def test_variants_that_are_no_plain_yaml(text: str, tmp_path: Path) -> None:
    refused(save_segmenter(tmp_path, "linear", text), "variant.yml: expected (plain YAML|a YAML mapping), got")


@pytest.mark.parametrize(("missing", "package"), [("safetensors", "safetensors"), ("yaml", "pyyaml")])
def test_a_missing_package_is_named(missing: str, package: str, tmp_path: Path, monkeypatch) -> None:
    safetensors.torch.save_file(VIT, tmp_path / "vit.safetensors")
    save_segmenter(tmp_path, "linear", variant("linear"))
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    file = tmp_path / ("vit.safetensors" if missing == "safetensors" else "checkpoint.pth")
    message = rf"{package} is needed .*pip install {package}, or, in .* pip install -e '\.\[checkpoints\]'"
    refused(file, message, ImportError)
