"""A reader: reads any number of tokens at a time into a state of fixed size, and learns when a mini-batch is full.

Whether tokens come in one piece or one by one, are read or generated, makes no difference: a full mini-batch is always
run whole, from the window caches and the fast weights at its beginning, as in training. What is run before it is full
gives predictions only.

Shapes: `B` sequences, `n` tokens, `b` inner mini-batch, `D` model width, `V` vocabulary, `K` positions of a window
cache, `L` blocks of a stack, `G` key/value heads, `H` head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_e2e.config import Config, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inner import clip_scale
from ttt_e2e.inner.step import target_weights
from ttt_e2e.inner.trajectory import take_step
from ttt_e2e.kernels.precision import matmul_precision
from ttt_e2e.model.attention import KeyValues, Unfinished
from ttt_e2e.model.dual_loss import head_pass
from ttt_e2e.model.parameters import at_least_float32, merge, split
from ttt_e2e.model.passes import FirstOrderPass
from ttt_e2e.model.rope import rotate

# Models without fast weights are trained with mini-batches as long as sequences, which mean nothing to their reader: it
# runs at most this many positions at once.
MAX_STATIC_MINI_BATCH = 1024
PIECE = 4096  # tokens of a sequence that are read between two looks at a progress bar


class ReaderState(NamedTuple):
    """All that is kept of what was read, for B sequences that are read in step.

    Its size does not depend on that, but for full attention. Keys and values are by stack, "prefix" and "suffix", and
    lie as predicting a token reads them.
    """

    fast: Any  # W_i, float32, with a leading axis B
    cache_LBGKH: dict[str, KeyValues]  # window caches of all blocks at the beginning of the unfinished mini-batch
    recent_LBGbH: dict[str, KeyValues]  # of the unfinished mini-batch, as far as it was run, keys rotated; zeros beyond
    tokens_Bb: jax.Array  # the unfinished mini-batch's tokens; the newest was not run yet; zeros beyond
    position: np.int64  # tokens read after the first one. On the host: choosing a program waits for no device
    rotated_LBGKH: dict[str, jax.Array] | None = None  # the cache's keys, rotated, once a token was predicted from it


# Where the axis B is.
_BATCHED = ReaderState(fast=0, cache_LBGKH=1, recent_LBGbH=1, tokens_Bb=0, position=None, rotated_LBGKH=1)


class Reader:
    """Reads and predicts with a model's parameters.

    Its programs are compiled once for every B; where some block has full attention, again each time its cache grows.
    """

    def __init__(self, graphdef, params: dict, config: Config, *, max_length: int = 0):
        """A reader of B sequences, which `start` decides.

        Args:
          graphdef: static structure of the `Transformer`.
          params: its weights, {"fast": W_0, "slow": theta}.
          config: the run's configuration; learning while reading takes the full `inner.learning_rate`.
          max_length: tokens that a state may hold where some block has full attention; other states hold any number.

        Raises:
          UserError: full attention without a `max_length`.
        """
        model, b = config.model, config.inner.mini_batch_size
        self.params, self.config = params, config
        self.has_window = all(model.windows)
        if not self.has_window and max_length < 1:
            raise UserError(f"max_length is {max_length}, but a model with full attention takes one of at least 1")
        self.max_length = max_length
        self.mini_batch_size = b if model.num_fast_blocks else min(b, MAX_STATIC_MINI_BATCH)

        def batched(function, *static, in_axes, out_axes):
            precise = partial(matmul_precision(model.compute_dtype)(function), *static)
            return jax.jit(jax.vmap(precise, in_axes=in_axes, out_axes=out_axes))

        some = {name: getattr(_BATCHED, name) for name in ("recent_LBGbH", "tokens_Bb")}
        most = some | {"cache_LBGKH": _BATCHED.cache_LBGKH}
        part = (None, _BATCHED, 0)
        self._extend = batched(_extend, graphdef, model, in_axes=(*part, None), out_axes=(some, 0))
        self._finish = batched(_finish, graphdef, in_axes=part, out_axes=(most, 0))
        self._learn = self._finish
        if model.num_fast_blocks:
            self._learn = batched(_learn, graphdef, config, in_axes=part, out_axes=(most | {"fast": 0}, 0))
        self._rotate = jax.jit(partial(_rotate, model))
        self._predict = batched(_predict, graphdef, in_axes=(None, _BATCHED), out_axes=(0, 1))
        self._append = batched(_append, in_axes=(_BATCHED, 1, 0, 0), out_axes=(some, 0))

    def start(self, first, batch_size: int = 1) -> ReaderState:
        """The state of `batch_size` sequences that begin with the token `first`, or each with its own, [B].

        The first token is not predicted, and so has no NLL: documents begin with BOS.
        """
        model = self.config.model
        fast = jax.tree.map(
            lambda w: jnp.broadcast_to(w.astype(at_least_float32(w.dtype)), (batch_size, *w.shape)), self.params["fast"]
        )
        tokens_Bb = np.zeros((batch_size, self.mini_batch_size), np.int32)
        tokens_Bb[:, 0] = first

        def empty(num_blocks, size):
            shape = (num_blocks, batch_size, model.num_key_value_heads, size, model.head_dim)
            return KeyValues(*(jnp.zeros(shape, jnp.dtype(model.compute_dtype)) for _ in range(2)))

        sizes = self.cache_size(0), self.mini_batch_size
        caches = ({name: empty(count, size) for name, count in model.stacks.items()} for size in sizes)
        return ReaderState(fast, *caches, jnp.asarray(tokens_Bb), np.int64(0))

    def cache_size(self, position: int) -> int:
        """K, the positions of a cache that holds those of `position` tokens and of a mini-batch more.

        The window; with full attention, the least of 1, 2, 3, 4, 6, 8, 12, 16 ... mini-batches that hold as many: few
        sizes to compile programs for, and keys that are read for nothing are a sixth on average.
        """
        if self.has_window:
            return self.config.model.sliding_window
        needed = position // self.mini_batch_size + 1
        power = 1 << (needed - 1).bit_length()
        return self.mini_batch_size * (power if needed > power * 3 // 4 else power * 3 // 4)

    def read(self, state: ReaderState, tokens_Bn, *, learn: bool = True, bar=None) -> tuple[ReaderState, np.ndarray]:
        """Reads tokens [B, n], n of any size.

        Args:
          state: is left as it was.
          tokens_Bn: integers below the vocabulary's size.
          learn: whether mini-batches that become full are learned from.
          bar: progress bar of tqdm, which counts tokens; they are then read a piece at a time.

        Returns:
          The state after them, and the NLL [B, n] of each token given those before it, in nats, under the fast weights
          that were in force when its mini-batch was read.

        Raises:
          UserError: a token that is not in the vocabulary, or more than a model with full attention has room for.
        """
        tokens_Bn, b = np.asarray(tokens_Bn, np.int32), self.mini_batch_size
        B, n = tokens_Bn.shape
        if bar is not None:
            size, nlls = max(1, PIECE // b) * b, [np.zeros((B, 0), np.float32)]
            for begin in range(0, n, size):
                piece_Bn = tokens_Bn[:, begin : begin + size]
                state, nll_Bn = self.read(state, piece_Bn, learn=learn)
                nlls.append(nll_Bn)
                bar.update(piece_Bn.size)
            return state, np.concatenate(nlls, axis=1)
        if n and not 0 <= tokens_Bn.min() <= tokens_Bn.max() < self.config.model.vocab_size:
            raise UserError(
                f"tokens to read are from {tokens_Bn.min()} to {tokens_Bn.max()}, but they must be at least 0 and "
                f"below config.model.vocab_size {self.config.model.vocab_size}"
            )
        self.check_room(state, n)
        parts, done = [], 0
        while done < n:
            count = int(state.position % b)
            size = min(b - count, n - done)
            part_Bb = np.zeros((B, b), np.int32)
            part_Bb[:, :size] = tokens_Bn[:, done : done + size]
            if size == 1 and count + 1 < b:
                state, _, nll_B = self.step(state, lambda _, part_Bb=part_Bb: part_Bb[:, 0])
                parts.append((nll_B[:, None], 0, 1))
            else:
                state, nll_Bb = self._read_part(state, part_Bb, size, learn)
                parts.append((nll_Bb, count, size))
            done += size
        # Fetched at the end, so that the device never waits for the host. (Slicing there would compile every slice.)
        nlls = [np.asarray(nll)[:, start : start + size] for nll, start, size in parts]
        return state, np.concatenate(nlls, axis=1) if nlls else np.zeros((B, 0), np.float32)

    def step(self, state: ReaderState, choose: Callable, *, learn: bool = True):
        """Predicts the next token, and reads the one that is chosen.

        Args:
          state: is left as it was.
          choose: (logits [B, V], float32) -> tokens [B].
          learn: as of `read`.

        Returns:
          The state after the tokens, the tokens [B], and their NLL [B] under the model's own prediction. Nothing waits
          for the device, unless `choose` does.
        """
        self.check_room(state, 1)
        b = self.mini_batch_size
        if state.rotated_LBGKH is None:
            state = state._replace(rotated_LBGKH=self._rotate(state.cache_LBGKH))
        logits_BV, new_LB1GH = self._predict(self.params["slow"], state)
        token_B = jnp.asarray(choose(logits_BV), jnp.int32)
        # Where this token completes the mini-batch, the changes are those of reading all of it.
        changes, nll_B = self._append(state, new_LB1GH, logits_BV, token_B)
        if (state.position + 1) % b:
            after = state._replace(**changes, position=state.position + 1)
        else:
            part_Bb = jnp.zeros((len(token_B), b), jnp.int32).at[:, 0].set(token_B)
            after, _ = self._read_part(state, part_Bb, 1, learn)
        return after, token_B, nll_B

    def programs(self, state: ReaderState) -> dict[str, tuple[Callable, tuple]]:
        """The compiled functions that continue a state, with arguments, or their shapes, for measuring them.

        "mini_batch" reads a full one, and learns from it; "rotate" runs once in a mini-batch that tokens are predicted
        in; "predict" and "append" run for each of these.
        """
        slow, unrotated = self.params["slow"], state._replace(rotated_LBGKH=None)
        state = state._replace(rotated_LBGKH=jax.eval_shape(self._rotate, state.cache_LBGKH))
        logits_BV, new_LB1GH = jax.eval_shape(self._predict, slow, state)
        token_B = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.int32)
        return {
            "mini_batch": (self._learn, (slow, self._with_room(unrotated), state.tokens_Bb)),
            "rotate": (self._rotate, (state.cache_LBGKH,)),
            "predict": (self._predict, (slow, state)),
            "append": (self._append, (state, new_LB1GH, logits_BV, token_B)),
        }

    def _read_part(self, state: ReaderState, part_Bb, size: int, learn: bool):
        """Reads the first `size` tokens of `part_Bb`, at most as many as the mini-batch lacks; its NLL [B, b]."""
        rotated, state = state.rotated_LBGKH, state._replace(rotated_LBGKH=None)
        if int(state.position) % self.mini_batch_size + size < self.mini_batch_size:
            changes, nll_Bb = self._extend(self.params["slow"], state, part_Bb, size)
            changes["rotated_LBGKH"] = rotated
        else:
            state = self._with_room(state)
            changes, nll_Bb = (self._learn if learn else self._finish)(self.params["slow"], state, part_Bb)
        return state._replace(**changes, position=state.position + size), nll_Bb

    def _with_room(self, state: ReaderState) -> ReaderState:
        """The state with caches that hold the unfinished mini-batch too."""
        lacking = self.cache_size(int(state.position)) - _cache_size(state)
        if lacking <= 0:
            return state
        # The newest position stands last in a cache: room for more is at its front.
        room = [(0, 0), (0, 0), (0, 0), (lacking, 0), (0, 0)]
        return state._replace(cache_LBGKH=jax.tree.map(lambda a: jnp.pad(a, room), state.cache_LBGKH))

    def check_room(self, state: ReaderState, n: int) -> None:
        """Raises `UserError` where a model with full attention has no room for `n` more tokens."""
        if not self.has_window and state.position + n > self.max_length:
            raise UserError(
                f"max_length is {self.max_length}, but {state.position} tokens were read and {n} more are to come: a "
                "model with full attention keeps them all, and needs a greater max_length from the start"
            )


# ------------------------------------------------------------------------------- the programs, for one sequence
# They return what changes in the state: what does not would be copied.


def _extend(graphdef, config: ModelConfig, slow, state: ReaderState, part_b, size):
    """`size` more tokens, which leave the mini-batch unfinished: changes, and NLL [b], of which `size` are new."""
    tokens_b1 = _with_part(state, part_b)
    nll_b, new = _score(graphdef, slow, state, tokens_b1)
    b, K = len(part_b), _cache_size(state)
    is_run_b = jnp.arange(b) < _count(state) + size
    recent = jax.tree.map(lambda a: jnp.where(is_run_b[:, None], a.swapaxes(-2, -3), 0), new)
    recent = {name: kv._replace(k=_rotated(config, kv.k, jnp.arange(K, K + b))) for name, kv in recent.items()}
    return {"recent_LBGbH": recent, "tokens_Bb": tokens_b1[:-1]}, nll_b


def _finish(graphdef, slow, state: ReaderState, part_b):
    """Tokens that complete the mini-batch: changes, and its NLL [b]. Learns nothing."""
    tokens_b1 = _with_part(state, part_b)
    nll_b, new = _score(graphdef, slow, state, tokens_b1)
    return _next_mini_batch(state, new, tokens_b1), nll_b


def _learn(graphdef, config: Config, slow, state: ReaderState, part_b):
    """`_finish`, and the inner step."""
    inner, bos_id = config.inner, config.data.bos_id
    model, tokens_b1 = merge(graphdef, state.fast, slow), _with_part(state, part_b)
    targets_b, num_empty = tokens_b1[1:], _num_empty(state)
    is_target_b = targets_b != bos_id if bos_id else jnp.ones_like(targets_b, dtype=bool)
    caches = _by_position(state.cache_LBGKH)
    suffix_cache = caches.pop("suffix")
    x_bD, new = model.run_cached(model.embed(tokens_b1[:-1]), caches, num_empty)
    suffix_def, suffix_fast, suffix_slow = split(model.make_suffix())

    def run(fast):
        suffix = merge(suffix_def, fast, suffix_slow)
        hidden_bD, suffix_new, _ = suffix(x_bD, suffix_cache, num_empty, make_pass=FirstOrderPass)
        return hidden_bD, suffix_new

    hidden_bD, pull_back, new["suffix"] = jax.vjp(run, suffix_fast, has_aux=True)
    head = head_pass(hidden_bD, suffix_slow["head"], targets_b)
    weight_b = target_weights(is_target_b, head.nll_T.dtype)
    (gradient,) = pull_back((weight_b[:, None] * head.gradient_TD).astype(hidden_bD.dtype))
    rate = inner.learning_rate * clip_scale(gradient, inner.clip_norm)
    fast, _ = take_step(inner, suffix_fast, gradient, rate)
    return {"fast": {"suffix": fast["blocks"]}, **_next_mini_batch(state, new, tokens_b1)}, head.nll_T


def _predict(graphdef, slow, state: ReaderState):
    """Logits [V] of the next token, and the keys, rotated, and values [L, 1, G, H] of the newest, by stack."""
    model, count = merge(graphdef, state.fast, slow), _count(state)
    before = {
        name: Unfinished(KeyValues(state.rotated_LBGKH[name], cache.v), state.recent_LBGbH[name])
        for name, cache in state.cache_LBGKH.items()
    }
    newest = jax.lax.dynamic_slice_in_dim(state.tokens_Bb, count, 1)
    x_1D, new = model.decode(model.embed(newest), before, _num_empty(state), count)
    return model.logits(x_1D)[0], new


def _append(state: ReaderState, new_L1GH: dict[str, KeyValues], logits_V, token):
    """One more token, which leaves the mini-batch unfinished, given what `_predict` says: changes, and its NLL."""
    count = _count(state)

    def put(recent, new):
        return jax.lax.dynamic_update_slice_in_dim(recent, new.swapaxes(-2, -3), count, axis=2)

    recent = jax.tree.map(put, state.recent_LBGbH, new_L1GH)
    changes = {"recent_LBGbH": recent, "tokens_Bb": state.tokens_Bb.at[count + 1].set(token)}
    return changes, jax.nn.logsumexp(logits_V) - logits_V[token]


def _rotate(config: ModelConfig, cache_LBGKH: dict[str, KeyValues]):
    """The keys of caches, rotated at the positions in which they stand."""
    return {name: _rotated(config, cache.k, jnp.arange(cache.k.shape[-2])) for name, cache in cache_LBGKH.items()}


def _rotated(config: ModelConfig, keys, positions):
    """Keys [..., positions, H]."""
    heads_last = jnp.moveaxis(keys.reshape(-1, *keys.shape[-2:]), 0, 1)
    rotated = rotate(heads_last, positions, theta=config.rope_theta, style=config.rope_style)
    return jnp.moveaxis(rotated, 1, 0).reshape(keys.shape)


def _score(graphdef, slow, state: ReaderState, tokens_b1):
    """NLL [b] of the last b tokens, and the keys and values [L, b, G, H] of the first b, a mini-batch, by stack.

    Where it is unfinished, nothing that comes before its end depends on what fills it up.
    """
    model = merge(graphdef, state.fast, slow)
    x_bD, new = model.run_cached(model.embed(tokens_b1[:-1]), _by_position(state.cache_LBGKH), _num_empty(state))
    return model.nll(x_bD, tokens_b1[1:]), new


def _by_position(caches: dict[str, KeyValues]) -> dict[str, KeyValues]:
    """Keys and values [L, G, positions, H] as [L, positions, G, H], or back."""
    return jax.tree.map(lambda a: a.swapaxes(-2, -3), caches)


def _next_mini_batch(state: ReaderState, new_LbGH: dict[str, KeyValues], tokens_b1) -> dict:
    """What changes at the beginning of the next mini-batch, after one with these keys, values, and tokens."""
    caches = {name: cache.append(new_LbGH[name]) for name, cache in _by_position(state.cache_LBGKH).items()}
    return {
        "cache_LBGKH": _by_position(caches),
        "recent_LBGbH": jax.tree.map(jnp.zeros_like, state.recent_LBGbH),
        "tokens_Bb": jnp.zeros_like(state.tokens_Bb).at[0].set(tokens_b1[-1]),
    }


def _with_part(state: ReaderState, part_b):
    """The mini-batch's b inputs and the target of the last, [b + 1], as far as they are known with these tokens."""
    b = len(part_b)
    room = jnp.concatenate([state.tokens_Bb, jnp.zeros(b + 1, jnp.int32)])
    return jax.lax.dynamic_update_slice_in_dim(room, part_b, _count(state) + 1, axis=0)[: b + 1]


def _count(state: ReaderState):
    """How many tokens of the unfinished mini-batch were run."""
    return state.position % state.tokens_Bb.shape[-1]


def _num_empty(state: ReaderState):
    """Leading positions of the window caches that hold nothing."""
    return jnp.maximum(_cache_size(state) - (state.position - _count(state)), 0)


def _cache_size(state: ReaderState) -> int:
    """K, of the caches of one sequence or of several."""
    return jax.tree.leaves(state.cache_LBGKH)[0].shape[-2]
