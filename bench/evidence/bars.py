"""All bars of DESIGN.md section 8 against the results of one machine: P1 - P16, measured or not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..kernels import plain_attention
from ..kernels.contenders import BACKWARD, COMPILED, FORWARD, OURS
from ..kernels.schema import KernelResult, KernelRow
from ..model.bars import DTYPE, MEASURED_ON, SIZE, Bar, Lookup
from ..model.bars import bars as model_bars
from ..model.registry import DENSE
from ..schema import PASSED, Row
from .results import Evidence

LENGTHS = re.compile(r", (\d+) an image")
LARGE_ENOUGH = 120e6  # bytes that a kernel must move at least for P13: beyond any cache
MOVERS = ("merge_patches", "merge_tokens", "scatter_back", "scatter_into")
P15_SETTINGS = {
    "device": "cpu", "dtype": "float32", "model": "small", "size": 512, "batch": 4, "policy": "given", "images": "scikit-image"
}  # fmt: skip
P15_CORES = 2


def all_bars(evidence: Evidence) -> list[Bar]:
    """Every bar, by number."""
    model = evidence.model.rows if evidence.model is not None else ()
    found = [*model_bars(model), *_kernel_bars(evidence), *_main_job(evidence)]
    return sorted(found, key=lambda bar: int(bar.number.removeprefix("P")))


def length_of(row: KernelRow) -> int | None:
    """Tokens of an image where all have equally many; None where they differ."""
    found = LENGTHS.search(row.variant)
    return int(found.group(1)) if found else None


class _Kernels:
    """The kernel rows that count: a GPU, at the sizes of the bars."""

    def __init__(self, result: KernelResult | None) -> None:
        wanted = {"model": "large", "size": SIZE, "batch": 8, "classes": 150, "dtype": DTYPE}
        counts = result is not None and all(result.settings.get(key) == value for key, value in wanted.items())
        rows = result.rows if result is not None and counts else ()
        self.rows = [row for row in rows if row.device == MEASURED_ON and row.gate == PASSED and row.median_ms]

    def row(self, op: str, contender: str, direction: str = FORWARD, length: int | None = None) -> KernelRow | None:
        for row in self.rows:
            same = (row.op, row.contender, row.direction) == (op, contender, direction)
            if same and (length is None or length_of(row) == length):
                return row
        return None

    def times(
        self, op: str, rivals: Sequence[str], direction: str = FORWARD, length: int | None = None
    ) -> float | None:
        """The fastest rival's median over ours."""
        own = self.row(op, OURS, direction, length)
        others = [self.row(op, rival, direction, length) for rival in rivals]
        medians = [other.median_ms for other in others if other is not None and other.median_ms is not None]
        return None if own is None or own.median_ms is None or not medians else min(medians) / own.median_ms


def _kernel_bars(evidence: Evidence) -> list[Bar]:
    kernels = _Kernels(evidence.kernels)
    varlen, dense = [plain_attention.VARLEN], [rival.name for rival in plain_attention.DENSE]
    wide, equal = "ragged_attention_wide", "ragged_attention_equal"
    made = [
        Bar("P6", "ragged_attention forward vs varlen_attn, 0.4k to 4k tokens", 1.4, 1.8, kernels.times(wide, varlen)),
    ]
    for name, length, bar, aim in (("1k", 1024, 0.95, 1.05), ("4k", 4096, 0.85, 1.0)):
        value = kernels.times(equal, dense, length=length)
        made.append(Bar("P7", f"ragged_attention vs the best dense SDPA, {name} tokens each", bar, aim, value))
    value = kernels.times(wide, varlen, BACKWARD)
    made.append(Bar("P8", "ragged_attention forward + backward vs varlen_attn", 1.1, 1.4, value))
    made += _linear_bars()
    made.append(
        Bar(
            "P10",
            "one exit stage (bench kernels), share of dense (bench model), ViT-L, B=8",
            0.01,
            0.003,
            _exit_share(evidence, kernels),
            True,
        )
    )
    made += _tail_bars(kernels)
    shares = [
        row.share_of_copy
        for row in kernels.rows
        if row.op in MOVERS
        and (row.contender, row.direction) == (OURS, FORWARD)
        and row.necessary_bytes > LARGE_ENOUGH
        and row.share_of_copy is not None
    ]
    what = "merge and scatter on more than 120 MB, share of the copy bandwidth, the worst one"
    made.append(Bar("P13", what, 0.60, 0.85, min(shares, default=None)))
    return made


def _linear_bars() -> list[Bar]:
    """Nothing measures ragged_linear alone yet."""
    return [
        Bar("P9", "ragged_linear vs cuBLAS at the same M", 0.93, 0.98, None),
        Bar("P9", "ragged_linear vs cuBLAS and element-wise kernels", 1.05, 1.15, None),
        Bar("P9", "ragged_linear, what a capacity of 2.5 M costs", 1.03, 1.01, None, True),
    ]


def _exit_share(evidence: Evidence, kernels: _Kernels) -> float | None:
    """exit_head (its timed call ends in gather_tokens) over the dense model's time: device time of one run, wall time of another."""
    dense = Lookup(evidence.model.rows if evidence.model is not None else ()).row(DENSE, "large", 8)
    stage = kernels.row("exit_head", OURS)
    if dense is None or dense.median_ms is None or stage is None or stage.median_ms is None:
        return None
    return stage.median_ms / dense.median_ms


def _tail_bars(kernels: _Kernels) -> list[Bar]:
    own = kernels.row("upsample_argmax", OURS)
    memory = None
    if own is not None and own.extra_memory_bytes is not None:
        memory = own.extra_memory_bytes / (8 * 150 * SIZE * SIZE * 4)  # of full-size fp32 logits
    times = kernels.times("upsample_argmax", [COMPILED])
    return [
        Bar("P12", "upsample_argmax vs compiled PyTorch", 1.5, 4.0, times),
        Bar("P12", "upsample_argmax, extra memory, share of full-size fp32 logits", 0.01, 0.01, memory, True),
    ]


def _main_job(evidence: Evidence) -> list[Bar]:
    result = evidence.main
    rows: dict[str, Row] = {}
    if result is not None:
        asked = all(result.settings.get(key) == value for key, value in P15_SETTINGS.items())
        if asked and result.environment.get("cores") == P15_CORES:
            rows = {row.provider: row for row in result.rows}
    made = []
    for provider in ("merged", "merged + exits"):
        row = rows.get(provider)
        what = f"2-core CPU, ViT-S, 512 px, layouts given, {provider}: realised speed-up / FLOP reduction"
        made.append(Bar("P15", what, 0.85, 0.95, row.realised if row is not None else None))
    return made
