"""TransformersModel: an encoder in the place of the transformers model that it was made of, with that model's arguments and outputs."""

from __future__ import annotations

import copy
import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...checks import check_tensor, describe
from ..foreign.verify import Run, check_equal
from .adapter import TransformersViT
from .parts import either

if TYPE_CHECKING:
    from ..encoder import StepEncoder

__all__ = ["TransformersModel", "check_equal_outputs"]

INTERPOLATING = ("vit", "clip", "siglip")  # families whose forward has interpolate_pos_encoding
LABELS = ("mask_labels", "class_labels", "patch_offsets")  # EoMT's, for its loss


class TransformersModel(nn.Module):
    """``encoder.as_transformers()``: called as the transformers model that ``encoder`` was made of, it returns what that returns.

    ``last_hidden_state``, ``hidden_states``, ``pooler_output``, ``feature_maps`` come in transformers' own classes and shapes: a merged token stands
    in every cell that it covers, one that halted keeps what it was when it left. Attributes that it lacks (``config``, ``channels``) are the model's.

    Args:
        encoder: of `StepEncoder.from_transformers`.

    Raises:
        TypeError: another encoder.
    """

    def __init__(self, encoder: StepEncoder) -> None:
        super().__init__()
        if not isinstance(encoder.vit, TransformersViT):
            made = type(encoder.vit).__name__
            raise TypeError(f"as_transformers: expected the encoder of a transformers model, got one of {made}")
        self.step_encoder = encoder
        self.training = encoder.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            encoder: Any = super().__getattr__("step_encoder")
            found = getattr(encoder.vit.model, name)
            if callable(found) and not isinstance(found, nn.Module):  # it would run the dense model
                raise
            return found

    def forward_with_filtered_kwargs(self, *inputs: Any, **named: Any) -> Any:
        """As DPT and others call their backbones."""
        return self(*inputs, **named)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """As the model's own.

        Args:
            pixel_values: [B, C, H, W]; for Siglip2 [B, N, p * p * C], with ``spatial_shapes`` of one grid and ``pixel_attention_mask`` of ones.
            interpolate_pos_encoding: of ViT, CLIP and SigLIP: images of another grid than the model's own.
            output_hidden_states, return_dict: None: as the model's config says.
            others: EoMT's ``mask_labels``, ``class_labels``, ``patch_offsets``; all others None or False.

        Raises:
            NotImplementedError: masks, attention weights and whatever else packed tokens do not have.
            ValueError: images of another grid without ``interpolate_pos_encoding``; Siglip2's images of several sizes.
        """
        vit: Any = self.step_encoder.vit
        config = self.config
        if vit.family == "siglip2":
            pixel_values = images_of_patches(pixel_values, vit, others)
        labels = {name: others.pop(name) for name in LABELS if vit.family == "eomt" and name in others}
        for name, value in {"output_attentions": config.output_attentions, **others}.items():
            if value is not None and value is not False:
                why = "since packed tokens have no such thing"
                raise NotImplementedError(f"{name}: expected None, {why}, got {describe(value)}")
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if not isinstance(wanted, bool):
            raise TypeError(f"output_hidden_states: expected a bool or None, got {describe(wanted)}")
        pixels, grid = vit.on_grid(pixel_values.to(vit.embedding.weight.dtype))
        if vit.family in INTERPOLATING and not interpolate_pos_encoding and grid != vit.own_grid:
            expected = f"a grid of {vit.own_grid} patches, or interpolate_pos_encoding=True"
            raise ValueError(f"pixel_values: expected {expected}, got a grid of {grid}")
        if vit.family == "eomt":
            return self._segmented(pixels, wanted, labels | {"return_dict": return_dict})
        stages = getattr(self, "stage_names", ())
        picked = [number for number, name in enumerate(stages) if name in self.out_features]
        blocks = [*picked, vit.depth] if not picked or vit.family == "dinov3_vit" else picked
        states = self.step_encoder.hidden_states(pixels, range(vit.depth + 1) if wanted else blocks)
        every = tuple(states.values()) if wanted else None
        output = self._backbone(states, picked, every, grid) if picked else self._model(states[vit.depth], every)
        if return_dict is None:
            return_dict = getattr(config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _model(self, state: Tensor, every: tuple[Tensor, ...] | None) -> Any:
        vit = self.step_encoder.vit
        last, root = vit.final_norm(state), vit.root
        if vit.family == "clip":
            pooled = root.post_layernorm(last[:, 0])
        elif vit.family.startswith("dino"):
            pooled = last[:, 0]
        else:
            head = either(root, "pooler", "head")
            pooled = None if head is None else head(last)
        outputs = sys.modules["transformers.modeling_outputs"]
        return outputs.BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=every)

    def _backbone(self, states: dict[int, Tensor], picked: list[int], every: Any, grid: tuple[int, int]) -> Any:
        vit, config = self.step_encoder.vit, self.config
        v3, maps, classes = vit.family == "dinov3_vit", [], []
        for number in picked:
            state = states[number]
            if config.apply_layernorm or (v3 and number == vit.depth):
                state = vit.final_norm(state)
            classes.append(state[:, 0])
            if config.reshape_hidden_states or v3:
                state = state[:, vit.num_prefix :]
            if config.reshape_hidden_states:
                state = state.transpose(1, 2).unflatten(2, grid).contiguous()
            maps.append(state)
        outputs = sys.modules["transformers.modeling_outputs"]
        own = getattr(sys.modules[type(vit.model).__module__], "DINOv3ViTBackboneOutput", None)
        named = {"feature_maps": tuple(maps), "hidden_states": every}
        if own is not None and getattr(config, "return_class_token", False):
            named["cls_tokens"] = tuple(classes)
        output = (outputs.BackboneOutput if own is None else own)(**named)
        if v3:
            output.last_hidden_state = vit.final_norm(states[vit.depth])
            if every and own is None:  # so transformers below 5.4
                output.hidden_states = (*every[:-1], output.last_hidden_state)
        return output

    def _segmented(self, pixels: Tensor, wanted: bool, named: dict[str, Any]) -> Any:
        """The blocks that see EoMT's queries, and its heads, dense on the restored grid: the model's own forward behind its first blocks."""
        if wanted:
            why = "since EoMT's first blocks run on packed tokens"
            raise NotImplementedError(f"output_hidden_states: expected False, {why}, got True")
        vit = self.step_encoder.vit
        rest, own = copy.copy(vit.model), vit.model._modules
        rest._modules = {**own, "embeddings": Entered(vit.num_prefix), "layers": own["layers"][vit.depth :]}
        rest.num_hidden_layers = len(rest.layers)
        state = self.step_encoder.hidden_states(pixels, [vit.depth])[vit.depth]
        return rest(state, **{name: value for name, value in named.items() if value is not None})


