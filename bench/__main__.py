"""`python -m bench`, run from the checkout: the words are read before PyTorch is imported, which takes a second."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from step_kernels_cli import DTYPES, PRESETS, OneLineParser, at_least, told

JOBS = (
    "main: dense, merged, with exits; kernels: ops; model: whole models; peers: rivals; report: tables; all: every job"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a contender gave a wrong answer, 2 (one line on stderr) for what cannot be run, 130 when interrupted."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler would announce itself on stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def run() -> int:
        given = parser().parse_intermixed_args(arguments)
        from .jobs import start

        return start(given)

    return told("bench", run)


def parser() -> OneLineParser:
    made = OneLineParser(prog="python -m bench", description="Throughput behind a gate.", allow_abbrev=False)
    add = made.add_argument
    add("job", nargs="?", default="main", choices=[job.split(": ")[0] for job in JOBS.split("; ")], help=JOBS)
    add("paths", nargs="*", type=Path, help="of report: folders or files of results")
    add("--only", nargs="+", default=[], metavar="NAME", help="parts of names of cases or contenders")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    add("--vit", nargs="+", choices=PRESETS, help="default: small, on a GPU large, of main small")
    add("--size", nargs="+", type=int, metavar="PIXELS", help="default: 512, on a GPU 1024, of main 512")
    add("--batch", nargs="+", type=at_least(1), metavar="IMAGES", help="default: 4, on a GPU 8, of main 4")
    add("--seconds", type=at_least(0.001), help="of the clock, for each case")
    add("--policy", default="variance", choices=["variance", "given"], help="of main: executed, or layouts are given")
    add("--compile", action=argparse.BooleanOptionalAction, help="with what torch.compile makes (default: on a GPU)")
    add("--resume", action="store_true", help=argparse.SUPPRESS)  # of a run whose device was broken: what is left
    add("--profile", action="store_true", help="also write a chrome trace of each contender")
    add("--images", type=Path, metavar="FOLDER", help="of pictures (default: scikit-image's photographs)")
    add("--out", type=Path, metavar="FOLDER", help="of the results (default: bench/results/latest)")
    add("--minutes", type=at_least(0.01), help="of all, for everything (default: 4, on a GPU 9)")
    add("--write", nargs="+", default=[], type=Path, metavar="FILE", help="of report: Markdown with generated regions")
    return made


if __name__ == "__main__":
    sys.exit(main())
