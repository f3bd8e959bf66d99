"""Single ops beside what a good PyTorch user would write instead; `op` makes cases of them, `inputs` what they run on."""

from __future__ import annotations

from collections.abc import Iterator

from ..engine import Case
from ..options import Options
from . import attention, canvas, exits, linear, merging


def cases(options: Options) -> Iterator[Case]:
    """Ops of step_kernels at the first of the run's sizes, forward, and forward + backward where they have a gradient."""
    for ops in (attention, linear, merging, canvas, exits):  # where time is short, the first say most
        yield from ops.cases(options)
