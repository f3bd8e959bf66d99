"""Small checkpoint files in the public formats: their real names and structure, random values in every tensor."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small_models import enlarge, small_atm_segmenter, small_segmenter, small_vit
from torch import Tensor, nn

from step_kernels.model import (
    CheckpointInfo,
    PolicyNet,
    QuotaPolicy,
    StepEncoder,
    VariancePolicy,
    checkpoint_info,
    load_checkpoint,
)

DIM, DEPTH, HEADS, PATCH, GRID, CLASSES = 64, 3, 2, 8, (4, 4), 7
INFO = CheckpointInfo("any", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))

Shapes = dict[str, tuple[int, ...]]


def vit_shapes(dim: int = DIM, depth: int = DEPTH, patch: int = PATCH, cells: int = 16) -> Shapes:
    """timm's plain VisionTransformer, with its classifier."""
    shapes: Shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + cells, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for number in range(depth):
        shapes |= block_shapes(f"blocks.{number}.", dim)
    return shapes | both("norm", (dim,)) | both("head", (1000, dim))


def block_shapes(prefix: str, dim: int) -> Shapes:
    shapes = both(f"{prefix}norm1", (dim,)) | both(f"{prefix}norm2", (dim,))
    shapes |= both(f"{prefix}attn.qkv", (3 * dim, dim)) | both(f"{prefix}attn.proj", (dim, dim))
    return shapes | both(f"{prefix}mlp.fc1", (4 * dim, dim)) | both(f"{prefix}mlp.fc2", (dim, 4 * dim))


def segmenter_shapes(decoder: str, classes: int = CLASSES, **sizes: int) -> Shapes:
    """Segmenter, which keeps the encoder's classifier."""
    dim = sizes.get("dim", DIM)
    shapes = {f"encoder.{name}": shape for name, shape in vit_shapes(**sizes).items()}
    if decoder == "linear":
        return shapes | both("decoder.head", (classes, dim))
    shapes |= {"decoder.cls_emb": (1, classes, dim)} | both("decoder.proj_dec", (dim, dim))
    shapes |= {"decoder.proj_patch": (dim, dim), "decoder.proj_classes": (dim, dim)}
    for number in range(2):
        shapes |= block_shapes(f"decoder.blocks.{number}.", dim)
    return shapes | both("decoder.decoder_norm", (dim,)) | both("decoder.mask_norm", (classes,))


def mmseg_shapes(
    decoder: str, classes: int = CLASSES, dim: int = DIM, depth: int = DEPTH, patch: int = PATCH, cells: int = 16
) -> Shapes:
    """mmsegmentation's Segmenter; every head of mmsegmentation has a ``conv_seg``."""
    shapes: Shapes = {"backbone.cls_token": (1, 1, dim), "backbone.pos_embed": (1, 1 + cells, dim)}
    shapes |= both("backbone.patch_embed.projection", (dim, 3, patch, patch))
    for number in range(depth):
        shapes |= mmseg_layer_shapes(f"backbone.layers.{number}.", dim)
    shapes |= both("backbone.ln1", (dim,)) | both("decode_head.conv_seg", (classes, dim, 1, 1))
    if decoder == "linear":
        return shapes
    shapes |= {"decode_head.cls_emb": (1, classes, dim)} | both("decode_head.dec_proj", (dim, dim))
    shapes |= {"decode_head.patch_proj.weight": (dim, dim), "decode_head.classes_proj.weight": (dim, dim)}
    for number in range(2):
        shapes |= mmseg_layer_shapes(f"decode_head.layers.{number}.", dim)
    return shapes | both("decode_head.decoder_norm", (dim,)) | both("decode_head.mask_norm", (classes,))


def dtop_shapes(exits: int = 1, classes: int = CLASSES, dim: int = DIM, width: int = DIM // 2, **sizes: int) -> Shapes:
    """DToP: mmsegmentation's backbone without final norm, and PruneHeads, whose loss keeps a buffer."""
    shapes = {
        name: shape for name, shape in mmseg_shapes("linear", classes, dim, **sizes).items() if "conv_seg" not in name
    }
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("backbone.ln1")}
    for head in (*(f"auxiliary_head.{number}" for number in range(exits)), "decode_head"):
        shapes |= both(f"{head}.input_proj", (width, dim)) | both(f"{head}.proj_norm", (width,))
        shapes |= {f"{head}.q.weight": (classes, width)} | both(f"{head}.class_embed", (2, width))
        shapes[f"{head}.loss_decode.criterion.empty_weight"] = (2,)
        for number in range(2):
            layer = f"{head}.decoder.layers.{number}."
            shapes |= {
                f"{layer}self_attn.in_proj_weight": (3 * width, width),
                f"{layer}self_attn.in_proj_bias": (3 * width,),
            }
            shapes |= both(f"{layer}self_attn.out_proj", (width, width)) | both(f"{layer}linear1", (4 * width, width))
            shapes |= both(f"{layer}linear2", (width, 4 * width))
            for name in ("q", "k", "v", "proj"):
                shapes |= both(f"{layer}multihead_attn.{name}", (width, width))
            for name in ("norm1", "norm2", "norm3"):
                shapes |= both(f"{layer}{name}", (width,))
    return shapes


