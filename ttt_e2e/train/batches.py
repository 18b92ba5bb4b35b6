"""Token stores of a run, batches on the mesh, and the held-out loss. Shapes: `B` batch, `T` sequence."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from ttt_e2e.cluster.mesh import BATCH, local_rows
from ttt_e2e.config import Config
from ttt_e2e.data.mixture import Mixture, absolute_path, open_tokens
from ttt_e2e.data.pipeline import evaluation_batches
from ttt_e2e.data.store import TokenStore
from ttt_e2e.data.tokenizers import alike_tokens, file_digest, load_tokenizer
from ttt_e2e.errors import PreemptedError, UserError
from ttt_e2e.progress import progress_bar
from ttt_e2e.runs.data_record import check_tokenizer, find_data_record

logger = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """Losses on held-out text, in nats."""

    loss: float  # as in training: mean over sequences of the mean over mini-batches
    token_loss: float  # mean over unmasked targets
    num_tokens: int  # unmasked targets
    num_sequences: int


def open_store(config: Config, split: str, run: str = "") -> TokenStore | Mixture:
    """Opens a split of the config's token store, or mixture of stores, and checks it against the config.

    run: run directory, or a checkpoint in one, of the model; "" where there is none.

    Raises:
      UserError: no such store or split, too few tokens, or prepared for another vocabulary, or with another tokenizer
        than the run's.
    """
    record = find_data_record(run)
    path, ours = config.data.path, config.model.vocab_size
    if not path:
        raise UserError("config.data.path is '', but it must be the directory of a token store (see ttt-e2e prepare)")
    try:
        store = open_tokens(path, split)
    except UserError as error:
        if record and record.path and record.path != absolute_path(path):
            raise UserError(f"{error}; the run was trained on --config.data.path={record.path}") from None
        raise
    store.num_sequences(config.train.seq_len)  # raises where there is none
    if (theirs := store.attributes.get("vocab_size", ours)) > ours:
        raise UserError(f"config.model.vocab_size is {ours}, but token store {path} was prepared with {theirs}")
    ours = config.data.bos_id
    if ours != (theirs := store.attributes.get("bos_id", ours)):
        raise UserError(f"config.data.bos_id is {ours!r}, but token store {path} was prepared with {theirs!r}")
    if store.attributes.get("bos_id") == 0 and not config.data.bos_is_zero:
        logger.warning(
            "token 0 is the BOS of token store %s, and counts in the losses: --config.data.bos_is_zero=true masks it",
            path,
        )
    ours, theirs = config.data.tokenizer, store.attributes.get("tokenizer", "")
    if ours and theirs and ours != theirs and not _is_alike(ours, store.tokenizer_spec):
        raise UserError(f"config.data.tokenizer is {ours!r}, but token store {path} was prepared with {theirs!r}")
    check_tokenizer(record, store, "the run")
    return store


def open_held_out(config: Config, mesh, run: str = "") -> TokenStore | Mixture:
    """Opens the held-out split, as `open_store`, and reads what an evaluation will: a run of hours must not end there.

    Logs where `eval.num_sequences` is more than the split has. run: as `open_store` takes it.

    Raises:
      UserError: as `open_store`; the split is damaged, or has a token id that is not below the vocabulary's size.
    """
    store, T = open_store(config, config.data.eval_split, run), config.train.seq_len
    if (asked := config.eval.num_sequences) > (available := store.num_sequences(T)):
        logger.info(
            "eval.num_sequences is %d, but %s/%s has %d sequences of %d tokens: evaluations read these",
            asked,
            store.path,
            store.split,
            available,
            T,
        )
    for _ in _held_out_batches(store, config, mesh):
        pass
    return store


def _num_held_out(store: TokenStore | Mixture, config: Config) -> int:
    """Number of sequences that an evaluation reads: `eval.num_sequences`, 0 = all, at most as many as there are."""
    available = store.num_sequences(config.train.seq_len)
    return min(config.eval.num_sequences or available, available)


def _held_out_batches(store: TokenStore | Mixture, config: Config, mesh) -> Iterator[tuple[np.ndarray, int]]:
    """Yields this process's rows [B, T + 1] of every batch of an evaluation, as `evaluation_batches`."""
    return evaluation_batches(
        store,
        seq_len=config.train.seq_len,
        num_sequences=_num_held_out(store, config),
        batch_size=config.eval.batch_size,
        rows=local_rows(mesh, config.eval.batch_size),
        vocab_size=config.model.vocab_size,
    )


