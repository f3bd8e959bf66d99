"""train: one stage of training, over epochs, from where the last run stopped."""

from __future__ import annotations

import copy
import csv
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ...extras import shown
from ...files import replacing
from ..checkpoints import save_checkpoint
from ..checkpoints.files import read_pickle
from ..info import CheckpointInfo
from ..segmenter import StepSegmenter
from .augment import Prepared, stacked
from .data import class_weights
from .objective import Features, Objective
from .optimizer import Optimizer, cosine
from .settings import TrainSettings

__all__ = ["train"]

STATE = "train.state"


def train(
    segmenter: StepSegmenter,
    data: Any,
    settings: TrainSettings,
    out: str | os.PathLike[str],
    *,
    info: CheckpointInfo,
    ignore_index: int = 255,
    resume: bool = False,
    workers: int = 0,
    evaluate: Callable[[StepSegmenter], dict[str, float]] | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Train one stage in place; the model ends in eval mode.

    Under ``torchrun``, with a process group, each process takes its share of every batch of ``batch * processes`` items.

    Args:
        segmenter: on its device, in its dtype: fp32, or bf16 with fp32 master weights.
        data: map-style; items are (uint8 [3, H, W], integer [H, W]), such as `LabelledPictures` and `Scenes`.
        settings: see `TrainSettings`.
        out: folder, made if missing: ``model.safetensors`` and its config, for `load_checkpoint`, after each epoch;
            ``log.csv``; ``train.state``, from which ``resume`` goes on. Files are replaced when their successors are complete.
        info: normalisation of the pictures (0.5 where it tells none), and what else is kept in the checkpoint.
        ignore_index: label of pixels that do not count.
        resume: go on from ``train.state``, where there is one. Equal to a run that was not interrupted.
        workers: processes that read pictures.
        evaluate: called after each epoch; its figures go to the log.
        progress: show a bar, where tqdm is installed.

    Returns:
        The last epoch's mean losses by name, and what ``evaluate`` returned.

    Raises:
        ValueError: no data, a state of other settings (named), of another model or damaged, a label out of range.
        FloatingPointError: the loss or its gradient is not finite: epoch, step and learning rate. Nothing of that epoch is saved.
        NotImplementedError: as `Objective`; a model that `save_checkpoint` cannot describe.
        OSError: a file cannot be written, such as for want of space; the ones before stay.
    """
    return _Training(segmenter, data, settings, Path(out), info, ignore_index, workers, progress).run(resume, evaluate)


class _Training:
    def __init__(
        self,
        segmenter: StepSegmenter,
        data: Any,
        settings: TrainSettings,
        out: Path,
        info: CheckpointInfo,
        ignore_index: int,
        workers: int,
        progress: bool,
    ) -> None:
        if len(data) == 0:
            raise ValueError("data: expected at least one labelled picture, got none")
        self.segmenter, self.settings, self.out = segmenter, settings, out
        self.workers, self.progress = workers, progress
        parameter = next(segmenter.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        told: dict[str, Any] = {name: getattr(settings, name) for name in ("exit_weight", "consistency", "tolerance")}
        if settings.stage == "policy" and settings.tolerance:
            told["class_weights"] = class_weights(data, segmenter.num_classes, ignore_index)
        self.objective = Objective(segmenter, settings.stage, ignore_index=ignore_index, **told)
        learned = self.objective.learned()
        self.module: Any = self.objective
        if self.world > 1:
            # First, as it makes the processes' weights equal. Of a policy those sides have no part that fit no crop.
            unused = settings.stage == "policy"
            self.module = DistributedDataParallel(self.objective, find_unused_parameters=unused)
        tuned = settings.lr, settings.weight_decay, settings.layer_decay, segmenter.encoder.vit.depth
        self.optimizer = Optimizer(learned, *tuned)
        mean, std = info.mean or (0.5,) * 3, info.std or (0.5,) * 3
        self.info = replace(info, mean=mean, std=std)  # what the model has learned with, told or not
        named = {"seed": settings.seed, "ignore_index": ignore_index}
        self.data = Prepared(data, mean, std, settings.recipe, **named)
        # In fp32: half precision would round its small steps away.
        self.average = copy.deepcopy(segmenter).float() if settings.ema else None
        beside = {"pictures": len(data), "dtype": str(self.dtype), "processes": self.world}
        self.kept = asdict(settings) | beside | {"ignore_index": ignore_index, "mean": info.mean, "std": info.std}
        self.cache: list[list[tuple[Features, Tensor]]] = []

    def run(self, resume: bool, evaluate: Callable[[StepSegmenter], dict[str, float]] | None) -> dict[str, float]:
        self.out.mkdir(parents=True, exist_ok=True)
        first, told = self._restore() if resume else (0, {})
        if self.rank == 0:  # refused now rather than after an epoch, and beside what an earlier run has left
            with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.out) as trial:
                save_checkpoint(self.segmenter, trial, info=self.info)
        for epoch in range(first, self.settings.epochs):
            started = time.monotonic()
            told = self.epoch(epoch)
            self.segmenter.eval()
            if evaluate is not None:
                told |= evaluate(self.average or self.segmenter)
            self.save(epoch + 1, told | {"seconds": round(time.monotonic() - started, 1)})
        self.segmenter.eval()
        if self.average is not None:
            self.segmenter.load_state_dict(self.average.state_dict())
        return told

    def epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the data: mean losses by name."""
        settings, totals = self.settings, dict[str, float]()
        self.objective.train()
        batches = self.batches(epoch)
        per_epoch = -(-len(batches) // settings.accumulate)
        steps = per_epoch * settings.epochs
        for number, (batch, labels) in enumerate(self.shown(batches, f"{settings.stage}, epoch {epoch + 1}")):
            group = number // settings.accumulate
            end = min((group + 1) * settings.accumulate, len(batches))  # the epoch's last group may be smaller
            step, last = epoch * per_epoch + group, number + 1 == end
            with nullcontext() if last or self.world == 1 else self.module.no_sync():
                losses = self.module(batch.to(self.device, self.dtype), self.checked(labels).to(self.device))
                (losses["loss"] / (end - group * settings.accumulate)).backward()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + float(loss.detach()) / len(batches)
            rate = cosine(step, steps, settings.warmup)
            at = f"epoch {epoch + 1}, step {step + 1} of {steps}, learning rate {rate * settings.lr:.3g}"
            finite("loss", float(losses["loss"].detach()), at)
            if last:
                # Of all processes: one whose own loss is finite must not save what another one's has spoilt.
                finite("gradients' norm", self.optimizer.step(rate, settings.clip), at)
                self.follow()
        if self.world > 1:  # each process has seen its share
            means = torch.tensor(list(totals.values()), device=self.device) / self.world
            dist.all_reduce(means)
            totals = dict(zip(totals, means.tolist(), strict=True))
        return totals

    def checked(self, labels: Tensor) -> Tensor:
        """Labels of classes that the model has; on a GPU cross-entropy would end the process instead."""
        classes, ignored = self.segmenter.num_classes, self.objective.ignore_index
        wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
        if self.settings.stage != "policy" and wrong.any():
            raise ValueError(f"labels: expected some below {classes}, or {ignored}, got {int(labels[wrong][0])}")
        return labels

    @torch.no_grad()
    def follow(self) -> None:
        """The average's step."""
        if self.average is not None:
            own = self.segmenter.state_dict()
            for name, tensor in self.average.state_dict().items():
                if tensor.is_floating_point():  # statistics of batch norm, too; what does not learn stays exactly
                    tensor.lerp_(own[name].to(tensor.dtype), 1 - self.settings.ema)
                else:
                    tensor.copy_(own[name])

    def batches(self, epoch: int) -> Any:
        """This process's batches of an epoch, with a length: of images, or of features computed once."""
        if not (self.objective.frozen_backbone and self.settings.views):
            return self.loader(epoch)
        view = epoch % self.settings.views
        while len(self.cache) <= view:
            self.cache.append(list(self.features(len(self.cache))))
        seen, generator = self.cache[view], torch.Generator().manual_seed(self.settings.seed + epoch)
        return [seen[i] for i in torch.randperm(len(seen), generator=generator, device="cpu").tolist()]

    def features(self, view: int) -> Iterator[tuple[Features, Tensor]]:
        for images, labels in self.shown(self.loader(view), f"features of view {view + 1}"):
            seen = self.objective.features(images.to(self.device, self.dtype))
            yield seen.to(torch.device("cpu"), torch.float16), labels.int()

    def loader(self, epoch: int) -> DataLoader[tuple[Tensor, Tensor]]:
        self.data.epoch, size = epoch, self.settings.batch * self.world
        generator = torch.Generator().manual_seed(self.settings.seed + epoch)
        order = torch.randperm(len(self.data), generator=generator, device="cpu")
        count = -(-len(order) // size)
        whole = order.repeat(-(-count * size // len(order)))[: count * size]  # the last batch takes some twice
        own = whole.view(count, size)[:, self.rank :: self.world]
        return DataLoader(self.data, batch_sampler=own.tolist(), num_workers=self.workers, collate_fn=stacked)

    def shown(self, batches: Any, what: str) -> Any:
        if self.progress and self.rank == 0:
            return shown(batches, what)
        return batches

    def save(self, epochs: int, told: dict[str, float]) -> None:
        if self.rank:
            return
        save_checkpoint(self.average or self.segmenter, self.out, info=self.info)
        state = {
            "settings": self.kept,
            "epochs": epochs,
            "told": told,
            "model": self.segmenter.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state(),
        }
        try:
            with replacing(self.out / STATE) as part, part.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # PyTorch's own words, where the system's are wanted
            raise OSError(f"{self.out / STATE} cannot be written: {error.__context__ or error}") from error
        log(self.out, epochs, told)

    def _restore(self) -> tuple[int, dict[str, float]]:
        """From ``train.state``: epochs done, and the last one's figures."""
        path = self.out / STATE
        if not path.exists():
            return 0, {}
        state: Any = read_pickle(path)
        saved, now = state["settings"], self.kept
        other = [f"{name} {saved.get(name)}" for name in now if now[name] != saved.get(name)]
        if other:
            raise ValueError(
                f"resume: expected the settings of {path}, {', '.join(other)}, got others: name another out"
            )
        try:
            self.segmenter.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()[:200]
            raise ValueError(f"resume: expected the model of {path}, got another one: {reason}") from error
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load(state["optimizer"])
        return state["epochs"], state["told"]


def finite(name: str, value: float, at: str) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: expected a finite number, got {value} in {at}")


def log(out: Path, epochs: int, told: dict[str, float]) -> None:
    """A row of log.csv, and of TensorBoard's file where that is installed."""
    path = out / "log.csv"
    new = epochs == 1 or not path.exists()
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["epoch", *told])
        writer.writerow([epochs, *(f"{value:.6g}" for value in told.values())])
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(out)) as board:
            for name, value in told.items():
                board.add_scalar(name, value, epochs)
