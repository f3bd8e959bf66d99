"""`step-kernels train`: one stage of training, or the smoke run."""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import torch
import torch.distributed as dist

from step_kernels_cli import UsageError

from ..segmenter import StepSegmenter
from ..train.augment import Prepared, Recipe, stacked
from ..train.evaluation import evaluate
from ..train.loop import train
from ..train.objective import Objective
from ..train.settings import TrainSettings
from ..train.smoke import smoke
from .device import checked_device, processes
from .evaluate import variants_of
from .pictures import check_writable
from .sources import initial, open_data

__all__ = ["run"]

RATES = {"heads": 1e-3, "policy": 1e-3, "exits": 1e-3, "all": 5e-5}  # peak learning rates


def run(options: argparse.Namespace) -> int:
    """0, or UsageError where nothing can be as asked."""
    check_writable(options.out)
    if options.smoke:
        smoke(options.out, progress=True)
        return 0
    missing = [f"--{name}" for name in ("data", "init", "stage") if getattr(options, name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is needed (or --smoke)")
    rank, device = joined(options.device)
    segmenter = initial(options)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    segmenter = segmenter.to(device, getattr(torch, dtype))
    data = open_data(options, segmenter.num_classes, options.split)
    settings = settings_of(options)
    held_out = None if options.val_split is None else open_data(options, segmenter.num_classes, options.val_split)
    info, ignored = segmenter.info, options.ignore_index

    def figures(model: StepSegmenter) -> dict[str, float]:
        name = variants_of(model)[-1]
        told = evaluate(model, held_out, (name,), mean=info.mean or (), std=info.std or (), ignore_index=ignored)[name]
        return {"miou": told["miou"] or 0.0, "reduction": told["reduction"], "halted": told["halted"]["all"]}

    try:
        if options.dry_run:
            return dry_run(segmenter, data, settings, options)
        told = train(
            segmenter, data, settings, options.out, info=info, ignore_index=ignored, resume=options.resume,
            workers=options.workers, evaluate=None if held_out is None else figures, progress=True,
        )  # fmt: skip
    except (ValueError, FloatingPointError, NotImplementedError, OSError) as error:
        # Of a process that reads pictures the message is a whole traceback, which ends in the error's own.
        raise UsageError(str(error).strip().splitlines()[-1]) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        print(", ".join(f"{name} {value:.4g}" for name, value in told.items()), f": {options.out}", sep="")
    return 0


def joined(name: str | None) -> tuple[int, torch.device]:
    """This process's number and device; under torchrun it joins the others."""
    cuda = torch.cuda.is_available() and name != "cpu"
    rank, world = processes("nccl" if cuda else "gloo")
    if world == 1:
        return rank, checked_device(name)
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return rank, device


def settings_of(options: argparse.Namespace) -> TrainSettings:
    names = ("stage", "epochs", "batch", "weight_decay", "warmup", "clip", "accumulate", "layer_decay", "ema")
    named: dict[str, Any] = {name: getattr(options, name) for name in names}
    named |= {name: getattr(options, name) for name in ("exit_weight", "consistency", "tolerance", "views", "seed")}
    try:
        recipe = Recipe(options.crop, tuple(options.scale), 0.0 if options.no_flip else 0.5, not options.no_colour)
        return TrainSettings(**named, lr=RATES[options.stage] if options.lr is None else options.lr, recipe=recipe)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def dry_run(segmenter: StepSegmenter, data: Any, settings: TrainSettings, options: argparse.Namespace) -> int:
    """One batch forwards and backwards: sizes, memory, seconds of an epoch. Writes nothing."""
    info, parameter = segmenter.info, next(segmenter.parameters())
    ignored = {"ignore_index": options.ignore_index}
    weights: dict[str, Any] = {name: getattr(settings, name) for name in ("exit_weight", "consistency", "tolerance")}
    objective = Objective(segmenter, settings.stage, **ignored, **weights)
    learned = objective.learned()
    prepared = Prepared(data, info.mean or (), info.std or (), settings.recipe, seed=settings.seed, **ignored)
    images, labels = stacked([prepared[i % len(prepared)] for i in range(settings.batch)])
    objective.train()
    for _ in range(2):  # the first one compiles and allocates
        started = time.perf_counter()
        losses = objective(images.to(parameter.device, parameter.dtype), labels.to(parameter.device))
        losses["loss"].backward()
        told = {name: float(loss.detach()) for name, loss in losses.items()}
        seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if parameter.is_cuda:
        memory = torch.cuda.max_memory_allocated(parameter.device)
    steps = -(-len(data) // settings.batch)
    count = sum(weight.numel() for weight in learned.values())
    print(f"{len(data)} pictures, batches {list(images.shape)} {str(parameter.dtype).removeprefix('torch.')}")
    print(f"stage {settings.stage} learns {count:,} of {sum(p.numel() for p in segmenter.parameters()):,} parameters")
    print(f"{memory / 2**30:.2f} GiB, {seconds:.2f} s a step, {steps * seconds:.0f} s an epoch of {steps} steps")
    print("losses of one batch: " + ", ".join(f"{name} {value:.4g}" for name, value in told.items()))
    return 0
