"""Divides the band, the part of the score matrix that a window leaves visible, into blocks.

`Band`, for xla.py, divides it into blocks of queries, each with all of its keys in one slice. `Tiles`, for the TPU
kernels, divides it into square tiles, of which a kernel computes one at a time.

Shapes: `T` queries, `S` keys, `W` consecutive keys that one block of queries reads.
"""

import itertools
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

MAX_BLOCK = 128  # queries; more no longer makes the matrix products faster, and the scores outgrow the caches
MIN_BLOCK = 16  # queries; with fewer the loop costs more than the keys it saves
MAX_WASTE = 1.3  # scores computed / scores visible, where the block size allows it
MAX_RAMP_SEGMENTS = 8  # bounds compile time


class Segment(NamedTuple):
    """Consecutive query blocks that read equally many keys each."""

    first_block: int
    last_block: int  # exclusive
    num_keys: int  # W


class Band(NamedTuple):
    """A plan to visit every visible score: `segments` of blocks of `block` queries each, the last one padded."""

    num_queries: int  # T
    num_keys: int  # S
    window: int  # 1 ... S
    block: int
    segments: tuple[Segment, ...]

    @property
    def num_blocks(self) -> int:
        """How many query blocks there are."""
        return self.segments[-1].last_block

    def end(self, block):
        """Position after the last query of a block, which may be traced. Positions are indices of keys."""
        return self.num_keys - self.num_queries + (block + 1) * self.block

    def stop(self, block, num_keys: int):
        """Position after the last of the `num_keys` keys that a block reads; the block may be traced."""
        return jnp.clip(self.end(block), num_keys, self.num_keys)

    def padding(self, length: int) -> int:
        """How many keys to pad in front of an array of the last `length` keys, so that every block's slice exists."""
        stops = [(min(max(self.end(s.first_block), s.num_keys), self.num_keys), s.num_keys) for s in self.segments]
        return max(0, *(self.num_keys - length - (stop - min(length, num_keys)) for stop, num_keys in stops))

    @property
    def num_scores(self) -> int:
        """How many scores a pass over the band computes, for one head."""
        return sum((s.last_block - s.first_block) * self.block * s.num_keys for s in self.segments)


class Tiles(NamedTuple):
    """The square tiles that hold every visible score, aligned at the last position, which queries and keys share.

    The first block of queries, and of keys, is padded in front where it is not whole. Keys that no query sees belong to
    no block. So a query's own key has the same place in its block as the query, in the last tile of its row of tiles.
    """

    num_queries: int  # T
    num_keys: int  # S
    window: int  # 1 ... S
    block: int

    @property
    def visible_keys(self) -> int:
        """How many of the last keys are visible to any query."""
        return min(self.num_keys, self.num_queries + self.window - 1)

    @property
    def query_blocks(self) -> int:
        """How many rows of tiles there are."""
        return -(-self.num_queries // self.block)

    @property
    def key_blocks(self) -> int:
        """How many columns of tiles there are."""
        return self.blocks_of(self.num_keys)

    @property
    def cached_blocks(self) -> int:
        """How many columns come before that of the first query's own key."""
        return self.key_blocks - self.query_blocks

    @property
    def reach(self) -> int:
        """How many tiles a row has before its last one, at most."""
        return -(-(self.window - 1) // self.block)

    def blocks_of(self, num_keys: int) -> int:
        """How many blocks hold those of the last `num_keys` keys that are visible to any query."""
        return -(-min(num_keys, self.visible_keys) // self.block)

    def columns(self, row):
        """First and last column of a row, which may be traced."""
        own = row + self.cached_blocks
        return jnp.maximum(own - self.reach, 0), own

    def rows(self, column):
        """First and last row of a column, which may be traced."""
        own = column - self.cached_blocks
        return jnp.maximum(own, 0), jnp.minimum(own + self.reach, self.query_blocks - 1)

    def visit(self, num_columns: int, by_column: bool) -> np.ndarray:
        """Rows and columns [2, tiles] of all tiles of the last `num_columns`, row by row or column by column."""
        row, column = np.mgrid[: self.query_blocks, : self.key_blocks].astype(np.int32)
        back = row + self.cached_blocks - column
        inside = (back >= 0) & (back <= self.reach) & (column >= self.key_blocks - num_columns)
        return np.stack([a.T[inside.T] if by_column else a[inside] for a in (row, column)])


def num_visible(num_queries: int, num_keys: int, window: int) -> int:
    """How many scores are visible, for one head: the size of the band."""
    window = min(window or num_keys, num_keys)
    cached = num_keys - num_queries
    ramp = max(0, min(num_queries, window - cached))  # queries that see every key before them
    return ramp * cached + ramp * (ramp + 1) // 2 + (num_queries - ramp) * window


@lru_cache
def plan(num_queries: int, num_keys: int, window: int) -> Band:
    """The band of `num_queries` queries that are the last of `num_keys` positions; window 0 = all before.

    A block's keys are one slice: the window of its first query and the block itself, window + block - 1 keys. Blocks of
    at most a quarter of the window make that 1.25 times what is visible. Early blocks, whose window begins before the
    first key, form the ramp. It is divided into as few segments as keep the scores within `MAX_WASTE`.
    """
    window = min(window or num_keys, num_keys)
    block = min(MAX_BLOCK, max(MIN_BLOCK, window // 4))
    num_blocks = -(-num_queries // block)
    block = -(-num_queries // num_blocks)
    keys_per_block = min(window + block - 1, num_keys)
    ramp = sum(num_keys - num_queries + (i + 1) * block < keys_per_block for i in range(num_blocks))
    bands = []
    for num_segments in range(min(ramp, MAX_RAMP_SEGMENTS) + 1):
        edges = [ramp * i // num_segments for i in range(num_segments + 1)] if num_segments else [0]
        ends = [(a, b, num_keys - num_queries + b * block) for a, b in itertools.pairwise(edges)]
        if edges[-1] < num_blocks:
            ends.append((edges[-1], num_blocks, keys_per_block))
        band = Band(num_queries, num_keys, window, block, tuple(Segment(*s) for s in ends))
        if band.num_scores <= MAX_WASTE * num_visible(num_queries, num_keys, window):
            return band
        bands.append(band)
    return min(bands, key=lambda band: band.num_scores)
