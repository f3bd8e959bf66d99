"""What this package wants to reach, as sentences, each held against the rows of one machine; and what the paper's abstract says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .result import COPY, DENSE, NOT_MEASURED, Row, Run, comparisons, counts, flop_reduction, ratio, speedup


def fastest(rows: Iterable[Row], contenders: Sequence[str]) -> Row | None:
    own = [row for row in rows if row.contender in contenders and counts(row)]
    return min(own, key=lambda row: row.median_ms or 0, default=None)


@dataclass(frozen=True)
class Goal:
    """One sentence with a number: that of `over` divided by that of `under`, the fastest contenders of these names; the worst case counts."""

    what: str
    goal: float  # to be reached
    aim: float  # hoped for
    cases: Sequence[str]
    over: Sequence[str]
    under: Sequence[str]
    where: Mapping[str, Any] = field(default_factory=dict)  # see `matching`
    number: str = "ms"  # or "realised", times over FLOPs; "peak" of memory; "logits": peak over that of fp32 logits
    at_most: bool = False  # less is better

    def measured(self, runs: Iterable[Run]) -> str:
        """The worst value with what p20 and p80 make of it, or why there is none."""
        found, cases = list[tuple[float, float, float]](), set[str]()
        for rows in matching(runs, self.cases, self.where):
            own = [row for row in rows if row.contender in (*self.over, *self.under)]
            over, under = fastest(own, self.over), fastest(own, self.under)
            if over is None or under is None or any(row.failed for row in own):
                wrong = next((row for row in own if not counts(row)), None)
                return f"{NOT_MEASURED}: {wrong.contender}: {wrong.problem or wrong.gate}" if wrong else NOT_MEASURED
            found.append(ratio(over, under, self.number))
            cases.add(over.case)
        if cases != set(self.cases):  # the one that is missing may be the worst
            return NOT_MEASURED
        value, low, high = (max if self.at_most else min)(found)
        return f"{value:.3g}" + (f" ({low:.3g} - {high:.3g})" if low != high else "")


def matching(runs: Iterable[Run], cases: Sequence[str], where: Mapping[str, Any]) -> Iterator[list[Row]]:
    """Comparisons of these cases with this shape, device, dtype, cores and flags; one of several in a tuple."""
    for run in runs:
        flags = {flag: flag in run.command for flag in ("--compile", "--policy given", "--images")}
        for rows in comparisons(run.rows):
            row = rows[0]
            known = {**row.shape, **flags, "device": row.device, "dtype": row.dtype, "cores": run.environment["cores"]}
            wanted = ((known.get(key), one if isinstance(one, tuple) else (one,)) for key, one in where.items())
            if row.case in cases and all(value in values for value, values in wanted):
                yield rows


OURS, TIGHT, MERGED, EXITS = "step_kernels", "step_kernels, capacity M", "merged", "merged + exits"
FAST, FASTEST = f"{MERGED}, static", f"{EXITS}, static"
GPU = {"device": "cuda", "dtype": "bfloat16"}
CPU = {"device": "cpu", "dtype": "float32", "cores": 2}
LARGE = {"vit": "large", "size": 1024, "batch": 8, "layout": "spread"}
SMALL = {"vit": "small", "size": 512, "batch": 4}
SIZES = {"vit": ("tiny", "small"), "size": (256, 512), "batch": (1, 2, 3, 4)}
LINEAR, FUSED = ["ragged_linear"], ["ragged_linear_gelu", "ragged_linear_residual"]
EAGER, COMPILED = ("PyTorch", "PyTorch, in place", "PyTorch, addmm"), ("PyTorch compiled",)
FLASH, FA3 = "varlen_attn, flash", ("FlashAttention 3", "FlashAttention 3, fa3-fwd")
WIDE, EQUAL = "ragged_attention, wide lengths", "ragged_attention, equal lengths"
BACKENDS = tuple(f"dense SDPA, {backend}" for backend in ("flash", "cuDNN", "efficient", "math"))
MOVERS = tuple(f"{op}, large" for op in ("merge_patches", "merge_tokens", "scatter_back", "scatter_into"))
CTS, CTS_DTOP, DCTS_DTOP = (
    (f"{name}, SDPA", f"{name}, scores stored") for name in ("CTS", "CTS + DToP", "dCTS + DToP")
)


def whole(what: str, goal: float, aim: float, over: str, under: str, *, case: str = "segmenter", **more: Any) -> Goal:
    kind = {key: more.pop(key) for key in ("number", "at_most") if key in more}
    where = {**GPU, **LARGE, "--compile": True, **more}
    sentence = f"GPU, ViT-{where['vit'][0].upper()}, 1024 px, batch {where['batch']}: {what}"
    return Goal(sentence, goal, aim, [case], [over], [under], where, **kind)


def single(what: str, goal: float, aim: float, cases: Sequence[str], over: Sequence[str], **kind: Any) -> Goal:
    return Goal(
        f"GPU: {what}", goal, aim, cases, over, kind.pop("under", [OURS]), {**GPU, **kind.pop("where", {})}, **kind
    )


# fmt: off
GOALS = (
    *(whole("merged is as many times as fast as dense", goal, aim, DENSE, FAST, batch=batch)
      for batch, goal, aim in ((1, 2.0, 2.3), (8, 2.6, 3.0), (32, 2.8, 3.3))),
    *(whole("merged with exits is as many times as fast as dense", goal, aim, DENSE, FASTEST, batch=batch)
      for batch, goal, aim in ((1, 2.3, 2.6), (8, 3.0, 3.4), (32, 3.2, 3.8))),
    *(whole("exits make merged as many times as fast", 1.10, 1.15, FAST, FASTEST, batch=batch) for batch in (8, 32)),
    *(whole(f"speed-up of merged with exits over the reduction of FLOPs, against {dense}", goal, aim, dense, FASTEST, batch=batch, number="realised")
      for dense in (DENSE, "dense, our kernels") for batch, goal, aim in ((8, 0.78, 0.90), (32, 0.83, 0.97))),
    *(whole("merged is as many times as fast as dense", goal, aim, DENSE, FAST, vit=vit)
      for vit, goal, aim in (("base", 2.2, 2.6), ("small", 1.7, 2.2))),
    *(single(f"ragged_attention over {name}, lengths 0.4k to 4k", goal, aim, [WIDE], over)
      for name, over, goal, aim in (("varlen_attn, flash", [FLASH], 1.4, 1.8), ("varlen_attn, cuDNN", ["varlen_attn, cuDNN"], 0.9, 1.0), ("FlashAttention 3", FA3, 0.8, 1.0))),
    single("ragged_attention, its rows tuned, over the fastest of all these and FlashAttention 4", 0.98, 1.0, [WIDE], [FLASH, "varlen_attn, cuDNN", *FA3, "FlashAttention 4"]),
    *(single(f"ragged_attention over the best dense SDPA, {length} tokens each", goal, aim, [EQUAL], BACKENDS, where={"longest": length})
      for length, goal, aim in ((1024, 0.95, 1.05), (4096, 0.85, 1.0))),
    single("ragged_attention over varlen_attn, flash, forward + backward", 1.1, 1.4, [f"{WIDE}, forward + backward"], [FLASH]),
    single("ragged_linear over the vendor's matmul at the same rows, the worst size measured", 0.93, 0.98, LINEAR, EAGER),
    single("ragged_linear and what follows it over matmul and element-wise kernels, the worst size measured", 1.05, 1.15, FUSED, EAGER),
    single("the same over compiled PyTorch", 1.05, 1.15, FUSED, COMPILED),
    single("what a capacity of 2.5 times the rows costs ragged_linear", 1.03, 1.01, LINEAR + FUSED, [OURS], under=[TIGHT], at_most=True),
    single("upsample_argmax over compiled PyTorch", 1.5, 4.0, ["upsample_argmax"], ["PyTorch compiled"]),
    single("memory of upsample_argmax, share of full-size fp32 logits", 0.01, 0.01, ["upsample_argmax"], [OURS], number="logits", at_most=True),
    single("merging and scattering more than 120 MB, share of a copy's bandwidth, the worst one", 0.60, 0.85, MOVERS, [COPY]),
    *(whole("one graph for all sizes over graphs of exactly these sizes", 0.95, 1.05, f"{EXITS}, exact-size graph", FASTEST, batch=batch)
      for batch in (1, 8)),
    whole("peak memory of merged with exits, share of dense", 1.0, 0.7, FASTEST, DENSE, number="peak", at_most=True),
    *(Goal(f"two CPU cores, ViT-S, 512 px, batch 4, layouts given: speed-up of {family} over the reduction of FLOPs", goal, aim,
           ["photographs"], [DENSE], [family], {**CPU, **SMALL, "--policy given": True, "--images": False}, "realised")
      for family, goal, aim in ((MERGED, 0.93, 0.97), (EXITS, 0.90, 0.95))),
    Goal("two CPU cores: merged over the fastest form of CTS, the worst size measured", 1.0, 1.2,
         ["peers"], CTS, [f"{MERGED}, exact"], {**CPU, **SIZES, "layout": "quota"}),
    Goal("two CPU cores: merged with exits over the fastest of CTS + DToP and dCTS + DToP, the worst size measured", 1.0, 1.2,
         ["peers"], CTS_DTOP + DCTS_DTOP, [f"{EXITS}, exact"], {**CPU, **SIZES}),
)
# fmt: on
NOT_BY_BENCH = (
    "Not measured by bench as such, but to be read off the traces of `bench model --profile`: an exit stage is to take at most 1 % of the dense "
    'model\'s time, policy, layout and merge together at most 5 % (hoped for: 0.3 and 2). The column "host us" of `bench kernels`, from the public op to its launch, where torch.add takes 1.5, is to be at most '
    "37 for the norm, 80 for linear, 90 for attention, 86 for the exit head and 27 for gather (hoped for: 25, 40, 45, 60, 20). Not measured by bench: with real weights "
    "and pictures, half of the tokens merged or 30 % of them halted is to lose at most 2.0 points of mIoU each."
)
# The abstract of STEP (arXiv 2509.14165), whose hardware, batch size and baseline are unknown to us, as published.
FIGURES = {
    "dCTS: fewer tokens": "2.5x",
    "dCTS: less compute": "2.6x",
    "dCTS: throughput": "3.4x",
    "STEP: less compute, up to": "4x",
    "STEP: inference speed": "1.7x",
    "STEP: accuracy lost, at most": "2.0 %",
    "STEP: tokens halted before the last layer, up to": "40 %",
}
COLUMNS = {  # title: case, merged, merged with exits, conditions
    "ours, ViT-L, 1024 px, batch 8, GPU": ("segmenter", FAST, FASTEST, {**GPU, **LARGE}),
    "ours, ViT-S, 512 px, batch 4, CPU": ("photographs", MERGED, EXITS, {"device": "cpu", **SMALL}),
}


def ours(runs: Iterable[Run], case: str, merged: str, exits: str, where: dict[str, Any]) -> list[str]:
    """The figures of the abstract as we have them, under the conditions of a column."""
    rows = next(matching(runs, [case], where), [])
    dense, dcts, step = (fastest(rows, [name]) for name in (DENSE, merged, exits))
    if dense is None or dcts is None or step is None:
        return [NOT_MEASURED] * len(FIGURES)
    tokens = f"{(dcts.shape['size'] // 16) ** 2 / dcts.facts['tokens_mean']:.2f}x (a setting)"
    compute, speed = ([f"{of(row, dense) or 0:.2f}x" for row in (dcts, step)] for of in (flop_reduction, speedup))
    halted = f"{step.facts['halted_share']:.0%} (a setting)"
    return [tokens, compute[0], speed[0], compute[1], speed[1], NOT_MEASURED, halted]
