"""SSD token by token: the reference that `chunked.py` is tested against.

Shapes: `N` heads, `T` tokens, `H` head width, `S` state width.
"""

import jax
import jax.numpy as jnp


def ssd(x_NTH, log_decay_NT, B_TS, C_TS, state_NHS):
    """Computes (y [N, T, H], the state after the last token); arguments as those of `chunked.ssd`."""

    def step(state_NHS, token):
        x_NH, log_decay_N, B_S, C_S = token
        state_NHS = jnp.exp(log_decay_N)[:, None, None] * state_NHS + x_NH[:, :, None] * B_S
        return state_NHS, state_NHS @ C_S

    state_NHS, y_TNH = jax.lax.scan(step, state_NHS, (x_NTH.swapaxes(0, 1), log_decay_NT.T, B_TS, C_TS))
    return y_TNH.swapaxes(0, 1), state_NHS
