"""The schema of kernels.json, and the clock behind its GPU times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench import table
from bench.kernels.clock import DeviceTimeline
from bench.kernels.report import markdown_table, plain_table
from bench.kernels.schema import TIMING_FIELDS, KernelResult, KernelRow
from bench.timing import interleave

UNTIMED: dict[str, Any] = {
    "op": "merge_tokens",
    "direction": "forward",
    "variant": "float32, tokens [2, 16, 8], 14 live rows",
    "device": "cpu",
    "dtype": "float32",
    "contender": "step_kernels",
    "floor": "reference",
    "composition": None,
    "gate": "PASSED",
    "problem": None,
    "max_error": 1e-7,
    "allowed_error": 2e-7,
    "necessary_bytes": 1_224_000,
}
TIMED: dict[str, Any] = {
    **UNTIMED,
    "flops": 912_000_000,
    "extra_memory_bytes": None,
    "rounds": 8,
    "median_ms": 2.0,
    "p20_ms": 1.5,
    "p80_ms": 3.0,
    "gigabytes_per_second": 0.612,
    "copy_gigabytes_per_second": 12.24,
    "share_of_copy": 0.05,
    "teraflops_per_second": 0.456,
    "speedup": 3.14,
}
FAILED = {
    **UNTIMED,
    "contender": "PyTorch eager",
    "floor": None,
    "composition": "merge_tokens",
    "gate": "FAILED",
    "max_error": None,
}
NOT_RUN = {
    **UNTIMED,
    "contender": "PyTorch compiled",
    "floor": None,
    "gate": "NOT RUN",
    "problem": "no compiler",
    "max_error": None,
    "allowed_error": None,
}


def some_result() -> KernelResult:
    rows = tuple(KernelRow(**values) for values in (TIMED, FAILED, NOT_RUN))
    environment = {
        "cpu": "x", "gpu": None, "threads": 2, "torch": "2.13", "commit": "0123456789abcdef", "dirty": False,
        "date": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    settings = {"model": "small", "size": 256, "batch": 2, "classes": 21, "dtype": "float32"}
    return KernelResult(rows, environment, settings, ("a note",))


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    some_result().write(tmp_path / "kernels.json")
    assert KernelResult.read(tmp_path / "kernels.json") == some_result()


@pytest.mark.parametrize("values", [FAILED, NOT_RUN], ids=["FAILED", "NOT RUN"])
@pytest.mark.parametrize("name", TIMING_FIELDS)
def test_row_that_did_not_pass_refuses_every_timing(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        KernelRow(**{**values, name: TIMED[name]})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("contender", "somebody", ValueError),
        ("direction", "backward", ValueError),
        ("gate", "passed", ValueError),
        ("problem", "none really", ValueError),
        ("median_ms", 0.0, ValueError),
        ("median_ms", float("inf"), ValueError),
        ("max_error", -1.0, ValueError),
        ("necessary_bytes", 0, ValueError),
        ("necessary_bytes", 1.5, TypeError),
        ("flops", 0, ValueError),
        ("teraflops_per_second", -1.0, ValueError),
        ("rounds", True, TypeError),
        ("op", None, TypeError),
    ],
)
def test_row_names_the_bad_field(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name}: "):
        KernelRow(**{**TIMED, name: value})


def test_not_run_has_to_say_why() -> None:
    with pytest.raises(ValueError, match=r"^problem: "):
        KernelRow(**{**NOT_RUN, "problem": None})


def test_read_refuses_what_is_not_a_kernels_result() -> None:
    good = json.loads(some_result().to_json())
    for data, message in (
        ({**good, "kind": "suite"}, "kind: expected 'kernels', got 'suite'"),
        ({**good, "schema_version": 99}, "schema_version: expected 2, got 99"),
        ({**good, "surprise": 1}, "unknown key 'surprise'"),
        ({**good, "rows": [{**good["rows"][0], "surprise": 1}]}, r"rows\[0\]: unknown key 'surprise'"),
        ({**good, "rows": [3]}, r"rows\[0\]: expected an object, got int"),
        ({**good, "notes": {}}, "notes: expected list, got dict"),
        ([], "expected an object, got list"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            KernelResult.from_json(json.dumps(data))
    with pytest.raises(ValueError, match="expected JSON"):
        KernelResult.from_json("{")


def test_tables_show_no_time_and_no_speed_up_without_a_pass() -> None:
    result = some_result()
    for text in (plain_table(result.rows), markdown_table(result)):
        (passed,) = [line for line in text.splitlines() if "PASSED" in line]
        assert "step_kernels (reference)" in passed
        for part in ("2 (1.5 - 3)", "0.612", "5%", "0.456", "3.14x", "1.22"):
            assert part in passed
        for gate in ("FAILED", "NOT RUN"):
            line = next(line for line in text.splitlines() if gate in line)
            assert "x" not in line.partition(gate)[2]
            assert line.count(" - ") + line.endswith(" -") >= 4
    assert "- PyTorch compiled, NOT RUN: no compiler (merge_tokens)" in markdown_table(result)
    assert "- PyTorch eager, FAILED: error not finite where 2.0e-07 is allowed (merge_tokens)" in markdown_table(result)


def test_table_command_renders_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    some_result().write(path)
    assert table.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == markdown_table(some_result())
    assert "commit 0123456789, 2026-01-01, a copy reaches 12.2 GB/s:" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_table_command_refuses_a_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    data = {**json.loads(some_result().to_json()), "schema_version": 1}
    path.write_text(json.dumps(data))
    assert table.main([str(path)]) == 2
    assert "schema_version: expected 2, got 1" in capsys.readouterr().err


# The clock


@dataclasses.dataclass
class FakeDevice:
    """A queue on which work takes its time, whatever the host does meanwhile."""

    now: float = 0.0  # seconds

    def work(self, seconds: float) -> None:
        self.now += seconds


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._time = device, -1.0
        self._waited = False

    def record(self) -> None:
        self._time = self._device.now

    def synchronize(self) -> None:
        self._waited = True

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self._time >= 0 and other._waited, "read before it was reached"
        return (other._time - self._time) * 1000


def test_device_timeline_counts_the_call_and_not_the_work_in_front() -> None:
    device = FakeDevice()
    clock: Any = DeviceTimeline(lambda: device.work(5.0), lambda: FakeEvent(device))
    calls = {"fast": lambda number: device.work(0.25), "slow": lambda number: device.work(2.0)}
    timings = interleave(calls, inputs=2, clock=clock, rounds=4)
    assert timings["fast"].milliseconds == pytest.approx((250.0,) * 4)
    assert timings["slow"].milliseconds == pytest.approx((2000.0,) * 4)


def test_budget_counts_the_work_in_front() -> None:
    device = FakeDevice()
    clock: Any = DeviceTimeline(lambda: device.work(1.0), lambda: FakeEvent(device))
    timings = interleave({"a": lambda number: device.work(1.0)}, inputs=1, clock=clock, seconds=30.0)
    # A pair is two calls, each between two seconds of other work; the budget itself is read by the same clock.
    assert 2 <= len(timings["a"].milliseconds) <= 10
