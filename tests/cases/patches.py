"""What the tests of merge_patches and embed_patches as kernels share."""

import torch
from layouts import AWKWARD, PlainLayout
from torch import Tensor

NAMES = [name for name in AWKWARD if name != "empty_batch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RESAMPLES = ["area", "bilinear"]
MEAN, STD = torch.tensor([0.48, 0.46, 0.41, 0.5]), torch.tensor([0.23, 0.22, 0.27, 0.3])
TINY = PlainLayout((((0, 0, 2), (0, 2, 1), (1, 3, 1)), ((0, 1, 1), (0, 2, 2))), (2, 5), 1)
# One block of every side up to 64, the rest of the grid halted.
EVERY_SIDE = PlainLayout(
    (((0, 0, 64), (0, 64, 32), (0, 96, 16), (0, 112, 8), (0, 120, 4), (0, 124, 2), (0, 126, 1), (16, 112, 16)),),
    (64, 128),
)


def images_for(
    plain: PlainLayout, patch_size: int = 2, channels: int = 3, dtype: torch.dtype = torch.float32
) -> Tensor:
    rows, columns = plain.grid
    shape = len(plain.images), channels, rows * patch_size, columns * patch_size
    return torch.randint(0, 256, shape).byte() if dtype == torch.uint8 else torch.randn(shape).to(dtype)
