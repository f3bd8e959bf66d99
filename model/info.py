"""CheckpointInfo: what a checkpoint tells beside the model, and a loaded model carries."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import describe

__all__ = ["CheckpointInfo"]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint tells beside the model; None where the file does not tell.

    Attributes:
        format: the format's name.
        ignored: tensors of the file that the model has no use for, by the file's names.
        mean, std: per channel (RGB), of images in [0, 1]: those of uint8 pictures divided by 255.
        classes: names of the classes.
        palette: one (red, green, blue) in 0..255 per class.
        window, stride: (height, width) in pixels of the crops that pictures are run in, and from one to the next. None: whole, and the window.
        resize: pixels of pictures' shorter side, and at most of the longer, that they are run at. None: their own size.
        enlarge: a picture smaller than the window is first enlarged to it, its shape kept (Segmenter).
        stretch: the padded patch grid's scores are stretched over the picture (mmsegmentation), not cut at its border.
        notes: what was changed on loading, in words.
    """

    format: str
    ignored: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, ...], ...] | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    resize: tuple[int, int] | None = None
    enlarge: bool = False
    stretch: bool = False
    notes: tuple[str, ...] = ()

    def check(self, source: object, channels: int) -> None:
        """Refuse a mean or standard deviation that is not one number per channel as images in [0, 1] have it, the latter positive, and
        a window, stride or resize that is no pair of positive ints."""
        for name, kind in (("mean", "numbers in [0, 1]"), ("std", "positive numbers up to 1")):
            values = getattr(self, name)
            numbers = values if isinstance(values, (list, tuple)) else ()
            fine = [type(number) in (int, float) and 0 <= number <= 1 for number in numbers]
            if values is not None and (fine != [True] * channels or (name == "std" and 0 in numbers)):
                wanted = f"{name} to be {channels} {kind}, one per channel (divide those of uint8 pictures by 255)"
                raise ValueError(f"{source}: expected {wanted}, got {describe(values)}")
        for name, size in (("window", self.window), ("stride", self.stride), ("resize", self.resize)):
            numbers = size if isinstance(size, (list, tuple)) else ()
            if size is not None and [type(number) is int and number > 0 for number in numbers] != [True, True]:
                sides = "(shorter, longer)" if name == "resize" else "(height, width)"
                raise ValueError(f"{source}: expected {name} to be {sides} in pixels, got {describe(size)}")
