"""Says what of a text its tokens cannot give back."""

import itertools
from collections.abc import Iterable

from ttt_e2e.data.readers import Document
from ttt_e2e.data.tokenizers import Tokenizer

# Documents and characters that are looked at: the first ones.
_MAX_DOCUMENTS = 1000
_MAX_CHARACTERS = 4 << 20
_SHOWN = 12  # characters of a difference


def describe_losses(documents: Iterable[Document], tokenizer: Tokenizer) -> str:
    """Says which share of the first documents does not decode to itself, and which of their tokens are unknown.

    Returns "" where all do and none is. SentencePiece's usual normalisation, for one, makes a space of a new line.
    """
    count = differing = num_tokens = num_unknown = num_characters = 0
    example = ""
    for document in documents:
        ids = tokenizer.encode(document.text)
        decoded = tokenizer.decode(ids)
        if decoded != document.text:
            differing += 1
            example = example or f"{document.name}, where {_difference(document.text, decoded)}"
        num_unknown += int((ids == tokenizer.unknown_id).sum())
        num_tokens, num_characters, count = num_tokens + len(ids), num_characters + len(document.text), count + 1
        if count == _MAX_DOCUMENTS or num_characters >= _MAX_CHARACTERS:
            break
    words = []
    if differing:
        words.append(f"{differing / count:.1%} of the first {count} documents do not decode to themselves ({example})")
    if num_unknown:
        words.append(f"{num_unknown / num_tokens:.2%} of their tokens are the unknown one")
    return "; ".join(words)


def _difference(text: str, decoded: str) -> str:
    """The first difference of two texts, with a character before it."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, decoded))
    at = max(sum(1 for _ in alike) - 1, 0)
    return f"{text[at : at + _SHOWN]!r} becomes {decoded[at : at + _SHOWN]!r}"