class Entered(nn.Module):
    """In the place of EoMT's embeddings, what the first blocks made of them."""

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def images_of_patches(patches: Tensor, vit: TransformersViT, others: dict[str, Any]) -> Tensor:
    """Siglip2's patches [B, N, p * p * C] as images [B, C, H, W]; takes its arguments out of ``others``."""
    shapes, mask, size = others.pop("spatial_shapes", None), others.pop("pixel_attention_mask", None), vit.patch_size
    channels = vit.embedding.weight.shape[1]
    check_tensor("pixel_values", patches, ("B", "N", size * size * channels))
    grids = {tuple(shape) for shape in ([] if shapes is None else shapes.tolist())}
    if len(grids) != 1 or patches.shape[1] != int(torch.tensor([*grids]).prod()):
        expected = f"one grid of {patches.shape[1]} patches for all images"
        raise ValueError(f"spatial_shapes: expected {expected}, got {sorted(grids)}")
    if mask is not None and not bool(mask.all()):
        raise ValueError("pixel_attention_mask: expected all patches of all images, got a mask that leaves some out")
    (grid,) = grids
    pixels = patches.unflatten(2, (size, size, channels)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
    return pixels.flatten(4).flatten(2, 3)


def check_equal_outputs(encoder: StepEncoder) -> None:
    """RuntimeError where the outputs of ``encoder``, which merges nothing, and of its model differ by more than rounding.

    On one image: two patches by three where the model takes any size, else of its own size.
    """
    vit: Any = encoder.vit
    side, own = vit.patch_size, vit.own_grid
    square = own is not None and own[0] == own[1] and vit.family != "eomt"
    rows, cols = (2, 3) if own is None or square else own

    def outputs(model: Any, image: Tensor) -> list[Tensor]:
        named: dict[str, Any] = {}
        if vit.family == "siglip2":
            image = image.unflatten(3, (cols, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 3, 5, 1)
            image = image.flatten(3).flatten(1, 2)
            named["pixel_attention_mask"] = torch.ones(image.shape[:2], dtype=torch.int64, device=image.device)
            named["spatial_shapes"] = torch.tensor([[rows, cols]], device=image.device)
        elif vit.family in INTERPOLATING and square:
            named["interpolate_pos_encoding"] = True
        return leaves(model(image, **named))

    runs: tuple[Run, Run] = functools.partial(outputs, encoder.as_transformers()), functools.partial(outputs, vit.model)
    if vit.family == "eomt":  # whose rest is its own code; it may draw at random
        runs = (
            lambda image: [encoder.hidden_states(image, [vit.depth])[vit.depth]],
            lambda image: [vit.model(image, output_hidden_states=True).hidden_states[vit.depth]],
        )
    check_equal(vit, (rows * side, cols * side), *runs)


def leaves(output: Any) -> list[Tensor]:
    """The tensors of nested tuples and outputs, in order."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output or ()
    return [leaf for item in items for leaf in leaves(item)]
