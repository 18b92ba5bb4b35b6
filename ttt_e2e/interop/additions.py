"""What a model has beside one of Hugging Face: sinks of its windows, and fast MLPs.

An import adds them. An export puts them into a directory of their own beside the model's files, `ttt_e2e/`, from which
they are imported again: `config.json` has the fields of config.model and config.inner, `model.safetensors` the
parameters under our names.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ttt_e2e.config import Config, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.interop import safetensors_files
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.runs.files import read_json
from ttt_e2e.strict_json import to_json

DIRECTORY = "ttt_e2e"
FIELDS = ("num_fast_blocks", "fast_intermediate_size", "fast_layer_scale", "attention_sinks", "sliding_window", "mixer")
MINI_BATCHES = 16  # of a sequence, in the config of a model that gets fast MLPs
# Initial scale of the output of fast MLPs. Their last matrix is 0, so that they add nothing before an inner step; with
# this scale what they add after some is too little to see, as inner steps are smaller by it, too.
FAST_LAYER_SCALE = 1e-3


class Additions(NamedTuple):
    """What is added to an imported model for it to learn while it reads."""

    window: int = 0  # of the attention of all blocks; 0 = as it is
    attention_sinks: int = 0  # first positions that windows see, too
    num_fast_blocks: int = 0  # last blocks that get a fast MLP
    fast_intermediate_size: int = 0  # width of the fast MLPs; 0 = that of the others


NOTHING = Additions()


def add(config: ConfigDict, additions: Additions) -> None:
    """Sets the fields of an imported model's config that make the additions."""
    if additions.window:
        config.model.update(sliding_window=additions.window, mixer="")
    config.model.attention_sinks = additions.attention_sinks
    if additions.num_fast_blocks:
        config.model.num_fast_blocks = additions.num_fast_blocks
        config.model.fast_intermediate_size = additions.fast_intermediate_size or config.model.intermediate_size
        config.model.fast_layer_scale = FAST_LAYER_SCALE
        config.inner.mini_batch_size = max(1, config.train.seq_len // MINI_BATCHES)


def without(model: ModelConfig) -> ModelConfig:
    """The model without what is beside it. Windows with sinks become full attention, as they are nearest to that."""
    base = dataclasses.replace(model, num_fast_blocks=0, fast_layer_scale=0.0, attention_sinks=0)
    return dataclasses.replace(base, sliding_window=0, mixer="") if model.attention_sinks else base


def write(output: Path, config: Config, params: dict[str, jax.Array]) -> None:
    """Writes the directory beside an exported model. params: those that its own files do not have, by name."""
    directory = output / DIRECTORY
    directory.mkdir()
    tensors = {
        name: (leaf.shape, leaf.dtype, lambda leaf=leaf: np.ascontiguousarray(leaf)) for name, leaf in params.items()
    }
    safetensors_files.write(directory, dict(sorted(tensors.items())), {})
    fields = {
        "model": {name: getattr(config.model, name) for name in FIELDS},
        "inner": dataclasses.asdict(config.inner),
    }
    (directory / "config.json").write_text(to_json(fields, indent=2) + "\n")


def are_beside(checkpoint: Path) -> bool:
    """Whether a model directory is one that was exported with additions."""
    return (checkpoint / DIRECTORY).is_dir()


def read_fields(checkpoint: Path, config: ConfigDict, additions: Additions) -> None:
    """Sets the fields that were exported beside a model.

    Raises `UserError` if they are missing or damaged, or other additions are asked for.
    """
    path = checkpoint / DIRECTORY / "config.json"
    if asked := [name for name, value in additions._asdict().items() if value]:
        raise UserError(f"--{asked[0]} is {getattr(additions, asked[0])}, but {path} says what is added: leave it out")
    fields = read_json(path)
    try:
        config.model.update({name: fields["model"][name] for name in FIELDS})
        config.inner.update(fields["inner"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not have the fields of an exported model: {error}") from None


def read_params(checkpoint: Path, placed: dict) -> dict[str, jax.Array]:
    """Reads the parameters beside a model, each device its part.

    placed: {name: shape and sharding} of those that its own files do not have.

    Raises:
      UserError: they are not the same, in name or shape, or a file is damaged.
    """
    tensors = safetensors_files.Tensors(checkpoint / DIRECTORY)
    shapes = {name: leaf.shape for name, leaf in placed.items()}
    found = {name: tensors.shape(name) for name in tensors.names}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            here, there = (str(list(each[name])) if name in each else "absent" for each in (shapes, found))
            raise UserError(f"parameter {name!r} in {tensors.directory} is {there}, but in the model it is {here}")
    return {
        name: jax.make_array_from_callback(
            leaf.shape,
            leaf.sharding,
            lambda index, name=name, dtype=leaf.dtype: np.asarray(tensors.read(name, index), dtype),
        )
        for name, leaf in placed.items()
    }


def by_name(tree) -> dict:
    """The leaves of a tree of parameters, {name: leaf}."""
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
