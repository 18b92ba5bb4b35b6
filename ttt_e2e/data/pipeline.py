"""Reads batches of sequences for training and evaluation from a token store.

Grain shuffles and batches indices of sequences, not tokens. Batch s is a pure function of the seed and s, whatever the
number of processes, workers and restarts. Each process reads only its own rows of each batch.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from ttt_e2e.data.mixture import Mixture
from ttt_e2e.data.store import TokenStore
from ttt_e2e.errors import UserError

# Number of sequences in all epochs together. A plain `repeat()` makes Grain's length overflow at a batch size of 1.
_ENDLESS = 2**52


def training_batches(  # noqa: PLR0913 -- plain values: `data` knows nothing of the config
    store: TokenStore | Mixture,
    *,
    seq_len: int,
    global_batch_size: int,
    seed: int,
    shuffle: bool,
    start_batch: int = 0,
    rows: Any = slice(None),
    vocab_size: int,
    num_workers: int = 0,
    prefetch: int = 8,
) -> Iterator[np.ndarray]:
    """Yields training batches, int32 [len(rows), seq_len + 1], without end, from batch number `start_batch` on.

    Each epoch visits every sequence once, in an order of its own; a batch may contain the end of one epoch and the
    beginning of the next. In a mixture the stores take turns by their weights, each in epochs of its own. `rows` (a
    slice or an array of indices) are the rows of the global batch that this process reads. Threads read up to
    `prefetch` batches ahead, in `num_workers` processes if that is not 0; closing the iterator stops them. Raises
    UserError, also while iterating, where the store is too small or damaged, or has a token id that is not below
    `vocab_size`.
    """
    if shuffle and not 0 <= seed < 2**32:
        raise UserError(f"data.seed {seed}: legal: 0 to 2**32 - 1")
    if isinstance(store, Mixture):
        starts, read = store.starts(seq_len), store.numbered
        orders = [_order(*bounds, shuffle, seed + i) for i, bounds in enumerate(itertools.pairwise(starts))]
        order = grain.MapDataset.mix(orders, store.weights)
    else:
        order, read = _order(0, store.num_sequences(seq_len), shuffle, seed), store.sequences
    batches = order.batch(global_batch_size)[start_batch:]
    batches = batches.map(lambda indices: read(indices[rows], seq_len, vocab_size))
    ahead = max(prefetch // max(num_workers, 1), 1)
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=min(ahead, 4), prefetch_buffer_size=ahead))
    if num_workers:
        # Grain's workers read absl flags, which a program that is not an absl app never parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=ahead))
    return iter(batches)


def _order(start: int, stop: int, shuffle: bool, seed: int) -> grain.MapDataset:
    """The numbers from `start` to `stop` - 1 in epochs without end, where `shuffle`, each in an order of its own."""
    order = grain.MapDataset.range(start, stop)
    if shuffle:
        order = order.shuffle(seed=seed % 2**32)
    # Grain's default, `reseed_each_epoch`, is what gives each epoch its own order.
    return order.repeat(_ENDLESS // len(order))


def evaluation_batches(
    store: TokenStore | Mixture,
    *,
    seq_len: int,
    num_sequences: int,
    batch_size: int,
    rows: Any = slice(None),
    vocab_size: int,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields batches of the first `num_sequences` sequences (0 = all), in order: (tokens, number of sequences).

    Tokens are int32 [len(rows), seq_len + 1]. The last global batch is padded with copies of the last sequence; the
    number counts its rows that are no copies, which come first. Raises UserError if the store has fewer sequences, and
    as `training_batches`.
    """
    available = store.num_sequences(seq_len)
    if not 0 <= num_sequences <= available:
        raise UserError(
            f"eval.num_sequences {num_sequences}: {store.path}/{store.split} has {available} sequences of {seq_len}"
            f" tokens; legal: 0 (all) to {available}"
        )
    count = num_sequences or available

    def batches():
        for start in range(0, count, batch_size):
            indices = np.minimum(np.arange(start, start + batch_size), count - 1)
            yield store.sequences(indices[rows], seq_len, vocab_size), min(batch_size, count - start)

    return batches()
