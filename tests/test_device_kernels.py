"""How many kernels each op launches on a GPU: the committed table, and the budgets of irregular steps."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import device_kernels
import samples
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"

BUDGETS = {
    "resolve_layout": 3,
    "layout_from_sides": 3,
    "layout_sides": 1,
    "merge_patches": 1,
    "merge_patches_backward": 1,
    "embed_patches": 3,  # merge, the linear layer, positions and prefix
    "merge_tokens": 1,
    "merge_tokens_backward": 2,
    "scatter_back": 1,
    "scatter_back_backward": 1,
    "scatter_into": 1,
    "gather_tokens": 1,
    "gather_tokens_backward": 1,
    "upsample_argmax": 1,
    "rope_table": 1,
    "ragged_rope": 1,
    "ragged_rope_backward": 1,
}


def most_kernels(op: str, number: int | None = None) -> int:
    """Over all samples of an op, or of one of them."""
    chosen = samples.SAMPLES[op]()
    if number is not None:
        chosen = chosen[number : number + 1]
    return max(len(device_kernels.kernels_of(op, *arguments)) for arguments in chosen)


def test_the_committed_table_is_what_is_counted():
    shown = (
        PAGE.read_text(encoding="utf-8").split("<!-- device kernels -->")[1].split("<!-- end of device kernels -->")[0]
    )
    assert shown.strip() == device_kernels.table(), "run PYTHONPATH=tests:. python tests/device_kernels.py"


@pytest.mark.parametrize("op", BUDGETS)
def test_budgets(op):
    assert 0 < most_kernels(op) <= BUDGETS[op]


KEEPS = {"halt_tokens": (6, 7), "exit_head": (10, 11)}  # places of keep_per_class and forced in the schemas


@pytest.mark.parametrize(("op", "plain", "with_context"), [("halt_tokens", 3, 5), ("exit_head", 4, 6)])
def test_an_exit_stage_gather_included(op, plain, with_context):
    gather = most_kernels("gather_tokens")
    ranked = []
    for number, arguments in enumerate(samples.SAMPLES[op]()):
        keep, forced = (arguments[place] for place in KEEPS[op])
        ranked.append(bool(keep) and forced is None)
        assert most_kernels(op, number) + gather <= (with_context if ranked[-1] else plain)
    assert set(ranked) == {False, True}, "one sample must rank tokens, one must not"


def test_more_images_need_no_more_kernels():
    for batch in (1, 256):
        scores = [torch.empty(batch, 32, 32), torch.empty(batch, 16, 16)]
        arguments = scores, [2, 4], [0.5, 0.5], [], 64, 64, 1
        assert len(device_kernels.kernels_of("resolve_layout", *arguments)) == 3


def test_pytorch_kernels_count_and_views_do_not():
    x = torch.empty(4, 6, device="meta")
    with device_kernels.recorded() as names:
        x.new_zeros(3)
        x.T.unflatten(0, (2, 3))[1].expand(3, 4)
        x.new_empty(5).fill_(1)
        x.to(torch.float16)
        x.T.contiguous()
    assert names == ["PyTorch new_zeros", "PyTorch fill_", "PyTorch _to_copy", "PyTorch clone"]
