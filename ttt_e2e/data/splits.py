"""Decides which documents are held out: by a hash of their text, so that copies of one are all in the same split."""

import hashlib
import heapq
import itertools
from collections.abc import Callable

from ttt_e2e.data.documents import Corpus
from ttt_e2e.errors import UserError

# In corpora of at most this many documents, the held-out ones are chosen from the list of all.
_MAX_LISTED = 1024


def held_out_rule(
    corpus: Corpus, held_out: Corpus | None, min_tokens: int, val_fraction: float
) -> Callable[[str], bool]:
    """Makes the function that tells whether a text of `corpus` is held out.

    If the corpus `held_out` is given, that is whether the text is one of its. Otherwise a share of the texts is: in a
    corpus of at most `_MAX_LISTED` documents, those with the smallest hashes, at least one and not all; in a larger
    one, those with a hash below a threshold, so that adding documents moves none from one split to the other. Raises
    UserError if there are fewer than two different texts.
    """
    if held_out is not None:
        hashes = {_hash(document.text) for document in held_out}
        return lambda text: _hash(text) in hashes
    # No tokenizer makes more tokens than bytes, so these documents would be left out when they are tokenized, too.
    long_enough = (_hash(document.text) for document in corpus if len(document.text.encode()) >= max(min_tokens, 1))
    listed = list(itertools.islice(long_enough, _MAX_LISTED + 1))
    if len(listed) > _MAX_LISTED:
        return lambda text: _hash(text) < val_fraction * 2**64
    hashes = set(listed)
    if len(hashes) < 2:
        raise UserError(
            f"input {corpus.spec}: {len(corpus.files)} files with {len(hashes)} documents that differ and can have"
            f" {max(min_tokens, 1)} tokens or more; legal: two or more documents, as one is held out"
        )
    num_held_out = min(max(round(val_fraction * len(hashes)), 1), len(hashes) - 1)
    smallest = set(heapq.nsmallest(num_held_out, hashes))
    return lambda text: _hash(text) in smallest


def _hash(text: str) -> int:
    """Hash of a text: an integer, uniform in [0, 2**64), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
