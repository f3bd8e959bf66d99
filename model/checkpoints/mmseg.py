"""The training config in mmsegmentation's files: Python text, of which literals are read and nothing is run.

Sources: open-mmlab/mmsegmentation (VisionTransformer, SegmenterMaskTransformerHead, SegDataPreProcessor, EncoderDecoder) and
zbwxp/Dynamic-Token-Pruning (ViT_prune, PruneHead), whose defaults stand where the text is silent.
"""

from __future__ import annotations

import ast
import math
import warnings
from contextlib import suppress
from typing import Any

import torch

from .files import CheckpointFile, as_tuple, mapping, refusal

__all__ = ["read_training"]

Config = dict[str, Any]

ASSUMED = "class token on, GELU, LayerNorms with eps 1e-6, bicubic positions, heads as asked or of 64 channels, whole pictures"
RULES = {"bicubic": "plain bicubic", "bilinear": "bilinear"}  # interpolate_mode -> position_rule
MASKS, PRUNE = "SegmenterMaskTransformerHead", "PruneHead"
KNOWN: dict[str, tuple[object, ...]] = {  # what is computed, by the config's names, its default first
    "backbone.type": ("VisionTransformer", "ViT_prune"),
    "backbone.act_cfg.type": ("GELU",),
    "backbone.interpolate_mode": tuple(RULES),
    "decode_head.type": (MASKS, "FCNHead", PRUNE),
    "decode_head.align_corners": (False,),
    "data_preprocessor.test_cfg": (None,),  # pads the picture, and cuts that again
    "test_cfg.mode": ("whole", "slide"),
}
STEPS = (  # of the test pipeline
    "Resize", "MultiScaleFlipAug", "RandomFlip", "LoadImageFromFile", "LoadAnnotations", "Normalize", "ImageToTensor",
    "DefaultFormatBundle", "Collect", "PackSegInputs",
)  # fmt: skip
ONE_VIEW: dict[str, tuple[object, ...]] = {"flip": (False,), "img_ratios": (None, 1.0, [1.0]), "scale_factor": (None,)}


def read_training(file: CheckpointFile) -> Config:
    """What a file of mmsegmentation's tells beside the tensors, which are changed in place to those of the model layer: see `adapt_tensors`."""
    config = literals(file.meta.get("cfg") or file.meta.get("config"))
    try:
        told = read_model(file, config)
        notes = adapt_tensors(file, told)
    except (TypeError, LookupError, AttributeError) as error:
        raise refusal(file.path, "a training config of mmsegmentation's kinds of values", f"others: {error}") from error
    if not told:
        warnings.warn(f"{file.path}: neither tensors nor a config tell, so taken for granted: {ASSUMED}", stacklevel=5)
    return told | {"info": told.get("info", {}) | dataset(file.meta) | {"stretch": True, "notes": notes}}


def dataset(meta: Config) -> Config:
    """Names and colours of the classes, as mmengine or the older mmcv keep them; nothing where the file does not tell."""
    told = mapping(meta.get("dataset_meta")) or {name.lower(): meta.get(name) for name in ("CLASSES", "PALETTE")}
    found = [(name, kind, as_tuple(told.get(name))) for name, kind in (("classes", str), ("palette", tuple))]
    return {name: value for name, kind, value in found if isinstance(value, tuple) and set(map(type, value)) <= {kind}}


def read_model(file: CheckpointFile, config: Config) -> Config:
    """What the training config tells of network, pictures and windows; ValueError names what the model layer does not compute."""
    model = mapping(config.get("model"))
    if not {"backbone", "decode_head"} <= model.keys():
        return {}
    older = mapping(config.get("img_norm_cfg"))  # before mmsegmentation 1.0
    older |= {"bgr_to_rgb": older.get("to_rgb", True)} if older else {}
    data = model.setdefault("data_preprocessor", config.get("data_preprocessor") or older)

    def at(path: str, default: Any = None) -> Any:
        value: Any = model
        for name in path.split("."):
            value = mapping(value).get(name)
        value = value.rpartition(".")[2] if path.endswith("type") and isinstance(value, str) else value
        return default if value is None else value

    kind, depth, with_cls = at("decode_head.type"), at("backbone.num_layers", 12), at("backbone.with_cls_token", True)
    outputs, size = at("backbone.out_indices", -1), at("backbone.img_size", 224)
    outputs, size = (x if isinstance(x, (list, tuple)) else (x,) for x in (outputs, size))
    others = at("auxiliary_head", ()) if kind == PRUNE else outputs[1:]
    checks = [(name, at(name, known[0]), known) for name, known in KNOWN.items()]
    checks += [("backbone.out_indices", outputs[at("decode_head.in_index", -1)], (-1, depth - 1))]
    checks += [("auxiliary_head", len(others), (len(outputs) - 1,))]
    checks += [("backbone.with_cls_token", with_cls, (False,))] if kind == PRUNE else []
    if kind == MASKS:
        checks += [("decode_head.act_cfg.type", at("decode_head.act_cfg.type", "GELU"), ("GELU",))]
        checks += [("decode_head.norm_cfg.eps", at("decode_head.norm_cfg.eps", 1e-5), (1e-5,))]
    info: Config = {"resize": pipeline(config, checks)}
    for name, value, known in checks:
        if value not in known:
            wanted = f"{name} in the training config to be {' or '.join(map(repr, known))}"
            raise refusal(file.path, wanted, f"{value!r}, which is not supported")
    told: Config = {"img_size": (size[0], size[-1]), "num_heads": at("backbone.num_heads", 12), "info": info}
    told |= {"decoder_heads": at("decode_head.num_heads"), "threshold": at("decode_head.threshold", 0.3), "exits": []}
    told |= {"with_cls": with_cls, "vit": {"final_norm": kind != PRUNE and at("backbone.final_norm", False)}}
    rule = RULES[at("backbone.interpolate_mode", "bicubic")]
    told["vit"] |= {"eps": at("backbone.norm_cfg.eps", 1e-5), "position_rule": rule}
    if at("test_cfg.mode") == "slide":
        told["info"] |= {"window": at("test_cfg.crop_size"), "stride": at("test_cfg.stride")}
    if data:
        told["bgr"] = not (at("data_preprocessor.bgr_to_rgb") or at("data_preprocessor.rgb_to_bgr"))  # both swap
        for name, raw in (("mean", 0), ("std", 1)):  # without normalisation: pixels of 0..255
            values = at(f"data_preprocessor.{name}", (raw,) * 3)
            told["info"][name] = tuple(x / 255 for x in (reversed(values) if told["bgr"] else values))
    if kind == PRUNE:
        for block, each in zip(outputs[:-1], others, strict=True):
            told["exits"].append((block + 1, each.get("num_heads", 6), float(each.get("thresh", 1.0))))
    return told


