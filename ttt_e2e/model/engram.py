"""Engram: a memory of n-grams, which are looked up by their hash (DeepSeek's conditional memory, arXiv 2601.07372).

A branch of a block, which stands before the mixer and adds y to the hidden states x:

    e       rows of tables side by side, one for each length (two and three tokens) and head: of the n-gram that ends at
            the position, the row that the head's hash says
    k, u    key and value: two projections of e
    gate    sigmoid(sign(s) sqrt(|s|)) with s = <norm(k), norm(x)> / sqrt(D): whether the hidden state asks for this key
    v       gate u
    y       v + SiLU(a causal depthwise convolution of norm(v), of dilation 3)

Tokens whose texts are alike count as one (`with_alike`). Of the tokens t_0 (the newest), t_1, t_2 (0 for a bigram),
each counted from 1, with 0 where there is none, the hash is

    (m_0 t_0 xor m_1 t_1 xor m_2 t_2) mod P,    the products being modulo 2**32

with a prime P, the number of rows, and odd multipliers m (`multipliers`) for each head. All numbers are below 2**32, so
that JAX computes it without 64-bit integers, to the same rows on every platform.

Shapes: `T` positions, `b` inner mini-batch, `D` model width, `W` width of the convolution, `N` heads (tables), `R` rows
of all tables, `H` width of a row, or of a device's part of it, `E` = N H,
`V` vocabulary.
"""

import hashlib
import itertools
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttt_e2e.config import EngramConfig
from ttt_e2e.config.fields import LARGEST, require
from ttt_e2e.model.causal_conv import causal_conv, last_inputs
from ttt_e2e.model.mixers import Context, Mixer
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import at_least_float32, constant, matrix, parameter, parameter_name
from ttt_e2e.model.parts import AXIS as MODEL
from ttt_e2e.model.parts import DATA, sum_to_all
from ttt_e2e.model.passes import Pass

LENGTHS = (2, 3)  # tokens of an n-gram
DILATION = max(LENGTHS)  # of the convolution, so that the n-grams that it sees do not overlap
LEAST = 1e-6  # |s| counts as at least this, where the square root has a derivative
ROW_MULTIPLE = 64  # rows of all tables together are a multiple of it, so that the mesh axis `model` divides them
TABLE_RATE = 5.0  # factor on the tables' learning rate, of the paper, as is that they do not decay


class State(NamedTuple):
    """What of a sequence the next tokens need. It has no cotangents, as no inner loop reads it: ids may be integers."""

    ids: jax.Array  # [2], the last tokens, int32, counted from 1; 0 where there is none
    inputs: jax.Array  # [3 (W - 1), D], the last inputs of the convolution


