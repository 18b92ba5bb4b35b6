"""Checkpoints: a directory of steps, each with `params`, `optimizer` and `progress` (step, data position, model).

Orbax writes a step under a temporary name and renames it when it is whole, so a step that is listed is complete.
"""

import dataclasses

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.config import CheckpointConfig, Config
from ttt_e2e.errors import UserError
from ttt_e2e.outer.sharding import parameter_name

POSITION_UNITS = ("seq_len", "global_batch_size")


class Checkpoints:
    """The checkpoints of a run, saved asynchronously."""

    def __init__(self, directory, config: CheckpointConfig):
        self.directory = epath.Path(directory).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, keep_period=config.keep_every or None)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Newest complete step, or None where there is none."""
        return self._manager.latest_step()

    def save(self, state, progress: dict) -> None:
        """Begins to save; returns once the state is copied and may be donated.

        Raises:
          UserError: this save could not begin, or the one before could not be finished (disk full, say). Steps saved
            earlier are whole.
        """
        step = int(state.step)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "progress": ocp.args.JsonSave(progress),
        }
        self._report_failure(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def wait(self) -> None:
        """Returns when the save under way is on disk. Raises `UserError` where it failed."""
        self._report_failure(self._manager.wait_until_finished)

    def restore(self, step: int, abstract_state):
        """(state, progress) of a step; `abstract_state` gives the shapes and the shardings to restore to."""
        path = self.directory / str(step)
        progress = load_progress(path)
        params = _restore(path / "params", abstract_state.params)
        optimizer = _restore(path / "optimizer", abstract_state.optimizer)
        scalar = jax.ShapeDtypeStruct((), abstract_state.step.dtype, sharding=abstract_state.step.sharding)
        restored = jax.device_put(jax.numpy.asarray(progress["step"], scalar.dtype), scalar.sharding)
        return type(abstract_state)(params, optimizer, restored), progress

    def close(self) -> None:
        """Finishes a save under way and releases the manager's threads."""
        self._report_failure(self._manager.close)

    def _report_failure(self, action) -> None:
        try:
            action()
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            kept = self._manager.all_steps(read=True)
            still = f"step {max(kept)} is whole" if kept else "there is none before it"
            raise UserError(f"could not save a checkpoint in {self.directory} ({reason}); {still}") from error


def progress_of(step: int, next_batch: int, config: Config, owes_evaluation: bool = False) -> dict:
    """What a checkpoint records besides arrays: updates made, position in the data and in what units, the model.

    `owes_evaluation` says that the evaluation due at this step was not finished.
    """
    units = {field: getattr(config.train, field) for field in POSITION_UNITS}
    owed = {"owes_evaluation": True} if owes_evaluation else {}
    return {"step": step, "next_batch": next_batch, **units, **owed, "model": dataclasses.asdict(config.model)}


def check_position(progress: dict, config: Config) -> None:
    """Raises `UserError` where the position in the data would mean another place under this config."""
    for field in POSITION_UNITS:
        ours, theirs = getattr(config.train, field), progress[field]
        if ours != theirs:
            raise UserError(
                f"config.train.{field} is {ours}, but the run to resume has {theirs}, by which its position in the "
                "data is counted: start a new run from it with config.train.init_from"
            )


def find_step(path) -> epath.Path:
    """The step directory that a user's path means: itself, the newest step below it, or below its `checkpoints`.

    Raises:
      UserError: there is no complete checkpoint.
    """
    path = epath.Path(path).resolve()
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / "params").is_dir():
        return path
    for directory in (path, path / "checkpoints"):
        if directory.is_dir():
            steps = [int(child.name) for child in directory.iterdir() if child.name.isdigit()]
            if steps:
                return directory / str(max(steps))
    raise UserError(f"checkpoint {path} holds no complete step: expected a directory with `params`, or of such ones")


def load_params(path, abstract_params):
    """Parameters of the checkpoint that `path` means, in the shapes and shardings of `abstract_params`.

    Raises:
      UserError: missing or damaged checkpoint, or a parameter that differs; the message names it and both shapes.
    """
    return _restore(find_step(path) / "params", abstract_params)


def check_params(path, abstract_params) -> None:
    """Raises `UserError` where `load_params` would for a missing checkpoint or a parameter that differs."""
    _check_shapes(find_step(path) / "params", abstract_params)


def load_progress(step_directory) -> dict:
    """What `progress_of` recorded. Raises `UserError` where it is missing or damaged."""
    path = epath.Path(step_directory) / "progress"
    try:
        return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {step_directory} is incomplete: {str(error).splitlines()[0]}") from error


def save_params(directory, params, progress: dict) -> epath.Path:
    """Writes a checkpoint of parameters alone, as step 0 of `directory`, for `--checkpoint` or `train.init_from`."""
    directory = epath.Path(directory).resolve()
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"output {directory} already exists and is not empty: remove it or choose another")
    with ocp.CheckpointManager(directory) as manager:
        items = {"params": ocp.args.StandardSave(params), "progress": ocp.args.JsonSave(progress)}
        manager.save(0, args=ocp.args.Composite(**items))
    return directory / "0"


def read_tree_metadata(path) -> dict:
    """{dotted name: shape} of the arrays of an Orbax item.

    Raises:
      UserError: there is no such item, or it is damaged.
    """
    try:
        tree = ocp.StandardCheckpointer().metadata(epath.Path(path)).item_metadata.tree
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameter_name(key): tuple(leaf.shape) for key, leaf in leaves if hasattr(leaf, "shape")}


def _restore(path, abstract):
    """Restores an item after comparing shapes (a restore with a wrong one spills tracebacks from other threads)."""
    _check_shapes(path, abstract)
    try:
        return ocp.StandardCheckpointer().restore(epath.Path(path), abstract)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged: {str(error).splitlines()[0]}") from error


def _check_shapes(path, abstract) -> None:
    stored = read_tree_metadata(path)
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    wanted = {parameter_name(key): tuple(leaf.shape) for key, leaf in leaves}
    for name, shape in wanted.items():
        if name not in stored:
            raise UserError(f"parameter {name!r} is not in checkpoint {path}, but the config asks for it, {shape}")
        if stored[name] != shape:
            raise UserError(
                f"parameter {name!r} is {stored[name]} in checkpoint {path}, but the config makes it {shape}"
            )
    if extra := sorted(set(stored) - set(wanted)):
        raise UserError(f"checkpoint {path} has parameters that the config has no place for: {', '.join(extra)}")
