"""The label kernel compiles for every architecture, fits it, and spills nothing."""

import pytest
import torch
from aot.ahead_of_time import BESIDE_90, Launch, check, compiled, meta
from aot.sass import access_bytes

from step_kernels.triton import upsample

NUM_CLASSES = 150
# Grid, size of the labels: tiles that are a quad or a part of one, tiles whose pixels load their own sources; an odd ratio of each.
SIZES = {
    "quads": ((64, 64), (1024, 1024)),
    "quads_of_four_tiles": ((32, 32), (2048, 1024)),
    "quads_odd": ((37, 33), (513, 495)),
    "quads_small": ((64, 64), (256, 256)),
    "pixels": ((64, 64), (100, 100)),
    "pixels_odd": ((65, 65), (13, 195)),
}
# Every size on sm_90; the other dtypes and architectures in one of the two ways to load each.
CASES = [(90, torch.bfloat16, name) for name in SIZES]
CASES += [(90, torch.float16, "quads"), (90, torch.float32, "pixels")]
CASES += zip(BESIDE_90, [torch.bfloat16] * 2, ("quads", "pixels"), strict=True)


def launched(architecture: int, dtype: torch.dtype, name: str, channels_last: bool = True) -> Launch:
    grid, size = SIZES[name]
    canvas = meta(8, NUM_CLASSES, *grid, dtype=dtype)
    if channels_last:
        canvas = canvas.contiguous(memory_format=torch.channels_last)
    with compiled(architecture) as launches:
        labels = upsample.upsample_argmax(canvas, *size)
    assert labels.shape == (8, *size) and labels.dtype == torch.uint8
    check(launches, ["label_kernel"])
    return launches[0]


@pytest.mark.parametrize(("architecture", "dtype", "name"), CASES)
def test_label_kernel(architecture, dtype, name):
    launched(architecture, dtype, name)


@pytest.mark.parametrize("name", ("quads", "quads_odd", "pixels"))
def test_a_canvas_in_nchw(name):
    launched(90, torch.bfloat16, name, channels_last=False)


def test_the_cost_of_a_class():
    """A thread holds 8 pixels of one column: their horizontal sums are shared, and no two threads exchange anything."""
    launch = launched(90, torch.bfloat16, "quads")
    assert launch.grid == (8 * 65 * 65,)
    assert (
        launch.shared_memory == 0 and launch.instructions(r"bar\.sync|shfl") <= 5
    )  # only the bound's maximum over a warp
    # The bound's sources come in pairs of 150 classes: 4 sources of 8 classes a thread. Those of the race one by one, of 4 classes and of what is left.
    assert access_bytes(launch)["load"] == {4: 16, 2: 20}
    copies, pixels = 5, 8  # of the loop's body: 4 classes at a time, and what is left
    assert launch.instructions(r"mul(\.rn)?\.f32") <= copies * (pixels + 2)
    assert launch.instructions(r"fma\.rn\.f32") <= copies * (pixels + 2) + pixels + 1  # and the positions
    assert launch.instructions(r"setp\.(gtu|num|nan|le|gt)[a-z.]*f32") <= copies * 2 * pixels
    assert launch.instructions(r"selp\.(f|b)32") <= copies * 2 * pixels + 10


def test_many_classes():
    with compiled(90) as launches:
        labels = upsample.upsample_argmax(meta(2, 1000, 32, 32), 512, 512)
    assert labels.dtype == torch.int32
    check(launches, ["label_kernel"])