def find_alike_tokens(config: Config, tokenizer: str) -> np.ndarray | None:
    """Finds the tokens that Engram takes as one, by the text that a tokenizer has for them (`alike_tokens`).

    tokenizer: as `load_tokenizer` takes it; "" where none is known.

    Returns None where no block compresses tokens, or no tokenizer is known.

    Raises:
      UserError: the tokenizer cannot be read.
    """
    engram = config.model.engram
    if not (engram.blocks and engram.compress_tokens):
        return None
    if not tokenizer:
        logger.info("no tokenizer is known: to Engram, no two tokens are alike")
        return None
    try:
        return alike_tokens(load_tokenizer(tokenizer), config.model.vocab_size)
    except UserError as error:
        raise UserError(f"{error} (Engram needs none with config.model.engram.compress_tokens=False)") from None


def _is_alike(ours: str, theirs: str) -> bool:
    """Whether two tokenizers are the same by their files, wherever these lie."""
    try:
        return file_digest(ours) == file_digest(theirs)
    except UserError:
        return False


def check_batch(field: str, batch_size: int, mesh, accumulation_steps: int = 1) -> None:
    """Raises `UserError` unless every accumulation step's part of the batch spreads evenly over the data axis."""
    parts = accumulation_steps * mesh.shape["data"]
    if batch_size % parts:
        raise UserError(
            f"{field} is {batch_size}, but it must be a multiple of {parts} "
            f"({accumulation_steps} accumulation step(s) x {mesh.shape['data']} device(s) on the data axis)"
        )


def to_device(local_batch: np.ndarray, mesh, batch_size: int) -> jax.Array:
    """Makes the global batch [B, T + 1], sharded over `data`, from the rows that each process has, `local_batch`."""
    shape = (batch_size, *local_batch.shape[1:])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), local_batch, shape)


def held_out_loss(
    evaluate: Callable[[jax.Array, int], tuple[dict, jax.Array]],
    store: TokenStore | Mixture,
    config: Config,
    mesh,
    desc: str = "",
    stop: Callable[[], bool] = lambda: False,
    take: Callable[[jax.Array, int], None] = lambda nll_BT, num_sequences: None,
) -> HeldOut:
    """Computes the losses of the first `eval.num_sequences` sequences of the store (0 = all), or of those there are.

    Each process reads its own rows of every batch; all get the same result.

    Args:
      evaluate: (tokens [B, T + 1], number of its first rows that count) -> (sums, NLL [B, T]): the function of
        `make_eval_step`, with parameters and inner learning rate bound.
      store: token store.
      config: the run's configuration.
      mesh: that of the evaluation step.
      desc: label of the progress bar, in process 0; "" = no bar.
      stop: called after every batch; if it returns True, the evaluation is abandoned.
      take: called with each batch's NLL, an array on the devices, and the number of rows that count.

    Raises:
      PreemptedError: `stop` returned True.
    """
    B, num_sequences = config.eval.batch_size, _num_held_out(store, config)
    batches = _held_out_batches(store, config, mesh)
    loss, token_nll, num_tokens = 0.0, 0.0, 0
    shown = {"total": -(-num_sequences // B), "desc": desc, "unit": "batch"}
    for tokens, num_valid in progress_bar(batches, **shown, disable=not desc or jax.process_index() != 0):
        sums, nll_BT = evaluate(to_device(tokens, mesh, B), num_valid)
        take(nll_BT, num_valid)
        sums = jax.device_get(sums)
        loss += float(sums["loss"])
        token_nll += float(sums["token_nll"])
        num_tokens += int(sums["num_tokens"])
        if stop():
            raise PreemptedError("preempted in an evaluation")
    token_loss = token_nll / num_tokens if num_tokens else math.nan
    return HeldOut(loss / num_sequences, token_loss, num_tokens, num_sequences)
