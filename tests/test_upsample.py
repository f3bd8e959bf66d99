"""upsample_argmax against bilinear interpolation one output pixel at a time."""

from __future__ import annotations

import brute_force
import pytest
import torch
import torch.nn.functional as F
from cases.upsample import check_labels as check_exact_labels
from cases.upsample import exact_scores
from hypothesis import given
from hypothesis import strategies as st
from tensors import IMAGE_VIEWS, LOW_PRECISION
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import step_kernels as sk
from step_kernels.reference import upsample as reference

SIZES = {
    "same": ((3, 5), (3, 5)),
    "up_16": ((3, 5), (48, 80)),
    "up_odd": ((5, 3), (17, 23)),
    "down": ((12, 9), (5, 4)),
    "down_to_one": ((7, 6), (1, 1)),
    "down_odd": ((21, 15), (7, 5)),
    "up_and_down": ((4, 9), (11, 5)),
    "from_one": ((1, 1), (6, 7)),
    "one_to_one": ((1, 1), (1, 1)),
    "one_row": ((1, 7), (3, 20)),
}


def check_labels(labels: Tensor, canvas: Tensor, size: tuple[int, int], relative: float) -> None:
    """The chosen class's logit is within rounding of the largest one; shape and dtype as promised."""
    classes = canvas.shape[1]
    assert labels.shape == (canvas.shape[0], *size)
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int32)
    if labels.numel() == 0:
        return
    truth = brute_force.upsample(canvas, size)
    chosen = truth.gather(1, labels.long()[:, None])[:, 0]
    best = truth.amax(1)
    assert (best - chosen <= relative * truth.abs().amax()).all()
    if classes > 1:
        lead = truth.topk(2, dim=1).values.diff(dim=1).abs()
        decided = (lead > relative * truth.abs().amax()).float().mean()
        assert decided > 0.9, "most pixels must be decided, or this test shows nothing"


@pytest.mark.parametrize("classes", (1, 2, 150, 256, 257))
@pytest.mark.parametrize("name", SIZES)
def test_double_precision(name: str, classes: int) -> None:
    grid, size = SIZES[name]
    canvas = torch.randn(2, classes, *grid, dtype=torch.float64)
    check_labels(sk.upsample_argmax(canvas, size), canvas, size, 1e-14)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", SIZES)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """The interpolation runs in fp32, however the logits are stored: two products and a sum per direction."""
    grid, size = SIZES[name]
    canvas = torch.randn(2, 21, *grid).to(dtype)
    check_labels(sk.upsample_argmax(canvas, size), canvas, size, 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", SIZES)
def test_the_specification_is_interpolate(name: str) -> None:
    grid, size = SIZES[name]
    canvas = torch.randn(2, 5, *grid, dtype=torch.float64)
    expected = F.interpolate(canvas, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(brute_force.upsample(canvas, size), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(sk.upsample_argmax(canvas, size).long(), expected.argmax(1))


@given(
    st.integers(0, 3),
    st.integers(1, 6),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_generated_sizes(batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int]) -> None:
    canvas = torch.randn(batch, classes, *grid, dtype=torch.float64)
    expected = F.interpolate(canvas, size, mode="bilinear", align_corners=False).argmax(1) if batch else None
    labels = sk.upsample_argmax(canvas, size)
    assert labels.shape == (batch, *size)
    assert expected is None or torch.equal(labels.long(), expected)


def test_ties_go_to_the_lower_class() -> None:
    canvas = torch.zeros(1, 300, 3, 4)
    assert not sk.upsample_argmax(canvas, (9, 9)).any()
    canvas[:, [7, 290]] = 1
    assert (sk.upsample_argmax(canvas, (9, 9)) == 7).all()


def test_negative_logits_and_the_last_class() -> None:
    canvas = torch.full((1, 256, 2, 2), -9.0)
    canvas[:, 255] = -8.0
    assert (sk.upsample_argmax(canvas, (7, 7)) == 255).all()
    canvas = torch.full((1, 257, 2, 2), -3e38)
    canvas[:, 256] = -2e38
    assert (sk.upsample_argmax(canvas, (7, 7)) == 256).all()


@pytest.mark.parametrize("view", IMAGE_VIEWS)
def test_canvas_of_any_strides(view: str) -> None:
    canvas = torch.randn(2, 6, 5, 7)
    strided = IMAGE_VIEWS[view](canvas)
    for size in ((20, 28), (3, 9)):
        assert torch.equal(sk.upsample_argmax(strided, size), sk.upsample_argmax(canvas, size))


def test_batch_mates_do_not_matter() -> None:
    canvas = torch.randn(3, 19, 4, 6)
    together = sk.upsample_argmax(canvas, (50, 70))
    for index in range(3):
        assert torch.equal(sk.upsample_argmax(canvas[index : index + 1], (50, 70))[0], together[index])


def test_nan_stays_in_its_neighbourhood() -> None:
    canvas = torch.randn(1, 5, 6, 6)
    clean = sk.upsample_argmax(canvas, (24, 24))
    canvas[0, 2, 0, 0] = float("nan")
    assert torch.equal(sk.upsample_argmax(canvas, (24, 24))[:, 8:, 8:], clean[:, 8:, 8:])


def test_half_precision_logits_near_the_limit() -> None:
    canvas = torch.full((1, 3, 2, 2), 6e4, dtype=torch.float16)
    canvas[:, 1] = 6.5e4
    assert (sk.upsample_argmax(canvas, (5, 5)) == 1).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor that any operator returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize(
    ("rows", "dtype"), [*((rows, torch.float32) for rows in (1, 3, 7, 9, 21)), (3, torch.float64), (7, torch.float64)]
)
def test_any_division_of_the_work_agrees_with_the_whole(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seams between bands and between matmuls at every place, at ratios whose source positions are rounded up or down."""
    canvas = torch.randn(1, 5, rows, 2, dtype=dtype)
    for height in (*range(1, 40), 63, 7 * rows, 16 * rows):
        labels = []
        for scores_at_a_time in (10**9, 1, 200, 600):
            monkeypatch.setattr(reference, "SCORES_AT_A_TIME", scores_at_a_time)
            labels.append(reference.upsample_argmax(canvas, height, 4))
        assert all(torch.equal(label, labels[0]) for label in labels), height


