"""The peers of `bench peers`: each passes the gate, does the work that it claims, and with one thing wrong fails."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_model_cases import CPU, eager_graphs, nano_preset
from bench_peer_cases import peer, peer_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.kernels.operation import Unavailable
from bench.model import gate
from bench.model.case import EXITS, Case
from bench.model.layouts import ALL_HALTED, EMPTY_IMAGE, NONE_HALTED, QUOTA, SPREAD
from bench.peers import contenders, exits, sharing
from bench.peers.attention import transformer_block
from bench.peers.contenders import PeerModel, Recipe
from bench.peers.decisions import corners, covering
from bench.peers.registry import (
    CTS,
    CTS_DTOP,
    CTS_DTOP_SDPA,
    CTS_SDPA,
    DENSE_EAGER,
    DENSE_EAGER_SDPA,
    DTOP,
    DTOP_SDPA,
    NAMES,
    OURS_EXITS_EXACT,
    OURS_EXITS_STATIC,
    PEERS,
    STEP,
    STEP_SDPA,
    TOME,
)
from bench.peers.settings import KINDS
from bench.peers.tome import unmerged
from step_kernels import resolve_layout
from step_kernels.model import LinearExit, PolicyNet, QuotaPolicy

WITH_CTS = [CTS, CTS_SDPA, CTS_DTOP, CTS_DTOP_SDPA]
ANY_LAYOUT = [DENSE_EAGER, DENSE_EAGER_SDPA, DTOP, DTOP_SDPA, STEP, STEP_SDPA]
STORED = [DENSE_EAGER, CTS, DTOP, CTS_DTOP, STEP]


@pytest.fixture(scope="module", autouse=True)
def nano() -> Iterator[None]:
    with nano_preset():
        yield


@pytest.fixture(scope="module")
def quota() -> Case:
    return peer_case(batch=3)


@pytest.fixture(scope="module")
def truths(quota: Case) -> gate.Truths:
    return gate.Truths(quota)


def verdict(case: Case, name: str, truths: gate.Truths | None = None) -> gate.Verdict:
    return gate.check(case, peer(name), peer(name).build(case), truths or gate.Truths(case))


def test_everybody_is_named_once() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {*WITH_CTS, *ANY_LAYOUT, OURS_EXITS_EXACT, OURS_EXITS_STATIC} < set(NAMES)
    assert all(one.everywhere for one in PEERS)


@pytest.mark.parametrize("name", [one.name for one in PEERS if one.missing(CPU) is None and one.name != TOME])
def test_all_pass_on_quota_layouts(quota: Case, truths: gate.Truths, name: str) -> None:
    found = verdict(quota, name, truths)
    assert found.passed, found
    assert 0 < found.max_error < 1e-5


@pytest.mark.parametrize("kind", [SPREAD, NONE_HALTED, ALL_HALTED, EMPTY_IMAGE])
def test_all_but_cts_pass_on_ragged_layouts(kind: str) -> None:
    case = peer_case(kind, batch=3)
    truths = gate.Truths(case)
    for name in [*ANY_LAYOUT, OURS_EXITS_EXACT]:
        found = verdict(case, name, truths)
        assert found.passed, (name, found)
    for name in WITH_CTS:
        with pytest.raises(Unavailable, match="needs the same number of tokens in every image"):
            peer(name).build(case)


def test_cts_knows_no_larger_blocks() -> None:
    """One image has as many tokens as itself; the blocks are the reason."""
    case = peer_case(SPREAD, batch=1)
    assert any((trace.layout.sides() > 2).any() for trace in case.traces)
    with pytest.raises(Unavailable, match="2x2 blocks alone"):
        peer(CTS).build(case)


@pytest.mark.parametrize("module", [None, types.ModuleType("tome")], ids=["nothing", "another package"])
def test_tome_without_its_package(module: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's tome is a markup language."""
    monkeypatch.setitem(sys.modules, "tome", module)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "tome.patch", raising=False)
    with pytest.raises(
        Unavailable, match=r"needs timm and ToMe's own package \(ModuleNotFoundError: .*\): pip install"
    ):
        peer(TOME).build(peer_case())


