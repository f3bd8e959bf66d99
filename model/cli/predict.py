"""`step-kernels predict CHECKPOINT IMAGES... --out DIR`: pictures to label PNGs of the same size."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from step_kernels_cli import UsageError

from ...extras import import_extra, shown
from ..segmenter import StepSegmenter
from .device import checked_device, processes
from .labeller import Labeller, time_of_whole
from .palettes import find_palette
from .pictures import Task, check_writable, find_pictures, plan, read_picture, reason_of, write
from .sources import normalised, segmenter_of

__all__ = ["run"]

MOST_CLASSES = 1 << 16  # that a 16-bit PNG can tell apart
MANY_PATCHES = 1 << 14  # 2048 x 2048 pixels: more at once take long, and attention's share grows with their square
SAMPLE = 64  # pictures that a policy is calibrated on


@dataclass
class Report:
    """What became of the pictures that one process has had."""

    labelled: int = 0
    failed: list[tuple[Path, str]] = field(default_factory=list)
    took: list[tuple[int, float]] = field(default_factory=list)  # tokens and seconds of each picture
    dense: list[tuple[int, float]] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)  # shares of pixels

    def add(self, other: Report) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def run(options: argparse.Namespace) -> int:
    """Label the pictures: 0, or 1 when some could not be labelled; UsageError where nothing can be as asked."""
    check_windows(options)
    import_extra("PIL", "Pillow", "predict")
    tasks = plan(find_pictures(options.images), options.out, options.overlay)
    # A group only for the one summary: the first to end waits for the last.
    rank, world = processes(timeout=timedelta(days=7))
    labeller, palette = prepare(options, tasks, rank if world > 1 else None)
    if rank == 0:
        print(summary(labeller, options), flush=True)
    work = Work(labeller, labeller.dense() if options.compare else None, palette)
    share, begun = tasks[rank::world], time.monotonic()
    try:
        work.label_all(share)
    except KeyboardInterrupt:
        tell(work.report, len(share), time.monotonic() - begun, options.out)
        raise
    report = work.report if world == 1 else gathered(work.report, rank, world)
    if rank:
        return 0
    tell(report, len(tasks), time.monotonic() - begun, options.out)
    return 1 if report.failed else 0


def check_windows(options: argparse.Namespace) -> None:
    if options.stride and options.window in (None, "whole"):
        raise UsageError("--stride needs --window")
    if options.stride and any(step > side for step, side in zip(options.stride, options.window, strict=True)):
        window, stride = map(shape_of, (options.window, options.stride))
        raise UsageError(f"--stride expects at most --window ({window}), or pixels get no label, got {stride}")


def gathered(report: Report, rank: int, world: int) -> Report:
    """On the first process, all processes' reports."""
    reports: list[Report] = [report] * world
    dist.gather_object(report, reports if rank == 0 else None)
    dist.destroy_process_group()
    together = Report()
    for part in reports:
        together.add(part)
    return together


