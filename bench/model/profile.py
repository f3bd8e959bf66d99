"""Where the time goes: a call's device time by part, told from the names of its kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The first pattern that is found decides. Ours first: their names are known; then those of vendors and of Inductor.
PARTS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|flash|fmha|sdpa|cross_attention"),
    ("exits", r"head_kernel|compact_kernel|decide_kernel|keep_kernel|gather_kernel"),
    ("layout and merge", r"count_kernel|scan_kernel|write_kernel|merge_patches|reduce_blocks"),
    ("scatter and tail", r"expand_blocks|label_kernel|upsample|argmax"),
    ("norms", r"layer_norm|layernorm"),
    ("convolutions", r"conv|fprop|implicit|winograd|nchw|nhwc"),
    ("linears", r"linear_kernel|gemm|nvjet|cutlass|addmm|triton_\w*mm\b|_mm_|matmul|cublas"),
    ("copies and fills", r"^mem(cpy|set)"),
)
OTHER = "other"
NOTE = (
    "Device time by the names of kernels: convolutions are the policy network's (of dense, the patch embedding's); what the "
    "compiler has fused is under the first name that it carries, or under other. The profiler stays attached to the driver: "
    "times of a run with --profile may be longer than those of one without."
)


def part_of(name: str) -> str:
    """The part that a kernel belongs to."""
    for part, pattern in PARTS:
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return OTHER


def milliseconds_by_part(events: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Part -> milliseconds of (kernel name, microseconds), in the order of `PARTS`; parts without a kernel are left out."""
    sums: dict[str, float] = {}
    for name, microseconds in events:
        part = part_of(name)
        sums[part] = sums.get(part, 0.0) + microseconds / 1000
    return {part: sums[part] for part in (*(part for part, _ in PARTS), OTHER) if part in sums}
