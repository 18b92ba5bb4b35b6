"""Tokenizes documents into a token store, which is there only when it is complete."""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ttt_e2e.data.documents import Corpus, Document, Skipped, counted, find_documents
from ttt_e2e.data.parts import SPLITS, check_part, contents_digest, is_same, merged_attributes, part_of, write_merged
from ttt_e2e.data.readers import kind
from ttt_e2e.data.round_trip import describe_losses
from ttt_e2e.data.splits import held_out_rule, splits_without_documents
from ttt_e2e.data.store import TokenStore, TokenWriter, read_attributes, write_attributes
from ttt_e2e.data.tokenizers import Tokenizer, files_of, load_tokenizer, train_sentencepiece
from ttt_e2e.errors import UserError
from ttt_e2e.outputs import is_free, new_directory
from ttt_e2e.paths import is_url
from ttt_e2e.progress import progress_bar

log = logging.getLogger(__name__)

# 3: held-out documents are chosen of those of `min_tokens` tokens. 2: of so many bytes. 1: by their names.
_FORMAT_VERSION = 3
# Of the vocabularies that are trained in turn until each split has a document that is long enough in its tokens.
_MAX_TRAININGS = 4
_TASK_CHARACTERS = 2**18
# With fewer bytes of input, starting workers takes longer than they save.
_MIN_PARALLEL_BYTES = 4 << 20
# Settings that older versions did not have, as they were then.
_OLDER = {"val_input": "", "text_field": "text", "on_bad_record": "fail", "part": ""}


@dataclass
class LeftOut:
    """What the input has and the store has not."""

    short: int = 0  # documents that are empty or of fewer than `min_tokens` tokens
    copies: int = 0  # documents of the input that are also in `val_input`
    bad_records: Skipped = field(default_factory=Skipped)

    def as_dict(self, files: dict[str, int]) -> dict[str, Any]:
        """The numbers as an attribute of the store; `files` are those by suffix that were not read."""
        bad = self.bad_records
        numbers = {"short_documents": self.short, "copies_of_val": self.copies, "bad_records": bad.count}
        return {"files": files, **numbers} | ({"first_bad_record": bad.first} if bad.count else {})

    def in_words(self, files: dict[str, int]) -> str:
        """The numbers in a line, "" where nothing was left out."""
        bad = self.bad_records
        parts = [
            counted(files),
            f"{bad.count} bad records, the first {bad.first}" if bad.count else "",
            f"{self.short} documents that are empty or too short" if self.short else "",
            f"{self.copies} documents that the held-out input has too" if self.copies else "",
        ]
        return "; ".join(part for part in parts if part)


