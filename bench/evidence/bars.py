"""All bars of DESIGN.md section 8 against the results of one machine: P1 - P16, measured or not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..kernels import ops_linear, plain_attention
from ..kernels.contenders import BACKWARD, COMPILED, EAGER, FORWARD, OURS, TIGHT
from ..kernels.measure import OPERATIONS
from ..kernels.operation import LARGE_ENOUGH
from ..kernels.schema import NOT_RUN, KernelResult, KernelRow
from ..model.bars import DTYPE, MEASURED_ON, SIZE, Bar, Lookup, ratio_of
from ..model.bars import bars as model_bars
from ..model.registry import DENSE
from ..schema import FAILED, PASSED, Row
from .results import Evidence

LENGTHS = re.compile(r", (\d+) an image")
# What moves that much, and in how many sizes.
MOVERS = Counter(operation.name for operation in OPERATIONS if operation.gpu_only)
STORES_ALL_SCORES = "dense SDPA, math"  # at the bars' lengths never the fastest, so its failure hides nothing
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
        rows = [row for row in result.rows if row.device == MEASURED_ON] if result is not None and counts else []
        self.rows = [row for row in rows if row.gate == PASSED and row.median_ms]
        self._without_time = [row for row in rows if row.gate != PASSED]

    def lacking(
        self, ops: Iterable[str], contenders: Iterable[str], direction: str = FORWARD, length: int | None = None
    ) -> str | None:
        """What is wrong with the rows of these ops and contenders, where there are rows; first of all a failed gate."""
        wanted = {(op, contender, direction) for op in ops for contender in contenders}
        reasons = {FAILED: "", NOT_RUN: ""}
        for row in self._without_time:
            if (row.op, row.contender, row.direction) in wanted and length in (None, length_of(row)):
                reason = f"{row.contender}: {row.problem if row.gate == NOT_RUN else row.gate}"
                reasons[row.gate] = reasons[row.gate] or reason
        return reasons[FAILED] or reasons[NOT_RUN] or None

    def variants(self, op: str) -> list[str]:
        """The sizes at which step_kernels passed and was timed."""
        return [row.variant for row in self.rows if (row.op, row.contender) == (op, OURS)]

    def ratio(self, op: str, variant: str, rival: str) -> float | None:
        """The rival's median over ours, at one of the sizes."""
        medians = {row.contender: row.median_ms for row in self.rows if (row.op, row.variant) == (op, variant)}
        own, other = medians.get(OURS), medians.get(rival)
        return other / own if own and other else None

    def row(self, op: str, contender: str, direction: str = FORWARD, length: int | None = None) -> KernelRow | None:
        for row in self.rows:
            same = (row.op, row.contender, row.direction) == (op, contender, direction)
            if same and (length is None or length_of(row) == length):
                return row
        return None

    def times(
        self, op: str, rivals: Sequence[str], direction: str = FORWARD, length: int | None = None
    ) -> float | None:
        """The fastest rival's median over ours; None where one has failed its gate: the others may be the slower ones."""
        failed = [row for row in self._without_time if row.gate == FAILED and length in (None, length_of(row))]
        strong = set(rivals) - {STORES_ALL_SCORES}
        if any((row.op, row.direction) == (op, direction) and row.contender in strong for row in failed):
            return None
        own = self.row(op, OURS, direction, length)
        others = [self.row(op, rival, direction, length) for rival in rivals]
        medians = [other.median_ms for other in others if other is not None and other.median_ms is not None]
        return None if own is None or own.median_ms is None or not medians else min(medians) / own.median_ms


def _kernel_bars(evidence: Evidence) -> list[Bar]:
    kernels = _Kernels(evidence.kernels)
    varlen, dense = [plain_attention.VARLEN], [rival.name for rival in plain_attention.DENSE]
    wide, equal = "ragged_attention_wide", "ragged_attention_equal"
    what = "ragged_attention forward vs varlen_attn, 0.4k to 4k tokens"
    lacking = kernels.lacking([wide], [OURS, *varlen])
    made = [_bar("P6", what, (1.4, 1.8), kernels.times(wide, varlen), lacking)]
    for name, length, limits in (("1k", 1024, (0.95, 1.05)), ("4k", 4096, (0.85, 1.0))):
        what = f"ragged_attention vs the best dense SDPA, {name} tokens each"
        lacking = kernels.lacking([equal], [OURS, *dense], length=length)
        made.append(_bar("P7", what, limits, kernels.times(equal, dense, length=length), lacking))
    what = "ragged_attention forward + backward vs varlen_attn"
    value, lacking = kernels.times(wide, varlen, BACKWARD), kernels.lacking([wide], [OURS, *varlen], BACKWARD)
    made.append(_bar("P8", what, (1.1, 1.4), value, lacking))
    made += _linear_bars(kernels)
    what = "one exit stage (bench kernels), share of dense (bench model), ViT-L, B=8"
    models = Lookup(evidence.model.rows if evidence.model is not None else ())
    lacking = kernels.lacking(["exit_head"], [OURS]) or models.lacking((DENSE,), "large", 8)
    made.append(_bar("P10", what, (0.01, 0.003), _exit_share(models, kernels), lacking, at_most=True))
    made += _tail_bars(kernels)
    what = "merge and scatter on more than 120 MB, share of the copy bandwidth, the worst one"
    made.append(_bar("P13", what, (0.60, 0.85), _worst_mover(kernels), kernels.lacking(MOVERS, [OURS])))
    return made