def mmseg_layer_shapes(prefix: str, dim: int) -> Shapes:
    shapes = (
        both(f"{prefix}ln1", (dim,)) | both(f"{prefix}ln2", (dim,)) | both(f"{prefix}attn.attn.out_proj", (dim, dim))
    )
    shapes |= {f"{prefix}attn.attn.in_proj_weight": (3 * dim, dim), f"{prefix}attn.attn.in_proj_bias": (3 * dim,)}
    return shapes | both(f"{prefix}ffn.layers.0.0", (4 * dim, dim)) | both(f"{prefix}ffn.layers.1", (dim, 4 * dim))


def both(name: str, shape: tuple[int, ...]) -> Shapes:
    """Weight and bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def draw(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random values on the scale of trained ones: norms around 1, biases and positions that matter, matrices that keep scale."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        matrix = len(shape) > 1 and not name.endswith(("cls_token", "pos_embed", "cls_emb"))
        tensors[name] = noise * (noise[0].numel() ** -0.5) if matrix else noise * 0.5
        if len(shape) == 1 and name.endswith("weight"):
            tensors[name] = 1 + 0.3 * noise
    return tensors


def variant(decoder: str, **net: Any) -> str:
    """Segmenter's variant.yml, as its ``yaml.dump`` writes it: the image size is a tuple."""
    net = {"image_size": (GRID[0] * PATCH, GRID[1] * PATCH), "n_heads": HEADS, "n_layers": DEPTH, **net}
    lines = ["amp: false", "dataset_kwargs:", "  crop_size: 32", "net_kwargs:", "  backbone: vit_tiny_patch16_384"]
    lines += [f"  d_model: {DIM}", "  decoder:", f"    name: {decoder}", "  distilled: false", "  dropout: 0.0"]
    for name, value in net.items():
        if isinstance(value, tuple):
            lines += [f"  {name}: !!python/tuple", *(f"  - {number}" for number in value)]
        else:
            lines.append(f"  {name}: {value}")
    return "\n".join(
        [*lines, f"  n_cls: {CLASSES}", "  normalization: vit", f"  patch_size: {PATCH}", "version: normal", ""]
    )


def changed_config(text: str, name: str, line: str) -> str:
    """A variant.yml that has ``line`` in place of what it says of ``name``, if it does."""
    kept = re.sub(rf"^  {name}:.*\n(  - .*\n)*", "", text, flags=re.MULTILINE)
    return kept.replace("net_kwargs:\n", f"net_kwargs:\n  {line}\n")


def training_config(text: str | None = None, **changes: Any) -> str:
    """``text``, else `mmseg_config`, with other values by their path: ``backbone__img_size=64``; None takes the word out."""
    config: dict[str, Any] = {}
    exec(text or mmseg_config(), {"dict": dict}, config)
    for path, value in changes.items():
        *names, last = path.split("__")
        part = config["model"]
        for name in names:
            part = part.setdefault(name, {})
        part.pop(last, None)
        if value is not None:
            part[last] = copy.deepcopy(value)
    return "\n".join(f"{name} = {value!r}" for name, value in config.items())


def mmseg_config(**backbone: Any) -> str:
    """The part of mmengine's ``cfg.pretty_text`` that tells of the model."""
    settings = {"img_size": (32, 32), "num_heads": HEADS, "interpolate_mode": "bicubic", "with_cls_token": True}
    settings |= {"embed_dims": DIM, "num_layers": DEPTH, "patch_size": PATCH}
    inner = ", ".join(f"{name}={value!r}" for name, value in (settings | backbone).items())
    return f"""crop_size = (512, 512)
model = dict(
    backbone=dict(
        type='VisionTransformer', final_norm=True, {inner}, norm_cfg=dict(eps=1e-06, requires_grad=True,
        type='LN')),
    data_preprocessor=dict(bgr_to_rgb=True, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], type='SegDataPreProcessor'),
    decode_head=dict(num_heads=2, num_layers=2, type='SegmenterMaskTransformerHead'),
    test_cfg=dict(crop_size=(512, 512), mode='slide', stride=(480, 480)))
optimizer = dict(lr=0.001, type='SGD')
work_dir = './work_dirs/' + 'segmenter'
"""


def newer_pipeline(*steps: str) -> str:
    """Since mmsegmentation 1.0: these steps, as its test dataloader has them; ``test_pipeline``, which a command may have replaced, has others."""
    load, pack = (
        "dict(type='LoadImageFromFile')",
        "dict(type='LoadAnnotations'), dict(type='PackSegInputs', meta_keys=('ori_shape',))",
    )
    text = f"test_dataloader = dict(batch_size=1, dataset=dict(type='ADE20KDataset', pipeline=[{', '.join((load, *steps, pack))}]))\n"
    return text + f"test_pipeline = [{load}, dict(type='Resize', scale=(9, 9), keep_ratio=True)]\n"


