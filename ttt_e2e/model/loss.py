"""Next-token loss. Shapes: `T` positions, `D` model width, `V` vocabulary."""

import jax
import jax.numpy as jnp

from ttt_e2e.model.parameters import at_least_float32

# Logits held at once: 2^24 float32 values are 64 MiB.
MAX_LOGITS = 2**24


def token_nll(x_TD, head_DV, targets_T):
    """Negative log likelihood [T] of each target, in nats and float32; logits of a few tokens exist at a time."""
    T = x_TD.shape[0]
    block = _block_size(T, head_DV.shape[1])
    if block == T:
        return _block_nll(x_TD, head_DV, targets_T)

    @jax.checkpoint
    def one_block(args):
        return _block_nll(args[0], head_DV, args[1])

    blocks = (x_TD.reshape(T // block, block, -1), targets_T.reshape(T // block, block))
    return jax.lax.map(one_block, blocks).reshape(T)


def logits(x_TD, head_DV):
    """[T, V], float32, whatever the dtype of the normed hidden states."""
    wide = at_least_float32(x_TD.dtype)
    return jnp.einsum("td,dv->tv", x_TD, head_DV.astype(x_TD.dtype), preferred_element_type=wide)


def masked_mean(nll, is_target):
    """Mean over the last axis of `nll` where `is_target`; 0, with zero gradient, where there is none."""
    total = jnp.sum(jnp.where(is_target, nll, 0), axis=-1)
    return total / jnp.maximum(jnp.sum(is_target, axis=-1), 1)


def _block_size(T: int, V: int) -> int:
    """The largest divisor of T whose logits fit."""
    limit = max(1, MAX_LOGITS // V)
    return max(size for size in range(1, T + 1) if T % size == 0 and size <= limit)


def _block_nll(x_TD, head_DV, targets_T):
    logits_TV = logits(x_TD, head_DV)
    target_logit_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits_TV, axis=-1) - target_logit_T
