"""PolicyNet: the lightweight CNN that decides STEP's supertokens (dCTS).

Source: STEP (arXiv 2509.14165). Its policy network is not public; this is a reconstruction: CTS's policy network
generalised from 2x2 to several sides, smaller, at reduced resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from numbers import Real
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...checks import check_int, check_number, describe
from ...modules import check_uncalled
from ...numerics import accumulator
from ..images import check_images
from .base import SIDES, Policy, fitting_sides, grid_of

__all__ = ["PolicyNet"]

STRIDE = 16
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class SeparableBlock(nn.Module):
    """Depthwise (3x3, or 4x4 with stride 2) and pointwise convolution, each with batch norm and ReLU.

    Residual where the shape stays. 4x4 because a 3x3 kernel with stride 2 looks half a pixel up and left of the feature it
    makes; four of them would centre each score on its block's corner.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = conv_bn_relu(in_chans, in_chans, 2 + stride, stride, groups=in_chans)
        self.pointwise = conv_bn_relu(in_chans, out_chans, 1)
        self.residual = stride == 1 and in_chans == out_chans

    def forward(self, x: Tensor) -> Tensor:
        out = self.pointwise(self.depthwise(x))
        return x + out if self.residual else out


class PolicyNet(Policy):
    """A small depthwise-separable CNN with one score map per side: the learned dCTS policy.

    The image is resized by ``input_scale``; a trunk of stride 16 and average pooling give one feature vector per 2x2 block (with patch size 16 and
    scale 0.5, one block is exactly one feature), pooled once more per coarser side. Score = sigmoid. About 0.02 % of ViT-L's FLOPs at 1024 px.

    For training, `logits` is differentiable; the decision is not. Train on the oracle's blocks, as CTS does. For inference,
    `deployed` gives the copy with batch norm folded.

    Args:
        sides: powers of two from 2 to 64.
        thresholds: one number from 0 to 1 for all sides, or one per side in the order given in ``sides``; kept in the fp32 buffer ``thresholds``
            [len(sides)], sides ascending. ``net.thresholds = 0.4``, or one number per side, ascending, fills it in place.
        input_scale: resolution of the network's input relative to the image; when a block is then no multiple of 16
            pixels, the nearest scale that makes it one.
        width: channels of the stem.
        in_chans: channels of the image.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: a side, a threshold or their number, scale or width out of range.
    """

    settings = ("sides", "thresholds", "input_scale", "width", "in_chans")
    thresholds: Tensor

    def __init__(
        self,
        sides: Sequence[int] = SIDES,
        thresholds: float | Sequence[float] = 0.5,
        input_scale: float = 0.5,
        *,
        width: int = 32,
        in_chans: int = 3,
    ) -> None:
        super().__init__(sides)
        per_side = self.checked_threshold("thresholds", thresholds)
        self.input_scale = check_number("input_scale", input_scale, maximum=1)
        if self.input_scale <= 0:
            raise ValueError(f"input_scale: expected a number in (0, 1], got {input_scale}")
        width, in_chans = check_int("width", width, minimum=1), check_int("in_chans", in_chans, minimum=1)
        self.width, self.in_chans = width, in_chans
        ascending = [threshold for _, threshold in sorted(zip(sides, per_side, strict=True))]
        self.add_threshold("thresholds", ascending)
        self.trunk = nn.Sequential(
            conv_bn_relu(in_chans, width, 4, 2),
            SeparableBlock(width, 2 * width, 2),
            SeparableBlock(2 * width, 4 * width, 2),
            SeparableBlock(4 * width, 4 * width),
            SeparableBlock(4 * width, 8 * width, 2),
            SeparableBlock(8 * width, 8 * width),
            SeparableBlock(8 * width, 8 * width),
        )
        doublings = self.sides[-1].bit_length() - 2
        self.coarser = nn.ModuleList(SeparableBlock(8 * width, 8 * width) for _ in range(doublings))
        self.heads = nn.ModuleDict({str(side): nn.Conv2d(8 * width, 1, 1) for side in self.sides})

    def checked_threshold(self, name: str, value: object) -> list[float]:
        """One number for each side, from one number or a list of them."""
        count = len(self.sides)
        if not isinstance(value, (list, tuple)):
            if not isinstance(value, Real):
                raise TypeError(f"{name}: expected one number or a list of {count}, got {describe(value)}")
            return [check_number(name, value, minimum=0, maximum=1)] * count
        if len(value) != count:
            raise ValueError(f"{name}: expected one number or {count}, one per side, got {len(value)}")
        return [check_number(f"{name}[{i}]", each, minimum=0, maximum=1) for i, each in enumerate(value)]

    def logits(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        """Scores before the sigmoid, [B, rows // side, cols // side] for each side that fits the grid, ascending.

        Args:
            images: [B, in_chans, rows * patch_size, cols * patch_size], in the parameters' dtype.
            patch_size: pixels per side of a patch.

        Raises:
            TypeError, ValueError: images of a wrong type, dtype, shape, number of channels or device, or not padded.
        """
        grid = grid_of(images, patch_size)
        stem = next(self.trunk.parameters())
        check_images(images, stem, "the policy's first convolution")
        sides = fitting_sides(self.sides, grid)
        if not sides:
            return []
        block_rows, block_cols = grid[0] // 2, grid[1] // 2
        # Its pixels per side in the network's input: a multiple of the trunk's stride.
        block = max(1, round(2 * patch_size * self.input_scale / STRIDE)) * STRIDE
        # Cut to whole 2x2 blocks first, so that every feature sees exactly its own block at its centre.
        whole = images[:, :, : 2 * block_rows * patch_size, : 2 * block_cols * patch_size]
        small = F.interpolate(whole, size=(block_rows * block, block_cols * block), mode="bilinear")
        if stem.is_contiguous(memory_format=torch.channels_last):
            # The resize keeps the images' own memory format; moved after it, there are fewer pixels to move.
            small = small.contiguous(memory_format=torch.channels_last)
        features = self.trunk(small)
        if block > STRIDE:
            features = F.avg_pool2d(features, block // STRIDE)
        side, maps = 2, []
        for wanted in sides:
            while side < wanted:
                features = self.coarser[side.bit_length() - 2](F.avg_pool2d(features, 2))
                side *= 2
            maps.append(self.heads[str(wanted)](features)[:, 0])
        return maps

    def scores(self, images: Tensor, *, patch_size: int) -> list[Tensor]:
        return [logit.float().sigmoid() for logit in self.logits(images, patch_size=patch_size)]

    def score_thresholds(self, sides: Sequence[int]) -> list[Tensor]:
        return [self.thresholds[self.sides.index(side)] for side in sides]

    @torch.inference_mode(False)  # tensors made in inference mode could not be refreshed outside of it
    @torch.no_grad()
    def deployed(self) -> Self:
        """A copy for inference: batch norm folded into the convolutions, weights and features in channels_last.

        It has this network's class, device and dtype and, to rounding, its scores. Batch norm counts by its running statistics, also when this
        network is in training mode. The copy shares the tensor ``thresholds`` (until either is moved to another device): calibrating it in place
        acts on both. Its weights are its own and need no gradient; after a change of this network's, ``copy.refresh_from(net)`` follows.
        """
        copy = deepcopy(self, {id(self.thresholds): self.thresholds})
        for _, unit in units(copy):
            unit[1] = nn.Identity()  # keeps the names of everything else
        buffers = dict(self.named_buffers())
        for name, value in folded(self).items():
            if name not in buffers:
                module, _, part = name.rpartition(".")
                form = torch.channels_last if value.ndim == 4 else torch.contiguous_format
                setattr(copy.get_submodule(module), part, nn.Parameter(value.clone(memory_format=form)))
        return copy.eval().requires_grad_(False)

    @torch.no_grad()
    def refresh_from(self, original: Policy) -> None:
        """Fold ``original``'s weights again, into this copy's own storages: a CUDA graph goes on reading the same addresses.

        Args:
            original: the network that this one is the `deployed` copy of, or one of equal settings.

        Raises:
            TypeError: ``original`` is no `PolicyNet`.
            ValueError: it differs in sides, input_scale, or the shape, dtype or device of a parameter, or this network is
                no deployed copy. Nothing is changed then.
        """
        if not isinstance(original, PolicyNet):
            raise TypeError(f"original: expected a PolicyNet, got {type(original).__name__}")
        for name in ("sides", "input_scale"):
            own, got = getattr(self, name), getattr(original, name)
            if got != own:
                raise ValueError(f"original: expected {name} {own} as this copy has, got {got}")
        targets, values = named_tensors(self), folded(original)
        if targets.keys() != values.keys():
            raise ValueError(
                f"original: expected the parts that this copy has, got further ones {sorted(values.keys() - targets.keys())}, "
                f"and missing ones {sorted(targets.keys() - values.keys())}"
            )
        for part, target in targets.items():
            wanted, got = (f"{describe(tensor)} on {tensor.device}" for tensor in (target, values[part]))
            if got != wanted:
                raise ValueError(f"original: expected {part} {wanted} as this copy has, got {got}")
        for part, target in targets.items():
            if values[part] is not target:
                target.copy_(values[part])


def conv_bn_relu(in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; the grid shrinks by exactly ``stride``."""
    padding = (kernel_size - 1) // 2
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_chans), nn.ReLU(inplace=True))


def named_tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def units(net: nn.Module) -> list[tuple[str, Any]]:
    """The parts of ``net``, by name, that are a convolution with a batch norm after it."""
    found = [(name, part) for name, part in net.named_modules() if isinstance(part, nn.Sequential) and len(part) > 1]
    return [(name, part) for name, part in found if isinstance(part[0], nn.Conv2d) and isinstance(part[1], NORMS)]


def folded(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``net`` by name, each batch norm folded into its convolution as it computes in eval mode.

    Worked out in fp32 or wider; what is not folded is ``net``'s own.
    """
    values = named_tensors(net)
    for unit, (conv, norm, *_) in units(net):
        check_uncalled(f"{unit}.0", conv, nn.Conv2d)
        check_uncalled(f"{unit}.1", norm)
        wide = accumulator(conv.weight.dtype)
        weight, bias = conv.weight.to(wide), None if conv.bias is None else conv.bias.to(wide)
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        mean, variance, gain, shift = (tensor.to(wide) for tensor in statistics)
        pair = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, gain, shift)
        values = {name: tensor for name, tensor in values.items() if not name.startswith(f"{unit}.1.")}
        values[f"{unit}.0.weight"], values[f"{unit}.0.bias"] = (tensor.to(conv.weight.dtype) for tensor in pair)
    return values
