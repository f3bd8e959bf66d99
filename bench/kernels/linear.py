"""The linear layers of a transformer block, alone, at three numbers of live rows M.

Every input of one M has exactly that many: a patch grid's cells over the reduction, for an eighth of the run's batch, all of it and two
and a half times as many. On a GPU, step_kernels gets 2.5 times that capacity and, in a row beside, exactly M; quack-kernels' GEMM, where installed,
gets that capacity, too, and M on the device; PyTorch is told M, and is compiled with max-autotune, where the element-wise part may go into a matmul of the compiler's own. FLOPs: 2 M N K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from step_kernels.linear import Activation, ragged_linear

from ..engine import Case, NotRun
from ..layouts import REDUCTION
from ..options import Options
from .inputs import PATCH, Example, Source, of_lengths
from .op import Op, asked

BATCHES = 1 / 8, 1.0, 2.5  # of the run's
ALIGNED = 16  # both capacities and M are multiples of it where there are so many, so that one compiled kernel runs with either
Plain = Mapping[str, Callable[..., Tensor]]
BIAS: Plain = {"PyTorch": lambda x, weight, bias: F.linear(x, weight, bias)}
GELU: Plain = {
    "PyTorch": lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
    "PyTorch, in place": lambda x, weight, bias: torch.ops.aten.gelu_(F.linear(x, weight, bias)),
}
RESIDUAL: Plain = {
    "PyTorch": lambda x, weight, bias, residual: F.linear(x, weight, bias) + residual,
    "PyTorch, in place": lambda x, weight, bias, residual: F.linear(x, weight, bias).add_(residual),
    # The residual as the matmul's own addend; then the bias is what is left to add.
    "PyTorch, addmm": lambda x, weight, bias, residual: torch.addmm(residual, x, weight.T).add_(bias),
}
LAYERS = (  # outputs and inputs in token widths: q, k and v; fc1; the projection after attention; fc2
    ("ragged_linear", BIAS, 3, 1),
    ("ragged_linear_gelu", GELU, 4, 1),
    ("ragged_linear_residual", RESIDUAL, 1, 1),
    ("ragged_linear_residual", RESIDUAL, 1, 4),
)


def cases(options: Options) -> Iterator[Case]:
    for name, plain, outputs, inputs in LAYERS:
        for times in BATCHES if asked(options, name) else ():
            op = layer(name, plain, outputs, inputs, gpu=options.device.type == "cuda")
            yield from op.cases(options, evenly_reduced(options, times))


def evenly_reduced(options: Options, times: float) -> list[Source]:
    """The images as equal as it goes."""
    images, cells = max(1, round(options.batch[0] * times)), (options.size[0] // PATCH) ** 2
    rows = int(images * cells / REDUCTION)
    rows = rows - rows % ALIGNED or max(1, rows)
    return of_lengths(options, [(i + 1) * rows // images - i * rows // images for i in range(images)])


def has_quack(x: Tensor) -> bool:
    return x.is_cuda and x.element_size() == 2 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def quack(activation: Activation | None, e: Example) -> Callable[[], Tensor]:
    """One group of rows, as many as the device says; by its own tuning. What its matmul does not compute (exact GELU, bias beside residual) follows it."""
    if not has_quack(e["x"]):
        raise NotRun("needs a GPU of sm_90 or 100 and bfloat16 or float16")
    try:
        from quack.gemm_interface import gemm, gemm_add  # type: ignore[import-not-found] # by users alone
    except ImportError:
        raise NotRun("needs quack-kernels") from None
    wide, rows = e.static(), e.layout.num_tokens
    given = {"A": wide["x"], "B": wide["weight"].T[None], "cu_seqlens_m": wide.layout.cu_seqlens[[0, -1]]}

    def run() -> Tensor:
        if "residual" in wide.tensors:
            return gemm_add(C=wide["residual"], **given).add_(wide["bias"])[:rows]
        out = gemm(bias=wide["bias"][None], **given)[:rows]
        return torch.ops.aten.gelu_(out) if activation else out

    return run


def layer(name: str, plain: Plain, outputs: int, inputs: int, *, gpu: bool) -> Op:
    residual = "residual" in name
    activation: Activation | None = "gelu" if "gelu" in name else None

    def make(s: Source) -> Example:
        n, k = outputs * s.dim, inputs * s.dim
        sizes: dict[str, tuple[int, ...]] = {"x": (s.live, k), "weight": (n, k), "bias": (n,)}
        sizes |= {"residual": (s.live, n)} if residual else {}
        return s.example(sizes.keys() & {"x", "residual"}, sizes, {"weight": k**-0.5, "bias": 0.1})

    return Op(
        name,
        make,
        lambda e: lambda: ragged_linear(**e.tensors, layout=e.layout, activation=activation, tail="undefined"),
        plain,
        lambda e: list(e.tensors.values()),
        rivals={"quack-kernels, M on the device": functools.partial(quack, activation)},
        shape=lambda e: dict(zip("NK", e["weight"].shape, strict=True)),
        compiled=("PyTorch",),  # in place or not is one graph to the compiler
        how={"dynamic": False, "mode": "max-autotune-no-cudagraphs" if gpu else None},
        registered="ragged_linear",
        flops=lambda e: 2 * e["x"].shape[0] * e["weight"].numel(),
        tight=True,
    )
