"""What a run was asked for; the command line fills it, every job reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

LATEST = Path(__file__).resolve().parent / "results" / "latest"


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        device, dtype: of everything that is timed.
        vit: presets of the ViT; the first one is the job's main model.
        size: sides of the square images in pixels.
        batch: images per call.
        seconds: of the clock, for each case.
        policy: "variance": executed and counted; "given": its layouts are there before the clock starts.
        compile: whether contenders that torch.compile makes take part.
        only: parts of case or contender names; empty for all.
        images: a folder of pictures, or None for scikit-image's photographs.
        out: folder of the results.
    """

    device: torch.device
    dtype: torch.dtype
    vit: tuple[str, ...] = ("small",)
    size: tuple[int, ...] = (512,)
    batch: tuple[int, ...] = (4,)
    seconds: float = 20.0
    policy: str = "variance"
    compile: bool = False
    only: tuple[str, ...] = ()
    images: Path | None = None
    out: Path = LATEST

    @property
    def fixed(self) -> dict[str, str]:
        """What every row says."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}
