"""The whole recipe on generated scenes, with no download: a dense ViT, its twin on fewer tokens, and the controls.

A check that training, calibration and evaluation work together, in minutes on a CPU. What it finds says nothing of real pictures.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import save_checkpoint
from ..encoder import StepEncoder
from ..heads.decoders import LinearDecoder
from ..heads.exits import LinearExit
from ..info import CheckpointInfo
from ..policies.net import PolicyNet
from ..segmenter import StepSegmenter
from ..vit import ViT, ViTConfig
from .augment import Prepared, Recipe, batches
from .calibration import calibrate_exits, calibrate_policy
from .evaluation import evaluate
from .loop import train
from .scenes import Scenes
from .settings import TrainSettings

__all__ = ["SmokeSettings", "smoke"]

INFO = CheckpointInfo("scenes", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), classes=Scenes.classes)
VARIANTS = ("dense", "merged", "merged + exits", "random merging", "random halting", "oracle")


@dataclass(frozen=True)
class SmokeSettings:
    """Sizes. The dense model trains for ``epochs``, then as the twin that it is compared with for ``tuning`` more."""

    size: int = 192
    patch_size: int = 6
    width: int = 64
    depth: int = 6
    exits: tuple[int, ...] = (1, 3)
    scenes: int = 256
    held_out: int = 64
    epochs: int = 2
    tuning: int = 7
    batch: int = 4
    reduction: float = 2.05
    halted: float = 0.33
    seed: int = 0


def smoke(
    out: str | os.PathLike[str],
    settings: SmokeSettings | None = None,
    *,
    tell: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Train, calibrate and evaluate; writes ``dense``, ``policy`` and ``merged`` checkpoints and ``smoke.json`` to ``out``.

    Returns:
        What smoke.json holds: the settings, seconds by stage, and `evaluate`'s figures on held-out scenes: ``dense twin``, of the dense
        model trained as long as the merged one, and the variants of the merged model.
    """
    given, out = settings or SmokeSettings(), Path(out)
    torch.manual_seed(given.seed)
    seen, held_out = (Scenes(given.scenes, given.size, given.seed), Scenes(given.held_out, given.size, given.seed + 1))
    for_thresholds = Scenes(given.held_out, given.size, given.seed + 2)
    chosen = Prepared(for_thresholds, INFO.mean or (), INFO.std or ())
    vit = ViT(ViTConfig(given.width, given.depth, given.width // 32, given.size, given.patch_size))
    dense = StepSegmenter(StepEncoder(vit), LinearDecoder(given.width, len(Scenes.classes)))
    recipe = Recipe(scale=(1.0, 1.0), colour=False)
    stage = TrainSettings("all", given.epochs, given.batch, 1e-3, recipe=recipe, seed=given.seed)
    seconds: dict[str, float] = {}

    def learn(name: str, model: StepSegmenter, how: TrainSettings) -> None:
        started = time.monotonic()
        told = train(model, seen, how, out / name, info=INFO, progress=progress)
        seconds[name] = round(time.monotonic() - started, 1)
        tell(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in told.items())} in {seconds[name]} s")

    learn("dense", dense, stage)
    exits = {number: LinearExit(given.width, len(Scenes.classes)) for number in given.exits}
    merged = StepSegmenter(StepEncoder(copy.deepcopy(vit), PolicyNet(width=16), exits), copy.deepcopy(dense.decoder))
    learn("policy", merged, replace(stage, stage="policy", epochs=given.tuning, lr=3e-3, tolerance=0.05))
    calibrate_policy(merged, batches(chosen, given.batch), reduction=given.reduction)
    learn("exits", merged, replace(stage, stage="exits", epochs=2, views=1))
    calibrate_exits(merged, lambda: batches(chosen, given.batch), halted=given.halted)
    learn("dense twin", dense, replace(stage, epochs=given.tuning))
    learn("merged", merged, replace(stage, epochs=given.tuning))
    calibrate_exits(merged, lambda: batches(chosen, given.batch), halted=given.halted)
    save_checkpoint(merged, out / "merged", info=INFO)  # with the thresholds that are evaluated
    told: dict[str, Any] = {"mean": INFO.mean, "std": INFO.std, "classes": Scenes.classes, "batch": given.batch}
    found = {"dense twin": evaluate(dense, held_out, ("dense",), **told)["dense"]}
    found |= evaluate(merged, held_out, VARIANTS, **told)
    result = {"settings": asdict(given), "seconds": seconds, "held out": found}
    (out / "smoke.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result
