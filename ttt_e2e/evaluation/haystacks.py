"""Makes prompts of the needle test: a needle in repeated noise or in held-out text, and a question at the end.

The three tasks are those of RULER's single needle-in-a-haystack (S-NIAH-1 to 3, arXiv 2404.06654), worded anew.
Shapes: `L` tokens of a prompt.
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
# A needle goes to the nearest end of a line that is within this share of the haystack's length; else within a line.
REACH = 0.05


class Prompt(NamedTuple):
    """The tokens of one prompt, without BOS, and its answer."""

    tokens_L: np.ndarray
    control_L: np.ndarray  # the same prompt with more haystack in place of the needle
    answer: np.ndarray  # tokens of the right value
    other: np.ndarray  # tokens of another value, which is not in the prompt
    value: str  # text of the right value
    position: int  # index of the needle's first token


class Parts(NamedTuple):
    """The tokens of a prompt without its haystack, and its answer, as in `Prompt`."""

    begin: np.ndarray  # the introduction
    needle: np.ndarray
    end: np.ndarray  # the question
    answer: np.ndarray
    other: np.ndarray
    value: str


@dataclass(frozen=True)
class Haystacks:
    """Makes prompts from a split of held-out text; the random seed of each is its task, length, depth and sample."""

    tokenizer: Tokenizer
    store: TokenStore
    bos_id: int
    vocab_size: int

    def prompt(self, task: int, length: int, depth: int, sample: int) -> Prompt:
        """Makes a prompt of exactly `length` tokens; the arguments alone determine it.

        Args:
          task: a key of `TASKS`.
          length: number of tokens, without BOS and answer.
          depth: position of the needle in the haystack, in percent; 0 = its beginning.
          sample: number of the prompt among those of the same task, length and depth.

        Raises:
          UserError: `length` is too short or too long, see `parts`.
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
        """Makes introduction, needle, question and answer of a prompt; the arguments are those of `prompt`.

        Raises:
          UserError: `length` has no room for needle and question, or the split has fewer tokens.
        """
        random = np.random.default_rng([0, task, length, depth, sample])
        key = f"{random.choice(QUALITIES.split())} {random.choice(THINGS.split())}"
        value, other = (_draw_value(task, random) for _ in range(2))
        words = {"key": key, "kind": "UUID" if task == 3 else "number"}
        begin, before, end = (self._encode(text.format(**words)) for text in (INTRODUCTION, NEEDLE, QUESTION))
        # Encoded separately, so that the answer has the same tokens in the needle and after the question.
        answer, other = self._encode(f" {value}"), self._encode(f" {other}")
        if (said := self.tokenizer.decode(answer).strip()) != value:
            raise UserError(f"needle takes a tokenizer that can write {value!r}, and this one makes {said!r} of it")
        needle = np.concatenate([before, answer, self._encode(".\n")])
        least = len(begin) + len(needle) + len(end) + 1
        if length < least:
            raise UserError(f"needle_lengths has {length}, but a prompt of task {task} takes at least {least} tokens")
        if task != 1 and length > self.store.num_tokens:
            where = f"{self.store.path}/{self.store.split}"
            raise UserError(f"needle_lengths has {length}, but {where} has {self.store.num_tokens} tokens")
        return Parts(begin, needle, end, answer, other, value)

    def _noise(self, count: int) -> np.ndarray:
        """The last `count` tokens of the noise lines, repeated."""
        line = self._encode(NOISE)
        return np.tile(line, -(-count // len(line)))[-count:]

    def _natural(self, count: int, random: np.random.Generator) -> np.ndarray:
        """`count` tokens of the split from a random position on, with a new line in place of each BOS.

        A BOS might make the model ignore what came before it, the needle included. Where the tokenizer has no new
        lines, it is a full stop.
        """
        start = int(random.integers(0, self.store.num_tokens - count + 1))
        tokens = self.store.stretch(start, start + count, self.vocab_size)
        line_end = next(ids[-1] for text in ("\n", ".") if len(ids := self._encode(text)))
        return np.where(tokens == self.bos_id, line_end, tokens)

    def _place(self, hay: np.ndarray, depth: int) -> int:
        """Number of tokens of the haystack that come before the needle."""
        target = round(len(hay) * depth / 100)
        ids, inverse = np.unique(hay, return_inverse=True)
        ends_line = np.array(["\n" in self.tokenizer.decode([token]) for token in ids], bool)[inverse]
        places = np.concatenate([[0], np.flatnonzero(ends_line) + 1, [len(hay)]])
        nearest = int(places[np.argmin(np.abs(places - target))])
        return nearest if abs(nearest - target) <= REACH * len(hay) else target

    def _encode(self, text: str) -> np.ndarray:
        from ttt_e2e.inference.prompts import encode

        return encode(self.tokenizer, text, self.vocab_size)


def _draw_value(task: int, random: np.random.Generator) -> str:
    """Draws a UUID for task 3, else a number of 7 digits."""
    return str(uuid.UUID(bytes=random.bytes(16), version=4)) if task == 3 else str(random.integers(10**6, 10**7))
