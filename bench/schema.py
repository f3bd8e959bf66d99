"""What a benchmark writes down: rows, environment and settings, as JSON that is checked when written and when read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

SCHEMA_VERSION = 2
# What rows and results have since version 2: files of version 1 are read as if nobody had measured it.
NEW_IN_ROWS = ("necessary_bytes", "floor_ms", "achieved", "peak_memory_bytes", "host_syncs", "device_kernels")
MEASURED = ("machine", "profile", "roofline")
PASSED, FAILED = "PASSED", "FAILED"
POSITIVE_FIELDS = ("size", "batch", "tokens_mean", "tokens_min", "tokens_max", "gflops", "flop_reduction")
# Everything that a clock has touched: none of it may exist for a contender whose output is wrong.
TIMING_FIELDS = (
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "images_per_second",
    "tail_ms",
    "speedup",
    "realised",
    "realised_without_tail",
    "floor_ms",
    "achieved",
)
COST_FIELDS = ("peak_memory_bytes", "host_syncs", "device_kernels")


@dataclass(frozen=True)
class Row:
    """One contender on one machine with one setting.

    Attributes:
        provider: name in the registry of contenders.
        device: "cpu" or the GPU's type, for example "cuda".
        dtype: the weights' dtype, for example "float32".
        model: preset of the ViT.
        size: side of the square images in pixels.
        batch: images per call.
        tokens_mean, tokens_min, tokens_max: patch tokens or supertokens of one image at the encoder's input, without
            prefix tokens, over all images of all inputs.
        halted_share: share of those tokens that halt before the last block.
        gflops: matmuls and convolutions per image, attention's two matmuls counted, 1 MAC = 2 FLOPs.
        gate: PASSED or FAILED.
        max_error: largest absolute difference of the class scores from the fp64 oracle at the same decisions; None
            where it is not a finite number.
        allowed_error: the largest `max_error` that passes; None where the oracle itself is not finite.
        labels_differ: pixels whose label differs from the oracle's although the two labels are no tie.
        decisions_differ: share of merge and halt decisions that come out differently when the contender runs free on the
            first and the last input; None where it has none to make.
        flop_reduction: the dense contender's gflops / this one's.
        rounds: timed calls.
        median_ms, p20_ms, p80_ms: milliseconds per call (a batch).
        images_per_second: from the median.
        tail_ms: median of the shared output tail alone, which is part of `median_ms`.
        speedup: the dense contender's median / this one's.
        realised: speedup / flop_reduction.
        realised_without_tail: the same with `tail_ms` taken off both times, as `gflops` leaves the tail out too.
        necessary_bytes: moved by a call at least; see `bench.model.roofline`.
        floor_ms: the least time that this takes at the machine's rates, see there.
        achieved: floor_ms / median_ms.
        peak_memory_bytes, host_syncs, device_kernels: see `bench.model.costs`; None where not known.

    Raises:
        ValueError, TypeError: a field is out of range or of the wrong type, or a FAILED row carries a timing or a cost.
    """

    provider: str
    device: str
    dtype: str
    model: str
    size: int
    batch: int
    tokens_mean: float
    tokens_min: int
    tokens_max: int
    halted_share: float
    gflops: float
    gate: str
    max_error: float | None
    allowed_error: float | None
    labels_differ: int
    decisions_differ: float | None = None
    flop_reduction: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_second: float | None = None
    tail_ms: float | None = None
    speedup: float | None = None
    realised: float | None = None
    realised_without_tail: float | None = None
    necessary_bytes: int | None = None
    floor_ms: float | None = None
    achieved: float | None = None
    peak_memory_bytes: int | None = None
    host_syncs: int | None = None
    device_kernels: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.gate not in (PASSED, FAILED):
            raise ValueError(f"gate: expected {PASSED} or {FAILED}, got {self.gate!r}")
        for name in POSITIVE_FIELDS + TIMING_FIELDS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("halted_share", "decisions_differ"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share between 0 and 1, got {value}")
        for name in (*COST_FIELDS, "necessary_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: expected no negative number, got {value}")
        if self.gate == FAILED:
            for name in (*TIMING_FIELDS, *COST_FIELDS):
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(f"{name}: a row that {FAILED} its gate must not carry one, got {value}")


@dataclass(frozen=True)
class Result:
    """Everything that one run found out.

    Attributes:
        rows: one per contender, in the order of the table.
        environment: see `bench.environment.describe`.
        settings: what was asked, defaults included, how many inputs rotated, and what was calibrated for it.
        notes: what a reader has to know to read the rows rightly.
        machine: see `bench.model.machine.rates`.
        profile: milliseconds by part, by contender; see `bench.model.profile`.
        roofline: by contender: part -> gigaflops, megabytes and floor_ms of a batch.
        schema_version: raised when a field changes its meaning.
    """

    rows: tuple[Row, ...]
    environment: dict[str, Any]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    machine: dict[str, float] = field(default_factory=dict)
    profile: dict[str, dict[str, float]] = field(default_factory=dict)
    roofline: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Indented JSON, keys in the order of the schema; a number that JSON does not know (NaN) raises ValueError."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes `to_json` to a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The inverse of `to_json`; reads version 1, too.

        Raises:
            ValueError: not JSON, another schema version, a key missing or unknown, or a value out of range.
            TypeError: a value of the wrong type.
        """
        data, rows = parse(text, cls, Row, upgrade=_upgraded, schema_version=SCHEMA_VERSION)
        return cls(rows, data["environment"], data["settings"], tuple(data["notes"]), **measured(data))

    @classmethod
    def read(cls, path: Path) -> Result:
        """`from_json` of a file."""
        return cls.from_json(path.read_text(encoding="utf-8"))


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """What version 1 has no fields for was not measured."""
    if data.get("schema_version") != 1 or not isinstance(data.get("rows"), list):
        return data
    absent = dict.fromkeys(NEW_IN_ROWS)
    rows = [{**absent, **row} if isinstance(row, dict) else row for row in data["rows"]]
    return {**{name: {} for name in MEASURED}, **data, "rows": rows, "schema_version": SCHEMA_VERSION}


