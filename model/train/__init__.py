"""Training, calibration and evaluation: losses for any loop, one short loop of our own, and what fewer tokens cost."""

from ..policies.oracle import block_purity
from .augment import Prepared, Recipe
from .calibration import calibrate_exits, calibrate_policy
from .data import LabelledPictures
from .evaluation import evaluate
from .loop import train
from .losses import consistency_loss, exit_loss, merging_cost, merging_loss, policy_loss, segmentation_loss
from .metrics import Confusion
from .objective import Objective
from .scenes import Scenes
from .settings import TrainSettings

__all__ = [
    "Confusion",
    "LabelledPictures",
    "Objective",
    "Prepared",
    "Recipe",
    "Scenes",
    "TrainSettings",
    "block_purity",
    "calibrate_exits",
    "calibrate_policy",
    "consistency_loss",
    "evaluate",
    "exit_loss",
    "merging_cost",
    "merging_loss",
    "policy_loss",
    "segmentation_loss",
    "train",
]