def prepare(  # noqa: PLR0913 -- the flags of a command
    input: str | Sequence[str],
    tokenizer: str,
    output: str | os.PathLike,
    *,
    min_tokens: int = 0,
    val_fraction: float = 0.05,
    val_input: str | Sequence[str] = "",
    text_field: str = "text",
    on_bad_record: str = "fail",
    part: str = "",
    num_workers: int = os.cpu_count() or 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into a token store at `output`, a local directory; returns a summary of the store.

    `input` is what `find_documents` takes, as is `text_field`; `tokenizer` is what `load_tokenizer` takes, or
    "train:VOCAB" to train a SentencePiece model of VOCAB entries on the training documents. Each document is written as
    BOS and its tokens; empty ones and those of fewer than `min_tokens` tokens are left out. A share `val_fraction` of
    the documents is held out as the split `val`, chosen by a hash of their texts; or the split is `val_input`, and
    documents of `input` that are also there are left out. `on_bad_record` is "fail", or "skip" to go on without records
    that are no JSON, not UTF-8, or have no text. `part` "I/N", I from 0, prepares one of N parts of the files, for
    `merge`. At most a few documents per worker are in memory.

    The summary is the store's attributes (`tokenizer`, `vocab_size`, `bos_id`, `num_documents` and `num_tokens` by
    split, `left_out`, ...), `output`, and `already_prepared`: whether `output` existed, made from the same files with
    the same settings, and was left as it is. Raises UserError for bad arguments and inputs, any other existing
    `output`, and an empty split. The store is written under a temporary name, and removed if an exception ends it.
    """
    output, tokenizer = _local_directory(output), os.fspath(tokenizer)
    _check_arguments(tokenizer, min_tokens, val_fraction, on_bad_record, part)
    options = {"text_field": text_field, "skips_bad_records": on_bad_record == "skip"}
    corpus = find_documents(input, **options)
    held_out = find_documents(val_input, **options) if val_input else None
    if part:
        check_part(part, corpus)
    settings = {
        "input": corpus.spec,
        "tokenizer": tokenizer,
        "files_digest": _files_digest(corpus, held_out, tokenizer),
        "min_tokens": min_tokens,
        "val_fraction": val_fraction,
        "val_input": held_out.spec if held_out else "",
        "text_field": text_field,
        "on_bad_record": on_bad_record,
        "part": part,
        "version": _FORMAT_VERSION,
    }
    if not is_free(output):
        return _existing(output, settings, lambda: contents_digest(corpus, held_out, part))

    settings["contents"] = contents_digest(corpus, held_out, part)
    with new_directory(output) as directory:
        model, is_held_out = _provide_tokenizer(tokenizer, corpus, held_out, settings, directory, progress)
        _fill(directory, corpus, held_out, is_held_out, model, settings, num_workers, progress)
    return _summary(output, already_prepared=False)


def merge(stores: Sequence[str | os.PathLike], output: str | os.PathLike) -> dict[str, Any]:
    """Makes a store at `output` of the parts at `stores`, to which it refers; returns what `prepare` returns.

    Its tokens are those of the store that `prepare` makes of the whole corpus. Raises UserError where `stores` are not
    all the parts of one corpus, and for any other existing `output`.
    """
    output = _local_directory(output)
    attributes = merged_attributes(stores, output)
    if not is_free(output):
        if output.is_dir() and (output / "zarr.json").exists() and read_attributes(output) == attributes:
            return _summary(output, already_prepared=True)
        raise UserError(f"output {output}: exists already; delete it, or choose another output")
    with new_directory(output) as directory:
        write_merged(attributes, output, directory)
    return _summary(output, already_prepared=False)


def _fill(
    directory: Path,
    corpus: Corpus,
    held_out: Corpus | None,
    is_held_out: Callable[[str], bool],
    model: str,
    settings: dict[str, Any],
    num_workers: int,
    progress: bool,
) -> None:
    """Writes the tokens and attributes of a store into `directory`; says what is left out."""
    tokenizer, part, min_tokens = load_tokenizer(model), settings["part"], settings["min_tokens"]
    ours, theirs = part_of(corpus, part), part_of(held_out, part) if held_out else None
    left_out = LeftOut()
    if losses := describe_losses(ours, tokenizer):
        log.warning("tokenizer %s: %s", settings["tokenizer"], losses)
    with _executor(model, ours, num_workers) as executor:
        texts = _texts(ours, theirs, is_held_out, left_out, progress)
        tokenized = _tokenized(texts, tokenizer, executor, max_pending=2 * num_workers)
        counts = _write(tokenized, tokenizer, directory, min_tokens, left_out)
    for split, number in counts["num_documents"].items():
        if not part and not number:
            _refuse_empty(split, min_tokens)
    name = model if model == "bytes" else Path(model).name
    about = {"tokenizer": name, "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id}
    lacks = {"left_out": left_out.as_dict(ours.left_out)}
    write_attributes(directory, about | counts | lacks | {"prepared_from": settings})
    if words := left_out.in_words(ours.left_out):
        log.info("left out: %s", words)


def _local_directory(output: str | os.PathLike) -> Path:
    """The absolute path of a local directory. Raises UserError for a URL."""
    if is_url(output):
        raise UserError(f"output {os.fspath(output)}: legal: a local directory; copy the finished store to a bucket")
    return Path(os.fspath(output)).absolute()


def _files_digest(corpus: Corpus, held_out: Corpus | None, tokenizer: str) -> str:
    """Digest, 16 hex digits, of the names and sizes of the document files, and of the tokenizer's files."""
    digest = hashlib.blake2b(digest_size=8)
    for each in filter(None, (corpus, held_out)):
        for (_, name), size in zip(each.files, each.sizes()):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    if not tokenizer.startswith("train:"):
        for file in files_of(tokenizer):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_arguments(tokenizer: str, min_tokens: int, val_fraction: float, on_bad_record: str, part: str) -> None:
    """Raises UserError for an illegal value of an argument of `prepare`."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: legal: above 0 and below 1")
    if min_tokens < 0:
        raise UserError(f"min_tokens {min_tokens}: legal: 0 (keep every document) or more")
    if on_bad_record not in ("fail", "skip"):
        raise UserError(f"on_bad_record {on_bad_record!r}: legal: fail or skip")
    if tokenizer.startswith("train:"):
        if not tokenizer.removeprefix("train:").isdecimal():
            raise UserError(f"tokenizer {tokenizer!r}: legal: train:VOCAB with a number, as in train:2048")
        if part:
            raise UserError(
                f"tokenizer {tokenizer!r}: parts take one that is there already; train it by a store of its own"
            )
    else:
        try:
            load_tokenizer(tokenizer)
        except UserError as error:
            raise UserError(f"{error}, or train:VOCAB") from None


def _existing(output: Path, settings: dict[str, Any], contents: Callable[[], str]) -> dict[str, Any]:
    """The summary of an existing store. Raises UserError where it is none, or was made of other files or settings.

    contents: gives the digest of the contents of the files, which stores of older versions do not have.
    """
    advice = "delete it, or choose another output"
    try:
        recorded = read_attributes(output).get("prepared_from", {})
    except UserError:
        raise UserError(f"output {output}: exists already, and is no token store; {advice}") from None
    for name, value in settings.items():
        found = recorded.get(name, _OLDER.get(name))
        # A store of an older version stays as it is, with its splits: runs go on with it.
        if name == "version" or (name in ("input", "val_input") and found and value and "contents" in recorded):
            continue  # by their contents, below
        if not is_same(name, found, value):
            other = f"{name} {found!r}, not {value!r}"
            raise UserError(f"output {output}: exists already, made with other settings ({other}); {advice}")
    if "contents" in recorded and recorded["contents"] != contents():
        raise UserError(f"output {output}: exists already, and a file of its input has changed since; {advice}")
    return _summary(output, already_prepared=True)


def _summary(output: Path, already_prepared: bool) -> dict[str, Any]:
    """What `prepare` returns, read from the store at `output`."""
    attributes = read_attributes(output)
    if attributes.get("prepared_from", {}).get("part"):
        num_tokens = attributes["num_tokens"]  # a split of a part may be empty
    else:
        num_tokens = {split: TokenStore.open(output, split).num_tokens for split in SPLITS}
    return attributes | {
        "num_tokens": num_tokens,
        "output": os.fspath(output),
        "already_prepared": already_prepared,
    }


def _provide_tokenizer(
    tokenizer: str,
    corpus: Corpus,
    held_out: Corpus | None,
    settings: dict[str, Any],
    directory: Path,
    progress: bool,
) -> tuple[str, Callable[[str], bool]]:
    """Trains or copies the tokenizer's files into `directory`, and decides which texts are held out.

    Returns what `load_tokenizer` takes for it, and the function that tells whether a text is held out. Raises UserError
    where a split gets no document, other than of a part.
    """
    min_tokens, known = settings["min_tokens"], None
    rule = partial(held_out_rule, corpus, held_out, min_tokens, settings["val_fraction"])
    if not tokenizer.startswith("train:"):
        model = _copied(tokenizer, directory)
        known = None if model == "bytes" else load_tokenizer(model)
        is_held_out = rule(known)
        lacking = () if settings["part"] else splits_without_documents(corpus, held_out, is_held_out, min_tokens, known)
    else:
        # A tokenizer sees no held-out document, and so is trained when these are chosen, by what tokens they can have.
        # If none of them has enough, others are chosen by its tokens, and it is trained again.
        for _ in range(_MAX_TRAININGS):
            is_held_out = rule(known)
            model = _trained(tokenizer, corpus, is_held_out, directory, progress)
            known = load_tokenizer(model)
            lacking = splits_without_documents(corpus, held_out, is_held_out, min_tokens, known)
            if not lacking or held_out is not None:
                break
    if lacking:
        _refuse_empty(min(lacking), min_tokens)
    return model, is_held_out


def _trained(
    tokenizer: str, corpus: Corpus, is_held_out: Callable[[str], bool], directory: Path, progress: bool
) -> str:
    """Trains the tokenizer "train:VOCAB" on what is not held out; returns the path of its model in `directory`."""
    path = directory / "tokenizer.model"
    documents = _progress(corpus, corpus, "training the tokenizer", progress)
    texts = (document.text for document in documents if not is_held_out(document.text))
    train_sentencepiece(texts, int(tokenizer.removeprefix("train:")), path)
    return os.fspath(path)


def _copied(tokenizer: str, directory: Path) -> str:
    """Copies a tokenizer's files into `directory`, if it has any; returns what `load_tokenizer` takes for it."""
    copies = []
    for file in files_of(tokenizer):
        copies.append(directory / (file.name if copies else f"tokenizer{file.suffix}"))
        copies[-1].write_bytes(file.read_bytes())
    return os.fspath(copies[0]) if copies else tokenizer


