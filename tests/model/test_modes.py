"""The segmenter under inference_mode and autocast; labels that leave the run are contiguous."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, DECODERS, HEADS, photographs, small_segmenter, small_vit
from static_runs import assert_same_trace
from torch import Tensor, nn

from step_kernels.model import PolicyNet, StepEncoder, StepSegmenter

HEAD_NAMES = [None, *HEADS]
POLICIES = {"variance": lambda: None, "net": lambda: PolicyNet(width=2)}  # None: the small segmenter's own


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_a_trace_made_in_inference_mode_replays_in_training(head: str | None, decoder: str) -> None:
    segmenter, images = small_segmenter(head, decoder), photographs(2, 64, 72)
    with torch.inference_mode():
        trace = segmenter.trace(images)
        of_inference_images = segmenter.trace(images.clone())
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    for other in (of_inference_images, segmenter.trace(images)):
        assert_same_trace(trace, other)
    for replay in (trace, of_inference_images):
        found = gradients(segmenter, segmenter(images, replay=replay).square().sum())
        assert found.keys() == {name for name, _ in segmenter.named_parameters()}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_predict_runs_in_inference_mode(head: str | None, decoder: str) -> None:
    segmenter, images = small_segmenter(head, decoder), photographs(2, 61, 90)
    expected = segmenter.predict(images)
    with torch.inference_mode():
        assert torch.equal(segmenter.predict(images), expected)
        assert torch.equal(segmenter.predict(images.clone(), replay=segmenter.trace(images)), expected)


@pytest.mark.parametrize(("batch_size", "height", "width"), [(2, 64, 72), (2, 61, 90), (1, 61, 64), (2, 64, 61)])
def test_labels_are_contiguous_and_keep_no_padding_alive(batch_size: int, height: int, width: int) -> None:
    labels = small_segmenter().predict(photographs(batch_size, height, width))
    assert labels.shape == (batch_size, height, width) and labels.is_contiguous()
    assert labels.untyped_storage().nbytes() == labels.numel() * labels.element_size()


def run_both_ways(segmenter: StepSegmenter, images: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Labels and gradients of a training step without and with autocast."""
    labels, outcomes = torch.arange(2 * 8 * 9).view(2, 8, 9) % CLASSES, []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            predicted, trace = segmenter.predict(images), segmenter.trace(images)
            scores = segmenter(images, replay=trace)
            loss = F.cross_entropy(scores, labels)
            assert (images[0, 0] @ images[0, 0].t()).dtype == (torch.bfloat16 if enabled else torch.float32)
        assert scores.dtype == torch.float32
        outcomes.append((predicted, gradients(segmenter, loss)))
    return outcomes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("head", HEAD_NAMES)
def test_autocast_changes_nothing(head: str | None, decoder: str, policy: str) -> None:
    """The model computes in its parameters' dtype: labels and gradients are those without autocast, bit for bit."""
    segmenter = small_segmenter(head, decoder, policy=POLICIES[policy]())
    (plain_labels, plain), (labels, found) = run_both_ways(segmenter, photographs(2, 64, 72))
    assert torch.equal(labels, plain_labels)
    assert plain and found.keys() == plain.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_encoder_and_decoder_called_alone_ignore_autocast_too(decoder: str) -> None:
    segmenter, images = small_segmenter("cosine", decoder), photographs(2, 64, 72)
    outcomes = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoded = segmenter.encoder(images)
            outcomes.append((encoded.tokens, encoded.canvas, segmenter.decoder(encoded.tokens, encoded.layout)[0]))
    for ours, expected in zip(*outcomes, strict=True):
        assert torch.equal(ours, expected)


def test_the_encoders_policy_runs_without_autocast() -> None:
    """The one part of the encoder whose plain convolutions autocast would cast: a half-precision score decides otherwise."""
    net, dtypes = PolicyNet(width=2), []
    encoder = StepEncoder(small_vit(depth=1), net)
    net.heads["2"].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(photographs(1, 64, 72))
    assert dtypes == [torch.float32]
