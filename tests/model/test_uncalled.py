"""What users put into a model: adapters, hooks, pruned and parametrised weights act as in the dense model, or are refused by path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from real_timm import timm
from small_models import CLASSES, DIM, enlarge, photographs, small_atm_segmenter, small_segmenter, small_vit
from timm_models import SMALL
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from step_kernels.model import LinearDecoder, MaskTransformerDecoder, StepEncoder, StepSegmenter, ViT


class LoRA(nn.Module):
    """As peft's ``lora.Linear``: no linear layer itself, it wraps one."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.2)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank) * 0.2)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


def with_lora(vit: Any) -> None:
    for block in vit.blocks:
        block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv), LoRA(block.attn.proj)
        block.mlp.fc1, block.mlp.fc2 = LoRA(block.mlp.fc1), LoRA(block.mlp.fc2)


def hooked(vit: Any) -> None:
    for layer in (vit.blocks[0].attn.qkv, vit.blocks[1].norm2, vit.blocks[1].mlp.fc1, vit.norm):
        layer.register_forward_hook(lambda module, given, out: 2 * out)


def pruned(vit: Any) -> None:
    prune.l1_unstructured(vit.blocks[0].mlp.fc1, "weight", amount=0.5)


def parametrised(vit: Any) -> None:
    layer = nn.utils.parametrizations.weight_norm(vit.blocks[0].attn.proj)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def old_weight_norm(vit: Any) -> None:
    nn.utils.weight_norm(vit.blocks[1].attn.qkv)
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight_g.mul_(2)  # until the hook has run, the weight is the old one


