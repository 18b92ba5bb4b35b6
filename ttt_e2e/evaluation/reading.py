"""Reading text with a progress bar, and batches of a fixed size. Shapes: `B` sequences, `n` tokens."""

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from ttt_e2e.inference.reader import Reader, ReaderState

PIECE = 4096  # tokens of a sequence that are read between two looks at the progress bar


def read(
    reader: Reader, state: ReaderState, tokens_Bn: np.ndarray, bar: tqdm, *, learn: bool = True
) -> tuple[ReaderState, np.ndarray]:
    """As `Reader.read`, a piece at a time; `bar` counts tokens."""
    size = max(1, PIECE // reader.mini_batch_size) * reader.mini_batch_size
    nlls = [np.zeros((len(tokens_Bn), 0), np.float32)]
    for begin in range(0, tokens_Bn.shape[1], size):
        piece = tokens_Bn[:, begin : begin + size]
        state, nll = reader.read(state, piece, learn=learn)
        nlls.append(nll)
        bar.update(piece.size)
    return state, np.concatenate(nlls, axis=1)


def batches(items: Sequence, batch_size: int) -> Iterator[list]:
    """Items in their order, `batch_size` at a time (the last batch may be shorter)."""
    for begin in range(0, len(items), batch_size):
        yield list(items[begin : begin + batch_size])


def fill_up(rows: list, batch_size: int) -> list:
    """Rows of a batch with copies of the last, up to `batch_size`: a batch of another size is another program."""
    return rows + rows[-1:] * (batch_size - len(rows))
