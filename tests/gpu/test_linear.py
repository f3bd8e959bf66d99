"""ragged_linear in static mode on a GPU: at most twice the error of PyTorch's own kernels there, against fp64 on the CPU."""

from dataclasses import replace

import pytest
import torch
from cases.linear import ACTIVATIONS, forward, gradients, inputs
from floors import double, hold, reference
from gpu.syncs import capture, needs_memory, same_where_not_current, ten_runs_are_identical
from layouts import row_of_tokens
from tensors import LOW_PRECISION, error_rule, matmuls_in, poison, wide_rows

import step_kernels as sk
from step_kernels.triton.common import remembered
from step_kernels.triton.common.launch import architecture, architecture_class
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.linear.configs import TILES

pytestmark = pytest.mark.gpu

CAPACITY = 3000
# Around the rows of the tallest tile, and none, one, all
LIVE = [0, 1, 127, 128, 129, 1640, CAPACITY]
# Inputs and outputs: a ViT's, classes without alignment, inputs without it, sizes below every tile
SHAPES = [(384, 1152), (1024, 150), (97, 1024), (1, 1), (1536, 64)]


def two_images(live: int) -> sk.SupertokenLayout:
    return row_of_tokens(live // 2, live - live // 2, capacity=CAPACITY)


def on_gpu(tensors):
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def check(live, shape, dtype, activation, run=forward, expected=None):
    """The error rule, with PyTorch's own matmul there as the yardstick."""
    layout = replace(two_images(live), expected_tokens=expected)
    tensors = inputs(CAPACITY, live, shape, dtype)
    return hold(run, tensors, layout, activation, device="cuda", plain_device="cuda")[0]


def launches_anew(monkeypatch) -> list[object]:
    """No launch is remembered, with what was chosen for it; a list for what the launcher asks."""
    monkeypatch.setattr(remembered, "_known", {})
    return []


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_live_counts(live, dtype):
    check(live, (384, 1152), dtype, "gelu")


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_shapes(number, dtype):
    """In turns with the activations, which take each a kernel to compile."""
    check(1640, SHAPES[number], dtype, ACTIVATIONS[(number + LOW_PRECISION.index(dtype)) % 3])


@pytest.mark.parametrize("expected", [0, 1, 640, 10**9])
def test_expected_counts_change_no_result(expected):
    check(640, (1024, 1024), torch.bfloat16, "gelu", expected=expected)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_choice_of_tiles(number, dtype, monkeypatch):
    choices = TILES[architecture_class(architecture(torch.device("cuda", 0))), "half"]
    if number >= len(choices):
        pytest.skip("this architecture has fewer choices")
    asked = launches_anew(monkeypatch)
    monkeypatch.setattr(linear, "choose_tiles", lambda *arguments: asked.append(arguments) or choices[number])
    check(1640, (1024, 1024), dtype, "gelu")
    assert asked


def test_without_descriptors(monkeypatch):
    """The route of architectures below sm_90, on any."""
    torch.manual_seed(1)
    expected = check(1640, (1024, 1024), torch.bfloat16, "gelu")
    asked = launches_anew(monkeypatch)
    monkeypatch.setattr(linear, "describable", asked.append)  # which says None
    torch.manual_seed(1)
    torch.testing.assert_close(check(1640, (1024, 1024), torch.bfloat16, "gelu"), expected)
    assert asked


def test_rows_of_wider_matrices():
    def run(tensors, layout, activation):
        return forward({n: wide_rows(x) if x.dim() == 2 else x for n, x in tensors.items()}, layout, activation)

    check(1640, (384, 1152), torch.float16, None, run)


def test_tf32():
    tensors = inputs(CAPACITY, 1640, (1024, 1024), torch.float32)
    with matmuls_in("tf32"):
        ours = sk.ragged_linear(**on_gpu(tensors), layout=two_images(1640).to("cuda"))
        plain = torch.nn.functional.linear(*(tensors[name][:1640].cuda() for name in ("x", "weight")))
    exact = reference(sk.ragged_linear, **double(tensors), layout=two_images(1640))
    plain = (plain + tensors["bias"].cuda()) * tensors["gamma"].cuda() + tensors["residual"][:1640].cuda()
    error_rule(ours[:1640].cpu(), plain.cpu(), exact[:1640])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gradients(activation, dtype):
    cotangent = poison(torch.randn(CAPACITY, 1152).to(dtype), 1640)
    tensors = inputs(CAPACITY, 1640, (384, 1152), dtype)
    hold(gradients, tensors, cotangent, two_images(1640), activation, device="cuda", plain_device="cuda")


def test_runs_repeat():
    given, layout = on_gpu(inputs(CAPACITY, 1640, (1024, 4096), torch.bfloat16)), two_images(1640).to("cuda")
    ten_runs_are_identical(lambda: forward(given, layout, "gelu"))


def test_batch_mates_do_not_matter():
    """At one capacity, and so at one choice of tiles, an image's rows are the same wherever they stand."""
    given = on_gpu(inputs(CAPACITY, 1640, (1024, 1024), torch.bfloat16))
    together = sk.ragged_linear(**given, layout=two_images(1640).to("cuda"), activation="gelu")
    for name in ("x", "residual"):
        given[name] = given[name].roll(-820, 0)
    alone = sk.ragged_linear(**given, layout=two_images(820).to("cuda"), activation="gelu")
    assert torch.equal(alone[:820], together[820:1640])


def test_a_captured_layer_replays_on_other_counts():
    given, layout = on_gpu(inputs(CAPACITY, CAPACITY, (1024, 1024), torch.bfloat16)), two_images(10).to("cuda")
    replay = capture(lambda: forward(given, layout, "gelu"))
    for live in (0, 1, 1640, CAPACITY):
        layout.cu_seqlens.copy_(torch.tensor([0, live // 2, live]))
        given["x"].normal_()
        (out,) = replay()
        assert torch.equal(out, *forward(given, layout, "gelu")) and not out[live:].any()


def test_more_than_2_to_the_31_elements():
    capacity, width = 2**21 + 130, 1024
    needs_memory(14)
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
    tensors, layout = inputs(CAPACITY, 1640, (384, 1152), torch.float16), two_images(1640)
    same_where_not_current(
        lambda device: forward({name: x.to(device) for name, x in tensors.items()}, layout.to(device))
    )
