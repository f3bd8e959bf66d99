"""CPU microseconds that ops and the encoder cost the host, without a GPU: ``PYTHONPATH=tests:. python tests/standin/host_cost.py [name ...]``.

All up to the launch is real, Triton's part too; a stub stands in for its compiler and the driver. Tensors are small and on the CPU, so that
what PyTorch computes itself (matmuls of exact mode, the plain ViT) counts with little more than its dispatch. The best of many rounds of
process time, in turns. Not counted: CUDA's own calls, the switch of the current device, the encoding of descriptors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from aot.ahead_of_time import FakeDriver
from real_timm import timm
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import step_kernels as sk
from standin.loaded import Loaded
from step_kernels import backend
from step_kernels.model import StepEncoder, ViT, ViTConfig
from step_kernels.triton.common import remembered

ROUNDS = 60


def compile_nothing(self: JITFunction, key: Any, signature: Any, device: str, *_: Any) -> Loaded:
    return self.device_caches[device][0].setdefault(key, Loaded(key))


def calls() -> dict[str, Callable[[], Any]]:
    """Ops on four images of 4 x 4 cells and 64 channels, as bf16 where kernels compute and fp32 where PyTorch does, fast on a CPU."""
    exact = sk.SupertokenLayout.uniform(4, (4, 4), num_prefix=1)
    static = sk.SupertokenLayout.trusted(exact.cu_seqlens, exact.cells, exact.grid, 1)
    rows, cu_seqlens, scores = exact.capacity, exact.cu_seqlens, [torch.rand(4, 2, 2), torch.rand(4, 1, 1)]
    single = torch.randn(rows, 64), torch.randn(64, 64), torch.randn(64)
    x, weight, vector = (tensor.bfloat16() for tensor in single)
    images, patch, canvas = torch.randn(4, 3, 64, 64), torch.randn(64, 3, 16, 16), torch.randn(4, 64, 4, 4)
    q, k, v = torch.randn(rows, 3, 4, 16).bfloat16().unbind(1)
    classes, schedule = torch.randn(4, 8, 4, 16).bfloat16(), sk.attention_schedule(cu_seqlens, rows)
    table, halting = sk.rope_table(exact, torch.randn(8, 2)), sk.halt_tokens(x, static, 0.5)
    vit = ViT(ViTConfig(16, depth=24, num_heads=2, img_size=32)).eval()
    encoder, image = StepEncoder(vit), torch.randn(1, 3, 32, 32)
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 24, "num_heads": 2}
    timm_vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes).eval()
    timm_encoder = StepEncoder.from_timm(timm_vit, verify=False)
    return {
        "torch.add": lambda: torch.add(single[2], single[2]),
        "ragged_layer_norm": lambda: sk.ragged_layer_norm(x, vector, vector, 1e-6, layout=exact),
        "ragged_attention": lambda: sk.ragged_attention(q, k, v, cu_seqlens, 17, schedule=schedule),
        "ragged_linear, exact": lambda: sk.ragged_linear(*single, layout=exact, residual=single[0]),
        "ragged_linear, static": lambda: sk.ragged_linear(x, weight, vector, layout=static, residual=x),
        "ragged_rope": lambda: sk.ragged_rope(q, k, table, layout=exact),
        "attention_schedule": lambda: sk.attention_schedule(cu_seqlens, rows),
        "resolve_layout": lambda: sk.resolve_layout(scores, sides=(2, 4), thresholds=0.5, grid=(4, 4), num_prefix=1),
        "embed_patches": lambda: sk.embed_patches(images, exact, patch, single[2], pos_embed=single[0][:16]),
        "merge_tokens": lambda: sk.merge_tokens(single[0][:64].view(4, 16, 64), exact),
        "exit_head": lambda: sk.exit_head(x, vector, vector, weight, vector, static, 0.5, canvas=canvas),
        "gather_tokens": lambda: sk.gather_tokens(x, halting),
        "scatter_back": lambda: sk.scatter_back(x, exact),
        "class_attention": lambda: sk.class_attention(classes, k, v, cu_seqlens, 17),
        "upsample_argmax": lambda: sk.upsample_argmax(canvas, (64, 64)),
        "24 blocks, plain ViT": lambda: vit(image),
        "24 blocks, encoder": lambda: encoder(image),
        "24 blocks, timm": lambda: timm_vit.forward_features(image),
        "24 blocks, from_timm": lambda: timm_encoder.forward_features(image),
    }


def microseconds(name: str, call: Callable[[], Any]) -> float:
    repeats = 1 if "blocks" in name else 20
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats * 1e6


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    driver.set_active(FakeDriver(90))
    JITFunction._do_compile, backend.why_no_triton_on = compile_nothing, lambda device: None
    remembered.DEVICE = "cpu"
    with torch.no_grad(), sk.use_backend("triton"):
        chosen = {name: call for name, call in calls().items() if not wanted or any(word in name for word in wanted)}
        rounds = [{name: microseconds(name, call) for name, call in chosen.items()} for _ in range(ROUNDS)]
    for name in chosen:
        print(f"{name:24}{min(each[name] for each in rounds):10.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
