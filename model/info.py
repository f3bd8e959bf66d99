"""CheckpointInfo: what a checkpoint tells beside the model, and a loaded model carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import describe

__all__ = ["CheckpointInfo"]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint tells beside the model; None where the file does not tell.

    Attributes:
        format: the format's name.
        ignored: tensors of the file that the model has no use for, by the file's names.
        mean, std: per channel (RGB), of images in [0, 1].
        classes: names of the classes.
        palette: one (red, green, blue) in 0..255 per class.
    """

    format: str
    ignored: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, ...], ...] | None = None

    def check(self, source: object, channels: int) -> None:
        """Refuse a mean or standard deviation that is not one finite number per channel, the latter positive."""
        for name, least, kind in (("mean", -math.inf, "finite"), ("std", 0.0, "finite, positive")):
            values = getattr(self, name)
            numbers = values if isinstance(values, (list, tuple)) else ()
            fine = [type(number) in (int, float) and least < number < math.inf for number in numbers]
            if values is not None and fine != [True] * channels:
                wanted = f"{name} to be {channels} {kind} numbers, one per channel"
                raise ValueError(f"{source}: expected {wanted}, got {describe(values)}")
