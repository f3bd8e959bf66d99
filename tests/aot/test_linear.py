"""The linear layer's kernel compiles for every architecture and every choice of tiles, fits the chip, and spills nothing."""

import pytest
import torch
from aot.ahead_of_time import ARCHITECTURES, BESIDE_90, CLASSES, Launch, check, compiled, meta
from aot.sass import exposed_waits, programs_per_multiprocessor
from tensors import matmuls_in

from step_kernels.triton.common.launch import architecture_class
from step_kernels.triton.linear import launch as linear
from step_kernels.triton.linear.configs import CANDIDATES, TILES, choose_tiles
from step_kernels.triton.linear.launch import settings

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
    expected_tokens: int | None = None,
) -> Launch:
    sizes = {"bias": (outputs,), "gamma": (outputs,), "residual": (capacity, outputs)}
    given = {name: meta(*size, dtype=dtype) if name in epilogue else None for name, size in sizes.items()}
    with compiled(architecture) as launches:
        linear.ragged_linear(
            meta(capacity, inputs, dtype=dtype),
            meta(outputs, inputs, dtype=dtype),
            given["bias"],
            meta(9, dtype=torch.int32),
            "gelu" if "gelu" in epilogue else None,
            given["gamma"],
            given["residual"],
            "fill" in epilogue,
            expected_tokens,
        )
    check(launches, ["linear_kernel"])
    return launches[0]


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    monkeypatch.setattr("step_kernels.triton.common.launch.MULTIPROCESSORS", 132)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    """The first row of each class for 16 bits."""
    choices = TILES[architecture_class(architecture), "half"]
    assert choose_tiles(architecture, "half", CAPACITY, 4096, 132) is choices[0]
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
    # Only the two halves of a residual are waited for where they are needed, at a tile's end, which the code holds twice.
    assert len(exposed_waits(launch)) <= (4 if epilogue == "proj" else 0)
    assert launch.grid == (132,)


def rows_of_the_table() -> list:
    """Each row of the tables on one architecture of its class, but for those that test_every_architecture compiles."""
    example = {"ampere": 80, "hopper": 90, "blackwell": 100, "consumer": 86}
    return [
        pytest.param(example[name], precision, number, id=f"{name}-{precision}-{tiles.rows}x{tiles.columns}")
        for (name, precision), rows in TILES.items()
        for number, tiles in enumerate(rows)
        if name == "hopper" or precision != "half" or number > 0
    ]


@pytest.mark.parametrize(("architecture", "precision", "number"), rows_of_the_table())
def test_every_choice_of_tiles(architecture, precision, number, monkeypatch):
    """As many programs as the launcher starts fit."""
    tiles = TILES[architecture_class(architecture), precision][number]
    monkeypatch.setattr(linear, "choose_tiles", lambda *_: tiles)
    with matmuls_in(precision):
        dtype = torch.float16 if precision == "half" else torch.float32
        launch = compile_layer(architecture, dtype, 1024, 1024, EPILOGUES["all"])
    assert programs_per_multiprocessor(launch) >= tiles.resident


def rows_to_be_measured() -> list:
    """On each architecture of their class, but for 89, whose code is 86's."""
    return [
        pytest.param(architecture, tiles, id=f"{architecture}-{'x'.join(map(str, tiles[:3]))}-{tiles.warps}")
        for architecture in (*CLASSES, 120)
        for tiles in CANDIDATES[architecture_class(architecture), "half"]
    ]


@pytest.mark.parametrize(("architecture", "tiles"), rows_to_be_measured())
def test_candidates(architecture, tiles, monkeypatch):
    """They spill nothing with all epilogues at once, and with those of a block as many programs fit as the launcher starts."""
    monkeypatch.setattr(linear, "choose_tiles", lambda *_: tiles)
    matmul = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}.get(architecture, r"mma\.sync")
    for epilogue in ("all", "proj", "fc1"):
        launch = compile_layer(architecture, torch.float16, 1024, 1024, EPILOGUES[epilogue])
        assert launch.instructions(matmul)
        assert epilogue == "all" or programs_per_multiprocessor(launch) >= tiles.resident


