"""Key-value binding in closed form, a chunk or a piece of one at a time (the equations: __init__.py).

All gradients of a chunk are taken at the same matrices, so those of its pieces add up: a piece that does not complete a
chunk leaves sums behind, not tokens. A State holds the *change* of the matrices, not the matrices: it is zero at the
beginning of every sequence, whatever they are.

Sums over tokens are computed in float32 or wider, from factors in the dtype of the tokens. In reverse, the carry of
each step is kept, and the rest is computed again.

Shapes: `N` heads, `T` tokens, `H` head width, `F` width of f.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NORM_EPS = 1e-5  # added to a norm that is divided by
SMALLEST_NORM = 1e-12  # its square, and the second derivative of the root there, are normal numbers in float32


class Weights(NamedTuple):
    """The three matrices of f, [in, out], or what there is of each: a gradient, a change, tokens' rates."""

    w0: Any  # [N, H, F]
    w1: Any  # [N, F, H]
    w2: Any  # [N, H, F]


class Tokens(NamedTuple):
    """What the memory reads and learns."""

    q: jax.Array  # [N, T, H]
    k: jax.Array  # [N, T, H]
    v: jax.Array  # [N, T, H]
    rates: Weights  # each [N, T]
    momentum: jax.Array | None  # [N, T]; None = without


class Memory(NamedTuple):
    """What the chunks so far were learned as."""

    change: Weights  # of the matrices since the beginning of the sequence
    update: Weights | None  # the last one, of which momentum adds a part to the next


class State(NamedTuple):
    """The memory, and the sums over those tokens of an unfinished chunk that were read."""

    memory: Memory
    gradient: Weights
    momentum: jax.Array | None  # [N]


def empty(initial: Weights, *, momentum: bool, dtype) -> State:
    """Makes the State before the first token. Of `initial` it reads shapes only."""
    zeros = Weights(*(jnp.zeros(w.shape, dtype) for w in initial))
    return State(
        Memory(zeros, zeros if momentum else None),
        gradient=zeros,
        momentum=jnp.zeros(len(zeros.w0), dtype) if momentum else None,
    )


def whole(initial: Weights, tokens: Tokens, chunk_size: int):
    """Reads a sequence from its beginning, [N, T, H]. Does not learn from the last chunk, full or not.

    initial: the matrices at the beginning of the sequence, in float32 or wider; so is the result.
    """
    T = tokens.q.shape[1]
    learned = (T - 1) // chunk_size * chunk_size
    momentum = tokens.momentum is not None
    memory, _, _ = empty(initial, momentum=momentum, dtype=initial.w0.dtype)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(memory: Memory, chunk: Tokens):
        weights = _sum(initial, memory.change)
        factor_N = chunk.momentum.mean(axis=-1) if momentum else None
        return _learn(initial, memory, _gradient(weights, chunk), factor_N), _read(weights, chunk.q)

    chunks, last = jax.tree.map(lambda a: a[:, :learned], tokens), tokens.q[:, learned:]
    memory, read = jax.lax.scan(step, memory, _pieces(chunks, chunk_size))
    return jnp.concatenate([_joined(read), _read(_sum(initial, memory.change), last)], axis=1)


def extend(initial: Weights, state: State, tokens: Tokens, chunk_size: int, *, start, count=None):
    """Reads the tokens after those of a State: returns ([N, T, H], the State after them).

    They are read in pieces of which none crosses the boundary of a chunk: all of them equal, as large as can be.

    start: number of tokens before; if traced, a multiple of T. count: number of tokens, with padding after them; None =
        there is none.
    """
    T = tokens.q.shape[1]
    size = math.gcd(T, chunk_size, start if isinstance(start, int) else 0)
    if count is not None:
        is_token_T = jnp.arange(T) < count
        masked = jax.tree.map(lambda a: jnp.where(is_token_T, a, 0), (tokens.rates, tokens.momentum))
        tokens = tokens._replace(rates=masked[0], momentum=masked[1])

    def completed(state: State):
        factor_N = None if state.momentum is None else state.momentum / chunk_size
        memory = _learn(initial, state.memory, state.gradient, factor_N)
        return State(memory, *jax.tree.map(jnp.zeros_like, (state.gradient, state.momentum)))

    @partial(jax.checkpoint, prevent_cse=False)
    def step(state: State, piece):
        tokens, end = piece
        weights = _sum(initial, state.memory.change)
        momentum = None if state.momentum is None else state.momentum + tokens.momentum.sum(axis=-1)
        after = State(state.memory, _sum(state.gradient, _gradient(weights, tokens)), momentum)
        completes = (start + end) % chunk_size == 0
        if count is not None:
            completes &= end <= count
        return jax.lax.cond(completes, completed, lambda state: state, after), _read(weights, tokens.q)

    state, read = jax.lax.scan(step, state, (_pieces(tokens, size), jnp.arange(size, T + 1, size)))
    return _joined(read), state


