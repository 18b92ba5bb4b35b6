"""The inner loop written out naively, over the naive network of `tests.model.naive`: a Python loop over mini-batches
that keeps, instead of window caches, the hidden states of everything read so far and attends to all of it again.

Shapes: `T` sequence, `b` mini-batch, `D` model width, `M` mini-batches.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.model import naive


class NaiveReading(NamedTuple):
    """What reading gives, and how it went."""

    loss: float
    mini_batch_loss_M: np.ndarray
    token_nll_T: np.ndarray
    fast: dict  # after the last mini-batch
    updates: list  # of the fast weights, one a mini-batch
    gradient_norm_M: np.ndarray  # of the inner gradients, before clipping


def naive_reading(
    params, config, tokens_T1, *, windows, learning_rate, clip_norm, bos_id=0, updates=None
) -> NaiveReading:
    """Reads a sequence, learning after every mini-batch.

    windows: of each block; T or more = full attention.
    updates: to apply instead of those that the mini-batches teach.
    """
    W, slow, b = params["fast"], params["slow"], config.inner.mini_batch_size
    model = dataclasses.replace(config.model, sliding_window=0, mixer="")  # the windows are arguments of one program
    tokens_T1, windows = jnp.asarray(tokens_T1), jnp.asarray(windows)
    x_TD = _prefix(slow, tokens_T1[:-1], windows, model)
    history = [jnp.zeros_like(x_TD)] * model.num_fast_blocks
    losses, nlls, norms, applied = [], [], [], []
    for i in range(len(x_TD) // b):
        rows_b = i * b + jnp.arange(b)
        (loss, (nll_b, history)), g = _mini_batch(W, history, slow, x_TD, tokens_T1[1:], rows_b, windows, model, bos_id)
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g)))
        scale = min(1, clip_norm / norm) if clip_norm and norm else 1
        applied.append(updates[i] if updates else jax.tree.map(lambda g, s=scale: -learning_rate * s * g, g))
        W = jax.tree.map(jnp.add, W, applied[-1])
        losses.append(loss)
        nlls.append(nll_b)
        norms.append(norm)
    return NaiveReading(np.mean(losses), np.array(losses), np.concatenate(nlls), W, applied, np.array(norms))


@partial(jax.jit, static_argnames="model")
def _prefix(slow, inputs_T, windows, model):
    x_TD = slow["embedding"][inputs_T]
    for i, p in enumerate(naive.prefix_blocks(slow, model)):
        x_TD = naive.block(p, x_TD, model, windows[i])
    return x_TD


@partial(jax.jit, static_argnames=("model", "bos_id"))
@partial(jax.value_and_grad, has_aux=True)
def _mini_batch(W, history, slow, x_TD, targets_T, rows_b, windows, model, bos_id):
    """Loss, NLL and the inputs of each suffix block so far (zeros where not read yet); and the gradient in W."""
    x_bD, read = x_TD[rows_b], []
    for i, p in enumerate(naive.suffix_blocks(W, slow, model)):
        read.append(history[i].at[rows_b].set(x_bD))
        x_bD = naive.block(p, read[-1], model, windows[model.num_prefix_blocks + i])[rows_b]
    nll_b = naive.nll(slow, model, x_bD, targets_T[rows_b])
    counts_b = targets_T[rows_b] != bos_id if bos_id else jnp.ones(len(rows_b), bool)
    return jnp.where(counts_b, nll_b, 0).sum() / jnp.maximum(counts_b.sum(), 1), (nll_b, read)
