"""What `python -m bench kernels` writes down; checked when written and when read, as the main job's schema is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..schema import FAILED, PASSED, check_types, parse
from . import plain_attention
from .contenders import BACKWARD, COMPILED, EAGER, FORWARD, OURS, TIGHT

KIND = "kernels"
SCHEMA_VERSION = 2
NOT_RUN = "NOT RUN"
TIMING_FIELDS = (
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "gigabytes_per_second",
    "copy_gigabytes_per_second",
    "share_of_copy",
    "teraflops_per_second",
    "speedup",
)
CHOICES = {
    "direction": (FORWARD, BACKWARD),
    "contender": (OURS, EAGER, COMPILED, *plain_attention.NAMES, TIGHT),
    "gate": (PASSED, FAILED, NOT_RUN),
}


@dataclass(frozen=True)
class KernelRow:
    """One contender on one op.

    Attributes:
        op: as on the command line.
        direction: "forward" or "forward + backward".
        variant: dtype, sizes and images; rows are the mean live rows of the inputs.
        device: "cpu" or the GPU's type.
        dtype: of the tensors.
        contender: "step_kernels", "PyTorch eager", "PyTorch compiled", or of an attention one of `plain_attention.NAMES`; of a linear
            layer also "step_kernels, capacity M": no rows but the live ones, which the host is not told.
        floor: what ran as step_kernels: "triton", "reference", or op by op where they differ; None for the others.
        composition: of "PyTorch eager" and "PyTorch compiled", the function of `bench.kernels.plain`, `plain_exits` or `plain_linear`
            that ran: the fastest one.
        gate: PASSED, FAILED, or NOT RUN.
        problem: why it did not run, or what else is to be known about a FAILED row.
        max_error, allowed_error: of the output that comes closest to failing; None where not finite or not run.
        necessary_bytes: mean over the inputs; see `bench.kernels.operation`.
        flops: of an attention or a linear layer, mean over the inputs; see `bench.kernels.ops_attention` and `ops_linear`. None for
            other ops.
        extra_memory_bytes: device memory that one call needs at its peak, outputs included; None on a CPU.
        rounds: timed calls.
        median_ms, p20_ms, p80_ms: milliseconds per call; on a GPU, of the device (see `bench.kernels.clock`).
        gigabytes_per_second: necessary bytes / median, 1e9 bytes to the gigabyte.
        copy_gigabytes_per_second: what `tensor.copy_` reached between these calls, bytes read plus bytes written.
        share_of_copy: the one over the other.
        teraflops_per_second: flops / median, 1e12 to the TFLOP.
        speedup: the median of "PyTorch eager", or of an attention's first rival, / this one's.

    Raises:
        ValueError, TypeError: a field is out of range or of the wrong type, or a row that did not pass carries a timing.
    """

    op: str
    direction: str
    variant: str
    device: str
    dtype: str
    contender: str
    floor: str | None
    composition: str | None
    gate: str
    problem: str | None
    max_error: float | None
    allowed_error: float | None
    necessary_bytes: int
    flops: int | None = None
    extra_memory_bytes: int | None = None
    rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    gigabytes_per_second: float | None = None
    copy_gigabytes_per_second: float | None = None
    share_of_copy: float | None = None
    teraflops_per_second: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("necessary_bytes", "flops", *TIMING_FIELDS):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("max_error", "allowed_error", "extra_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: expected no negative number, got {value}")
        if (self.gate == NOT_RUN) and not self.problem:
            raise ValueError(f"problem: a row that was {NOT_RUN} must say why")
        if self.gate == PASSED and self.problem:
            raise ValueError(f"problem: a row that {PASSED} must have none, got {self.problem!r}")
        if self.gate != PASSED:
            for name in TIMING_FIELDS:
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(f"{name}: a row with the gate {self.gate} must not carry a timing, got {value}")


@dataclass(frozen=True)
class KernelResult:
    """Everything that one run found out.

    Attributes:
        rows: ours, then eager and compiled or the rivals; op after op.
        environment: see `bench.environment.describe`.
        settings: what was asked, defaults included.
        notes: what a reader has to know to read the rows rightly.
        kind: tells the file from other results of bench.
        schema_version: raised when a field changes its meaning.
    """

    rows: tuple[KernelRow, ...]
    environment: dict[str, Any]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    kind: str = field(default=KIND)
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Indented JSON, keys in the order of the schema; a number that JSON does not know (NaN) raises ValueError."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes `to_json` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> KernelResult:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, another kind or schema version, a key missing or unknown, or a value out of range.
            TypeError: a value of the wrong type.
        """
        data, rows = parse(text, cls, KernelRow, kind=KIND, schema_version=SCHEMA_VERSION)
        return cls(rows, data["environment"], data["settings"], tuple(data["notes"]))

    @classmethod
    def read(cls, path: Path) -> KernelResult:
        """`from_json` of a file."""
        return cls.from_json(path.read_text(encoding="utf-8"))
