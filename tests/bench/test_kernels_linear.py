"""The linear layers of `bench kernels`: sizes by hand, both capacities, the compiler's search, and what a CPU says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import CPU, LINEAR_TASKS, examples, on_a_gpu, small_source, task_name
from torch import Tensor

from bench.__main__ import main
from bench.kernels import contenders, gate, job, measure, ops_linear
from bench.kernels.contenders import COMPILED, EAGER, FORWARD, OURS, TIGHT, Contender, build_contenders
from bench.kernels.examples import Example
from bench.kernels.operation import Operation
from bench.kernels.rows import STALE, blank_row
from bench.kernels.schema import NOT_RUN, KernelResult
from bench.kernels.settings import CPU_DEFAULTS, Settings
from bench.schema import FAILED, PASSED

GPU = torch.device("cuda")
LAYERS = ops_linear.OPERATIONS[1::3]  # each at the run's batch
every_layer = pytest.mark.parametrize("operation", LAYERS, ids=task_name)


@pytest.fixture(autouse=True)
def a_backend_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is asked which backend it has."""
    monkeypatch.setattr(contenders, "selected_backend", lambda op, device: "triton")


def test_the_layers_of_a_block_at_three_numbers_of_rows() -> None:
    found: dict[str, list[list[int]]] = {}
    for operation in ops_linear.OPERATIONS:
        source = on_a_gpu(operation)
        example = operation.make(source)
        live, capacity = example.layout.capacity, example.layout.batch_size * example.layout.max_seqlen
        assert 2.5 <= capacity / live < 2.52
        assert live % ops_linear.ALIGNED == capacity % ops_linear.ALIGNED == 0
        row = blank_row(operation, FORWARD, [example], source.shape)
        outputs, inputs = example["weight"].shape
        assert row.flops == 2 * live * outputs * inputs
        x, weight = f"x [{live}, {inputs}]", f"weight [{outputs}, {inputs}]"
        assert row.variant == f"bfloat16, {x}, {weight}, {live} live rows, batch {source.shape.batch}"
        found.setdefault(operation.name, []).append([live, outputs, inputs])
    rows = (1632, 13104, 32768)
    assert found == {
        "ragged_linear": [[m, 3072, 1024] for m in rows],
        "ragged_linear_gelu": [[m, 4096, 1024] for m in rows],
        "ragged_linear_residual": [[m, 1024, 1024] for m in rows] + [[m, 1024, 4096] for m in rows],
    }


@pytest.mark.parametrize(("cells", "rows"), [(4096, 1632), (40, 16), (39, 15), (16, 6), (1, 1)])
def test_live_rows_of_few_cells(cells: int, rows: int) -> None:
    assert ops_linear.live_rows(cells) == rows


def test_bytes_of_a_layer_by_hand() -> None:
    # Six rows of D = 8; weights [24, 8], [32, 8], [8, 8] and [8, 32]; the residual and the output are as large as each other.
    rows, token = 6, 8 * 4
    wanted = {
        "ragged_linear": [rows * token + 24 * token + 24 * 4 + 3 * rows * token],
        "ragged_linear_gelu": [rows * token + 32 * token + 32 * 4 + 4 * rows * token],
        "ragged_linear_residual": [
            rows * token + 8 * token + 8 * 4 + 2 * rows * token,
            4 * rows * token + 4 * 8 * token + 8 * 4 + 2 * rows * token,
        ],
    }
    found: dict[str, list[int]] = {}
    for operation in LAYERS:
        found.setdefault(operation.name, []).append(operation.necessary_bytes(operation.make(small_source())))
    assert found == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_layer
def test_on_a_gpu_the_kernel_runs_at_both_capacities(operation: Operation, dtype: torch.dtype) -> None:
    exact = examples(operation, dtype)
    truths = gate.find_truths(operation, FORWARD, exact, dtype)
    ours, _, compiled, tight = build_contenders(operation, FORWARD, exact, GPU, operation.plain[0])
    assert (ours.name, compiled.name, tight.name) == (OURS, COMPILED, TIGHT)
    live = exact[0].layout.capacity
    capacities = [contender.examples[0].layout.capacity for contender in (ours, tight)]
    assert capacities == [3 * exact[0].layout.max_seqlen, live] and capacities[0] == 2.5 * live
    for contender in (ours, tight):
        layout = contender.examples[0].layout
        assert layout.live_rows is not None  # the cuBLAS of trimmed layouts does not stand in for the kernel
        assert layout.expected_rows == live
        assert contender.ours and contender.problem is None
        assert gate.check(operation, contender, truths).passed
        assert contender.examples[0]["x"].data_ptr() != exact[0]["x"].data_ptr()
    assert truths[0].limits[0].of(tight) == truths[0].limits[0].of(ours) < truths[0].limits[0].of(compiled)


