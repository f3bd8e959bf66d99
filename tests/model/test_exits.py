"""Exit heads: scores against plain formulas, inference and training agree, thresholds survive casts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, DIM, HEADS, enlarge
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import CosineExit, ExitHead, LinearExit


def head_of(kind: str, keep_per_class: int = 0) -> ExitHead:
    torch.manual_seed(1)
    head = enlarge(HEADS[kind](DIM, CLASSES, 0.4, keep_per_class)).double()
    if kind == "cosine":
        torch.nn.init.constant_(head.scale, 4.0)
    return head


def plain_scores(head: ExitHead, tokens: Tensor) -> Tensor:
    normed = F.layer_norm(tokens, (DIM,), head.norm.weight, head.norm.bias, 1e-6)
    if isinstance(head, LinearExit):
        return normed @ head.head.weight.T + head.head.bias
    return head.scale * F.cosine_similarity(normed[:, None], head.classes[None], dim=2)


def layout_and_tokens() -> tuple[SupertokenLayout, Tensor]:
    layout = SupertokenLayout.uniform(2, (4, 6), side=2, num_prefix=1)
    return layout, torch.randn(layout.capacity, DIM, dtype=torch.float64)


@pytest.mark.parametrize("kind", HEADS)
def test_scores_follow_the_formula(kind: str) -> None:
    head, (layout, tokens) = head_of(kind), layout_and_tokens()
    torch.testing.assert_close(head.scores(tokens, layout), plain_scores(head, tokens), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("keep_per_class", [0, 1])
def test_halts_the_confident_and_writes_log_probabilities(kind: str, keep_per_class: int) -> None:
    head, (layout, tokens) = head_of(kind, keep_per_class), layout_and_tokens()
    canvas = torch.full((2, CLASSES, 4, 6), 7.0, dtype=torch.float64)
    with torch.no_grad():
        halting = head.halt(tokens, layout, canvas=canvas)
        expected = plain_scores(head, tokens).log_softmax(1)
    confidence, label = expected.exp().max(1)
    confident = (confidence > 0.4) & (layout.cells[:, 3] > 0)
    assert confident.any() and not confident[layout.cells[:, 3] > 0].all()
    halted = confident.clone()
    if keep_per_class:
        for image in range(2):
            for kind_of_class in range(CLASSES):
                group = (confident & (layout.cells[:, 0] == image) & (label == kind_of_class)).nonzero().flatten()
                if len(group):
                    halted[group[confidence[group].argmax()]] = False
    assert halting.halted.tolist() == halted.tolist()
    for row, (image, top, left, side) in enumerate(layout.cells.tolist()):
        if side:
            want = expected[row] if confident[row] else torch.full((CLASSES,), 7.0, dtype=torch.float64)
            block = canvas[image, :, top : top + 2, left : left + 2]
            torch.testing.assert_close(block, want[:, None, None].expand(-1, 2, 2), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("replayed", [False, True])
def test_training_decides_and_writes_the_same(kind: str, replayed: bool) -> None:
    head, (layout, tokens) = head_of(kind), layout_and_tokens()
    halted = torch.arange(layout.capacity) % 3 == 0 if replayed else None
    halting, written = head.halt_differentiably(tokens, layout, halted=halted)
    with torch.no_grad():
        canvas = torch.zeros(2, CLASSES, 4, 6, dtype=torch.float64)
        inference = head.halt(tokens, layout, canvas=canvas, halted=halted)
    assert torch.equal(halting.halted, inference.halted) and halting.halted.any()
    cells = F.interpolate(halting.halted.view(2, 7)[:, 1:].view(2, 1, 2, 3).double(), scale_factor=2)
    # At replay the canvas of inference also holds confident tokens that were not halted; the decoder overwrites them.
    torch.testing.assert_close(written, canvas * cells, rtol=1e-11, atol=1e-11)
    written.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_subclass_decides_by_its_own_scores_in_inference_too() -> None:
    class Sharper(LinearExit):
        def scores(self, tokens: Tensor, layout: SupertokenLayout) -> Tensor:
            return 3 * super().scores(tokens, layout)

    layout, tokens = layout_and_tokens()
    head = enlarge(Sharper(DIM, CLASSES, 0.9)).double()
    expected, written = head.halt_differentiably(tokens, layout)
    canvas = torch.zeros_like(written)
    with torch.no_grad():
        halting = head.halt(tokens, layout, canvas=canvas)
    assert torch.equal(halting.halted, expected.halted) and 0 < halting.halted.sum() < layout.capacity - 2
    torch.testing.assert_close(canvas, written)


def test_gradients_of_the_training_form_are_those_of_the_formula() -> None:
    for kind in HEADS:
        head, (layout, tokens) = head_of(kind), layout_and_tokens()
        tokens.requires_grad_()
        halting, written = head.halt_differentiably(tokens, layout)
        weights = torch.randn_like(written)
        leaves = [tokens, *head.parameters()]
        ours = torch.autograd.grad((written * weights).sum(), leaves)
        per_token = (
            weights.unflatten(3, (3, 2)).unflatten(2, (2, 2)).sum((3, 5)).permute(0, 2, 3, 1).reshape(2, 6, CLASSES)
        )
        per_token = F.pad(per_token, (0, 0, 1, 0)).flatten(0, 1) * halting.halted[:, None]
        plain = torch.autograd.grad((plain_scores(head, tokens).log_softmax(1) * per_token).sum(), leaves)
        for mine, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", HEADS)
def test_the_threshold_stays_fp32_when_the_model_is_cast(kind: str) -> None:
    head = HEADS[kind](DIM, CLASSES, 0.95)
    for dtype in (torch.bfloat16, torch.float64):
        head = head.to(dtype)
        assert head.threshold.dtype == torch.float32 and head.threshold.item() == torch.tensor(0.95).item()
    held = head.threshold
    head.threshold = 0.5
    assert head.threshold is held and head.state_dict()["threshold"].item() == held.item() == 0.5
    for wrong in (95, -0.1, float("nan"), "a", None):  # as the constructor
        with pytest.raises((ValueError, TypeError), match="threshold: expected a"):
            head.threshold = wrong
        if isinstance(wrong, (int, float)):  # as a file may hold it
            with pytest.raises(ValueError, match=r"0\.threshold: expected a"):
                torch.nn.Sequential(head).load_state_dict({"0.threshold": torch.tensor(wrong)}, strict=False)
    assert held.item() == 0.5
    assert f"(\n  dim={DIM}, num_classes={CLASSES}, threshold=0.5, keep_per_class=0" in repr(head)
    head.load_state_dict({**head.state_dict(), "threshold": torch.tensor(0.25)}, assign=True)
    assert head.threshold.item() == 0.25


def test_names_of_the_parameters() -> None:
    assert set(dict(LinearExit(DIM, CLASSES).named_parameters())) == {
        "norm.weight", "norm.bias", "head.weight", "head.bias"
    }  # fmt: skip
    assert set(dict(CosineExit(DIM, CLASSES).named_parameters())) == {"norm.weight", "norm.bias", "classes", "scale"}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 5), ValueError, "dim"),
        ((48, 0), ValueError, "num_classes"),
        ((48.0, 5), TypeError, "dim"),
        ((48, 5, 0.9, -1), ValueError, "keep_per_class"),
        ((48, 5, 95), ValueError, "threshold: expected a number of at most 1, got 95"),
        ((48, 5, -0.1), ValueError, "threshold: expected a number of at least 0, got -0.1"),
        ((48, 5, float("nan")), ValueError, "threshold: expected a number of at least 0, got nan"),
        ((48, 5, "a"), TypeError, "threshold: expected a float, got str 'a'"),
        ((48, 5, torch.tensor([0.1, 0.2])), TypeError, r"threshold: expected a float, got float32 \[2\]"),
        ((48, 5, None), TypeError, "threshold: expected a float, got NoneType None"),
    ],
)
def test_bad_arguments_are_refused_by_name(kind: str, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HEADS[kind](*arguments)


@pytest.mark.parametrize("kind", HEADS)
def test_an_exit_of_one_class_is_refused(kind: str) -> None:
    """The softmax of one class is 1, so every token would halt."""
    with pytest.raises(ValueError, match="num_classes: expected an int at least 2, got 1"):
        HEADS[kind](DIM, 1)