class Engram(Mixer):
    """Maps hidden states [T, D], not normed, and the tokens in the `Context` to what is added to the hidden states.

    It is no mixer of a block, but stands beside it; it carries a State, and so has the methods of one.
    """

    def __init__(self, config, rngs: nnx.Rngs, *, block: int):
        """block: index of its block, on which its hashes depend."""
        fields, D = config.engram, config.hidden_size
        self.config, self.fields, self.block, self.sizes = config, fields, block, table_sizes(fields, block)
        R, N, H = sum(self.sizes), len(self.sizes), fields.head_dim
        R += 0 if fields.one_row else -R % ROW_MULTIPLE
        legal = f"so much less that all tables of a block together have fewer than 2**31 rows, not {R}"
        require(R <= LARGEST, "config.model.engram.table_size", fields.table_size, legal)
        if fields.compress_tokens:
            self.alike = constant(jnp.arange(config.vocab_size), (None,))
        std = config.initializer_range
        rows = std * jax.random.normal(rngs.params(), (R, H), jnp.dtype(config.param_dtype))
        # Not cast as a whole, only the rows that are looked up.
        self.table = parameter(rows, config, ("rows", "columns"), decays=False, rate=TABLE_RATE, is_cast=False)
        self.wk = matrix(rngs, (N * H, D), config, (None, "width"))
        self.wv = matrix(rngs, (N * H, D), config, (None, "width"), std=0.0 if fields.zero_init else None)
        self.key_norm, self.query_norm, self.conv_norm = (RMSNorm(D, config) for _ in range(3))
        self.num_rows = R
        self.conv = parameter(jnp.zeros((D, fields.conv_width)), config, (None, None))  # the identity, at the start

    def whole(self, x_TD, compute: Pass, context: Context):  # noqa: D102 (see `Mixer`)
        return self.extend(x_TD, compute, self.empty(0), context)[0]

    def extend(self, x_bD, compute: Pass, state: State, context: Context):  # noqa: D102
        ids_b = self.ids(context.tokens)
        e_bE = self._look_up(self.rows(ids_b, state.ids), x_bD.dtype)
        y_bD, inputs = self.read_out(x_bD, e_bE, compute, state.inputs, context.count)
        return y_bD, State(last_inputs(ids_b, state.ids, context.count), inputs)

    def decode(self, x_1D, compute: Pass, prepared: State, draft: State, context: Context):  # noqa: D102
        return self.extend(x_1D, compute, draft, context._replace(count=None))

    def empty(self, capacity: int) -> State:  # noqa: D102
        positions = DILATION * (self.fields.conv_width - 1)
        inputs = jnp.zeros((positions, self.config.hidden_size), jnp.dtype(self.config.compute_dtype))
        return State(jnp.zeros(max(LENGTHS) - 1, jnp.int32), inputs)

    def flops(self, seq_len: int) -> float:  # noqa: D102
        D, E = self.config.hidden_size, len(self.sizes) * self.fields.head_dim
        return 4 * D * E + 2 * self.fields.conv_width * D

    def ids(self, tokens_T):
        """Computes the ids of tokens [T] for the hash, counted from 1: alike tokens have the same."""
        return (self.alike[...][tokens_T].astype(jnp.int32) if self.fields.compress_tokens else tokens_T) + 1

    def rows(self, ids_T, before_2):
        """Computes the rows of the table [T, N] of the n-grams that end at each token; ids count from 1.

        before_2: the two tokens before the first.
        """
        ids = jnp.concatenate([before_2, ids_T]).astype(jnp.uint32)
        multipliers_N3 = multipliers(self.block, self.fields.num_heads)
        T, newest, hash_TN = len(ids_T), len(before_2), jnp.uint32(0)
        for back in range(newest + 1):
            hash_TN ^= jax.lax.slice_in_dim(ids, newest - back, newest - back + T)[:, None] * multipliers_N3[:, back]
        first_rows_N = np.cumsum((0, *self.sizes[:-1]), dtype=np.int32)
        return (hash_TN % np.asarray(self.sizes, np.uint32)).astype(jnp.int32) + first_rows_N

    def read_out(self, x_TD, e_TE, compute: Pass, before, count=None):
        """Runs all behind the lookup: returns (y [T, D], the last inputs of the convolution).

        before: the inputs of the convolution before these. count: number of tokens, as in a `Context`.
        """
        key_TD = compute.product("engram.key", e_TE, self.wk[...])
        value_TD = compute.product("engram.value", e_TE, self.wv[...])
        return compute.call(self._mix, (x_TD, key_TD, value_TD), before, count)

    def _look_up(self, rows_TN, dtype):
        """Looks up rows, side by side [T, E].

        Devices exchange what they look up, not the table. Of the mesh axis `data`, each has other columns, and looks up
        the rows of all; of the axis `model`, each has other rows, and the others' are 0 in a sum. So no cotangent of
        the table needs a sum over devices.
        """
        T, table_RH = len(rows_TN), self.table[...]
        R = len(table_RH)  # of this device
        has_rows, has_columns = self.num_rows > R, self.fields.head_dim > table_RH.shape[1]
        if has_columns:
            rows_TN = jax.lax.all_gather(rows_TN, DATA, tiled=True)
        if has_rows:
            rows_TN -= R * jax.lax.axis_index(MODEL)
        e_TNH = table_RH.at[rows_TN].get(mode="fill", fill_value=0, wrap_negative_indices=False).astype(dtype)
        if has_columns:
            e_TNH = jax.lax.all_to_all(e_TNH, DATA, 0, 2, tiled=True)
        return sum_to_all(e_TNH, has_rows).reshape(T, -1)

    def _mix(self, arrays, before, count):
        """Runs all behind the projections, as `read_out`; arrays: hidden states, keys and values [T, D]."""
        x_TD, key_TD, value_TD = arrays
        wide, D = at_least_float32(x_TD.dtype), x_TD.shape[1]
        key_TD, query_TD = self.key_norm(key_TD.astype(wide)), self.query_norm(x_TD.astype(wide))
        s_T = (key_TD * query_TD).sum(-1, keepdims=True) * D**-0.5
        gate_T = jax.nn.sigmoid(jnp.sign(s_T) * jnp.sqrt(jnp.maximum(jnp.abs(s_T), LEAST)))
        v_TD = gate_T.astype(x_TD.dtype) * value_TD
        inputs_TD = self.conv_norm(v_TD)
        convolved_TD = causal_conv(inputs_TD, self.conv[...], before, dilation=DILATION)
        return v_TD + jax.nn.silu(convolved_TD), last_inputs(inputs_TD, before, count)


def with_alike(params: dict, alike_V) -> dict:
    """Replaces in a model's parameters what says which tokens are alike: for each token, one that stands for it."""

    def replace(path, leaf):
        is_it = parameter_name(path).endswith(".engram.alike")
        return jnp.broadcast_to(jnp.asarray(alike_V, leaf.dtype), leaf.shape) if is_it else leaf

    return jax.tree_util.tree_map_with_path(replace, params)


@lru_cache
def table_sizes(fields: EngramConfig, block: int) -> tuple[int, ...]:
    """Computes the rows of the tables of a block, for bigrams and then for trigrams: primes from `table_size` on.

    No two tables of a model have the same, and each block the next ones.
    """
    count = len(LENGTHS) * fields.num_heads
    if fields.one_row:
        return (1,) * count
    primes, first = filter(_is_prime, itertools.count(fields.table_size)), fields.block_indices.index(block) * count
    return tuple(itertools.islice(primes, first, first + count))


@lru_cache
def multipliers(block: int, num_heads: int) -> np.ndarray:
    """Makes the multipliers of the hashes of a block, [N, 3]: odd numbers, and 0 for the third token of a bigram.

    They are BLAKE2b digests of 4 bytes, read as little-endian numbers and made odd, of the text "BLOCK LENGTH HEAD
    TOKEN", in which TOKEN counts back from the newest.
    """

    def multiplier(*place: int) -> int:
        digest = hashlib.blake2b(" ".join(map(str, place)).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") | 1

    of_heads = [
        [multiplier(block, length, head, token) if token < length else 0 for token in range(max(LENGTHS))]
        for length in LENGTHS
        for head in range(num_heads)
    ]
    return np.asarray(of_heads, np.uint32)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))
