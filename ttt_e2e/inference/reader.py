"""A reader: reads any number of tokens (prefill), predicts the next one (decoding), learns from full mini-batches.

Its state has a fixed size, unless a mixer's State grows (the KV cache of full attention). It makes no difference
whether tokens come in one piece or one by one, are read or generated: when a mini-batch is full, all of it is run at
once, from the mixers' States and the fast weights at its beginning, as in training. Whatever was run of it before gave
predictions only.

Shapes: `B` sequences, `n` tokens, `b` inner mini-batch, `D` model width, `V` vocabulary, `L` blocks of a stack.
`tokens_b1` is [b + 1]: the inputs of a mini-batch, and the target of the last.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_e2e.config import Config
from ttt_e2e.data.masking import is_target
from ttt_e2e.errors import UserError
from ttt_e2e.inner.step import MiniBatch, clip_scale, inner_gradient
from ttt_e2e.inner.trajectory import take_step
from ttt_e2e.kernels.precision import matmul_precision
from ttt_e2e.model import Transformer
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.parameters import at_least_float32, merge, split, structure_of
from ttt_e2e.model.passes import FirstOrderPass

# Models without fast weights have mini-batches as long as a training sequence. Their reader does not need these, and
# runs at most this many positions at once.
MAX_STATIC_MINI_BATCH = 1024
MIN_RATED = 16  # positions that `rate` runs at least
PIECE = 4096  # tokens of a sequence that are read between two updates of a progress bar


class ReaderState(NamedTuple):
    """What a reader carries from token to token, for B sequences that are read in step.

    Its size does not depend on the number of tokens read, unless a mixer's State grows, as that of full attention does.
    `states`, `drafts` and `prepared` are dicts by stack of blocks (model/stacks.py), of arrays [L, B, ...].
    """

    fast: Any  # fast weights W_i, float32, with a leading axis B
    states: dict[str, Any]  # States of the mixers at the beginning of the unfinished mini-batch
    drafts: dict[str, Any]  # keys, values, ... of the tokens of the unfinished mini-batch that were run
    tokens: jax.Array  # [B, b], inputs of the unfinished mini-batch; the newest was not run yet; zeros after it
    position: np.int64  # tokens read after the first one; on the host, so that choosing a program does not wait
    prepared: dict[str, Any] | None = None  # States as decoding reads them (keys rotated); None before decoding

    def __repr__(self):  # without the arrays, which nobody can read
        return f"ReaderState(position={self.position})"


# Which axis of the arrays of a field is B.
_BATCHED = ReaderState(fast=0, states=1, drafts=1, tokens=0, position=None, prepared=1)
# Length of a sequence for which every State that does not grow has its full size.
ENDLESS = 2**31 - 1


class Reader:
    """Reads tokens into a state and predicts the next token, with a model's parameters.

    Its programs are compiled once for every B, and again for every size of a State that grows (full attention).
    """

    def __init__(self, graphdef, params: dict, config: Config, *, max_length: int = 0):
        """Makes the programs of a reader; `start` decides how many sequences it reads at once.

        Args:
          graphdef: static structure of the `Transformer`.
          params: its weights, {"fast": W_0, "slow": theta}.
          config: the run's configuration; inner steps take the full `inner.learning_rate`.
          max_length: most tokens of a state where some block has full attention; unused where none has.

        Raises:
          UserError: full attention without a `max_length`, or a mixer that cannot decode token by token.
        """
        model, b = config.model, config.inner.mini_batch_size
        self.params, self.config = params, config
        self.model: Transformer = structure_of(graphdef, params["fast"], params["slow"]).module
        self.grows = self.model.grows
        if obstacle := self.model.obstacle("decode"):
            raise UserError(obstacle)
        if self.grows and max_length < 1:
            raise UserError(f"max_length is {max_length}, but a model with full attention takes one of at least 1")
        self.max_length = max_length
        self.mini_batch_size = b if model.num_fast_blocks else min(b, MAX_STATIC_MINI_BATCH)

        def batched(function, *static, in_axes, out_axes):
            precise = partial(matmul_precision(model.compute_dtype)(function), *static)
            return jax.jit(jax.vmap(precise, in_axes=in_axes, out_axes=out_axes))

        some = {name: getattr(_BATCHED, name) for name in ("drafts", "tokens")}
        most = some | {"states": _BATCHED.states}
        part = (None, _BATCHED, 0)
        self._extend = batched(_extend, graphdef, in_axes=(*part, None), out_axes=(some, 0))
        self._finish = batched(_finish, graphdef, in_axes=part, out_axes=(most, 0))
        self._learn = self._finish
        if model.num_fast_blocks:
            self._learn = batched(_learn, graphdef, config, in_axes=part, out_axes=(most | {"fast": 0}, 0))
        self._rate = batched(_rate, graphdef, in_axes=part, out_axes=0)
        self._prepare = jax.jit(jax.vmap(self.model.prepare, in_axes=1, out_axes=1))
        self._predict = batched(_predict, graphdef, in_axes=(None, _BATCHED), out_axes=(0, 1))
        self._append = batched(_append, self.model, in_axes=(_BATCHED, 1, 0, 0), out_axes=(some, 0))

    def start(self, first, batch_size: int = 1) -> ReaderState:
        """Makes the state of `batch_size` sequences after their first token: `first`, one id for all, or ids [B].

        The first token is not predicted, and so has no NLL; it should be BOS, as documents begin with it.
        """
        fast = jax.tree.map(
            lambda w: jnp.broadcast_to(w.astype(at_least_float32(w.dtype)), (batch_size, *w.shape)), self.params["fast"]
        )
        tokens_Bb = np.zeros((batch_size, self.mini_batch_size), np.int32)
        tokens_Bb[:, 0] = first

        states = self.model.empty(self.room(0))
        drafts = self.model.draft(states, self.mini_batch_size)
        states, drafts = (
            jax.tree.map(lambda a: jnp.repeat(a[:, None], batch_size, axis=1), tree) for tree in (states, drafts)
        )
        return ReaderState(fast, states, drafts, jnp.asarray(tokens_Bb), np.int64(0))

    def room(self, position: int) -> int:
        """Size, in tokens, of the States (KV caches) of a sequence that has read `position` tokens.

        It has room for a mini-batch more. Where States grow, it is the least of 1, 2, 3, 4, 6, 8, 12, 16 ...
        mini-batches that is enough: there are few sizes to compile programs for, and a sixth of a cache is empty on
        average. Else it is `ENDLESS`.
        """
        if not self.grows:
            return ENDLESS
        needed = position // self.mini_batch_size + 1
        power = 1 << (needed - 1).bit_length()
        return self.mini_batch_size * (power if needed > power * 3 // 4 else power * 3 // 4)

    def read(self, state: ReaderState, tokens_Bn, *, learn: bool = True, bar=None) -> tuple[ReaderState, np.ndarray]:
        """Reads tokens [B, n] (prefill), for any n, and takes an inner step on each mini-batch that becomes full.

        Args:
          state: the state before them; it is not changed.
          tokens_Bn: integers below the vocabulary's size.
          learn: whether to take inner steps.
          bar: progress bar, updated by the number of tokens; they are then read `PIECE` tokens at a time.

        Returns:
          The state after them, and the NLL [B, n] of each token given those before it, in nats, under the fast weights
          before its mini-batch's inner step.

        Raises:
          UserError: a token is not in the vocabulary, or full attention has no room for n more tokens.
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
        self._check_tokens(tokens_Bn)
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
        # Fetched at the end, so that the device never waits for the host, and sliced on the host: a slice on the device
        # would be a program to compile.
        nlls = [np.asarray(nll)[:, start : start + size] for nll, start, size in parts]
        return state, np.concatenate(nlls, axis=1) if nlls else np.zeros((B, 0), np.float32)

    def rate(self, state: ReaderState, tokens_Bn) -> tuple[np.ndarray, np.ndarray]:
        """Scores tokens [B, n] that may come next, without reading them: costs a forward pass over them alone.

        Args:
          state: the state before them, at the beginning of a mini-batch.
          tokens_Bn: integers below the vocabulary's size, at most as many as a mini-batch has.

        Returns:
          The NLL [B, n] of each token, as that of `read`, and whether it is the likeliest, by which a greedy decoder
          would choose it.

        Raises:
          UserError: a token is not in the vocabulary, or full attention has no room for n more tokens.
        """
        tokens_Bn, b = np.asarray(tokens_Bn, np.int32), self.mini_batch_size
        n = tokens_Bn.shape[1]
        if state.position % b or not 0 < n <= b:
            raise ValueError(f"{n} tokens from position {state.position} on are no beginning of a mini-batch of {b}")
        self._check_tokens(tokens_Bn)
        self.check_room(state, n)
        width = min(b, max(MIN_RATED, 1 << (n - 1).bit_length()))  # few widths, as each is a program to compile
        nll_Bw, likeliest_Bw = self._rate(
            self.params["slow"], state._replace(prepared=None), np.pad(tokens_Bn, ((0, 0), (0, width - n)))
        )
        return np.asarray(nll_Bw)[:, :n], np.asarray(likeliest_Bw)[:, :n]

    def step(self, state: ReaderState, choose: Callable, *, learn: bool = True):
        """Decodes one token: predicts its logits, lets `choose` choose it, and reads it.

        Args:
          state: the state before it; it is not changed.
          choose: function from logits [B, V], float32, to tokens [B].
          learn: whether to take an inner step if the token completes a mini-batch.

        Returns:
          The state after the tokens, the tokens [B], and their NLL [B] in nats under the logits. It returns without
          waiting for the device, unless `choose` waits.
        """
        self.check_room(state, 1)
        b = self.mini_batch_size
        if state.prepared is None:
            state = state._replace(prepared=self._prepare(state.states))
        logits_BV, added = self._predict(self.params["slow"], state)
        token_B = jnp.asarray(choose(logits_BV), jnp.int32)
        # Where this token completes the mini-batch, its changes are not used: the whole mini-batch is run instead.
        changes, nll_B = self._append(state, added, logits_BV, token_B)
        if (state.position + 1) % b:
            after = state._replace(**changes, position=state.position + 1)
        else:
            part_Bb = jnp.zeros((len(token_B), b), jnp.int32).at[:, 0].set(token_B)
            after, _ = self._read_part(state, part_Bb, 1, learn)
        return after, token_B, nll_B

    def programs(self, state: ReaderState) -> dict[str, tuple[Callable, tuple]]:
        """The jitted functions that `read` and `step` run, each with arguments or their shapes, for benchmarks.

        "mini_batch" reads a full mini-batch and takes its inner step. "prepare" runs once for each mini-batch in which
        tokens are decoded, "predict" and "append" once for each of these tokens.
        """
        slow, unprepared = self.params["slow"], state._replace(prepared=None)
        state = state._replace(prepared=jax.eval_shape(self._prepare, state.states))
        logits_BV, added = jax.eval_shape(self._predict, slow, state)
        token_B = jax.ShapeDtypeStruct(logits_BV.shape[:1], jnp.int32)
        return {
            "mini_batch": (self._learn, (slow, self.with_room(unprepared), state.tokens)),
            "prepare": (self._prepare, (state.states,)),
            "predict": (self._predict, (slow, state)),
            "append": (self._append, (state, added, logits_BV, token_B)),
        }

    def _read_part(self, state: ReaderState, part_Bb, size: int, learn: bool):
        """Reads `size` tokens, the first of `part_Bb`; returns the state and the NLL [B, b] of the mini-batch.

        `size` is at most what the unfinished mini-batch lacks.
        """
        prepared, state = state.prepared, state._replace(prepared=None)
        if int(state.position) % self.mini_batch_size + size < self.mini_batch_size:
            changes, nll_Bb = self._extend(self.params["slow"], state, part_Bb, size)
            changes["prepared"] = prepared
        else:
            state = self.with_room(state)
            changes, nll_Bb = (self._learn if learn else self._finish)(self.params["slow"], state, part_Bb)
        return state._replace(**changes, position=state.position + size), nll_Bb

    def with_room(self, state: ReaderState) -> ReaderState:
        """The state with its States (KV caches) resized, where need be, to have room for the unfinished mini-batch."""
        room = self.room(int(state.position))
        if jax.tree.map(lambda a: a.shape, state.states) == self._shapes(room, len(state.tokens)):
            return state
        resize = jax.vmap(partial(self.model.resize, seq_len=room), in_axes=1, out_axes=1)
        return state._replace(states=resize(state.states))

    @lru_cache(maxsize=8)  # noqa: B019 (a reader lives as long as the program that reads)
    def _shapes(self, room: int, batch_size: int):
        """Shapes [L, B, ...] of the States of `batch_size` sequences with room for `room` tokens."""
        shapes = jax.eval_shape(lambda: self.model.empty(room))
        return jax.tree.map(lambda a: (a.shape[0], batch_size, *a.shape[1:]), shapes)

    def _check_tokens(self, tokens_Bn: np.ndarray) -> None:
        """Raises `UserError` where a token is not in the vocabulary."""
        if tokens_Bn.size and not 0 <= tokens_Bn.min() <= tokens_Bn.max() < self.config.model.vocab_size:
            raise UserError(
                f"tokens to read are from {tokens_Bn.min()} to {tokens_Bn.max()}, but they must be at least 0 and "
                f"below config.model.vocab_size {self.config.model.vocab_size}"
            )

    def check_room(self, state: ReaderState, n: int) -> None:
        """Raises `UserError` where a model with full attention has no room for `n` more tokens."""
        if self.grows and state.position + n > self.max_length:
            raise UserError(
                f"max_length is {self.max_length}, but {state.position} tokens were read and {n} more are to come: a "
                "model with full attention keeps them all, and needs a greater max_length from the start"
            )


