"""Random layouts, for hypothesis. (A file of its own: the GPU tests run without hypothesis.)"""

from __future__ import annotations

from hypothesis import strategies as st
from layouts import PlainLayout, tile


@st.composite
def plain_layouts(
    draw: st.DrawFn,
    *,
    min_batch: int = 0,
    max_batch: int = 3,
    max_rows: int = 9,
    max_columns: int = 9,
    holes: bool = True,
) -> PlainLayout:
    """Random quad-trees of aligned blocks; with ``holes`` some images have lost some or all of their tokens."""
    batch = draw(st.integers(min_batch, max_batch))
    grid = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    random = draw(st.randoms(use_true_random=False))
    merging = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    images = []
    for _ in range(batch):
        blocks = tile(grid, lambda row, column, side: random.random() < merging, max_side=8)
        lost = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0])) if holes else 0.0
        images.append(tuple(block for block in blocks if random.random() >= lost))
    return PlainLayout(tuple(images), grid, draw(st.sampled_from([0, 1, 5])))
