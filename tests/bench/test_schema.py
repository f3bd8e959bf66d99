"""The row and result schema: round trips, and what it refuses to hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench.schema import COST_FIELDS, MEASURED, NEW_IN_ROWS, TIMING_FIELDS, Result, Row

UNTIMED: dict[str, Any] = {
    "provider": "merged",
    "device": "cpu",
    "dtype": "float32",
    "model": "tiny",
    "size": 64,
    "batch": 2,
    "tokens_mean": 6.5,
    "tokens_min": 4,
    "tokens_max": 9,
    "halted_share": 0.25,
    "gflops": 1.5,
    "gate": "PASSED",
    "max_error": 1e-6,
    "allowed_error": 2e-6,
    "labels_differ": 0,
    "decisions_differ": 0.0,
}
TIMED: dict[str, Any] = {
    **UNTIMED,
    "flop_reduction": 2.5,
    "rounds": 8,
    "median_ms": 10.0,
    "p20_ms": 9.0,
    "p80_ms": 12.0,
    "images_per_second": 200.0,
    "tail_ms": 1.0,
    "speedup": 2.0,
    "realised": 0.8,
    "realised_without_tail": 0.9,
    "floor_ms": 4.0,
    "achieved": 0.4,
}
COSTS: dict[str, Any] = {"peak_memory_bytes": 1000, "host_syncs": 0, "device_kernels": 5}


def some_result() -> Result:
    failed = Row(**{**UNTIMED, "provider": "wrong", "gate": "FAILED", "max_error": None})
    return Result((Row(**TIMED), failed), {"cpu": "x", "gpu": None}, {"model": "tiny", "exits": [8]}, ("a note",))


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    some_result().write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == some_result()


def test_json_is_plain_and_holds_the_version() -> None:
    data = json.loads(some_result().to_json())
    assert data["schema_version"] == 2
    assert data["rows"][0]["realised"] == 0.8
    assert data["rows"][1]["max_error"] is None


@pytest.mark.parametrize("name", [*TIMING_FIELDS, *COST_FIELDS])
def test_failed_row_refuses_every_timing_and_cost(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*FAILED"):
        Row(**{**UNTIMED, "gate": "FAILED", name: {**TIMED, **COSTS}[name]})


def test_version_1_is_read_as_not_measured() -> None:
    data = json.loads(some_result().to_json())
    for name in MEASURED:
        del data[name]
    for row in data["rows"]:
        for name in NEW_IN_ROWS:
            del row[name]
    old = Result.from_json(json.dumps({**data, "schema_version": 1}))
    assert (old.machine, old.profile, old.roofline, old.rows[0].peak_memory_bytes) == ({}, {}, {}, None)
    assert old.rows[0].speedup == 2.0
    assert Result.from_json(old.to_json()) == old
    with pytest.raises(ValueError, match="expected the key 'achieved'"):
        Result.from_json(json.dumps({**data, "schema_version": 2, **{key: {} for key in MEASURED}}))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("size", 0, ValueError),
        ("batch", -1, ValueError),
        ("gflops", float("nan"), ValueError),
        ("max_error", float("inf"), ValueError),
        ("median_ms", 0.0, ValueError),
        ("halted_share", 1.1, ValueError),
        ("decisions_differ", -0.1, ValueError),
        ("gate", "passed", ValueError),
        ("peak_memory_bytes", -1, ValueError),
        ("host_syncs", 0.5, TypeError),
        ("provider", None, TypeError),
        ("tokens_min", 4.5, TypeError),
        ("labels_differ", True, TypeError),
        ("gflops", "1.5", TypeError),
    ],
)
def test_row_names_the_bad_field(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: expected"):
        Row(**{**TIMED, name: value})


def test_whole_number_is_a_valid_float() -> None:
    assert Row(**{**TIMED, "gflops": 2}).gflops == 2


def test_read_refuses_what_is_not_a_result() -> None:
    good = json.loads(some_result().to_json())
    without_notes = {key: value for key, value in good.items() if key != "notes"}
    bad_row = {**good, "rows": [{**good["rows"][0], "surprise": 1}]}
    short_row = {**good, "rows": [{key: value for key, value in good["rows"][0].items() if key != "gate"}]}
    for data, message in (
        ({**good, "schema_version": 99}, "schema_version: expected 2, got 99"),
        (without_notes, "result: expected the key 'notes'"),
        ({**good, "surprise": 1}, "result: unknown key 'surprise'"),
        (bad_row, r"rows\[0\]: unknown key 'surprise'"),
        (short_row, r"rows\[0\]: expected the key 'gate'"),
        ({**good, "rows": {}}, "rows: expected list, got dict"),
        ({**good, "rows": [3]}, r"rows\[0\]: expected an object, got int"),
        ([], "result: expected an object, got list"),
        ({**good, "machine": []}, "machine: expected dict, got list"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            Result.from_json(json.dumps(data))
    with pytest.raises(ValueError, match="expected JSON"):
        Result.from_json("{")


def test_result_refuses_numbers_that_json_does_not_know() -> None:
    broken = dataclasses.replace(some_result(), settings={"tokens": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()
