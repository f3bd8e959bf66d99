"""The JSON config beside the tensors of save_checkpoint: what it says, and what load_checkpoint refuses in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_cases import INFO, MODELS
from small_models import small_segmenter

from step_kernels.model import QuotaPolicy, VariancePolicy, load_checkpoint, save_checkpoint

VIT = {"kind": "ViT", "embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 64, "patch_size": 8, "in_chans": 3}
VIT |= {"mlp_ratio": 4.0, "eps": 1e-06, "position_rule": "bicubic", "num_prefix": 1, "final_norm": True}
SIZES = {"dim": 48, "num_classes": 5}
LINEAR = {"kind": "LinearDecoder", **SIZES}
VARIANCE = {"kind": "VariancePolicy", "sides": [2, 4, 8, 16]}
GEOMETRY = {"window": None, "stride": None, "resize": None, "enlarge": False, "stretch": False}
ATM = {**SIZES, "depth": 2, "num_heads": 3, "width": 24}
VERSION_1 = {  # by model: policy, one of the exits, decoder
    "linear": ({"kind": "VariancePolicy", "sides": [2, 8]}, None, LINEAR),
    "mask transformer": (
        VARIANCE,
        {"kind": "LinearExit", "keep_per_class": 2, **SIZES},
        {"kind": "MaskTransformerDecoder", "depth": 2, "num_heads": 1, **SIZES},
    ),
    "cosine": (
        {"kind": "QuotaPolicy", "count": 5, "scorer": VARIANCE},
        {"kind": "CosineExit", "keep_per_class": 0, **SIZES},
        LINEAR,
    ),
    "atm": (VARIANCE, {"kind": "AtmExit", "keep_per_class": 1, **ATM}, {"kind": "AtmDecoder", **ATM}),
    "policy net": (
        {"kind": "PolicyNet", "sides": [2, 4], "input_scale": 1.0, "width": 8, "in_chans": 3},
        {"kind": "LinearExit", "keep_per_class": 0, **SIZES},
        LINEAR,
    ),
}


@pytest.mark.parametrize("name", VERSION_1)
def test_configs_stay_as_version_1_has_them(name: str, tmp_path: Path) -> None:
    """Constructors' arguments are part of the format: a new one needs a default, or files that are out there do not load."""
    save_checkpoint(MODELS[name](), tmp_path, info=INFO)
    config = json.loads((tmp_path / "config.json").read_text())
    exits = config.pop("exits")
    policy, one_exit, decoder = VERSION_1[name]
    assert one_exit in (exits.get("1"), exits.get("2")) if one_exit else not exits
    assert config == {
        "format": "step-kernels",
        "format_version": 1,
        "vit": VIT,
        "resample": "area",
        "policy": policy,
        "decoder": decoder,
        "info": {"mean": list(INFO.mean), "std": list(INFO.std), "classes": None, "palette": None, **GEOMETRY},
    }


def test_configs_of_earlier_versions_load(tmp_path: Path) -> None:
    """Without info, and with the class that mmsegmentation's rule for positions had."""
    save_checkpoint(MODELS["encoder"](), tmp_path, info=INFO)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["info"]
    config["vit"] |= {"kind": "MmsegViT", "position_rule": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_checkpoint(tmp_path)
    assert again.vit.config.position_rule == "plain bicubic"
    assert again.info.mean is None


def test_what_was_changed_after_it_was_built_is_saved(tmp_path: Path) -> None:
    """Attributes tell, not the arguments of long ago."""
    model = small_segmenter("linear", "linear", policy=QuotaPolicy(VariancePolicy(0.1), 5))
    model.encoder.policy.count = 2
    for head in model.encoder.exits.values():
        head.keep_per_class = 3
        head.threshold.fill_(0.75)
    again = load_checkpoint(save_checkpoint(model, tmp_path, info=INFO))
    assert again.encoder.policy.count == 2
    assert {(head.keep_per_class, float(head.threshold)) for head in again.encoder.exits.values()} == {(3, 0.75)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "config.json: expected format_version 1, got 2: written by another version"),
        ({"format_version": None}, "expected format_version 1, got None"),
        ({"decoder": {"kind": "UPerNet"}}, "expected decoder to be one of LinearDecoder, .*got 'UPerNet'"),
        ({"decoder": {"kind": "LinearDecoder", "dim": 48, "classes": 5}}, "arguments of the parts.*classes"),
        (
            {"decoder": {"kind": "LinearDecoder", "dim": 48, "num_classes": 6}},
            r"wrong shapes: .*decoder.head.bias .*\[6\]",
        ),
        ({"decoder": None}, "unused keys: decoder.head.bias"),
        (
            {"policy": {"kind": "PolicyNet", "sides": [2]}},
            "missing keys: encoder.policy.coarser|missing keys: encoder.policy",
        ),
        ({"exits": []}, "config: expected the arguments of the parts"),
        ({"resample": "cubic"}, "resample: expected one of"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_checkpoint(MODELS["linear"](), tmp_path, info=INFO)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_configs_that_are_no_config(tmp_path: Path) -> None:
    save_checkpoint(MODELS["linear"](), tmp_path, info=INFO)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vit"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config: expected an entry 'vit', got none"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON, got a file that cannot be read"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"or the config beside a file of save_checkpoint.*prefix=: 'encoder.vit.'"):
        load_checkpoint(tmp_path)


def test_sizes_are_not_to_be_given_for_our_own_files(tmp_path: Path) -> None:
    save_checkpoint(MODELS["encoder"](), tmp_path, info=INFO)
    for hint in ({"num_heads": 3}, {"img_size": (64, 64)}, {"quota": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(hint))}: expected None, as .*config.json tells all sizes"):
            load_checkpoint(tmp_path, **hint)
