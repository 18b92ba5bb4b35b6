"""Generates text from a checkpoint and prompts. Shapes: `B` sequences, `V` vocabulary.

Prompts are continued one at a time, as batches of size 1: prompts of different lengths complete their mini-batches at
different tokens, so that their inner steps cannot be batched.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cluster.mesh import with_shardings
from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.inference.prompts import encode, find_tokenizer
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.inference.sampling import choose
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.inference.state import check_can_save, load_state, read_about, save_state
from ttt_e2e.inference.text import TextStream
from ttt_e2e.model import abstract_model

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
      output: file for the JSON lines; "" = stdout where there are several prompts.
      max_length: tokens that full attention has room for, see `Reader`; 0 = as many as are needed.

    Raises:
      UserError: settings, prompts, model and saved state do not fit together; then nothing is written.
    """
    if not settings.max_new_tokens and not save_to:
        raise UserError("max_new_tokens is 0, but it must be at least 1: 0 only reads, and makes sense with save_state")
    if save_to and len(prompts) > 1:
        raise UserError(f"save_state={save_to} takes a single prompt, but there are {len(prompts)}")
    if save_to:
        check_can_save(save_to, precision)
    tokenizer = find_tokenizer(config, checkpoint)
    prompt_ids = [encode(tokenizer, prompt, config.model.vocab_size) for prompt in prompts]
    about = read_about(load_from) if load_from else {"position": 0}
    longest = max(map(len, prompt_ids)) + settings.max_new_tokens
    reader = load_reader(config, checkpoint, max_length or max(about["position"] + longest, 1))
    bos_id = config.data.bos_id or tokenizer.bos_id
    ends = {tokenizer.eos_id: "eos", bos_id: "bos"}
    start = load_state(load_from, reader) if load_from else reader.start(bos_id)
    if (batch_size := len(start.tokens)) != 1:
        raise UserError(f"state {load_from} is of {batch_size} sequences, but prompts are continued one at a time")
    reader.check_room(start, longest)
    streams = len(prompts) == 1
    with _open_output(output, streams) as file:
        for index, (prompt, ids) in enumerate(zip(prompts, prompt_ids)):
            result, state = _continue(reader, start, ids, settings, index, tokenizer, ends, echo=streams)
            if file:
                file.write(json.dumps({"prompt": prompt, **result}) + "\n")
                file.flush()
    if save_to:
        save_state(save_to, reader, state, precision=precision)
        logger.info("saved the state after %d tokens in %s", state.position, save_to)


def generate_tokens(
    reader: Reader, state: ReaderState, ids, settings: Settings, key, ends: Collection[int]
) -> Iterator[Token]:
    """Yields generated tokens until one of `ends`, or until `settings.max_new_tokens`.

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
        if token.id in ends:
            return


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


def _continue(reader, state, ids, settings: Settings, index: int, tokenizer, ends: dict[int, str], *, echo: bool):
    """Reads a prompt and continues it; with `echo`, prints the text as it is generated.

    Returns `text`, `tokens`, `nll` and `ended_by` as a dict, and the state after the last token.
    """
    # A progress bar would break up text that is streamed to the same terminal.
    hidden = echo and sys.stdout.isatty()
    before = [*newest_tokens(state), *ids]
    started = time.perf_counter()
    with tqdm(total=len(ids), desc="read", unit="token", disable=hidden, leave=False) as bar:
        state, _ = reader.read(state, ids[None], learn=settings.learn != "none", bar=bar)
    prompt_end = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(settings.seed), index)
    stream, tokens, nlls, text = TextStream(tokenizer, settings.stop, before), [], [], ""
    reason = "length"

    def give_out(more: str) -> str:
        if echo and settings.max_new_tokens:
            print(more, end="", flush=True)
        return more

    bar = tqdm(total=settings.max_new_tokens, desc="generate", unit="token", disable=hidden, leave=False)
    with bar:
        for token in generate_tokens(reader, state, ids, settings, key, ends):
            state = token.state
            tokens.append(token.id)
            nlls.append(token.nll)
            bar.update()
            if token.id in ends:
                reason = ends[token.id]
                break
            text += give_out(stream.push(token.id))
            if stream.stopped:
                reason = "stop"
                break
    text += give_out(stream.finish())
    give_out("\n")
    rates = len(ids) / (prompt_end - started), len(tokens) / (time.perf_counter() - prompt_end)
    counts = (len(ids), rates[0], len(tokens), rates[1])
    logger.info("read %d tokens, %.1f tokens/s; generated %d, %.1f tokens/s (compiling included)", *counts)
    return {"text": text, "tokens": tokens, "nll": nlls, "ended_by": reason}, state


def _open_output(output: str, streams: bool):
    """Context manager that gives the file for JSON lines: that of `output`, else stdout, or None where text streams."""
    if not output:
        return contextlib.nullcontext(None if streams else sys.stdout)
    path = epath.Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror or error})") from None
