"""The language model: embedding, prefix blocks, suffix blocks, head.

Shapes: `T` positions, `b` inner mini-batch, `D` model width, `V` vocabulary, `L` blocks of a stack. Everything is
written for one sequence; callers batch it with `jax.vmap`.
"""

from functools import lru_cache

import jax.numpy as jnp
from flax import nnx

from ttt_e2e.model.block import Block
from ttt_e2e.model.loss import logits, token_nll
from ttt_e2e.model.mixers import Context
from ttt_e2e.model.norm import RMSNorm
from ttt_e2e.model.parameters import matrix, split
from ttt_e2e.model.passes import FirstOrderPass, Pass
from ttt_e2e.model.sequence_parts import SequenceParts
from ttt_e2e.model.stacks import Stacks, make_stacks, scan_blocks


class Transformer(Stacks):
    """A decoder whose last `num_fast_blocks` blocks (the suffix) carry fast MLPs; the others are the prefix."""

    def __init__(self, config, rngs: nnx.Rngs):
        self.config = config
        self.embedding = matrix(rngs, (config.vocab_size, config.hidden_size), config, ("vocabulary", "width"))
        stacks = {}
        for part, num_blocks in (("prefix", config.num_prefix_blocks), ("suffix", config.num_fast_blocks)):
            if num_blocks:
                stacks |= make_stacks(part, num_blocks, config, rngs, fast=part == "suffix")
        self._set_stacks(stacks)
        self.final_norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.head = matrix(rngs, (config.hidden_size, config.vocab_size), config, ("width", "vocabulary"))

    @property
    def prefix_stacks(self) -> dict[str, Block]:
        """The stacks of the prefix."""
        return {name: stack for name, stack in self.stacks.items() if not stack.fast}

    @property
    def suffix_stacks(self) -> dict[str, Block]:
        """The stacks of the suffix."""
        return {name: stack for name, stack in self.stacks.items() if stack.fast}

    def embed(self, tokens_T):
        """Token embeddings [T, D] in the compute dtype."""
        return self.embedding[...][tokens_T].astype(jnp.dtype(self.config.compute_dtype))

    def run_prefix(
        self, x_TD, *, remat: bool = True, fetch=lambda name, state: state, parts: SequenceParts | None = None
    ):
        """All prefix blocks over a whole sequence [T, D] in parallel; may be differentiated once.

        Args:
          x_TD: hidden states of the sequence, or of one device's part of it.
          remat: whether each block is rematerialised in the backward pass.
          fetch: as of `scan_blocks`.
          parts: where x_TD is a part of the sequence: how that is divided.
        """
        context = Context(parts=parts)

        def run_block(block: Block, x_TD):
            return block.whole(x_TD, FirstOrderPass(), context), None

        if not self.prefix_stacks:
            return x_TD
        return scan_blocks(self.prefix_stacks, run_block, x_TD, remat=remat, fetch=fetch)[0]

    def extend(self, x_bD, states: dict, context: Context):
        """Blocks over a mini-batch that follows the States of their mixers; may be differentiated once.

        Args:
          x_bD: hidden states.
          states: of the stacks to run.
          context: where the mini-batch stands.

        Returns:
          Hidden states [b, D], and the Entries of the same stacks.
        """

        def run_block(block: Block, x_bD, state):
            return block.extend(x_bD, FirstOrderPass(), state, context)

        return self._run_parts(run_block, x_bD, {name: (state,) for name, state in states.items()})

    def decode(self, x_1D, prepared: dict, drafts: dict, context: Context):
        """All blocks over the next token of an unfinished mini-batch.

        Args:
          x_1D: hidden states.
          prepared: what `prepare` made of the States.
          drafts: of the tokens before it.
          context: where it stands.

        Returns:
          Hidden states [1, D], and what the token adds to the Drafts.
        """

        def run_block(block: Block, x_1D, prepared, draft):
            return block.decode(x_1D, FirstOrderPass(), prepared, draft, context)

        return self._run_parts(run_block, x_1D, {name: (prepared[name], drafts[name]) for name in self.stacks})

    def _run_parts(self, run_block, x_TD, of_blocks: dict):
        """The prefix, then the suffix, as far as `of_blocks` has their stacks; arguments as of `scan_blocks`."""
        outputs = {}
        for part in (self.prefix_stacks, self.suffix_stacks):
            if stacks := {name: stack for name, stack in part.items() if name in of_blocks}:
                x_TD, new = scan_blocks(stacks, run_block, x_TD, {name: of_blocks[name] for name in stacks})
                outputs |= new
        return x_TD, outputs

    def make_suffix(self) -> "Suffix":
        """The part of the model that reads mini-batch by mini-batch; it shares this model's weights."""
        return Suffix(
            self.config, self.suffix_stacks, self.final_norm, nnx.Param(self.head_DV, axes=("width", "vocabulary"))
        )

    def nll(self, x_TD, targets_T):
        """Negative log likelihood [T] of the targets, float32 nats, from the last block's hidden states."""
        return token_nll(self.final_norm(x_TD), self.head_DV, targets_T)

    def logits(self, x_TD):
        """Logits [T, V] of the next token, float32, from the last block's hidden states."""
        return logits(self.final_norm(x_TD), self.head_DV)

    @property
    def head_DV(self):
        """Matrix [D, V] that turns normed hidden states into logits: the head, or the embeddings transposed."""
        return self.embedding[...].T if self.config.tie_word_embeddings else self.head[...]


class Suffix(Stacks):
    """The suffix blocks, final norm and head: all that an inner step runs."""

    def __init__(self, config, stacks: dict[str, Block], final_norm: RMSNorm, head_DV: nnx.Param):
        self.config, self.final_norm, self.head = config, final_norm, head_DV
        self._set_stacks(stacks)

    def extend(self, x_bD, states: dict, context: Context, *, make_pass=Pass, recorded=None, remat=False, unroll=False):
        """All suffix blocks and the final norm over one mini-batch.

        Args:
          x_bD: the mini-batch's hidden states after the prefix.
          states: of the mixers.
          context: where the mini-batch stands.
          make_pass: what kind of pass this is: makes the `Pass` of each block, given what was recorded of it.
          recorded: {stack: results that a `Recording` pass recorded, with a leading axis L}, where there was one.
          remat: as of `scan_blocks`.
          unroll: as of `scan_blocks`.

        Returns:
          Normed hidden states [b, D], of a `DualPass` with their tangents [2, b, D]; the Entries of the mini-batch; and
          {stack: results that this pass recorded}.
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
        """Negative log likelihood [b] of the targets, float32 nats, from what `extend` returns."""
        return token_nll(x_bD, self.head[...], targets_b, self.config.vocab_size)

    @property
    def divides_fast(self) -> bool:
        """Whether the fast weights at hand are one device's part of them."""
        return any(stack.fast_mlp.is_divided for stack in self.stacks.values())


@lru_cache
def abstract_transformer(config) -> Transformer:
    """A `Transformer` of shapes: computes nothing, and answers what depends on sizes alone. Not to be changed."""
    return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))


def abstract_model(config):
    """(graphdef, params): a `Transformer`'s static structure and the shapes of {"fast", "slow"}."""
    graphdef, fast, slow = split(abstract_transformer(config))
    return graphdef, {"fast": fast, "slow": slow}