# ------------------------------------------------------------------------------- the programs, for one sequence
# They return only the fields of the state that change, as jit would copy the others.


def _extend(graphdef, slow, state: ReaderState, part_b, size):
    """Runs the mini-batch with `size` more tokens, which do not complete it.

    Returns the changed fields of the state, and the NLL [b] of the mini-batch, of which `size` are new.
    """
    tokens_b1, count = _with_part(state, part_b), _count(state) + size
    model = merge(graphdef, state.fast, slow)
    nll_b, entries = _score(model, state, tokens_b1, count)
    return {"drafts": model.draft(state.states, len(part_b), entries, count), "tokens": tokens_b1[:-1]}, nll_b


def _finish(graphdef, slow, state: ReaderState, part_b):
    """Runs the whole mini-batch, completed by `part_b`, without an inner step.

    Returns the changed fields of the state, and the NLL [b] of the mini-batch.
    """
    tokens_b1 = _with_part(state, part_b)
    model = merge(graphdef, state.fast, slow)
    nll_b, entries = _score(model, state, tokens_b1)
    return _next_mini_batch(model, state, entries, tokens_b1), nll_b


def _rate(graphdef, slow, state: ReaderState, tokens_w):
    """NLL [w] of the first tokens of a mini-batch, which has none so far, and whether each is the likeliest."""
    model = merge(graphdef, state.fast, slow)
    inputs_w = jnp.concatenate([state.tokens[:1], tokens_w[:-1]])
    x_wD, _ = model.extend(model.embed(inputs_w), state.states, _context(state, inputs_w))
    return model.scores(x_wD, tokens_w)


