"""The inner loop written out naively, over the naive network of `tests.model.naive`: a Python loop over mini-batches
that keeps, instead of window caches, the hidden states of everything read so far and attends to all of it again.

Shapes: `T` sequence, `b` mini-batch, `D` model width, `M` mini-batches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tests.model import naive


class NaiveReading(NamedTuple):
    loss: float
    mini_batch_loss_M: list[float]
    token_nll_T: jax.Array
    fast: dict  # after the last mini-batch
    gradient_norm_M: list[float]  # of the inner gradients, before clipping


def naive_reading(params, config, tokens_T1, *, windows, learning_rate, clip_norm, bos_id=0) -> NaiveReading:
    """Reads a sequence, learning after every mini-batch. windows: of each block; T or more = full attention."""
    slow, W = params["slow"], params["fast"]
    model, b = config.model, config.inner.mini_batch_size
    targets_T = tokens_T1[1:]
    x_TD = slow["embedding"][tokens_T1[:-1]]
    for p, window in zip(naive.prefix_blocks(slow, model), windows):
        x_TD = naive.block(p, x_TD, model, window)

    def mini_batch(W, history, rows_b):
        """Loss, its NLL, and the inputs of each suffix block so far (nothing yet at positions not read)."""
        x_bD, read = x_TD[rows_b], []
        suffix = naive.suffix_blocks(W, slow, model)
        for p, window, history_TD in zip(suffix, windows[-len(suffix) :], history):
            read.append(history_TD.at[rows_b].set(x_bD))
            x_bD = naive.block(p, read[-1], model, window)[rows_b]
        nll_b = naive.nll(slow, model, x_bD, targets_T[rows_b])
        counts_b = targets_T[rows_b] != bos_id if bos_id else jnp.ones(b, bool)
        loss = jnp.where(counts_b, nll_b, 0).sum() / jnp.maximum(counts_b.sum(), 1)
        return loss, (nll_b, read)

    differentiate = jax.jit(jax.value_and_grad(mini_batch, has_aux=True))
    history = [jnp.zeros_like(x_TD)] * model.num_fast_blocks
    losses, nlls, norms = [], [], []
    for start in range(0, len(targets_T), b):
        (loss, (nll_b, history)), g = differentiate(W, history, start + jnp.arange(b))
        norm = float(jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(g))))
        scale = min(1, clip_norm / norm) if clip_norm and norm else 1
        W = jax.tree.map(lambda w, g, scale=scale: w - learning_rate * scale * g, W, g)
        losses.append(float(loss))
        nlls.append(nll_b)
        norms.append(norm)
    return NaiveReading(sum(losses) / len(losses), losses, jnp.concatenate(nlls), W, norms)
