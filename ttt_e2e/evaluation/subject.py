"""The checkpoint under evaluation, with its data, tokenizer and reader. Imports JAX in functions only."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ttt_e2e.config import Config, to_dict
from ttt_e2e.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from ttt_e2e.data.mixture import Mixture
    from ttt_e2e.data.store import TokenStore
    from ttt_e2e.data.tokenizers import Tokenizer
    from ttt_e2e.inference.reader import Reader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A checkpoint and its config. Properties are read from disk at first use, and may raise `UserError` then."""

    config: Config
    checkpoint: str  # path of a run directory or of a checkpoint in one, as `find_step` takes it

    @classmethod
    def of(cls, path: str) -> Subject:
        """Makes the subject of a run directory, or of a checkpoint in one.

        Raises `UserError` where checkpoint, progress or tokenizer are missing or do not fit the config.
        """
        from ttt_e2e.checkpoints.params import check_params
        from ttt_e2e.checkpoints.progress import load_progress
        from ttt_e2e.inference.prompts import find_tokenizer
        from ttt_e2e.model import abstract_model
        from ttt_e2e.runs.directory import find_run, load_config

        subject = cls(load_config(find_run(path)), path)
        check_params(subject.step_directory, abstract_model(subject.config.model)[1])
        load_progress(subject.step_directory)
        find_tokenizer(subject.config, path)
        return subject

    @cached_property
    def step_directory(self) -> epath.Path:
        """Directory of the checkpoint's step."""
        from ttt_e2e.checkpoints.steps import find_step

        return find_step(self.checkpoint)

    @cached_property
    def step(self) -> int:
        """Number of outer steps that the checkpoint was trained for."""
        from ttt_e2e.checkpoints.progress import load_progress

        return load_progress(self.step_directory)["step"]

    @cached_property
    def store(self) -> TokenStore:
        """Token store of the held-out split."""
        return open_evaluated(self.config, self.checkpoint)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that the model was trained with."""
        from ttt_e2e.inference.prompts import find_tokenizer

        return find_tokenizer(self.config, self.checkpoint)

    @property
    def bos_id(self) -> int:
        """Id of the BOS token, which begins every document."""
        return self.config.data.bos_id or self.tokenizer.bos_id

    def encode(self, text: str) -> np.ndarray:
        """Encodes a text as token ids, int32 [num_tokens], without BOS."""
        from ttt_e2e.inference.prompts import encode

        return encode(self.tokenizer, text, self.config.model.vocab_size)

    def reader(self, max_length: int) -> Reader:
        """Makes a reader of the checkpoint, with room for `max_length` tokens where attention is full."""
        from ttt_e2e.inference.generate import load_reader

        return load_reader(self.config, self.step_directory, max_length)

    def about(self, reader: Reader, settings) -> dict:
        """What an evaluation's records depend on, as a dict: checkpoint, model, inner loop, data, settings."""
        return self.about_model(reader, settings) | {"data": self.store.fingerprint}

    def about_model(self, reader: Reader, settings) -> dict:
        """The same of an evaluation that reads no held-out text."""
        from ttt_e2e.inference.state import parameters_digest

        return {
            "step": self.step,
            "parameters": parameters_digest(reader.params),
            "model": to_dict(self.config)["model"],
            "inner": dataclasses.asdict(self.config.inner),
            "bos_id": self.config.data.masked_id,
            "batch_size": self.config.eval.batch_size,
            "settings": dataclasses.asdict(settings),
        }


def open_evaluated(config: Config, checkpoint: str) -> TokenStore | Mixture:
    """Opens the held-out split of the config's token store; logs where the model was trained on another store.

    Raises:
      UserError: as `open_store` does.
    """
    from ttt_e2e.train.batches import open_store

    store = open_store(config, config.data.eval_split, checkpoint)
    if checkpoint:
        warn_of_other_text(config, checkpoint)
    return store


def warn_of_other_text(config: Config, checkpoint: str) -> None:
    """Logs where a model was trained on another token store than the config's."""
    from ttt_e2e.checkpoints.progress import load_progress
    from ttt_e2e.checkpoints.steps import find_step
    from ttt_e2e.data.mixture import absolute_path, open_tokens
    from ttt_e2e.runs.data_record import find_data_record

    trained_on = load_progress(find_step(checkpoint)).get("data")
    try:
        fingerprint = open_tokens(config.data.path, config.data.train_split).fingerprint
    except UserError:  # it has held-out text only
        fingerprint = ""
    if trained_on and fingerprint != trained_on:
        record = find_data_record(checkpoint)
        theirs = f", {record.path}" if record and record.path != absolute_path(config.data.path) else ""
        logger.warning("%s is another text than the model was trained on%s", absolute_path(config.data.path), theirs)
