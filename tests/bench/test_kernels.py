"""`bench kernels`: every contender of every op passes its gate on small inputs, wrong ones fail, sizes and bytes by hand."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from bench import kernels, layouts
from bench.clock import wall_clock
from bench.engine import Case, compete
from bench.kernels import attention, canvas, exits, inputs, linear, merging, op
from bench.layouts import Drawn
from bench.options import Options
from bench.result import FAILED, LATER, NOT_RUN, PASSED, Row
from step_kernels import SupertokenLayout, use_backend

CPU = torch.device("cpu")
SMALL = Options(CPU, torch.float32, ("tiny",), (96,), (3,), only=("",))  # a name of no length is a part of every one
BOTH = ", forward + backward"
MOVERS = ("merge_patches", "merge_tokens", "gather_tokens", "scatter", "upsample", "norm")
WITH_GRADIENTS = ["merge_patches", "embed_patches", "merge_tokens", "gather_tokens", "scatter_back", "ragged_attention"]
NEVER = {  # on a CPU, and why
    "varlen_attn, flash": "needs a CUDA device",
    "varlen_attn, cuDNN": "needs torch 2.15" if torch.__version__ < "2.15" else "needs a CUDA device",
    "FlashAttention": "needs f",  # its modules
    "quack-kernels": "needs a GPU of sm_90",
    "dense SDPA, cuDNN": "needs another device or dtype",
    "dense SDPA, efficient": "needs another device or dtype",
}
UNASKED = dict.fromkeys(["PyTorch compiled", "FlexAttention"], "needs --compile")
ABSENT = {False: {**NEVER, **UNASKED, "step_kernels, capacity M": "needs a GPU"}, True: NEVER}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(options: Options, ops: ModuleType, *names: str) -> dict[tuple[str, str], Row]:
    """(case, contender) -> row, of the cases of these names or of all."""
    clock, found = wall_clock(CPU), {}
    for case in ops.cases(options):
        if not names or case.name in names:
            found |= {(case.name, row.contender): row for row in compete(case, clock, rounds=2)}
    return found


@pytest.mark.skipif(hasattr(torch.nn.attention.varlen, "_select_backend"), reason="there callers choose")
def test_what_pytorch_chooses_by_itself_runs_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "_can_use_cudnn", lambda *_: True, raising=False)  # torch 2.14
    rows = rows_of(SMALL, attention, "ragged_attention")
    told = {name: rows["ragged_attention", f"varlen_attn, {name}"].problem for name in ("flash", "cuDNN")}
    assert told["flash"].startswith("needs torch 2.15") and told["cuDNN"].startswith("needs a CUDA device")


def test_which_cases_there_are() -> None:
    always = ["resolve_layout", "ragged_layer_norm", "halt_tokens", "exit_head", "scatter_into", "upsample_argmax"]
    large = [f"{name}, large" for name in ("merge_patches", "merge_tokens", "scatter_back", "scatter_into")]
    attentions = [f"ragged_attention, {kind} lengths" for kind in ("wide", "equal", "adversarial")]
    attentions += ["masked_attention", "class_attention"]
    layers = ["ragged_linear", "ragged_linear_gelu", "ragged_linear_residual"]
    always += [name + way for name in WITH_GRADIENTS for way in ("", BOTH)]
    on_demand = [*large, *layers, *(name + way for name in attentions for way in ("", BOTH))]

    def names(*only: str) -> set[str]:
        return {case.name for case in kernels.cases(dataclasses.replace(SMALL, only=only))}

    assert names("") == {*always, *on_demand}
    assert names() == set(always) and names("linear_gelu", "varlen") == {*always, "ragged_linear_gelu"}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("dtype", "static"), [(torch.float32, False), (torch.bfloat16, True)], ids=["exact", "static, compiled"]
)
@pytest.mark.parametrize(
    "ops", [attention, canvas, exits, linear, merging], ids=lambda ops: ops.__name__.rpartition(".")[2]
)
def test_every_contender_is_right(
    ops: ModuleType, dtype: torch.dtype, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the static form, too, and what torch.compile is given, as it is."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(op, "STATIC", ("cpu",) if static else ())
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    for (case, name), row in rows_of(dataclasses.replace(SMALL, dtype=dtype, compile=static), ops).items():
        absent = next((why for known, why in ABSENT[static].items() if name.startswith(known)), None)
        if absent or (name == "FlexAttention" and case.endswith(BOTH)):
            assert row.gate == NOT_RUN and (absent or "backward on CPU") in row.problem, (case, row)
            continue
        assert row.gate == PASSED, (case, row)
        assert row.rounds >= 2 and row.median_ms > 0 and row.error <= row.allowed
        assert (row.gbytes is not None) == (not case.endswith(BOTH) and any(part in case for part in MOVERS))
        assert row.ours == name.startswith("step_kernels") == (row.note == "reference")
        assert (row.gflops is None) == (not any(part in case for part in ("attention", "linear")))
        assert row.dtype == str(dtype).removeprefix("torch.") and row.shape["images"] >= 1
    if ops is linear and static:
        assert asked == [{"dynamic": False, "mode": None}] * 12


# Who is wrong


def spoiled(result: Any) -> Any:
    """A little off, or the next whole number; of a layout or of decisions, one part."""
    if isinstance(result, Tensor):
        return result + (1e-3 if result.is_floating_point() else 1)
    part = "cells" if isinstance(result, SupertokenLayout) else "confidence"
    return dataclasses.replace(result, **{part: spoiled(getattr(result, part))})


PUBLIC = {
    merging: ("resolve_layout", "merge_patches", "embed_patches", "merge_tokens"),
    exits: ("halt_tokens", "exit_head", "gather_tokens"),
    canvas: ("scatter_back", "scatter_into", "upsample_argmax"),
    attention: ("ragged_attention", "masked_attention", "class_attention"),
    linear: ("ragged_linear",),
}


@pytest.mark.parametrize(("ops", "name"), [(ops, name) for ops, names in PUBLIC.items() for name in names])
def test_a_wrong_op_has_no_time(ops: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *given, **named: spoiled(honest(*given, **named)))
    rows = rows_of(SMALL, ops, name)
    gates = {contender: (row.gate, row.median_ms is None) for (_, contender), row in rows.items()}
    assert gates.pop("step_kernels") == (FAILED, True)
    assert set(gates.values()) <= {(PASSED, False), (NOT_RUN, True)}


@pytest.mark.parametrize("contender", ["step_kernels", "PyTorch"])
@pytest.mark.parametrize(("ops", "name"), [(merging, "merge_tokens"), (canvas, "scatter_into"), (exits, "exit_head")])
def test_who_works_for_the_gate_alone_is_caught(ops: ModuleType, name: str, contender: str) -> None:
    """Under the clock it returns what it has: an older answer, or a canvas on which it has not painted."""
    case = next(case for case in ops.cases(SMALL) if case.name == name)
    rows = compete(lazy_under_the_clock(case, contender), wall_clock(CPU), rounds=4)
    gates = {row.contender: (row.gate, row.median_ms is None) for row in rows if row.gate != NOT_RUN}
    assert gates.pop(contender) == (LATER, True)
    assert gates and set(gates.values()) == {(PASSED, False)}


def lazy_under_the_clock(case: Case, name: str) -> Case:
    def build() -> Any:
        honest, results = case.contenders[name](), []

        def call(number: int) -> Any:
            if len(results) == 2:  # of the gate
                return results[0]
            results.append(honest.call(number))
            return results[-1]

        return dataclasses.replace(honest, call=call)

    return dataclasses.replace(case, contenders={**case.contenders, name: build})


def test_attention_of_other_packages_is_called_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they do not run, stand-ins attend within what they were told are the images."""

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest: int, most: int
    ) -> Tensor:
        assert longest == most == starts.diff().max() == key_starts.diff().max()
        return attention.Padding(starts.diff()).self_attend(q, k, v)

    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None

    signature = inspect.signature(layouts.varlen_attn)
    monkeypatch.setattr(layouts, "varlen_attn", lambda *q, **n: stand_in(*signature.bind(*q, **n).args))
    monkeypatch.setattr(attention, "has_varlen", lambda x: True)
    for name in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=flash))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    for case in ("ragged_attention, wide lengths", "ragged_attention, wide lengths" + BOTH):
        rows = rows_of(SMALL, attention, case)
        for name in ("varlen_attn, flash", "FlashAttention 3", "FlashAttention 4"):
            assert rows[case, name].gate == PASSED
        forward_only = rows[case, "FlashAttention 3, fa3-fwd"]
        assert forward_only.problem == "has no gradient" if case.endswith(BOTH) else forward_only.gate == PASSED


