"""PyTorch's own parts once more, the blocks in CUDA graphs that are recorded for buckets of sizes.

A CUDA graph has fixed sizes, so packed tokens are padded to the next bucket: one graph for the blocks before an exit and one for those
after it, in each pair of buckets (packed rows, longest image) that occurs. Heads and log-probabilities are in the graphs, too. What
depends on the data stays between them, as in `bench.model.parts`: policy, layout and merge in front, compaction at the exit, scattering
and tail at the end, with the host waiting for the sizes of each segment.

Padding never meets a live row. varlen_attn works on the rows that `cu_seqlens` names and leaves the others of its result
uninitialised (NaN for all one knows); everything else in a segment is row by row; and only live rows are read afterwards. The longest
image is a number of the host that sets the attention's launch grid: one that is too large costs empty tiles, which end at once.

Graphs are recorded when a bucket first occurs, for the recorded inputs before the clock starts. A user whose images vary more would
record more of them, up to 16 for each doubling of the rows times 4 for each doubling of the longest image, and wait for a recording
now and then. Beyond this a user could compile the blocks for each bucket, which fuses norms, GELU and residuals, and put the
policy's convolutions into a graph as well; neither is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from step_kernels import SupertokenLayout
from step_kernels.model.graph.cuda_graph import GraphPool

from ..kernels import plain_attention
from ..kernels.examples import Example
from .case import MERGED_EXITS, Case
from .graphs import Replayed, largest_first
from .parts import PartsModel, Segment
from .registry import Built

TILE = 128  # rows of a matmul's tile, and of the attention's: finer buckets would save nothing
ROWS_WASTE, LONGEST_WASTE = 1 / 16, 1 / 4
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def bucketed_parts(case: Case) -> Built:
    """Builder.

    Raises:
        Unavailable: varlen_attn does not run here.
    """
    runner = BucketedRunner(case, find_varlen(case))
    model = PartsModel(case, runner)
    traces = case.decisions(MERGED_EXITS)
    for number in largest_first(traces):
        model.scores(case.inputs[number], traces[number])
    return model.built(
        f"{plain_attention.VARLEN}, {runner.describe()}",
        seconds=runner.seconds,
        held_bytes=runner.held_bytes,
        note="graphs for the sizes of these inputs alone, recorded before the clock",
    )


def find_varlen(case: Case) -> VarlenAttention:
    """`torch.nn.attention.varlen.varlen_attn`.

    Raises:
        Unavailable: it does not run on this device or dtype, or this PyTorch has none.
    """
    plain_attention.varlen(Example(case.traces[0].layout, {"q": case.inputs[0]}))
    from torch.nn.attention.varlen import varlen_attn

    return cast(VarlenAttention, varlen_attn)  # without the options that change what it returns


def bucket_of(count: int, waste: float) -> int:
    """The smallest bucket that holds `count`: a multiple of `TILE`, above it by at most `waste` of it or by less than one tile."""
    step = max(TILE, (1 << int(count * waste).bit_length()) >> 1)
    return -(-count // step) * step


class BucketedRunner:
    """Runs segments as replays of graphs, recorded when a bucket first occurs. What it returns holds until the next call.

    All graphs read the same input, share one memory pool, and never run at once.

    Args:
        case: the comparison.
        attention: `varlen_attn`.
    """

    def __init__(self, case: Case, attention: VarlenAttention) -> None:
        self._attention, self._device = attention, case.device
        most = bucket_of(case.batch * case.uniform.max_seqlen, ROWS_WASTE)
        # Zeros: rows that no call has filled yet are read as padding.
        self._tokens = torch.zeros(most, case.weights.vit.embed_dim, device=case.device, dtype=case.inputs[0].dtype)
        self._cu_seqlens = torch.zeros(case.batch + 1, device=case.device, dtype=torch.int32)
        self._pool = GraphPool()
        self._graphs: dict[tuple[Segment, int, int], Replayed] = {}
        self._live = self._padded = 0

    def __call__(self, segment: Segment, tokens: Tensor, layout: SupertokenLayout) -> tuple[Tensor, Tensor]:
        """Tokens after the blocks and their log-probabilities, live rows only."""
        live = tokens.shape[0]
        rows, longest = bucket_of(live, ROWS_WASTE), bucket_of(int(layout.lengths().max()), LONGEST_WASTE)
        self.fill(tokens, layout.cu_seqlens)
        key = segment, rows, longest
        if key not in self._graphs:
            self._graphs[key] = Replayed(lambda: self._launch(*key), self._device, pool=self._pool)
        self._live += live * len(segment.blocks)
        self._padded += rows * len(segment.blocks)
        after, log_probabilities = self._graphs[key]()
        return after[:live], log_probabilities[:live]

    def fill(self, tokens: Tensor, cu_seqlens: Tensor) -> None:
        """The graphs' input; rows past the live ones keep what earlier calls have left there."""
        self._tokens[: tokens.shape[0]].copy_(tokens)
        self._cu_seqlens.copy_(cu_seqlens)

    @property
    def seconds(self) -> float:
        """Spent on recording so far."""
        return sum(graph.seconds for graph in self._graphs.values())

    @property
    def held_bytes(self) -> int:
        """Device memory of the graphs and their input."""
        pool = sum(graph.memory_bytes for graph in self._graphs.values())
        return pool + self._tokens.nbytes + self._cu_seqlens.nbytes

    def describe(self) -> str:
        """How many graphs there are, and by how much their rows exceed the live ones, mean over the blocks of all calls so far."""
        return f"{len(self._graphs)} CUDA graphs in buckets of sizes, {self._padded / self._live - 1:.1%} padding"

    def _launch(self, segment: Segment, rows: int, longest: int) -> tuple[Tensor, Tensor]:
        cu_seqlens = self._cu_seqlens

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

        return segment(self._tokens[:rows], attend)
