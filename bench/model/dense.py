"""The baseline: the dense ViT as the most demanding user would run it, no op of step_kernels in it.

The SDPA backend is the fastest at this shape. The whole prediction, output tail included, goes through torch.compile, as it is and on a
GPU with max-autotune, and runs launched kernel by kernel or as a CUDA graph, whichever of these is fastest. The row says where there was
no time for max-autotune; eager where compiling is not possible or its budget is used up, and then the row says that.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from step_kernels.model import LinearDecoder, ViT

from ..kernels.contenders import COMPILE_MODE, compiled_when_called, in_one_line
from ..kernels.plain import upsample_argmax
from ..kernels.plain_attention import BACKENDS
from .case import Case
from .graphs import Graphed, Outputs, fastest
from .registry import UNSEARCHED, Built

EAGER = "eager"
# By the name of the form. CUDA graphs are made here, not by the compiler.
COMPILE_MODES = {
    "cuda": {"compiled": "default", "max-autotune": COMPILE_MODE["cuda"]},
    "cpu": {"compiled": COMPILE_MODE["cpu"]},
}


@dataclass(frozen=True)
class Strongest:
    """The fastest way to run the dense model at one batch size."""

    run: Callable[[Tensor], Outputs]
    variant: str
    compile_seconds: float | None
    held_bytes: int
    problem: str | None


def dense(case: Case) -> Built:
    """Builder of the baseline; compiled once for all kinds of layouts, which are the same to it."""
    best: Strongest = case.weights.kept.get(("dense", case.batch)) or strongest(case)
    case.weights.kept["dense", case.batch] = best
    return Built(
        labels=lambda number: best.run(case.inputs[number])[1],
        scores=lambda number: best.run(case.inputs[number])[0],
        variant=best.variant,
        compile_seconds=best.compile_seconds,
        held_bytes=best.held_bytes,
        note=best.problem,
    )


def strongest(case: Case) -> Strongest:
    """Chooses the attention, compiles, captures, and races what there is."""
    predict, images = dense_prediction(case.weights.vit, case.weights.decoder), case.inputs[0]
    backend = fastest_attention(case)
    spent = case.compiling.spent
    launched, problem, unsearched = compiled_forms(case, predict, backend)
    seconds = case.compiling.spent - spent
    runs, broken = dict(launched), []
    for name, run in launched.items() if case.static else ():
        try:
            runs[f"{name}, CUDA graph"] = Graphed(run, images)
        except RuntimeError as error:  # no memory for it, say: without a baseline, nothing would have a speed-up
            broken.append(f"no CUDA graph: {in_one_line(error)}")
    if len(broken) == len(launched):
        problem = "; ".join(filter(None, (problem, *broken)))
    best = fastest({name: functools.partial(run, images) for name, run in runs.items()}, case.device)
    chosen = runs[best]
    return Strongest(
        chosen,
        ", ".join(filter(None, (best, backend and f"{backend} attention", unsearched))),
        None if EAGER in launched else seconds,
        chosen.memory_bytes if isinstance(chosen, Graphed) else 0,
        problem,
    )


def compiled_forms(
    case: Case, predict: Callable[[Tensor], Outputs], backend: str | None
) -> tuple[dict[str, Callable[[Tensor], Outputs]], str | None, str | None]:
    """What runs, by name; why that is not compiled; and why the compiler has not searched as long as it can.

    The quick form first, as baselines that are still to come need theirs; the search takes what those leave.
    """
    forms: dict[str, Callable[[Tensor], Outputs]] = {}
    for name, mode in COMPILE_MODES[case.device.type].items():
        # Always without gradients, or a caller with another mode, the graph for one, would have it compiled again, outside of the budget.
        compiled = torch.no_grad()(compiled_when_called(predict, mode=mode, dynamic=False))
        run = with_backend(backend, compiled)
        problem = case.compiling.spend(functools.partial(run, case.inputs[0]), baseline=not forms)
        if problem is not None:
            if forms:
                return forms, None, f"{UNSEARCHED} ({problem})"
            return {EAGER: with_backend(backend, predict)}, problem, None
        forms[name] = run
    return forms, None, None


def dense_prediction(vit: ViT, decoder: LinearDecoder) -> Callable[[Tensor], Outputs]:
    """images -> class scores [batch, classes, rows, cols] and labels at image size."""

    @torch.no_grad()
    def predict(images: Tensor) -> Outputs:
        tokens = decoder.head(vit(images))[:, vit.num_prefix :]
        grid = images.shape[2] // vit.patch_size, images.shape[3] // vit.patch_size
        scores = tokens.transpose(1, 2).unflatten(2, grid)
        return scores, upsample_argmax(scores, (images.shape[2], images.shape[3]))

    return predict


def fastest_attention(case: Case) -> str | None:
    """The name of the SDPA backend that is fastest on this case's dense shape; None on a CPU, which has one."""
    if case.device.type != "cuda":
        return None
    heads, dim = case.weights.vit.config.num_heads, case.weights.vit.embed_dim
    length = case.uniform.max_seqlen
    qkv = torch.randn(case.batch, length, 3, heads, dim // heads, device=case.device, dtype=case.inputs[0].dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # strides as the model's

    def attend(backend: SDPBackend) -> Callable[[], object]:
        return with_backend_of(backend, lambda: F.scaled_dot_product_attention(q, k, v))

    runs = {}
    for name, backend in BACKENDS.items():
        if backend is SDPBackend.MATH:
            continue  # stores all scores: never the fastest, and at this size seldom in memory
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend is not for this dtype or architecture, before it raises
            attend(backend)()
            runs[name] = attend(backend)
    return fastest(runs, case.device) if runs else None


def with_backend(name: str | None, run: Callable[[Tensor], Outputs]) -> Callable[[Tensor], Outputs]:
    """`run` with an SDPA backend chosen; torch.compile chooses when it traces, so it has to be called like this, too."""
    if name is None:
        return run

    def call(images: Tensor) -> Outputs:
        with sdpa_kernel(BACKENDS[name]):
            return run(images)

    return call


def with_backend_of(backend: SDPBackend, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with sdpa_kernel(backend):
            return run()

    return call