def test_tome_beside_a_package_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a torchvision of another build, which raises no ImportError."""

    def refuse(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(
        Unavailable, match=r"needs timm and ToMe's own package \(RuntimeError: operator torchvision::nms"
    ):
        unmerged(peer_case())


@pytest.mark.parametrize("kind", KINDS)
def test_grids_that_blocks_do_not_divide(kind: str) -> None:
    case = peer_case(kind, size=112)
    truths = gate.Truths(case)
    for name in [DTOP, STEP, *([CTS_DTOP] if kind == QUOTA else [])]:
        found = verdict(case, name, truths)
        assert found.passed, (name, found)


def test_bfloat16_passes_too() -> None:
    case = peer_case(dtype="bfloat16")
    truths = gate.Truths(case)
    for name in [*WITH_CTS, *ANY_LAYOUT]:
        found = verdict(case, name, truths)
        assert found.passed, (name, found)
        assert found.allowed_error > 1e-3


def test_our_exits_without_merging_as_a_graph(quota: Case, truths: gate.Truths) -> None:
    assert peer(OURS_EXITS_STATIC).missing(CPU) == "needs a CUDA device"
    with eager_graphs():
        assert verdict(quota, OURS_EXITS_STATIC, truths).passed


# Three blocks, an exit after the second: then the three images go on one by one, with what is left of each.
@pytest.mark.parametrize(
    ("name", "until_exit", "alone"),
    [
        (DENSE_EAGER_SDPA, [(3, 17)] * 3, False),
        (CTS_SDPA, [(3, 11)] * 3, False),
        (DTOP_SDPA, [(3, 17)] * 2, True),
        (CTS_DTOP_SDPA, [(3, 11)] * 2, True),
        (STEP_SDPA, [(1, 11)] * 6, True),
    ],
)
def test_attention_sees_the_tokens_that_are_left(
    quota: Case, name: str, until_exit: list[tuple[int, int]], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[0], q.shape[2]))
        return real(q, k, v)

    built = peer(name).build(quota)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    built.scores(0)
    left = quota.decisions(peer(name).family)[0].final_layout.lengths().tolist()
    assert len(set(left)) > 1 or not alone
    assert seen == until_exit + [(1, length) for length in left] * alone


@pytest.mark.parametrize("name", STORED)
def test_as_is_attention_is_not_fused(quota: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("SDPA in a peer that stores its scores")

    built = peer(name).build(quota)
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    built.scores(0)


@pytest.mark.parametrize(("name", "times"), [(CTS, 3), (CTS_DTOP, 3), (STEP, 3), (DTOP, 0), (DENSE_EAGER, 0)])
def test_the_policy_is_asked_every_time(quota: Case, name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = type(quota.weights.policy).scores

    def scores(policy: Any, images: Tensor, **options: Any) -> list[Tensor]:
        asked.append(1)
        return real(policy, images, **options)

    built = peer(name).build(quota)
    monkeypatch.setattr(type(quota.weights.policy), "scores", scores)
    for number in range(3):
        built.labels(number)
    assert len(asked) == times


def test_the_policy_s_answer_has_the_form_of_the_recorded_one(quota: Case) -> None:
    """What is dropped is a decision: the package's own on the same scores."""
    policy, images = quota.weights.policy, quota.inputs[0]
    shared = sharing.ask_for_quota(policy, images, 16, 2)
    expected = QuotaPolicy(policy, 2)(images, patch_size=16).sides()
    assert torch.equal(covering(shared, 2), expected == 2)
    assert shared.flatten(1).sum(1).tolist() == [2, 2, 2]
    torch.manual_seed(0)
    maps = [torch.rand(2, 6, 4), torch.rand(2, 3, 2), torch.rand(2, 1, 1)]

    class Scorer:
        sides = (2, 4, 8, 16)

        def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
            return maps

    painted = sharing.ask_for_sides(Scorer(), torch.zeros(2, 3, 12 * 16, 9 * 16), 16)  # type: ignore[arg-type]
    layout = resolve_layout(maps, sides=(2, 4, 8), thresholds=0.5, grid=(12, 9))
    assert torch.equal(painted, layout.sides())
    assert set(painted.unique().tolist()) > {1, 2, 4}