def pipeline(config: Config, checks: list[Any]) -> tuple[int, ...] | None:
    """(shorter, longer) of the test pipeline's Resize, in older files of its MultiScaleFlipAug. Adds to ``checks`` what it has to be."""
    data = mapping(config.get("test_dataloader")).get("dataset"), mapping(config.get("data")).get("test")
    told, size = [each["pipeline"] for each in map(mapping, data) if "pipeline" in each], None
    for outer in told[0] if told else config.get("test_pipeline", ()):
        for step in (outer, *outer.get("transforms", ())):
            kind = step["type"].rpartition(".")[2]
            checks.append(("a step of the test pipeline", kind, STEPS))
            checks += [(f"{kind}.{name}", step.get(name, known[0]), known) for name, known in ONE_VIEW.items()]
            if kind == "Resize":
                checks.append(("Resize.keep_ratio", step.get("keep_ratio", False), (True,)))
                checks.append(("a second Resize", size, (None,)))
                if (scale := step.get("scale", outer.get("img_scale"))) is not None:
                    size = tuple(sorted(scale if isinstance(scale, (list, tuple)) else (scale, scale)))
    return size


def adapt_tensors(file: CheckpointFile, told: Config) -> tuple[str, ...]:
    """In place: the tensors as the model layer has them, where mmsegmentation computes the same from others. What was done, in words."""
    tensors, done = file.tensors, list[str]()
    if not told.get("with_cls", True):  # the file has a class token all the same, which does not run
        cut = {"backbone.cls_token": slice(0), "backbone.pos_embed": slice(1, None)}
        tensors |= {name: tensors[name][:, rows] for name, rows in cut.items() if name in tensors}
    if (weight := tensors.get(name := "backbone.patch_embed.projection.weight")) is not None:
        # mmsegmentation >= 1.2 has none
        tensors.setdefault(name.replace("weight", "bias"), weight.new_zeros(len(weight)))
        if told.get("bgr"):
            tensors[name] = weight.flip(1)
            done.append("its order BGR became RGB in the patch embedding")
    pair: list[Any] = [tensors.get(f"decode_head.conv_seg.{name}", ()) for name in ("weight", "bias")]
    if "decode_head.cls_emb" not in tensors and [*map(len, pair)] == [1, 1]:
        weight, bias = pair
        threshold = told.get("threshold", 0.3)
        if not 0 < threshold < 1:
            raise refusal(file.path, "decode_head.threshold in the training config between 0 and 1", threshold)
        # sigmoid(x) > threshold where x > logit(threshold), upsampled or not: the score of a class before it.
        odds = torch.full_like(bias, math.log(threshold / (1 - threshold)))
        tensors["decode_head.conv_seg.weight"] = torch.cat((torch.zeros_like(weight), weight))
        tensors["decode_head.conv_seg.bias"] = torch.cat((odds, bias))
        done.append(f"its one output is class 1 where the sigmoid is above {threshold:g}, else class 0")
    for number, (_, _, threshold) in enumerate(told.get("exits", ())):
        tensors[f"auxiliary_head.{number}.threshold"] = torch.tensor(threshold, device="cpu")
    return tuple(done)


class Dicts(ast.NodeTransformer):
    """``dict(a=1)`` as ``{"a": 1}``."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if node.args or getattr(node.func, "id", None) != "dict":
            return node
        return ast.Dict([ast.Constant(word.arg) for word in node.keywords], [word.value for word in node.keywords])


def literals(text: object) -> Config:
    """The assignments at the top of a Python text whose values are literals, or ``dict(...)`` of such."""
    found: Config = {}
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        for node in ast.parse(text).body if isinstance(text, str) else ():
            with suppress(AttributeError, ValueError, TypeError, RecursionError):  # other statements, expressions
                found[node.targets[0].id] = ast.literal_eval(Dicts().visit(node.value))  # type: ignore[attr-defined]
    return found
