"""Decoders against Segmenter's formulas on one image at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import CLASSES, DECODERS, DIM, enlarge, ragged_tokens
from static_runs import UndefinedTails
from tensors import with_tail
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model import Decoder, LinearDecoder, MaskTransformerDecoder


def segmenter_masks(decoder: MaskTransformerDecoder, tokens: Tensor) -> Tensor:
    """Segmenter's MaskTransformer.forward on one image's patch tokens [N, D]: [N, num_classes]."""
    x = tokens[None] @ decoder.proj_dec.weight.T + decoder.proj_dec.bias
    x = torch.cat((x, decoder.cls_emb), 1)
    for block in decoder.blocks:
        x = block(x)
    x = F.layer_norm(x, (DIM,), decoder.decoder_norm.weight, decoder.decoder_norm.bias, 1e-5)
    patches, classes = x[:, :-CLASSES] @ decoder.proj_patch, x[:, -CLASSES:] @ decoder.proj_classes
    patches = patches / patches.norm(dim=-1, keepdim=True)
    classes = classes / classes.norm(dim=-1, keepdim=True)
    masks = patches @ classes.transpose(1, 2)
    return F.layer_norm(masks, (CLASSES,), decoder.mask_norm.weight, decoder.mask_norm.bias, 1e-5)[0]


@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("depth", [0, 2])
def test_mask_transformer_equals_segmenters(depth: int, num_heads: int | None) -> None:
    torch.manual_seed(2)
    decoder = enlarge(MaskTransformerDecoder(DIM, CLASSES, depth, num_heads)).double()
    tokens, layout = ragged_tokens()
    scores, own = decoder(tokens, layout)
    assert own.num_prefix == 0 and torch.equal(own.sides(), layout.sides())
    starts = layout.cu_seqlens.tolist()
    expected = torch.cat([segmenter_masks(decoder, tokens[a + 1 : b]) for a, b in itertools.pairwise(starts)])
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10)
    parameters, cotangent = dict(decoder.named_parameters()), torch.randn_like(expected)
    found, true = (torch.autograd.grad(x, list(parameters.values()), cotangent) for x in (scores, expected))
    for name, ours, theirs in zip(parameters, found, true, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_mask_transformer_has_segmenters_names() -> None:
    names = {name.split(".")[0] for name, _ in MaskTransformerDecoder(DIM, CLASSES).named_parameters()}
    assert names == {"proj_dec", "cls_emb", "proj_patch", "proj_classes", "blocks", "decoder_norm", "mask_norm"}
    decoder = MaskTransformerDecoder(128, CLASSES)
    assert decoder.cls_emb.shape == (1, CLASSES, 128) and decoder.proj_patch.shape == (128, 128)
    assert decoder.blocks[0].attn.num_heads == 2 and len(decoder.blocks) == 2
    norms = [module for module in decoder.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


def test_linear_decoder_is_one_linear_layer() -> None:
    decoder = enlarge(LinearDecoder(DIM, CLASSES)).double()
    tokens, layout = ragged_tokens()
    scores, own = decoder(tokens, layout)
    assert own is layout
    torch.testing.assert_close(scores, F.linear(tokens, decoder.head.weight, decoder.head.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", DECODERS)
def test_images_without_survivors(kind: str) -> None:
    """Only prefix tokens are left of image 0, then of all."""
    decoder = enlarge(DECODERS[kind](DIM, CLASSES)).double()
    sides = torch.ones(2, 3, 4, dtype=torch.int32)
    for emptied in ([0], [0, 1]):
        sides[emptied] = 0
        layout = SupertokenLayout.from_sides(sides, num_prefix=1).trim()
        scores, own = decoder(torch.randn(layout.capacity, DIM, dtype=torch.float64), layout)
        assert scores.shape == (own.capacity, CLASSES) and not scores.isnan().any()


@pytest.mark.parametrize("emptied", [[], [0], [0, 1, 2]])
@pytest.mark.parametrize("kind", DECODERS)
def test_spare_rows_change_nothing(kind: str, emptied: list[int]) -> None:
    """Untrimmed, with NaN past the live count: live rows of the scores and every gradient are those of the trimmed layout."""
    decoder = enlarge(DECODERS[kind](DIM, CLASSES)).double()
    sides = ragged_tokens()[1].sides()
    sides[emptied] = 0
    layout = SupertokenLayout.from_sides(sides, num_prefix=1)
    assert layout.capacity > layout.num_tokens
    tokens = torch.randn(layout.num_tokens, DIM, dtype=torch.float64)
    cotangent = torch.randn(layout.capacity + 3, CLASSES, dtype=torch.float64)
    outcomes = []
    for packed, own in ((tokens, layout.trim()), (with_tail(tokens, layout.capacity), layout)):
        packed.requires_grad_()
        with UndefinedTails() as tails:
            scores, after = decoder(packed, own)
        assert ("ragged_linear" in tails.poisoned) != own.trimmed
        live = after.num_tokens
        assert scores.shape == (after.capacity, CLASSES) and after.trimmed == own.trimmed
        inputs = [packed, *decoder.parameters()]
        grads = torch.autograd.grad(scores, inputs, with_tail(cotangent[:live], after.capacity))
        outcomes.append([after.cu_seqlens, scores[:live], grads[0][: len(tokens)], *grads[1:]])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", DECODERS)
def test_bad_arguments_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match="dim"):
        DECODERS[kind](0, CLASSES)
    with pytest.raises(ValueError, match="num_classes"):
        DECODERS[kind](DIM, 0)
    with pytest.raises(TypeError, match="num_classes"):
        DECODERS[kind](DIM, "5")


def test_bad_mask_transformers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="depth"):
        MaskTransformerDecoder(DIM, CLASSES, depth=-1)
    with pytest.raises(ValueError, match="num_heads"):
        MaskTransformerDecoder(DIM, CLASSES, num_heads=0)
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads=5, got 48"):
        MaskTransformerDecoder(DIM, CLASSES, num_heads=5)
    assert issubclass(MaskTransformerDecoder, Decoder)
