"""Answers requests of different lengths, many at a time: the likelihood of continuations, and generated ones.

Every request is read from the beginning, with fast weights of its own. What it is answered does not depend on those
that are read beside it, and so not on the size of the batches.

Shapes: `B` requests of a batch, `n` tokens that are predicted, `b` inner mini-batch, `P` tokens of a context.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ttt_e2e.inference.settings import Sampling

if TYPE_CHECKING:
    from ttt_e2e.data.tokenizers import Tokenizer
    from ttt_e2e.inference.reader import Reader

SEED = 1234  # of what is drawn; that of lm-evaluation-harness


class Text(NamedTuple):
    """Tokens, the last of which are to be scored."""

    tokens: np.ndarray  # [n + 1]; the first is not predicted
    num_scored: int


class Prompt(NamedTuple):
    """Tokens to be continued."""

    tokens: np.ndarray  # [P], at least one
    number: int  # what is drawn depends on it


class Manner(NamedTuple):
    """How prompts are continued."""

    max_tokens: int
    stops: tuple[str, ...]  # texts to stop before
    sampling: Sampling


@dataclass(frozen=True)
class Answers:
    """Answers requests by a reader.

    Fields `inner_steps` of the answers count the inner steps that came before a prediction of the request: 0 for one
    that is not longer than a mini-batch.
    """

    reader: Reader
    tokenizer: Tokenizer
    bos_id: int
    learn: bool  # whether inner steps are taken

    def score(self, texts: Sequence[Text], *, greedy: bool) -> list[dict]:
        """Scores texts as one batch: `loglikelihood`, a sum over the scored tokens in nats, and `inner_steps`.

        greedy: whether to find out, too, if each scored token is the likeliest, `is_greedy`.
        """
        reader, B, b = self.reader, len(texts), self.reader.mini_batch_size
        counts = np.array([len(text.tokens) - 1 for text in texts])
        n = counts.max()
        # Padded with zeros at the end, where by causality they change nothing that is used.
        tokens_Bn1 = np.stack([np.pad(text.tokens, (0, n + 1 - len(text.tokens))) for text in texts])
        first_scored = counts - [text.num_scored for text in texts]
        is_scored_Bn = (np.arange(n) >= first_scored[:, None]) & (np.arange(n) < counts[:, None])
        sums, is_greedy = np.zeros(B), np.ones(B, bool)
        state = reader.start(tokens_Bn1[:, 0], B)
        for begin in range(0, n, b):
            piece_Bb, is_scored_Bb = tokens_Bn1[:, 1:][:, begin : begin + b], is_scored_Bn[:, begin : begin + b]
            is_last = begin + b >= n
            before = state
            if not is_last:
                state, nll_Bb = reader.read(before, piece_Bb, learn=self.learn)
            if is_last or (greedy and is_scored_Bb.any()):
                nll_Bb, is_likeliest_Bb = reader.rate(before, piece_Bb)
                is_greedy &= (is_likeliest_Bb | ~is_scored_Bb).all(axis=1)
            sums += np.where(is_scored_Bb, nll_Bb, 0).sum(axis=1, dtype=np.float64)
        answers = [{"loglikelihood": -float(nll), "inner_steps": self._steps(n)} for nll, n in zip(sums, counts)]
        return [answer | {"is_greedy": bool(each)} for answer, each in zip(answers, is_greedy)] if greedy else answers

    def continue_(self, prompts: Sequence[Prompt], manner: Manner) -> list[dict]:
        """Continues prompts of one length as one batch: `text`, up to a stop or the end of a text, and `inner_steps`.

        Prompts of different lengths cannot be one batch, as their mini-batches are not full at the same time.
        """
        import jax

        from ttt_e2e.inference.sampling import choose
        from ttt_e2e.inference.text import TextStream

        reader, B = self.reader, len(prompts)
        prompts_BP = np.stack([prompt.tokens for prompt in prompts])
        numbers = np.array([prompt.number for prompt in prompts])
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(SEED), numbers)
        seen_BV = np.zeros((B, reader.config.model.vocab_size), bool)
        np.put_along_axis(seen_BV, prompts_BP, True, axis=1)
        streams = [TextStream(self.tokenizer, manner.stops, prompt.tokens) for prompt in prompts]
        texts, counts, is_open = [""] * B, [0] * B, [True] * B
        state, _ = reader.read(reader.start(prompts_BP[:, 0], B), prompts_BP[:, 1:], learn=self.learn)
        for index in range(manner.max_tokens):

            def draw(logits_BV, index=index):
                return choose(keys_B, index, logits_BV, seen_BV, manner.sampling)

            state, token_B, _ = reader.step(state, draw, learn=self.learn)
            token_B = np.asarray(token_B)
            seen_BV[np.arange(B), token_B] = True
            for i, token in enumerate(token_B):
                if is_open[i]:
                    counts[i] += 1
                    is_end = token in (self.bos_id, self.tokenizer.eos_id)
                    texts[i] += "" if is_end else streams[i].push(int(token))
                    is_open[i] = not (is_end or streams[i].stopped)
            if not any(is_open):
                break
        texts = [text + stream.finish() for text, stream in zip(texts, streams)]
        steps = (self._steps(prompts_BP.shape[1] - 1 + count) for count in counts)
        return [{"text": text, "inner_steps": count} for text, count in zip(texts, steps)]

    def _steps(self, num_predicted: int) -> int:
        """Inner steps before the last of so many predictions."""
        learns = self.learn and self.reader.config.model.num_fast_blocks > 0
        return max(0, int(num_predicted) - 1) // self.reader.mini_batch_size if learns else 0


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Divides the numbers of requests into batches of similar lengths, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


def equal_batches(keys: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Divides the numbers of requests into batches of equal `keys`."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


def filled(batch: list[int], batch_size: int) -> list[int]:
    """Pads a batch with its last number, to a power of two if that is less than `batch_size`.

    Every other size would be a program to compile.
    """
    size = min(batch_size, 1 << (len(batch) - 1).bit_length())
    return batch + batch[-1:] * (size - len(batch))
