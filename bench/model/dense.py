"""The baseline: the dense ViT as the most demanding user would run it, no op of step_kernels in it.

With the fastest SDPA backend at this shape, eager and, where it is asked for, compiled as it is and on a GPU with max-autotune; on a GPU
each as a CUDA graph. Whichever is fastest is the baseline.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..clock import device_clock, interleave
from ..engine import Contender, in_one_line
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
    """Chooses the attention, compiles, captures, and races what there is."""

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return plain_upsample_argmax(dense_scores(own.weights, images), own.size)

    images, on_gpu = own.inputs[0], own.device.type == "cuda"
    backend = fastest_attention(predict, images) if on_gpu else None
    forms: dict[str, Run] = {"eager": predict}
    for name in list(MODES)[: 2 if on_gpu else 1] if compile else ():
        # Without gradients whoever calls: a caller in another mode would have it compiled again.
        forms[name] = torch.no_grad()(torch.compile(predict, mode=MODES[name], dynamic=False))
    runs, held, problems = dict[str, Run](), dict.fromkeys(forms, 0), []
    for name, form in forms.items():
        try:
            run = with_backend(backend, form)
            run(images)
            runs[name] = run
            if on_gpu:  # never slower than launching the same kernels
                runs[name], held[name] = captured(run, images)
        except Exception as error:  # without a baseline, nothing would have a speed-up
            problems.append(f"{name}{' as a CUDA graph' * (name in runs)}: {in_one_line(error)}")
    best = fastest({name: functools.partial(run, images) for name, run in runs.items()}, own.device)
    run, form_of = runs[best], best + ", CUDA graph" * (held[best] > 0) + (f", {backend} attention" if backend else "")
    note = "; ".join([form_of, *problems])
    return own.contender(DENSE, lambda number: run(own.inputs[number]), ours=False, note=note, held_bytes=held[best])


def captured(run: Run, images: Tensor) -> tuple[Run, int]:
    """As a CUDA graph, and the memory that it keeps."""
    buffer = images.clone()
    graph = Graphed(functools.partial(run, buffer), images.device)

    def replayed(images: Tensor) -> Tensor:
        buffer.copy_(images)
        result: Tensor = graph()
        return result

    return replayed, graph.held_bytes + buffer.nbytes


def fastest_attention(predict: Run, images: Tensor) -> str | None:
    """The name of the SDPA backend with which the eager model is fastest."""
    runs: dict[str, Callable[[], object]] = {}
    for name in BACKENDS:
        run = functools.partial(with_backend(name, predict), images)
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend is not for this dtype or architecture, before it raises
            run()
            runs[name] = run
    return fastest(runs, images.device) if runs else None


def with_backend(name: str | None, run: Run) -> Run:
    """`run` with an SDPA backend chosen; torch.compile chooses when it traces, so it has to be called like this, too."""
    if name is None:
        return run

    def call(images: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return run(images)

    return call


def fastest(calls: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """The name of the call with the smallest median time in a short race."""
    racers = {name: lambda number, call=call: call() for name, call in calls.items()}
    timed = interleave(racers, device_clock(device), 1, rounds=6) if len(calls) > 1 else {}
    return min(calls, key=lambda name: statistics.median(timed[name].milliseconds or [float("inf")]) if timed else 0)