def normed(x, axis: int):
    """Divides by the norm over an axis, or nearly: NORM_EPS is added to it."""
    return x / (_norm(x, axis) + NORM_EPS)


def _read(weights: Weights, q_NTH):
    """Computes f(q), [N, T, H]."""
    gate_NTF, up_NTF = _product(q_NTH, weights.w0), _product(q_NTH, weights.w2)
    return _product((jax.nn.silu(gate_NTF) * up_NTF).astype(q_NTH.dtype), weights.w1)


def _gradient(weights: Weights, tokens: Tokens) -> Weights:
    """Computes G, the sum over tokens of the gradients of <f(k), v>, weighted by the tokens' rates."""
    k_NTH, v_NTH, rates = tokens.k, tokens.v, tokens.rates
    gate_NTF, up_NTF = _product(k_NTH, weights.w0), _product(k_NTH, weights.w2)
    hidden_bar_NTF = _product(v_NTH, weights.w1.swapaxes(1, 2))
    sigmoid_NTF = jax.nn.sigmoid(gate_NTF)
    silu_NTF, silu_bar_NTF = gate_NTF * sigmoid_NTF, sigmoid_NTF * (1 + gate_NTF * (1 - sigmoid_NTF))

    def outer(x_NTI, y_NTO, rate_NT):
        y_NTO = (rate_NT[..., None] * y_NTO).astype(k_NTH.dtype)
        return _product(x_NTI.astype(k_NTH.dtype).swapaxes(1, 2), y_NTO)

    return Weights(
        outer(k_NTH, hidden_bar_NTF * up_NTF * silu_bar_NTF, rates.w0),
        outer(silu_NTF * up_NTF, v_NTH, rates.w1),
        outer(k_NTH, hidden_bar_NTF * silu_NTF, rates.w2),
    )


def _learn(initial: Weights, memory: Memory, gradient: Weights, factor_N) -> Memory:
    """Computes the memory after a chunk. factor_N: the chunk's mean momentum; None = there is none."""
    update = gradient
    if memory.update is not None:
        update = jax.tree.map(lambda g, u: g + factor_N[:, None, None] * u, gradient, memory.update)

    def change(start, change, update):
        return normed(start + change + update, axis=1) * _norm(start, axis=1) - start

    return Memory(jax.tree.map(change, initial, memory.change, update), update if memory.update is not None else None)


def _norm(x, axis: int):
    """Computes the norm over an axis, which is kept; of zeros, too, it has derivatives."""
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), SMALLEST_NORM**2))


def _product(x, w):
    """Multiplies in the dtype of x, and sums in float32 or wider."""
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _sum(a: Weights, b: Weights) -> Weights:
    return jax.tree.map(jnp.add, a, b)


def _pieces(tokens: Tokens, size: int):
    """Cuts arrays [N, T, ...] into pieces [T / size, N, size, ...]."""
    return jax.tree.map(lambda a: a.reshape(len(a), a.shape[1] // size, size, *a.shape[2:]).swapaxes(0, 1), tokens)


def _joined(pieces):
    """Joins pieces [P, N, size, H] to [N, P size, H]."""
    P, N, size, H = pieces.shape
    return pieces.swapaxes(0, 1).reshape(N, P * size, H)
