"""Counts the bytes of the text that tokens stand for, by which models of different tokenizers compare.

Shapes: `B` sequences, `T` tokens of a sequence, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ttt_e2e.config import Config
from ttt_e2e.data.masking import is_target
from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from ttt_e2e.data.mixture import Mixture
    from ttt_e2e.data.store import TokenStore


class TextBytes:
    """The bytes of the text of tokens, by the tokenizer that the model was trained with."""

    def __init__(self, config: Config, checkpoint: str = ""):
        """Finds the tokenizer of a model, by its config and its checkpoint, if that is in a run.

        Raises `UserError` where the tokenizer is not known, or does not fit the model.
        """
        from ttt_e2e.inference.prompts import find_tokenizer

        tokenizer = find_tokenizer(config, checkpoint)
        # Models may have more ids than their tokenizer: these are never in a text.
        room = (0, config.model.vocab_size - tokenizer.vocab_size)
        self._first_V = np.pad(tokenizer.num_bytes(first=True), room)
        self._others_V = np.pad(tokenizer.num_bytes(), room)
        self._bos_id, self._masked_id = tokenizer.bos_id, config.data.masked_id
        self._batch_size = config.eval.batch_size
        self.tokenizer = tokenizer.fingerprint

    @classmethod
    def of(cls, config: Config, checkpoint: str = "") -> TextBytes | None:
        """Makes that of a config; None where its tokenizer is not known."""
        try:
            return cls(config, checkpoint)
        except UserError:
            return None

    def count_sequences(self, store: TokenStore | Mixture, count: int, length: int, last: int = 0) -> int:
        """Counts the bytes of the unmasked targets of the first `count` sequences of `length` targets.

        last: number of last targets of each sequence that count; 0 = all.
        """
        total = 0
        for start in range(0, count, self._batch_size):
            rows = range(start, min(start + self._batch_size, count))
            total += self.count(store.sequences(rows, length, len(self._others_V))[:, -(last or length) - 1 :])
        return total

    def count(self, tokens_BT: np.ndarray) -> int:
        """Counts the UTF-8 bytes of the unmasked targets: all tokens but the first of each sequence, and but BOS."""
        before, targets = tokens_BT[:, :-1], tokens_BT[:, 1:]
        num_bytes = np.where(before == self._bos_id, self._first_V[targets], self._others_V[targets])
        return int(num_bytes[is_target(targets, self._masked_id)].sum())


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Converts an NLL, in nats and summed over the targets of `num_bytes` bytes, to bits for each byte."""
    return nll / math.log(2) / num_bytes
