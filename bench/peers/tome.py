"""ToMe through its own package, where the user has it (Bolya et al., "Token Merging: Your ViT but Faster", arXiv 2210.09461)."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..engine import Contender, NotRun, in_one_line
from ..gate import Expected
from ..options import PATCH_SIZE
from ..result import SPEEDUP
from ..segmenters import CLASSES, DENSE, MERGED, Segmenters, plain_upsample_argmax

# Without its requirements, among which is a timm of 2021 that returns no tokens of patches.
HOW = "pip install 'timm>=1.0.17'; pip install --no-deps git+https://github.com/facebookresearch/ToMe"
DECREASING = -1.0  # ToMe's schedule: 2 r tokens go in the first block, none in the last; a constant r would leave a handful to the decoder


class ToMe:
    """The forward pass in ToMe's package, on the segmenters' own parameters.

    NotRun where the package or timm is not there, or is not what is meant by these names: PyPI's `tome` is a markup language.
    """

    def __init__(self, segmenters: Segmenters) -> None:
        try:
            import timm.models.vision_transformer
            from tome.patch import timm as patch  # type: ignore[import-not-found]
        except Exception as error:  # whatever a package does when it is imported beside others that do not fit
            raise NotRun(f"needs timm and ToMe's own package ({in_one_line(error)}): {HOW}") from error
        config = segmenters.weights.vit.config
        same = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
        model = timm.models.vision_transformer.VisionTransformer(
            **{name: getattr(config, name) for name in same},
            img_size=config.image_shape,
            num_classes=0,
            global_pool="",
            norm_layer=functools.partial(nn.LayerNorm, eps=config.eps),
            weight_init="skip",
        )
        model.load_state_dict(segmenters.weights.vit.state_dict(), assign=True)
        patch(model, trace_source=True)
        self._model: Any = model.eval()
        self._weights, self.r = segmenters.weights, 0
        self.note = f"timm {timm.__version__}, eager"

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """Labels [batch, height, width]: every patch has the scores of the token that it was merged into."""
        self._model.r = (self.r, DECREASING)
        scores, prefix = self._weights.decoder.head(self._model(images)), self._weights.vit.num_prefix
        source = self._model._tome_info["source"]  # [batch, left, tokens], 1 where a token is in one; None: none merged
        if source is None:
            scores = scores[:, prefix:]
        else:
            scores = scores.gather(1, source[:, :, prefix:].argmax(1)[..., None].expand(-1, -1, scores.shape[2]))
        height, width = images.shape[2:]
        picture = scores.transpose(1, 2).unflatten(2, (height // PATCH_SIZE, width // PATCH_SIZE))
        return plain_upsample_argmax(picture, (height, width))

    def flops(self, image: Tensor, r: int) -> int:
        """With this r, the similarities included."""
        self.r = r
        with FlopCounterMode(display=False) as counter:
            self.labels(image)
        return int(counter.get_total_flops())


def unmerged(own: Segmenters) -> Contender:
    """At r = 0: the dense model in its package's code."""
    model = ToMe(own)
    return own.contender(DENSE, lambda number: model.labels(own.inputs[number]), ours=False, note=model.note)


def merging(own: Segmenters) -> Contender:
    """At the smallest r that needs no more FLOPs than the merged family with its policy; of the labels only that they are classes is known."""
    model, goal, image = ToMe(own), own.flops(MERGED) / own.batch, own.inputs[0][:1]
    rs = range(1, own.size[0] * own.size[1] // PATCH_SIZE**2 // 2)
    r = rs[min(bisect.bisect_left(rs, -goal, key=lambda r: -model.flops(image, r)), len(rs) - 1)]
    flops, yes = model.flops(image, r) * own.batch, (torch.tensor(True, device=own.device),)
    return Contender(
        lambda number: model.labels(own.inputs[number]),
        lambda labels, number: (((labels >= 0) & (labels < CLASSES)).all(),),
        note=f"r = {r}; {model.note}",
        expected=Expected(lambda number: yes, lambda number: yes),
        flops=flops,
        facts={SPEEDUP: "computes something else"},
    )


CONTENDERS = {"ToMe, r = 0": unmerged, "ToMe, FLOPs as merged": merging}