def test_full_size_logits_are_never_stored() -> None:
    canvas = torch.randn(2, 150, 16, 16)
    with LargestTensor() as whole:
        expected = F.interpolate(canvas, (256, 256), mode="bilinear", align_corners=False).argmax(1)
    with LargestTensor() as blocked:
        labels = reference.upsample_argmax(canvas, 256, 256)
    assert whole.nbytes == 2 * 150 * 256 * 256 * 4
    assert blocked.nbytes <= whole.nbytes / 10
    assert (labels != expected).float().mean() < 1e-4


@pytest.mark.parametrize(
    "canvas, size, error, words",
    [
        ("x", (4, 4), TypeError, ["canvas", "x"]),
        (torch.zeros(3, 4, 4), (4, 4), ValueError, ["canvas", "3, 4, 4"]),
        (torch.zeros(1, 0, 4, 4), (4, 4), ValueError, ["canvas", "1, 0, 4, 4"]),
        (torch.zeros(1, 3, 0, 4), (4, 4), ValueError, ["canvas", "1, 3, 0, 4"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), (4, 4), TypeError, ["canvas", "int32"]),
        (torch.zeros(1, 3, 4, 4), 4, TypeError, ["size", "4"]),
        (torch.zeros(1, 3, 4, 4), (4,), TypeError, ["size", "4"]),
        (torch.zeros(1, 3, 4, 4), (4, 0), ValueError, ["size", "0"]),
        (torch.zeros(1, 3, 4, 4), (4, 2.0), TypeError, ["size", "2.0"]),
    ],
)
def test_bad_input_is_named(canvas, size, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        sk.upsample_argmax(canvas, size)
    for word in words:
        assert word in str(caught.value)


def test_leaving_out_classes_that_cannot_win_changes_nothing() -> None:
    """Scores with one clear winner, with many rivals, and with none: few, many and all classes are computed."""
    for spread in (100.0, 1.0, 0.01, 0.0):
        canvas = torch.randn(2, 40, 5, 7, dtype=torch.float64) * 0.1
        canvas += spread * F.one_hot(torch.randint(40, (2, 5, 7)), 40).movedim(-1, 1)
        expected = F.interpolate(canvas, (40, 49), mode="bilinear", align_corners=False).argmax(1)
        assert torch.equal(sk.upsample_argmax(canvas, (40, 49)).long(), expected)


def test_equal_scores_give_the_lowest_class() -> None:
    assert not sk.upsample_argmax(torch.zeros(1, 30, 3, 3), (17, 17)).any()
    canvas = torch.zeros(1, 30, 3, 3)
    canvas[:, 7:] = 1.0
    assert (sk.upsample_argmax(canvas, (12, 12)) == 7).all()


@pytest.mark.parametrize("size", ((3, 4), (9, 12), (48, 64), (1, 2)))
def test_an_impossible_class_wins_nowhere(size: tuple[int, int]) -> None:
    """Log-probabilities of -inf; PyTorch's 0 * -inf would make them NaN at the border and where an output lies at a source."""
    canvas = torch.randn(2, 5, 3, 4)
    canvas[:, 2] = -torch.inf
    canvas[:, 4, 1:] = -torch.inf
    labels = sk.upsample_argmax(canvas, size)
    assert not (labels == 2).any()
    check_exact_labels(labels, exact_scores(canvas, size), decided=0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("classes", (7, 300))
def test_what_is_not_finite_counts_as_in_pytorch(classes: int, dtype: torch.dtype) -> None:
    """Inside, where no output lies at a source: NaN before all else, infinity minus infinity too, the lowest class of equals."""
    canvas = torch.randn(2, classes, 40, 40, dtype=dtype)
    strange = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)[torch.randint(3, canvas.shape)]
    canvas = torch.where(torch.rand(canvas.shape) < 0.1 / classes, strange, canvas)
    canvas[:, :, 10:12, 10:12] = -torch.inf
    canvas[:, 3:5, 20:22, 20:22] = torch.inf
    expected = F.interpolate(canvas, (160, 160), mode="bilinear", align_corners=False).argmax(1)
    labels = reference.upsample_argmax(canvas, 160, 160)
    assert torch.equal(labels[:, 2:-2, 2:-2].long(), expected[:, 2:-2, 2:-2])