def _learn(graphdef, config: Config, slow, state: ReaderState, part_b):
    """Runs the whole mini-batch, completed by `part_b`, and takes its inner step; returns as `_finish`."""
    model, tokens_b1 = merge(graphdef, state.fast, slow), _with_part(state, part_b)
    context = _context(state, tokens_b1[:-1])
    in_prefix, in_suffix = (
        {name: state.states[name] for name in stacks} for stacks in (model.prefix_stacks, model.suffix_stacks)
    )
    x_bD, entries = model.extend(model.embed(tokens_b1[:-1]), in_prefix, context)
    mini_batch = MiniBatch(x_bD, tokens_b1[1:], is_target(tokens_b1[1:], config.data.masked_id))
    suffix_def, fast, suffix_slow = split(model.make_suffix())

    def run(fast):
        suffix = merge(suffix_def, fast, suffix_slow)
        hidden_bD, entries, _ = suffix.extend(x_bD, in_suffix, context, make_pass=FirstOrderPass)
        return hidden_bD, entries

    gradient, head, suffix_entries = inner_gradient(run, fast, suffix_slow["head"], mini_batch, config.model.vocab_size)
    rate = config.inner.learning_rate * clip_scale(gradient, config.inner.clip_norm)
    next_fast, _ = take_step(config.inner, fast, gradient, rate)
    changes = _next_mini_batch(model, state, entries | suffix_entries, tokens_b1)
    return {"fast": next_fast, **changes}, head.nll_T