def measured(data: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a result beside its rows that come from measurements.

    Raises:
        TypeError: one of them is no object.
    """
    for name in MEASURED:
        if not isinstance(data[name], dict):
            raise TypeError(f"{name}: expected dict, got {type(data[name]).__name__}")
    return {name: data[name] for name in MEASURED}


RowType = TypeVar("RowType")


def parse(
    text: str,
    result: type,
    row_type: type[RowType],
    *,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda data: data,
    **fixed: object,
) -> tuple[dict[str, Any], tuple[RowType, ...]]:
    """The fields and rows of a result file, checked.

    Args:
        text: JSON.
        result, row_type: dataclasses whose fields must be there.
        upgrade: what makes data of an older version like those of this one.
        fixed: fields that must have one value.

    Raises:
        ValueError, TypeError: see ``Result.from_json``.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"result: expected JSON, got a text that breaks at line {error.lineno}") from None
    if not isinstance(data, dict):
        raise TypeError(f"result: expected an object, got {type(data).__name__}")
    data = upgrade(data)
    for name, value in fixed.items():
        if data.get(name) != value:
            raise ValueError(f"{name}: expected {value!r}, got {data.get(name)!r}")
    _check_keys("result", data, result)
    for name, kind in (("rows", list), ("environment", dict), ("settings", dict), ("notes", list)):
        if not isinstance(data[name], kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(data[name]).__name__}")
    rows = []
    for number, row in enumerate(data["rows"]):
        if not isinstance(row, dict):
            raise TypeError(f"rows[{number}]: expected an object, got {type(row).__name__}")
        _check_keys(f"rows[{number}]", row, row_type)
        rows.append(row_type(**row))
    return data, tuple(rows)


def _check_keys(where: str, data: Mapping[str, Any], schema: type) -> None:
    expected = {item.name for item in fields(schema)}
    for key in sorted(expected - data.keys()):
        raise ValueError(f"{where}: expected the key {key!r}, got none")
    for key in sorted(data.keys() - expected):
        raise ValueError(f"{where}: unknown key {key!r}")


def check_types(row: object) -> None:
    """Every field of a row has the type that its dataclass declares, and no float is infinite or NaN."""
    for name, hint in get_type_hints(type(row)).items():
        value = getattr(row, name)
        allowed = get_args(hint) or (hint,)
        # Other languages' JSON writes 2.0 as 2, so a whole number is a valid float; a bool is no number at all.
        accepted = (*allowed, int) if float in allowed else allowed
        if not isinstance(value, accepted) or isinstance(value, bool):
            names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in allowed)
            raise TypeError(f"{name}: expected {names}, got {type(value).__name__} {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
