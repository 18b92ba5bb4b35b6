"""The package from Python (docs/python.md): functions that return values, and print nothing.

What this file defines is imported from `ttt_e2e`; `ttt_e2e.train` is in train/__init__.py.

Shapes: `n` tokens of a text.
"""

import os
from collections.abc import Iterable
from functools import cached_property

import jax
import numpy as np
from etils import epath

from ttt_e2e import paths
from ttt_e2e.config import Config
from ttt_e2e.data.store import check_range
from ttt_e2e.data.tokenizers import Tokenizer
from ttt_e2e.errors import DivergedError, UserError
from ttt_e2e.evaluation import flags as evaluation
from ttt_e2e.evaluation.base import run_all
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.flags import as_arguments
from ttt_e2e.inference.generate import Continuation, Settings, continue_prompt
from ttt_e2e.inference.reader import ENDLESS, ReaderState
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.inference.state import load_state, save_state
from ttt_e2e.progress import quietly
from ttt_e2e.runs.configs import find_config
from ttt_e2e.runs.directory import find_run


def load_config(config, overrides: dict | None = None) -> Config:
    """Makes a config, with overrides such as {"train.num_steps": 100}.

    config: a config file, "FILE.py:ARG" or "FILE.py"; a run directory, or a checkpoint in one; a ConfigDict; a Config.

    Raises `UserError` where there is no such file, or the config is not legal.
    """
    return find_config(config, as_arguments(overrides))


def load(path, overrides: dict | None = None, *, config=None) -> "Model":
    """Loads a model onto one device.

    Args:
      path: a run directory, of which the newest checkpoint is taken, or a checkpoint.
      overrides: config fields, as {"inner.learning_rate": 0.5}.
      config: what `load_config` takes, for a checkpoint that is in no run directory.

    Raises:
      UserError: there is no such checkpoint, or it does not fit the config.
    """
    return Model(_subject(path, overrides, config))


def evaluate(
    path, overrides: dict | None = None, *, config=None, output="", progress: bool = False, **settings
) -> dict:
    """Evaluates a checkpoint on held-out text, as the command `evaluate` does.

    Args:
      path, overrides, config: as those of `load`.
      output: directory for the results; by default `evaluation` in the run directory `path`.
      progress: whether to show progress bars on stderr.
      settings: flags of the command by their names, as `context_lengths=[512, 1024]` or `generation=True`.

    Returns:
      What the command prints, as a dict.

    Raises:
      UserError: the checkpoint, the held-out text or a setting does not fit the config; then nothing was run.
      DivergedError: a loss is NaN or infinite.
      PreemptedError: SIGTERM or SIGUSR1 asked to stop.
    """
    asked = evaluation.asked(evaluation.from_keywords(settings))
    subject = _subject(path, overrides, config)
    if not output:
        if not epath.Path(subject.checkpoint, "config.json").exists():
            raise UserError(f"output is missing: {path} is no run directory, where it would be `evaluation`")
        output = f"{subject.checkpoint}/evaluation"
    with quietly(progress=progress):
        results, diverged = run_all(asked, subject.config, subject.checkpoint, _path(output))
    if diverged:
        raise DivergedError(f"{diverged[0]}, from checkpoint {path}; in {output} such numbers are null")
    return results


class GeneratedText(str):
    """A generated text: a string, with what is known of its tokens as attributes."""

    tokens: np.ndarray  # int32 [n], the one that ended it included
    nll: np.ndarray  # float32 [n], nats, under the model's own prediction, before temperature, top-k and top-p
    ended_by: str  # "length", "stop", "bos" or "eos"
    state: ReaderState  # after the last token

    def __new__(cls, continuation: Continuation):
        """Makes the string, and sets its attributes."""
        text = super().__new__(cls, continuation.text)
        text.tokens, text.nll = np.array(continuation.tokens, np.int32), np.array(continuation.nll, np.float32)
        text.ended_by, text.state = continuation.ended_by, continuation.state
        return text


