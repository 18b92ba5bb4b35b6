"""From token stores to arrays on the mesh, and the held-out loss. Shapes: `B` batch, `T` sequence."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from ttt_e2e.config import Config
from ttt_e2e.data.pipeline import evaluation_batches
from ttt_e2e.data.store import TokenStore
from ttt_e2e.errors import PreemptedError, UserError
from ttt_e2e.outer import sharding


class HeldOut(NamedTuple):
    """Losses on held-out text, in nats."""

    loss: float  # as in training: mean over sequences of the mean over mini-batches
    token_loss: float  # mean over unmasked targets
    num_tokens: int  # unmasked targets
    token_nll: np.ndarray  # float32 [sequences, T], unmasked


def open_store(config: Config, split: str) -> TokenStore:
    """A split of the config's token store, checked against the config.

    Raises:
      UserError: no such store or split, too few tokens, or prepared for another vocabulary.
    """
    path, ours = config.data.path, config.model.vocab_size
    if not path:
        raise UserError("config.data.path is '', but it must be the directory of a token store (see ttt-e2e prepare)")
    store = TokenStore.open(path, split)
    store.num_sequences(config.train.seq_len)  # raises where there is none
    if (theirs := store.attributes.get("vocab_size", ours)) > ours:
        raise UserError(f"config.model.vocab_size is {ours}, but token store {path} was prepared with {theirs}")
    for field in ("bos_id", "tokenizer"):
        ours = getattr(config.data, field)
        theirs = store.attributes.get(field, ours)
        if ours != theirs and ours != "":  # an empty tokenizer means the store's
            raise UserError(f"config.data.{field} is {ours!r}, but token store {path} was prepared with {theirs!r}")
    return store


def check_batch(field: str, batch_size: int, mesh, accumulation_steps: int = 1) -> None:
    """Raises `UserError` unless every accumulation step's part of the batch spreads evenly over the data axis."""
    parts = accumulation_steps * mesh.shape["data"]
    if batch_size % parts:
        raise UserError(
            f"{field} is {batch_size}, but it must be a multiple of {parts} "
            f"({accumulation_steps} accumulation step(s) x {mesh.shape['data']} device(s) on the data axis)"
        )


def to_device(local_batch: np.ndarray, mesh, batch_size: int) -> jax.Array:
    """The global batch [B, T + 1], sharded over `data`, of which this process holds `local_batch`."""
    shape = (batch_size, *local_batch.shape[1:])
    return jax.make_array_from_process_local_data(NamedSharding(mesh, sharding.BATCH), local_batch, shape)


def held_out_loss(
    eval_step,
    params,
    store: TokenStore,
    config: Config,
    mesh,
    inner_rate: float,
    desc: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> HeldOut:
    """Reads the first `eval.num_sequences` sequences of the store (0 = all) with `eval_step` (`make_eval_step`).

    Raises:
      PreemptedError: `stop`, which is asked after every batch, says so.
    """
    B, T = config.eval.batch_size, config.train.seq_len
    num_sequences = config.eval.num_sequences or store.num_sequences(T)
    batches = evaluation_batches(
        store, seq_len=T, num_sequences=num_sequences, batch_size=B, vocab_size=config.model.vocab_size
    )
    rows = sharding.local_rows(mesh, B)
    losses, nlls, masks = [], [], []
    for tokens, num_valid in tqdm(batches, total=-(-num_sequences // B), desc=desc, unit="batch", disable=not desc):
        loss_B, nll_BT = eval_step(params, to_device(tokens[rows], mesh, B), inner_rate)
        losses.append(np.asarray(loss_B)[:num_valid])
        nlls.append(np.asarray(nll_BT)[:num_valid])
        masks.append((tokens[:num_valid, 1:] != config.data.bos_id) | (config.data.bos_id == 0))
        if stop():
            raise PreemptedError("preempted in an evaluation")
    nll, is_target = np.concatenate(nlls), np.concatenate(masks)
    token_loss = float(nll[is_target].mean(dtype=np.float64))
    return HeldOut(float(np.concatenate(losses).mean(dtype=np.float64)), token_loss, int(is_target.sum()), nll)
