"""The language model: embedding, prefix blocks, suffix blocks, head.

Shapes: `T` positions, `b` inner mini-batch, `K` cached positions, `D` model width, `V` vocabulary, `L` blocks of a
stack, `G` key/value heads, `H` head width. Everything is written for one sequence; callers batch it with `jax.vmap`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.attention import KeyValues, Unfinished
from ttt_e2e.model.block import Block
from ttt_e2e.model.loss import logits, token_nll
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import matrix, split
from ttt_e2e.model.passes import FirstOrderPass, Pass
from ttt_e2e.model.sequence_parts import SequenceParts


class Transformer(nnx.Module):
    """A decoder whose last `num_fast_blocks` blocks (the suffix) carry fast MLPs; the others are the prefix.

    The blocks of a stack live in one `Block` whose parameters have a leading axis over blocks, and run under
    `jax.lax.scan`: neither the program nor its compile time grows with depth.
    """

    def __init__(self, config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = matrix(rngs, (config.vocab_size, config.hidden_size), config)
        if config.num_prefix_blocks:
            self.prefix = _stack(config, rngs, config.num_prefix_blocks, fast=False)
        if config.num_fast_blocks:
            self.suffix = _stack(config, rngs, config.num_fast_blocks, fast=True)
        self.final_norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.head = matrix(rngs, (config.hidden_size, config.vocab_size), config)

    def embed(self, tokens_T):
        """Token embeddings [T, D] in the compute dtype."""
        return self.embedding[...][tokens_T].astype(jnp.dtype(self.config.compute_dtype))

    def run_prefix(self, x_TD, *, remat: bool = True, fetch=lambda state: state, parts: SequenceParts | None = None):
        """All prefix blocks over a whole sequence [T, D] in parallel; may be differentiated once.

        Args:
          x_TD: hidden states of the sequence, or of one device's part of it.
          remat: whether each block is rematerialised in the backward pass.
          fetch: the state of a block as it is stored -> as it is computed with; part of what is rematerialised.
          parts: where x_TD is a part of the sequence: how that is divided.
        """
        if not self.config.num_prefix_blocks:
            return x_TD
        options = {"remat": remat, "fetch": fetch, "parts": parts}
        return _scan_blocks(self.prefix, self.config.windows, FirstOrderPass, x_TD, {}, **options)[0]

    def run_cached(self, x_TD, caches: dict[str, KeyValues], num_empty):
        """Blocks over T positions that follow those of their window caches; may be differentiated once.

        Args:
          x_TD: hidden states.
          caches: for the stacks to run, which are "prefix" and "suffix", keys and values [L, K, G, H] of their blocks.
          num_empty: leading positions of the caches that hold nothing yet (may be traced).

        Returns:
          Hidden states [T, D], and of each stack the new keys and values [L, T, G, H].
        """
        new = {}
        for name, cache_LKGH in caches.items():
            stack, of_blocks = getattr(self, name), {"cache": cache_LKGH}
            x_TD, new[name], _ = _scan_blocks(
                stack, self.config.windows, FirstOrderPass, x_TD, of_blocks, remat=False, num_empty=num_empty
            )
        return x_TD, new

    def decode(self, x_1D, before: dict[str, Unfinished], num_empty, count):
        """As `run_cached`, for one position of an unfinished mini-batch; see `Attention.decode`.

        Args:
          x_1D: hidden states.
          before: of both stacks, as far as there are blocks in them, what precedes the position; leading axes L.
          num_empty: leading positions of the caches that hold nothing yet (may be traced).
          count: positions of the mini-batch before this one (may be traced).

        Returns:
          Hidden states [1, D], and of each stack the position's keys, rotated, and values [L, 1, G, H].
        """
        new = {}
        for name, before_L in before.items():
            stack, of_blocks = getattr(self, name), {"before": before_L}
            context = {"decode": True, "num_empty": num_empty, "count": count}
            x_1D, new[name], _ = _scan_blocks(
                stack, self.config.windows, FirstOrderPass, x_1D, of_blocks, remat=False, **context
            )
        return x_1D, new

    def make_suffix(self) -> "Suffix":
        """The part of the model that reads mini-batch by mini-batch; it shares this model's weights."""
        return Suffix(self.config, self.suffix, self.final_norm, nnx.Param(self.head_DV))

    def nll(self, x_TD, targets_T):
        """Negative log likelihood [T] of the targets, float32 nats, from the last block's hidden states."""
        return token_nll(self.final_norm(x_TD), self.head_DV, targets_T)

    def logits(self, x_TD):
        """What the next token is predicted from: [T, V], float32, from the last block's hidden states."""
        return logits(self.final_norm(x_TD), self.head_DV)

    @property
    def head_DV(self):
        """What logits are hidden states times: [D, V]."""
        return self.embedding[...].T if self.config.tie_word_embeddings else self.head[...]


