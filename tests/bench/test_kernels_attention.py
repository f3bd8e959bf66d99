"""Attention rows of `bench kernels`: FLOPs and lengths by hand, honest rivals pass, wrong ones fail, absent ones say why."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import ALL_TASKS, ATTENTION_TASKS, CPU, examples, small_source, task_name
from torch import Tensor

from bench.__main__ import main
from bench.kernels import gate, measure, ops_attention, plain_attention
from bench.kernels.contenders import BACKWARD, FORWARD, OURS, build_contenders, rival_contender
from bench.kernels.examples import NUM_PREFIX, Example
from bench.kernels.layouts import draw_layouts
from bench.kernels.operation import Attention, Operation, Rival
from bench.kernels.ops_attention import CLASS_ATTENTION, MASKED_ATTENTION, RAGGED, layout_of
from bench.kernels.report import markdown_table, plain_table
from bench.kernels.rows import blank_row
from bench.kernels.schema import TIMING_FIELDS, KernelResult
from bench.kernels.settings import CPU_DEFAULTS, OPS, Settings

EQUAL = [operation for operation in RAGGED if operation.name == "ragged_attention_equal"]
every_task = pytest.mark.parametrize(("operation", "direction"), ATTENTION_TASKS, ids=task_name)


def test_every_op_is_on_the_command_line() -> None:
    assert tuple(dict.fromkeys(operation.name for operation, _ in ALL_TASKS)) == OPS


# FLOPs, bytes and lengths


def with_lengths(*lengths: int) -> Example:
    """Two heads of eight, images of that many tokens."""
    layout = layout_of(torch.tensor(lengths), (4, 4))
    tensors = {name: torch.ones(sum(lengths), 2, 8) for name in ("q", "k", "v", "gradient")}
    return Example(layout, tensors, packed=frozenset(tensors))


def test_flops_of_three_images_by_hand() -> None:
    # Scores: 3 x 3 and 5 x 5 dot products of 8 in each of 2 heads, 2 FLOPs each; as many for the values.
    example = with_lengths(3, 0, 5)
    assert ops_attention.ragged_flops(example) == 2 * (2 * (9 + 25) * 8 * 2) == 2176
    shape = small_source().shape
    forward, both = (blank_row(RAGGED[0], way, [example], shape) for way in (FORWARD, BACKWARD))
    assert (forward.flops, both.flops) == (2176, 7616)
    assert forward.variant == "float32, q [8, 2, 8], 8 live rows, batch 3, 0 to 5 an image"
    # Eight rows of 64 bytes each of q, k, v and the output, four int32; then the gradient instead of the output, and three more.
    assert (forward.necessary_bytes, both.necessary_bytes) == (4 * 512 + 16, 11 * 512 + 32)


def test_flops_and_bytes_of_the_other_attentions() -> None:
    source = small_source()  # one image of 14 tokens, 13 of them blocks; one head of 8, 3 classes
    classes, masked = CLASS_ATTENTION.make(source), MASKED_ATTENTION.make(source)
    token = 8 * 4
    assert ops_attention.class_flops(classes) == 4 * 3 * 14 * 8
    assert CLASS_ATTENTION.necessary_bytes(classes) == (3 + 14 + 14 + 3) * token + 8
    assert masked["keep"].sum() == 13
    assert ops_attention.ragged_flops(masked) == 4 * 13**2 * 8
    assert MASKED_ATTENTION.necessary_bytes(masked) == (3 * 13 + 16) * token + 16
    assert MASKED_ATTENTION.backward_bytes is not None
    assert MASKED_ATTENTION.backward_bytes(masked) == (4 * 13 + 3 * 16) * token + 16


@pytest.mark.parametrize(
    ("operation", "lengths"),
    [(RAGGED[1], [36, 198, 360]), (EQUAL[0], [90] * 3), (EQUAL[1], [360] * 3), (RAGGED[4], [5, 5, 360, 0])],
    ids=task_name,
)
def test_lengths_on_a_grid_of_360(operation: Operation, lengths: list[int]) -> None:
    (example,) = examples(operation, count=1)
    assert example.layout.lengths().tolist() == lengths
    example.layout.validate()


# The gate


def run_as_if_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def cannot_run_here(rival: Rival, direction: str) -> bool:
    """On a CPU: varlen_attn, two backends of SDPA, and FlexAttention's backward pass."""
    absent = {plain_attention.VARLEN, "dense SDPA, cuDNN", "dense SDPA, efficient"}
    return rival.name in absent or (rival.name == plain_attention.FLEX and direction == BACKWARD)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_task