def _progress(documents: Iterable[Document], corpus: Corpus, what: str, progress: bool) -> Iterable[Document]:
    """Iterates over the documents of a corpus with a progress bar."""
    # The number of records of a file is not known before its end.
    has_records = any(kind(name) in (".jsonl", ".parquet") for _, name in corpus.files)
    num_documents = None if has_records else len(corpus.files)
    return progress_bar(documents, desc=what, total=num_documents, unit="document", disable=not progress)


def _texts(
    corpus: Corpus, held_out: Corpus | None, is_held_out: Callable[[str], bool], left_out: LeftOut, progress: bool
) -> Iterator[tuple[str, str]]:
    """Yields split and text of each document; counts in `left_out` what is in no split."""
    for document in _progress(corpus.documents(left_out.bad_records), corpus, "tokenizing", progress):
        if not is_held_out(document.text):
            yield "train", document.text
        elif held_out is None:
            yield "val", document.text
        else:
            left_out.copies += 1
    if held_out is not None:
        for document in _progress(held_out.documents(left_out.bad_records), held_out, "tokenizing val", progress):
            yield "val", document.text


_worker_tokenizer: Tokenizer


def _start_worker(model: str) -> None:
    """Loads the tokenizer of a worker process."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _worker_tokenizer = load_tokenizer(model)


def _encode_in_worker(task: list[tuple[str, str]]) -> list[tuple[str, np.ndarray]]:
    """Encodes a list of (split, text) as (split, tokens)."""
    return [(split, _worker_tokenizer.encode(text)) for split, text in task]


def _executor(model: str, corpus: Corpus, num_workers: int) -> contextlib.AbstractContextManager[Executor | None]:
    """Starts the worker processes that tokenize; gives None where this process does it alone."""
    # Encoding as bytes costs less than sending a text to a worker.
    if num_workers < 2 or model == "bytes" or sum(corpus.sizes()) < _MIN_PARALLEL_BYTES:
        return contextlib.nullcontext()
    # Not "fork": the parent may run the threads of JAX.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(model,))


def _tokenized(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, executor: Executor | None, max_pending: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields split and tokens of each document, in order; at most `max_pending` tasks are submitted ahead."""
    if executor is None:
        yield from ((split, tokenizer.encode(text)) for split, text in texts)
        return
    pending = deque()
    for task in _tasks(texts):
        pending.append(executor.submit(_encode_in_worker, task))
        if len(pending) >= max_pending:
            yield from pending.popleft().result()
    while pending:
        yield from pending.popleft().result()


