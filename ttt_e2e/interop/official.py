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
from ttt_e2e.config import Config, ModelConfig
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.interop.rules import Rule, sources_of, tensor_shapes, unknown
from ttt_e2e.model import abstract_model
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.outputs import check_free, new_directory
from ttt_e2e.paths import absolute

_BLOCKS = "language_model.model.h.blocks."
_FAST = "language_model.model.h.prime_storage."
RULES = (
    Rule("embedding", "language_model.model.wte.weight"),
    Rule("final_norm.weight", "language_model.model.ln_f.weight"),
    Rule("head", "language_model.lm_head.weight"),
    *(Rule(f"attention.{name}", f"{_BLOCKS}seq_modeling_block.{name}.weight") for name in ("wq", "wk", "wv", "wo")),
    *(Rule(f"attention.{name}.weight", f"{_BLOCKS}seq_modeling_block.{name}.weight") for name in ("q_norm", "k_norm")),
    *(Rule(f"mlp.{name}", f"{_BLOCKS}feed_forward.{name}.weight") for name in ("w1", "w2", "w3")),
    Rule("attention_norm.weight", f"{_BLOCKS}seq_norm.weight"),
    Rule("attention_post_norm.weight", f"{_BLOCKS}seq_post_norm.weight"),
    Rule("mlp_norm.weight", f"{_BLOCKS}ffn_norm.weight"),
    Rule("mlp_post_norm.weight", f"{_BLOCKS}ffn_post_norm.weight"),
    *(Rule(f"fast_mlp.{name}", f"{_FAST}feed_forward_prime.{name}.weight") for name in ("w1", "w2", "w3")),
    Rule("fast_mlp_norm.weight", f"{_FAST}ffn_prime_norm.weight"),
    Rule("fast_mlp_post_norm.weight", f"{_FAST}ffn_prime_post_norm.weight"),
)


def import_checkpoint(config: Config, checkpoint, output) -> epath.Path:
    """Converts a checkpoint of the released implementation, and saves it as step 0 of the directory `output`.

    Args:
      config: its section `model` determines the names and shapes of the parameters.
      checkpoint: directory of its checkpoint manager, of one step in it, or of that step's `model_weights`.
      output: directory to write, which must not exist yet or be empty.

    Returns:
      The step directory written.

    Raises:
      UserError: there is no such checkpoint, or a parameter is missing, has another shape or is not in the model;
        `output` exists and is not empty, or cannot be written. Nothing is written then.
    """
    check_free(output)
    path = _find_weights(checkpoint)
    try:
        tree = ocp.StandardCheckpointer().restore(path)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    official = {parameter_name(key): np.asarray(leaf) for key, leaf in leaves}
    params = from_official(official, config.model)
    with new_directory(output) as new:
        save_params(new, params, progress_of(0, 0, config))
    return absolute(output) / "0"


def from_official(official: dict[str, np.ndarray], model: ModelConfig):
    """Rearranges official parameters, or a tree like them, into the parameters {"fast", "slow"} of ours.

    Args:
      official: arrays by official path, e.g. "language_model.model.wte.weight".
      model: determines the names, shapes and dtypes of ours.

    Returns:
      A pytree of NumPy arrays.

    Raises:
      UserError: a parameter is missing, has another shape, is not in the model, or in no official one; the message
        names it and its shapes.
    """
    sources = sources_of(model, RULES)
    for name in (*unknown(model, sources), *(name for name in sources if re.match(r"\w+\.(prefix|suffix)_", name))):
        raise UserError(
            f"config.model makes a parameter {name!r}, but the released implementation has none: "
            "all blocks of its models have the same attention, without biases, and nothing else beside the MLPs"
        )
    shapes = tensor_shapes(model, sources)
    for name, shape in shapes.items():
        if name not in official:
            raise UserError(f"parameter {name!r} is not in the checkpoint, but config.model asks for it, {shape}")
        if (found := np.shape(official[name])) != shape:
            raise UserError(f"parameter {name!r} is {found} in the checkpoint, but config.model makes it {shape}")
    if unused := sorted(official.keys() - shapes.keys()):
        raise UserError(f"config.model has no place for these parameters of the checkpoint: {', '.join(unused)}")

    def read(path, leaf):
        everything = (slice(None),) * leaf.ndim
        return sources[parameter_name(path)].read(lambda name, index: official[name][index], everything, leaf.dtype)

    return jax.tree_util.tree_map_with_path(read, abstract_model(model)[1])


def _find_weights(checkpoint) -> epath.Path:
    """Directory of the parameters: the path itself, or those of its newest step. Raises `UserError` for none."""
    path = absolute(checkpoint)
    if path.is_dir():
        steps = [path / str(step) for step in reversed(saved_steps(path))]
        for candidate in (path, *(directory / "model_weights" for directory in (path, *steps))):
            if (candidate / "_METADATA").exists():
                return candidate
    raise UserError(f"checkpoint {path} holds no `model_weights` of the released implementation")
