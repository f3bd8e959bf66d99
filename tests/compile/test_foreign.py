"""torch.compile(fullgraph=True) of other libraries' models in static mode; what no run passes over in silence is refused here, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import photographs, small_segmenter
from tensors import close
from torch import nn

from step_kernels.model import LinearDecoder, StepSegmenter


@torch.no_grad()
def test_timm() -> None:
    from timm_models import build, encoder_of, pictures

    model = build("DINOv3", torch.float32, depth=1)
    segmenter, images = StepSegmenter(encoder_of(model), LinearDecoder(64, 5)).eval(), pictures(model)
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    close(compiled(images, static=True), segmenter(images, static=True), 1e-5)


@torch.no_grad()
def test_transformers() -> None:
    from transformers_models import DIM, build, encoder_of, pictures

    encoder, images = encoder_of(build("DINOv3", torch.float32, num_hidden_layers=1)), pictures(2, dtype=torch.float32)
    segmenter = StepSegmenter(encoder, LinearDecoder(DIM, 5)).eval()
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    close(compiled(images, static=True), segmenter(images, static=True), 1e-5)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def replaced(module: nn.Module) -> None:
    module.forward = lambda x: 0 * x


def subclassed(module: nn.Module) -> None:
    module.__class__ = type("Merging", (type(module),), {})  # as ToMe's patch does


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # past the error, frame by frame
@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("encoder.vit.blocks.1", hook, r"vit\.blocks\.1: Block .*hooks"),
        ("encoder.exits.1", hook, r"exits\.1: LinearExit .*hooks"),
        ("decoder.blocks.0.mlp", replaced, r"decoder\.blocks\.0\.mlp: Mlp .*forward was replaced"),
        ("encoder.vit.blocks.1", subclassed, r"vit\.blocks\.1: .*Merging .*expected Block"),
    ],
)
@torch.no_grad()
def test_what_nothing_calls_is_refused(path: str, change: Callable[[nn.Module], None], message: str) -> None:
    """Of a model that has not run eagerly before."""
    model, images = small_segmenter("linear", "mask_transformer"), photographs(1, 32, 32)
    change(model.get_submodule(path))
    torch.compiler.reset()  # a graph of one model serves another, whatever hooks that has
    with pytest.raises(NotImplementedError, match=message):
        torch.compile(model, backend="eager")(images)
    with pytest.raises(NotImplementedError, match=message):
        torch.export.export(model, (images,), strict=False)


@torch.no_grad()
def test_an_exit_behind_blocks_that_were_cut_off_is_refused() -> None:
    model = small_segmenter("linear")
    model.encoder.vit.blocks = model.encoder.vit.blocks[:2]
    torch.compiler.reset()
    with pytest.raises(ValueError, match="exits' block number: expected an int between 1 and 2, got 3"):
        torch.compile(model, backend="eager")(photographs(1, 32, 32))


@pytest.mark.parametrize("library", ["timm", "transformers"])
@torch.no_grad()
def test_hooks_in_other_libraries_models_are_refused(library: str) -> None:
    if library == "timm":
        import timm_models as models

        model, path = models.build("DINOv3", torch.float32, depth=1), "blocks.0.attn"
        images = models.pictures(model)
    else:
        import transformers_models as models

        model, path = models.build("DINOv3", torch.float32, num_hidden_layers=1), "layer.0.attention"
        images = models.pictures(1, dtype=torch.float32)
    encoder = models.encoder_of(model)
    hook(next(part for name, part in model.named_modules() if name.endswith(path)))
    torch.compiler.reset()
    with pytest.raises(NotImplementedError, match=rf"vit\..*{path}: .*hooks"):
        torch.compile(encoder.forward_features, backend="eager")(images)
