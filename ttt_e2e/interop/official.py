"""Converts checkpoints of the released TTT-E2E implementation to ours.

It stores the parameters of all blocks stacked on axis 0, the fast MLP and its two norms ("prime") stacked over the
suffix blocks only, and matrices as [in, out]. Ours differ in that prefix and suffix blocks are two stacks.
"""

import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.checkpoints.params import save_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.config import Config
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.model import abstract_model
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.paths import absolute

_BLOCKS = "language_model.model.h.blocks."
_FAST = "language_model.model.h.prime_storage."

# Path of a block parameter in our stacks -> its path in their stack of all blocks.
_BLOCK_NAMES = {
    **{f"attention.{name}": f"seq_modeling_block.{name}.weight" for name in ("wq", "wk", "wv", "wo")},
    **{f"attention.{name}.weight": f"seq_modeling_block.{name}.weight" for name in ("q_norm", "k_norm")},
    **{f"mlp.{name}": f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")},
    "attention_norm.weight": "seq_norm.weight",
    "attention_post_norm.weight": "seq_post_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp_post_norm.weight": "ffn_post_norm.weight",
}
# The same for parameters that only suffix blocks have.
_FAST_NAMES = {
    **{f"fast_mlp.{name}": f"feed_forward_prime.{name}.weight" for name in ("w1", "w2", "w3")},
    "fast_mlp_norm.weight": "ffn_prime_norm.weight",
    "fast_mlp_post_norm.weight": "ffn_prime_post_norm.weight",
}
_NAMES = {
    "embedding": "language_model.model.wte.weight",
    "final_norm.weight": "language_model.model.ln_f.weight",
    "head": "language_model.lm_head.weight",
}


def import_checkpoint(config: Config, checkpoint, output) -> epath.Path:
    """Converts a checkpoint of the released implementation, and saves it as step 0 of the directory `output`.

    Args:
      config: its section `model` determines the names and shapes of the parameters.
      checkpoint: directory of its checkpoint manager, of one step in it, or of that step's `model_weights`.
      output: directory to write, which must not exist yet or be empty.

    Returns:
      The step directory written.

    Raises:
      UserError: there is no such checkpoint, or a parameter is missing, has another shape or is not in the model.
    """
    path = _find_weights(checkpoint)
    try:
        tree = ocp.StandardCheckpointer().restore(path)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    official = {parameter_name(key): np.asarray(leaf) for key, leaf in leaves}
    params = from_official(official, abstract_model(config.model)[1])
    return save_params(output, params, progress_of(0, 0, config))


def from_official(official: dict[str, np.ndarray], like):
    """Rearranges official parameters into the structure of ours.

    Args:
      official: arrays by official path, e.g. "language_model.model.wte.weight".
      like: our parameters (any tree of nested dicts of them, such as {"fast": ..., "slow": ...}) or their shapes.

    Returns:
      A pytree of the structure and dtypes of `like`, of NumPy arrays.

    Raises:
      UserError: a parameter is missing, has another shape, is not in the model, or in no official one; the message
        names it and its shapes.
    """
    unused = set(official)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    depth = {stack: _stack_depth(leaves, stack) for stack in ("prefix", "suffix")}

    def rearranged(path, leaf):
        ours = _own_name(path)
        stack, _, name = ours.partition(".")
        rows, shape = slice(None), leaf.shape
        if ours not in _NAMES and (stack not in depth or name not in _FAST_NAMES | _BLOCK_NAMES):
            raise UserError(
                f"config.model makes a parameter {parameter_name(path)!r}, but the released implementation has none: "
                "all blocks of its models have the same attention, without biases, and nothing else beside the MLPs"
            )
        if ours in _NAMES:
            theirs = _NAMES[ours]
        elif name in _FAST_NAMES:
            theirs = _FAST + _FAST_NAMES[name]
        else:
            theirs = _BLOCKS + _BLOCK_NAMES[name]
            rows = slice(depth["prefix"]) if stack == "prefix" else slice(depth["prefix"], None)
            shape = (depth["prefix"] + depth["suffix"], *leaf.shape[1:])
        if theirs not in official:
            raise UserError(f"parameter {theirs!r} is not in the checkpoint, but config.model asks for it, {shape}")
        unused.discard(theirs)
        value = np.asarray(official[theirs])
        if value.shape != shape:
            raise UserError(
                f"parameter {theirs!r} is {value.shape} in the checkpoint, but config.model makes it {shape}"
            )
        return value[rows].astype(leaf.dtype)

    params = jax.tree_util.tree_map_with_path(rearranged, like)
    if unused:
        raise UserError(
            f"config.model has no place for these parameters of the checkpoint: {', '.join(sorted(unused))}"
        )
    return params


def _own_name(path) -> str:
    """Dotted path of one of our parameters, without a leading "fast" or "slow"."""
    return re.sub(r"^(fast|slow)\.", "", ".".join(key.key for key in path))


def _stack_depth(leaves, stack: str) -> int:
    """Number of blocks of a stack, "prefix" or "suffix"; 0 where there are none."""
    return max((leaf.shape[0] for path, leaf in leaves if _own_name(path).startswith(stack + ".")), default=0)


def _find_weights(checkpoint) -> epath.Path:
    """Directory of the parameters: the path itself, or those of its newest step. Raises `UserError` for none."""
    path = absolute(checkpoint)
    if path.is_dir():
        steps = [path / str(step) for step in reversed(saved_steps(path))]
        for candidate in (path, *(directory / "model_weights" for directory in (path, *steps))):
            if (candidate / "_METADATA").exists():
                return candidate
    raise UserError(f"checkpoint {path} holds no `model_weights` of the released implementation")