def replaced_forward(vit: Any) -> None:
    vit.blocks[0].mlp.fc2.forward = lambda x: x[..., : x.shape[-1] // 4] * 3


CHANGES: list[Callable[[Any], None]] = [with_lora, hooked, pruned, parametrised, old_weight_norm, replaced_forward]


def timm_vit() -> Any:
    sizes = {**SMALL, "depth": 2, "img_size": 32, "num_classes": 0}
    return enlarge(timm.models.VisionTransformer(**sizes), std=0.1).eval()


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("route", ["own", "timm"])
def test_acts_and_trains_as_in_the_dense_model(route: str, change: Callable[[Any], None]) -> None:
    """Put in after the encoder has run: looked at in each run."""
    own = route == "own"
    vit = small_vit(depth=2).eval() if own else timm_vit()
    encoder = StepEncoder(vit) if own else StepEncoder.from_timm(vit, verify=False)
    dense = vit if own else vit.forward_features
    images = photographs(2, 32, 32)
    with torch.no_grad():
        before = encoder.forward_features(images)
    change(vit)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(images), dense(images), rtol=1e-4, atol=1e-4)
        assert (encoder.forward_features(images) - before).abs().max() > 1e-2, "the change is one that can be seen"
    results = []
    for run in (encoder.forward_features, dense):
        vit.zero_grad()
        run(images).square().mean().backward()
        results.append({name: parameter.grad for name, parameter in vit.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def hook(path: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def other(path: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.set_submodule(path, make())


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook on the model": (hook("encoder.vit"), "vit: ViT .*hooks"),
    "hook on the embedding": (hook("encoder.vit.patch_embed.proj"), r"vit\.patch_embed\.proj: Conv2d .*hooks"),
    "hook on a block": (hook("encoder.vit.blocks.1"), r"vit\.blocks\.1: Block .*hooks"),
    "hook on an attention": (hook("encoder.vit.blocks.2.attn"), r"vit\.blocks\.2\.attn: Attention .*hooks"),
    "hook on an exit": (hook("encoder.exits.1"), r"exits\.1: LinearExit .*hooks"),
    "hook in the decoder": (hook("decoder.blocks.0.mlp"), r"decoder\.blocks\.0\.mlp: Mlp .*hooks"),
    "another MLP": (other("encoder.vit.blocks.0.mlp", nn.Identity), r"vit\.blocks\.0\.mlp: Identity .*expected Mlp"),
    "another embedding": (other("encoder.vit.patch_embed", nn.Identity), r"patch_embed: Identity .*expected PatchEmbed"),
    "pruned positions": (
        lambda model: prune.random_unstructured(model.encoder.vit, "pos_embed", amount=0.5), "vit: ViT .*hooks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_calls_is_refused_by_its_path(name: str) -> None:
    change, message = REFUSED[name]
    model, images = small_segmenter("linear", "mask_transformer"), photographs(1, 32, 32)
    with torch.no_grad():
        model(images)
    change(model)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match=message):
            model(images)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_runs_and_trains_around_the_whole_and_is_refused_on_a_block(mesh: DeviceMesh) -> None:
    model, images = small_segmenter("linear", "mask_transformer"), photographs(1, 32, 32)
    expected = model(images)
    expected.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    fully_shard(model, mesh=mesh)
    scores = model(images)
    scores.square().mean().backward()
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close([parameter.grad.full_tensor() for parameter in model.parameters()], gradients)
    other = small_segmenter("linear", "mask_transformer")
    fully_shard(other.encoder.vit.blocks[1], mesh=mesh)
    with pytest.raises(NotImplementedError, match=r"vit\.blocks\.1: FSDPBlock .*expected Block"):
        other(images)


@pytest.mark.parametrize("path", ["decoder", "decoder.head.decoder.layers.0.self_attn", "encoder.exits.1"])
def test_hooks_on_atm_heads_are_refused(path: str) -> None:
    model = small_atm_segmenter()
    hook(path)(model)
    with pytest.raises(NotImplementedError, match=path.removeprefix("encoder.").split(".")[-1]):
        model(photographs(1, 32, 32))


@pytest.mark.parametrize("part", ["encoder.exits.1.norm", "encoder.exits.1.head", "decoder.head", "decoder"])
@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_on_the_layers_of_heads_fire(part: str, gradients: bool) -> None:
    model, seen = small_segmenter("linear", "linear"), []
    model.get_submodule(part).register_forward_hook(lambda module, *_: seen.append(module))
    with torch.set_grad_enabled(gradients):
        model(photographs(1, 32, 32))
    assert seen == [model.get_submodule(part)]


@torch.no_grad()
def test_a_hook_on_a_final_norm_that_is_none_fires() -> None:
    vit = enlarge(ViT.preset("tiny", 32, embed_dim=DIM, depth=1, num_heads=3, patch_size=8, final_norm=False))
    vit.norm.register_forward_hook(lambda module, given, out: 2 * out)
    images = photographs(1, 32, 32)
    torch.testing.assert_close(StepEncoder(vit).forward_features(images), vit(images), rtol=1e-4, atol=1e-4)


def test_lora_in_a_decoder_counts() -> None:
    torch.manual_seed(0)
    decoder = enlarge(MaskTransformerDecoder(DIM, CLASSES, 1, num_heads=3))
    model = StepSegmenter(StepEncoder(small_vit(depth=1)), decoder)
    images = photographs(1, 32, 32)
    with torch.no_grad():
        before = model(images)
        with_lora(decoder)
        adapted = model(images)
        for layer in [
            module for module in decoder.modules() if isinstance(module, LoRA)
        ]:  # merged, as peft merges them
            layer.base_layer.weight += layer.lora_B @ layer.lora_A
            layer.lora_B.zero_()
        torch.testing.assert_close(adapted, model(images), rtol=1e-4, atol=1e-4)
    assert (adapted - before).abs().max() > 1e-2


@torch.no_grad()
def test_an_exit_behind_blocks_that_were_cut_off_is_refused() -> None:
    """As timm's prune_intermediate_layers cuts them."""
    model = small_segmenter("linear")
    model.encoder.vit.blocks = model.encoder.vit.blocks[:2]
    with pytest.raises(ValueError, match="exits' block number: expected an int between 1 and 2, got 3"):
        model(photographs(1, 32, 32))


def test_a_subclassed_vit_is_not_refused() -> None:
    class Own(ViT):
        """Whose blocks are the plain ones."""

    vit = Own(small_vit(depth=1).config)
    StepSegmenter(StepEncoder(vit), LinearDecoder(DIM, CLASSES))(photographs(1, 32, 32))
