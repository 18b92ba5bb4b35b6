"""Key-value binding token by token, by autodiff: the reference that `chunked.py` is tested against.

Shapes of one head: `T` tokens, `H` head width, `F` width of f.
"""

import jax
import jax.numpy as jnp


def f(weights, x_H):
    """Computes w1 (silu(w0 x) * (w2 x)), [H], of matrices [in, out]."""
    w0_HF, w1_FH, w2_HF = weights
    return (jax.nn.silu(x_H @ w0_HF) * (x_H @ w2_HF)) @ w1_FH


def bind(weights, q_TH, k_TH, v_TH, rates_T3, momentum_T=None, *, chunk_size: int):
    """Reads a sequence of one head: returns (y [T, H], weights after its last full chunk).

    weights: (w0, w1, w2) at the beginning. rates_T3: of each token for w0, w1 and w2. momentum_T: None = there is none.
    """
    norms = [jnp.linalg.norm(w, axis=0) for w in weights]
    updates = [jnp.zeros_like(w) for w in weights]
    y = []
    for start in range(0, len(q_TH), chunk_size):
        chunk = range(start, min(start + chunk_size, len(q_TH)))
        y += [f(weights, q_TH[t]) for t in chunk]
        if len(chunk) < chunk_size:
            break
        factor = 0.0 if momentum_T is None else sum(momentum_T[t] for t in chunk) / chunk_size
        updates = [u * factor for u in updates]
        for t in chunk:
            gradients = jax.grad(lambda w, t=t: f(w, k_TH[t]) @ v_TH[t])(tuple(weights))
            updates = [u + rate * g for u, rate, g in zip(updates, rates_T3[t], gradients, strict=True)]
        weights = [w + u for w, u in zip(weights, updates, strict=True)]
        weights = [w / (jnp.linalg.norm(w, axis=0) + 1e-5) * n for w, n in zip(weights, norms, strict=True)]
    return jnp.stack(y), weights
