"""The checkpoint that is evaluated, and what an evaluation needs of it. JAX is imported when it is needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ttt_e2e.config import Config, to_dict

if TYPE_CHECKING:
    from etils import epath

    from ttt_e2e.data.store import TokenStore
    from ttt_e2e.data.tokenizers import Tokenizer
    from ttt_e2e.inference.reader import Reader


@dataclass(frozen=True)
class Subject:
    """A model by its config and checkpoint. What it has is read when it is asked for, and then raises `UserError`."""

    config: Config
    checkpoint: str  # any path that means one, as `find_step` takes it

    @classmethod
    def of(cls, path: str) -> Subject:
        """The model of a run directory, or of a checkpoint in one. Raises `UserError` where it is not whole."""
        from ttt_e2e.checkpoints.params import check_params
        from ttt_e2e.checkpoints.progress import load_progress
        from ttt_e2e.inference.prompts import find_tokenizer
        from ttt_e2e.model import abstract_model
        from ttt_e2e.runs.directory import find_run, load_config

        subject = cls(load_config(find_run(path)), path)
        check_params(subject.step_directory, abstract_model(subject.config.model)[1])
        load_progress(subject.step_directory)
        find_tokenizer(subject.config)
        return subject

    @cached_property
    def step_directory(self) -> epath.Path:
        """Where the checkpoint is."""
        from ttt_e2e.checkpoints.steps import find_step

        return find_step(self.checkpoint)

    @cached_property
    def step(self) -> int:
        """Outer steps that the checkpoint was trained for."""
        from ttt_e2e.checkpoints.progress import load_progress

        return load_progress(self.step_directory)["step"]

    @cached_property
    def store(self) -> TokenStore:
        """The held-out text."""
        from ttt_e2e.train.batches import open_store

        return open_store(self.config, self.config.data.eval_split)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the model was trained on tokens of."""
        from ttt_e2e.inference.prompts import find_tokenizer

        return find_tokenizer(self.config)

    @property
    def bos_id(self) -> int:
        """What a document begins with."""
        return self.config.data.bos_id or self.tokenizer.bos_id

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, without BOS."""
        from ttt_e2e.inference.prompts import encode

        return encode(self.tokenizer, text, self.config.model.vocab_size)

    def reader(self, max_length: int) -> Reader:
        """A reader with the checkpoint's parameters, with room for `max_length` tokens where attention is full."""
        from ttt_e2e.inference.generate import load_reader

        return load_reader(self.config, self.step_directory, max_length)

    def about(self, reader: Reader, settings) -> dict:
        """All that records of an evaluation depend on: checkpoint, model, inner loop, data, settings."""
        from ttt_e2e.inference.state import parameters_digest

        return {
            "step": self.step,
            "parameters": parameters_digest(reader.params),
            "model": to_dict(self.config)["model"],
            "inner": dataclasses.asdict(self.config.inner),
            "bos_id": self.config.data.bos_id,
            "data": self.store.fingerprint,
            "batch_size": self.config.eval.batch_size,
            "settings": dataclasses.asdict(settings),
        }