@every_layer
def test_a_layer_without_its_epilogue_fails(operation: Operation) -> None:
    exact = examples(operation, count=1)
    truths = gate.find_truths(operation, FORWARD, exact, torch.float32)
    bare = build_contenders(operation, FORWARD, exact, CPU, without_epilogue)[1]
    assert gate.check(operation, bare, truths).passed == (operation.name == ops_linear.BIAS)


def without_epilogue(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def test_pytorch_may_do_what_our_own_exact_path_does() -> None:
    """GELU and sum in the matmul's output: a rival that is weaker than our reference would flatter the kernel."""
    compositions = {operation.name: {one.__name__ for one in operation.plain} for operation in LAYERS}
    assert compositions == {
        ops_linear.BIAS: {"linear"},
        ops_linear.GELU: {"linear_gelu", "linear_gelu_in_place"},
        ops_linear.RESIDUAL: {"linear_residual", "linear_residual_by_addmm"},
    }
    (example,) = examples(LAYERS[1], count=1)
    outputs = [plain(*LAYERS[1].arguments(example)) for plain in LAYERS[1].plain]
    assert torch.equal(*outputs)


def test_the_compiler_searches_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    (exact,) = examples(LAYERS[1], count=1)
    for device in (GPU, CPU):
        build_contenders(LAYERS[1], FORWARD, [exact], device, LAYERS[1].plain[0])[2](0)
    modes = [options["mode"] for options in asked]
    assert modes == ["max-autotune-no-cudagraphs", "default"]
    assert not any(options["dynamic"] for options in asked)


def test_command_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    sizes = ["--device", "cpu", "--model", "tiny", "--size", "64", "--batch", "2", "--classes", "5", "--repeats", "2"]
    asked = [flag for op in ("ragged_linear", "ragged_linear_residual") for flag in ("--op", op)]
    assert main(["kernels", *sizes, *asked, "--compile-minutes", "0", "--out", str(tmp_path)]) == 0
    assert "2 * M * inputs * outputs" in capsys.readouterr().out
    result = KernelResult.read(tmp_path / "kernels.json")
    assert [row.contender for row in result.rows] == [OURS, EAGER, COMPILED, TIGHT] * 9
    for ours, eager, _, tight in zip(*(iter(result.rows),) * 4, strict=True):
        assert ours.gate == eager.gate == PASSED
        assert ours.teraflops_per_second == pytest.approx(ours.flops / ours.median_ms / 1e9)
        assert (tight.gate, tight.problem) == (
            NOT_RUN,
            "needs a GPU: here, step_kernels gets exactly the live rows anyway",
        )
    assert [row.variant.split(", ")[-2:] for row in result.rows[:12:4]] == [
        ["6 live rows", "batch 1"], ["12 live rows", "batch 2"], ["32 live rows", "batch 5"]
    ]  # fmt: skip
    assert {row.composition for row in result.rows[1::4]} <= {
        "linear", "linear_residual", "linear_residual_by_addmm"
    }  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[measure.Bench]:
    """Tiny sizes; contenders are those of a GPU."""
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)

    def of_a_gpu(operation: Operation, direction: str, exact: Any, device: torch.device, plain: Any) -> Any:
        return build_contenders(operation, direction, exact, GPU, plain)

    monkeypatch.setattr(measure, "build_contenders", of_a_gpu)
    values = {**CPU_DEFAULTS, "model": "tiny", "size": 64, "classes": 5, "minutes": None, "compile_minutes": 0.0}
    yield measure.Bench(Settings(device="cpu", repeats=4, out=tmp_path, **values))


@every_layer
def test_both_capacities_are_timed_and_see_unseen_numbers(operation: Operation, bench: measure.Bench) -> None:
    ours, eager, compiled, tight = bench.measure(operation, FORWARD, bench.drawn(operation))
    assert [row.gate for row in (ours, eager, compiled, tight)] == [PASSED, PASSED, NOT_RUN, PASSED]
    for row in (ours, tight):
        assert row.speedup == pytest.approx(eager.median_ms / row.median_ms)
        assert (row.floor, row.composition) == ("triton", None)
    assert tight.contender == TIGHT and tight.rounds == ours.rounds == 4


@pytest.mark.parametrize("lazy", [OURS, TIGHT])
def test_a_kept_answer_fails_at_either_capacity(
    lazy: str, bench: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, Tensor] = {}
    real = measure.build_contenders

    def build(*arguments: Any) -> list[Contender]:
        return [dataclasses.replace(one, call=keeping(one)) if one.name == lazy else one for one in real(*arguments)]

    def keeping(honest: Contender) -> Callable[[Example], Tensor]:
        return lambda example: kept.setdefault(example["x"].data_ptr(), honest.call(example))

    monkeypatch.setattr(measure, "build_contenders", build)
    rows = bench.measure(LAYERS[0], FORWARD, bench.drawn(LAYERS[0]))
    assert {row.contender: row.problem for row in rows if row.gate == FAILED} == {lazy: STALE}


