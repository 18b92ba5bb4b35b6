"""Tokenizes documents into a token store, which is there only when it is complete."""

import contextlib
import hashlib
import heapq
import itertools
import multiprocessing
import os
import shutil
import signal
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from ttt_e2e.data.documents import Corpus, Document, find_documents
from ttt_e2e.data.store import TokenStore, TokenWriter, read_attributes, write_attributes
from ttt_e2e.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from ttt_e2e.errors import UserError

SPLITS = ("train", "val")

_FORMAT_VERSION = 1
_TASK_CHARACTERS = 2**18
# In corpora of at most this many documents, the held-out ones are chosen from the list of all names.
_MAX_LISTED = 1024
# With fewer bytes of input, starting workers takes longer than they save.
_MIN_PARALLEL_BYTES = 4 << 20


def prepare(
    input: str,
    tokenizer: str,
    output: str | os.PathLike,
    *,
    min_tokens: int = 0,
    val_fraction: float = 0.05,
    num_workers: int = os.cpu_count() or 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenizes a corpus into a token store at `output`, a local directory; returns a summary of the store.

    `input` is what `find_documents` takes; `tokenizer` is "bytes", the path of a SentencePiece model, or "train:VOCAB"
    to train one of VOCAB entries on the training documents. Each document is written as BOS and its tokens; empty ones
    and those of fewer than `min_tokens` tokens are left out. A share `val_fraction` of the documents is held out as the
    split `val`, chosen by a hash of their names. At most a few documents per worker are in memory.

    The summary is the store's attributes (`tokenizer`, `vocab_size`, `bos_id`, `num_documents` and `num_tokens` by
    split, ...), `output`, and `already_prepared`: whether `output` existed, made from the same files with the same
    settings, and was left as it is. Raises UserError for bad arguments and inputs, any other existing `output`, and an
    empty split. The store is written under a temporary name, and removed if an exception ends it early.
    """
    output, tokenizer = _local_directory(output), os.fspath(tokenizer)
    _check_arguments(tokenizer, min_tokens, val_fraction)
    corpus = find_documents(input)
    settings = {
        "input": os.fspath(input),
        "tokenizer": tokenizer,
        "files_digest": _files_digest(corpus, tokenizer),
        "min_tokens": min_tokens,
        "val_fraction": val_fraction,
        "version": _FORMAT_VERSION,
    }
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _existing(output, settings)

    is_held_out = _held_out_rule(corpus, min_tokens, val_fraction)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        model = _provide_tokenizer(tokenizer, corpus, is_held_out, partial, progress)
        loaded = load_tokenizer(model)
        with _executor(model, corpus, num_workers) as executor:
            documents = _progress(corpus, "tokenizing", progress)
            tokenized = _tokenized(documents, is_held_out, loaded, executor, max_pending=2 * num_workers)
            counts = _write(tokenized, loaded, partial, min_tokens)
        tokenizer_name = model if model == "bytes" else Path(model).name
        about = {"tokenizer": tokenizer_name, "vocab_size": loaded.vocab_size, "bos_id": loaded.bos_id}
        write_attributes(partial, about | counts | {"prepared_from": settings})
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return _summary(output, already_prepared=False)


def _local_directory(output: str | os.PathLike) -> Path:
    """The absolute path of a local directory. Raises UserError for a URL."""
    if "://" in os.fspath(output):
        raise UserError(f"output {os.fspath(output)}: legal: a local directory; copy the finished store to a bucket")
    return Path(os.fspath(output)).expanduser().absolute()


def _files_digest(corpus: Corpus, tokenizer: str) -> str:
    """Digest, 16 hex digits, of the names and sizes of the document files, and of the tokenizer's model file."""
    digest = hashlib.blake2b(digest_size=8)
    for name in corpus.names:
        digest.update(f"{name}\0{(corpus.root / name).stat().st_size}\n".encode("utf-8", "surrogateescape"))
    if _is_model(tokenizer):
        digest.update(epath.Path(tokenizer).read_bytes())
    return digest.hexdigest()


def _check_arguments(tokenizer: str, min_tokens: int, val_fraction: float) -> None:
    """Raises UserError for an illegal value of an argument of `prepare`."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: legal: above 0 and below 1")
    if min_tokens < 0:
        raise UserError(f"min_tokens {min_tokens}: legal: 0 (keep every document) or more")
    if tokenizer.startswith("train:"):
        if not tokenizer.removeprefix("train:").isdecimal():
            raise UserError(f"tokenizer {tokenizer!r}: legal: train:VOCAB with a number, as in train:2048")
    else:
        try:
            load_tokenizer(tokenizer)
        except UserError as error:
            raise UserError(f"{error}, or train:VOCAB") from None


def _is_model(tokenizer: str) -> bool:
    return tokenizer != "bytes" and not tokenizer.startswith("train:")


def _existing(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The summary of an existing store. Raises UserError where it is none, or was made with other settings."""
    advice = "delete it, or choose another output"
    try:
        recorded = read_attributes(output).get("prepared_from", {})
    except UserError:
        raise UserError(f"output {output}: exists already, and is no token store; {advice}") from None
    for name, value in settings.items():
        if recorded.get(name) != value:
            other = f"{name} {recorded.get(name)!r}, not {value!r}"
            raise UserError(f"output {output}: exists already, made with other settings ({other}); {advice}")
    return _summary(output, already_prepared=True)