def test_ours_and_every_rival_are_right(
    operation: Operation, direction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_as_if_compiled(monkeypatch)
    exact = examples(operation, dtype)
    truths = gate.find_truths(operation, direction, exact, dtype)
    static = [example.static() for example in exact]
    for form in (exact, static):
        ours = build_contenders(operation, direction, form, CPU, None)[0]
        assert gate.check(operation, ours, truths).passed
    checked = 0
    for rival in operation.rivals:
        if not cannot_run_here(rival, direction):
            contender = rival_contender(rival, operation, direction, exact)
            assert contender.problem is None
            assert gate.check(operation, contender, truths).passed, rival.name
            checked += 1
    assert checked >= 1


def test_varlen_attn_is_called_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not run, a stand-in with its signature attends within what it was told are the images."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments: Any, **keywords: Any) -> Tensor:
        q, k, v, starts, key_starts, longest, longest_key = signature.bind(*arguments, **keywords).args
        assert longest == longest_key == starts.diff().max() == key_starts.diff().max()
        images = [x.split(starts.diff().tolist()) for x in (q, k, v)]
        per_image = ([x.transpose(0, 1) for x in image] for image in zip(*images, strict=True))
        return torch.cat([F.scaled_dot_product_attention(*image).transpose(0, 1) for image in per_image])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(plain_attention, "VARLEN_RUNS_ON", {("cpu", "float32")})
    exact = examples(RAGGED[4])
    truths = gate.find_truths(RAGGED[4], BACKWARD, exact, torch.float32)
    contender = rival_contender(Rival("varlen_attn", plain_attention.varlen), RAGGED[4], BACKWARD, exact)
    assert gate.check(RAGGED[4], contender, truths).passed


@every_task
def test_every_output_of_a_rival_is_checked(operation: Operation, direction: str) -> None:
    exact = examples(operation, count=1)
    truths = gate.find_truths(operation, direction, exact, torch.float32)
    honest = rival_contender(operation.rivals[0], operation, direction, exact)
    assert len(truths[0].outputs) == (4 if direction == BACKWARD else 1)
    for number in range(len(truths[0].outputs)):

        def live(result: Any, example: Example, changed: int = number) -> tuple[Tensor, ...]:
            outputs = [output.clone() for output in honest.live(result, example)]
            outputs[changed].flatten()[-1] += 1e-3
            return tuple(outputs)

        assert not gate.check(operation, dataclasses.replace(honest, live=live), truths).passed, number


# The job


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[measure.Bench]:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    values = {**CPU_DEFAULTS, "model": "tiny", "size": 64, "classes": 5, "minutes": None, "compile_minutes": 0.0}
    yield measure.Bench(Settings(device="cpu", repeats=2, out=tmp_path, **values))


def rows_of(bench: measure.Bench, operation: Operation, direction: str = FORWARD) -> dict[str, Any]:
    drawn = draw_layouts(
        measure.INPUTS["cpu"], 2, (4, 4), num_prefix=NUM_PREFIX, dtype=torch.float32, seed=0, device=CPU
    )
    return {row.contender: row for row in bench.measure(operation, direction, drawn)}


def without_a_mask(example: Example) -> Attention:
    """Lets images see each other."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)

    return run


def test_wrong_rival_gets_no_time(bench: measure.Bench) -> None:
    wrong = Rival(plain_attention.PADDED, without_a_mask)
    rows = rows_of(bench, dataclasses.replace(RAGGED[0], rivals=(wrong, *RAGGED[0].rivals[1:])))
    assert rows[wrong.name].gate == "FAILED"
    assert all(getattr(rows[wrong.name], name) is None for name in TIMING_FIELDS)
    assert (rows[OURS].gate, rows[plain_attention.NESTED].gate) == ("PASSED", "PASSED")
    assert rows[OURS].speedup is None  # no speed-up over a wrong baseline
    assert rows[OURS].teraflops_per_second == pytest.approx(rows[OURS].flops / rows[OURS].median_ms / 1e9)


def test_rival_that_cannot_run_is_a_row_with_a_reason(bench: measure.Bench) -> None:
    def broken(example: Example) -> Attention:
        raise MemoryError("too large a mask\nand more")

    rows = rows_of(
        bench, dataclasses.replace(EQUAL[1], rivals=(*EQUAL[1].rivals, Rival("gathered + padded SDPA", broken)))
    )
    assert list(rows) == [OURS, *(rival.name for rival in EQUAL[1].rivals), "gathered + padded SDPA"]
    reasons = {name: row.problem for name, row in rows.items() if row.gate == "NOT RUN"}
    assert reasons["varlen_attn"] == "needs a CUDA device and bfloat16 or float16, this is cpu and float32"
    assert reasons["FlexAttention compiled"] == "not compiled: --compile-minutes 0 is used up"
    assert reasons["gathered + padded SDPA"] == "MemoryError: too large a mask"
    assert "No viable backend" in str(reasons["dense SDPA, cuDNN"])
    assert rows["dense SDPA, math"].gate == rows["padded SDPA, key mask"].gate == "PASSED"
    assert rows["padded SDPA, key mask"].speedup == 1.0


def test_dense_rivals_need_equal_lengths() -> None:
    for lengths, problem in (((4, 4), None), ((4, 3), "needs equal lengths")):
        for rival in plain_attention.DENSE:
            assert rival_contender(rival, EQUAL[0], FORWARD, [with_lengths(*lengths)]).problem == problem


def test_command_writes_the_rates_and_both_tables_show_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 1024)
    sizes = ["--device", "cpu", "--model", "tiny", "--size", "64", "--batch", "2", "--classes", "5", "--repeats", "2"]
    asked = ["--op", "class_attention", "--op", "ragged_attention_adversarial", "--op", "gather_tokens"]
    assert main(["kernels", *sizes, *asked, "--compile-minutes", "0", "--out", str(tmp_path)]) == 0
    assert "TFLOP/s" in capsys.readouterr().out
    result = KernelResult.read(tmp_path / "kernels.json")
    assert KernelResult.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["rows"][-1]["flops"] == result.rows[-1].flops
    for row in result.rows:
        assert (row.flops is None) == (row.op == "gather_tokens")
        assert (row.teraflops_per_second is not None) == (row.flops is not None and row.gate == "PASSED")
    timed = next(row for row in result.rows if row.op == "class_attention" and row.contender == OURS)
    timed = dataclasses.replace(timed, teraflops_per_second=123.4)
    for text in (plain_table([timed]), markdown_table(dataclasses.replace(result, rows=(timed,)))):
        lines = [line for line in text.splitlines() if "contender" in line or OURS in line]
        assert ["TFLOP/s" in lines[0], "123" in lines[1]] == [True, True]
