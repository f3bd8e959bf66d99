"""The main job's settings: defaults, the command line, and what is refused with one line and exit status 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step_kernels.model.cli.errors import DTYPES, OneLineParser, checked_device
from step_kernels.model.vit import PRESETS

from .errors import UsageError

PATCH_SIZE = 16
POLICIES = ("variance", "given", "quota", "none")
DEFAULT_BATCH = 4
DEFAULT_MINUTES = 0.35  # with the start and the gate, about two minutes in all on two CPU cores that are idle
DEFAULT_OUT = Path(__file__).resolve().parent / "results" / "latest"
MOST_TOKENS_SAVED_BY_2X2 = 4.0


@dataclass(frozen=True)
class Settings:
    """What one run of the main job compares.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        dtype: name of the weights' dtype.
        model: preset of the ViT.
        size: side of the square images in pixels.
        batch: images per call, or None for as many as the pictures give, up to four.
        policy: "variance" (executed and counted), "given" (the variance policy's layouts, computed before the clock
            starts), "quota" (a fixed number of 2x2 blocks per image), "none" (nothing is merged).
        tokens: the factor by which the policy reduces the patch tokens, on average over the images.
        halt: share of the tokens that halt at the exits, all exits together.
        exits: block numbers, counted from 1, after which an exit stands.
        seed: of the random weights.
        images: a folder of pictures, or None for scikit-image's photographs.
        out: folder for the JSON file and the picture.
        minutes: budget of the timed part, in which every input is timed once whatever it says, or None when `repeats` is given.
        repeats: how often each contender is timed, one input after the other, or None.
    """

    device: str = "cpu"
    dtype: str = "float32"
    model: str = "small"
    size: int = 512
    batch: int | None = None
    policy: str = "variance"
    tokens: float = 2.5
    halt: float = 0.4
    exits: tuple[int, ...] = (8,)
    seed: int = 0
    images: Path | None = None
    out: Path = DEFAULT_OUT
    minutes: float | None = DEFAULT_MINUTES
    repeats: int | None = None

    def __post_init__(self) -> None:
        checked_device(self.device)
        _check_choice("--dtype", self.dtype, tuple(DTYPES))
        _check_choice("--model", self.model, tuple(PRESETS))
        _check_choice("--policy", self.policy, POLICIES)
        if self.size <= 0 or self.size % PATCH_SIZE:
            raise UsageError(f"--size expects a positive multiple of the patch size {PATCH_SIZE}, got {self.size}")
        for flag, value in (("--batch", self.batch), ("--repeats", self.repeats)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} expects at least 1, got {value}")
        if not 1 <= self.tokens < math.inf:
            raise UsageError(f"--tokens expects a reduction factor of at least 1, got {self.tokens}")
        if self.policy == "quota" and self.tokens > MOST_TOKENS_SAVED_BY_2X2:
            raise UsageError(f"--tokens {self.tokens:g} is out of reach for --policy quota: 2x2 blocks save at most 4x")
        if not 0 <= self.halt <= 1:
            raise UsageError(f"--halt expects a share between 0 and 1, got {self.halt}")
        depth = PRESETS[self.model]["depth"]
        if any(not 1 <= block <= depth for block in self.exits):
            expected = f"block numbers from 1 to {depth} for --model {self.model}"
            raise UsageError(f"--exits expects {expected}, got {_listed(self.exits)}")
        if list(self.exits) != sorted(set(self.exits)):
            raise UsageError(f"--exits expects rising block numbers, each once, got {_listed(self.exits)}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed expects a whole number from 0 to 2^63 - 1, got {self.seed}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"--minutes expects a positive number, got {self.minutes}")

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values without paths: a folder's name says more about the person than about the run."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "model": self.model,
            "size": self.size,
            "batch": self.batch,
            "policy": self.policy,
            "tokens": self.tokens,
            "halt": self.halt,
            "exits": list(self.exits),
            "seed": self.seed,
            "images": "scikit-image" if self.images is None else "folder",
            "minutes": self.minutes,
            "repeats": self.repeats,
        }


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from the command line.

    Raises:
        UsageError: unknown flag, or a value that is refused.
    """
    given = vars(_parser().parse_args(arguments))
    if given["device"] is None:
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if given["dtype"] is None:
        # What a user would pick: pure bf16 where there are tensor cores for it, fp32 on a CPU.
        given["dtype"] = "bfloat16" if given["device"].startswith("cuda") else "float32"
    _check_choice("--model", given["model"], tuple(PRESETS))
    if given["exits"] is None:
        given["exits"] = (PRESETS[given["model"]]["depth"] * 2 // 3,)
    if given["minutes"] is None and given["repeats"] is None:
        given["minutes"] = DEFAULT_MINUTES
    return Settings(**given)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m bench",
        description="Compares one ViT with the same weights as dense, merged, and merged + exits, on real photographs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, bfloat16 on a GPU)")
    add("--model", default="small", help=f"one of {', '.join(PRESETS)} (default: small)")
    add("--size", type=int, default=512, help="side of the square images in pixels (default: 512)")
    add("--batch", type=int, help="images per call (default: 4, or fewer if the pictures give no more)")
    add("--policy", default="variance", help=f"one of {', '.join(POLICIES)}: see bench/settings.py (default: variance)")
    add("--tokens", type=float, default=2.5, help="how many times fewer tokens the policy leaves (default: 2.5)")
    add("--halt", type=float, default=0.4, help="share of the tokens that halts at the exits (default: 0.4)")
    add("--exits", type=_block_numbers, help="block numbers such as 8 or 4,8, or none (default: at 2/3 of the depth)")
    add("--seed", type=int, default=0, help="of the random weights (default: 0)")
    add("--images", type=Path, help="folder of pictures (default: scikit-image's photographs)")
    add("--out", type=Path, default=DEFAULT_OUT, help="folder for the JSON and the PNG (default: bench/results/latest)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"budget of the timed part (default: {DEFAULT_MINUTES})")
    length.add_argument("--repeats", type=int, help="time each contender this often instead")
    return parser


def _block_numbers(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects block numbers such as 8 or 4,8, or none, got {text!r}") from None


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{flag} expects one of {', '.join(choices)}, got {value!r}")


def _listed(blocks: Sequence[int]) -> str:
    return ",".join(str(block) for block in blocks)
