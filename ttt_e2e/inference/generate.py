"""Generates text from a checkpoint and prompts. Shapes: `B` sequences, `V` vocabulary.

Prompts are continued one at a time, as batches of size 1: prompts of different lengths complete their mini-batches at
different tokens, so that their inner steps cannot be batched.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from ttt_e2e import streams
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cluster.mesh import with_shardings
from ttt_e2e.config import Config
from ttt_e2e.data.tokenizers import Tokenizer
from ttt_e2e.errors import DivergedError, UserError
from ttt_e2e.inference.prompts import encode, find_tokenizer
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.inference.sampling import choose
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.inference.state import check_can_save, load_state, read_about, save_state
from ttt_e2e.inference.text import TextStream
from ttt_e2e.model import abstract_model
from ttt_e2e.outputs import writing
from ttt_e2e.progress import hidden_progress, progress_bar
from ttt_e2e.strict_json import to_json

LEARN = ("all", "prompt", "none")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings of a generation. Raises `UserError` for an illegal value."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    learn: str = "all"  # which tokens inner steps are taken on: "all", only those of the "prompt", or "none"

    def __post_init__(self):
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, but it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, but it must be at least 0 and below 2^32")
        if self.learn not in LEARN:
            raise UserError(f"learn is {self.learn!r}, but it must be one of {', '.join(LEARN)}")
        if "" in self.stop:
            raise UserError("stop is '', but it must be a string of at least one character")


class Token(NamedTuple):
    """A generated token."""

    id: int
    nll: float  # nats, under the model's own prediction, before temperature, penalty, top-k and top-p
    state: ReaderState  # after this token


class Continuation(NamedTuple):
    """A continuation of a prompt."""

    text: str
    tokens: list[int]  # the one that ended it included
    nll: list[float]  # of each token, as that of `Token`
    ended_by: str  # "length", "stop", "bos", "eos" or "diverged"
    state: ReaderState  # after the last token
    diverged: str = ""  # where the model diverged; "" if it did not


def generate(  # noqa: PLR0913 -- they are the flags of the command
    config: Config,
    checkpoint,
    prompts: list[str],
    settings: Settings,
    *,
    load_from: str = "",
    save_to: str = "",
    precision: str = "float32",
    output: str = "",
    max_length: int = 0,
) -> None:
    """Continues prompts: a single one is streamed to stdout as text, several are written as JSON lines.

    Args:
      config: the model's configuration.
      checkpoint: path of its parameters.
      prompts: at least one; an empty prompt is BOS alone.
      settings: number of tokens, sampling, stop strings and learning.
      load_from: saved state that every prompt is read after; "" = start from BOS.
      save_to: directory for the state after the single prompt and its continuation; "" = save none.
      precision: dtype of the saved fast weights, see `save_state`.
      output: file for the JSON lines; "" = stdout where there are several prompts. Where nobody reads stdout any more,
        and no file is to be written, generation stops.
      max_length: tokens that full attention has room for, see `Reader`; 0 = as many as are needed.

    Raises:
      UserError: settings, prompts, model and saved state do not fit together; then nothing is written.
      DivergedError: the NLL of a token, or a fast weight to save, is not finite. Then the results of all prompts are
        written, but no state is.
    """
    _check_request(len(prompts), settings, save_to, precision)
    tokenizer = find_tokenizer(config, checkpoint)
    prompt_ids = [encode(tokenizer, prompt, config.model.vocab_size) for prompt in prompts]
    about = read_about(load_from) if load_from else {"position": 0}
    longest = max(map(len, prompt_ids)) + settings.max_new_tokens
    reader = load_reader(config, checkpoint, max_length or max(about["position"] + longest, 1))
    start = _start(reader, load_from, config.data.bos_id or tokenizer.bos_id)
    reader.check_room(start, longest)
    single, places = len(prompts) == 1, []  # places: where each prompt diverged that did
    is_wanted = (lambda: True) if output or save_to else streams.is_read
    emit = partial(_echo, is_wanted) if single and settings.max_new_tokens else None
    # A progress bar would break up text that is streamed to the same terminal.
    hidden = hidden_progress(single and sys.stdout.isatty())
    with writing(f"output {output or 'stdout'}"), _open_output(output, single) as file, hidden:
        for index, (prompt, ids) in enumerate(zip(prompts, prompt_ids)):
            result = continue_prompt(reader, start, ids, settings, tokenizer, index=index, emit=emit)
            if emit:
                emit("\n")
            if result.diverged:
                places.append(result.diverged if single else f"prompt {index + 1}: {result.diverged}")
            if file:
                fields = {name: getattr(result, name) for name in ("text", "tokens", "nll", "ended_by")}
                print(to_json({"prompt": prompt, **fields}), file=file, flush=True)
            if not is_wanted():
                break
    _check_finite(result.state, places, save_to)
    if save_to:
        save_state(save_to, reader, result.state, precision=precision)
        logger.info("saved the state after %d tokens in %s", result.state.position, save_to)


def generate_tokens(
    reader: Reader, state: ReaderState, ids, settings: Settings, key, ends: Collection[int]
) -> Iterator[Token]:
    """Yields generated tokens until one of `ends`, an NLL that is not finite, or `settings.max_new_tokens`.

    Args:
      reader: the reader that made `state`.
      state: state of one sequence after its prompt.
      ids: tokens of the prompt, to which the repetition penalty applies too.
      settings: number of tokens, sampling and learning; stop strings are left to the caller.
      key: random key of this sequence.
      ends: tokens to stop after, such as BOS, which begins another document.
    """
    seen_BV = np.zeros((1, reader.config.model.vocab_size), bool)
    seen_BV[0, ids] = True
    for index in range(settings.max_new_tokens):

        def draw(logits_BV, index=index):
            return choose(key[None], index, logits_BV, seen_BV, settings.sampling)

        state, token_B, nll_B = reader.step(state, draw, learn=settings.learn == "all")
        [token_id], [nll] = jax.device_get((token_B, nll_B))  # one wait for both
        token = Token(int(token_id), float(nll), state)
        seen_BV[0, token.id] = True
        yield token
        if token.id in ends or not math.isfinite(token.nll):
            return


def _check_request(num_prompts: int, settings: Settings, save_to: str, precision: str) -> None:
    """Raises `UserError` where so many prompts cannot be continued, or not saved, with these settings."""
    if not settings.max_new_tokens and not save_to:
        raise UserError("max_new_tokens is 0, but it must be at least 1: 0 only reads, and makes sense with save_state")
    if save_to and num_prompts > 1:
        raise UserError(f"save_state={save_to} takes a single prompt, but there are {num_prompts}")
    if save_to:
        check_can_save(save_to, precision)


def _start(reader: Reader, load_from: str, bos_id: int) -> ReaderState:
    """The saved state, or else that after BOS. Raises `UserError` where it is of several sequences, or does not fit."""
    start = load_state(load_from, reader) if load_from else reader.start(bos_id)
    if (batch_size := len(start.tokens)) != 1:
        raise UserError(f"state {load_from} is of {batch_size} sequences, but prompts are continued one at a time")
    return start


def newest_tokens(state: ReaderState) -> np.ndarray:
    """The tokens of a state's unfinished mini-batch, of its first sequence: int32, at least the newest one."""
    return np.asarray(state.tokens)[0, : state.position % state.tokens.shape[1] + 1]


