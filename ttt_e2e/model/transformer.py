"""The language model: embedding, prefix blocks, suffix blocks, head.

Shapes: `T` positions, `b` inner mini-batch, `D` model width, `V` vocabulary, `L` blocks of a stack. Everything is
written for one sequence; callers batch it with `jax.vmap`.
"""

import itertools
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.block import Block
from ttt_e2e.model.loss import logits, token_nll, token_scores
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import Traits, at_least_float32, list_traits, matrix, split
from ttt_e2e.model.passes import FirstOrderPass, Pass
from ttt_e2e.model.sequence_parts import SequenceParts
from ttt_e2e.model.stacks import Kind, Stacks, block_indices, make_stacks, scan_blocks


class Transformer(Stacks):
    """A decoder whose last `num_fast_blocks` blocks (the suffix) carry fast MLPs; the others are the prefix."""

    def __init__(self, config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = matrix(rngs, (config.vocab_size, config.hidden_size), config, ("vocabulary", "width"))
        stacks = {}
        mixers, with_engram = itertools.cycle(config.mixers), config.engram.block_indices
        kinds = [Kind(next(mixers), i if i in with_engram else None) for i in range(config.num_hidden_layers)]
        prefix, suffix = kinds[: config.num_prefix_blocks], kinds[config.num_prefix_blocks :]
        for part, of_part in (("prefix", prefix), ("suffix", suffix)):
            if of_part:
                stacks |= make_stacks(part, of_part, config, rngs, fast=part == "suffix")
        self._set_stacks(stacks)
        self.final_norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.head = matrix(rngs, (config.hidden_size, config.vocab_size), config, ("width", "vocabulary"))

    @property
    def prefix_stacks(self) -> dict[str, Block]:
        """The stacks of the prefix, {name: stack}."""
        return {name: stack for name, stack in self.stacks.items() if not stack.fast}

    @property
    def suffix_stacks(self) -> dict[str, Block]:
        """The stacks of the suffix, {name: stack}."""
        return {name: stack for name, stack in self.stacks.items() if stack.fast}

    @property
    def block_indices(self) -> dict[str, list[int]]:
        """The indices in the model of the blocks of each stack, {name of stack: indices}, as they run."""
        suffix = block_indices(self.suffix_stacks).items()
        after_prefix = {name: [self.config.num_prefix_blocks + i for i in indices] for name, indices in suffix}
        return block_indices(self.prefix_stacks) | after_prefix

    def embed(self, tokens_T):
        """Looks up the embeddings [T, D] of tokens [T], in the compute dtype."""
        return self.embedding[...][tokens_T].astype(jnp.dtype(self.config.compute_dtype))

    def run_prefix(
        self,
        x_TD,
        tokens_T=None,
        *,
        remat: bool = True,
        fetch=lambda name, state: state,
        parts: SequenceParts | None = None,
    ):
        """Runs all prefix blocks over a whole sequence, [T, D] to [T, D]; may be differentiated once.

        Args:
          x_TD: hidden states of the sequence, or of one device's part of it.
          tokens_T: its tokens; only Engram needs them.
          remat: whether each block is rematerialised in the backward pass.
          fetch: makes the weights of a block from those stored, as in `scan_blocks`.
          parts: how the sequence is divided, where x_TD is one device's part of it.
        """
        context = Context(parts=parts, tokens=tokens_T)

        def run_block(block: Block, x_TD):
            return block.whole(x_TD, FirstOrderPass(), context), None

        if not self.prefix_stacks:
            return x_TD
        return scan_blocks(self.prefix_stacks, run_block, x_TD, remat=remat, fetch=fetch)[0]

    def extend(self, x_bD, states: dict, context: Context):
        """Runs a mini-batch, given the States before it (prefill in pieces); may be differentiated once.

        Args:
          x_bD: hidden states.
          states: {stack: States}, of all stacks or of some; only these stacks are run.
          context: position of the mini-batch in the sequence, and its tokens.

        Returns:
          Hidden states [b, D], and the Entries of the stacks that ran.
        """

        def run_block(block: Block, x_bD, state):
            return block.extend(x_bD, FirstOrderPass(), state, context)

        return self._run_parts(run_block, x_bD, {name: (state,) for name, state in states.items()})

    def decode(self, x_1D, prepared: dict, drafts: dict, context: Context):
        """Runs all blocks over the next token of an unfinished mini-batch.

        Args:
          x_1D: its embedding.
          prepared: the States before the mini-batch, as `prepare` returns them.
          drafts: the Drafts after the tokens of the mini-batch that came before this one.
          context: `start` and `count` give the token's position, `tokens` the token itself.

        Returns:
          Hidden states [1, D], and for `append` what the token adds to the Drafts.
        """

        def run_block(block: Block, x_1D, prepared, draft):
            return block.decode(x_1D, FirstOrderPass(), prepared, draft, context)

        return self._run_parts(run_block, x_1D, {name: (prepared[name], drafts[name]) for name in self.stacks})

    def _run_parts(self, run_block, x_TD, of_blocks: dict):
        """Runs the prefix, then the suffix, without stacks that `of_blocks` lacks; arguments as in `scan_blocks`."""
        outputs = {}
        for part in (self.prefix_stacks, self.suffix_stacks):
            if stacks := {name: stack for name, stack in part.items() if name in of_blocks}:
                x_TD, new = scan_blocks(stacks, run_block, x_TD, {name: of_blocks[name] for name in stacks})
                outputs |= new
        return x_TD, outputs

    def make_suffix(self) -> "Suffix":
        """Makes the part of the model that reads mini-batch by mini-batch, with this model's weights."""
        return Suffix(
            self.config, self.suffix_stacks, self.final_norm, nnx.Param(self.head_DV, axes=("width", "vocabulary"))
        )

    def nll(self, x_TD, targets_T):
        """Computes the NLL [T] of the targets, float32 nats, from the last block's hidden states."""
        return token_nll(self.final_norm(x_TD), self.head_DV, targets_T)

    def scores(self, x_TD, targets_T):
        """Computes the NLL [T] of the targets as `nll` does, and whether each is the likeliest token [T]."""
        return token_scores(self.final_norm(x_TD), self.head_DV, targets_T)

    def logits(self, x_TD):
        """Computes the logits [T, V] of the next token, float32, from the last block's hidden states."""
        return logits(self.final_norm(x_TD), self.head_DV)

    @property
    def head_DV(self):
        """The matrix [D, V] from normed hidden states to logits: the head, or if tied the transposed embeddings."""
        return self.embedding[...].T if self.config.tie_word_embeddings else self.head[...]


class Suffix(Stacks):
    """Holds the suffix blocks, the final norm and the head: all that an inner step runs."""

    def __init__(self, config, stacks: dict[str, Block], final_norm: RMSNorm, head_DV: nnx.Param):
        self.config, self.final_norm, self.head = config, final_norm, head_DV
        self._set_stacks(stacks)

    def extend(self, x_bD, states: dict, context: Context, *, make_pass=Pass, recorded=None, remat=False, unroll=False):
        """Runs all suffix blocks and the final norm over one mini-batch.

        Args:
          x_bD: the mini-batch's hidden states after the prefix.
          states: the mixers' States before it.
          context: position of the mini-batch in the sequence.
          make_pass: kind of pass, a class of passes.py; each block gets one, given the results recorded for it.
          recorded: {stack: results with a leading axis L} of a `Recording` pass, which are not computed again.
          remat: whether each block is rematerialised, as in `scan_blocks`.
          unroll: whether the blocks are written out, as in `scan_blocks`.

        Returns:
          Normed hidden states [b, D] (of a `DualPass` [2, b, D]: values and tangents), the Entries of the mini-batch,
          and {stack: results that this pass recorded}.
        """

        def run_block(block: Block, x_bD, state, results):
            compute = make_pass(results)
            x_bD, entry = block.extend(x_bD, compute, state, context)
            return x_bD, (entry, compute.results)

        compute = make_pass()
        of_blocks = {name: (states[name], (recorded or {}).get(name, {})) for name in self.stacks}
        x_bD = compute.begin(x_bD, in_scan=not unroll)
        x_bD, outputs = scan_blocks(self.stacks, run_block, x_bD, of_blocks, remat=remat, unroll=unroll)
        entries, results = ({name: output[i] for name, output in outputs.items()} for i in (0, 1))
        return compute.apply(self.final_norm, x_bD), entries, results

    def nll(self, x_bD, targets_b):
        """Computes the NLL [b] of the targets, float32 nats, from the normed hidden states of `extend`."""
        return token_nll(x_bD, self.head[...], targets_b, self.config.vocab_size)

    @property
    def divides_fast(self) -> bool:
        """Whether the fast weights are one device's part of them (tensor parallelism)."""
        return any(stack.fast_mlp.is_divided for stack in self.stacks.values())


@lru_cache
def abstract_transformer(config) -> Transformer:
    """Makes a `Transformer` with shapes in place of arrays, for questions of size. It is cached: do not change it."""
    return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))


@lru_cache
def parameter_traits(config) -> dict[str, Traits]:
    """Lists {dotted name: traits} of all parameters of a model. It is cached: do not change it."""
    transformer = abstract_transformer(config)
    traits = list_traits(transformer)
    for stack_name, stack in transformer.stacks.items():
        for name in traits:
            if name.startswith(f"slow.{stack_name}.{stack.label}."):
                traits[name] = traits[name]._replace(num_heads=stack.mixer.num_heads)
    return traits


def state_bytes(config, seq_len: int) -> int:
    """Counts the bytes of what one sequence of `seq_len` tokens has read: the mixers' States and its fast weights."""
    transformer = abstract_transformer(config)
    states = jax.eval_shape(lambda: transformer.empty(seq_len))
    fast = (w.size * at_least_float32(w.dtype).itemsize for w in jax.tree.leaves(abstract_model(config)[1]["fast"]))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states)) + sum(fast)


def abstract_model(config):
    """Returns (graphdef, params): a `Transformer`'s static structure, and its weights' shapes {"fast", "slow"}."""
    graphdef, fast, slow = split(abstract_transformer(config))
    return graphdef, {"fast": fast, "slow": slow}
