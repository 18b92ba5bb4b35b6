"""Decodes tokens to text one by one (streaming), up to a stop string."""

from collections.abc import Sequence

from ttt_e2e.data.tokenizers import Tokenizer

_BEFORE = 16  # tokens, by far enough for a character
REPLACEMENT = "\ufffd"  # what the bytes of an incomplete character decode to


class TextStream:
    """Decodes a stream of tokens. Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), before: Sequence[int] = ()):
        """Begins a stream after the tokens `before`, whose text is not given out.

        They matter where a tokenizer drops a space at the beginning of a text, but not after another token.
        """
        self.stopped = False  # whether a stop string has come; it and all that follows are left out
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        before = [int(token) for token in before[-_BEFORE:]]
        if tokenizer.decode(before).endswith(REPLACEMENT):  # what follows would complete a character of theirs
            before = []
        self._ids: list[int] = before
        # The text of a token may depend on those before it, so new tokens are decoded together with the previous ones,
        # [start, shown), whose text was returned already. Decoding all from the beginning would take quadratic time.
        self._start, self._shown = 0, len(before)
        self._held = ""  # decoded text that may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is certain by now and was not returned yet."""
        self._ids.append(token)
        return self._release(self._decode(whole=False))

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        text = self._release(self._decode(whole=True))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, *, whole: bool) -> str:
        """Decodes the tokens since the last call. Unless `whole`, returns "" while the last character is incomplete."""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        if not whole and text.endswith(REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        """Appends decoded text to what is held back; returns what may be given out, up to a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        matches = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        self.stopped = bool(matches)
        end = min(matches) if matches else len(text) - held_back(text, self._stops)
        self._held = "" if matches else text[end:]
        return text[:end]


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)
