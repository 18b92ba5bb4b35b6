"""The record of what a run was trained on, `data.json`, and the tokenizer that it keeps beside it."""

import logging
import os
from typing import NamedTuple

import jax
from etils import epath

from ttt_e2e.config import Config
from ttt_e2e.data.mixture import Mixture, absolute_path
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import file_digest, files_of
from ttt_e2e.errors import UserError
from ttt_e2e.runs.directory import find_run
from ttt_e2e.runs.files import read_json, replace_bytes, replace_text
from ttt_e2e.strict_json import to_json

logger = logging.getLogger(__name__)

NAME = "data.json"


class DataRecord(NamedTuple):
    """What a run was trained on; `tokenizer` and `digest` are "" where it is not known what made the tokens."""

    run: str  # run directory
    path: str  # data.path, absolute
    asked: str  # data.tokenizer, as the config had it
    tokenizer: str  # "bytes", or the file in the run directory
    digest: str  # of that file, as `file_digest` gives it

    @property
    def tokenizer_spec(self) -> str:
        """The argument of `load_tokenizer` for the tokenizer that the run keeps; "" where it has none."""
        return self.tokenizer if self.tokenizer in ("", "bytes") else f"{self.run}/{self.tokenizer}"


def write_data_record(workdir, config: Config, tokenizer: str) -> None:
    """Writes the record of a run, and copies its tokenizer's files into the run directory.

    tokenizer: what `load_tokenizer` takes; "" where it is not known. Where it is not, or cannot be read, a resumed run
      keeps the one that it has.
    """
    if jax.process_index() != 0:
        return
    directory, before = epath.Path(workdir), find_data_record(workdir)
    if not tokenizer and before:
        tokenizer = before.tokenizer_spec
    path = absolute_path(config.data.path) if config.data.path else ""
    record = {"path": path, "asked": config.data.tokenizer, "tokenizer": "", "digest": ""}
    try:
        record["digest"] = file_digest(tokenizer)
        files = files_of(tokenizer) if tokenizer else []
    except UserError as error:  # training works on tokens: it does not need it
        if before:
            record |= {"tokenizer": before.tokenizer, "digest": before.digest}
        else:
            logger.warning("the run keeps no tokenizer: %s", error)
    else:
        names = [file.name if i else f"tokenizer{file.suffix}" for i, file in enumerate(files)]
        record["tokenizer"] = names[0] if names else tokenizer
        for file, name in zip(files, names):
            if file != directory / name:
                replace_bytes(directory / name, file.read_bytes())
    replace_text(directory / NAME, to_json(record, indent=2) + "\n")


def find_data_record(path) -> DataRecord | None:
    """Reads the record of a run directory, or of the run that has a checkpoint; None where there is no run, or none.

    Raises `UserError` where it is damaged.
    """
    try:
        run = find_run(path) if path else None
    except UserError:
        return None
    if run is None or not (run / NAME).exists():
        return None
    values = read_json(run / NAME)
    fields = [values.get(name) for name in DataRecord._fields[1:]]
    if not all(isinstance(field, str) for field in fields):
        raise UserError(f"{run / NAME} is damaged: it takes strings for {', '.join(DataRecord._fields[1:])}")
    return DataRecord(os.fspath(run), *fields)


def check_tokenizer(record: DataRecord | None, store: TokenStore | Mixture, what: str) -> None:
    """Raises `UserError` where a token store was made with another tokenizer than a run's.

    what: says in the message which run that is.
    """
    try:
        digest = file_digest(store.tokenizer_spec)
    except UserError:  # nothing is known of tokens whose tokenizer is gone
        return
    if record and record.digest and digest and digest != record.digest:
        raise UserError(
            f"config.data.path is {store.path!r}, a token store of tokenizer {store.tokenizer_spec}, but {what} was "
            f"trained with another, {record.tokenizer_spec}: prepare the text with that"
        )
