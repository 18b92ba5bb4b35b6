"""The gated delta rule token by token: the reference that `chunked.py` is tested against.

Shapes: `N` heads, `T` tokens, `K` width of keys, `V` width of values.
"""

import jax
import jax.numpy as jnp


def delta_rule(q_NTK, k_NTK, v_NTV, beta_NT, log_decay_NT, state_NKV):
    """Computes (o [N, T, V], the state after the last token); arguments as those of `chunked.delta_rule`."""

    def step(state_KV, token):
        q_K, k_K, v_V, beta, log_decay = token
        state_KV = jnp.exp(log_decay) * state_KV
        state_KV += jnp.outer(k_K, beta * (v_V - k_K @ state_KV))
        return state_KV, q_K @ state_KV

    def of_head(state_KV, *tokens):
        state_KV, o_TV = jax.lax.scan(step, state_KV, tokens)
        return o_TV, state_KV

    return jax.vmap(of_head)(state_NKV, q_NTK, k_NTK, v_NTV, beta_NT, log_decay_NT)
