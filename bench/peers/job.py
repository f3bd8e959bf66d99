"""`python -m bench peers`: measures, prints the table, writes peers.json."""

from __future__ import annotations

from ..model import job
from ..model.layouts import QUOTA_SHARE
from .measure import PeerBench
from .settings import PeerSettings

JSON_NAME = "peers.json"
NOTES = (
    "CTS, DToP and dCTS are written here from their published descriptions, in eager PyTorch, with this run's policy network and "
    "linear exit heads in the place of theirs: so that all compute the same, DToP keeps no context tokens. Scores stored: matmul, "
    "softmax, matmul, as in the code that they are built on; SDPA: the same with PyTorch's own attention in its place.",
    f"Quota layouts merge {QUOTA_SHARE:.0%} of the 2x2 blocks of every image, as CTS does at 768 px; CTS takes no other. The family exits "
    "merges nothing: the patches that a halting supertoken covers halt.",
    "Speed-ups are against dense, which is compiled where the budget allows it. Against the dense model with stored scores the same "
    "methods look faster than they are.",
    "ToMe is left out: it merges by the similarity of tokens inside every block, so it cannot repeat recorded layouts and no gate can "
    "hold its labels to the oracle's; its package patches timm's models, not this ViT.",
)


def main(settings: PeerSettings) -> int:
    """Runs the job; 1 when a contender failed its gate, else 0."""
    return job.main(settings, PeerBench, JSON_NAME, NOTES)
