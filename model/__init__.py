"""step_kernels.model: STEP's model layer on top of the kernels.

A plain ViT, the policies that merge its patches, the early exits, the decoders, and the segmenter that joins them.
"""

if __name__ != "step_kernels.model":
    raise ImportError(
        f"import this package as 'step_kernels.model', not as {__name__!r}: the folder 'model' of a checkout is only where "
        "its files lie"
    )

from .atm import AtmDecoder, AtmExit
from .capture import CapturedSegmenter
from .checkpoints import CheckpointInfo, checkpoint_info, load_checkpoint, save_checkpoint
from .cts_policy import CTSPolicy
from .decoders import Decoder, LinearDecoder, MaskTransformerDecoder
from .encoder import EncoderOutput, StepEncoder
from .exits import CosineExit, ExitHead, LinearExit
from .flops import FlopCount, count_flops
from .oracle_policy import OraclePolicy
from .policies import Policy, QuotaPolicy, VariancePolicy
from .policy_net import PolicyNet
from .segmenter import StepSegmenter
from .trace import Stage, Trace
from .vit import ViT, ViTConfig, resize_positions
from .windows import predict_windows

__all__ = [
    "AtmDecoder",
    "AtmExit",
    "CTSPolicy",
    "CapturedSegmenter",
    "CheckpointInfo",
    "CosineExit",
    "Decoder",
    "EncoderOutput",
    "ExitHead",
    "FlopCount",
    "LinearDecoder",
    "LinearExit",
    "MaskTransformerDecoder",
    "OraclePolicy",
    "Policy",
    "PolicyNet",
    "QuotaPolicy",
    "Stage",
    "StepEncoder",
    "StepSegmenter",
    "Trace",
    "VariancePolicy",
    "ViT",
    "ViTConfig",
    "checkpoint_info",
    "count_flops",
    "load_checkpoint",
    "predict_windows",
    "resize_positions",
    "save_checkpoint",
]
