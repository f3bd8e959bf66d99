"""Where the time goes: a call's time by part, told from the names of device kernels, or on a CPU of ops."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..report import _number

# The first pattern that is found decides. Ours first: their names are known; then those of vendors and of Inductor.
PARTS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|flash|fmha|sdpa|cross_attention"),
    (
        "exits",
        r"head_kernel|compact_kernel|decide_kernel|keep_kernel|gather_kernel|::(halt_tokens|exit_head|gather_tokens)",
    ),
    (
        "layout and merge",
        r"count_kernel|scan_kernel|write_kernel|merge_patches|reduce_blocks"
        r"|::(resolve_layout|layout_from_sides|from_sides|embed_patches|merge_tokens)",
    ),
    ("scatter and tail", r"expand_blocks|label_kernel|upsample|argmax|::scatter_(back|into)"),
    ("norms", r"layer_norm|layernorm"),
    ("convolutions", r"conv|fprop|implicit|winograd|nchw|nhwc"),
    ("linears", r"linear|gemm|nvjet|cutlass|addmm|triton_\w*mm\b|_mm_|matmul|cublas|::b?mm\b"),
    ("copies and fills", r"^mem(cpy|set)|::(copy_|fill_|zero_|clone|cat)\b"),
)
OTHER = "other"
NOTES = {
    "cuda": "Device time by the names of kernels: convolutions are the policy network's (of dense, the patch embedding's); what the "
    "compiler has fused is under the first name that it carries, or under other. The profiler stays attached to the driver: "
    "times of a run with --profile may be longer than those of one without.",
    "cpu": "Where the time goes, on a CPU: one profiled call on the first input after the clock, by the names of ops; what an op of "
    "step_kernels calls counts as that op, so layout and merge has the patch embedding's matmul, which is a convolution in dense. "
    "The parts' sum is that call's, not the median.",
}


def part_of(name: str) -> str:
    """The part that a kernel or an op belongs to."""
    for part, pattern in PARTS:
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return OTHER


def milliseconds_by_part(events: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Part -> milliseconds of (name, microseconds), in the order of `PARTS`; parts without a kernel are left out."""
    sums: dict[str, float] = {}
    for name, microseconds in events:
        part = part_of(name)
        sums[part] = sums.get(part, 0.0) + microseconds / 1000
    return {part: sums[part] for part in (*(part for part, _ in PARTS), OTHER) if part in sums}


def profile_lines(profile: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Where the time goes: one line per contender."""
    return [
        f"{name}: "
        + ", ".join(f"{part} {_number(ms)} ms ({ms / sum(parts.values()):.0%})" for part, ms in parts.items())
        for name, parts in profile.items()
    ]
