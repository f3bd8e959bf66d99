"""The linear layer's kernel compiles for every architecture and every choice of tiles, fits the chip, and spills nothing."""

import pytest
import torch
from aot.ahead_of_time import ARCHITECTURES, Launch, compiled

from step_kernels.triton import configs, linear
from step_kernels.triton.linear_configs import TILES, choose_tiles

CAPACITY = 32776  # 8 images of 64 x 64 patches and a prefix token
LAYERS = [(1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024), (384, 1152)]  # ViT-L's, and ViT-S's first
# What a transformer block asks for. The last is not in one, but holds the most at a time.
EPILOGUES = {
    "qkv": ("bias",),
    "proj": ("bias", "residual"),
    "fc1": ("bias", "gelu"),
    "all": ("bias", "gelu", "gamma", "residual", "fill"),
}


def compile_layer(
    architecture: int,
    dtype: torch.dtype,
    inputs: int,
    outputs: int,
    epilogue: tuple[str, ...],
    capacity: int = CAPACITY,
) -> Launch:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with compiled(architecture) as launches:
        linear.ragged_linear(
            meta(capacity, inputs),
            meta(outputs, inputs),
            meta(outputs) if "bias" in epilogue else None,
            torch.empty(9, dtype=torch.int32, device="meta"),
            next((name for name in epilogue if name.startswith("gelu")), None),
            meta(outputs) if "gamma" in epilogue else None,
            meta(capacity, outputs) if "residual" in epilogue else None,
            "fill" in epilogue,
        )
    (launch,) = launches
    assert launch.name == "linear_kernel"
    launch.check()
    return launch


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    monkeypatch.setattr("step_kernels.triton.launch.MULTIPROCESSORS", 132)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    launch = compile_layer(architecture, torch.bfloat16, 1024, 4096, EPILOGUES["all"])
    if architecture in (90, 100):
        assert launch.instructions(r"cp\.async\.bulk\.tensor\.2d\.shared"), "loads are not by TMA"
    else:
        assert launch.instructions(r"cp\.async\.c[ag]\.shared"), "loads are not asynchronous"
        assert not launch.instructions(r"cp\.async\.bulk\.tensor")


@pytest.mark.parametrize(("inputs", "outputs"), LAYERS)
def test_layers_of_a_transformer_on_hopper(inputs, outputs):
    epilogue = {3072: "qkv", 1152: "qkv", 4096: "fc1", 1024: "proj"}[outputs]
    launch = compile_layer(90, torch.bfloat16, inputs, outputs, EPILOGUES[epilogue])
    assert launch.instructions(r"wgmma\.mma_async")
    assert launch.instructions(r"cp\.async\.bulk\.tensor\.2d\.shared"), "loads are not by TMA"
    assert launch.grid == (132,)


def rows_of_the_table() -> list:
    """Each row of the table on one architecture of its class, but for those that test_every_architecture compiles."""
    example = {"ampere": 80, "hopper": 90, "blackwell": 100, "consumer": 86}
    return [
        pytest.param(example[name], precision, number, id=f"{name}-{precision}-{tiles.rows}x{tiles.columns}")
        for (name, precision), choices in TILES.items()
        for number, tiles in enumerate(choices)
        if name == "hopper" or precision != "half" or number > 0
    ]


@pytest.mark.parametrize(("architecture", "precision", "number"), rows_of_the_table())
def test_every_choice_of_tiles(architecture, precision, number, monkeypatch):
    tiles = TILES[configs.architecture_class(architecture), precision][number]
    monkeypatch.setattr(linear, "choose_tiles", lambda *_: tiles)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        dtype = torch.float16 if precision == "half" else torch.float32
        compile_layer(architecture, dtype, 1024, 1024, EPILOGUES["all"])
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("architecture", [90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_descriptors_cannot_take(architecture, dtype):
    """150 classes of 97 inputs: no row starts at a multiple of 16 bytes, and the last step of inputs is masked."""
    launch = compile_layer(architecture, dtype, 97, 150, EPILOGUES["all"])
    assert not launch.instructions(r"cp\.async\.bulk\.tensor")


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_150_classes(architecture, dtype):
    """Rows of the output do not start at multiples of 16 bytes, those of x and weight do."""
    launch = compile_layer(architecture, dtype, 1024, 150, EPILOGUES["all"])
    by_tma = launch.instructions(r"cp\.async\.bulk\.tensor\.2d\.shared")
    assert bool(by_tma) == (architecture >= 90 and dtype == torch.bfloat16)


def test_the_backward_of_static_mode():
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    arguments = meta(CAPACITY, 4096), meta(CAPACITY, 1024), meta(4096, 1024), meta(4096), cu_seqlens, "gelu", None
    for architecture in ARCHITECTURES:
        with compiled(architecture) as launches:
            linear.ragged_linear_backward(*arguments, [True] * 5)
        assert [launch.name for launch in launches] == ["zero_tail_kernel"] * 2
        for launch in launches:
            launch.check()


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(32776, 4096, (128, 256)), (13000, 1024, (128, 256)), (1640, 1024, (128, 128)), (600, 1024, (64, 128))],
)
def test_few_tokens_take_narrow_tiles(rows, columns, expected):
    tiles = choose_tiles(90, "half", rows, columns, 132)
    assert (tiles.rows, tiles.columns) == expected
