"""`python -m bench suite`: the order, the budget, what a part that fails or hangs costs, and what is summed up."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench import environment
from bench.__main__ import main
from bench.schema import COST_FIELDS, TIMING_FIELDS, Result
from bench.suite import gpu_tests, job, settings
from bench.suite.job import CUT_SHORT, FAILED, FINISHED, NOT_RUN, Outcome, command_of, launch, run, run_part
from bench.suite.parts import CPU_PARTS, GPU_PARTS, GPU_TESTS, Part
from bench.suite.settings import SuiteSettings, machine_name, parse

COMMITTED = environment.REPOSITORY / "bench" / "results" / "cpu-2-cores" / "bench.json"


class Clock:
    """A clock that only a part moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def suite(folder: Path, *names: str, minutes: float = 10.0) -> SuiteSettings:
    return SuiteSettings("cpu", folder, minutes, tuple(part for part in CPU_PARTS if part.name in names or not names))


def test_the_most_important_part_comes_first() -> None:
    assert [part.name for part in GPU_PARTS] == [GPU_TESTS, "model", "kernels", "peers", "profile"]
    assert [part.name for part in CPU_PARTS] == ["main job", "model", "kernels", "peers"]
    assert CPU_PARTS[0].arguments(170)[:3] == ["bench", "--policy", "given"]
    models = GPU_PARTS[1].arguments(300)
    assert models[models.index("--batch") + 1 : models.index("--batch") + 4] == ["8", "1", "32"]
    assert models[models.index("--layout") + 1] == "spread"
    assert models[models.index("--size") + 1] == "1024"
    assert {part.folder for part in GPU_PARTS if "--profile" in part.arguments(300)} == {"profile"}


@pytest.mark.parametrize("part", [*GPU_PARTS, *CPU_PARTS], ids=lambda part: part.name)
@pytest.mark.parametrize("seconds", [21.0, 60.0, 600.0])
def test_every_command_line_is_understood_and_keeps_to_its_seconds(
    part: Part, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part.name == GPU_TESTS:
        assert part.arguments(seconds) == ["bench.suite.gpu_tests"]
        return
    if part.name == "profile":  # whose flag is refused where there is no GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    from bench.kernels.settings import parse as kernels
    from bench.model.settings import parse as model
    from bench.peers.settings import parse as peers
    from bench.settings import parse as plain

    _, *arguments = part.arguments(seconds)
    name, rest = (arguments[0], arguments[1:]) if not arguments[0].startswith("-") else ("main", arguments)
    asked = {"main": plain, "kernels": kernels, "model": model, "peers": peers}[name](
        [*rest, "--device", "cuda" if part.name == "profile" else "cpu"]
    )
    assert 0 < 60 * (asked.minutes + getattr(asked, "compile_minutes", 0.0)) < seconds


def test_shares_follow_the_weights_and_what_is_left(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, float, float]] = []

    def part_that_takes_60(part: Part, settings: SuiteSettings, share: float, left: float, now: object) -> Outcome:
        given.append((part.name, share, left))
        clock.seconds += 60
        return Outcome(part.name, FINISHED, 60.0)

    monkeypatch.setattr(job, "run_part", part_that_takes_60)
    run(suite(tmp_path), clock)
    assert [left for _, _, left in given] == [590, 530, 470, 410]  # ten seconds are for what does not end by itself
    assert [share for _, share, _ in given] == pytest.approx([590 * 6 / 11, 530 * 2 / 5, 470 * 2 / 3, 410])


def test_what_does_not_fit_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run(suite(tmp_path, minutes=0.1))
    assert {(outcome.state, outcome.problem) for outcome in outcomes} == {(NOT_RUN, "--minutes is used up")}
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "- main job: not run, 0 s: --minutes is used up" in text and "No results" in text
    assert text in capsys.readouterr().out


