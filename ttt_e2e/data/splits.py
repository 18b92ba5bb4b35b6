"""Decides which documents are held out: by a hash of their text, so that copies of one are all in the same split."""

import hashlib
import heapq
import itertools
from collections.abc import Callable

from ttt_e2e.data.documents import Corpus
from ttt_e2e.data.tokenizers import Tokenizer
from ttt_e2e.errors import UserError

# In corpora of at most this many documents, the held-out ones are chosen from the list of all.
_MAX_LISTED = 1024
# More than tokens have: the beginning of a text that is encoded to see whether the text has enough of them.
_CHARACTERS_PER_TOKEN = 64


def held_out_rule(
    corpus: Corpus, held_out: Corpus | None, min_tokens: int, val_fraction: float, tokenizer: Tokenizer | None = None
) -> Callable[[str], bool]:
    """Makes the function that tells whether a text of `corpus` is held out.

    If the corpus `held_out` is given, that is whether the text is one of its. Otherwise a share of the texts is, of
    those with `min_tokens` tokens of `tokenizer` (None: which can have so many, by their bytes): in a corpus of at most
    `_MAX_LISTED` such documents, those with the smallest hashes, at least one and not all; in a larger one, those with
    a hash below a threshold, so that adding documents moves none from one split to the other. Raises UserError if there
    are fewer than two different texts.
    """
    if held_out is not None:
        hashes = {_hash(document.text) for document in held_out}
        return lambda text: _hash(text) in hashes
    long_enough = (_hash(document.text) for document in corpus if is_long_enough(document.text, min_tokens, tokenizer))
    listed = list(itertools.islice(long_enough, _MAX_LISTED + 1))
    if len(listed) > _MAX_LISTED:
        return lambda text: _hash(text) < val_fraction * 2**64
    hashes = set(listed)
    if len(hashes) < 2:
        raise UserError(
            f"input {corpus.spec}: {len(corpus.files)} files with {len(hashes)} documents that differ and"
            f" {'can ' if tokenizer is None else ''}have {max(min_tokens, 1)} tokens or more; legal: two or more"
            " documents, as one is held out"
        )
    num_held_out = min(max(round(val_fraction * len(hashes)), 1), len(hashes) - 1)
    smallest = set(heapq.nsmallest(num_held_out, hashes))
    return lambda text: _hash(text) in smallest


def is_long_enough(text: str, min_tokens: int, tokenizer: Tokenizer | None) -> bool:
    """Whether a text has `min_tokens` tokens, and any; without a tokenizer, whether it can have, by its bytes."""
    least = max(min_tokens, 1)
    if len(text.encode()) < least:  # no tokenizer makes more tokens than bytes
        return False
    # Of a long text the beginning will do: tokens have a few characters, and only the last changes with what follows.
    beginning = text[: _CHARACTERS_PER_TOKEN * least]
    return tokenizer is None or len(tokenizer.encode(beginning)) > least or len(tokenizer.encode(text)) >= least


def splits_without_documents(
    corpus: Corpus,
    held_out: Corpus | None,
    is_held_out: Callable[[str], bool],
    min_tokens: int,
    tokenizer: Tokenizer | None,
) -> set[str]:
    """The splits that get no document; reads until each has one."""
    lacking = {"train", "val"}

    def find(split: str, text: str) -> bool:
        """Notes that a split has a document if it gets this text; returns whether none is lacking any more."""
        if split in lacking and is_long_enough(text, min_tokens, tokenizer):
            lacking.remove(split)
        return not lacking

    for document in held_out or ():
        find("val", document.text)
        if "val" not in lacking:
            break
    for document in corpus:
        split = "train" if not is_held_out(document.text) else "val" if held_out is None else ""
        if find(split, document.text):
            break
    return lacking


def _hash(text: str) -> int:
    """Hash of a text: an integer, uniform in [0, 2**64), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
