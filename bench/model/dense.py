"""The baseline: the dense ViT as the most demanding user would run it, no op of step_kernels in it.

With the fastest SDPA backend at this shape, eager and, where it is asked for, compiled as it is and on a GPU with max-autotune; on a GPU
each as a CUDA graph. Whichever is fastest is the baseline.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..clock import device_clock, interleave
from ..engine import Contender, NotRun, in_one_line
from ..segmenters import DENSE, Segmenters, dense_scores, plain_upsample_argmax
from .graphs import Graphed

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MODES = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
Run = Callable[[Tensor], Tensor]


def strongest(own: Segmenters, compile: bool) -> Contender:
    """Chooses the attention, compiles, captures, and races what there is; NotRun where nothing runs, and why."""

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return plain_upsample_argmax(dense_scores(own.weights, images), own.size)

    images, on_gpu = own.inputs[0], own.device.type == "cuda"
    attentions = {name: sdpa_kernel(backend)(predict) for name, backend in BACKENDS.items()}
    attention = fastest(attentions, images) if on_gpu else None
    runs, held, problems = dict[str, Run](), dict[str, int](), []
    for name in ["eager", *(list(MODES)[: 2 if on_gpu else 1] if compile else ())]:
        # Without gradients whoever calls: a caller in another mode would have it compiled again.
        mode = MODES.get(name)
        form = torch.no_grad()(torch.compile(predict, mode=mode, dynamic=False)) if mode else predict
        # Around the compiled function: the compiler chooses a backend when it traces.
        run = sdpa_kernel(BACKENDS[attention])(form) if attention else form
        try:
            run(images)
            runs[name], held[name] = run, 0
            if on_gpu:  # never slower than launching the same kernels
                buffer = images.clone()
                runs[name] = graph = Graphed(functools.partial(run, buffer), buffer)
                held[name] = graph.held_bytes + buffer.nbytes
        except Exception as error:  # without a baseline, nothing would have a speed-up
            problems.append(f"{name}{' as a CUDA graph' * (name in runs)}: {in_one_line(error)}")
    best = fastest(runs, images)
    if best is None:
        raise NotRun("; ".join(problems))
    what = best + ", CUDA graph" * (held[best] > 0) + (f", {attention} attention" if attention else "")
    note, chosen = "; ".join([what, *problems]), runs[best]
    return own.contender(DENSE, lambda number: chosen(own.inputs[number]), ours=False, note=note, held_bytes=held[best])


def fastest(runs: Mapping[str, Run], images: Tensor) -> str | None:
    """The name of the run with the smallest median time in a short race; None where none runs."""
    if len(runs) == 1:
        return next(iter(runs))
    racers = {name: lambda number, run=run: run(images) for name, run in runs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why an SDPA backend is not for this dtype or architecture, before it raises
        timed = interleave(racers, device_clock(images.device), 1, rounds=6)
    medians = {name: statistics.median(one.milliseconds) for name, one in timed.items() if one.problem is None}
    return min(medians, key=lambda name: medians[name], default=None)
