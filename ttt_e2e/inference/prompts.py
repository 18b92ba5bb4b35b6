"""Reads prompts, and encodes them with the tokenizer that the model was trained with."""

import json

import numpy as np
from etils import epath

from ttt_e2e.config import Config, DataConfig
from ttt_e2e.data.mixture import recorded_tokenizer
from ttt_e2e.data.store import check_range
from ttt_e2e.data.tokenizers import Tokenizer, file_digest, load_tokenizer
from ttt_e2e.errors import JSON_ERRORS, UserError
from ttt_e2e.runs.data_record import find_data_record


def find_tokenizer(config: Config, checkpoint: str = "") -> Tokenizer:
    """Loads the tokenizer that a model was trained with.

    It is the one that its run keeps; or else, of runs without a record and of checkpoints in none, that of
    `config.data.tokenizer`, or the one that made the token store.

    checkpoint: run directory, or a checkpoint in one.

    Raises:
      UserError: none is known, `config.data.tokenizer` is another than the run's, or its vocabulary is larger than the
        model's.
    """
    data, record = config.data, find_data_record(checkpoint)
    if record and record.tokenizer:
        spec, asked = record.tokenizer_spec, data.tokenizer
        if asked not in ("", record.asked, record.tokenizer) and file_digest(asked) != record.digest:
            raise UserError(f"config.data.tokenizer is {asked!r}, but the run was trained with another, {spec}")
        if file_digest(spec) != record.digest:
            raise UserError(f"{spec} was changed: it is not the tokenizer that the run was trained with")
    else:
        spec = _configured(data)
    if not spec:
        raise UserError(
            f"config.data.tokenizer is '', and token store {data.path} does not say which made it:"
            " bytes, a .model or a tokenizer.json"
        )
    tokenizer = load_tokenizer(spec)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size is {config.model.vocab_size}, but tokenizer {spec} has {tokenizer.vocab_size}"
        )
    return tokenizer


def _configured(data: DataConfig) -> str:
    """The tokenizer of a config: the token store's own where it has the name of that, else what the name says.

    Returns what `load_tokenizer` takes, or "". Raises `UserError` where there is neither such a file nor a store.
    """
    is_there = data.tokenizer == "bytes" or (data.tokenizer and epath.Path(data.tokenizer).exists())
    if not data.path:
        if is_there:
            return data.tokenizer
        raise UserError(
            f"config.data.tokenizer is {data.tokenizer!r}, but it must be bytes or an existing .model or .json file"
        )
    try:
        name, recorded = recorded_tokenizer(data.path)
    except UserError:  # the store is not needed if the tokenizer is there
        if is_there:
            return data.tokenizer
        raise
    return recorded if data.tokenizer in ("", name) else data.tokenizer


def encode(tokenizer: Tokenizer, prompt: str, vocab_size: int) -> np.ndarray:
    """Encodes a prompt as token ids, int32 [num_tokens], without BOS.

    Raises `UserError` for text with a byte that is not UTF-8 (a lone surrogate), or a token id outside the vocabulary.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"prompt has at character {error.start} a byte that is no UTF-8; it must be text") from None
    ids = tokenizer.encode(prompt)
    check_range(ids, vocab_size, "prompt")
    return ids


def read_prompts(path: str) -> list[str]:
    """Reads the prompts of a file: the field `prompt` of each line of a .jsonl file, or the whole text of another file.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or has a line without a prompt.
    """
    try:
        text = epath.Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"prompt_file {path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise UserError(f"prompt_file {path} is no UTF-8 text: {byte}") from None
    if not path.endswith(".jsonl"):
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prompts.append(_prompt_of(line, f"prompt_file {path}, line {number}"))
    if not prompts:
        raise UserError(f"prompt_file {path} has no line: expected one JSON object a line, with the field 'prompt'")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    """Reads the prompt of one JSON line. Raises `UserError`, naming `where`, if it has none."""
    try:
        prompt = json.loads(line)["prompt"]
    except (*JSON_ERRORS, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f"{where}: expected a JSON object with a string in the field 'prompt'")
    return prompt
