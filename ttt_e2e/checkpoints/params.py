"""Loads the parameters of any checkpoint, and saves checkpoints that hold nothing else."""

import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.checkpoints.digests import check_digests, digests
from ttt_e2e.checkpoints.manager import ASYNC, SAVE_FAILURES
from ttt_e2e.checkpoints.older import as_saved, as_wanted
from ttt_e2e.checkpoints.progress import load_progress, seal
from ttt_e2e.checkpoints.restore import check_shapes, restore_item
from ttt_e2e.checkpoints.steps import find_step
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.outputs import check_free
from ttt_e2e.paths import absolute


def load_params(path, abstract_params):
    """Loads the parameters of a checkpoint, with the shapes and shardings of `abstract_params`.

    path: a step directory, a directory of steps, or a run directory, as in `find_step`.

    Raises:
      UserError: the checkpoint is missing or damaged, or a parameter differs; the message names it and both shapes.
    """
    step, progress = _find(path)
    params = restore_item(step, "params", as_saved(step / "params", abstract_params), progress)
    check_digests(step, {"params": params}, progress)
    return as_wanted(params, abstract_params)


def check_params(path, abstract_params) -> None:
    """Checks that a checkpoint has these parameters, without reading arrays. Raises `UserError` as `load_params`."""
    step, progress = _find(path)
    check_shapes(step, "params", as_saved(step / "params", abstract_params), progress)


def save_params(directory, params, progress: dict) -> epath.Path:
    """Writes a checkpoint of parameters alone, as step 0 of `directory`, and returns the path of the step.

    Raises:
      UserError: the directory is not empty, or cannot be written.
    """
    directory = absolute(directory)
    check_free(directory)
    progress = seal(progress | {"arrays": digests({"params": params})})
    items = {"params": ocp.args.StandardSave(params), "progress": ocp.args.JsonSave(progress)}
    try:
        with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(async_options=ASYNC)) as manager:
            manager.save(0, args=ocp.args.Composite(**items))
    except SAVE_FAILURES as error:
        raise UserError(f"could not save a checkpoint in {directory} ({first_line(error)})") from error
    return directory / "0"


def _find(path) -> tuple[epath.Path, dict]:
    """(The step directory that `path` refers to, its record of progress: {} if it has none)."""
    step = find_step(path)
    return step, load_progress(step) if (step / "progress").exists() else {}