def prepare(options: argparse.Namespace, tasks: Sequence[Task], rank: int | None) -> tuple[Labeller, np.ndarray | None]:
    """What labels, with its policy, and the palette; the folder for the results is there."""
    one_of_many = options.device is None and rank is not None and torch.cuda.is_available()
    device = checked_device(f"cuda:{dist.get_node_local_rank(rank)}" if one_of_many else options.device)
    segmenter = load(options)
    info, known = segmenter.info, normalised(segmenter.info, options, options.checkpoint)
    palette = find_palette(options.palette, info.palette, segmenter.num_classes)
    encoder = segmenter.encoder
    if options.compare and options.reduction is None and encoder.policy is None and not encoder.exits:
        raise UsageError(f"--compare: {options.checkpoint} neither merges nor exits, so it is dense: see --reduction")
    check_writable(options.out)
    try:
        segmenter = segmenter.to(device, None if options.dtype is None else getattr(torch, options.dtype))
        views = views_of(options) | {"max_crops": options.max_crops}
        labeller = Labeller(segmenter, known.mean or (), known.std or (), views)
        if options.reduction is not None:
            labeller.reduce(readable(tasks[:: -(-len(tasks) // SAMPLE)]), options.reduction)
    except torch.OutOfMemoryError as error:
        raise UsageError(f"out of GPU memory ({str(error).splitlines()[0]})") from None
    return labeller, palette


def readable(tasks: Sequence[Task]) -> Iterator[np.ndarray]:
    """The pixels of those pictures that can be read; UsageError where none can."""
    count = 0
    for task in tasks:
        with suppress(ValueError):
            yield read_picture(task.picture)
            count += 1
    if not count:
        raise UsageError(f"--reduction: none of {len(tasks)} pictures can be read, {tasks[0].picture} first")


def load(options: argparse.Namespace) -> StepSegmenter:
    """The checkpoint's segmenter."""
    path, segmenter = options.checkpoint, segmenter_of(options)
    if (channels := segmenter.encoder.vit.embedding.in_channels) != 3:
        raise UsageError(f"{path} takes {channels} channels, pictures have 3")
    if segmenter.num_classes > MOST_CLASSES:
        raise UsageError(f"{path} has {segmenter.num_classes} classes, a PNG holds at most {MOST_CLASSES}")
    return segmenter


def summary(labeller: Labeller, options: argparse.Namespace) -> str:
    """One line: what runs, and where its normalisation and windows come from."""
    weight, info = labeller.segmenter.encoder.vit.embedding.weight, labeller.segmenter.info
    told = []
    for name, given, known in (("mean", options.mean, info.mean), ("std", options.std, info.std)):
        source = "as given" if given else "the checkpoint's" if known else "ImageNet's, as the checkpoint tells none"
        told.append(f"{name} {', '.join(f'{value:.3g}' for value in getattr(labeller, name))} ({source})")
    if (size := options.resize or info.resize) not in (None, "own"):
        short, *long = size if isinstance(size, tuple) else (size,)
        most = f", at most {long[0]} of the longer" if long else ""
        source = "as given" if options.resize else "the checkpoint's"
        told.append(f"run at {short} pixels of the shorter side{most} ({source})")
    window, stride = (options.window, options.stride) if options.window else (info.window, info.stride)
    if labeller.windowed:
        source = "as given" if options.window else "the checkpoint's"
        told.append(f"windows {shape_of(window)}, stride {shape_of(stride or window)} ({source})")
        told += ["smaller pictures enlarged to them"] if info.enlarge else []
    told += ["scores stretched over the picture"] if info.stretch else []
    told += info.notes
    if options.reduction is not None:
        told.append(f"{labeller.segmenter.encoder.policy}, calibrated on these pictures")
    return (
        f"{info.format} checkpoint, {labeller.segmenter.num_classes} classes, {weight.device} "
        f"{str(weight.dtype).removeprefix('torch.')}, {', '.join(told)}"
    )


def views_of(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `predict_windows` that were asked for."""
    return {name: getattr(options, name) for name in ("window", "stride", "resize", "scales", "mirror")}


def shape_of(size: Any) -> str:
    return "x".join(map(str, size))


@dataclass
class Work:
    """The labelling of one process's share."""

    labeller: Labeller
    dense: Labeller | None  # None: nothing to compare with
    palette: np.ndarray | None
    report: Report = field(default_factory=Report)
    told_to_wait: bool = False

    def label_all(self, tasks: Sequence[Task]) -> None:
        """Label the pictures; the report holds what was done at any time."""
        for task in shown(tasks, "labelling", unit=" pictures", leave=True):
            if (reason := self.label(task)) is None:
                self.report.labelled += 1
            else:
                self.report.failed.append((task.picture, reason))

    def label(self, task: Task) -> str | None:
        """Label one picture; the reason where it cannot be."""
        try:
            pixels = read_picture(task.picture)
            self.tell_to_wait(task.picture, pixels)
            labels, took = self.labeller.labels(pixels)
            if self.dense is not None:
                dense_labels, dense_took = self.dense.labels(pixels)
                self.report.dense.append(dense_took)
                self.report.agreement.append(float((dense_labels == labels).mean()))
            self.report.took.append(took)
            write(labels, pixels, task, self.labeller.segmenter.num_classes, self.palette)
        except torch.OutOfMemoryError:
            return "out of GPU memory: try --window, or a smaller --max-crops"
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                return "out of memory: try --window"
            raise
        except ValueError as error:  # the picture, or a size that the model refuses
            return str(error)
        except OSError as error:
            return f"the result cannot be written: {reason_of(error)}"
        return None

    def tell_to_wait(self, picture: Path, pixels: np.ndarray) -> None:
        """Once, before a large picture is run at once: how long that will take, and how long in windows."""
        vit, (height, width) = self.labeller.segmenter.encoder.vit, self.labeller.size(pixels)
        patches = height * width // vit.patch_size**2
        if self.told_to_wait or self.labeller.windowed or patches <= MANY_PATCHES:
            return
        self.told_to_wait, window = True, vit.config.image_shape
        whole, parts = (told_time(seconds) for seconds in time_of_whole(self.labeller, pixels, window))
        print(
            f"{picture}: {width} x {height} pixels at once will take about {whole}; "
            f"about {parts} with --window {window[0]}x{window[1]}",
            file=sys.stderr,
        )


def told_time(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} seconds"


def tell(report: Report, asked: int, seconds: float, out: Path) -> None:
    """What could not be done on stderr, first, as nobody may read all of stdout (``| head``); what was done there."""
    for picture, reason in report.failed:
        print("not labelled: " + " ".join(f"{picture}: {reason}".splitlines()), file=sys.stderr)
    print(f"{report.labelled} of {asked} pictures labelled in {seconds:.1f} s: {out}")
    for what, took in (("a picture", report.took), ("dense", report.dense)):
        if took:
            tokens, times = zip(*took, strict=True)
            # Of times the median, as the first run warms up.
            print(
                f"{what}: {statistics.mean(tokens):.0f} tokens, {1e3 * statistics.median(times):.0f} ms without files"
            )
    if report.agreement:
        print(f"{statistics.mean(report.agreement):.2%} of the pixels have the same label either way")
