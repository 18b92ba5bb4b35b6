"""Saves and restores reader states: fast weights, KV caches and other mixer States after some text was read.

A saved state is a directory with two Orbax items: `state` (arrays) and `about` (JSON), which identifies the model.
Orbax writes under a temporary name and renames it at the end, so that a state is whole or not there.

Shapes: `B` sequences, `L` blocks of a stack, `K` positions of a KV cache, `G` key/value heads, `H` head width.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.checkpoints import older
from ttt_e2e.checkpoints.digests import digests
from ttt_e2e.checkpoints.progress import DamagedError
from ttt_e2e.checkpoints.restore import restore_tree, stored_shapes
from ttt_e2e.checkpoints.steps import is_whole
from ttt_e2e.config import each_field, from_config_dict, to_dict
from ttt_e2e.errors import JSON_ERRORS, UserError, first_line
from ttt_e2e.inference import older_state
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.model.parameters import parameter_name
from ttt_e2e.paths import absolute
from ttt_e2e.strict_json import to_json

PRECISIONS = ("float32", "bfloat16")


def save_state(path, reader: Reader, state: ReaderState, *, precision: str = "float32") -> None:
    """Saves a reader's state in the new directory `path`.

    Args:
      path: directory to make; it must not exist.
      reader: the reader that made `state`.
      state: state of any number of sequences; its mini-batch may be unfinished.
      precision: "bfloat16" stores the difference of the fast weights from W_0, rounded to bfloat16: half the size.

    Raises:
      UserError: `path` exists, or cannot be written.
    """
    path = absolute(path)
    check_can_save(path, precision)
    tree = state._asdict()
    tree.pop("prepared")  # is computed from the States when decoding needs it
    about = {
        "model": to_dict(reader.config)["model"],
        "parameters": parameters_digest(reader.params),
        "mini_batch_size": reader.mini_batch_size,
        "batch_size": len(state.tokens),
        "position": int(tree.pop("position")),
        "precision": precision,
    }
    if precision == "bfloat16":
        tree["fast"] = jax.tree.map(lambda w, w_0: (w - w_0).astype(jnp.bfloat16), state.fast, reader.params["fast"])
    items = {"state": ocp.args.StandardSave(tree), "about": ocp.args.JsonSave(about)}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.Composite(**items))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"could not save a state in {path} ({str(error).splitlines()[0]})") from error


def load_state(path, reader: Reader) -> ReaderState:
    """Restores the state that `save_state` wrote, for this reader, on one device.

    Raises:
      UserError: the state is missing or damaged, was made by another model or mini-batch size, or, with full attention,
        has more tokens than the reader's `max_length`.
    """
    path = absolute(path)
    about = read_about(path)
    _check_model(path, about, reader)
    start = reader.start(0, about["batch_size"])._asdict()
    del start["position"], start["prepared"]
    is_older = "cache_size" in about
    tree = _restore(path, older_state.containers(start) if is_older else start, about["precision"])
    if about["precision"] == "bfloat16":
        tree["fast"] = jax.tree.map(
            lambda difference, w, w_0: (w_0 + difference.astype(w.dtype)).astype(w.dtype),
            tree["fast"],
            start["fast"],
            reader.params["fast"],
        )
    if is_older:
        tree = older_state.convert(tree, reader)
    return ReaderState(**tree, position=np.int64(about["position"]))


def _restore(path, like: dict, precision: str) -> dict:
    """Restores the saved arrays into the structure of `like`, in the shapes that are stored.

    These may differ from those of `like`: the saved States may have room for another number of tokens.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        shapes = stored_shapes(path / "state")

        def as_stored(key, leaf):
            name = parameter_name(key)
            dtype = jnp.bfloat16 if name.startswith("fast.") and precision == "bfloat16" else leaf.dtype
            return jax.ShapeDtypeStruct(shapes[name], dtype, sharding=device)

        return restore_tree(path / "state", jax.tree_util.tree_map_with_path(as_stored, like))
    except (KeyError, DamagedError) as error:
        raise UserError(f"state {path} is damaged: {first_line(error)}") from error


def check_can_save(path, precision: str) -> None:
    """Raises `UserError` where `path` exists already, or the precision is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, but it must be one of {', '.join(PRECISIONS)}")
    if epath.Path(path).exists():
        raise UserError(f"{path} already exists: remove it, or choose another directory to save the state in")


def read_about(path) -> dict:
    """Reads the item `about` of a saved state: model, parameters' digest, sizes, precision and position.

    Raises `UserError` where there is no saved state, or it is damaged.
    """
    path = epath.Path(path)
    if not ((path / "about").is_dir() and is_whole(path)):
        raise UserError(f"{path} holds no saved state: expected a directory that --save_state wrote")
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(absolute(path) / "about")
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"state {path} is damaged: {str(error).splitlines()[0]}") from error


def parameters_digest(params) -> str:
    """Digest, 16 hex digits, of the names, shapes, dtypes and values of parameters; computed on their devices."""
    sums = digests(params, spread=1)  # 1, as for all states that are stored
    identity = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), sums[parameter_name(path)][1])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return hashlib.blake2b(to_json(identity).encode(), digest_size=8).hexdigest()


def _check_model(path, about: dict, reader: Reader) -> None:
    """Raises `UserError` unless the saved state's model, parameters, mini-batch size and length fit the reader."""
    saved = from_config_dict({"model": about["model"]})
    for (section, f, ours), (_, _, theirs) in zip(each_field(reader.config), each_field(saved), strict=True):
        if section.startswith("model") and f.name != "attention_backend" and theirs != ours:
            raise UserError(
                f"state {path} belongs to a model whose {section}.{f.name} is {theirs!r}; here it is {ours!r}"
            )
    # In the older format the digest is of the blocks of all mixers in one stack.
    params = older.one_stack(reader.params, older.interleave) if "cache_size" in about else reader.params
    if (digest := parameters_digest(params)) != about["parameters"]:
        raise UserError(
            f"state {path} belongs to parameters {about['parameters']}; these are {digest}: "
            "load it with the checkpoint that it was made with"
        )
    if (theirs := about["mini_batch_size"]) != reader.mini_batch_size:
        raise UserError(
            f"state {path} was made with config.inner.mini_batch_size {theirs}; here it is {reader.mini_batch_size}"
        )
    if reader.grows and (length := about["position"]) > reader.max_length:
        raise UserError(f"state {path} has {length} tokens; max_length is {reader.max_length}, but must not be less")
