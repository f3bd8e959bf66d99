"""TrainSettings: how a stage is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...checks import check_choice, check_int, check_number
from .augment import Recipe
from .objective import STAGES

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained.

    Attributes:
        stage: ``heads``, ``policy``, ``exits`` or ``all``; see `Objective`.
        epochs, batch: batch of one process.
        lr: peak learning rate.
        weight_decay, warmup (share of the steps), clip (norm of the gradients; 0: none), layer_decay: of `Optimizer`.
        accumulate: batches per step.
        ema: decay of an average of the weights, which is then what is saved; 0: none.
        exit_weight, consistency, tolerance: of `Objective`.
        views: where the backbone is frozen: random views of each picture, whose features are computed once, and kept in fp16
            on the CPU. 0: new views in each epoch, whose features are computed each time.
        seed: of draws, order and, with the command, new heads.
        recipe: of the pictures.
    """

    stage: str
    epochs: int = 10
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    layer_decay: float = 1.0
    ema: float = 0.0
    exit_weight: float = 0.4
    consistency: float = 0.0
    tolerance: float = 0.0
    views: int = 2
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("stage", self.stage, STAGES)
        for name in ("epochs", "batch", "accumulate"):
            check_int(name, getattr(self, name), minimum=1)
        for name in ("views", "seed"):
            check_int(name, getattr(self, name), minimum=0)
        for name in ("weight_decay", "clip", "exit_weight", "consistency", "tolerance"):
            check_number(name, getattr(self, name), minimum=0)
        for name in ("warmup", "ema", "layer_decay"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        check_number("lr", self.lr, minimum=0)
