"""upsample_argmax on a GPU against exact bilinear interpolation in fp64."""

import math

import pytest
import torch
from cases.upsample import check_labels, exact_scores
from gpu.syncs import capture, needs_memory, no_sync, ten_runs_are_identical
from tensors import IMAGE_VIEWS, LOW_PRECISION

import step_kernels as sk

pytestmark = pytest.mark.gpu

# Batch, classes, grid, size of the labels.
SIZES = {
    "patch_16": (2, 150, (32, 32), (512, 512)),
    "patch_16_large": (1, 19, (64, 64), (1024, 1024)),
    "patch_14": (1, 21, (37, 37), (518, 518)),
    "patch_32": (1, 150, (16, 16), (512, 512)),
    "patch_64": (1, 21, (8, 4), (512, 256)),
    "odd_ratio": (2, 21, (33, 33), (513, 513)),
    "primes": (1, 257, (23, 31), (401, 307)),
    "up_4": (3, 150, (64, 48), (256, 192)),
    "up_2": (1, 150, (64, 64), (128, 128)),
    "same": (2, 150, (64, 64), (64, 64)),
    "down": (1, 150, (200, 300), (64, 77)),
    "one_class": (1, 1, (16, 16), (256, 256)),
    "one_cell": (1, 256, (1, 1), (128, 128)),
    "one_pixel": (4, 1000, (24, 24), (1, 1)),
    "many_images": (300, 2, (4, 4), (64, 64)),
}


def labelled(canvas: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Labels, by a call that waits for the device nowhere."""
    with no_sync():
        return sk.upsample_argmax(canvas, size)


def canvas_of(batch: int, classes: int, grid: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Scores as a model leaves them: channels_last. Drawn on the CPU: the same numbers on every GPU."""
    return torch.randn(batch, *grid, classes).to(dtype).cuda().permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", SIZES)
def test_labels_are_those_of_interpolation(name, dtype):
    batch, classes, grid, size = SIZES[name]
    canvas = canvas_of(batch, classes, grid, dtype)
    labels = labelled(canvas, size)
    for image in range(0, batch, 100):
        several = slice(image, image + 100)
        check_labels(labels[several], exact_scores(canvas[several], size))


@pytest.mark.parametrize("view", IMAGE_VIEWS)
@pytest.mark.parametrize("size", ((160, 240), (150, 230), (50, 70), (10, 15)))
def test_canvas_of_any_strides(view, size):
    canvas = torch.randn(2, 150, 10, 15).cuda()
    labels = labelled(IMAGE_VIEWS[view](canvas), size)
    check_labels(labels, exact_scores(canvas, size))
    assert torch.equal(labels, labelled(canvas, size))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("size", ((160, 240), (150, 230), (50, 75), (30, 45), (10, 15), (15, 22)))
def test_nan_and_infinities(size, dtype):
    """An impossible class wins nowhere; the first NaN beats all; infinite scores of either sign meet."""
    canvas = torch.randn(1, 40, 10, 15).to(dtype).cuda()
    canvas[:, 0] = -math.inf
    assert labelled(canvas, size).all()
    canvas[:, 7] += 100
    canvas[0, 30, 2, 3] = canvas[0, 20, 2, 4] = canvas[0, 9, 9, 14] = math.nan
    canvas[0, 5:8, 6, 1:4] = math.inf
    canvas[0, 6, 6, 5] = canvas[0, 7, 5, 2] = -math.inf
    expected = exact_scores(canvas, size).argmax(1)
    assert {5, 7, 9, 20, 30} <= set(expected.unique().tolist())
    assert torch.equal(labelled(canvas, size).long(), expected)
    for value in (-math.inf, math.inf, math.nan, 0.0):
        assert not labelled(torch.full_like(canvas, value), size).any()


def test_leaving_out_classes_that_cannot_win_changes_nothing():
    """Scores with one clear winner, with many rivals, and with nearly equal ones."""
    for spread in (100.0, 1.0, 0.01):
        canvas = 0.1 * torch.randn(2, 150, 20, 24).cuda()
        canvas.scatter_(1, torch.randint(150, (2, 1, 20, 24)).cuda(), spread)
        check_labels(labelled(canvas, (320, 384)), exact_scores(canvas, (320, 384)), decided=0.5)


def test_batch_mates_do_not_matter_and_runs_repeat():
    for size in ((512, 512), (40, 50)):
        canvas = canvas_of(5, 150, (32, 32), torch.bfloat16)
        together = labelled(canvas, size)
        ten_runs_are_identical(lambda: [labelled(canvas, size)])  # noqa: B023
        for image in range(5):
            assert torch.equal(labelled(canvas[image : image + 1], size)[0], together[image])


@pytest.mark.parametrize("size", ((512, 512), (40, 50)))
def test_a_captured_call_replays_on_new_scores(size):
    canvas = canvas_of(2, 150, (32, 32), torch.bfloat16)
    replay = capture(lambda: [sk.upsample_argmax(canvas, size)])
    (labels,) = replay()
    for _ in range(3):
        canvas.normal_()
        labels.fill_(255)
        replay()
        assert torch.equal(labels, labelled(canvas, size))


def test_no_memory_beyond_the_labels():
    canvas = canvas_of(4, 150, (64, 64), torch.bfloat16)
    labelled(canvas, (1024, 1024))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a cached larger block would be booked whole
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels = labelled(canvas, (1024, 1024))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= labels.numel() + 512


def test_more_than_2_to_the_31_labels():
    """With a whole ratio, the last rows of labels depend on the last rows of scores only."""
    needs_memory(6)
    ratio, side = 40, 1160
    canvas = canvas_of(1, 3, (side, side))
    labels = labelled(canvas, (ratio * side, ratio * side))
    assert labels.numel() > 2**31
    expected = exact_scores(canvas[:, :, -3:], (3 * ratio, ratio * side))
    check_labels(labels[:, -2 * ratio :].contiguous(), expected[:, :, -2 * ratio :])


@pytest.mark.parametrize("memory_format", (torch.channels_last, torch.contiguous_format))
def test_a_canvas_of_more_than_2_to_the_31_scores(memory_format):
    needs_memory(12)
    shape = 1, 150, 3800, 3800
    canvas = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_()
    assert canvas.numel() > 2**31
    labels = labelled(canvas, (950, 950))
    check_labels(labels[:, -2:].contiguous(), exact_scores(canvas[:, :, -8:], (2, 950)))
    cropped = canvas[:, :, -20:, -20:]
    expected = exact_scores(cropped, (320, 320))
    check_labels(labelled(cropped, (320, 320)), expected)