def load_reader(config: Config, checkpoint, max_length: int) -> Reader:
    """Loads the parameters of a checkpoint onto one device and makes a reader of them.

    Raises `UserError` as `load_params` does: there is no such checkpoint, or it does not fit the config.
    """
    graphdef, abstract = abstract_model(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(checkpoint, with_shardings(abstract, device))
    return Reader(graphdef, params, config, max_length=max_length)


def continue_prompt(
    reader: Reader, state: ReaderState, ids, settings: Settings, tokenizer: Tokenizer, *, index: int = 0, emit=None
) -> Continuation:
    """Reads a prompt after `state` and continues it, up to a stop string, BOS, the tokenizer's EOS, or the length.

    A token of which the NLL is not finite, and what would come after it, are not in the result.

    Args:
      reader: the reader that made `state`.
      state: state of one sequence.
      ids: tokens of the prompt, int32 [num_tokens].
      settings: number of tokens, sampling, stop strings and learning.
      tokenizer: the one that the model was trained with.
      index: number of the prompt among several, each of which has its own random key.
      emit: function that is called with each piece of the text as soon as it is certain, and returns whether to go on.

    Raises:
      UserError: full attention has no room for the tokens.
    """
    ends = {tokenizer.eos_id: "eos", reader.config.data.bos_id or tokenizer.bos_id: "bos"}
    before = [*newest_tokens(state), *ids]
    started = time.perf_counter()
    with progress_bar(total=len(ids), desc="read", unit="token", leave=False) as bar:
        state, nll_Bn = reader.read(state, ids[None], learn=settings.learn != "none", bar=bar)
    prompt_end = time.perf_counter()
    wrong = np.flatnonzero(~np.isfinite(nll_Bn[0]))
    place = f"the NLL of token {wrong[0] + 1} of the prompt is {nll_Bn[0, wrong[0]]}" if len(wrong) else ""
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    stream, tokens, nlls, pieces = TextStream(tokenizer, settings.stop, before), [], [], []
    reason = "diverged" if place else "length"

    def give_out(piece: str) -> bool:
        pieces.append(piece)
        return emit is None or emit(piece)

    with progress_bar(total=settings.max_new_tokens, desc="generate", unit="token", leave=False) as bar:
        for token in () if place else generate_tokens(reader, state, ids, settings, key, ends):
            if not math.isfinite(token.nll):
                reason, place = "diverged", f"the NLL of generated token {len(tokens) + 1} is {token.nll}"
                break
            state = token.state
            tokens.append(token.id)
            nlls.append(token.nll)
            bar.update()
            if token.id in ends:
                reason = ends[token.id]
                break
            if not give_out(stream.push(token.id)):
                break
            if stream.stopped:
                reason = "stop"
                break
    give_out(stream.finish())
    rates = len(ids) / (prompt_end - started), len(tokens) / (time.perf_counter() - prompt_end)
    counts = (len(ids), rates[0], len(tokens), rates[1])
    logger.info("read %d tokens, %.1f tokens/s; generated %d, %.1f tokens/s (compiling included)", *counts)
    return Continuation("".join(pieces), tokens, nlls, reason, state, place)


def _echo(is_wanted: Callable[[], bool], text: str) -> bool:
    """Prints a part of a text; returns whether the rest is wanted."""
    print(text, end="", flush=True)
    return is_wanted()


def _check_finite(state: ReaderState, places: list[str], save_to: str) -> None:
    """Raises `DivergedError` where prompts diverged at `places`, or a fast weight of a state to save is not finite."""
    if save_to and not places and not all(np.isfinite(w).all() for w in jax.tree.leaves(jax.device_get(state.fast))):
        places = [f"a fast weight is NaN or infinite after {state.position} tokens"]
    if places:
        raise DivergedError(places[0] + (f"; no state is saved in {save_to}" if save_to else ""))


def _open_output(output: str, single: bool):
    """Context manager that gives the file for JSON lines: of `output`, else stdout, or None for a single prompt."""
    if not output:
        return contextlib.nullcontext(None if single else sys.stdout)
    path = epath.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w")