@pytest.mark.parametrize(
    ("precision", "architecture"),
    [*(("half", architecture) for architecture in (86, 90, 100)), ("ieee", 90), ("tf32", 90)],
)
def test_rows_that_descriptors_cannot_take(precision, architecture):
    """150 classes of 97 inputs: no row starts at a multiple of 16 bytes, and the last step of inputs is masked."""
    with matmuls_in(precision):
        dtype = torch.bfloat16 if precision == "half" else torch.float32
        launch = compile_layer(architecture, dtype, 97, 150, EPILOGUES["all"])
    assert not launch.instructions(r"cp\.async\.bulk\.tensor")


@pytest.mark.parametrize(
    ("architecture", "dtype"), [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32), (100, torch.bfloat16)]
)
def test_150_classes(architecture, dtype):
    """Rows of the output do not start at multiples of 16 bytes, those of x and weight do."""
    launch = compile_layer(architecture, dtype, 1024, 150, EPILOGUES["all"])
    by_tma = launch.instructions(r"cp\.async\.bulk\.tensor\.2d\.shared")
    assert bool(by_tma) == (architecture >= 90 and dtype == torch.bfloat16)


def test_a_step_of_fp32_products_is_summed_by_itself():
    """32 sums a thread: added to those of the steps before, and to the bias. As one chain of products with them they would err more."""
    launch = compile_layer(90, torch.float32, 1024, 1024, EPILOGUES["qkv"])
    assert launch.instructions(r"add(\.rn)?\.f32") == 2 * 32


def test_the_backward_of_static_mode():
    shapes = (CAPACITY, 4096), (CAPACITY, 1024), (4096, 1024), (4096,)
    tensors = [meta(*shape, dtype=torch.bfloat16) for shape in shapes]
    arguments = *tensors, meta(9, dtype=torch.int32), "gelu", None
    for architecture in (90, *BESIDE_90):
        with compiled(architecture) as launches:
            linear.ragged_linear_backward(*arguments, [True] * 5)
        check(launches, ["zero_tail_kernel"] * 2)


@pytest.mark.parametrize(
    ("rows", "columns", "expected", "waste"),
    [
        (32776, 4096, (128, 256), 3),
        (13000, 1024, (128, 256), 23),  # narrower ones waste less, but read more
        (5000, 1024, (128, 128), 21),
        (5000, 4096, (128, 256), 5),
        (1640, 3072, (128, 128), 22),  # two rounds of the widest waste 42 %
        (1640, 1024, (128, 128), 22),
        (640, 1024, (64, 128), 39),
        (300, 1024, (64, 128), 72),
        (0, 1024, (64, 128), 100),
    ],
)
def test_few_tokens_take_narrow_tiles(rows, columns, expected, waste):
    """waste: per cent of 132 multiprocessors' products, in as many rounds of tiles as it takes, that no output needs."""
    tiles = choose_tiles(90, "half", rows, columns, 132)
    assert (tiles.rows, tiles.columns) == expected
    rounds = -(max(1, -(-rows // tiles.rows)) * -(-columns // tiles.columns) // -132)
    assert round(100 - 100 * rows * columns / (rounds * 132 * tiles.rows * tiles.columns)) == waste


@pytest.mark.parametrize(
    ("expected_tokens", "tile", "programs"),
    [(None, (128, 256), 132), (640, (64, 128), 264), (10**9, (128, 256), 132), (0, (64, 128), 264)],
)
def test_an_expected_count_chooses_the_tiles_and_the_capacity_the_programs(
    expected_tokens, tile, programs, monkeypatch
):
    """640 rows expected of 32776: 64 x 128 tiles, and as many programs as the GPU holds, for whatever count there is."""
    taken = []
    monkeypatch.setattr(linear, "settings", lambda tiles, *rest: taken.append(tiles) or settings(tiles, *rest))
    launch = compile_layer(90, torch.bfloat16, 1024, 1024, EPILOGUES["qkv"], expected_tokens=expected_tokens)
    assert [(tiles.rows, tiles.columns) for tiles in taken] == [tile]
    assert launch.grid == (programs,)
