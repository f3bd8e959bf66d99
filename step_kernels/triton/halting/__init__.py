"""One exit stage: head or decision, compaction of the survivors, their rows."""

from .launch import exit_head, gather_tokens, gather_tokens_backward, halt_tokens

__all__ = ["exit_head", "gather_tokens", "gather_tokens_backward", "halt_tokens"]