class Suffix(nnx.Module):
    """The suffix blocks, final norm and head: all that an inner step runs."""

    def __init__(self, config, blocks: Block, final_norm: RMSNorm, head_DV: nnx.Param):
        self.config, self.blocks, self.final_norm, self.head = config, blocks, final_norm, head_DV

    def __call__(self, x_bD, cache_LKGH: KeyValues, num_empty, *, make_pass=Pass, known=(), remat=False, unroll=False):
        """All suffix blocks and the final norm over one mini-batch.

        Args:
          x_bD: the mini-batch's hidden states after the prefix.
          cache_LKGH: the window caches of the blocks.
          num_empty: leading positions of the caches that hold nothing yet (may be traced).
          make_pass: what kind of pass this is: makes the `Pass` of each block, from what is known of it.
          known: the results that a `Recording` pass kept, for a pass that takes them; its leaves begin with L.
          remat: whether each block is rematerialised in the backward pass.
          unroll: whether the program repeats the block's, and slices nothing out of stacked arrays. Not with `remat`:
            XLA would see that a block is computed twice, and keep what it has.

        Returns:
          Normed hidden states [b, D], of a `DualPass` with their tangents [2, b, D]; the mini-batch's own keys and
          values [L, b, G, H]; and the results that the pass kept.
        """
        compute = make_pass()
        x_bD = compute.begin(x_bD, in_scan=not unroll)
        x_bD, new, kept = _scan_blocks(
            self.blocks,
            self.config.windows,
            make_pass,
            x_bD,
            {"cache": cache_LKGH},
            known,
            remat=remat,
            unroll=unroll,
            num_empty=num_empty,
        )
        return compute.lift(self.final_norm, x_bD), new, kept

    def nll(self, x_bD, targets_b):
        """Negative log likelihood [b] of the targets, float32 nats, from what `__call__` returns."""
        return token_nll(x_bD, self.head[...], targets_b, self.config.vocab_size)

    @property
    def divides_fast(self) -> bool:
        """Whether the fast weights are one device's part of them."""
        return self.blocks.fast_mlp.is_divided

    def cache_size(self, seq_len: int) -> int:
        """K, the positions that the window caches must hold for a sequence of `seq_len` tokens."""
        return min(self.config.sliding_window, seq_len) if all(self.config.windows) else seq_len

    def empty_cache(self, size: int) -> KeyValues:
        """Keys and values [L, size, G, H] of nothing; G are the heads at hand."""
        config = self.config
        heads = self.blocks.attention.wk[...].shape[-1] // config.head_dim
        shape = (config.num_fast_blocks, size, heads, config.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
        return KeyValues(zeros, zeros)


def abstract_model(config):
    """(graphdef, params): a `Transformer`'s static structure and the shapes of {"fast", "slow"}; computes nothing."""
    graphdef, fast, slow = split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graphdef, {"fast": fast, "slow": slow}


def _stack(config, rngs: nnx.Rngs, num_blocks: int, *, fast: bool) -> Block:
    """`num_blocks` independently initialised blocks as one, every parameter with a leading axis over blocks."""

    def make(key):
        return Block(config, nnx.Rngs(params=key), fast=fast)

    keys = jax.random.split(rngs.params(), num_blocks)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(keys[0])))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(key)))(keys))


def _scan_blocks(
    stack: Block,
    windows,
    make_pass,
    x_TD,
    of_blocks: dict,
    known=(),
    *,
    remat: bool,
    unroll: bool = False,
    fetch=lambda state: state,
    **context,
):
    """Runs stacked blocks one after another; block i has window `windows[i % len(windows)]`.

    `of_blocks` and `context` are arguments of `Block`; arrays of the former have a leading axis over blocks. `fetch` is
    as of `run_prefix`.

    Returns the hidden states, the new keys and values [L, T, G, H] where there are caches, and what the passes kept.
    """
    graphdef, state = nnx.split(stack)

    def run_block(x_TD, state, of_block, known, window):
        compute = make_pass(known)
        block = nnx.merge(graphdef, fetch(state))
        x_TD, new_TGH = block(x_TD, compute, window=window, **of_block, **context)
        return x_TD, (new_TGH if of_block else None, compute.kept)

    if remat:
        run_block = jax.checkpoint(run_block, static_argnums=4, prevent_cse=False)

    def run_period(x_TD, period):
        outputs = []
        for block, window in zip(period, windows, strict=True):
            x_TD, output = run_block(x_TD, *block, window)
            outputs.append(output)
        return x_TD, outputs

    # An array for each block of a period, not a slice of one: what a scan is given as it is, its reverse does not copy.
    blocks = (state, of_blocks, known)
    periods = [jax.tree.map(lambda a, i=i: a[i :: len(windows)], blocks) for i in range(len(windows))]
    if unroll:
        outputs = []
        for i in range(len(jax.tree.leaves(state)[0]) // len(windows)):
            x_TD, output = run_period(x_TD, jax.tree.map(lambda a, i=i: a[i], periods))
            outputs += output
        return x_TD, *jax.tree.map(lambda *arrays: jnp.stack(arrays), *outputs)
    x_TD, outputs = jax.lax.scan(run_period, x_TD, periods)
    return x_TD, *jax.tree.map(lambda *arrays: jnp.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:]), *outputs)
