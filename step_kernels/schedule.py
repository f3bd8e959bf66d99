"""The tile schedule as data, on every floor: its tiles' height, and how many entries it has."""

from __future__ import annotations

TILE_ROWS = 128  # kernels with lower tiles divide these


def num_tiles(num_rows: int, batch_size: int) -> int:
    """Tiles of a batch at most: each image adds less than one to those of its rows. The unused ones suffice to cover the tail."""
    return -(-num_rows // TILE_ROWS) + batch_size
