"""Checkpoints: a directory of steps, each with `params`, `optimizer` and `progress` (step, data position, digests).

Orbax writes a step under a temporary name and renames it when it is whole, so a step that is listed is complete. What
has happened to it since, the digests of `progress` tell.
"""

import contextlib
import gc
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.checkpoints.digests import digests
from ttt_e2e.cluster.distributed import any_process, barrier
from ttt_e2e.config import CheckpointConfig, Config, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.model.parameters import parameter_name

logger = logging.getLogger(__name__)

POSITION_UNITS = ("seq_len", "global_batch_size")
# Seconds before a save that failed is tried again; after as many failures and one more, it is reported.
RETRY_AFTER_SECONDS = (1.0, 10.0)


class DamagedError(UserError):
    """A checkpoint is not what was saved."""


class Checkpoints:
    """The checkpoints of a run, saved asynchronously. With many processes, each calls the same methods."""

    def __init__(self, directory, config: CheckpointConfig):
        self.directory = epath.Path(directory).resolve()
        self._config = config
        self._manager = self._open()
        self._failures = 0

    def latest_step(self) -> int | None:
        """Newest complete step, or None where there is none."""
        return self._manager.latest_step()

    def save(self, state, progress: dict) -> None:
        """Begins to save; returns once the state is copied and may be donated.

        Where the save before this one turns out to have failed, that is logged, and this one is to make up for it.

        Raises:
          UserError: so did the ones before, or this save could not begin (disk full, say). Steps saved earlier are
            whole.
        """
        self._note(self._manager.wait_until_finished, "the step before", is_finished=True)
        self._save(state, progress, wait=False)

    def save_and_wait(self, state, progress: dict) -> None:
        """Saves, and returns when all is on disk. Raises `UserError` as `save`, after several attempts."""
        self._note(self._manager.wait_until_finished, "the step before", is_finished=True)
        self._save(state, progress, wait=True)

    def wait(self) -> None:
        """Returns when the save under way is on disk. Raises `UserError` where it failed."""
        if reason := self._attempt(self._manager.wait_until_finished):
            raise self._error(reason)

    def restore(self, step: int, abstract_state):
        """(state, progress) of a step; `abstract_state` gives the shapes and the shardings to restore to.

        Raises:
          DamagedError: it is not what was saved, or cannot be read; in all processes alike.
          UserError: a parameter differs.
        """
        path = self.directory / str(step)
        reason = ""
        try:
            progress = load_progress(path)
            params = _restore(path / "params", abstract_state.params, progress, "params")
            optimizer = _restore(path / "optimizer", abstract_state.optimizer, progress, "optimizer")
        except DamagedError as error:
            reason = str(error)
        if any_process(bool(reason)):
            raise DamagedError(reason or f"checkpoint {path} cannot be read by another process")
        _check_digests(path, {"params": params, "optimizer": optimizer}, progress)
        scalar = jax.ShapeDtypeStruct((), abstract_state.step.dtype, sharding=abstract_state.step.sharding)
        restored = jax.device_put(jax.numpy.asarray(progress["step"], scalar.dtype), scalar.sharding)
        return type(abstract_state)(params, optimizer, restored), progress

    def restore_newest(self, abstract_state):
        """(state, progress) of the newest step that is not damaged, or None where there is no step.

        Damaged ones that are newer are renamed to `STEP.damaged`, and a line is logged for each.

        Raises:
          UserError: every step is damaged; then, none is renamed. Or as `restore`.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(read=True), reverse=True):
            try:
                restored = self.restore(step, abstract_state)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            for other, reason in damaged.items():
                logger.warning("%s: set aside as %s; going back to step %d", reason, self._set_aside(other), step)
            if damaged:
                barrier("damaged checkpoints are set aside")
                self._reopen()
            return restored
        if damaged:
            raise UserError(
                f"{damaged[max(damaged)]}; no other step of {self.directory} is whole: to begin anew, move it away"
            )
        return None

    def close(self) -> None:
        """Finishes a save under way and releases the manager's threads. Unlike the others, asks no other process."""
        if reason := _reason_of_failure(self._manager.close):
            raise self._error(reason)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep,
            keep_period=self._config.keep_every or None,
            cleanup_tmp_directories=True,
            # Made in the background, a directory that cannot be made leaves Orbax's other threads waiting for it.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            return ocp.CheckpointManager(self.directory, options=options)
        except ValueError as error:  # it reads when each step was saved
            reason = _first_line(error)
            raise UserError(
                f"{self.directory}: _CHECKPOINT_METADATA of a step is damaged ({reason}): remove it"
            ) from None

    def _reopen(self) -> None:
        """A manager that knows what is on disk now, and nothing of failures before."""
        _reason_of_failure(self._manager.close)
        self._manager = self._open()

    def _save(self, state, progress: dict, wait: bool) -> None:
        arrays = digests({"params": state.params, "optimizer": state.optimizer})
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "progress": ocp.args.JsonSave(seal(progress | {"arrays": arrays})),
        }
        step = progress["step"]

        def attempt():
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise ValueError(f"a step from {step} on is there already")
            if wait:
                self._manager.wait_until_finished()

        while not self._note(attempt, f"step {step}", is_finished=wait):
            time.sleep(RETRY_AFTER_SECONDS[self._failures - 1])

    def _note(self, action: Callable, what: str, is_finished: bool) -> bool:
        """Whether it worked. Raises `UserError` after too many failures with no save between them that was finished."""
        if not (reason := self._attempt(action)):
            self._failures = 0 if is_finished else self._failures
            return True
        self._failures += 1
        if self._failures > len(RETRY_AFTER_SECONDS):
            raise self._error(reason)
        logger.warning("could not save %s in %s (%s): to be tried again", what, self.directory, reason)
        self._reopen()
        return False

    def _attempt(self, action: Callable) -> str:
        """Why it failed, in any process; "" where it worked in all."""
        reason = _reason_of_failure(action)
        return (reason or "another process could not") if any_process(bool(reason)) else ""

    def _error(self, reason: str) -> UserError:
        kept = self._manager.all_steps(read=True)
        still = f"step {max(kept)} is whole" if kept else "there is none before it"
        return UserError(f"could not save a checkpoint in {self.directory} ({reason}); {still}")

    def _set_aside(self, step: int) -> epath.Path:
        path = self.directory / str(step)
        names = [f"{step}.damaged", *(f"{step}.damaged-{n}" for n in range(2, 1000))]
        target = next(self.directory / name for name in names if not (self.directory / name).exists())
        barrier(f"step {step} is to be set aside")  # all have chosen its name
        if jax.process_index() == 0:
            path.rename(target)
        return target