class Model:
    """A trained model, which reads texts and continues them.

    Every text may be given as token ids [n] instead, without BOS. `state` is what another call returned, to go on from;
    None = a new document. A state is never changed, so that it can be gone on from in several ways.
    """

    def __init__(self, subject: Subject):
        self._subject = subject
        with quietly():
            self._reader = subject.reader(ENDLESS)

    def __repr__(self):
        return f"<ttt_e2e.Model of {self._subject.step_directory}>"

    @property
    def config(self) -> Config:
        """The config of the run, overrides applied."""
        return self._subject.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run. Raises `UserError` where it cannot be found."""
        return self._subject.tokenizer

    def encode(self, text) -> np.ndarray:
        """Encodes a text as token ids, int32 [n], without BOS; checks ids, and returns them.

        Raises `UserError` for anything else, and for an id outside of the vocabulary.
        """
        if isinstance(text, str):
            return self._subject.encode(text)
        ids = np.asarray(text)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UserError(f"text is {text!r:.80}, but it must be one string, or a list of token ids")
        if ids.size and ids.min() < 0:
            raise UserError(f"text has the token id {ids.min()}, but ids must be at least 0")
        check_range(ids, self.config.model.vocab_size, "text")
        return ids.astype(np.int32)

    def nll(self, text, *, state: ReaderState | None = None, learn: bool = True) -> np.ndarray:
        """Computes the NLL of each token of a text given those before it, float32 [n], in nats.

        Args:
          text: the text. BOS, which begins a document, is not in it and is not scored.
          state: state to read the text after.
          learn: whether to take inner steps while reading. A token is scored before the step of its mini-batch.
        """
        return self._read(text, state, learn)[1]

    def read(self, text, *, state: ReaderState | None = None, learn: bool = True) -> ReaderState:
        """Reads a text, with or without learning from it; returns the state after it."""
        return self._read(text, state, learn)[0]

    def generate(  # noqa: PLR0913 -- they are the flags of the command
        self,
        prompt="",
        *,
        state: ReaderState | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Iterable[str] = (),
        learn: str = "all",
    ) -> GeneratedText:
        """Reads a prompt and continues it, with the settings of the command `generate`.

        Returns:
          The text that follows the prompt, a string; its attributes are `tokens`, `nll`, `ended_by` and `state`.

        Raises:
          UserError: a setting is not legal, or there is no tokenizer.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        settings = Settings(max_new_tokens, sampling, seed, stops, learn)
        ids, start = self.encode(prompt), self._start(state)
        with quietly():
            continuation = continue_prompt(self._reader, start, ids, settings, self.tokenizer)
        if continuation.diverged:
            raise DivergedError(continuation.diverged)
        return GeneratedText(continuation)

    def save(self, state: ReaderState, path, *, precision: str = "float32") -> None:
        """Saves a state in the new directory `path`, as `generate --save_state` does.

        precision: "bfloat16" halves the size of the fast weights, by rounding what was learned.

        Raises `UserError` where `path` exists, or cannot be written.
        """
        with quietly():
            save_state(_path(path), self._reader, self._checked(state), precision=precision)

    def load_state(self, path) -> ReaderState:
        """Loads a state that `save` or `generate --save_state` wrote.

        Raises `UserError` where there is none, it is damaged, or it is of another model or checkpoint.
        """
        with quietly():
            return self._checked(load_state(_path(path), self._reader))

    def _read(self, text, state: ReaderState | None, learn: bool) -> tuple[ReaderState, np.ndarray]:
        """The state after a text, and the NLL [n] of its tokens."""
        if not isinstance(learn, bool):
            raise UserError(f"learn is {learn!r}, but it must be True or False")
        ids, start = self.encode(text), self._start(state)
        state, nll_Bn = self._reader.read(start, ids[None], learn=learn)
        return state, nll_Bn[0]

    def _start(self, state: ReaderState | None) -> ReaderState:
        """The state to begin from: `state`, or that after BOS."""
        return self._reader.start(self._subject.bos_id) if state is None else self._checked(state)

    def _checked(self, state: ReaderState) -> ReaderState:
        """`state` itself. Raises `UserError` where it is no state of one sequence of such a model."""
        if not isinstance(state, ReaderState) or _shapes(state) != self._shapes:
            raise UserError(f"state is {state!r:.80}, but it must be one that this model's read or load_state returned")
        return state

    @cached_property
    def _shapes(self):
        return _shapes(jax.eval_shape(lambda: self._reader.start(0)))


def _shapes(state: ReaderState):
    """Shapes of the arrays of a state, those left out whose size may depend on the position."""
    return jax.tree.map(lambda a: a.shape, (state.fast, state.drafts, state.tokens))


def _path(path) -> str:
    """A path as a string; `~` is home. Raises `UserError` for one in a bucket out of reach."""
    path = os.path.expanduser(os.fspath(path))
    paths.check("path", path)
    return path


def _subject(path, overrides: dict | None, config) -> Subject:
    """The checkpoint of a path, with its config: that of its run, or the one given."""
    path = _path(path)
    return Subject(load_config(find_run(path) if config is None else config, overrides), path)
