"""step_kernels.model: STEP's model layer on top of the kernels.

A plain ViT, the policies that merge its patches, the early exits, the decoders, and the segmenter that joins them.
"""

if __name__ != "step_kernels.model":
    raise ImportError(
        f"import this package as 'step_kernels.model', not as {__name__!r}: the folder 'model' of a checkout is only where "
        "its files lie"
    )

from .checkpoints import CheckpointInfo, checkpoint_info, load_checkpoint, load_encoder, load_segmenter, save_checkpoint
from .encoder import EncoderOutput, StepEncoder
from .flops import FlopCount, count_flops
from .graph.capture import CapturedSegmenter
from .heads.atm import AtmDecoder, AtmExit
from .heads.decoders import Decoder, LinearDecoder, MaskTransformerDecoder
from .heads.exits import CosineExit, ExitHead, LinearExit
from .policies.base import Policy, QuotaPolicy, VariancePolicy
from .policies.cts import CTSPolicy
from .policies.net import PolicyNet
from .policies.oracle import OraclePolicy
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
    "load_encoder",
    "load_segmenter",
    "predict_windows",
    "resize_positions",
    "save_checkpoint",
]