def _reason_of_failure(action: Callable) -> str:
    try:
        action()
    except (OSError, ValueError, RuntimeError) as error:
        return _first_line(error)
    return ""


def progress_of(step: int, next_batch: int, config: Config, **more) -> dict:
    """What a checkpoint records besides arrays: updates made, position in the data and in what units, the model.

    More that the training loop records: `data`, the token store's fingerprint; `owes_evaluation`, where the evaluation
    due at this step was not finished; `productive_seconds` of the steps up to this one.
    """
    units = {field: getattr(config.train, field) for field in POSITION_UNITS}
    return {"step": step, "next_batch": next_batch, **units, **more, "model": to_dict(config)["model"]}


def check_position(progress: dict, config: Config, fingerprint: str) -> None:
    """Raises `UserError` where the position in the data would mean another place under this config and token store."""
    if progress.get("data", fingerprint) != fingerprint:
        raise UserError(
            f"config.data.path is {config.data.path!r}, a token store with fingerprint {fingerprint}, but the run to "
            f"resume has read one with {progress['data']}: start a new run from it with config.train.init_from"
        )
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
    step = find_step(path)
    progress = load_progress(step) if (step / "progress").exists() else {}
    params = _restore(step / "params", abstract_params, progress, "params")
    _check_digests(step, {"params": params}, progress)
    return params