def test_quacks_gemm_is_called_by_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not run, stand-ins multiply the rows that they were told of on the device; the others stay undefined."""

    def gemm(  # as quack-kernels has it, gemm_add without bias
        A: Tensor, B: Tensor, out: Tensor | None = None, bias: Tensor | None = None, alpha: float = 1.0,
        out_dtype: torch.dtype | None = None, cu_seqlens_m: Tensor | None = None, tuned: bool = True,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_m is not None and cu_seqlens_m.dtype == torch.int32 and B.shape[0] == 1
        first, live = cu_seqlens_m.tolist()
        assert first == 0 < live < A.shape[0] and A[live:].isnan().all() and not A[:live].isnan().any()
        found = A.new_full((A.shape[0], B.shape[2]), torch.nan)
        found[:live] = A[:live] @ B[0] + (0 if bias is None else bias[0])
        return found

    def gemm_add(
        A: Tensor, B: Tensor, C: Tensor, out: Tensor | None = None, cu_seqlens_m: Tensor | None = None
    ) -> Tensor:
        return gemm(A, B, cu_seqlens_m=cu_seqlens_m) + C

    name = "quack-kernels, M on the device"
    monkeypatch.setattr(linear, "has_quack", lambda x: True)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", None)  # type: ignore[arg-type]
    missing = {row.problem for (_, one), row in rows_of(SMALL, linear, "ragged_linear").items() if one == name}
    assert missing == {"needs quack-kernels"}
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", SimpleNamespace(gemm=gemm, gemm_add=gemm_add))
    rows = rows_of(SMALL, linear)
    gates = {case: row.gate for (case, one), row in rows.items() if one == name}
    assert gates == dict.fromkeys(["ragged_linear", "ragged_linear_gelu", "ragged_linear_residual"], PASSED), rows


@pytest.mark.parametrize("make", [lambda: inputs.spread(SMALL, 2), lambda: inputs.of_lengths(SMALL, [3, 0, 5])])
def test_drawing_needs_no_kernels(make: Callable[[], list[inputs.Source]]) -> None:
    """Layouts are drawn on the CPU also where ops are to run as kernels, on the GPU."""
    expected = make()
    with use_backend("triton"):
        found = make()
    assert all(torch.equal(a.layout.cells, b.layout.cells) for a, b in zip(found, expected, strict=True))


# Sizes, by hand


def small_source() -> inputs.Source:
    """One image of 4 x 4 cells: a class token, a block of side 2 in the top-left corner, 12 single cells: 14 rows. Two of them halt."""
    sides = torch.ones(1, 4, 4, dtype=torch.int32)
    sides[0, :2, :2] = 2
    layout = SupertokenLayout.from_sides(sides, num_prefix=1).trim()
    scores = torch.tensor([[[1.0, -1.0], [-1.0, -1.0]]]), torch.tensor([[[-1.0]]])
    source = inputs.Source(dataclasses.replace(SMALL, size=(64,)), Drawn(scores, (2, 4), layout))
    source.halted = torch.zeros(14, dtype=torch.bool)
    source.halted[1:3] = True
    return source


LAYOUT, TOKEN, SCORES, IMAGES = 2 * 4 + 14 * 16, 192 * 4, 150 * 4, 3 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("made", "necessary"),
    [
        (merging.MERGE_PATCHES, IMAGES + LAYOUT + 14 * 3 * 16 * 16 * 4),
        (merging.MERGE_TOKENS, (16 + 1 + 14) * TOKEN + LAYOUT),
        (exits.GATHER_TOKENS, 12 * 4 + 24 * TOKEN),
        (canvas.back(150), (14 + 16) * SCORES + LAYOUT),
        (canvas.SCATTER_INTO, (2 + 5) * SCORES + 14 + LAYOUT),  # five cells of two tokens
    ],
    ids=lambda value: value.name if isinstance(value, op.Op) else "",
)
def test_necessary_bytes(made: op.Op, necessary: int) -> None:
    assert made.bytes is not None and made.bytes(made.make(small_source())) == pytest.approx(necessary)


def test_flops_are_those_of_the_true_lengths() -> None:
    sources = inputs.of_lengths(SMALL, [3, 0, 5])
    forward, both = attention.ragged("ragged_attention", SMALL).cases(SMALL, sources)
    assert forward.flops == 4 * (9 + 25) * 192
    assert both.flops == 3.5 * forward.flops
    assert forward.shape == {"images": 3, "rows": 8, "longest": 5, "heads": 3}
    for made, pairs in ((attention.MASKED_ATTENTION, 13**2), (attention.CLASS_ATTENTION, 150 * 14)):
        assert made.flops(made.make(small_source())) == 4 * pairs * 192
    others = [lengths for _, lengths in attention.other_lengths(3, 360)]
    assert others == [[36, 198, 360], [90] * 3, [360] * 3, [5, 5, 360, 0]]


def test_sizes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory of one number: rows of linear layers and their capacity, and what moves more than 120 MB."""
    large = Options(CPU, torch.bfloat16, ("large",), (1024,), (8,), only=("ragged_linear", "large"))
    monkeypatch.setattr(
        inputs.Source, "random", lambda source, *size, scale=1.0: torch.zeros((), dtype=torch.bfloat16).expand(size)
    )
    found = list(linear.cases(large))
    assert [case.shape["rows"] for case in found] == [1632, 13104, 32768] * 4
    assert {(case.shape["N"], case.shape["K"]) for case in found} == {
        (3072, 1024), (4096, 1024), (1024, 1024), (1024, 4096)
    }  # fmt: skip
    assert found[1].flops == 2 * 13104 * 3072 * 1024
    movers = [case for ops in (merging, canvas) for case in ops.cases(large) if case.name.endswith(", large")]
    assert len(movers) == 5
    for case in movers:
        assert 120e6 < case.bytes < 480e6 and "copy" in case.contenders and BOTH not in case.name
