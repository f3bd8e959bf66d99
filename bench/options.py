"""The command line, and what it asks of every job."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from step_kernels.model.cli.errors import OneLineParser, UsageError, checked_device
from step_kernels.model.vit import PRESETS

LATEST = Path(__file__).resolve().parent / "results" / "latest"
PATCH_SIZE = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """One run."""

    device: torch.device
    dtype: torch.dtype
    vit: tuple[str, ...] = ("small",)  # presets; the first one is the job's main model
    size: tuple[int, ...] = (512,)  # sides of the square images in pixels
    batch: tuple[int, ...] = (4,)  # images per call
    seconds: float = 20.0  # of the clock, for each case
    policy: str = "variance"  # executed and counted; "given": its layouts are there before the clock starts
    compile: bool = False  # whether contenders that torch.compile makes take part
    only: tuple[str, ...] = ()  # parts of case or contender names; empty for all
    images: Path | None = None  # a folder of pictures; None for scikit-image's photographs
    out: Path = LATEST

    @property
    def fixed(self) -> dict[str, str]:
        """What every row says."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}

    def command(self, job: str) -> str:
        """What repeats the run, without paths: a folder's name says more about the person than about the run."""
        known = {**vars(self), "dtype": self.fixed["dtype"]}
        words = ["python -m bench", job, "--compile" if self.compile else "--no-compile"]
        for flag in ("device", "dtype", "vit", "size", "batch", "seconds", "policy", "only"):
            values = known[flag] if isinstance(known[flag], tuple) else (known[flag],)
            words += [f"--{flag}", *map(str, values)] if values else []
        return " ".join([*words, *(["--images FOLDER"] if self.images else [])])


def parser(jobs: Sequence[str]) -> OneLineParser:
    """Of ``python -m bench``, whose first word is one of these jobs, `report` or `all`."""
    made = OneLineParser(prog="python -m bench", description="Throughput behind a gate.", allow_abbrev=False)
    add = made.add_argument
    add("job", nargs="?", default="main", choices=[*jobs, "report", "all"])
    add("paths", nargs="*", type=Path, help="of report: folders or files of results")
    add("--only", nargs="+", default=[], metavar="NAME", help="parts of names of cases or contenders")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    add("--vit", nargs="+", choices=PRESETS, help="default: small, on a GPU large, of main small")
    add("--size", nargs="+", type=int, metavar="PIXELS", help="default: 512, on a GPU 1024, of main 512")
    add("--batch", nargs="+", type=int, metavar="IMAGES", help="default: 4, on a GPU 8, of main 4")
    add("--seconds", type=float, help="of the clock, for each case")
    add("--policy", default="variance", choices=["variance", "given"], help="of main: executed, or layouts are given")
    add("--compile", action=argparse.BooleanOptionalAction, help="with what torch.compile makes (default: on a GPU)")
    add("--resume", action="store_true", help=argparse.SUPPRESS)  # of a run whose device was broken: what is left
    add("--profile", action="store_true", help="also write a chrome trace of each contender")
    add("--images", type=Path, metavar="FOLDER", help="of pictures (default: scikit-image's photographs)")
    add("--out", type=Path, default=LATEST, metavar="FOLDER", help="of the results (default: bench/results/latest)")
    add("--minutes", type=float, help="of all, for everything (default: 4, on a GPU 9)")
    add("--write", nargs="+", default=[], type=Path, metavar="FILE", help="of report: Markdown with generated regions")
    return made


def options_of(given: argparse.Namespace, seconds: float) -> Options:
    """What was asked for, defaults filled in; `seconds` is the job's own. UsageError where a value cannot be run."""
    device = checked_device(given.device)
    gpu = device.type == "cuda"
    large = gpu and given.job != "main"  # photographs are small
    options = Options(
        device,
        DTYPES[given.dtype or ("bfloat16" if gpu else "float32")],
        tuple(given.vit or ["large" if large else "small"]),
        tuple(given.size or [1024 if large else 512]),
        tuple(given.batch or [8 if large else 4]),
        seconds if given.seconds is None else given.seconds,
        given.policy,
        gpu if given.compile is None else given.compile,
        tuple(given.only),
        given.images,
        given.out,
    )
    wrong = [side for side in options.size if side < 1 or side % PATCH_SIZE]
    if wrong:
        raise UsageError(f"--size expects positive multiples of the patch size {PATCH_SIZE}, got {wrong[0]}")
    if min(options.batch) < 1:
        raise UsageError(f"--batch expects at least 1, got {min(options.batch)}")
    if not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds expects a positive number, got {options.seconds}")
    return options
