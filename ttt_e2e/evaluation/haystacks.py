"""Prompts of the needle test: a needle in repeated noise or in held-out text, and a question at the end.

The three tasks are those of RULER's single needle (S-NIAH-1 to 3, arXiv 2404.06654), in words of our own. Shapes: `L`
tokens of a prompt.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from ttt_e2e.data.store import TokenStore
    from ttt_e2e.data.tokenizers import Tokenizer

TASKS = {
    1: "a number in repeated noise",
    2: "a number in natural text",
    3: "a UUID in natural text",
}
INTRODUCTION = "Remember the special magic {kind} in this text.\n"
NEEDLE = "One of the special magic {kind}s for {key} is:"
QUESTION = "\nWhich special magic {kind} for {key} is in the text? The special magic {kind} for {key} is:"
NOISE = "The river is wide. The hill is steep. The road goes on. Birds fly by.\n"
QUALITIES = "amber brave calm dusty eager faint gentle hollow icy jolly keen lively misty noble olden proud quiet rapid"
THINGS = (
    "anchor basket candle drum engine fiddle garden hammer island jacket kettle ladder mirror needle orchard pencil"
)
# A needle goes to the nearest end of a line, if there is one within this share of the haystack; else within a line.
REACH = 0.05


class Prompt(NamedTuple):
    """One prompt, as read after BOS, and what to say next."""

    tokens_L: np.ndarray
    control_L: np.ndarray  # the same with more haystack in place of the needle
    answer: np.ndarray  # tokens that continue the prompt
    other: np.ndarray  # tokens of another value, which the prompt has nowhere
    value: str  # what the answer says
    position: int  # of the needle's first token


class Parts(NamedTuple):
    """The tokens of a prompt that are no haystack."""

    begin: np.ndarray
    needle: np.ndarray
    end: np.ndarray  # the question
    answer: np.ndarray
    other: np.ndarray  # another value
    value: str


@dataclass(frozen=True)
class Haystacks:
    """Makes prompts out of a split of held-out text, each from a seed that is its place in the test."""

    tokenizer: Tokenizer
    store: TokenStore
    bos_id: int
    vocab_size: int

    def prompt(self, task: int, length: int, depth: int, sample: int) -> Prompt:
        """A prompt of exactly `length` tokens, the same whenever and with whatever others it is made.

        Args:
          task: of `TASKS`.
          length: in tokens, BOS and answer left out.
          depth: where the needle is, in percent of the haystack; 0 = its beginning.
          sample: number of the prompt among those of the same task, length and depth.

        Raises:
          UserError: as `parts`.
        """
        begin, needle, end, *answers = self.parts(task, length, depth, sample)
        room = length - len(begin) - len(end)
        random = np.random.default_rng([1, task, length, depth, sample])
        hay = self._noise(room) if task == 1 else self._natural(room, random)
        shorter = hay[len(needle) :]
        place = self._place(shorter, depth)
        tokens = np.concatenate([begin, shorter[:place], needle, shorter[place:], end])
        return Prompt(tokens, np.concatenate([begin, hay, end]), *answers, len(begin) + place)

    def parts(self, task: int, length: int, depth: int, sample: int) -> Parts:
        """What stands around the haystack of a prompt; the arguments are those of `prompt`.

        Raises:
          UserError: the length has no room for needle and question, or the split is shorter.
        """
        random = np.random.default_rng([0, task, length, depth, sample])
        key = f"{random.choice(QUALITIES.split())} {random.choice(THINGS.split())}"
        value, other = (_draw_value(task, random) for _ in range(2))
        words = {"key": key, "kind": "UUID" if task == 3 else "number"}
        begin, before, end = (self._encode(text.format(**words)) for text in (INTRODUCTION, NEEDLE, QUESTION))
        # Encoded one by one, so that the answer is the same tokens in the needle and after the question.
        answer, other = self._encode(f" {value}"), self._encode(f" {other}")
        needle = np.concatenate([before, answer, self._encode(".\n")])
        least = len(begin) + len(needle) + len(end) + 1
        if length < least:
            raise UserError(f"needle_lengths has {length}, but a prompt of task {task} takes at least {least} tokens")
        if task != 1 and length > self.store.num_tokens:
            where = f"{self.store.path}/{self.store.split}"
            raise UserError(f"needle_lengths has {length}, but {where} has {self.store.num_tokens} tokens")
        return Parts(begin, needle, end, answer, other, value)

    def _noise(self, count: int) -> np.ndarray:
        """The end of ever the same lines."""
        line = self._encode(NOISE)
        return np.tile(line, -(-count // len(line)))[-count:]

    def _natural(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Some stretch of the split. Where one document ends, a new line begins: nothing may hide what was before."""
        start = int(random.integers(0, self.store.num_tokens - count + 1))
        tokens = self.store.stretch(start, start + count, self.vocab_size)
        return np.where(tokens == self.bos_id, self._encode("\n")[-1], tokens)

    def _place(self, hay: np.ndarray, depth: int) -> int:
        """How many tokens of the haystack come before the needle."""
        wanted = round(len(hay) * depth / 100)
        ids, inverse = np.unique(hay, return_inverse=True)
        ends_line = np.array(["\n" in self.tokenizer.decode([token]) for token in ids], bool)[inverse]
        places = np.concatenate([[0], np.flatnonzero(ends_line) + 1, [len(hay)]])
        nearest = int(places[np.argmin(np.abs(places - wanted))])
        return nearest if abs(nearest - wanted) <= REACH * len(hay) else wanted

    def _encode(self, text: str) -> np.ndarray:
        from ttt_e2e.inference.prompts import encode

        return encode(self.tokenizer, text, self.vocab_size)


def _draw_value(task: int, random: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=random.bytes(16), version=4)) if task == 3 else str(random.integers(10**6, 10**7))