def _tasks(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Groups documents into tasks of about `_TASK_CHARACTERS`, so that a short one is not a message by itself."""
    task, size = [], 0
    for split, text in texts:
        task.append((split, text))
        size += len(text)
        if size >= _TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _write(
    tokenized: Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer,
    directory: Path,
    min_tokens: int,
    left_out: LeftOut,
) -> dict[str, Any]:
    """Writes both splits; returns `num_documents`, `num_tokens` and `digest`, each a dict by split."""
    writers = {split: TokenWriter(directory, split, tokenizer.vocab_size) for split in SPLITS}
    num_documents = dict.fromkeys(SPLITS, 0)
    for split, tokens in tokenized:
        if len(tokens) >= max(min_tokens, 1):
            writers[split].append(np.array([tokenizer.bos_id]))
            writers[split].append(tokens)
            num_documents[split] += 1
        else:
            left_out.short += 1
    for writer in writers.values():
        writer.close()
    num_tokens = {split: writer.num_tokens for split, writer in writers.items()}
    digest = {split: writer.digest for split, writer in writers.items()}
    return {"num_documents": num_documents, "num_tokens": num_tokens, "digest": digest}


def _refuse_empty(split: str, min_tokens: int) -> NoReturn:
    """Raises UserError for a split that has no document."""
    raise UserError(
        f"min_tokens {min_tokens}: leaves no document for the split {split!r};"
        " legal: a smaller number, or more documents"
    )
