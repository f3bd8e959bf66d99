"""`step-kernels evaluate`: accuracy against tokens, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from step_kernels_cli import UsageError

from ...extras import import_extra, shown
from ...files import replacing
from ..segmenter import StepSegmenter
from ..train.calibration import calibrate_exits, calibrate_policy
from ..train.evaluation import VARIANTS, evaluate
from .device import checked_device
from .pictures import check_writable
from .predict import check_windows, views_of
from .sources import batches, open_data, trained
from .tables import markdown

__all__ = ["run"]

COLUMNS = ("miou", "border_miou", "thin_miou", "agreement", "reduction", "gflops", "images_per_second")


def run(options: argparse.Namespace) -> int:
    """0, or UsageError where nothing can be as asked."""
    unknown = [name for name in options.variants or () if name not in VARIANTS]
    if unknown:
        raise UsageError(f"--variants expects some of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    check_windows(options)
    if options.out is not None:
        check_writable(options.out.parent)
        if options.out.is_dir() or options.out.suffix == ".png":
            raise UsageError(f"--out expects a file such as run.json, whose plot is run.png, got {options.out}")
    segmenter = trained(options, checked_device(options.device))
    data = open_data(options, segmenter.num_classes, options.split)
    told = {
        "mean": segmenter.info.mean, "std": segmenter.info.std, "classes": segmenter.info.classes,
        "ignore_index": options.ignore_index, "batch": options.batch, "border": options.border, "progress": shown,
        "views": views_of(options),
    }  # fmt: skip
    try:
        found = evaluate(segmenter, data, options.variants or variants_of(segmenter), **told)
        found |= curve(segmenter, data, options, told)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    print(table(found))
    if options.out is not None:
        result = {"checkpoint": str(options.checkpoint), "data": str(options.data), "split": options.split}
        result |= {"pictures": len(data), "variants": found}
        with replacing(options.out) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        plot(found, options.out.with_suffix(".png"))
    return 0


def variants_of(segmenter: StepSegmenter) -> list[str]:
    """What the checkpoint has."""
    has = {"merged": segmenter.encoder.policy is not None, "merged + exits": len(segmenter.encoder.exits) > 0}
    return ["dense", *(name for name, there in has.items() if there)]


def curve(
    segmenter: StepSegmenter, data: Any, options: argparse.Namespace, told: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Figures at other thresholds, those that leave so many tokens of the pictures of ``--calibrate-split``."""
    found: dict[str, dict[str, Any]] = {}
    if not (options.reductions or options.halts):
        return found
    chosen = open_data(options, segmenter.num_classes, options.calibrate_split)
    own = copy.deepcopy(segmenter.encoder.policy)
    for reduction in options.reductions or ():
        calibrate_policy(segmenter, batches(segmenter, chosen, options.batch, "policy"), reduction=reduction)
        found[f"merged, {reduction:g}x"] = evaluate(segmenter, data, ("merged",), **told)["merged"]
    halting = segmenter.with_policy(own)  # the checkpoint's own thresholds, not those of the last reduction
    for halted in options.halts or ():
        calibrate_exits(halting, lambda: batches(segmenter, chosen, options.batch, "exits"), halted=halted)
        name = "merged + exits"
        found[f"{name}, {halted:.0%} halted"] = evaluate(halting, data, (name,), **told)[name]
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    rows = [["", *(name.replace("_", " ") for name in COLUMNS), "halted %"]]
    for name, figures in found.items():
        values = ["" if figures.get(column) is None else f"{figures[column]:g}" for column in COLUMNS]
        rows.append([name, *values, f"{figures['halted']['all']:g}"])
    return markdown(rows)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """mIoU against tokens and against GFLOPs; nothing without matplotlib."""
    try:
        pyplot = import_extra("matplotlib.pyplot", "matplotlib", "bench")
    except ImportError:
        return
    pyplot.switch_backend("agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, key, label in zip(axes, ("tokens", "gflops"), ("tokens per picture", "GFLOPs per picture"), strict=True):
        labelled = [(name, figures) for name, figures in found.items() if figures["miou"] is not None]
        for number, (name, figures) in enumerate(sorted(labelled, key=lambda item: item[1]["miou"])):
            at = figures[key], figures["miou"]
            axis.plot(*at, "o")
            below = {"ha": "left", "xytext": (3, -9)}, {"ha": "right", "xytext": (-3, 4)}  # neighbours keep apart
            axis.annotate(name, at, fontsize=7, textcoords="offset points", **below[number % 2])
        axis.margins(x=0.25, y=0.15)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU, %")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
