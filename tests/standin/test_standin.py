"""What the stand-in claims to catch is caught, and goes unseen once the guard that catches it is taken away; and it computes like a device."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from gpu.syncs import no_sync
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import step_kernels as sk
from bench import options
from bench.__main__ import parser
from bench.everything import parts_of
from bench.result import environment
from standin import dispatch, graphs, launches, marks, plugin, syncs
from step_kernels.model.cli.device import checked_device
from step_kernels.triton.common.launch import OPTIONS
from step_kernels_cli import UsageError

DEVICE = torch.device("cuda")


@contextlib.contextmanager
def a_problem(words: str) -> Iterator[None]:
    with pytest.raises(AssertionError, match=words):
        yield
    assert launches.problems
    launches.problems.clear()  # or it fails the test


@triton.jit
def any_kernel(x_ptr, size, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), size)


def ones(*shape: int, **named: Any) -> Tensor:
    return torch.ones(*shape, device=DEVICE, **named)


def launch(x: Any, grid: tuple[int, ...] = (1,)) -> None:
    any_kernel[grid](x, 3, BLOCK=16, **OPTIONS)


def described(**changes: Any) -> None:
    """Launches with a descriptor of float16 [4, 3, 16], which Triton has found right, changed afterwards."""
    given = TensorDescriptor(ones(4, 3, 16, dtype=torch.float16), [4, 3, 16], [48, 16, 1], [2, 1, 16])
    given.__dict__.update(changes)
    launch(given)


def recorded(run: Callable[[], Any], **named: Any) -> graphs.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.stream(torch.cuda.current_stream())  # which a recording that breaks off does not put back
    with stream, torch.cuda.graph(graph, **named), contextlib.suppress(RuntimeError):
        run()
    return graph


def without_sync(run: Callable[[], Any]) -> None:
    with no_sync():
        run()


def in_a_thread(run: Callable[[], Any]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


WAITS = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.tensor([1.0], device=DEVICE),
    "copy_": lambda x: x.copy_(torch.zeros(4)),
    "a mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "indices on the host": lambda x: x[torch.tensor([0, 1])],
    "repeat_interleave": lambda x: torch.repeat_interleave(x.int()),
}
MIXED = {
    "an addition": lambda: ones(2) + torch.ones(2),
    "a matmul": lambda: torch.ones(2, 2) @ ones(2, 2),
    "an in-place one": lambda: torch.ones(2).mul_(ones(2)),
    "an output": lambda: torch.add(ones(2), ones(2), out=torch.ones(2)),
    "indices of the other": lambda: torch.ones(2)[ones(1).long()],
    "index_select": lambda: ones(2).index_select(0, torch.tensor([0])),
}
BAD_DESCRIPTORS: dict[str, dict[str, Any]] = {
    "an odd address": {"base": lambda: ones(300, dtype=torch.float16)[1:]},
    "an odd stride": {"strides": [60, 20, 1]},
    "a stride of 2^40 bytes": {"strides": [2**39, 16, 1]},
    "strides that do not nest": {"strides": [40, 16, 1]},
    "a last stride": {"strides": [48, 16, 2]},
    "a large box": {"block_shape": [512, 1, 16]},
    "an empty box": {"block_shape": [2, 0, 16]},
    "a narrow box": {"block_shape": [2, 1, 4]},
    "an empty dimension": {"shape": [0, 3, 16]},
    "a long dimension": {"shape": [2**32 + 1, 3, 16]},
    "six dimensions": {"shape": [1] * 5 + [16], "strides": [16] * 5 + [1], "block_shape": [1] * 5 + [16]},
}
NOTHING: Callable[..., Any] = lambda *args, **named: []  # noqa: E731


@pytest.mark.parametrize("mixture", MIXED)
def test_devices_do_not_mix(mixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[mixture]()
    monkeypatch.setattr(dispatch, "refuse_mixtures", NOTHING)
    MIXED[mixture]()


@pytest.mark.parametrize("wait", WAITS)
def test_waits_are_seen_outside_and_inside_of_a_recording(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = ones(4)
    with no_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        WAITS[wait](x)
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchronizing"):
        WAITS[wait](x)
    torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorded(lambda: WAITS[wait](x))
    monkeypatch.setattr(dispatch, "waits", NOTHING)
    monkeypatch.setattr("standin.tensors.waits", NOTHING)
    without_sync(lambda: WAITS[wait](x))
    recorded(lambda: WAITS[wait](x))


@pytest.mark.parametrize("wait", ["synchronize", "a stream", "an event"])
def test_waits_in_a_recording_break_it(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {
        "synchronize": torch.cuda.synchronize,
        "a stream": lambda: torch.cuda.current_stream().synchronize(),
        "an event": lambda: torch.cuda.Event().synchronize(),
    }[wait]
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorded(run)
    monkeypatch.setattr(graphs, "refuse_wait", NOTHING)
    recorded(run)


def test_other_threads_break_a_recording_by_its_mode() -> None:
    x = ones(4)
    errors: list[Exception] = []

    def wait(run: Callable[[], Any]) -> Callable[[], None]:
        def attempt() -> None:
            try:
                run()
            except RuntimeError as error:
                errors.append(error)

        return lambda: in_a_thread(attempt)

    recorded(wait(x.tolist), capture_error_mode="thread_local")
    assert not errors
    for run, mode in ((x.tolist, "global"), (torch.cuda.synchronize, "thread_local")):
        with pytest.raises(RuntimeError, match="previous error"):
            recorded(wait(run), capture_error_mode=mode)
    assert len(errors) == 2


@pytest.mark.parametrize("bad", BAD_DESCRIPTORS)
def test_descriptors_follow_cuda_h(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    described()
    changes = {name: value() if callable(value) else value for name, value in BAD_DESCRIPTORS[bad].items()}
    with a_problem("a descriptor with"):
        described(**changes)
    monkeypatch.setattr(launches, "wrong_with", NOTHING)
    described(**changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(16),), "a pointer to the CPU"),
        (((torch.ones(16), None),), "a pointer to the CPU"),
        ((1.0, (0,)), "a grid of"),
        ((1.0, (1, 70000)), "a grid of"),
    ],
    ids=["pointer", "pointer in a tuple", "empty grid", "large grid"],
)
def test_launches_are_looked_at(arguments: tuple[Any, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(ones(16))
    with a_problem(words):
        launch(*arguments)
    monkeypatch.setattr(launches, "fail", NOTHING)
    launch(*arguments)


def test_variants_are_those_of_triton() -> None:
    name = f"{__name__}.any_kernel"
    launch(ones(16))
    before = launches.variants[name]
    launch(ones(16))
    assert launches.variants[name] == before
    launch(ones(17)[1:])  # no multiple of 16 bytes
    launch(ones(16, dtype=torch.float16))
    assert launches.variants[name] == before + 2


def test_kernels_are_compiled_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.JITFunction, "_do_compile", launches.compile_for_the_cache)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    any_kernel.device_caches.clear()
    launch(torch.ones(16, device="cuda"))
    assert {path.name for path in tmp_path.rglob("any_kernel.*")} >= {"any_kernel.cubin", "any_kernel.json"}


def test_a_problem_fails_its_test_whoever_caught_it() -> None:
    hook = plugin.StandInPlugin("launch").pytest_runtest_call()
    next(hook)
    with contextlib.suppress(AssertionError):
        launch(torch.ones(16))
    with a_problem("a pointer to the CPU"):
        next(hook)


def test_results_of_launchers_are_compared() -> None:
    expected = launches.described(ones(3, 3))
    for ours in (ones(3), ones(3, 3).int(), (ones(3, 3), ones(3, 3)), ones(3, 3).T):
        with a_problem("its launcher returns"):
            launches.compare("op", launches.described(ours), expected)
    launches.compare("op", launches.described(ones(1, 3)), launches.described(torch.ones(3, 1).T))


def test_the_first_change_of_the_mode_warns_once_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syncs.DebugMode, "warned", False)
    with pytest.raises(UserWarning, match="prototype"):
        torch.cuda.set_sync_debug_mode("error")
    assert torch.cuda.get_sync_debug_mode() == 2
    torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(syncs.DebugMode, "warned", False)
    without_sync(lambda: None)
    assert torch.cuda.get_sync_debug_mode() == 0 and syncs.DebugMode.warned


def test_a_recording_runs_nothing_and_a_replay_reads_what_is_there() -> None:
    x, total = ones(3), ones(3)

    def run() -> tuple[Tensor, Tensor]:
        total.add_(x)
        return x * 2, sk.scatter_into(canvas, tokens, layout)

    layout = sk.SupertokenLayout.uniform(1, (2, 2), device=DEVICE)
    tokens, canvas = torch.randn(4, 5, device=DEVICE), torch.zeros(1, 5, 2, 2, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled, scattered = run()
    assert doubled.isnan().all() and total.tolist() == [1, 1, 1] and not canvas.any()
    for value in (5.0, 7.0):
        x.fill_(value)
        graph.replay()
        assert doubled.tolist() == [2 * value] * 3
        assert torch.equal(scattered.flatten(2)[0].T, tokens)
    assert total.tolist() == [13, 13, 13]
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        torch.cuda.CUDAGraph().replay()
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()


def test_tensors_say_where_they_are() -> None:
    x = torch.ones(3).cuda()
    for made in (x, x + 1, x[1:], x.new_zeros(2), torch.zeros_like(x), x.double(), copy.deepcopy(x), x.new_tensor([1])):
        assert made.is_cuda and made.device == torch.device("cuda", 0), made
    for made in (x.cpu(), x.to("cpu"), torch.zeros(3).copy_(x), torch.ones(3)):
        assert not made.is_cuda and made.device.type == "cpu"
    layer = torch.nn.Linear(3, 3).to(DEVICE)
    assert layer(x).is_cuda and copy.deepcopy(layer).weight.is_cuda
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.is_cuda
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_memory_is_that_of_living_tensors() -> None:
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    x = ones(1000)
    assert torch.cuda.memory_allocated() - before == 4096
    del x
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() == before + 4096
    graph = recorded(lambda: ones(1000) + 1)
    assert torch.cuda.memory_reserved() - reserved == 2 * 4096 and torch.cuda.memory_allocated() == before
    del graph
    assert torch.cuda.memory_reserved() == reserved


def test_references_on_the_device_are_not_hidden() -> None:
    """An op that runs its reference because nothing else can is one of PyTorch's, whose waits count."""
    x = ones(4, 2, 8)
    with sk.use_backend("reference"), no_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        sk.ragged_attention(x, x, x, torch.arange(2, device=DEVICE, dtype=torch.int32) * 4, 4)
    with sk.use_backend("triton"), no_sync():
        assert marks.on_device(sk.ragged_attention(x, x, x, torch.arange(2, device=DEVICE, dtype=torch.int32) * 4, 4))


def test_a_count_asks_nothing_of_cuda_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the stream records is a question that torch.compile(fullgraph=True) cannot trace; modes keep it from tracing anything here."""
    layout = sk.SupertokenLayout.from_sides(torch.ones(2, 3, 4, dtype=torch.int32, device=DEVICE))
    questions: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(questions.append(True)))
    assert layout.num_tokens == 24 and questions
    questions.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layout.num_tokens == 24 and not questions


def test_commands_find_the_device(tmp_path: Path) -> None:
    found = options.options_of(parser().parse_args(["main"]), 1.0)
    assert found.device == DEVICE and found.dtype == torch.bfloat16 and found.compile
    assert environment(DEVICE)["device"] == torch.cuda.get_device_name()
    assert parts_of(DEVICE, tmp_path)[0][2][3] == "model"
    with pytest.raises(UsageError, match="this machine shows PyTorch 1 CUDA devices"):
        checked_device("cuda:1")
