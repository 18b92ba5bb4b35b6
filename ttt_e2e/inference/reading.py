"""Reading a text with a progress bar. Shapes: `B` sequences, `n` tokens."""

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
