"""The least time of a model's parts: by hand for a small ViT, and consistent with the FLOP count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bench_model_cases import nano_case, nano_preset

from bench.model import roofline
from bench.model.case import DENSE, FRONT, MERGED, MERGED_EXITS, Case
from bench.model.roofline import ATTENTION, DECODER, EMBED, EXITS, LINEARS, POLICY, TAIL, Work
from step_kernels.model import count_flops

RATES = {"copy_gigabytes_per_second": 2.0, "matmul_teraflops_per_second": 4.0}
DIM, DEPTH, CLASSES, BATCH, PATCHES, SIZE = 48, 3, 5, 2, 16, 4  # of ViT nano on 64 px, fp32


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with nano_preset():
        yield nano_case()


def parts(case: Case, family: str) -> dict[str, Work]:
    return {work.part: work for work in case.work(family)}


def test_a_floor_is_the_larger_of_the_two() -> None:
    assert Work("", 8e9, 0).floor_ms(RATES) == 2.0
    assert Work("", 0, 6e6).floor_ms(RATES) == 3.0
    assert Work("", 8e9, 6e6).floor_ms(RATES) == 3.0
    work = (Work("one", 8e9, 0), Work("two", 0, 6e6))
    assert roofline.floor_ms(work, RATES) == 5.0
    assert roofline.as_json(work, RATES)["two"] == {"gigaflops": 0.0, "megabytes": 6.0, "floor_ms": 3.0}


def test_dense_by_hand(case: Case) -> None:
    tokens, found = BATCH * (PATCHES + 1), parts(case, DENSE)
    assert list(found) == [EMBED, ATTENTION, LINEARS, DECODER, TAIL]
    assert found[ATTENTION].flops == 4 * DIM * DEPTH * BATCH * (PATCHES + 1) ** 2
    assert found[ATTENTION].moved_bytes == 4 * tokens * DEPTH * DIM * SIZE
    assert found[LINEARS].flops == 2 * 12 * DIM * DIM * tokens * DEPTH
    weights = (
        DEPTH * (12 * DIM * DIM + 13 * DIM) + 2 * DIM
    )  # four linears with biases and two norms a block, one norm at the end
    assert found[LINEARS].moved_bytes == SIZE * (weights + 6 * tokens * DEPTH * DIM + tokens * DIM)
    images, embedding = BATCH * 3 * 64 * 64, DIM * 3 * 256 + DIM
    assert found[EMBED].moved_bytes == SIZE * (images + embedding + tokens * DIM)
    canvas = BATCH * CLASSES * PATCHES * SIZE
    assert found[TAIL] == Work(TAIL, 0, canvas + BATCH * 64 * 64)
    assert found[DECODER].moved_bytes == SIZE * (CLASSES * (DIM + 1) + tokens * DIM) + canvas


@pytest.mark.parametrize("family", [DENSE, MERGED, MERGED_EXITS])
def test_flops_are_those_of_the_count(case: Case, family: str) -> None:
    shape, model = tuple(case.inputs[0].shape), case.model(family)
    traces = [None] if family == DENSE else case.decisions(family)
    totals = [count_flops(model, shape, trace).total for trace in traces]
    assert sum(work.flops for work in case.work(family)) == pytest.approx(sum(totals) / len(totals))


def test_fewer_tokens_are_less_work_in_every_part_of_the_encoder(case: Case) -> None:
    dense, merged, exits = (parts(case, family) for family in (DENSE, MERGED, MERGED_EXITS))
    for part in (ATTENTION, LINEARS):
        for amount in ("flops", "moved_bytes"):
            assert getattr(dense[part], amount) > getattr(merged[part], amount) > getattr(exits[part], amount)
    assert POLICY in merged and POLICY not in dense
    assert EXITS in exits and EXITS not in merged
    assert list(parts(case, FRONT)) == [POLICY, EMBED]
