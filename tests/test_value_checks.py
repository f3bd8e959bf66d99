"""cu_seqlens given by hand are checked on a CPU; STEP_KERNELS_CHECK=1 adds checks that read values; without it nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import step_kernels as sk
from step_kernels import checks

CHECKED = """
import json, torch, step_kernels as sk

def layout(cu_seqlens, cells, grid=(4, 4), num_prefix=0, trimmed=True):
    return sk.SupertokenLayout(torch.tensor(cu_seqlens).int(), torch.tensor(cells).int(), grid, num_prefix, trimmed)

def attend(cu_seqlens, max_seqlen=9):
    q = torch.zeros(4, 1, 8)
    sk.ragged_attention(q, q, q, torch.tensor(cu_seqlens).int(), max_seqlen)

def classes(cu_seqlens, max_seqlen=9):
    k = torch.zeros(4, 1, 8)
    sk.class_attention(torch.zeros(len(cu_seqlens) - 1, 2, 1, 8), k, k, torch.tensor(cu_seqlens).int(), max_seqlen)

def scores(cu_seqlens):
    sk.class_scores(torch.zeros(len(cu_seqlens) - 1, 2, 8), torch.zeros(4, 8), torch.tensor(cu_seqlens).int())

def norm(layout):
    sk.ragged_layer_norm(torch.zeros(layout.capacity, 8), None, None, 1e-6, layout=layout)

def scatter(layout):
    sk.scatter_back(torch.zeros(layout.capacity, 8), layout)

good = [[0, 0, 0, 2], [0, 0, 2, 1]]
cases = {
    "good": lambda: (norm(layout([0, 2], good)), scatter(layout([0, 1], [good[0], [0, 0, 0, 0]], trimmed=False)), attend([0, 2, 2, 4]), classes([0, 2, 2, 4]), scores([0, 2, 2, 4])),
    "falls": lambda: attend([0, 3, 2, 4]),
    "starts": lambda: attend([1, 4]),
    "past": lambda: attend([0, 2, 5]),
    "longest": lambda: attend([0, 4], 3),
    "class_falls": lambda: classes([0, 3, 2, 4]),
    "class_past": lambda: classes([0, 2, 5]),
    "class_longest": lambda: classes([0, 4], 3),
    "scores_past": lambda: scores([0, 2, 5]),
    "layout_falls": lambda: norm(layout([0, 2, 1, 2], good)),
    "layout_past": lambda: norm(layout([0, 3], good, trimmed=False)),
    "not_trimmed": lambda: norm(layout([0, 1], good)),
    "outside": lambda: scatter(layout([0, 2], [[0, 0, 0, 2], [0, 0, 4, 1]])),
    "sticks_out": lambda: scatter(layout([0, 2], [[0, 0, 0, 2], [0, 2, 2, 2]], (3, 3))),
    "negative": lambda: scatter(layout([0, 2], [[0, -1, 0, 1], [0, 0, 2, 1]])),
    "overlap": lambda: scatter(layout([0, 2], [[0, 0, 0, 2], [0, 0, 1, 1]])),
    "image": lambda: scatter(layout([0, 1, 2], [[0, 0, 0, 2], [0, 0, 2, 1]])),
    "side": lambda: scatter(layout([0, 2], [[0, 0, 0, 3], [0, 3, 3, 1]])),
    "aligned": lambda: scatter(layout([0, 2], [[0, 0, 1, 2], [0, 3, 3, 1]])),
    "prefix": lambda: scatter(layout([0, 2], good, num_prefix=1)),
}
outcome = {}
for name, case in cases.items():
    try:
        case()
        outcome[name] = "accepted"
    except ValueError as error:
        outcome[name] = str(error)
