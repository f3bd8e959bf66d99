"""ragged_linear in static mode on a GPU: at most twice the error of PyTorch's own kernels there, against fp64 on the CPU."""

import dataclasses

import pytest
import torch
from gpu.syncs import no_sync
from tensors import error_rule, poison, wide_rows

import step_kernels as sk
from step_kernels.triton.common.launch import architecture, architecture_class
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.linear.configs import TILES

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = [None, "gelu", "gelu_tanh"]
CAPACITY = 3000
# Around the rows of the tallest tile, and none, one, all
LIVE = [0, 1, 127, 128, 129, 1640, CAPACITY]
# Inputs and outputs: a ViT's, classes without alignment, inputs without it, sizes below every tile
SHAPES = [(384, 1152), (1024, 150), (97, 1024), (1, 1), (1536, 64)]


def a_layout(live: int, capacity: int = CAPACITY) -> sk.SupertokenLayout:
    """Untrimmed, on the CPU: two images of side-1 tokens, in a grid of one row."""
    cells = torch.zeros(capacity, 4, dtype=torch.int32)
    half = live // 2
    cells[:half, 2], cells[:half, 3] = torch.arange(half), 1
    cells[half:live, 0], cells[half:live, 2], cells[half:live, 3] = 1, torch.arange(live - half), 1
    return sk.SupertokenLayout(torch.tensor([0, half, live], dtype=torch.int32), cells, (1, capacity), 0, False)


def inputs(live: int, shape: tuple[int, int], dtype: torch.dtype, capacity: int = CAPACITY) -> dict[str, torch.Tensor]:
    """Every argument, with NaN past the live count; outputs of about one."""
    width, outputs = shape
    sizes = {"x": (capacity, width), "weight": (outputs, width), "bias": outputs, "gamma": outputs}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors["weight"] /= width**0.5
    tensors["residual"] = torch.randn(capacity, outputs)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return {name: poison(tensor, live) if name in ("x", "residual") else tensor for name, tensor in tensors.items()}


