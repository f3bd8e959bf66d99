"""count_flops against torch.utils.flop_counter, which sees every aten matmul and convolution of the same run."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import CLASSES, DECODERS, DIM, HEADS, photographs, small_segmenter, small_vit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from step_kernels import reference
from step_kernels.model import (
    FlopCount,
    LinearDecoder,
    PolicyNet,
    QuotaPolicy,
    StepEncoder,
    StepSegmenter,
    Trace,
    VariancePolicy,
    count_flops,
)

MODULES = [
    importlib.import_module(f"step_kernels.reference.{info.name}") for info in pkgutil.iter_modules(reference.__path__)
]


class OpenOps(TorchDispatchMode):
    """Runs the package's ops as the plain functions behind them, so that an outer mode sees what they compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "step_kernels":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        implementation = next(getattr(module, name) for module in MODULES if hasattr(module, name))
        return implementation(*args, **(kwargs or {}))


def measured(run: Callable[[], Any]) -> int:
    """FLOPs of ``run`` by torch's counter; the math backend, because the counter skips CPU flash attention."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, OpenOps():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", [None, *HEADS])
@pytest.mark.parametrize("size", [(64, 64), (61, 90)])
def test_equals_torchs_count_of_the_same_run(head: str | None, decoder: str, size: tuple[int, int]) -> None:
    segmenter = small_segmenter(head, decoder, keep_per_class=1)
    images = photographs(3, *size)
    trace = segmenter.trace(images)
    count = count_flops(segmenter, images.shape, trace)
    assert count.total == measured(lambda: segmenter(images)) == measured(lambda: segmenter(images, replay=trace))
    assert count.policy == 0 and (count.exits > 0) == (head is not None)
    encoder = segmenter.encoder
    assert count.embed + count.blocks + count.exits == measured(lambda: encoder(images))
    out = encoder(images)
    assert count.decoder == measured(lambda: segmenter.decoder(out.tokens, out.layout))


@pytest.mark.parametrize("quota", [False, True])
def test_the_policys_share_is_counted(quota: bool) -> None:
    net = PolicyNet(width=4)
    segmenter = small_segmenter(policy=QuotaPolicy(net, 9) if quota else net)
    images = photographs(2, 61, 200)
    trace = segmenter.trace(images)
    count = count_flops(segmenter, images.shape, trace)
    assert count.policy > 0
    assert count.total == measured(lambda: segmenter(images))
    assert count.total - count.policy == measured(lambda: segmenter(images, replay=trace)), "a replay asks no policy"


@pytest.mark.parametrize("size", [(64, 64), (37, 85)])
def test_equals_torchs_count_of_the_dense_model(size: tuple[int, int]) -> None:
    vit = small_vit()
    segmenter = small_segmenter("linear")
    images = photographs(2, *size)
    count = count_flops(segmenter, images.shape)
    assert count.embed + count.blocks == measured(lambda: vit(images))
    assert count.policy == count.exits == 0
    plain = StepSegmenter(StepEncoder(vit), LinearDecoder(DIM, CLASSES))
    out = plain.encoder(images)
    assert count.decoder == measured(lambda: plain.decoder(out.tokens, out.layout))


def test_parts_add_up() -> None:
    assert FlopCount(policy=1, embed=20, blocks=300, exits=4000, decoder=50000).total == 54321


def test_bad_arguments_are_refused_by_name() -> None:
    segmenter, images = small_segmenter(), photographs(2, 64, 64)
    trace = segmenter.trace(images)
    with pytest.raises(ValueError, match=r"images_shape: expected \(B, C, H, W\), got \(2, 3, 64\)"):
        count_flops(segmenter, (2, 3, 64))
    for i, shape in ((0, (0, 3, 64, 64)), (2, (2, 3, -64, 64))):
        with pytest.raises(ValueError, match=rf"images_shape\[{i}\]: expected an int at least 1, got {shape[i]}"):
            count_flops(segmenter, shape)
    with pytest.raises(TypeError, match=r"images_shape: expected \(B, C, H, W\), got int 3"):
        count_flops(segmenter, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="trace: expected a Trace or None, got int 3"):
        count_flops(segmenter, images.shape, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="segmenter: expected a StepSegmenter, got StepEncoder"):
        count_flops(segmenter.encoder, images.shape)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"replay\.layout: expected grid"):
        count_flops(segmenter, (2, 3, 64, 72), trace)
    with pytest.raises(ValueError, match="replay: expected one stage for each exit"):
        count_flops(segmenter, images.shape, Trace(trace.layout))
    with pytest.raises(ValueError, match="images_shape: expected 3 channels"):
        count_flops(segmenter, (2, 4, 64, 64), trace)


def test_any_policy_is_counted() -> None:
    class Own(nn.Module):
        """Not one of the package's: a convolution whose result it does not use."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 4, stride=4, bias=False)

        def forward(self, images: torch.Tensor, **arguments: int) -> Any:
            self.conv(images)
            return VariancePolicy(0.1)(images, **arguments)

    segmenter = small_segmenter(policy=Own())
    trace = segmenter.trace(photographs(1, 64, 64))
    assert count_flops(segmenter, (1, 3, 64, 64), trace).policy == 2 * 16 * 16 * 2 * 3 * 4 * 4


@torch.no_grad()
def test_a_counter_of_the_users_own_counts_the_ops() -> None:
    segmenter, images = small_segmenter(), photographs(2, 64, 72)
    expected = count_flops(segmenter, images.shape, segmenter.trace(images)).total
    for static in (False, True):
        with FlopCounterMode(display=False) as counter:
            segmenter(images, static=static)
        assert counter.get_total_flops() == expected, "rows past the live count are not counted"
    counts = counter.get_flop_counts()
    assert sum(counts["StepSegmenter.decoder"].values()) > 0, "by module, as those of any other model"


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="segmenter: expected parameters with values"):
        count_flops(small_segmenter().to("meta"), (1, 3, 64, 64))