print(json.dumps(outcome))
"""


@pytest.fixture(scope="module")
def checked() -> dict[str, str]:
    """Each case's error message from a process with the extra checks on."""
    environment = {**os.environ, "STEP_KERNELS_CHECK": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", CHECKED], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name, words",
    {
        "good": ["accepted"],
        "falls": ["cu_seqlens", "monotone", "3", "2"],
        "starts": ["cu_seqlens", "start at 0", "1"],
        "past": ["cu_seqlens", "capacity", "4", "5"],
        "longest": ["max_seqlen", "4", "3"],
        "class_falls": ["cu_seqlens", "monotone", "3", "2"],
        "class_past": ["cu_seqlens", "capacity", "4", "5"],
        "class_longest": ["max_seqlen", "4", "3"],
        "scores_past": ["cu_seqlens", "capacity", "4", "5"],
        "layout_falls": ["cu_seqlens", "monotone", "2", "1"],
        "layout_past": ["cu_seqlens", "capacity", "2", "3"],
        "not_trimmed": ["trimmed", "2", "1"],
        "outside": ["cells[1]", "inside", "[0, 0, 4, 1]"],
        "sticks_out": ["cells[1]", "inside", "[0, 2, 2, 2]"],
        "negative": ["cells[0]", "[0, -1, 0, 1]"],
        "overlap": ["cells[1]", "overlap", "[0, 0, 1, 1]"],
        "image": ["cells[1]", "image", "1", "[0, 0, 2, 1]"],
        "side": ["cells[0]", "side", "[0, 0, 0, 3]"],
        "aligned": ["cells[0]", "aligned", "[0, 0, 1, 2]"],
        "prefix": ["cells[0]", "[0, 0, 0, 2]"],
    }.items(),
)
def test_extra_checks(checked: dict[str, str], name: str, words: list[str]) -> None:
    for word in words:
        assert word in checked[name]


BY_HAND = {
    "ragged_attention": lambda x, cu_seqlens: sk.ragged_attention(x, x, x, cu_seqlens, 98),
    "attention_schedule": lambda x, cu_seqlens: sk.attention_schedule(cu_seqlens, 98),
    "class_attention": lambda x, cu_seqlens: sk.class_attention(torch.zeros(2, 3, 1, 8), x, x, cu_seqlens, 98),
    "class_scores": lambda x, cu_seqlens: sk.class_scores(torch.zeros(2, 3, 8), x[:, 0], cu_seqlens),
    "SupertokenLayout": lambda x, cu_seqlens: sk.SupertokenLayout(cu_seqlens, torch.zeros(98, 4).int(), (8, 8)),
}


@pytest.mark.parametrize("op", BY_HAND)
def test_cu_seqlens_by_hand_are_always_checked_on_a_cpu(op: str) -> None:
    x = torch.zeros(98, 1, 8)
    BY_HAND[op](x, torch.tensor([0, 34, 98], dtype=torch.int32))
    for wrong, words in (
        ([0, 60, 40], r"cu_seqlens: .*monotone, got 60 then 40"),
        ([5, 34, 98], r"cu_seqlens: .*start at 0, got 5"),
        ([0, 34, 200], r"cu_seqlens: .*98 rows, got 200"),
    ):
        with pytest.raises(ValueError, match=words):
            BY_HAND[op](x, torch.tensor(wrong, dtype=torch.int32))


def test_the_variable_is_0_or_1() -> None:
    assert [checks.switched_on("X", value) for value in (None, "", "0", "1")] == [False, False, False, True]
    with pytest.raises(ValueError, match="environment variable X: expected 0 or 1, got 'yes'"):
        checks.switched_on("X", "yes")


def test_without_the_variable_values_are_not_read() -> None:
    """Under FakeTensorMode any read of a value raises."""
    with torch._subclasses.FakeTensorMode():
        q = torch.zeros(4, 1, 8)
        sk.ragged_attention(q, q, q, torch.zeros(3, dtype=torch.int32), 4)
        sk.class_attention(torch.zeros(2, 3, 1, 8), q, q, torch.zeros(3, dtype=torch.int32), 4, return_scores=True)
        sk.masked_attention(*torch.zeros(3, 2, 1, 4, 8), torch.zeros(2, 4, dtype=torch.bool))
        layout = sk.resolve_layout([torch.zeros(1, 2, 2)], sides=(2,), thresholds=0.5, grid=(4, 4))
        halting = sk.halt_tokens(torch.zeros(16, 3), layout, 0.5, canvas=torch.zeros(1, 3, 4, 4))
        tokens = sk.gather_tokens(torch.zeros(16, 8), halting)
        tokens = sk.ragged_linear(tokens, torch.zeros(3, 8), layout=halting.layout)
        assert sk.scatter_back(tokens, halting.layout).shape == (1, 3, 4, 4)