def on_gpu(tensors):
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def hold(tensors, live, activation, change=lambda tensor: tensor, expected=None):
    """The error rule without a sync, and zeros past the live count."""
    layout = dataclasses.replace(a_layout(live), expected_tokens=expected)
    double = {name: tensor.double() for name, tensor in tensors.items()}
    given = {name: change(tensor) if tensor.dim() == 2 else tensor for name, tensor in on_gpu(tensors).items()}
    with sk.use_backend("reference"):
        exact = sk.ragged_linear(**double, layout=layout, activation=activation)
        plain = sk.ragged_linear(**given, layout=layout.to("cuda"), activation=activation)
    layout = layout.to("cuda")
    sk.ragged_linear(**given, layout=layout, activation=activation)  # compiles
    with no_sync():
        ours = sk.ragged_linear(**given, layout=layout, activation=activation)
    error_rule(ours.cpu(), plain.cpu(), exact)
    return ours


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_live_counts(live, dtype):
    hold(inputs(live, (384, 1152), dtype), live, "gelu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(shape, activation, dtype):
    hold(inputs(1640, shape, dtype), 1640, activation)


@pytest.mark.parametrize("expected", [0, 1, 640, 10**9])
def test_expected_counts_change_no_result(expected):
    hold(inputs(640, (1024, 1024), torch.bfloat16), 640, "gelu", expected=expected)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_choice_of_tiles(number, dtype, monkeypatch):
    choices = TILES[architecture_class(architecture()), "half"]
    if number >= len(choices):
        pytest.skip("this architecture has fewer choices")
    monkeypatch.setattr(linear, "choose_tiles", lambda *_: choices[number])
    hold(inputs(1640, (1024, 1024), dtype), 1640, "gelu")


def test_without_descriptors(monkeypatch):
    """The route of architectures below sm_90, on any."""
    tensors = inputs(1640, (1024, 1024), torch.bfloat16)
    expected = hold(tensors, 1640, "gelu")
    monkeypatch.setattr(linear, "describable", lambda x: False)
    torch.testing.assert_close(hold(tensors, 1640, "gelu"), expected)


def test_rows_of_wider_matrices():
    hold(inputs(1640, (384, 1152), torch.float16), 1640, None, change=wide_rows)


def test_tf32():
    torch.set_float32_matmul_precision("high")
    try:
        tensors = inputs(1640, (1024, 1024), torch.float32)
        ours = sk.ragged_linear(**on_gpu(tensors), layout=a_layout(1640).to("cuda"))
        plain = torch.nn.functional.linear(*(tensors[name][:1640].cuda() for name in ("x", "weight")))
    finally:
        torch.set_float32_matmul_precision("highest")
    with sk.use_backend("reference"):
        exact = sk.ragged_linear(**{name: tensor.double() for name, tensor in tensors.items()}, layout=a_layout(1640))
    plain = (plain + tensors["bias"].cuda()) * tensors["gamma"].cuda() + tensors["residual"][:1640].cuda()
    error_rule(ours[:1640].cpu(), plain.cpu(), exact[:1640])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(activation, dtype):
    tensors, layout = inputs(1640, (384, 1152), dtype), a_layout(1640)
    cotangent = poison(torch.randn(CAPACITY, 1152).to(dtype), 1640)

    def gradients(tensors, cotangent, layout):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = sk.ragged_linear(**leaves, layout=layout, activation=activation)
        return torch.autograd.grad(out, tuple(leaves.values()), cotangent)

    with sk.use_backend("reference"):
        exact = gradients({name: tensor.double() for name, tensor in tensors.items()}, cotangent.double(), layout)
        plain = gradients(on_gpu(tensors), cotangent.cuda(), layout.to("cuda"))
    arguments = on_gpu(tensors), cotangent.cuda(), layout.to("cuda")
    gradients(*arguments)  # compiles
    with no_sync():
        ours = gradients(*arguments)
    for got, peer, truth in zip(ours, plain, exact, strict=True):
        error_rule(got.cpu(), peer.cpu(), truth)


def test_ten_runs_are_identical():
    given, layout = on_gpu(inputs(1640, (1024, 4096), torch.bfloat16)), a_layout(1640).to("cuda")
    runs = [sk.ragged_linear(**given, layout=layout, activation="gelu") for _ in range(10)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_batch_mates_do_not_matter():
    """At one capacity, and so at one choice of tiles, an image's rows are the same wherever they stand."""
    given = on_gpu(inputs(1640, (1024, 1024), torch.bfloat16))
    together = sk.ragged_linear(**given, layout=a_layout(1640).to("cuda"), activation="gelu")
    for name in ("x", "residual"):
        given[name] = given[name].roll(-820, 0)
    alone = sk.ragged_linear(**given, layout=a_layout(820).to("cuda"), activation="gelu")
    assert torch.equal(alone[:820], together[820:1640])


def test_a_captured_layer_replays_on_other_counts():
    given, layout = on_gpu(inputs(CAPACITY, (1024, 1024), torch.bfloat16)), a_layout(10).to("cuda")
    run = lambda: sk.ragged_linear(**given, layout=layout, activation="gelu")  # noqa: E731
    run()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for live in (0, 1, 1640, CAPACITY):
        layout.cu_seqlens.copy_(torch.tensor([0, live // 2, live]))
        given["x"].normal_()
        graph.replay()
        assert torch.equal(out, run()) and not out[live:].any()


def test_more_than_2_to_the_31_elements():
    capacity, width = 2**21 + 130, 1024
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x = torch.zeros(capacity, width, device="cuda", dtype=torch.float16)
    ends = torch.randn(2, width, device="cuda", dtype=torch.float16)
    live = capacity - 1
    x[0], x[live - 1], x[live] = ends[0], ends[1], float("nan")
    weight = torch.randn(width, width, device="cuda", dtype=torch.float16) / 32
    cu_seqlens = torch.tensor([0, live], dtype=torch.int32, device="cuda")
    op = torch.ops.step_kernels.ragged_linear
    out = op(x, weight, None, cu_seqlens, None, None, None, True, None)
    expected = torch.nn.functional.linear(ends, weight)
    torch.testing.assert_close(out[[0, live - 1]], expected, rtol=1e-2, atol=1e-2)
    assert not out[1 : live - 1 : 1000].any() and not out[live].any()


def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors, layout = inputs(1640, (384, 1152), torch.float16), a_layout(1640)
    runs = []
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            given = {name: tensor.to(device) for name, tensor in tensors.items()}
            runs.append(sk.ragged_linear(**given, layout=layout.to(device)).cpu())
    assert torch.equal(*runs)
