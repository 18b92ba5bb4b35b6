"""Restores an item of a checkpoint, a tree of arrays, with given shapes and shardings."""

import contextlib
import gc
import sys

import jax
import orbax.checkpoint as ocp

from ttt_e2e.checkpoints.progress import DamagedError
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.model.parameters import parameter_name


def restore_item(step_directory, item: str, abstract, progress: dict):
    """Restores the arrays of an item, "params" or "optimizer", with the shapes, dtypes and shardings of `abstract`.

    Shapes are compared first: for a wrong one, Orbax would also print tracebacks from its other threads.

    Raises:
      DamagedError: the item differs from what was saved, or cannot be read.
      UserError: names or shapes differ from those of `abstract`, as `check_shapes` finds.
    """
    check_shapes(step_directory, item, abstract, progress)
    return restore_tree(step_directory / item, abstract)


def restore_tree(path, abstract):
    """Restores a tree of arrays, with the shapes, dtypes and shardings of `abstract`, whose shapes are those stored.

    Raises `DamagedError` if it cannot be read.
    """
    with _no_tracebacks_of_dropped_reads():
        try:
            return _checkpointer().restore(path, abstract)
        except Exception as error:  # a damaged file can raise anything
            reason = first_line(error)
        gc.collect()  # frees the dropped reads while their tracebacks are still suppressed
    raise DamagedError(f"checkpoint {path} is damaged: {reason}")


def check_shapes(step_directory, item: str, abstract, progress: dict) -> None:
    """Compares the names and shapes of an item with those of `abstract`.

    Raises:
      DamagedError: its names or shapes are not those that `progress` recorded when it was saved.
      UserError: a parameter is in only one of the two, or its shapes differ; the message names it and both shapes.
    """
    path = step_directory / item
    stored = stored_shapes(path)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    wanted = {parameter_name(key): tuple(leaf.shape) for key, leaf in leaves}
    recorded = progress.get("arrays", {}).items()
    saved = {name: tuple(shape) for name, (shape, _) in recorded if name.startswith(f"{item}.")}
    if wanted != stored and saved == {f"{item}.{name}": shape for name, shape in wanted.items()}:
        raise DamagedError(f"checkpoint {path} is damaged: its metadata is not what was saved")
    for name, shape in wanted.items():
        if name not in stored:
            raise UserError(f"parameter {name!r} is not in checkpoint {path}, but the config asks for it, {shape}")
        if stored[name] != shape:
            raise UserError(
                f"parameter {name!r} is {stored[name]} in checkpoint {path}, but the config makes it {shape}"
            )
    if extra := sorted(set(stored) - set(wanted)):
        raise UserError(f"checkpoint {path} has parameters that the config has no place for: {', '.join(extra)}")


def stored_shapes(path) -> dict:
    """{dotted name: shape} of the arrays of an item. Raises `DamagedError` if there is none, or it is damaged."""
    with _no_tracebacks_of_dropped_reads():
        try:
            metadata = _checkpointer().metadata(path).item_metadata
        except Exception as error:  # a damaged file can raise anything
            raise DamagedError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
        if metadata is None:
            gc.collect()
            raise DamagedError(f"checkpoint {path} cannot be read: it has no metadata, or damaged ones")
    leaves = jax.tree_util.tree_leaves_with_path(metadata.tree)
    return {parameter_name(key): tuple(leaf.shape) for key, leaf in leaves if hasattr(leaf, "shape")}


def _checkpointer() -> ocp.StandardCheckpointer:
    """An Orbax checkpointer that waits for no other process: one that raises for damaged files would never come."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(me, {me}, f"process-{me}")
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


@contextlib.contextmanager
def _no_tracebacks_of_dropped_reads():
    """Suppresses Python's tracebacks of the reads that Orbax drops when one array cannot be read."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before
