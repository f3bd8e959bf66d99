"""Small cases that need no photographs: what the tests of the gate and of the job share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bench.case import Case, build_case
from bench.images import VIEWS, Photographs
from bench.providers import Contender, build_contenders
from bench.settings import Settings

SIZE, BATCH = 64, 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def drawn_photographs() -> Photographs:
    """Noise on the left, flat colours on the right, so that some blocks are worth merging and others are not."""
    pixels = np.full((BATCH, SIZE, SIZE, 3), 90, np.uint8)
    pixels[1, :, SIZE // 2 :] = 200
    noise = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE // 2, 3), dtype=np.uint8)
    pixels[:, :, : SIZE // 2] = noise
    return Photographs(tuple(f"drawn {number}" for number in range(BATCH)), pixels, ())


@pytest.fixture(scope="session")
def small_case(drawn_photographs: Photographs) -> Callable[..., Case]:
    """Builds a case of ViT tiny on two pictures of 4 x 4 patches; keywords are `inputs`, two to be quick, and fields of `Settings`."""

    def build(inputs: int = 2, **changes: object) -> Case:
        values = {"model": "tiny", "size": SIZE, "batch": BATCH, "tokens": 1.6, "repeats": 2, "minutes": None}
        with patch("bench.case.VIEWS", inputs):
            return build_case(Settings(**{**values, **changes}), drawn_photographs)

    return build


@pytest.fixture(scope="module")
def case(small_case: Callable[..., Case]) -> Case:
    return small_case()


@pytest.fixture(scope="module")
def contenders(case: Case) -> dict[str, Contender]:
    return {contender.name: contender for contender in build_contenders(case)}


@pytest.fixture(scope="module")
def rotating(small_case: Callable[..., Case]) -> Case:
    """A case with as many inputs as the job has."""
    return small_case(inputs=VIEWS)


@pytest.fixture(scope="module")
def rivals(rotating: Case) -> dict[str, Contender]:
    return {contender.name: contender for contender in build_contenders(rotating)}
