"""The decay of a recurrence's memory, one number for each token and head, as in Mamba-2 and Gated DeltaNet.

    dt       softplus(projection + bias), the step of a token
    decay    exp(-exp(A_log) dt)

Shapes: `T` positions, `N` heads.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.parameters import vector


def decay_parameters(rngs: nnx.Rngs, N: int, config, *, least_rate: float) -> tuple[nnx.Param, nnx.Param]:
    """Makes the parameters (dt_bias [N], A_log [N]), as released.

    Steps are uniform in their logarithm, between 0.001 and 0.1; rates exp(A_log) are uniform, from `least_rate` to 16.
    """
    low, high = math.log(1e-3), math.log(0.1)
    dt = jnp.exp(jax.random.uniform(rngs.params(), (N,), minval=low, maxval=high))
    dt_bias = dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus
    rates = jax.random.uniform(rngs.params(), (N,), minval=least_rate, maxval=16.0)
    return tuple(vector(value, config, "heads", decays=False) for value in (dt_bias, jnp.log(rates)))


def log_decay(projected_TN, dt_bias_N, A_log_N, dtype, count=None):
    """Computes (dt [T, N], logarithm of the decay [T, N]) in `dtype`; padding has 0, and so does not decay.

    count: number of positions that are tokens, with padding after them; None = all.
    """
    dt_TN = jax.nn.softplus(projected_TN.astype(dtype) + dt_bias_N.astype(dtype))
    if count is not None:
        dt_TN = jnp.where((jnp.arange(len(dt_TN)) < count)[:, None], dt_TN, 0)
    return dt_TN, -jnp.exp(A_log_N.astype(dtype)) * dt_TN
