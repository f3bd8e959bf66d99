"""`StepSegmenter.capture`: the whole prediction as one CUDA graph."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu.syncs import no_sync
from small_models import DECODERS, HEADS, enlarge
from torch import Tensor, nn

from step_kernels import SupertokenLayout
from step_kernels.model import LinearExit, PolicyNet, StepEncoder, StepSegmenter, VariancePolicy, ViT

pytestmark = pytest.mark.gpu
CLASSES, SIZE = 21, (220, 304)
DEVICE = torch.device("cuda")


def segmenter_of(
    head: str | None = "linear",
    decoder: str = "linear",
    *,
    dtype: torch.dtype = torch.bfloat16,
    policy: nn.Module | None = None,
) -> StepSegmenter:
    torch.manual_seed(0)
    vit = ViT.preset("tiny", img_size=224, depth=6)
    exits = {} if head is None else {block: HEADS[head](vit.embed_dim, CLASSES, 0.3) for block in (2, 4)}
    policy = VariancePolicy(0.1) if policy is None else policy
    segmenter = StepSegmenter(StepEncoder(vit, policy, exits), DECODERS[decoder](vit.embed_dim, CLASSES))
    enlarge(segmenter)
    return segmenter.to(DEVICE, dtype).eval()


def pictures(seed: int, batch_size: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Noise with flat regions of another size in each image and for each seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, 3, *SIZE, generator=generator)
    for number, image in enumerate(images):
        image[:, : 32 * (1 + (number + seed) % 6)] *= 0.01
    return images.to(DEVICE, dtype)


def counts_of(segmenter: StepSegmenter, images: Tensor) -> tuple[int, ...]:
    with torch.no_grad():
        return segmenter.encoder(images, static=True).trace.token_counts()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", [None, *HEADS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_replays_are_static_mode_bit_for_bit(head: str | None, decoder: str, dtype: torch.dtype) -> None:
    segmenter = segmenter_of(head, decoder, dtype=dtype)
    recorded = pictures(0, dtype=dtype)
    counts = counts_of(segmenter, recorded)
    captured = segmenter.capture(recorded)
    assert captured.trace().token_counts() == counts  # before any predict
    for seed in (0, 1, 2, 3):
        images = pictures(seed, dtype=dtype)
        expected = segmenter.decide_and_predict(images, static=True, expected_tokens=counts)[0]
        with no_sync():
            labels = captured.predict(images)
        assert torch.equal(labels, expected)
        assert captured.trace().token_counts() == counts_of(segmenter, images)
    assert captured.compile_seconds > 0 and captured.memory_bytes >= recorded.nbytes


def test_replayed_decisions_agree_with_exact_mode() -> None:
    segmenter = segmenter_of(dtype=torch.float32)
    images = [pictures(seed, dtype=torch.float32) for seed in range(4)]
    traces = [segmenter.trace(own) for own in images]
    captured = segmenter.capture(images[0], replay=traces[0])
    for own, trace in zip(images, traces, strict=True):
        labels, expected = captured.predict(own, replay=trace), segmenter.predict(own, replay=trace)
        assert (labels != expected).float().mean() < 1e-3  # ties to rounding: matmuls of another library
        assert captured.trace().token_counts() == trace.token_counts()


def test_smaller_batches_and_results_that_stay() -> None:
    segmenter = segmenter_of()
    captured = segmenter.capture(pictures(0))
    first = captured.predict(pictures(0))
    kept = first.clone()
    for count in (1, 2):
        labels = captured.predict(pictures(1)[:count])
        assert labels.shape == (count, *SIZE)
        assert torch.equal(labels, captured.predict(pictures(1))[:count])  # batch mates do not matter
    assert torch.equal(first, kept)


def test_ten_runs_are_one_and_take_no_more_memory() -> None:
    segmenter = segmenter_of()
    captured, images = segmenter.capture(pictures(0)), pictures(1)
    expected = captured.predict(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        assert torch.equal(captured.predict(images), expected)
    assert torch.cuda.memory_allocated() == before


def test_captures_side_by_side_on_streams_and_threads() -> None:
    segmenter = segmenter_of()
    pair = [segmenter.capture(pictures(0)), segmenter.capture(pictures(0, batch_size=2))]
    inputs = [pictures(seed, batch_size=2) for seed in range(4)]
    expected = [captured.predict(images) for captured in pair for images in inputs]
    torch.cuda.synchronize()
    results: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results[number] = pair[number // 4].predict(inputs[number % 4])
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for number, labels in results.items():
        assert torch.equal(labels, expected[number])


def test_changed_weights() -> None:
    net = PolicyNet(width=4)
    segmenter, images = segmenter_of(policy=net), pictures(1)
    with torch.no_grad():
        for head in net.heads.values():
            head.weight.zero_()
            head.bias.fill_(-9)
    captured = segmenter.capture(pictures(0))
    before = captured.predict(images)
    assert captured.trace().token_counts()[0] == 3 * (1 + 14 * 19)
    with torch.no_grad():
        segmenter.decoder.head.weight.normal_()
    assert not torch.equal(captured.predict(images), before)
    with torch.no_grad():
        net.heads["2"].bias.fill_(9)
    with pytest.raises(RuntimeError, match="its policy's weights changed; call refresh"):
        captured.predict(images)
    captured.refresh()
    captured.predict(images)
    assert captured.trace().token_counts()[0] == 3 * (1 + 7 * 9 + 14)
    segmenter.load_state_dict({name: value.clone() for name, value in segmenter.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="moved; call refresh"):
        captured.predict(images)
    after = segmenter.predict(images, static=True)
    captured.refresh()
    assert (captured.predict(images) != after).float().mean() < 0.02  # tiles for other counts: bf16 rounding


def test_a_replaced_decoder() -> None:
    segmenter, images = segmenter_of(), pictures(1)
    captured = segmenter.capture(pictures(0))
    segmenter.decoder = enlarge(DECODERS["mask_transformer"](segmenter.encoder.vit.embed_dim, CLASSES))
    segmenter.decoder.to(DEVICE, torch.bfloat16)
    with pytest.raises(RuntimeError, match="a submodule of the segmenter was replaced; call refresh"):
        captured.predict(images)
    captured.refresh()
    counts = counts_of(segmenter, pictures(0))
    assert torch.equal(
        captured.predict(images), segmenter.decide_and_predict(images, static=True, expected_tokens=counts)[0]
    )


def test_a_dropped_capture_and_compiled_graphs_beside_it() -> None:
    """Others' graphs clear cuBLAS's workspaces, and memory of a dropped capture is given to others."""
    segmenter, images = segmenter_of(None, "mask_transformer"), pictures(1)
    captured = segmenter.capture(pictures(0))
    expected = captured.predict(images)
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(torch.cuda.Stream()):
        labels = segmenter.capture(pictures(0)).predict(images)  # dropped at once
    noise = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(8)]
    torch.cuda.synchronize()
    assert torch.equal(labels, expected) and torch.equal(captured.predict(images), expected)
    del noise


class WaitingPolicy(VariancePolicy):
    """Asks the device how many tokens it made."""

    def forward(self, images: Tensor, *, patch_size: int, num_prefix: int = 0) -> SupertokenLayout:
        return super().forward(images, patch_size=patch_size, num_prefix=num_prefix).trim()


def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(RuntimeError, match="capture: the prediction cannot be recorded"):
        segmenter_of(policy=WaitingPolicy(0.1)).capture(pictures(0))
    with pytest.raises(RuntimeError, match="capture: expected images on a CUDA device, got cpu"):
        segmenter_of().capture(pictures(0).cpu())
    assert torch.cuda.get_sync_debug_mode() == 0


def test_everything_or_nothing_halts() -> None:
    for threshold in (0.0, 2.0):
        segmenter = segmenter_of()
        for head in segmenter.encoder.exit_heads().values():
            assert isinstance(head, LinearExit)
            head.threshold.fill_(threshold)
        captured, images = segmenter.capture(pictures(0)), pictures(2)
        counts = counts_of(segmenter, pictures(0))
        expected = segmenter.decide_and_predict(images, static=True, expected_tokens=counts)[0]
        assert torch.equal(captured.predict(images), expected)
