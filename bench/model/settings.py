"""What `python -m bench model` measures: defaults by device, the command line, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from step_kernels.model.vit import PRESETS

from ..errors import UsageError
from ..settings import DEFAULT_OUT, DTYPES, PATCH_SIZE, OneLineParser, _check_choice, checked_device
from .layouts import KINDS
from .registry import NAMES

SMALLEST_SIZE = 2 * PATCH_SIZE  # two cells a side: the smallest grid in which something can merge
# The sizes of STEP's own experiments on a GPU; on a CPU what two cores do in about a minute, start and gate included.
GPU_DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16", "model": ["large"], "size": [1024], "batch": [8, 1, 32], "classes": 150, "minutes": 6.0, "compile_minutes": 4.0
}  # fmt: skip
CPU_DEFAULTS: dict[str, Any] = {
    "dtype": "float32", "model": ["tiny"], "size": [256], "batch": [2], "classes": 21, "minutes": 0.8, "compile_minutes": 0.0
}  # fmt: skip
INPUTS = {"cuda": 8, "cpu": 3}  # batches that rotate


@dataclass(frozen=True)
class Settings:
    """What one run measures.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        dtype: name of the weights' dtype.
        models: presets of the ViT, the most important one first.
        sizes: sides of the square images in pixels, the most important one first: the others are measured at the first batch size and on
            spread layouts alone.
        batches: images per call, the most important one first.
        classes: of the decoder and the exits.
        layouts: kinds, in the order of `bench.model.layouts.KINDS`.
        contenders: names, in the order of the registry.
        seed: of weights, images, layouts and decisions.
        out: folder for model.json.
        minutes: budget of the whole run but for torch.compile, or None when `repeats` is given.
        repeats: how often each contender is timed, or None.
        compile_minutes: budget of torch.compile, all contenders together; 0 leaves everything eager.
        profile: whether device time is taken apart as well (needs a GPU; a CPU's always is).
    """

    device: str
    dtype: str
    models: tuple[str, ...]
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    classes: int
    layouts: tuple[str, ...] = KINDS
    contenders: tuple[str, ...] = NAMES
    seed: int = 0
    out: Path = DEFAULT_OUT
    minutes: float | None = None
    repeats: int | None = None
    compile_minutes: float = 0.0
    profile: bool = False

    def __post_init__(self) -> None:
        checked_device(self.device)
        _check_choice("--dtype", self.dtype, tuple(DTYPES))
        for flag, values, choices in (
            ("--model", self.models, tuple(PRESETS)),
            ("--layout", self.layouts, KINDS),
            ("--contender", self.contenders, NAMES),
        ):
            for value in values:
                _check_choice(flag, value, choices)
        for size in self.sizes:
            if size < SMALLEST_SIZE or size % PATCH_SIZE:
                expected = f"a multiple of the patch size {PATCH_SIZE}, at least {SMALLEST_SIZE}"
                raise UsageError(f"--size expects {expected}, got {size}")
        for batch in self.batches:
            if batch < 1:
                raise UsageError(f"--batch expects at least 1, got {batch}")
        for flag, given in (("--batch", self.batches), ("--model", self.models), ("--size", self.sizes)):
            if not given or len(set(given)) < len(given):
                raise UsageError(f"{flag} expects at least one value and each once, got {_words(list(given))}")
        if self.repeats is not None and self.repeats < 1:
            raise UsageError(f"--repeats expects at least 1, got {self.repeats}")
        width = min(PRESETS[model]["embed_dim"] for model in self.models)
        if not 2 <= self.classes < width:
            raise UsageError(f"--classes expects 2 to {width - 1}, got {self.classes}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed expects a whole number from 0 to 2^32 - 1, got {self.seed}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"--minutes expects a positive number, got {self.minutes}")
        if not 0 <= self.compile_minutes < math.inf:
            raise UsageError(f"--compile-minutes expects 0 or a positive number, got {self.compile_minutes}")
        if self.profile and self.device == "cpu":
            raise UsageError("--profile needs a CUDA device: on a CPU, time is taken apart without being asked for")

    @property
    def inputs(self) -> int:
        """How many batches rotate."""
        return INPUTS[torch.device(self.device).type]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, without the folder: paths say more about a person than about a run."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "out"}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "inputs": self.inputs,
        }


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from what follows the word `model`.

    Raises:
        UsageError: unknown flag, or a value that is refused.
    """
    given = vars(_parser().parse_args(arguments))
    if given["device"] is None:
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = dict(GPU_DEFAULTS if given["device"].startswith("cuda") else CPU_DEFAULTS)
    if given["repeats"] is not None:
        defaults["minutes"] = None
    for name, value in defaults.items():
        given[name] = value if given[name] is None else given[name]
    for name, flag in (("models", "model"), ("sizes", "size"), ("batches", "batch")):
        given[name] = tuple(given.pop(flag))
    given["layouts"] = _in_order("--layout", given.pop("layout"), KINDS)
    given["contenders"] = _in_order("--contender", given.pop("contender"), NAMES)
    return Settings(**given)


def _in_order(flag: str, asked: Sequence[str] | None, choices: Sequence[str]) -> tuple[str, ...]:
    for value in asked or ():
        _check_choice(flag, value, choices)
    return tuple(choice for choice in choices if asked is None or choice in asked)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m bench model",
        description="Compares one ViT as dense, merged, and merged + exits, with and without CUDA graphs, on random images and drawn layouts.",
        allow_abbrev=False,
    )
    add = parser.add_argument

    def default(name: str) -> str:
        cpu, gpu = (_words(defaults[name]) for defaults in (CPU_DEFAULTS, GPU_DEFAULTS))
        return f"default: {cpu} on a CPU, {gpu} on a GPU"

    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", help=f"float32, bfloat16 or float16 ({default('dtype')})")
    add("--model", nargs="+", help=f"{', '.join(PRESETS)}; one or more ({default('model')})")
    add(
        "--size",
        type=int,
        nargs="+",
        help=f"sides of the square images in pixels; the first at all batch sizes and layouts, others at the first batch size and on spread "
        f"layouts ({default('size')})",
    )
    add("--batch", type=int, nargs="+", help=f"images per call; one or more ({default('batch')})")
    add("--classes", type=int, help=f"of decoder and exits ({default('classes')})")
    add("--layout", nargs="+", help=f"kinds of layouts: {', '.join(KINDS)} (default: all)")
    add("--contender", action="append", help=f"only this one; may be repeated ({'; '.join(NAMES)})")
    add("--seed", type=int, default=0, help="of weights, images, layouts and decisions (default: 0)")
    add("--out", type=Path, default=DEFAULT_OUT, help="folder for model.json (default: bench/results/latest)")
    add("--compile-minutes", type=float, help=f"budget of torch.compile, 0 for none ({default('compile_minutes')})")
    add("--profile", action="store_true", help="also take device time apart (needs a GPU)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"budget of all but torch.compile ({default('minutes')})")
    length.add_argument("--repeats", type=int, help="time each contender this often instead")
    return parser


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