def older_pipeline(views: str, resize: str = "keep_ratio=True") -> str:
    """Before mmsegmentation 1.0, so in DToP's files."""
    steps = f"dict(type='Resize', {resize}), dict(type='RandomFlip'), dict(type='Normalize', to_rgb=True), dict(type='ImageToTensor', keys=['img'])"
    views = f"dict(type='MultiScaleFlipAug', {views}, transforms=[{steps}, dict(type='Collect', keys=['img'])])"
    return f"data = dict(test=dict(type='ADE20KDataset', pipeline=[dict(type='LoadImageFromFile'), {views}]))\n"


def save_segmenter(
    folder: Path, decoder: str, variant_text: str | None, tensors: dict[str, Tensor] | None = None
) -> Path:
    """Segmenter's checkpoint.pth, as its training script writes it, and variant.yml."""
    tensors = draw(segmenter_shapes(decoder)) if tensors is None else tensors
    folder.mkdir(exist_ok=True, parents=True)
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({"model": tensors, "optimizer": optimizer, "n_cls": CLASSES, "epoch": 3}, folder / "checkpoint.pth")
    if variant_text is not None:
        (folder / "variant.yml").write_text(variant_text)
    return folder / "checkpoint.pth"


def save_mmengine(path: Path, tensors: dict[str, Tensor], config: str | None) -> Path:
    """What mmengine's runner saves: the state dict among pickled objects of mmengine and numpy."""
    meta = {"epoch": 0, "dataset_meta": {"classes": ("sky", "sea"), "palette": [[6, 230, 230], [9, 7, 230]]}}
    meta |= {} if config is None else {"cfg": config}
    with mmengine_objects() as history:
        torch.save({"meta": meta, "state_dict": tensors, "message_hub": {"log_scalars": {"train/lr": history()}}}, path)
    return path


@contextlib.contextmanager
def mmengine_objects() -> Iterator[Callable[[], object]]:
    """Makes log histories that are pickled under mmengine's and old numpy's names, without either installed."""

    class HistoryBuffer:
        def min(self) -> None:
            raise AssertionError("ran a method that a file names")

    def reconstruct(*_: object) -> None:
        raise AssertionError("built an array that a file brings")

    class OldArray:
        def __reduce__(self) -> tuple[Any, ...]:
            state = (1, (2,), np.dtype("float64"), False, b"\0" * 16)
            return reconstruct, (np.ndarray, (0,), b"b"), state

    for thing, module, name in (
        (HistoryBuffer, "mmengine.logging.history_buffer", "HistoryBuffer"),
        (reconstruct, "numpy.core.multiarray", "_reconstruct"),
    ):
        thing.__module__, thing.__qualname__, thing.__name__ = module, name, name
    HistoryBuffer.min.__module__ = HistoryBuffer.__module__
    HistoryBuffer.min.__qualname__ = "HistoryBuffer.min"
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer", "numpy.core", "numpy.core.multiarray")
    modules = {name: ModuleType(name) for name in names}
    modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    modules["numpy.core.multiarray"]._reconstruct = reconstruct

    def history() -> object:
        buffer = HistoryBuffer()
        buffer._log_history = OldArray()
        buffer._count_history = np.ones(3, dtype=np.int64)
        buffer.last = np.float64(0.5)
        buffer.statistics_methods = {"min": HistoryBuffer.min}
        return buffer

    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield history
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def refused(path: object, message: str, error: type[Exception] = ValueError, **hints: object) -> None:
    """Holds `load_checkpoint` and `checkpoint_info` to the same refusal; one of a file's content names the file."""
    for read in (load_checkpoint, checkpoint_info):
        with pytest.raises(error, match=message) as caught:
            read(path, **hints)  # type: ignore[operator]
        assert type(caught.value) is error
        assert error in (TypeError, ImportError) or any(
            name in str(caught.value) for name in (str(path), "variant.yml")
        )


def policy_net() -> PolicyNet:
    """One whose thresholds, batch-norm statistics and sizes are none of the defaults."""
    net = PolicyNet((4, 2), [0.25, 0.5], 1.0, width=8)
    for name, buffer in net.named_buffers():
        if buffer.is_floating_point() and "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return enlarge(net)


MODELS = {  # of every kind of part that save_checkpoint knows
    "encoder": lambda: StepEncoder(small_vit()),
    "linear": lambda: small_segmenter(None, "linear", policy=VariancePolicy(0.07, (2, 8))),
    "mask transformer": lambda: small_segmenter("linear", "mask_transformer", keep_per_class=2),
    "cosine": lambda: small_segmenter("cosine", "linear", policy=QuotaPolicy(VariancePolicy(0.1), 5)),
    "atm": lambda: small_atm_segmenter(),
    "policy net": lambda: small_segmenter("linear", "linear", policy=policy_net(), blocks=(2,)),
}
