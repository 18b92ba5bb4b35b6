"""Saved reader states: what a model learned from a document, for that model to go on from.

A directory with two items of Orbax: `state` (arrays) and `about` (JSON), which names the model. Orbax writes under a
temporary name and renames when all is written.

Shapes: `B` sequences, `L` blocks of a stack, `K` positions of a KV cache, `G` key/value heads, `H` head width.
"""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.checkpoints import older
from ttt_e2e.checkpoints.digests import digests
from ttt_e2e.config import each_field, from_config_dict, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.inference import older_state
from ttt_e2e.inference.reader import Reader, ReaderState
from ttt_e2e.model.parameters import parameter_name

PRECISIONS = ("float32", "bfloat16")


def save_state(path, reader: Reader, state: ReaderState, *, precision: str = "float32") -> None:
    """Writes a state into the new directory `path`.

    Args:
      path: must not exist.
      reader: whose state it is.
      state: of any number of sequences, within a mini-batch too.
      precision: "bfloat16" stores the difference of the fast weights from W_0, rounded to bfloat16: half the size.

    Raises:
      UserError: `path` exists, or cannot be written.
    """
    path = epath.Path(path).resolve()
    check_can_save(path, precision)
    tree = state._asdict()
    tree.pop("prepared")  # made again when it is wanted
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
    """The state that `save_state` wrote.

    Raises:
      UserError: there is no whole state, or it is of another model or mini-batch size, or, with full attention, longer
        than the reader's `max_length`.
    """
    path = epath.Path(path).resolve()
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
    """The saved arrays, in the containers of `like`, whose States may have had room for another number of tokens."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path / "state").item_metadata
            if stored is None:
                raise ValueError("its metadata cannot be read")
            leaves = jax.tree_util.tree_leaves_with_path(stored.tree)
            shapes = {parameter_name(key): leaf.shape for key, leaf in leaves}

            def wanted(key, leaf):
                name = parameter_name(key)
                dtype = jnp.bfloat16 if name.startswith("fast.") and precision == "bfloat16" else leaf.dtype
                return jax.ShapeDtypeStruct(shapes[name], dtype, sharding=device)

            return checkpointer.restore(path / "state", jax.tree_util.tree_map_with_path(wanted, like))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"state {path} is damaged: {str(error).splitlines()[0]}") from error


def check_can_save(path, precision: str) -> None:
    """Raises `UserError` where there is something at `path` already, or the precision is unknown."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, but it must be one of {', '.join(PRECISIONS)}")
    if epath.Path(path).exists():
        raise UserError(f"{path} already exists: remove it, or choose another directory to save the state in")


def read_about(path) -> dict:
    """What a saved state says of itself: its model, sizes and position. Raises `UserError` where there is none."""
    path = epath.Path(path)
    if not (path / "about").is_dir():
        raise UserError(f"{path} holds no saved state: expected a directory that --save_state wrote")
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.resolve() / "about")
    except (OSError, ValueError) as error:
        raise UserError(f"state {path} is damaged: {str(error).splitlines()[0]}") from error


def parameters_digest(params) -> str:
    """16 hex digits that identify parameters by their values; computed where they live, as they may be large."""
    sums = digests(params, spread=1)  # as in the states that were saved first
    identity = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), sums[parameter_name(path)][1])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()


def _check_model(path, about: dict, reader: Reader) -> None:
    saved = from_config_dict({"model": about["model"]})
    for (section, f, ours), (_, _, theirs) in zip(each_field(reader.config), each_field(saved), strict=True):
        if section.startswith("model") and f.name != "attention_backend" and theirs != ours:
            raise UserError(
                f"state {path} belongs to a model whose {section}.{f.name} is {theirs!r}; here it is {ours!r}"
            )
    # Of before mixers had their own stacks, there were digests of one stack.
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
