"""`python -m bench`: what is refused, what is written when, and every job in a process of its own."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bench_cases import BreakableDevice, Doubling, contender

from bench import jobs as command
from bench import result
from bench.__main__ import main, parser
from bench.engine import Case
from bench.jobs import Job
from bench.options import Options, options_of
from bench.result import NOT_RUN, PASSED, Run, read

BENCH = Path(command.__file__).parent
Cases = Callable[[Options], Iterator[Case]]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cases], None]:
    """Replaces the main job's cases."""

    def replace(cases: Cases) -> None:
        monkeypatch.setitem(command.JOBS, "main", Job(cases, 0.001, notes=lambda options: ["a note"]))

    return replace


def two_cases(options: Options) -> Iterator[Case]:
    double = Doubling()
    for name in ("first", "second"):
        case = double.case({"plain": contender(double.right), "ours": contender(double.right, ours=True)})
        yield Case(name, case.shape, case.inputs, case.expected, case.contenders, fixed=options.fixed)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--size", "100"], "multiples of the patch size 16, got 100"),
        (["--size", "512", "-16"], "got -16"),
        (["--batch", "0"], "argument --batch: expects a number of at least 1, got '0'"),
        (["--seconds", "0"], "argument --seconds: expects a number of at least 0.001"),
        (["--seconds", "nan"], "argument --seconds: expects a number of at least 0.001"),
        (["--vit", "huge"], "'huge'"),
        (["--device", "tpu"], "--device expects cpu, cuda or cuda:N"),
        (["--dtype", "int8"], "'int8'"),
        (["--policy", "none"], "'none'"),
        (["--only", "nobody"], "--only nobody"),
        (["--unknown"], "--unknown"),
        (["nothing"], "'nothing'"),
        (["kernels", "some.json"], "kernels takes no files"),
        (["kernels", "--minutes", "3"], "--minutes is of all"),
        (["all", "--minutes", "0"], "argument --minutes: expects a number of at least 0.01"),
        (["report", "nowhere"], "nowhere holds no results"),
    ],
)
def test_what_cannot_run_is_one_line(
    arguments: list[str], reason: str, job: Callable[[Cases], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job(two_cases)
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and error.count("\n") == 1 and reason in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda is not there" in capsys.readouterr().err


def options(*arguments: str) -> Options:
    return options_of(parser().parse_intermixed_args(arguments), 3.0)


def test_defaults_of_a_cpu() -> None:
    found = options("model", "--device", "cpu")
    assert (found.dtype, found.vit, found.size, found.batch) == (torch.float32, ("small",), (512,), (4,))
    assert (found.seconds, found.policy, found.compile, found.only) == (3.0, "variance", False, ())
    assert options("--device", "cpu", "--compile").compile


def test_defaults_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.options.checked_device", lambda name: torch.device("cuda"))
    found = options("model")
    assert (found.dtype, found.vit, found.size, found.batch) == (torch.bfloat16, ("large",), (1024,), (8,))
    assert found.compile and not options("model", "--no-compile").compile
    assert (options("main").vit, options("main").size, options("main").batch) == (("small",), (512,), (4,))


def test_command_repeats_the_run_and_names_no_path() -> None:
    found = options("model", "--device", "cpu", "--size", "256", "512", "--only", "dense", "--images", "/home/somebody")
    told = found.command("model")
    assert "somebody" not in told and "results" not in told
    again = options(*told.split()[3:])
    assert (again.size, again.only, again.seconds) == (found.size, found.only, found.seconds)


def test_rows_are_written_after_every_case(job: Callable[[Cases], None], tmp_path: Path) -> None:
    seen = []

    def cases(options: Options) -> Iterator[Case]:
        for case in two_cases(options):
            yield case
            seen.append([row.case for row in read(tmp_path / "main.json").rows])

    job(cases)
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert seen == [["first"] * 2, ["first"] * 2 + ["second"] * 2]


def test_table_and_notes_are_printed(
    job: Callable[[Cases], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(two_cases)
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "**first**, elements 5, float32, cpu" in out and "- a note" in out and "| ours" in out
    run = read(tmp_path / "main.json")
    assert run.command.startswith("python -m bench main") and "a note" in run.notes and run.environment["cores"]


def test_interrupted_run_leaves_what_there_is(
    job: Callable[[Cases], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(options: Options) -> Iterator[Case]:
        yield next(two_cases(options))
        raise KeyboardInterrupt

    job(cases)
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    assert [row.gate for row in read(tmp_path / "main.json").rows] == [PASSED] * 2
    captured = capsys.readouterr()
    assert "**first**" in captured.out and "interrupted" in captured.err


def test_wrong_contender_is_the_exit_status(job: Callable[[Cases], None], tmp_path: Path) -> None:
    double = Doubling()
    job(lambda options: iter([double.case({"wrong": contender(lambda number: double.inputs[number])})]))
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("second", ["second plain", "second ours"]),
        ("ours", ["first plain", "first ours", "second plain", "second ours"]),
        ("plain", ["first plain", "second plain"]),
    ],
)
def test_only_keeps_a_baseline(only: str, expected: list[str], job: Callable[[Cases], None], tmp_path: Path) -> None:
    job(two_cases)
    assert main(["--device", "cpu", "--only", only, "--out", str(tmp_path)]) == 0
    assert [f"{row.case} {row.contender}" for row in read(tmp_path / "main.json").rows] == expected


@pytest.mark.parametrize("name", ["main", "all"])
def test_folder_of_another_machine_is_refused_before_anything_runs(
    name: str, job: Callable[[Cases], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(options: Options) -> Iterator[Case]:
        raise AssertionError("it ran")
        yield

    job(cases)
    Run("", {"device": "another"}, ()).write(tmp_path / "model.json")
    assert main([name, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "model.json is of another machine" in capsys.readouterr().err
    assert (tmp_path / "model.json").is_file()


def test_picture_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--images", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert "--images expects a folder of pictures" in capsys.readouterr().err


BROKEN = """
import sys

import pytest
import torch
from bench_cases import BreakableDevice

torch.set_num_threads(1)
from bench import jobs as command
from bench.__main__ import main

device = BreakableDevice(pytest.MonkeyPatch())
print("process", *sys.argv[2:])
command.JOBS["main"] = command.Job(lambda options: device.cases("poison"), 0.001)
sys.exit(main(["main", "--device", "cpu", "--out", sys.argv[1], *sys.argv[2:]]))
"""


def assert_all_others_were_timed(path: Path, *poisons: str) -> None:
    rows = {(row.shape["elements"], row.contender): row for row in read(path).rows}
    assert list(rows) == [
        *[(1, "plain"), (1, "ours")],
        *[(5, name) for name in ("plain", "ours", *poisons)],
        *[(2, "plain"), (2, "ours")],
    ]
    for (_, name), row in rows.items():
        if name in poisons:
            assert row.median_ms is None and str(row.problem).startswith(
                "broke the device: AcceleratorError: CUDA error"
            )
        else:
            assert row.gate == PASSED and row.median_ms and row.problem is None


def test_after_a_broken_device_the_others_run_in_a_new_process(tmp_path: Path) -> None:
    words = [sys.executable, "-c", BROKEN, str(tmp_path)]
    paths = os.pathsep.join([str(result.REPOSITORY), str(result.REPOSITORY / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("process")] == ["process", "process --resume"]
    assert_all_others_were_timed(tmp_path / "main.json", "poison")
    assert done.stdout.count("broke the device: AcceleratorError") == 1


def test_a_new_process_that_breaks_the_device_too_is_replaced(
    job: Callable[[Cases], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device, words = BreakableDevice(monkeypatch), ["--device", "cpu", "--out", str(tmp_path)]

    class Replaced(BaseException):
        pass

    def execv(program: str, started: list[str]) -> None:
        raise Replaced(program, started)

    monkeypatch.setattr(os, "execv", execv)
    job(lambda options: device.cases("poison", "venom"))
    for resumed in ([], ["--resume"]):
        monkeypatch.setattr(sys, "orig_argv", ["python", *words, *resumed])
        with pytest.raises(Replaced) as ended:
            main([*words, *resumed])
        assert ended.value.args == (sys.executable, [sys.executable, *words, "--resume"])
        device.error = None
    assert main([*words, "--resume"]) == 0
    assert_all_others_were_timed(tmp_path / "main.json", "poison", "venom")
    assert capsys.readouterr().out.count("broke the device: AcceleratorError") == 2


def test_what_was_lost_with_the_device_is_written_before_the_next_process(
    job: Callable[[Cases], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, double = BreakableDevice(monkeypatch), Doubling()
    started: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        started.append(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "execv", execv)
    poison = contender(lambda number: device.break_down())
    job(lambda options: iter([double.case({"plain": device.contender(double), "poison": poison})]))
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    assert [words[-1] for words in started] == ["--resume"]
    rows = {row.contender: row for row in read(tmp_path / "main.json").rows}
    assert rows["plain"].gate == NOT_RUN and rows["plain"].problem == "the device was broken by poison"
    assert str(rows["poison"].problem).startswith("broke the device: ")
    other = Run("", {"device": "another"}, ())
    other.write(tmp_path / "main.json")
    assert main(["--device", "cpu", "--out", str(tmp_path), "--resume"]) == 2, "rows of another machine"


def test_unknown_commit_is_told_on_the_terminal_and_in_the_table(
    job: Callable[[Cases], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job(two_cases)
    monkeypatch.setattr(result, "REPOSITORY", tmp_path)
    monkeypatch.delenv(result.COMMIT, raising=False)
    assert main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "NO COMMIT IS KNOWN" in captured.err and "- NO COMMIT IS KNOWN" in captured.out


WITHOUT_EXTRAS = """
import sys

class Missing:
    NAMES = {"matplotlib", "PIL", "skimage", "tqdm", "hypothesis", "pytest_benchmark", "timm", "safetensors", "yaml"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in Missing.NAMES else find(name, *rest)

import torch
torch.set_num_threads(1)
from bench.__main__ import main
from step_kernels.model.vit import PRESETS
PRESETS["tiny"]["depth"] = 3
small = ["--device", "cpu", "--vit", "tiny", "--size", "64", "--batch", "2", "--seconds", "0.001", "--out", sys.argv[1]]
status = [
    main(["main", *small]),
    main(["model", "--only", "merged, exact", *small]),
    main(["kernels", "--only", "merge_tokens", *small]),
    main(["peers", "--only", "ToMe", *small]),
    main(["report", sys.argv[1]]),
]
assert not Missing.NAMES & {name.partition(".")[0] for name in sys.modules}
assert status == [0] * 5, status
"""


def test_every_job_runs_without_the_extras(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_EXTRAS, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=result.REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(result.FILES)
    assert "Generated pictures take the place of photographs" in done.stdout and "| merged" in done.stdout
    assert "needs timm and ToMe's own package" in done.stdout
    assert "no picture: pip install matplotlib" in done.stderr


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file of bench imports from."""
    package = ["bench", *path.relative_to(BENCH).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_jobs_know_nothing_of_each_other_and_bench_nothing_of_the_tests() -> None:
    jobs = {"kernels", "model", "peers"}
    tests = {path.stem for path in (result.REPOSITORY / "tests").rglob("*.py")} - {"conftest", "__init__"}
    for path in BENCH.rglob("*.py"):
        names, own = imported(path), path.relative_to(BENCH).parts[0]
        for other in jobs - {own} if own in jobs else ():
            assert not any(name.startswith(f"bench.{other}") for name in names), (path, other)
        assert not {name.partition(".")[0] for name in names} & (tests | {"tests"}), path


def test_the_package_knows_nothing_of_bench() -> None:
    for folder in ("step_kernels", "model"):
        for path in (result.REPOSITORY / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import bench" not in text and "from bench" not in text, path
