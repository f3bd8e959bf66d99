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
    "Peers run op by op, as their code does; compiled, or as CUDA graphs where the counts allow it, they would be faster: `bench model` "
    "has PyTorch's own parts for that. Speed-ups are against dense, which is compiled where the budget allows it. Against the dense model "
    "with stored scores the same methods look faster than they are.",
    "ToMe runs in its own package's code, which stores all attention scores, on timm's ViT with this run's weights, where both are "
    "installed. It merges by the similarity of tokens inside every block, so it cannot repeat recorded layouts: its row is gated at r = 0, "
    "where it merges nothing, and a note on that row says how long it takes at the r whose work is closest to the merged family's, policy "
    "included, and without a speed-up: there its tokens, finite scores and their change with the images are all that is checked.",
)


def main(settings: PeerSettings) -> int:
    """Runs the job; 1 when a contender failed its gate, else 0."""
    return job.main(settings, PeerBench, JSON_NAME, NOTES)
