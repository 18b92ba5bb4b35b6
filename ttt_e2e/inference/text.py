"""Text out of tokens as they come, up to a stop string."""

from collections.abc import Sequence

from ttt_e2e.data.tokenizers import Tokenizer

REPLACEMENT = "\ufffd"  # what an unfinished character decodes to


class TextStream:
    """Text of tokens that come one by one. Gives out nothing that may yet turn out to begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.stopped = False  # whether a stop string was found; it and what follows are left out
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # Tokens are decoded with those before them, as what a token reads like may depend on these; not with all of
        # them, as that would take ever longer. [start, shown) was given out, and is decoded again as context.
        self._start = self._shown = 0
        self._held = ""  # text that may begin a stop string

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._ids.append(token)
        return self._release(self._decode(whole=False))

    def finish(self) -> str:
        """The text that is left after the last token."""
        text = self._release(self._decode(whole=True))
        held, self._held = self._held, ""
        return text + held

    def _decode(self, *, whole: bool) -> str:
        """Text of the tokens since the last call; but for `whole`, none while the last character is unfinished."""
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        text = self._tokenizer.decode(self._ids[self._start :])
        if not whole and text.endswith(REPLACEMENT):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(text) - held_back(text, self._stops)
        self._held = "" if found else text[keep:]
        return text[:keep]


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string without being all of it."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)
