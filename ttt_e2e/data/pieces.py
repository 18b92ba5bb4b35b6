"""Cuts a long text into pieces that are encoded one after the other, so that what encoding it takes is bounded."""

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 20


def cut(text: str, boundary: re.Pattern | None) -> Iterator[str]:
    """Cuts a text into pieces of about `PIECE_CHARACTERS`, at matches (empty ones) of `boundary`; None = nowhere.

    A piece ends at the first boundary past that size, or with the text.
    """
    start = 0
    while boundary and len(text) - start > PIECE_CHARACTERS:
        match = boundary.search(text, start + PIECE_CHARACTERS)
        if not match or match.start() == len(text):
            break
        yield text[start : match.start()]
        start = match.start()
    yield text[start:] if start else text
