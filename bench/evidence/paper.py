"""What others have published, and where ours stands beside it. Nothing here was measured by this package but what `ours` says."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.bars import Lookup
from ..model.registry import DENSE, EXITS_STATIC, MERGED_STATIC
from ..schema import PASSED, Row
from .results import Evidence

NOT_MEASURED = "not measured"
MODEL, SIZE, BATCH = "large", 1024, 8  # the abstract's: ViT-L at up to 1024 px; it names no batch size
TOKENS, COMPUTE, SPEED, ACCURACY, HALTED = "tokens", "compute", "speed", "accuracy", "halted"
DCTS, STEP = "merged", "merged + exits"


@dataclass(frozen=True)
class Figure:
    """One figure of the abstract of STEP (arXiv 2509.14165), whose hardware, batch size and baseline are unknown to us.

    Attributes:
        what: in words.
        published: as written there.
        family: the contenders that it is about.
        kind: which column of a row it is.
    """

    what: str
    published: str
    family: str
    kind: str


FIGURES = (
    Figure("dCTS: fewer tokens", "2.5x", DCTS, TOKENS),
    Figure("dCTS: less compute", "2.6x", DCTS, COMPUTE),
    Figure("dCTS: throughput", "3.4x", DCTS, SPEED),
    Figure("STEP: less compute, up to", "4x", STEP, COMPUTE),
    Figure("STEP: inference speed", "1.7x", STEP, SPEED),
    Figure("STEP: accuracy lost, at most", "2.0 %", STEP, ACCURACY),
    Figure("STEP: tokens halted before the last layer, up to", "40 %", STEP, HALTED),
)

# TFLOP/s of bf16 attention forward, head_dim 64, not causal, on an H100, at 1k, 2k and 4k tokens.
ANCHOR_LENGTHS = (1024, 2048, 4096)
ANCHORS = {
    "FlashAttention-2": (306, 318, 321),
    "Triton tutorial kernel": (382, 396, 400),
    "cuDNN (2024)": (373, 395, 408),
    "FlashAttention-3": (392, 460, 476),
}
ANCHOR_TAG = "published, H100"


def ours(figure: Figure, evidence: Evidence) -> str:
    """The same figure of ViT-L at 1024 px on a GPU, spread layouts, a batch of 8; or "not measured"; speed as P1 and P2 have it."""
    found = Lookup(evidence.model.rows if evidence.model is not None else ())
    contender = MERGED_STATIC if figure.family == DCTS else EXITS_STATIC
    row, speed = found.row(contender, MODEL, BATCH), found.ratio(DENSE, contender, MODEL, BATCH)
    if row is None:
        return NOT_MEASURED
    tokens, speedup = (SIZE // 16) ** 2 / row.tokens_mean, None if speed is None else speed.value
    return _value(figure.kind, tokens, row.flop_reduction, speedup, row.halted_share)


def ours_of_the_main_job(figure: Figure, evidence: Evidence) -> str:
    """The same figure of the main job."""
    row = main_row(evidence, figure.family)
    if row is None:
        return NOT_MEASURED
    return _value(
        figure.kind, (row.size // 16) ** 2 / row.tokens_mean, row.flop_reduction, row.speedup, row.halted_share
    )


def main_row(evidence: Evidence, provider: str) -> Row | None:
    """The main job's row of a contender that passed."""
    rows = evidence.main.rows if evidence.main is not None else ()
    return next((row for row in rows if row.provider == provider and row.gate == PASSED), None)


def _value(kind: str, tokens: float, compute: float | None, speed: float | None, halted: float) -> str:
    if kind == ACCURACY:
        return NOT_MEASURED
    if kind == TOKENS:
        return f"{tokens:.2f}x (a setting)"
    if kind == HALTED:
        return f"{halted:.0%} (a setting)"
    number = compute if kind == COMPUTE else speed
    return NOT_MEASURED if number is None else f"{number:.2f}x"
