"""What `python -m bench suite` runs: the command line, defaults by device, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..environment import describe
from ..errors import UsageError
from ..settings import DEFAULT_OUT, OneLineParser, _check_choice, checked_device
from .parts import CPU_PARTS, GPU_PARTS, GPU_TESTS, Part

DEFAULT_MINUTES = {"cuda": 9.0, "cpu": 4.0}


@dataclass(frozen=True)
class SuiteSettings:
    """What one run measures.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        out: folder for the JSON files and summary.md.
        minutes: for everything, starts and compilers included.
        parts: what runs, the most important part first.
    """

    device: str
    out: Path
    minutes: float
    parts: tuple[Part, ...]


def parse(arguments: Sequence[str]) -> SuiteSettings:
    """Settings from what follows the word `suite`.

    Raises:
        UsageError: unknown flag, or a value that is refused.
    """
    given = _parser().parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checked_device(device)
    kind = torch.device(device).type
    available = {part.name: part for part in (GPU_PARTS if kind == "cuda" else CPU_PARTS)}
    for name in given.part or ():
        _check_choice("--part", name, tuple(available))
    if given.gpu_tests and kind != "cuda":
        raise UsageError("--gpu-tests needs a CUDA device")
    minutes = DEFAULT_MINUTES[kind] if given.minutes is None else given.minutes
    if not 0 < minutes < math.inf:
        raise UsageError(f"--minutes expects a positive number, got {minutes}")
    wanted = set(available) - {GPU_TESTS} if given.part is None else set(given.part)
    if given.gpu_tests:
        wanted.add(GPU_TESTS)
    chosen = tuple(part for name, part in available.items() if name in wanted)
    out = given.out if given.out is not None else DEFAULT_OUT / machine_name(torch.device(device))
    return SuiteSettings(device, out, minutes, chosen)


def machine_name(device: torch.device) -> str:
    """A folder's name: "nvidia-h200", "cpu-2-cores"."""
    facts = describe(device)
    if facts["gpu"] is None:
        return f"cpu-{facts['cores']}-cores"
    return re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m bench suite",
        description="Measures what this machine can, the most important first, inside a budget; then says which bars are met.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = "; ".join(dict.fromkeys(part.name for part in (*GPU_PARTS, *CPU_PARTS)))
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add(
        "--minutes",
        type=float,
        help=f"budget of everything (default: {DEFAULT_MINUTES['cpu']:g} on a CPU, {DEFAULT_MINUTES['cuda']:g} on a GPU)",
    )
    add("--part", action="append", help=f"only this part; may be repeated ({names})")
    add("--gpu-tests", action="store_true", help="run the tests in tests/gpu first")
    add("--out", type=Path, help="folder for the results (default: bench/results/latest/ and the machine's name)")
    return parser
