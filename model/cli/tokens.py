"""`step-kernels tokens CHECKPOINT IMAGES... --out DIR`: where tokens go on pictures, as files, JSON and a page."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from step_kernels_cli import UsageError

from ...extras import import_extra, shown
from ...files import replacing
from ..flops import count_flops, counted_run
from ..policies.base import VariancePolicy
from ..policies.net import PolicyNet
from ..precision import ThresholdModule
from ..segmenter import StepSegmenter
from ..train.data import checked_labels, class_numbers
from .census import Census, Outcome
from .device import checked_device
from .labeller import WHOLE, Labeller
from .page import page, panels
from .palettes import distinct_colours, find_palette
from .pictures import Task, check_writable, find_pictures, plan, read_picture, reason_of
from .sources import trained

__all__ = ["run"]

EXITS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # thresholds that are tried
POLICY = (0.3, 0.5, 0.7, 0.9, 0.97)  # of a PolicyNet, a probability
FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of a VariancePolicy's own, a standard deviation


def run(options: argparse.Namespace) -> int:
    """0, or 1 where some pictures could not be read; UsageError where nothing can be as asked."""
    import_extra("PIL", "Pillow", "predict")
    tasks = plan(find_pictures(options.images), options.out / "traces", False)
    if options.labels is not None and not options.labels.is_dir():
        raise UsageError(f"--labels expects a folder, got {options.labels}")
    work = Work.of(trained(options, checked_device(options.device)), options)
    try:
        for _, modules, value in work.settings():
            with at_threshold(modules, value):
                pass
    except ValueError as error:
        raise UsageError(f"--thresholds, --policy-thresholds: {error}") from None
    if min(options.scales, default=1) <= 0:
        raise UsageError(f"--scales expects positive factors, got {min(options.scales):g}")
    for folder in (options.out, options.out / "traces"):
        check_writable(folder)
    for number, task in enumerate(shown(tasks, "tokens", unit=" pictures", leave=True)):
        shows, sweeps = (options.pictures, len(work.drawn)), (options.sweep, work.swept)
        draw, sweep = (due(count, have, number, len(tasks)) for count, have in (shows, sweeps))
        work.take(task, draw=draw, sweep=sweep)
    if work.whole.pictures:
        result = work.result()
        for name, text in (("json", dumped(result)), ("html", page(result, work.drawn, work.palette))):
            with replacing(options.out / f"tokens.{name}") as part:
                part.write_text(text, encoding="utf-8")
    info = work.model.segmenter.info
    whole = ", run whole at their own size, not as the checkpoint tells" if info.window or info.resize else ""
    print(f"{work.whole.pictures} of {len(tasks)} pictures{whole}: {options.out / 'tokens.html'}")
    for picture, reason in work.failed:
        print(f"{picture}: {reason}", file=sys.stderr)
    return 1 if work.failed else 0


def due(count: int, have: int, number: int, length: int) -> bool:
    """Whether picture ``number`` of so many is the next of ``count`` that lie evenly; one that fails leaves its turn to the next."""
    return have < count and have * length <= number * count


def dumped(result: dict[str, Any]) -> str:
    """JSON with a line for each picture and part."""
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "images"]
    images = ",\n".join(json.dumps(own) for own in result["images"])
    return "{\n" + ",\n".join([*parts, f'"images": [\n{images}\n]']) + "\n}\n"


@dataclass(eq=False)
class Work:
    """A pass over the pictures; what it keeps grows by a line for each."""

    model: Labeller
    options: argparse.Namespace
    classes: Sequence[str]
    palette: np.ndarray
    whole: Census = field(init=False)
    others: dict[tuple[str, float], Census] = field(default_factory=dict)  # other sizes and thresholds: kind, value
    images: list[dict[str, Any]] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    swept: int = 0
    failed: list[list[str]] = field(default_factory=list)
    dense_flops: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense, self.whole = self.model.dense().segmenter, self.census()

    @classmethod
    def of(cls, segmenter: StepSegmenter, options: argparse.Namespace) -> Work:
        info, count = segmenter.info, segmenter.num_classes
        palette = find_palette(None, info.palette, count)
        given = info.classes or [f"class {number}" for number in range(count)]
        classes = [name if given.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(given)]
        model = Labeller(segmenter.eval(), info.mean or (), info.std or (), WHOLE)
        return cls(model, options, classes, distinct_colours(count) if palette is None else palette)

    def census(self) -> Census:
        encoder = self.model.segmenter.encoder
        return Census(list(encoder.exit_heads()), self.classes, encoder.vit.patch_size, self.options.ignore_index)

    def take(self, task: Task, *, draw: bool, sweep: bool) -> None:
        """Count one picture, or keep why it cannot be."""
        with self.named(task, "not counted"):
            pixels, labels = read_picture(task.picture), self.labels(task)
            if labels is not None and labels.shape != pixels.shape[:2]:
                sizes = " x ".join(map(str, pixels.shape[:2])), " x ".join(map(str, labels.shape))
                raise ValueError(f"expected labels of the picture's size, {sizes[0]}, got {sizes[1]}")
            seen = self.outcome(pixels, labels)
            seen.trace.save(task.labels.with_suffix(".npz"))
            self.images.append({"name": task.picture.name} | self.whole.add(seen))
            if draw:
                self.drawn.append(panels(task.picture.name, pixels, seen, self.whole.patch_size, self.palette))
            if sweep:
                with self.named(task, "counted as it is only"):
                    self.sweep(pixels, labels, seen)

    @contextlib.contextmanager
    def named(self, task: Task, what: str) -> Iterator[None]:
        """What is wrong with one picture ends nothing."""
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
            if isinstance(error, RuntimeError) and not full:
                raise
            reason = "out of memory" if full else " ".join(reason_of(error).splitlines())
            self.failed.append([str(task.picture), f"{what}: {reason}"])

    def labels(self, task: Task) -> np.ndarray | None:
        if self.options.labels is None:
            return None
        path = self.options.labels / f"{task.picture.stem}.png"
        if not path.is_file():
            raise ValueError(f"expected its labels in {path}, which is not there")
        return checked_labels(path, class_numbers(path), len(self.classes), self.options.ignore_index)

    def outcome(self, pixels: np.ndarray, labels: np.ndarray | None, dense: np.ndarray | None = None) -> Outcome:
        """One picture, run. ``dense``: what the dense model says, where that is known."""
        segmenter, image = self.model.segmenter, self.model.image(pixels)
        shape = tuple(image.shape)
        flops, scores, trace = counted_run(segmenter, image)
        found = segmenter.labels(scores, pixels.shape[:2])
        if dense is None:
            dense = self.dense.predict(image)[0].cpu().numpy()
        if shape not in self.dense_flops:
            self.dense_flops[shape] = count_flops(segmenter, shape).total
        return Outcome(trace.trim().to("cpu"), found[0].cpu().numpy(), dense, labels, flops, self.dense_flops[shape])

    def sweep(self, pixels: np.ndarray, labels: np.ndarray | None, seen: Outcome) -> None:
        """The same picture at other sizes and thresholds: all of them, or an error."""
        seen_at = {("as they are", 0.0): seen}
        for scale in self.options.scales:
            own = scaled(pixels, scale, smooth=True), None if labels is None else scaled(labels, scale)
            seen_at["size", scale] = self.outcome(*own)
        for kind, modules, value in self.settings():
            with at_threshold(modules, value):
                seen_at[kind, value] = self.outcome(pixels, labels, seen.dense)
        for key, outcome in seen_at.items():
            self.others.setdefault(key, self.census()).add(outcome)
        self.swept += 1

    def settings(self) -> Iterator[tuple[str, Sequence[ThresholdModule], float]]:
        """What thresholds are tried: told, of which modules, the value."""
        encoder = self.model.segmenter.encoder
        heads, policy = list(encoder.exit_heads().values()), encoder.policy
        for value in self.options.thresholds or EXITS if heads else ():
            yield "exits", heads, value
        if isinstance(policy, PolicyNet):
            for value in self.options.policy_thresholds or POLICY:
                yield "policy", [policy], value
        elif isinstance(policy, VariancePolicy):
            own = float(policy.threshold)
            for value in self.options.policy_thresholds or [factor * own for factor in FACTORS]:
                yield "policy", [policy], value

    def result(self) -> dict[str, Any]:
        """What tokens.json holds."""
        encoder = self.model.segmenter.encoder
        vit, heads = encoder.vit, encoder.exit_heads()
        model = {
            "classes": self.classes, "checkpoint": self.options.checkpoint.resolve().name, "width": vit.embed_dim, "depth": vit.depth, "patch_size": vit.patch_size,
            "dtype": str(vit.embedding.weight.dtype).removeprefix("torch."),
            "policy": "none" if encoder.policy is None else type(encoder.policy).__name__,
            "exits": {str(block): round(float(head.threshold), 6) for block, head in heads.items()},
        }  # fmt: skip
        parts = [
            {"name": named(*key), "kind": key[0], "value": key[1]} | own.result() for key, own in self.others.items()
        ]
        return {
            "model": model, "labels": self.options.labels is not None, "all": self.whole.result(),
            "resolutions": [part for part in parts if part["kind"] in ("as they are", "size")],
            "thresholds": [part for part in parts if part["kind"] != "size"],
            "failed": [[Path(picture).name, reason] for picture, reason in self.failed], "images": self.images,
        }  # fmt: skip


def named(kind: str, value: float) -> str:
    return f"{value:g} x" if kind == "size" else kind if kind == "as they are" else f"{kind} {value:.3g}"


def scaled(pixels: np.ndarray, scale: float, *, smooth: bool = False) -> np.ndarray:
    """A picture, or class numbers, at another size."""
    from PIL import Image

    size = tuple(max(1, round(scale * side)) for side in pixels.shape[1::-1])
    image = Image.fromarray(pixels if smooth else pixels.astype(np.int32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST))


@contextlib.contextmanager
def at_threshold(modules: Sequence[ThresholdModule], value: float) -> Iterator[None]:
    """These modules' thresholds filled with ``value`` for a while. ValueError where they do not take it."""
    own = [
        (module, name, buffer.clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
        if name.startswith("threshold")
    ]
    try:
        for module, name, _ in own:
            setattr(module, name, value)
        yield
    finally:
        for module, name, before in own:
            module.get_buffer(name).copy_(before)
