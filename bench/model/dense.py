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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..clock import device_clock, interleave
from ..engine import Contender, in_one_line
from ..options import PATCH_SIZE
from ..segmenters import DENSE, Segmenters, plain_upsample_argmax
from .graphs import Graphed

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MODES = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
Run = Callable[[Tensor], Tensor]  # images -> labels


def strongest(segmenters: Segmenters, compile: bool) -> Contender:
    """Chooses the attention, compiles, captures, and races what there is."""
    on_gpu = segmenters.device.type == "cuda"
    backend = fastest_attention(segmenters) if on_gpu else None
    forms, problems = {"eager": with_backend(backend, functools.partial(predict, segmenters))}, []
    for name, mode in list(MODES.items())[: 2 if on_gpu else 1] if compile else ():
        # Without gradients whoever calls: a caller in another mode would have it compiled again.
        compiled = torch.no_grad()(torch.compile(functools.partial(predict, segmenters), mode=mode, dynamic=False))
        forms[name] = with_backend(backend, compiled)
    runs: dict[str, Run] = {}
    held: dict[str, int] = {}
    for name, form in forms.items():
        try:
            form(segmenters.inputs[0])
            runs[name] = form
            if on_gpu:  # never slower than launching the same kernels
                images = segmenters.inputs[0].clone()
                graph = Graphed(functools.partial(form, images), segmenters.device)
                runs[name], held[name] = functools.partial(replayed, graph, images), graph.held_bytes + images.nbytes
        except Exception as error:  # without a baseline, nothing would have a speed-up
            problems.append(f"{name}{'' if name not in runs else ' as a CUDA graph'}: {in_one_line(error)}")
    best = fastest(
        {name: functools.partial(run, segmenters.inputs[0]) for name, run in runs.items()}, segmenters.device
    )
    note = best + (", CUDA graph" if best in held else "") + (f", {backend} attention" if backend else "")
    return segmenters.contender(
        DENSE,
        lambda number: runs[best](segmenters.inputs[number]),
        ours=False,
        note="; ".join([note, *problems]),
        held_bytes=held.get(best, 0),
    )


@torch.no_grad()
def predict(segmenters: Segmenters, images: Tensor) -> Tensor:
    """Labels of images."""
    vit, (height, width) = segmenters.weights.vit, segmenters.size
    tokens = segmenters.weights.decoder.head(vit(images))[:, vit.num_prefix :]
    scores = tokens.transpose(1, 2).unflatten(2, (height // PATCH_SIZE, width // PATCH_SIZE))
    return plain_upsample_argmax(scores, (height, width))


def replayed(graph: Graphed, buffer: Tensor, images: Tensor) -> Tensor:
    buffer.copy_(images)
    result: Tensor = graph()
    return result


def fastest_attention(segmenters: Segmenters) -> str | None:
    """The name of the SDPA backend that is fastest on the dense shape."""
    config, images = segmenters.weights.vit.config, segmenters.inputs[0]
    length = 1 + images.shape[2] * images.shape[3] // PATCH_SIZE**2
    heads = config.num_heads
    qkv = torch.randn(images.shape[0], length, 3, heads, config.embed_dim // heads, device=images.device)
    q, k, v = qkv.to(images.dtype).permute(2, 0, 3, 1, 4).unbind(0)  # strides as the model's
    runs: dict[str, Callable[[], object]] = {}
    for name in BACKENDS:
        run = functools.partial(with_backend(name, lambda query: F.scaled_dot_product_attention(query, k, v)), q)
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend is not for this dtype or architecture, before it raises
            run()
            runs[name] = run
    return fastest(runs, segmenters.device) if runs else None


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
    if len(calls) == 1:
        return next(iter(calls))
    racers = {name: functools.partial(ignoring_number, call) for name, call in calls.items()}
    timed = interleave(racers, device_clock(device), 1, rounds=6)
    return min(timed, key=lambda name: statistics.median(timed[name].milliseconds or [float("inf")]))


def ignoring_number(call: Callable[[], object], number: int) -> object:
    return call()
