"""Run Vision Transformers on fewer tokens: supertoken merging and early exits, with a PyTorch reference for every op.

The ops are in this namespace; the model layer is ``step_kernels.model``.
"""

from .attention import attention_schedule, ragged_attention
from .backend import UnusedAcceleratorWarning, current_backend, selected_backend, use_backend
from .class_attention import class_attention, class_scores
from .halting import Halting, exit_head, gather_tokens, halt_tokens
from .layout import SupertokenLayout
from .linear import ragged_linear
from .masked_attention import masked_attention
from .merge import embed_patches, merge_patches, merge_tokens
from .norm import ragged_layer_norm
from .prefix import replace_prefix
from .resolve import resolve_layout
from .rope import ragged_rope, rope_table
from .scatter import scatter_back, scatter_into
from .upsample import upsample_argmax

__version__ = "0.1.0"

__all__ = [
    "Halting",
    "SupertokenLayout",
    "UnusedAcceleratorWarning",
    "attention_schedule",
    "class_attention",
    "class_scores",
    "current_backend",
    "embed_patches",
    "exit_head",
    "gather_tokens",
    "halt_tokens",
    "masked_attention",
    "merge_patches",
    "merge_tokens",
    "ragged_attention",
    "ragged_layer_norm",
    "ragged_linear",
    "ragged_rope",
    "replace_prefix",
    "resolve_layout",
    "rope_table",
    "scatter_back",
    "scatter_into",
    "selected_backend",
    "upsample_argmax",
    "use_backend",
]


def __dir__() -> list[str]:
    """Without the modules that hold the ops; the model layer once it is imported."""
    return [*__all__, "__version__", *(name for name in ("model",) if name in globals())]
