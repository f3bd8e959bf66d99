"""What tests/train/test_processes.py runs in two processes: they are forks of this one, which has no threads yet, and import nothing anew."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from train_cases import INFO, SIZE, items, settings, small_segmenter

from step_kernels.model import PolicyNet, VariancePolicy
from step_kernels.model.train import Objective, Scenes, train


def gradients_of(rank: int, world: int, folder: Path) -> None:
    """Of this process's share of four images, in which it has its own number of tokens and of labelled pixels."""
    images, labels = items(4)
    labels[1, :50] = 255
    own = slice(rank, None, world)
    segmenter = small_segmenter(VariancePolicy(0.3), threshold=0.3)
    objective = Objective(segmenter, "all")
    learned = objective.learned()
    module = torch.nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
    tokens = segmenter.trace(images[own]).layout.capacity
    module(images[own], labels[own])["loss"].backward()
    torch.save((tokens, {name: p.grad for name, p in learned.items()}), folder / f"gradients {rank} of {world}")


def policy_of(rank: int, world: int, folder: Path) -> None:
    """Of a policy one of whose sides fits no picture."""
    segmenter = small_segmenter(PolicyNet((2, 4, 16), width=4), seed=rank)
    given = settings("policy", epochs=1, batch=1)
    told = train(segmenter, Scenes(6, SIZE, 3), given, folder / "policy", info=INFO)
    torch.save((told, dict(segmenter.named_parameters())), folder / f"policy {rank}")


def joined(rank: int, port: int, run: Callable[..., None], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    run(rank, 2, folder)
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for run in (gradients_of, policy_of):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(joined, (port, run, folder), nprocs=2, start_method="fork")
    gradients_of(0, 1, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