def _bar(
    number: str,
    what: str,
    limits: tuple[float, float],
    value: float | None,
    lacking: str | None,
    *,
    at_most: bool = False,
) -> Bar:
    return Bar(number, what, *limits, value, at_most, lacking=None if value is not None else lacking)


def _worst_mover(kernels: _Kernels) -> float | None:
    """None unless each of them was measured: the one that is missing may be the worst."""
    shares: dict[str, list[float]] = {op: [] for op in MOVERS}
    for row in kernels.rows:
        large = row.necessary_bytes > LARGE_ENOUGH and (row.contender, row.direction) == (OURS, FORWARD)
        if row.op in shares and large and row.share_of_copy is not None:
            shares[row.op].append(row.share_of_copy)
    measured = all(len(shares[op]) >= sizes for op, sizes in MOVERS.items())
    return min(map(min, shares.values())) if measured else None


def _linear_bars(kernels: _Kernels) -> list[Bar]:
    """The worst of all layers and numbers of rows M; None unless each of them was measured."""
    fused = (ops_linear.GELU, ops_linear.RESIDUAL)

    def ratios(ops: Sequence[str], rival: str) -> list[float]:
        found = [kernels.ratio(op, variant, rival) for op in ops for variant in kernels.variants(op)]
        expected = sum(operation.name in ops for operation in ops_linear.OPERATIONS)
        measured = [value for value in found if value is not None]
        return measured if len(measured) >= expected else []

    made = []
    for what, ops, rival, limits in (
        ("vs cuBLAS at the same M, 1.6k to 32k", (ops_linear.BIAS,), EAGER, (0.93, 0.98)),
        ("vs cuBLAS and element-wise kernels", fused, EAGER, (1.05, 1.15)),
        ("vs the same compiled, max-autotune", fused, COMPILED, (1.05, 1.15)),
    ):
        value = min(ratios(ops, rival), default=None)
        made.append(_bar("P9", f"ragged_linear {what}", limits, value, kernels.lacking(ops, [OURS, rival])))
    every = (ops_linear.BIAS, *fused)
    tight = ratios(every, TIGHT)
    cost, lacking = 1 / min(tight) if tight else None, kernels.lacking(every, [OURS, TIGHT])
    made.append(_bar("P9", "ragged_linear, what a capacity of 2.5 M costs", (1.03, 1.01), cost, lacking, at_most=True))
    return made


def _exit_share(models: Lookup, kernels: _Kernels) -> float | None:
    """exit_head (its timed call ends in gather_tokens) over the dense model's time: device time of one run, wall time of another."""
    dense, stage = models.row(DENSE, "large", 8), kernels.row("exit_head", OURS)
    if dense is None or dense.median_ms is None or stage is None or stage.median_ms is None:
        return None
    return stage.median_ms / dense.median_ms


def _tail_bars(kernels: _Kernels) -> list[Bar]:
    own = kernels.row("upsample_argmax", OURS)
    memory = None
    if own is not None and own.extra_memory_bytes is not None:
        memory = own.extra_memory_bytes / (8 * 150 * SIZE * SIZE * 4)  # of full-size fp32 logits
    times = kernels.times("upsample_argmax", [COMPILED])
    lacking = [kernels.lacking(["upsample_argmax"], contenders) for contenders in ([OURS, COMPILED], [OURS])]
    what = "upsample_argmax, extra memory, share of full-size fp32 logits"
    return [
        _bar("P12", "upsample_argmax vs compiled PyTorch, default mode", (1.5, 4.0), times, lacking[0]),
        _bar("P12", what, (0.01, 0.01), memory, lacking[1], at_most=True),
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
        ratio = ratio_of(rows.get("dense"), row)
        spread = None
        if ratio is not None and row is not None and row.flop_reduction is not None:
            spread = ratio.times(1 / row.flop_reduction).spread
        made.append(Bar("P15", what, 0.85, 0.95, row.realised if row is not None else None, spread=spread))
    return made