def _summary(output: Path, already_prepared: bool) -> dict[str, Any]:
    """What `prepare` returns, read from the store at `output`."""
    num_tokens = {split: TokenStore.open(output, split).num_tokens for split in SPLITS}
    return read_attributes(output) | {
        "num_tokens": num_tokens,
        "output": os.fspath(output),
        "already_prepared": already_prepared,
    }


def _name_hash(name: str) -> int:
    """Hash of a document's name: an integer, uniform in [0, 2**64), the same on every machine."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _held_out_rule(corpus: Corpus, min_tokens: int, val_fraction: float) -> Callable[[str], bool]:
    """Makes the function that tells whether the document of a given name is held out.

    In a corpus of at most `_MAX_LISTED` documents, those with the smallest hashes are held out: at least one, and not
    all. In a larger one, those with a hash below a threshold are, so that adding documents moves none from one split to
    the other. Raises UserError if there are fewer than two documents.
    """
    # No tokenizer makes more tokens than bytes, so these documents would be left out when they are tokenized, too.
    long_enough = (document.name for document in corpus if len(document.text.encode()) >= max(min_tokens, 1))
    names = list(itertools.islice(long_enough, _MAX_LISTED + 1))
    if len(names) > _MAX_LISTED:
        return lambda name: _name_hash(name) < val_fraction * 2**64
    if len(names) < 2:
        raise UserError(
            f"input {corpus.root}: {len(corpus.names)} files with {len(names)} documents that can have"
            f" {max(min_tokens, 1)} tokens or more; legal: two or more documents, as one is held out"
        )
    num_held_out = min(max(round(val_fraction * len(names)), 1), len(names) - 1)
    return set(heapq.nsmallest(num_held_out, names, key=_name_hash)).__contains__


def _provide_tokenizer(
    tokenizer: str, corpus: Corpus, is_held_out: Callable[[str], bool], directory: Path, progress: bool
) -> str:
    """Trains or copies the tokenizer's model into `directory`; returns its path, or "bytes", for `load_tokenizer`."""
    path = directory / "tokenizer.model"
    if tokenizer.startswith("train:"):
        documents = _progress(corpus, "training the tokenizer", progress)
        texts = (document.text for document in documents if not is_held_out(document.name))
        train_sentencepiece(texts, int(tokenizer.removeprefix("train:")), path)
    elif _is_model(tokenizer):
        path.write_bytes(epath.Path(tokenizer).read_bytes())
    else:
        return tokenizer
    return os.fspath(path)


def _progress(corpus: Corpus, what: str, progress: bool) -> Iterable[Document]:
    """Iterates over the documents of a corpus with a progress bar."""
    # The number of documents of a .jsonl file is not known before its end.
    num_documents = None if any(".jsonl" in name for name in corpus.names) else len(corpus.names)
    return tqdm(corpus, what, num_documents, unit=" documents", disable=not progress)


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
    if num_workers < 2 or model == "bytes" or corpus.num_bytes() < _MIN_PARALLEL_BYTES:
        return contextlib.nullcontext()
    # Not "fork": the parent may run the threads of JAX.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(model,))


def _tokenized(
    documents: Iterable[Document],
    is_held_out: Callable[[str], bool],
    tokenizer: Tokenizer,
    executor: Executor | None,
    max_pending: int,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields split and tokens of each document, in order; at most `max_pending` tasks are submitted ahead."""
    texts = ((SPLITS[is_held_out(document.name)], document.text) for document in documents)
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
    tokenized: Iterable[tuple[str, np.ndarray]], tokenizer: Tokenizer, directory: Path, min_tokens: int
) -> dict[str, Any]:
    """Writes both splits; returns `num_documents`, `num_tokens` and `digest`, each a dict by split.

    Raises UserError where a split has no document.
    """
    writers = {split: TokenWriter(directory, split, tokenizer.vocab_size) for split in SPLITS}
    num_documents = dict.fromkeys(SPLITS, 0)
    for split, tokens in tokenized:
        if len(tokens) >= max(min_tokens, 1):
            writers[split].append(np.concatenate([[tokenizer.bos_id], tokens]))
            num_documents[split] += 1
    for split, writer in writers.items():
        writer.close()
        if not num_documents[split]:
            raise UserError(
                f"min_tokens {min_tokens}: leaves no document for the split {split!r}"
                f" ({sum(num_documents.values())} in all); legal: a smaller number, or more documents"
            )
    num_tokens = {split: writer.num_tokens for split, writer in writers.items()}
    digest = {split: writer.digest for split, writer in writers.items()}
    return {"num_documents": num_documents, "num_tokens": num_tokens, "digest": digest}
