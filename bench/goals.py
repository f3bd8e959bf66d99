"""What this package wants to reach, as sentences, each held against the rows of one machine; and what the paper's abstract says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .ratios import COPY, DENSE, NOT_MEASURED, Goal, comparisons, fastest, ratio
from .result import Run

OURS, TIGHT, MERGED, EXITS = "step_kernels", "step_kernels, capacity M", "merged", "merged + exits"
GPU = {"device": "cuda", "dtype": "bfloat16"}
CPU = {"device": "cpu", "dtype": "float32", "cores": 2}
LARGE = {"vit": "large", "size": 1024, "batch": 8, "layout": "spread"}
SMALL = {"vit": "small", "size": 512, "batch": 4}
FUSED = ("ragged_linear_gelu", "ragged_linear_residual")
EAGER, COMPILED = ("PyTorch", "PyTorch, in place", "PyTorch, addmm"), ("PyTorch compiled", "PyTorch compiled, addmm")
WIDE, EQUAL = "ragged_attention, wide lengths", "ragged_attention, equal lengths"
BACKENDS = tuple(f"dense SDPA, {backend}" for backend in ("flash", "cuDNN", "efficient", "math"))
MOVERS = tuple(f"{op}, large" for op in ("merge_patches", "merge_tokens", "scatter_back", "scatter_into"))
SIZES = {"vit": ("tiny", "small"), "size": (256, 512), "batch": (1, 2, 3, 4)}
CTS = tuple(f"CTS, {how}" for how in ("SDPA", "scores stored"))
BOTH = tuple(f"{name}, {how}" for name in ("CTS + DToP", "dCTS + DToP") for how in ("SDPA", "scores stored"))


def whole(what: str, goal: float, aim: float, over: str, under: str, *, case: str = "segmenter", **more: Any) -> Goal:
    number, at_most = more.pop("number", "ms"), more.pop("at_most", False)
    where = {**GPU, **LARGE, "command": "--compile", **more}
    sentence = f"GPU, ViT-{where['vit'][0].upper()}, 1024 px, batch {where['batch']}: {what}"
    return Goal(sentence, goal, aim, "model.json", (case,), (over,), (under,), where, number, at_most)


def single(
    what: str, goal: float, aim: float, cases: Sequence[str], over: Sequence[str], under: str = OURS, **more: Any
) -> Goal:
    number, at_most = more.pop("number", "ms"), more.pop("at_most", False)
    return Goal(
        f"GPU: {what}", goal, aim, "kernels.json", tuple(cases), tuple(over), (under,), {**GPU, **more}, number, at_most
    )


def absent(what: str, goal: float, aim: float) -> Goal:
    return Goal(what, goal, aim, at_most=True)


# fmt: off
GOALS = (
    *(whole("merged is as many times as fast as dense", goal, aim, DENSE, "merged, static", batch=batch)
      for batch, goal, aim in ((1, 2.0, 2.3), (8, 2.6, 3.0), (32, 2.8, 3.3))),
    *(whole("merged with exits is as many times as fast as dense", goal, aim, DENSE, "merged + exits, static", batch=batch)
      for batch, goal, aim in ((1, 2.3, 2.6), (8, 3.0, 3.4), (32, 3.2, 3.8))),
    *(whole("exits make merged as many times as fast", 1.10, 1.15, "merged, static", "merged + exits, static", batch=batch)
      for batch in (8, 32)),
    *(whole(f"speed-up of merged with exits over the reduction of FLOPs, against {dense}", goal, aim, dense, "merged + exits, static",
            batch=batch, number="realised")
      for dense in (DENSE, "dense, our kernels") for batch, goal, aim in ((8, 0.78, 0.90), (32, 0.83, 0.97))),
    *(whole("merged is as many times as fast as dense", goal, aim, DENSE, "merged, static", vit=vit)
      for vit, goal, aim in (("base", 2.2, 2.6), ("small", 1.7, 2.2))),
    single("ragged_attention over varlen_attn, lengths 0.4k to 4k", 1.4, 1.8, [WIDE], ["varlen_attn"]),
    *(single(f"ragged_attention over the best dense SDPA, {length} tokens each", goal, aim, [EQUAL], BACKENDS, longest=length)
      for length, goal, aim in ((1024, 0.95, 1.05), (4096, 0.85, 1.0))),
    single("ragged_attention over varlen_attn, forward + backward", 1.1, 1.4, [f"{WIDE}, forward + backward"], ["varlen_attn"]),
    single("ragged_linear over the vendor's matmul at the same rows, the worst size measured", 0.93, 0.98, ["ragged_linear"], EAGER),
    single("ragged_linear and what follows it over matmul and element-wise kernels, the worst size measured", 1.05, 1.15, FUSED, EAGER),
    single("the same over compiled PyTorch", 1.05, 1.15, FUSED, COMPILED),
    single("what a capacity of 2.5 times the rows costs ragged_linear", 1.03, 1.01, ["ragged_linear", *FUSED], [OURS], TIGHT, at_most=True),
    *(whole("an exit stage, share of dense", 0.01, 0.003, OURS, DENSE, case="exit stage", batch=batch, at_most=True) for batch in (8, 32)),
    *(whole("policy, layout and merge, share of dense", 0.05, 0.02, OURS, DENSE, case="policy + layout + merge", batch=batch, at_most=True) for batch in (8, 32)),
    single("upsample_argmax over compiled PyTorch", 1.5, 4.0, ["upsample_argmax"], ["PyTorch compiled"]),
    single("memory of upsample_argmax, share of full-size fp32 logits", 0.01, 0.01, ["upsample_argmax"], [OURS], number="logits", at_most=True),
    single("merging and scattering more than 120 MB, share of a copy's bandwidth, the worst one", 0.60, 0.85, MOVERS, [COPY]),
    *(whole("one graph for all sizes over graphs of exactly these sizes", 0.95, 1.05, "merged + exits, exact-size graph", "merged + exits, static",
            batch=batch) for batch in (1, 8)),
    whole("peak memory of merged with exits, share of dense", 1.0, 0.7, "merged + exits, static", DENSE, number="peak_bytes", at_most=True),
    *(Goal(f"two CPU cores, ViT-S, 512 px, batch 4, layouts given: speed-up of {family} over the reduction of FLOPs", goal, aim, "main.json",
           ("photographs",), (DENSE,), (family,), {**CPU, **SMALL, "command": "--policy given(?!.*--images)"}, "realised")
      for family, goal, aim in ((MERGED, 0.93, 0.97), (EXITS, 0.90, 0.95))),
    Goal("two CPU cores: merged over the fastest form of CTS, the worst size measured", 1.0, 1.2, "peers.json", ("peers",), CTS, ("merged, exact",),
         {**CPU, **SIZES, "layout": "quota"}),
    Goal("two CPU cores: merged with exits over the fastest of CTS + DToP and dCTS + DToP, the worst size measured", 1.0, 1.2, "peers.json", ("peers",), BOTH,
         ("merged + exits, exact",), {**CPU, **SIZES}),
    *(absent(f"GPU: host time from the public {op} to its launch, in microseconds where torch.add takes 1.5", goal, aim)
      for op, goal, aim in (("norm", 37, 25), ("linear", 80, 40), ("attention", 90, 45), ("exit head", 86, 60), ("gather", 27, 20))),
    absent("points of mIoU lost with half of the tokens, real weights and pictures", 2.0, 2.0),
    absent("points of mIoU lost with 30 % of the tokens halted, real weights and pictures", 2.0, 2.0),
)
# The abstract of STEP (arXiv 2509.14165), whose hardware, batch size and baseline are unknown to us: what, as published, family, kind.
FIGURES = (
    ("dCTS: fewer tokens", "2.5x", MERGED, "tokens"),
    ("dCTS: less compute", "2.6x", MERGED, "compute"),
    ("dCTS: throughput", "3.4x", MERGED, "speed"),
    ("STEP: less compute, up to", "4x", EXITS, "compute"),
    ("STEP: inference speed", "1.7x", EXITS, "speed"),
    ("STEP: accuracy lost, at most", "2.0 %", EXITS, "accuracy"),
    ("STEP: tokens halted before the last layer, up to", "40 %", EXITS, "halted"),
)
COLUMNS = {  # title: file, case, what is added to the family's name, conditions
    "ours, ViT-L, 1024 px, batch 8, GPU": ("model.json", "segmenter", ", static", {**GPU, **LARGE}),
    "ours, ViT-S, 512 px, batch 4, CPU": ("main.json", "photographs", "", {"device": "cpu", **SMALL}),
}
# fmt: on


def ours(kind: str, family: str, runs: Mapping[str, Run]) -> dict[str, str]:
    """Title of the column -> the same figure as we have it."""
    found = {}
    for title, (file, case, mode, where) in COLUMNS.items():
        rows = next(comparisons(runs.get(file), (case,), where), [])
        row, dense = fastest(rows, (family + mode,)), fastest(rows, (DENSE,))
        if row is None or dense is None or kind == "accuracy":
            found[title] = NOT_MEASURED
        elif kind == "tokens":
            found[title] = f"{(row.shape['size'] // 16) ** 2 / row.facts['tokens_mean']:.2f}x (a setting)"
        elif kind == "halted":
            found[title] = f"{row.facts['halted_share']:.0%} (a setting)"
        else:
            found[title] = (
                f"{(dense.gflops or 0) / (row.gflops or 1) if kind == 'compute' else ratio(dense, row, 'ms')[0]:.2f}x"
            )
    return found