def test_cts_asks_for_2x2_blocks_alone(quota: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = PolicyNet.scores

    def scores(policy: PolicyNet, images: Tensor, *, patch_size: int) -> list[Tensor]:
        asked.append(policy.sides)
        return real(policy, images, patch_size=patch_size)

    monkeypatch.setattr(PolicyNet, "scores", scores)
    for name in [CTS, STEP, DTOP]:
        peer(name).build(quota).labels(0)
    assert asked == [(2,), (2, 4)]  # a block of 8x8 does not fit, and DToP asks nobody
    assert quota.weights.policy.sides == (2, 4, 8, 16)


class CountPicks(TorchDispatchMode):
    """Counts how often something is picked or written by a mask: on a GPU, the host waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.picks = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.picks += function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
def test_how_often_the_host_waits(batch: int) -> None:
    """Sharing: pixels and positions of each side there, predictions back. The exit: once for each image, and once more at the end."""
    case = peer_case(batch=batch)
    expected = {CTS: 3 * 2, DTOP: 2 * batch, CTS_DTOP: 3 * 2 + 2 * batch, STEP: 3 * 3 + 2 * batch}
    for name, picks in expected.items():
        model = peer(name).build(case)
        with CountPicks() as counted:
            model.labels(0)
        assert counted.picks == picks, name


def test_two_exits() -> None:
    """Who has left at the first one is out of the second, and its prediction stays."""
    torch.manual_seed(0)
    tokens, heads = torch.randn(2, 6, 8), [LinearExit(8, 3), LinearExit(8, 3)]
    first = torch.tensor([[False, True, False, True, False, False], [False] * 6])
    second = torch.tensor([[False, False, True, False, False, False], [False, True, True, False, False, True]])
    final = torch.randn(2, 6, 3)
    stages = [head.head(head.norm(tokens)).log_softmax(2) for head in heads]
    expected = torch.where(first[..., None], stages[0], torch.where(second[..., None], stages[1], final.log_softmax(2)))
    with torch.no_grad():
        group = exits.start(tokens, {1: first, 2: second}, 3)
        alone = exits.leave(group, heads[0], 1)
        assert [(one.tokens.shape[1], one.complete) for one in alone] == [(4, False), (6, True)]
        alone = [last for one in alone for last in exits.leave(one, heads[1], 2)]
        assert [one.tokens.shape[1] for one in alone] == [3, 3]
        for one, scores in zip(alone, final, strict=True):
            exits.finish(one, scores[one.left[0]][None])
    assert torch.allclose(group.predictions, expected)


Patch = Callable[[pytest.MonkeyPatch], None]


def without_class_token(patch: pytest.MonkeyPatch) -> None:
    """The patches do not see it."""

    def block(module: Any, tokens: Tensor, attend: Any) -> Tensor:
        return torch.cat([tokens[:, :1], transformer_block(module, tokens[:, 1:], attend)], 1)

    patch.setattr(contenders, "transformer_block", block)


def in_wrong_order(patch: pytest.MonkeyPatch) -> None:
    """Predictions of the last two tokens change places."""
    real = sharing.back_to_cells

    def back(predictions: list[Tensor], *arguments: Any) -> Tensor:
        return real([torch.cat([x[:, :-2], x[:, -2:].flip(1)], 1) for x in predictions], *arguments)

    patch.setattr(contenders, "back_to_cells", back)


def images_in_wrong_order(patch: pytest.MonkeyPatch) -> None:
    real = sharing.back_to_cells
    patch.setattr(contenders, "back_to_cells", lambda predictions, *others: real(predictions, *others).roll(1, 3))


def corner_positions(patch: pytest.MonkeyPatch) -> None:
    """A block's position is that of its top left patch."""

    def positions(vit: Any, grid: tuple[int, int], side: int) -> Tensor:
        return corners(vit.grid_positions(grid).unflatten(0, grid)[None], side)[0]

    patch.setattr(contenders, "positions", positions)


def corner_pixels(patch: pytest.MonkeyPatch) -> None:
    """A superpatch is every other pixel."""
    real = sharing.shrink
    patch.setattr(
        sharing,
        "shrink",
        lambda picture, side: picture[:, :, ::side, ::side] if picture.shape[1] == 3 else real(picture, side),
    )


def nobody_leaves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exits, "CERTAIN", 0.0)


def the_class_token_leaves(patch: pytest.MonkeyPatch) -> None:
    real = exits.start

    def start(tokens: Tensor, halted: dict[int, Tensor], classes: int) -> exits.Group:
        with_it = {block: torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) for block, mask in halted.items()}
        return real(tokens, with_it, classes)

    patch.setattr(contenders, "start", start)


def two_scales(patch: pytest.MonkeyPatch) -> None:
    """Those that stay to the end are written as logits."""

    def finish(group: exits.Group, scores: Tensor) -> None:
        group.predictions[group.left] = scores.flatten(0, 1)

    patch.setattr(contenders, "finish", finish)


def unscaled_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: (q @ k.mT).softmax(3) @ v)


def stale_decisions(patch: pytest.MonkeyPatch) -> None:
    real = PeerModel.__init__

    def init(model: PeerModel, case: Any, recipe: Recipe) -> None:
        real(model, case, recipe)
        model._decisions = [model._decisions[0]] * len(model._decisions)

    patch.setattr(PeerModel, "__init__", init)


MERGING = [in_wrong_order, images_in_wrong_order, corner_positions, corner_pixels]
LEAVING = [nobody_leaves, the_class_token_leaves, two_scales]
ALWAYS = [without_class_token, unscaled_attention]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((CTS_SDPA, fault) for fault in [*ALWAYS, *MERGING, stale_decisions]),
        *((DTOP_SDPA, fault) for fault in [*ALWAYS, *LEAVING, stale_decisions]),
        *((CTS_DTOP_SDPA, fault) for fault in [*ALWAYS, *MERGING, *LEAVING, stale_decisions]),
        *((STEP_SDPA, fault) for fault in [*ALWAYS, *MERGING, *LEAVING]),
    ],
)
def test_one_thing_wrong_fails(
    quota: Case, truths: gate.Truths, name: str, fault: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = peer(name).family
    truths.of(family)  # before the fault: the oracle shares PyTorch with the peers
    fault(monkeypatch)
    assert not verdict(quota, name, truths).passed


def test_flops_of_exits_alone(quota: Case) -> None:
    """More than with merging and less than dense, the policy left out."""
    assert quota.gigaflops(EXITS) < quota.gigaflops("dense")
    assert quota.model(EXITS).encoder.policy is None
