"""ragged_linear in static mode as a kernel, on both routes of its loads, against the reference; exact mode is PyTorch's."""

from dataclasses import replace

import pytest
import torch
from cases.linear import ACTIVATIONS, OPTIONAL, forward, gradients, inputs, overflowing
from floors import double, hold, reference
from interpreter import supervision
from layouts import AWKWARD, SPARE_ROWS, PlainLayout, build, row_of_tokens
from tensors import LOW_PRECISION, ROW_VIEWS, error_rule, matmuls_in, new_memory_is_nan, poison, wide_rows

import step_kernels as sk
from step_kernels.model.blocks import Block, BlockInputs, packed_block
from step_kernels.triton.common import launch, live_rows
from step_kernels.triton.linear import configs as linear_configs
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.linear.configs import Tiles

LAUNCHED = ["linear_kernel"]
TILE = Tiles(16, 32, 16, 4, 1, parts=2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Few rows make several tiles, several steps of inputs, and more tiles than programs."""
    monkeypatch.setattr(linear, "choose_tiles", lambda *_: TILE)
    monkeypatch.setattr(linear_configs, "UNALIGNED", dict.fromkeys(linear_configs.UNALIGNED, TILE))
    monkeypatch.setattr("step_kernels.triton.common.launch.MULTIPROCESSORS", 2)


@pytest.fixture(params=["pointers", "descriptors"])
def route(request, monkeypatch):
    """Descriptors are for matmul units, which fp32 uses at tf32 precision only."""
    monkeypatch.setattr(launch, "INTERPRETED_ARCHITECTURE", 90 if request.param == "descriptors" else 80)
    with matmuls_in("tf32"):
        yield request.param


def rows(count: int, capacity: int) -> sk.SupertokenLayout:
    """One image of ``count`` tokens in static mode."""
    return row_of_tokens(count, capacity=capacity)


def untrimmed(layout: sk.SupertokenLayout) -> sk.SupertokenLayout:
    """The same tokens in static mode, also where they fill the capacity."""
    return replace(layout, trimmed=False)


def full(x: torch.Tensor) -> sk.SupertokenLayout:
    """Static mode, all of x's rows being live."""
    return untrimmed(rows(len(x), len(x)))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("spare", SPARE_ROWS)
def test_live_rows(name, spare, route, kernels):
    layout, live = build(AWKWARD[name], spare), len(AWKWARD[name].tokens())
    tensors = inputs(layout.capacity, live, (24, 16), torch.float16)
    supervision.shuffle_programs(1)
    hold(forward, tensors, untrimmed(layout))
    assert kernels == (LAUNCHED if layout.capacity else [])
    if not layout.capacity:
        kernels.append("an empty batch needs no kernel")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_epilogues(dtype, activation, route):
    tensors = inputs(35, 33, (24, 40), dtype)
    for chosen in ((), *((name,) for name in OPTIONAL), OPTIONAL):
        some = {name: tensor for name, tensor in tensors.items() if name not in OPTIONAL or name in chosen}
        hold(forward, some, rows(33, 35), activation)


@pytest.mark.parametrize("live", [0, 1, 15, 16, 17, 32, 64])
@pytest.mark.parametrize("fill", ["zero", "undefined"])
def test_live_counts_around_tiles(live, fill, route, kernels):
    capacity = 70
    tensors = inputs(capacity, live, (24, 40), torch.bfloat16)
    kernels.clear()
    with new_memory_is_nan():
        ours = sk.ragged_linear(**tensors, layout=rows(live, capacity), activation="gelu", tail=fill)
    assert kernels == LAUNCHED
    plain, exact = (
        reference(sk.ragged_linear, **given, layout=rows(live, capacity), activation="gelu")
        for given in (tensors, double(tensors))
    )
    error_rule(ours[:live], plain[:live], exact[:live])
    tail = ours[live:]
    assert tail.isnan().all() if fill == "undefined" else not tail.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_expected_count_chooses_tiles_and_changes_no_result(dtype, monkeypatch, route):
    """Of 1, of the very count, of ten times that (more than the capacity), by the table that a GPU gets."""
    taken = []

    def choose(*arguments):
        taken.append((arguments[2], linear_configs.choose_tiles(*arguments)))
        return taken[-1][1]

    monkeypatch.setattr(linear, "choose_tiles", choose)
    capacity, live = 448, 210
    tensors = inputs(capacity, live, (64, 256), dtype)
    results = [
        sk.ragged_linear(**tensors, layout=replace(rows(live, capacity), expected_tokens=count), activation="gelu")
        for count in (None, 1, live, 10 * live)
    ]
    assert [count for count, _ in taken] == [capacity, 1, live, capacity]
    assert len({tiles for _, tiles in taken}) == (2 if dtype == torch.float16 or route == "descriptors" else 1)
    exact = reference(sk.ragged_linear, **double(tensors), layout=rows(live, capacity), activation="gelu")
    plain = reference(sk.ragged_linear, **tensors, layout=rows(live, capacity), activation="gelu")
    for result in results:
        error_rule(result, plain, exact)
    assert torch.equal(results[3], results[0])


def test_tiles_without_tokens_are_not_even_started(monkeypatch, kernels):
    """Trip counts come from the live count: a tile's work would show as a load, of which there are none."""
    loads = []
    check = supervision.check
    monkeypatch.setattr(supervision, "check", lambda what, *rest: (loads.append(what), check(what, *rest)))
    tensors = inputs(64, 0, (24, 16), torch.float16)
    sk.ragged_linear(**tensors, layout=rows(0, 64), tail="undefined")
    assert loads == ["load"] * 2  # two programs read the live count


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (17, 33), (97, 150), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(shape, dtype, route):
    tensors = inputs(21, 18, shape, dtype)
    hold(forward, tensors, rows(18, 21), "gelu")


def test_no_outputs(kernels):
    tensors = inputs(21, 18, (8, 0), torch.float32)
    assert sk.ragged_linear(**tensors, layout=rows(18, 21)).shape == (21, 0)
    assert kernels == []
    kernels.append("nothing to compute needs no kernel")


@pytest.mark.parametrize("view", ROW_VIEWS)
def test_strides(view, route):
    tensors = inputs(21, 18, (24, 40), torch.float16)
    (plain,) = hold(forward, tensors, rows(18, 21))
    change = ROW_VIEWS[view]
    changed = {name: change(tensor) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    assert torch.equal(sk.ragged_linear(**changed, layout=rows(18, 21)), plain)


def test_transposed_weights_and_expanded_vectors(route):
    tensors = inputs(21, 18, (24, 40), torch.float16)
    tensors |= {name: tensors[name][:1].expand(40) for name in ("bias", "gamma")}
    (plain,) = hold(forward, tensors, rows(18, 21))
    tensors["weight"] = tensors["weight"].T.contiguous().T
    assert torch.equal(sk.ragged_linear(**tensors, layout=rows(18, 21)), plain)
    tensors["x"] = tensors["x"][:1].expand(21, 24)
    tensors["residual"] = tensors["residual"][:1].expand(21, 40)
    hold(forward, tensors, rows(18, 21))


def test_a_residual_that_no_descriptor_can_stand_for(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED_ARCHITECTURE", 90)
    tensors = inputs(21, 18, (24, 40), torch.float16)
    tensors["residual"] = wide_rows(tensors["residual"])
    hold(forward, tensors, rows(18, 21))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shift", [-6.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gelu_is_as_exact_as_pytorch(dtype, scale, shift):
    """Small, usual and large pre-activations, and those far below zero, where little is left of them."""
    x = (scale * torch.linspace(-1, 1, 300) + shift).to(dtype)[:, None]
    for activation in ("gelu", "gelu_tanh"):
        hold(forward, {"x": x, "weight": torch.ones(1, 1).to(dtype)}, full(x), activation)


def test_gelu_of_special_values(route):
    """x Phi(x) by its formula; PyTorch's on a CPU makes a NaN of infinity."""
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 60000.0, -60000.0, 6e-8]).half()[:, None]
    expected = torch.tensor([0.0, 0.0, torch.inf, torch.nan, torch.nan, 60000.0, 0.0, 3e-8]).half()[:, None]
    for activation in ("gelu", "gelu_tanh"):
        ours = sk.ragged_linear(x, torch.ones(1, 1).half(), layout=full(x), activation=activation)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_row(route):
    tensors = inputs(21, 21, (24, 40), torch.float16)
    clean = sk.ragged_linear(**tensors, layout=full(tensors["x"]))
    tensors["x"][3, 1] = float("nan")
    result = sk.ragged_linear(**tensors, layout=full(tensors["x"]))
    others = [row for row in range(21) if row != 3]
    assert result[3].isnan().all() and torch.equal(result[others], clean[others])


def test_half_precision_sums_do_not_overflow(route):
    x, weight = overflowing()
    assert torch.equal(sk.ragged_linear(x, weight, layout=full(x)), torch.zeros(3, 2, dtype=torch.float16))


def test_batch_mates_do_not_matter(route):
    plain = AWKWARD["ragged_3x5"]
    layout = build(plain, 4)
    tensors = inputs(layout.capacity, layout.num_tokens, (40, 40), torch.float32)
    together = sk.ragged_linear(**tensors, layout=layout, activation="gelu")
    start, stop = layout.cu_seqlens[1:3].tolist()
    alone = build(PlainLayout(plain.images[1:2], plain.grid), 1)
    for name in ("x", "residual"):
        tensors[name] = torch.cat([tensors[name][start:stop], tensors[name][-1:]])
    assert torch.equal(sk.ragged_linear(**tensors, layout=alone, activation="gelu")[:-1], together[start:stop])


def test_addresses_that_need_64_bits(route):
    """Rows 2^30 elements apart, so that only the product of row and stride passes 2^31; memory between them is never touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16)
    far = storage.as_strided((3, 16), (2**30 + 16, 1))
    near = torch.randn(3, 16).half()
    far.copy_(near)
    weight = torch.randn(16, 16).half()
    plain = sk.ragged_linear(near, weight, residual=near, layout=full(near))
    assert torch.equal(sk.ragged_linear(far, weight, residual=far, layout=full(near)), plain)
    assert torch.equal(sk.ragged_linear(near, far, layout=full(near)), sk.ragged_linear(near, near, layout=full(near)))


def test_exact_mode_is_the_reference(kernels):
    tensors = inputs(9, 9, (24, 40), torch.float32)
    for layout in (None, rows(9, 9).trim()):
        ours = sk.ragged_linear(**tensors, layout=layout, activation="gelu")
        assert torch.equal(ours, reference(sk.ragged_linear, **tensors, layout=layout, activation="gelu"))
    assert kernels == []
    kernels.append("the vendor's matmul needs no kernel of ours")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_gradients(dtype, activation, kernels):
    layout = rows(18, 21)
    tensors = inputs(21, 18, (24, 40), dtype)
    cotangent = poison(torch.randn(21, 40).to(dtype), 18)
    hold(gradients, tensors, cotangent, layout, activation)
    assert kernels == LAUNCHED + ["zero_tail_kernel"] * 2


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "gamma", "residual"])
def test_gradient_of_one_argument_alone(needs, kernels):
    layout = rows(18, 21)
    tensors = inputs(21, 18, (24, 40), torch.float32)
    cotangent = poison(torch.randn(21, 40), 18)

    def run():
        leaf = tensors[needs].detach().requires_grad_()
        out = sk.ragged_linear(**(tensors | {needs: leaf}), layout=layout)
        return torch.autograd.grad(out, leaf, torch.ones(()).expand_as(out) if needs == "bias" else cotangent)[0]

    torch.testing.assert_close(run(), reference(run))
    assert kernels == LAUNCHED + ["zero_tail_kernel"] * (2 if needs in ("weight", "gamma") else 1)


def test_wide_matrices_lose_their_tails_too(monkeypatch, kernels):
    monkeypatch.setattr(live_rows, "COPY_COLUMNS", 8)
    monkeypatch.setattr(live_rows, "COPY_ELEMENTS", 16)
    x = poison(torch.randn(21, 20), 18)
    for given in (x, wide_rows(x), x.T.contiguous().T, x[:, :1].expand(21, 20)):
        ours = live_rows.zero_past_live_rows(given, rows(18, 21).cu_seqlens)
        assert torch.equal(ours, torch.cat([given[:18], torch.zeros(3, 20)])) and ours.is_contiguous()


def test_a_transformer_block_in_static_mode(kernels):
    """What the model makes of these kernels: every tail undefined, so NaN goes in and may come out, but never into a live row."""
    layout = build(AWKWARD["prefix_5"], 3)
    live = layout.num_tokens
    block = Block(32, 2).eval().requires_grad_(False)
    tokens = poison(torch.randn(layout.capacity, 32), live)
    ours = packed_block(block, tokens, BlockInputs(layout))
    assert kernels == [
        "attention_schedule_kernel",
        "layer_norm_kernel",
        "linear_kernel",
        "attention_forward_kernel",
        "linear_kernel",
        "layer_norm_kernel",
        "linear_kernel",
        "linear_kernel",
    ]
    exact = layout.trim()
    expected = reference(packed_block, block, tokens[:live], BlockInputs(exact))
    torch.testing.assert_close(ours[:live], expected)
