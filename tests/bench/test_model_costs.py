"""What a call costs beside time, and where its time goes by the names of kernels."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

import step_kernels
from bench.environment import REPOSITORY
from bench.model import costs, profile

CPU = torch.device("cpu")


def test_syncs_are_counted_by_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert costs.count_syncs(call) == 3
    assert modes == ["warn", 0]


def test_kernels_are_told_from_copies() -> None:
    events = [("Memcpy DtoD (Device -> Device)", 1.0), ("Memset (Device)", 1.0), ("linear_kernel", 5.0)]
    assert costs.only_kernels(events) == [("linear_kernel", 5.0)]


def event(device: DeviceType, name: str, microseconds: float, annotation: bool = False) -> FunctionEvent:
    return FunctionEvent(
        id=1, name=name, thread=0, start_us=0.0, end_us=microseconds, device_type=device, is_user_annotation=annotation
    )


def test_ranges_with_a_name_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler shows them on the device, too, as long as all of their kernels together."""
    seen = [
        event(DeviceType.CPU, "aten::mm", 5.0),
        event(DeviceType.CUDA, "gemm", 30.0),
        event(DeviceType.CUDA, "a block", 40.0, annotation=True),
        event(DeviceType.CUDA, "layer_norm", 10.0),
        event(DeviceType.CPU, "a block", 50.0, annotation=True),
    ]

    class Profiler:
        def __init__(self, **options: Any) -> None:
            assert ProfilerActivity.CUDA in options["activities"]

        def __enter__(self) -> Profiler:
            return self

        def __exit__(self, *error: object) -> None: ...

        def events(self) -> list[FunctionEvent]:
            return seen

    monkeypatch.setattr(costs, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert costs.device_events(lambda: None) == [("gemm", 30.0), ("layer_norm", 10.0)]


@pytest.mark.filterwarnings("ignore")  # what the profiler says about itself
def test_the_profiler_tells_what_has_a_name_from_what_runs() -> None:
    """What the test above takes for granted, on a CPU."""
    with (
        torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler,
        torch.profiler.record_function("a block"),
    ):
        torch.ones(2).exp()
    found = {event.name: bool(event.is_user_annotation) for event in profiler.events()}
    assert found["a block"] and not found["aten::exp"]


def test_memory_of_a_cpu_call_is_its_tensors_at_their_peak() -> None:
    def call() -> torch.Tensor:
        first = torch.zeros(250_000)  # 1 MB
        second = first + 1  # 2 MB
        del first
        third = second + 1  # 2 MB
        del second
        return third[:2].clone()

    found, events = costs.measure_costs(call, CPU, profiled=False)
    assert found.peak_memory_bytes == pytest.approx(2_000_000, abs=1000)
    assert (found.host_syncs, found.device_kernels, events) == (None, None, [])


def test_ops_inside_an_op_of_ours_count_as_that_op() -> None:
    layout = step_kernels.SupertokenLayout.uniform(1, (4, 4))
    q, x = torch.randn(16, 2, 8), torch.randn(64, 64)

    def call() -> None:
        torch.mm(x, x)
        step_kernels.ragged_attention(q, q, q, layout.cu_seqlens, layout.max_seqlen)

    _, events = costs.measure_costs(call, CPU, profiled=True)
    names = {name for name, _ in events}
    assert {"aten::mm", "step_kernels::ragged_attention"} <= names
    assert not any("scaled_dot_product" in name for name in names)
    parts = profile.milliseconds_by_part(events)
    assert parts["attention"] > 0 and parts["linears"] > 0


def test_every_kernel_of_ours_has_a_part() -> None:
    sources = (REPOSITORY / "step_kernels" / "triton").glob("*.py")
    names = {
        line.split("(")[0].removeprefix("def ")
        for source in sources
        for line in source.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and "_kernel(" in line and "backward" not in line and "grad" not in line
    }
    assert len(names) > 20
    forward = names & {
        "attention_forward_kernel", "attention_schedule_kernel", "compact_kernel", "count_kernel", "decide_kernel",
        "expand_blocks_kernel", "gather_kernel", "head_kernel", "label_kernel", "layer_norm_kernel", "linear_kernel",
        "merge_patches_kernel", "reduce_blocks_kernel", "scan_kernel", "write_kernel",
    }  # fmt: skip
    assert len(forward) == 15
    assert {name: profile.part_of(name) for name in forward if profile.part_of(name) == profile.OTHER} == {}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "linears"),
        ("triton_tem_fused_addmm_gelu_3", "linears"),
        ("head_kernel", "exits"),
        ("linear_kernel", "linears"),
        ("triton_per_fused_native_layer_norm_5", "norms"),
        ("sm90_xmma_fprop_implicit_gemm_bf16", "convolutions"),
        ("merge_patches_kernel", "layout and merge"),
        ("label_kernel", "scatter and tail"),
        ("Memcpy DtoD", "copies and fills"),
        ("vectorized_elementwise_kernel", "other"),
        ("aten::addmm", "linears"),
        ("aten::bmm", "linears"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::native_layer_norm", "norms"),
        ("aten::gelu", "other"),
        ("aten::copy_", "copies and fills"),
        ("step_kernels::halt_tokens", "exits"),
        ("step_kernels::embed_patches", "layout and merge"),
        ("step_kernels::upsample_argmax", "scatter and tail"),
        ("step_kernels::ragged_linear", "linears"),
    ],
)
def test_parts_by_name(name: str, part: str) -> None:
    assert profile.part_of(name) == part


def test_milliseconds_by_part() -> None:
    events = [("linear_kernel", 1500.0), ("head_kernel", 20.0), ("linear_kernel", 500.0), ("mystery", 1.0)]
    assert profile.milliseconds_by_part(events) == {"exits": 0.02, "linears": 2.0, "other": 0.001}
    assert list(profile.milliseconds_by_part(events)) == ["exits", "linears", "other"]
