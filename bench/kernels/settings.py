"""What `python -m bench kernels` measures: defaults by device, the command line, refusals."""

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

OPS = (
    "resolve_layout",
    "from_sides",
    "merge_patches",
    "embed_patches",
    "merge_tokens",
    "halt_tokens",
    "exit_head",
    "gather_tokens",
    "scatter_back",
    "scatter_into",
    "upsample_argmax",
    "ragged_attention",
    "ragged_attention_wide",
    "ragged_attention_equal",
    "ragged_attention_adversarial",
    "masked_attention",
    "class_attention",
    "ragged_linear",
    "ragged_linear_gelu",
    "ragged_linear_residual",
)
# What a CPU leaves out unless asked: the layouts and the ops that say little where no kernel of ours runs.
ON_DEMAND_ON_A_CPU = OPS[OPS.index("ragged_attention") + 1 :]
VARIANTS = (
    f"a CPU leaves out {', '.join(ON_DEMAND_ON_A_CPU)} unless asked. Images of ragged_attention have the tokens that merging "
    "leaves, _wide: a tenth of the patch grid to all of it, _equal: a quarter, then all of it, _adversarial: one has all of it, "
    "one none, the others few. ragged_linear is a block's first layer, _gelu and _residual are those with an epilogue, each at the "
    "rows of an eighth, all and two and a half times of --batch. On a GPU, merge_* and scatter_* run at larger batches as well"
)
SMALLEST_SIZE = 2 * PATCH_SIZE  # two cells a side: the smallest grid in which something can merge
# The sizes of STEP's own experiments on a GPU; on a CPU what two cores do in about a minute, start and gate included.
GPU_DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16", "model": "large", "size": 1024, "batch": 8, "classes": 150, "minutes": 1.0, "compile_minutes": 5.0
}  # fmt: skip
CPU_DEFAULTS: dict[str, Any] = {
    "dtype": "float32", "model": "small", "size": 256, "batch": 2, "classes": 21, "minutes": 0.3, "compile_minutes": 0.4
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What one run measures.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        dtype: name of the tensors' dtype.
        model: preset of the ViT whose width the tokens have.
        size: side of the square images in pixels.
        batch: images per call; some ops have variants with a multiple of it.
        classes: channels of scores and canvases.
        ops: which ops, in the order of `OPS`.
        seed: of layouts and data.
        out: folder for kernels.json.
        minutes: budget of all timed calls together, or None when `repeats` is given.
        repeats: how often each contender is timed, or None.
        compile_minutes: budget of torch.compile, all ops together; 0 leaves the compiled contender out.
    """

    device: str
    dtype: str
    model: str
    size: int
    batch: int
    classes: int
    ops: tuple[str, ...] = OPS
    seed: int = 0
    out: Path = DEFAULT_OUT
    minutes: float | None = None
    repeats: int | None = None
    compile_minutes: float = 0.0

    def __post_init__(self) -> None:
        checked_device(self.device)
        _check_choice("--dtype", self.dtype, tuple(DTYPES))
        _check_choice("--model", self.model, tuple(PRESETS))
        for op in self.ops:
            _check_choice("--op", op, OPS)
        if self.size < SMALLEST_SIZE or self.size % PATCH_SIZE:
            expected = f"a multiple of the patch size {PATCH_SIZE}, at least {SMALLEST_SIZE}"
            raise UsageError(f"--size expects {expected}, got {self.size}")
        for flag, value in (("--batch", self.batch), ("--repeats", self.repeats)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} expects at least 1, got {value}")
        width = PRESETS[self.model]["embed_dim"]
        if not 2 <= self.classes < width:
            raise UsageError(f"--classes expects 2 to {width - 1} for --model {self.model}, got {self.classes}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed expects a whole number from 0 to 2^32 - 1, got {self.seed}")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"--minutes expects a positive number, got {self.minutes}")
        if not 0 <= self.compile_minutes < math.inf:
            raise UsageError(f"--compile-minutes expects 0 or a positive number, got {self.compile_minutes}")

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, without the folder: paths say more about a person than about a run."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "out"}
        return {**values, "ops": list(self.ops)}


def parse(arguments: Sequence[str]) -> Settings:
    """Settings from what follows the word `kernels`.

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
    left_out = ON_DEMAND_ON_A_CPU if given["device"] == "cpu" else ()
    asked = given.pop("op") or [op for op in OPS if op not in left_out]
    for op in asked:
        _check_choice("--op", op, OPS)
    return Settings(ops=tuple(op for op in OPS if op in asked), **given)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m bench kernels",
        description="Times single ops against plain PyTorch, eager and compiled, and against the bandwidth of a copy.",
        allow_abbrev=False,
    )
    add = parser.add_argument

    def default(name: str) -> str:
        return f"default: {CPU_DEFAULTS[name]} on a CPU, {GPU_DEFAULTS[name]} on a GPU"

    add("--op", action="append", help=f"only this op; may be repeated ({', '.join(OPS)}; {VARIANTS})")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", help=f"float32, bfloat16 or float16 ({default('dtype')})")
    add("--model", help=f"the ViT whose width tokens have: {', '.join(PRESETS)} ({default('model')})")
    add("--size", type=int, help=f"side of the square images in pixels ({default('size')})")
    add("--batch", type=int, help=f"images per call ({default('batch')})")
    add("--classes", type=int, help=f"channels of scores and canvases ({default('classes')})")
    add("--seed", type=int, default=0, help="of layouts and data (default: 0)")
    add("--out", type=Path, default=DEFAULT_OUT, help="folder for kernels.json (default: bench/results/latest)")
    add(
        "--compile-minutes",
        type=float,
        help=f"budget of torch.compile in all, 0 for none ({default('compile_minutes')})",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"budget of the timed part ({default('minutes')})")
    length.add_argument("--repeats", type=int, help="time each contender this often instead")
    return parser
