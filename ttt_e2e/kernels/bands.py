"""Which keys a block of queries can see: the band that a window cuts out of the score matrix, in blocks.

Shapes: `T` queries, `S` keys, `W` consecutive keys that one block of queries is given.
"""

import itertools
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp

MAX_BLOCK = 128  # queries; more no longer makes the matrix products faster, and the scores outgrow the caches
MIN_BLOCK = 16  # queries; with fewer the loop costs more than the keys it saves
MAX_WASTE = 1.3  # scores computed / scores seen, where the block size allows it
MAX_RAMP_SEGMENTS = 8  # bounds compile time


class Segment(NamedTuple):
    """Consecutive query blocks that are given equally many keys each."""

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
        """Query blocks in all."""
        return self.segments[-1].last_block

    def end(self, block):
        """Position after the last query of a block, which may be traced; positions count keys."""
        return self.num_keys - self.num_queries + (block + 1) * self.block

    def stop(self, block, num_keys: int):
        """Position after the last of the `num_keys` keys that a block is given; the block may be traced."""
        return jnp.clip(self.end(block), num_keys, self.num_keys)

    def padding(self, length: int) -> int:
        """Keys missing before the last `length`, for a slice of up to that many to exist for every block."""
        stops = [(min(max(self.end(s.first_block), s.num_keys), self.num_keys), s.num_keys) for s in self.segments]
        return max(0, *(self.num_keys - length - (stop - min(length, num_keys)) for stop, num_keys in stops))

    @property
    def num_scores(self) -> int:
        """Scores that a pass over the band computes."""
        return sum((s.last_block - s.first_block) * self.block * s.num_keys for s in self.segments)


def num_visible(num_queries: int, num_keys: int, window: int) -> int:
    """Scores that are seen, of one head: the band itself."""
    window = min(window or num_keys, num_keys)
    cached = num_keys - num_queries
    ramp = max(0, min(num_queries, window - cached))  # queries that see every key before them
    return ramp * cached + ramp * (ramp + 1) // 2 + (num_queries - ramp) * window


@lru_cache
def plan(num_queries: int, num_keys: int, window: int) -> Band:
    """The band of `num_queries` queries that are the last of `num_keys` positions; window 0 = all before.

    A block's keys are one slice: the window of its first query and the block itself, window + block - 1 keys. A block
    of at most a quarter of the window makes that 1.25 times what is seen. Early blocks, whose window reaches back
    before the first key, form the ramp: it is divided into as few segments as keep it within that bound.
    """
    window = min(window or num_keys, num_keys)
    block = min(MAX_BLOCK, max(MIN_BLOCK, window // 4))
    num_blocks = -(-num_queries // block)
    block = -(-num_queries // num_blocks)
    num_keys_seen = min(window + block - 1, num_keys)
    ramp = sum(num_keys - num_queries + (i + 1) * block < num_keys_seen for i in range(num_blocks))
    bands = []
    for num_segments in range(min(ramp, MAX_RAMP_SEGMENTS) + 1):
        edges = [ramp * i // num_segments for i in range(num_segments + 1)] if num_segments else [0]
        ends = [(a, b, num_keys - num_queries + b * block) for a, b in itertools.pairwise(edges)]
        if edges[-1] < num_blocks:
            ends.append((edges[-1], num_blocks, num_keys_seen))
        band = Band(num_queries, num_keys, window, block, tuple(Segment(*s) for s in ends))
        if band.num_scores <= MAX_WASTE * num_visible(num_queries, num_keys, window):
            return band
        bands.append(band)
    return min(bands, key=lambda band: band.num_scores)