def check_params(path, abstract_params) -> None:
    """Raises `UserError` where `load_params` would for a missing checkpoint or a parameter that differs."""
    step = find_step(path)
    progress = load_progress(step) if (step / "progress").exists() else {}
    _check_shapes(step / "params", abstract_params, progress, "params")


def load_progress(step_directory) -> dict:
    """What `progress_of` recorded, and the digests. Raises `DamagedError` where it is missing or damaged."""
    path = epath.Path(step_directory) / "progress"
    alone = _this_process_alone()
    try:
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        progress = ocp.Checkpointer(handler, multiprocessing_options=alone).restore(path)
        is_whole = progress == seal(progress) or "digest" not in progress
    except Exception as error:  # of a damaged file, anything may come
        raise DamagedError(f"checkpoint {step_directory} is incomplete: {_first_line(error)}") from error
    if not is_whole or not isinstance(progress.get("step"), int):
        raise DamagedError(f"checkpoint {step_directory} is damaged: progress is not what was saved")
    return progress


def seal(progress: dict) -> dict:
    """The same with a digest of all else, as `digest`."""
    others = {name: value for name, value in progress.items() if name != "digest"}
    return others | {"digest": hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:16]}


def save_params(directory, params, progress: dict) -> epath.Path:
    """Writes a checkpoint of parameters alone, as step 0 of `directory`, for `--checkpoint` or `train.init_from`."""
    directory = epath.Path(directory).resolve()
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"output {directory} already exists and is not empty: remove it or choose another")
    with ocp.CheckpointManager(directory) as manager:
        progress = seal(progress | {"arrays": digests({"params": params})})
        items = {"params": ocp.args.StandardSave(params), "progress": ocp.args.JsonSave(progress)}
        manager.save(0, args=ocp.args.Composite(**items))
    return directory / "0"


def read_tree_metadata(path) -> dict:
    """{dotted name: shape} of the arrays of an Orbax item.

    Raises:
      DamagedError: there is no such item, or it is damaged.
    """
    try:
        checkpointer = ocp.StandardCheckpointer(multiprocessing_options=_this_process_alone())
        tree = checkpointer.metadata(epath.Path(path)).item_metadata.tree
    except Exception as error:  # of a damaged file, anything may come
        raise DamagedError(f"checkpoint {path} cannot be read: {_first_line(error)}") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {parameter_name(key): tuple(leaf.shape) for key, leaf in leaves if hasattr(leaf, "shape")}


def _restore(path, abstract, progress: dict, item: str):
    """Restores an item after comparing shapes (a restore with a wrong one spills tracebacks from other threads)."""
    _check_shapes(path, abstract, progress, item)
    with _no_tracebacks_of_dropped_reads():
        try:
            checkpointer = ocp.StandardCheckpointer(multiprocessing_options=_this_process_alone())
            return checkpointer.restore(epath.Path(path), abstract)
        except Exception as error:  # of a damaged file, anything may come
            reason = _first_line(error)
        gc.collect()
    raise DamagedError(f"checkpoint {path} is damaged: {reason}")


@contextlib.contextmanager
def _no_tracebacks_of_dropped_reads():
    """When one array cannot be read, Orbax drops the reads of the others, of which Python prints tracebacks."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _this_process_alone() -> ocp.options.MultiprocessingOptions:
    """Orbax's processes otherwise wait for each other: for ever, where one of them finds the files damaged."""
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(me, {me}, f"process-{me}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _check_digests(path, items: dict, progress: dict) -> None:
    """Raises `DamagedError` where arrays are not those that were saved; checkpoints of old have no digests."""
    recorded = progress.get("arrays", {})
    found = digests(items) if recorded else {}
    if wrong := [name for name, value in found.items() if recorded.get(name) != value]:
        raise DamagedError(f"checkpoint {path} is damaged: {wrong[0]} is not what was saved")


def _check_shapes(path, abstract, progress: dict, item: str) -> None:
    stored = read_tree_metadata(path)
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