def _predict(graphdef, slow, state: ReaderState):
    """Runs the newest token: logits [V] of the next one, and what the newest adds to the Drafts (keys, values, ...)."""
    model, count = merge(graphdef, state.fast, slow), _count(state)
    newest = jax.lax.dynamic_slice_in_dim(state.tokens, count, 1)
    x_1D, added = model.decode(model.embed(newest), state.prepared, state.drafts, _context(state, newest, count))
    return model.logits(x_1D)[0], added


def _append(model, state: ReaderState, added: dict, logits_V, token):
    """Appends `token` to the unfinished mini-batch, from the results of `_predict`: changed fields, and its NLL."""
    count = _count(state)
    changes = {
        "drafts": model.append(state.drafts, added, count),
        "tokens": state.tokens.at[count + 1].set(token),
    }
    return changes, jax.nn.logsumexp(logits_V) - logits_V[token]


def _score(model: Transformer, state: ReaderState, tokens_b1, count=None):
    """NLL [b] of the targets `tokens_b1[1:]`, and the mixers' Entries of the inputs `tokens_b1[:-1]`.

    The first `count` inputs are tokens, the others padding (None = no padding); by causality no token's result depends
    on the padding.
    """
    tokens_b = tokens_b1[:-1]
    x_bD, entries = model.extend(model.embed(tokens_b), state.states, _context(state, tokens_b, count))
    return model.nll(x_bD, tokens_b1[1:]), entries


def _next_mini_batch(model: Transformer, state: ReaderState, entries: dict, tokens_b1) -> dict:
    """Changed fields of the state after a full mini-batch with these Entries and tokens [b + 1]."""
    states = model.advance(state.states, entries)
    return {
        "states": states,
        "drafts": model.draft(states, len(state.tokens)),
        "tokens": jnp.zeros_like(state.tokens).at[0].set(tokens_b1[-1]),
    }


def _context(state: ReaderState, tokens, count=None) -> Context:
    """Position of the unfinished mini-batch in its sequence, tokens, and the `count` of its positions that are some."""
    return Context(start=state.position - _count(state), count=count, tokens=tokens)


def _with_part(state: ReaderState, part_b):
    """The tokens [b + 1] of the unfinished mini-batch followed by those of `part_b`, and then zeros."""
    b = len(part_b)
    room = jnp.concatenate([state.tokens, jnp.zeros(b + 1, jnp.int32)])
    return jax.lax.dynamic_update_slice_in_dim(room, part_b, _count(state) + 1, axis=0)[: b + 1]


def _count(state: ReaderState):
    """Number of tokens of the unfinished mini-batch that were run; the newest one was not."""
    return state.position % state.tokens.shape[-1]