def test_a_mover_runs_at_its_own_batch(bench: measure.Bench) -> None:
    large = next(operation for operation, _ in measure.tasks_of(("scatter_into",), GPU) if operation.gpu_only)
    ours, eager, _ = bench.measure(large, FORWARD, bench.drawn(large))
    assert (ours.gate, eager.gate) == (PASSED, PASSED)
    assert ours.variant.startswith("float32, canvas [48, 5, 4, 4], ") and ours.variant.endswith(", batch 48")
    assert bench.drawn(large) is bench.drawn(large) is not bench.drawn(LAYERS[0])


@pytest.mark.parametrize("where", ["find_truths", "find_new_truth"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_comparison_that_breaks_off_is_a_row_and_the_others_go_on(
    error: type[Exception],
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    real = getattr(gate, where)

    def full(operation: Operation, *arguments: Any) -> Any:
        if operation.name == "merge_tokens":
            raise error("CUDA out of memory.\nTried to allocate 90 GiB")
        return real(operation, *arguments)

    monkeypatch.setattr(gate, where, full)
    sizes = ["--device", "cpu", "--model", "tiny", "--size", "64", "--batch", "2", "--classes", "5", "--repeats", "2"]
    asked = ["--op", "merge_tokens", "--op", "scatter_into", "--compile-minutes", "0", "--out", str(tmp_path)]
    assert main(["kernels", *sizes, *asked]) == 1
    merge, both, *others = KernelResult.read(tmp_path / "kernels.json").rows
    for row in (merge, both):
        assert (row.op, row.contender, row.gate) == ("merge_tokens", OURS, NOT_RUN)
        assert row.problem == f"comparison broke off: {error.__name__}: CUDA out of memory."
        assert row.median_ms is None
    assert [row.gate for row in others] == [PASSED, PASSED, NOT_RUN]
    assert "in full" in capsys.readouterr().err  # the traceback


@pytest.mark.parametrize(("lost", "status"), [(OURS, 1), (TIGHT, 1), (COMPILED, 0)])
def test_on_a_gpu_ours_has_to_run_at_both_capacities(
    lost: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, live = LAYERS[0], examples(LAYERS[0], count=1)
    blank = blank_row(layer, FORWARD, live, small_source().shape)
    rows = [
        dataclasses.replace(blank, contender=name, **({} if name == lost else {"gate": PASSED, "problem": None}))
        for name in (OURS, EAGER, COMPILED, TIGHT)
    ]
    monkeypatch.setattr(job, "run", lambda settings: KernelResult(tuple(rows), {}, {}))
    settings = Settings(device="cpu", out=tmp_path, repeats=2, **{**CPU_DEFAULTS, "minutes": None})
    object.__setattr__(settings, "device", "cuda")  # there is none to ask for
    assert job.main(settings) == status


def test_what_bars_want_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of torch.compile is for the first of them, and the table's order stays."""
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    measured: list[str] = []
    real = measure.Bench.measure

    def noted(bench: measure.Bench, operation: Operation, *arguments: Any) -> Any:
        measured.append(operation.name)
        return real(bench, operation, *arguments)

    monkeypatch.setattr(measure.Bench, "measure", noted)
    sizes = ["--device", "cpu", "--model", "tiny", "--size", "32", "--batch", "1", "--classes", "3", "--repeats", "2"]
    ops = ["from_sides", "upsample_argmax", "ragged_linear", "ragged_linear_gelu"]
    asked = [flag for op in ops for flag in ("--op", op)]
    main(["kernels", *sizes, *asked, "--compile-minutes", "0", "--out", str(tmp_path)])
    assert list(dict.fromkeys(measured)) == ["upsample_argmax", "ragged_linear_gelu", "ragged_linear", "from_sides"]
    rows = KernelResult.read(tmp_path / "kernels.json").rows
    assert list(dict.fromkeys(row.op for row in rows)) == ops


def test_variants_are_tasks_of_their_own() -> None:
    assert len(LINEAR_TASKS) == len(ops_linear.OPERATIONS) == 12
    assert {direction for _, direction in LINEAR_TASKS} == {FORWARD}
    names = {operation.name for operation, _ in measure.tasks_of(("merge_tokens",), GPU)}
    on_gpu, on_cpu = (measure.tasks_of(("merge_tokens",), device) for device in (GPU, CPU))
    assert names == {"merge_tokens"}
    assert [operation.batches for operation, _ in on_gpu] == [1, 1, 4]
    assert [operation.batches for operation, _ in on_cpu] == [1, 1]
    assert dataclasses.replace(on_gpu[2][0], batches=1 / 8).batch(2) == 1
