"""What `python -m bench model` writes down; checked when written and when read, as the main job's schema is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..kernels.schema import NOT_RUN
from ..schema import FAILED, PASSED, check_types, measured, parse
from .case import DENSE, EXITS, FRONT, MERGED, MERGED_EXITS
from .layouts import KINDS, QUOTA

KIND = "model"
SCHEMA_VERSION = 3
POSITIVE_FIELDS = ("size", "batch", "tokens_mean", "tokens_min", "tokens_max", "gflops", "flop_reduction")
NATURAL_FIELDS = (
    "max_error",
    "allowed_error",
    "labels_differ",
    "peak_memory_bytes",
    "host_syncs",
    "device_kernels",
    "necessary_bytes",
)
# Everything that a clock has touched: none of it may exist for a contender that did not pass.
TIMING_FIELDS = (
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "images_per_second",
    "teraflops_per_second",
    "speedup",
    "realised",
    "floor_ms",
    "achieved",
)
NO_COSTS = "costs not measured"  # how the note of a row begins that is complete but for its costs
COST_FIELDS = ("peak_memory_bytes", "host_syncs", "device_kernels")
CHOICES = {
    "layout": (*KINDS, QUOTA),
    "gate": (PASSED, FAILED, NOT_RUN),
    "family": (DENSE, MERGED, MERGED_EXITS, EXITS, FRONT),
}


@dataclass(frozen=True)
class ModelRow:
    """One contender on one model, batch size and kind of layouts.

    Attributes:
        contender: name in the registry.
        family: whose decisions it repeats: "dense", "merged", "merged + exits", "exits"; or "policy + layout + merge", a part of a model.
        variant: what exactly ran, where there is a choice.
        model: preset of the ViT.
        batch: images per call.
        layout: kind, one of `bench.model.layouts.KINDS`, or "quota"; of dense rows, that of the rows timed in the same rounds.
        size: side of the square images in pixels.
        device: "cpu" or the GPU's type.
        dtype: of the weights.
        tokens_mean, tokens_min, tokens_max: patch tokens or supertokens of one image at the encoder's input, without prefix tokens.
        halted_share: of those, the share that halts before the last block.
        gflops: per image; matmuls and convolutions, attention's two matmuls counted, 1 MAC = 2 FLOPs, without the tail.
        gate: PASSED, FAILED, or NOT RUN.
        problem: why it did not run, or what else is to be known about a FAILED row.
        max_error, allowed_error: of class scores, where closest to failing; None where not finite or not run.
        labels_differ: pixels whose label differs from the oracle's although the two are no tie; None where not run.
        flop_reduction: the dense rows' gflops / this one's; None for a part of a model.
        rounds: timed calls.
        median_ms, p20_ms, p80_ms: wall milliseconds per call (a batch), the host's work included.
        images_per_second, teraflops_per_second: from the median; 1e12 to the TFLOP.
        speedup: the median of "dense" / this one's; None for a part of a model.
        realised: speedup / flop_reduction.
        floor_ms: the least time for this work at the machine's rates, see `bench.model.roofline`; None where they were not measured.
        achieved: floor_ms / median_ms.
        decisions_differ: of the patches of one image, those that a free run halts otherwise than the oracle's does, at recorded layouts;
            None for contenders that decide nothing or not by code of ours.
        necessary_bytes: moved by a call at least, as for floor_ms.
        peak_memory_bytes, host_syncs, device_kernels: see `bench.model.costs`; the last two None on a CPU.
        compile_seconds: warm-up, compilation, capture; None where there is nothing of the kind.
        note: what a reader should know.

    Raises:
        ValueError, TypeError: a field is out of range or of the wrong type, or a row that did not pass carries a timing.
    """

    contender: str
    family: str
    variant: str | None
    model: str
    batch: int
    layout: str
    size: int
    device: str
    dtype: str
    tokens_mean: float
    tokens_min: int
    tokens_max: int
    halted_share: float
    gflops: float
    gate: str
    problem: str | None = None
    max_error: float | None = None
    allowed_error: float | None = None
    labels_differ: int | None = None
    flop_reduction: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_second: float | None = None
    teraflops_per_second: float | None = None
    speedup: float | None = None
    realised: float | None = None
    floor_ms: float | None = None
    achieved: float | None = None
    decisions_differ: float | None = None
    necessary_bytes: int | None = None
    peak_memory_bytes: int | None = None
    host_syncs: int | None = None
    device_kernels: int | None = None
    compile_seconds: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in POSITIVE_FIELDS + TIMING_FIELDS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in (*NATURAL_FIELDS, "compile_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: expected no negative number, got {value}")
        for name in ("halted_share", "decisions_differ"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {value}")
        self._check_gate()

    def _check_gate(self) -> None:
        if self.gate == NOT_RUN and not self.problem:
            raise ValueError(f"problem: a row that was {NOT_RUN} must say why")
        if self.gate == PASSED and self.problem:
            raise ValueError(f"problem: a row that {PASSED} must have none, got {self.problem!r}")
        if self.gate != PASSED:
            for name in (*TIMING_FIELDS, *COST_FIELDS):
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(f"{name}: a row with the gate {self.gate} must not carry one, got {value}")


@dataclass(frozen=True)
class ModelResult:
    """Everything that one run found out.

    Attributes:
        rows: comparison after comparison, in each the registry's order; what has no rows is in the notes.
        environment: see `bench.environment.describe`.
        settings: what was asked, defaults included.
        notes: what a reader has to know to read the rows rightly.
        machine: see `bench.model.machine.rates`.
        profile: milliseconds by part, by contender; empty unless asked for.
        roofline: by family, model, size, batch and layouts: part -> gigaflops, megabytes and floor_ms of a batch.
        kind: tells the file from other results of bench.
        schema_version: raised when a field changes its meaning.
    """

    rows: tuple[ModelRow, ...]
    environment: dict[str, Any]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    machine: dict[str, float] = field(default_factory=dict)
    profile: dict[str, dict[str, float]] = field(default_factory=dict)
    roofline: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    kind: str = field(default=KIND)
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Indented JSON, keys in the order of the schema; a number that JSON does not know (NaN) raises ValueError."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes `to_json` to a file, which is never there by halves: a run may be ended at any time."""
        beside = path.with_name(f"{path.name}.part")
        try:
            beside.write_text(self.to_json(), encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def from_json(cls, text: str) -> ModelResult:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, another kind or schema version, a key missing or unknown, or a value out of range.
            TypeError: a value of the wrong type.
        """
        data, rows = parse(text, cls, ModelRow, kind=KIND, schema_version=SCHEMA_VERSION)
        return cls(rows, data["environment"], data["settings"], tuple(data["notes"]), **measured(data))

    @classmethod
    def read(cls, path: Path) -> ModelResult:
        """`from_json` of a file."""
        return cls.from_json(path.read_text(encoding="utf-8"))