def test_a_part_that_hangs_is_interrupted_and_one_that_crashes_is_named(tmp_path: Path) -> None:
    assert launch([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) is None
    assert launch([sys.executable, "-c", "import sys; sys.exit(3)"], 60) == 3
    part = Part("part", 1.0, lambda seconds: ["no_such_module_at_all"])
    outcome = run_part(part, suite(tmp_path), 30.0, 30.0)
    assert (outcome.state, outcome.problem) == (FAILED, "exit status 1")


def test_a_part_may_overrun_its_share_but_not_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(job, "launch", lambda command, seconds: limits.append(seconds))
    outcomes = [run_part(CPU_PARTS[0], suite(tmp_path), 40.0, left, Clock()) for left in (500.0, 50.0)]
    assert limits == [80.0, 50.0]
    assert [outcome.state for outcome in outcomes] == [CUT_SHORT, CUT_SHORT]


def test_a_part_without_its_packages_is_not_run(tmp_path: Path) -> None:
    part = Part("part", 1.0, lambda seconds: ["bench"], needs=("no_such_package",))
    outcome = run_part(part, suite(tmp_path), 300.0, 300.0)
    assert (outcome.state, outcome.problem) == (NOT_RUN, "needs no_such_package: pip install no_such_package")


def test_a_part_alone_leaves_the_results_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench.json").write_text(COMMITTED.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(job, "launch", lambda command, seconds: 0)
    monkeypatch.setattr(environment, "describe", lambda device: Result.read(COMMITTED).environment)
    assert main(["suite", "--device", "cpu", "--part", "model", "--minutes", "5", "--out", str(tmp_path)]) == 0
    assert "| P15 |" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_a_gate_that_failed_before_the_part_was_cut_short_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(COMMITTED.read_text(encoding="utf-8"))
    result["rows"][1] |= dict.fromkeys((*TIMING_FIELDS, *COST_FIELDS), None) | {"gate": "FAILED"}
    text = json.dumps(result)

    def cut_short(command: list[str], seconds: float) -> None:
        (tmp_path / "bench.json").write_text(text, encoding="utf-8")

    monkeypatch.setattr(job, "launch", cut_short)
    assert main(["suite", "--device", "cpu", "--part", "main job", "--minutes", "5", "--out", str(tmp_path)]) == 1


def test_results_of_another_machine_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "launch", lambda command, seconds: pytest.fail("ran"))
    result = json.loads(COMMITTED.read_text(encoding="utf-8"))
    result["environment"]["cpu"] = "another"
    (tmp_path / "bench.json").write_text(json.dumps(result), encoding="utf-8")
    command = ["suite", "--device", "cpu", "--part", "model", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "bench.json and this run are of different machines, cpu" in capsys.readouterr().err
    (tmp_path / "bench.json").write_text("{", encoding="utf-8")
    assert main(command) == 2
    assert "bench.json is not a result of bench" in capsys.readouterr().err
    (tmp_path / "bench.json").unlink()
    (tmp_path / "model.json").mkdir()
    assert main(command) == 2
    assert "model.json cannot be replaced" in capsys.readouterr().err


def test_an_interrupt_leaves_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(command: list[str], seconds: float) -> int:
        if "peers" in command or "kernels" in command:
            pytest.fail("went on")
        if "model" in command:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(job, "launch", launch)
    assert main(["suite", "--device", "cpu", "--out", str(tmp_path)]) == 130
    parts = json.loads((tmp_path / "suite.json").read_text(encoding="utf-8"))["parts"]
    assert [(part["state"], part["problem"]) for part in parts] == [
        (FINISHED, None), (CUT_SHORT, "interrupted"), (NOT_RUN, "interrupted"), (NOT_RUN, "interrupted")
    ]  # fmt: skip
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "- model: cut short, 0 s: interrupted" in text and "lack of time" not in text


def test_a_request_to_end_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), job.ended_like_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored() -> None:
    """Under nohup, a terminal that closes ends nothing."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with job.ended_like_ctrl_c():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_running(process: int) -> bool:
    """Whether it does not end, which takes a killed one a moment."""
    for _ in range(500):
        try:
            if Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.01)
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_nothing_that_a_part_has_started_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    assert launch(["sh", "-c", f"sleep 60 & echo $! > {started}; exit 3"], 60) == 3
    assert not is_running(int(started.read_text(encoding="utf-8")))
    monkeypatch.setattr(job, "GRACE_SECONDS", 0.2)
    stubborn = ["sh", "-c", f"trap '' INT; echo $$ > {started}; sleep 60; sleep 60"]
    started.unlink()

    def interrupt() -> None:
        while not (started.exists() and started.read_text(encoding="utf-8")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        launch(stubborn, 60)
    assert not is_running(int(started.read_text(encoding="utf-8")))


def test_a_crash_is_named() -> None:
    assert [job._reason(status) for status in (1, -11, -9999)] == [
        "exit status 1", "ended by SIGSEGV", "ended by signal 9999"
    ]  # fmt: skip


def test_tests_see_the_device_that_was_asked_for() -> None:
    assert gpu_tests.visible("cuda", {"A": "b"}) == {"A": "b"}
    assert gpu_tests.visible("cuda:1", {}) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert gpu_tests.visible("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,GPU-x"}) == {"CUDA_VISIBLE_DEVICES": "GPU-x"}


def test_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = parse(["--device", "cpu"])
    assert (chosen.minutes, chosen.parts, chosen.out.name) == (4.0, CPU_PARTS, machine_name(torch.device("cpu")))
    command = command_of(CPU_PARTS[1], suite(tmp_path), 60.0)
    assert command[:4] == [sys.executable, "-m", "bench", "model"]
    assert command[-4:] == ["--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(settings, "checked_device", lambda device: None)
    monkeypatch.setattr(settings, "describe", lambda device: {"gpu": "NVIDIA H200 (141 GB)"})
    on_gpu = parse(["--device", "cuda"])
    assert (on_gpu.minutes, on_gpu.out.name) == (9.0, "nvidia-h200-141-gb")
    assert [part.name for part in on_gpu.parts] == ["model", "kernels", "peers", "profile"]
    assert parse(["--device", "cuda", "--gpu-tests"]).parts[0].name == GPU_TESTS
    both = parse(["--device", "cuda", "--gpu-tests", "--part", "kernels", "--part", "kernels"])
    assert [part.name for part in both.parts] == [GPU_TESTS, "kernels"]
    assert [part.name for part in parse(["--device", "cuda", "--part", GPU_TESTS]).parts] == [GPU_TESTS]
    assert command_of(GPU_PARTS[0], on_gpu, 60.0)[2:5] == ["bench.suite.gpu_tests", "--device", "cuda"]


@pytest.mark.parametrize(
    "arguments",
    [["--minutes", "0"], ["--minutes", "nan"], ["--part", "lunch"], ["--device", "cpu", "--gpu-tests"], ["--what"]],
    ids=" ".join,
)
def test_nonsense_gets_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("bench: ") and captured.err.count("\n") == 1


def test_tests_that_are_cut_short_count_as_far_as_they_got(tmp_path: Path) -> None:
    interrupt = "os.killpg(os.getpgid(0), signal.SIGINT); time.sleep(60)"  # as `launch` does
    code = f"import os, pytest, signal, time\npytestmark = pytest.mark.gpu\ndef test_one(): pass\ndef test_two(): {interrupt}\n"
    (tmp_path / "test_slow.py").write_text(code, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n", encoding="utf-8")
    command = [sys.executable, "-m", "bench.suite.gpu_tests", "--out", str(tmp_path), "--tests", str(tmp_path)]
    assert launch(command, 120.0) == gpu_tests.INTERRUPTED
    counts = json.loads((tmp_path / "gpu-tests.json").read_text(encoding="utf-8"))
    assert (counts["passed"], counts["failed"], counts["complete"]) == (1, 0, False)


def test_tests_are_counted_by_outcome(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="a" name="one" time="1.5"/><testcase classname="a" name="two"><skipped/></testcase>'
        '<testcase classname="b" name="three"><failure message="/home/someone">/home/someone</failure></testcase>'
        '<testcase classname="b" name="four"><error/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    counts = gpu_tests.counted(report)
    assert counts == {
        "passed": 1, "failed": 2, "skipped": 1, "seconds": 1.5, "complete": True, "failures": ["b::three", "b::four"]
    }  # fmt: skip
    assert gpu_tests.counted(tmp_path / "nothing.xml") == {}
    report.write_text("<testsuites><testcase", encoding="utf-8")
    assert gpu_tests.counted(report) == {}
