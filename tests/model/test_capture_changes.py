"""A capture whose segmenter changes: what acts at once, what is noticed, what `refresh` follows."""

from __future__ import annotations

import copy
import gc
import itertools
import time
import timeit
import weakref
from collections.abc import Callable

import pytest
import torch
from eager_graph import EagerGraph, case, eager_graphs
from small_models import enlarge, photographs
from torch import Tensor, nn

from step_kernels import SupertokenLayout, resolve_layout
from step_kernels.model import PolicyNet, QuotaPolicy, StepSegmenter, VariancePolicy
from step_kernels.model.graph import capture

pytestmark = pytest.mark.usefixtures(eager_graphs.__name__)


def test_weights_and_thresholds_changed_in_place_act_at_once() -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    before = captured.predict(images)
    with torch.no_grad():
        segmenter.decoder.head.weight.normal_()
        segmenter.encoder.exit_heads()[1].threshold.fill_(0.3)
        segmenter.encoder.policy.threshold.fill_(0.01)
    after = captured.predict(images)
    assert torch.equal(after, segmenter.predict(images)) and not torch.equal(after, before)
    assert EagerGraph.made[0].calls.count("record") == 1


def test_moved_parameters_are_noticed() -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    segmenter.load_state_dict({name: value.clone() for name, value in segmenter.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"encoder\.vit\.cls_token moved; call refresh"):
        captured.predict(images)
    with torch.no_grad():
        segmenter.decoder.head.bias.normal_()
    captured.refresh()
    assert torch.equal(captured.predict(images), segmenter.predict(images))
    assert len(EagerGraph.made) == 2
    segmenter.double()
    with pytest.raises(TypeError, match=r"images: expected torch\.float64"):
        captured.refresh()


def test_a_failed_refresh_leaves_the_capture_as_it_was() -> None:
    segmenter, images = case(policy=PolicyNet(width=2))
    captured = segmenter.capture(images)
    before = captured._recording
    segmenter.double()
    with pytest.raises(TypeError, match=r"images: expected torch\.float64"):
        captured.refresh()
    assert captured._recording is before  # and with it all memory that the old graph reads
    segmenter.float()
    captured.refresh()
    assert torch.equal(captured.predict(images), segmenter.predict(images))


def replace_policy(policy: nn.Module | None) -> Callable[[StepSegmenter], None]:
    def replace(segmenter: StepSegmenter) -> None:
        segmenter.encoder.policy = policy

    return replace


def replace_decoder(segmenter: StepSegmenter) -> None:
    segmenter.decoder = enlarge(copy.deepcopy(segmenter.decoder))


def replace_exit(segmenter: StepSegmenter) -> None:
    segmenter.encoder.exits["1"] = enlarge(copy.deepcopy(segmenter.encoder.exits["1"]))


def drop_an_exit(segmenter: StepSegmenter) -> None:
    del segmenter.encoder.exits["1"]


def drop_a_bias(segmenter: StepSegmenter) -> None:
    segmenter.decoder.head.bias = None


POLICIES = {
    "variance": lambda: VariancePolicy(0.1),
    "net": lambda: PolicyNet(width=2),
    "quota": lambda: QuotaPolicy(PolicyNet(width=2), 5),
    "own": lambda: OwnPolicy(),
    "none": lambda: None,
}


class OwnPolicy(nn.Module):
    """Not one of the package's: every second row of 2 x 2 blocks merged."""

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int) -> SupertokenLayout:
        grid = images.shape[2] // patch_size, images.shape[3] // patch_size
        scores = torch.zeros(images.shape[0], grid[0] // 2, grid[1] // 2)
        scores[:, ::2] = 1
        return resolve_layout([scores], sides=(2,), thresholds=0.5, grid=grid, num_prefix=num_prefix)


# Another of the same kind; and from the one that has a folded copy to each other kind, and back.
@pytest.mark.parametrize(
    ("before", "after"), [pair for pair in itertools.product(POLICIES, repeat=2) if "net" in pair or len({*pair}) == 1]
)
def test_a_replaced_policy(before: str, after: str) -> None:
    torch.manual_seed(0)
    segmenter, images = case(policy=POLICIES[before](), depth=1, blocks=(1,), batch_size=2)
    segmenter.encoder.policy = POLICIES[before]()  # small_segmenter takes None for its own
    check_replacement(segmenter, images, replace_policy(POLICIES[after]()))


@pytest.mark.parametrize("replace", [replace_decoder, replace_exit, drop_an_exit, drop_a_bias])
def test_replaced_parts(replace: Callable[[StepSegmenter], None]) -> None:
    check_replacement(*case(), replace)


def check_replacement(segmenter: StepSegmenter, images: Tensor, replace: Callable[[StepSegmenter], None]) -> None:
    captured = segmenter.capture(images)
    assert torch.equal(captured.predict(images), segmenter.predict(images))
    old = segmenter.encoder.policy
    replace(segmenter)
    if old is not None or segmenter.encoder.policy is not None:
        with pytest.raises(RuntimeError, match=r"(was replaced|came or went|moved); call refresh\(\)"):
            captured.predict(images)
    captured.refresh()
    assert torch.equal(captured.predict(images), segmenter.predict(images))


def test_a_policy_assigned_later_runs_in_eval_mode() -> None:
    segmenter, images = case(policy=PolicyNet(width=2))
    net = PolicyNet(width=2).train()
    segmenter.encoder.policy = net
    captured = segmenter.capture(images)
    assert torch.equal(captured.predict(images), segmenter.predict(images))
    assert not net.training
    assert torch.equal(captured.predict(images), segmenter.predict(images))


def test_a_refresh_frees_the_graph_before() -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    before = weakref.ref(EagerGraph.made.pop())
    replace_decoder(segmenter)
    captured.refresh()
    gc.collect()
    assert before() is None


def test_recorded_again_for_the_counts_of_the_first_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    counts = captured.trace().token_counts()
    assert counts == segmenter.trace(images).token_counts()  # before any predict
    captured.predict(images[:1])
    replace_decoder(segmenter)
    captured.refresh()
    assert EagerGraph.made[1].run.keywords["expected_tokens"] == counts


def test_a_folded_policy_follows_after_refresh() -> None:
    net = PolicyNet(width=2)
    segmenter, images = case(policy=net)
    spread_scores(net)
    captured = segmenter.capture(images)
    assert segmenter.encoder.policy is net  # the segmenter keeps its own
    assert torch.equal(captured.predict(images), segmenter.predict(images))
    net.thresholds.fill_(0.4)  # shared with the folded copy: no refresh
    assert torch.equal(captured.predict(images), segmenter.predict(images))
    spread_scores(net, seed=1)
    with pytest.raises(RuntimeError, match="its policy's weights changed; call refresh"):
        captured.predict(images)
    before = captured.trace().token_counts()
    captured.refresh()
    assert torch.equal(captured.predict(images), segmenter.predict(images))
    assert captured.trace().token_counts() != before
    assert EagerGraph.made[0].calls.count("record") == 1 and len(EagerGraph.made) == 1


def spread_scores(net: PolicyNet, seed: int = 0) -> None:
    """Weights under which some blocks of the test's images are taken and some are not."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
        logits = net.eval().logits(photographs(3, 64, 72), patch_size=8)
        for side, logit in zip(net.sides, logits, strict=False):  # the coarsest do not fit
            net.heads[str(side)].bias -= logit.median()


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("path", ["", "decoder.head"])
def test_hooks_that_come_and_go(path: str, kind: str) -> None:
    segmenter, images = case()
    captured = segmenter.capture(images)
    message = f"a hook of {path or 'the segmenter'} came or went; call refresh"
    handle = getattr(segmenter.get_submodule(path), kind)(lambda *_: None)
    with pytest.raises(RuntimeError, match=message):
        captured.predict(images)
    captured.refresh()
    captured.predict(images)
    handle.remove()
    with pytest.raises(RuntimeError, match=message):
        captured.predict(images)


def add_a_tensor(module: nn.Module) -> None:
    module.register_buffer("another", None)


def swap_a_tensor(module: nn.Module) -> None:
    del module.weight
    module.register_parameter("another", None)


def move_through_data(module: nn.Module) -> None:
    module.bias.data = module.bias.data.clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_a_tensor, "a tensor of decoder.head came or went"),
        (swap_a_tensor, "decoder.head.weight moved"),
        (move_through_data, "decoder.head.bias moved"),
        (lambda head: head.register_module("another", None), "a submodule of decoder.head was replaced"),
    ],
)
def test_changes_in_words(change: Callable[[nn.Module], None], message: str) -> None:
    segmenter, _ = case()
    seen = capture.Fingerprint(segmenter, None)
    assert seen.changed() is None
    change(segmenter.decoder.head)
    assert seen.changed() == message


def test_looking_for_changes_takes_less_than_a_walk_over_the_modules() -> None:
    segmenter, _ = case(policy=PolicyNet())
    seen = capture.Fingerprint(segmenter, segmenter.encoder.policy)

    def seconds(look: Callable[[], object]) -> float:
        return min(timeit.repeat(look, number=10, repeat=20, timer=time.process_time))

    assert seconds(seen.changed) < seconds(lambda: [*segmenter.named_modules(), *segmenter.named_parameters()])
