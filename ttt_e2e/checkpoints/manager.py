"""The checkpoints of a run: a directory of steps, each with `params`, `optimizer` and `progress`.

Orbax writes a step under a temporary name and renames it when it is whole, so a step that is listed is complete. The
digests in `progress` reveal damage after that.
"""

import logging
import time
from contextlib import contextmanager, suppress

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_e2e.checkpoints.digests import check_digests, digests
from ttt_e2e.checkpoints.older import as_saved, as_wanted
from ttt_e2e.checkpoints.progress import DamagedError, load_progress, seal
from ttt_e2e.checkpoints.restore import restore_item
from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.cluster.agreement import barrier, fail_together
from ttt_e2e.config import CheckpointConfig
from ttt_e2e.errors import UserError, first_line
from ttt_e2e.paths import absolute

logger = logging.getLogger(__name__)

# Seconds to wait before each new attempt at a save that failed. If the last one fails, too, the run ends.
RETRY_AFTER_SECONDS = (1.0, 10.0)
# The exceptions that Orbax raises when a save fails.
SAVE_FAILURES = (OSError, ValueError, RuntimeError)
# If creating a directory fails in the background, Orbax's other threads wait for it for ever.
ASYNC = ocp.options.AsyncOptions(create_directories_asynchronously=False)


class _SaveError(Exception):
    """A save failed; its message is one line with the reason."""


class Checkpoints:
    """Saves, asynchronously, and restores the checkpoints of a run. All its processes must call the same methods."""

    def __init__(self, directory, config: CheckpointConfig):
        self.directory = absolute(directory)
        self._config = config
        self._manager = self._open()
        self._failures = 0  # in a row, since the last save that succeeded

    def save(self, state, progress: dict, *, wait: bool = False) -> None:
        """Begins to save a state and its progress; returns when the state is copied and its buffers may be donated.

        With `wait`, it returns when all is on disk. A save that cannot begin is tried again. If the previous save turns
        out to have failed, that is logged, and this save replaces it.

        Raises:
          UserError: too many saves in a row have failed, on a full disk, for example. Earlier steps are intact.
        """
        step = progress["step"]
        try:
            self._finish()
        except _SaveError as failure:
            self._give_up_or_reopen("the step before", failure)
        arrays = digests({"params": state.params, "optimizer": state.optimizer})
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            progress=ocp.args.JsonSave(seal(progress | {"arrays": arrays})),
        )
        while True:
            try:
                self._begin(step, items)
                if wait:
                    self._finish()
                return
            except _SaveError as failure:
                self._give_up_or_reopen(f"step {step}", failure)
                time.sleep(RETRY_AFTER_SECONDS[self._failures - 1])

    def wait(self) -> None:
        """Returns when the save under way is on disk. Raises `UserError` if it failed."""
        try:
            self._finish()
        except _SaveError as failure:
            raise self._error(failure) from failure

    def restore(self, step: int, abstract_state):
        """Restores (state, progress) of a step, with the shapes and shardings of `abstract_state`.

        Raises:
          DamagedError: the step differs from what was saved, or cannot be read. All processes raise it.
          UserError: a parameter has another shape than in `abstract_state`, or only one of the two has it.
        """
        path = self.directory / str(step)
        with fail_together(DamagedError, f"checkpoint {path} cannot be read by another process"):
            progress = load_progress(path)
            params, optimizer = (
                restore_item(path, item, as_saved(path / item, getattr(abstract_state, item)), progress)
                for item in ("params", "optimizer")
            )
        check_digests(path, {"params": params, "optimizer": optimizer}, progress)
        params, optimizer = as_wanted((params, optimizer), (abstract_state.params, abstract_state.optimizer))
        scalar = abstract_state.step
        step_array = jax.device_put(jax.numpy.asarray(progress["step"], scalar.dtype), scalar.sharding)
        return type(abstract_state)(params, optimizer, step_array), progress

    def restore_newest(self, abstract_state):
        """Restores (state, progress) of the newest undamaged step; None if there is no step.

        Newer steps, which are damaged, are renamed to `STEP.damaged`, with a line in the log for each.

        Raises:
          UserError: every step is damaged, and then none is renamed; or a parameter differs, as in `restore`.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(saved_steps(self.directory)):
            try:
                restored = self.restore(step, abstract_state)
            except DamagedError as error:
                damaged[step] = error
                continue
            for other, error in damaged.items():
                logger.warning("%s: set aside as %s; going back to step %d", error, self._set_aside(other), step)
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
        """Finishes a save under way and ends the manager's threads. The only method that waits for no other process.

        Raises:
          UserError: the save failed.
        """
        try:
            self._manager.close()
        except SAVE_FAILURES as error:
            raise self._error(first_line(error)) from error

    def _open(self) -> ocp.CheckpointManager:
        """A new Orbax manager of the directory. Raises `UserError` if a step's metadata is damaged."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep,
            keep_period=self._config.keep_every or None,
            cleanup_tmp_directories=True,
            async_options=ASYNC,
        )
        try:
            return ocp.CheckpointManager(self.directory, options=options)
        except ValueError as error:  # the manager reads from this file when each step was saved
            raise UserError(
                f"{self.directory}: _CHECKPOINT_METADATA of a step is damaged ({first_line(error)}): remove it"
            ) from None

    def _reopen(self) -> None:
        """Replaces the manager by a new one, which reads the directory again and has no earlier failure to report."""
        with suppress(*SAVE_FAILURES):
            self._manager.close()
        self._manager = self._open()

    def _begin(self, step: int, items) -> None:
        """Begins to save a step. Raises `_SaveError` in all processes if it fails in one."""
        with _save_errors_of_all():
            if not self._manager.save(step, args=items):
                raise ValueError(f"a step from {step} on is there already")

    def _finish(self) -> None:
        """Waits for a save under way. Raises `_SaveError` in all processes if it failed in one."""
        with _save_errors_of_all():
            self._manager.wait_until_finished()
        self._failures = 0

    def _give_up_or_reopen(self, what: str, failure: _SaveError) -> None:
        """Raises `UserError` after too many failures in a row; otherwise logs this one and reopens the manager."""
        self._failures += 1
        if self._failures > len(RETRY_AFTER_SECONDS):
            raise self._error(failure) from failure
        logger.warning("could not save %s in %s (%s): to be tried again", what, self.directory, failure)
        self._reopen()

    def _error(self, reason) -> UserError:
        """The error for a save that failed for good, naming the newest step that is intact."""
        steps = saved_steps(self.directory)
        still = f"step {steps[-1]} is whole" if steps else "there is none before it"
        return UserError(f"could not save a checkpoint in {self.directory} ({reason}); {still}")

    def _set_aside(self, step: int) -> epath.Path:
        """Renames a damaged step's directory and returns its new path. Every process must call it."""
        path = self.directory / str(step)
        names = [f"{step}.damaged", *(f"{step}.damaged-{n}" for n in range(2, 1000))]
        target = next(self.directory / name for name in names if not (self.directory / name).exists())
        barrier(f"step {step} is to be set aside")  # all have chosen its name
        if jax.process_index() == 0:
            path.rename(target)
        return target


@contextmanager
def _save_errors_of_all():
    """Runs a `with` block that saves; if it fails in any process, every process raises `_SaveError`."""
    with fail_together(_SaveError, "another process could not"):
        try:
            yield
        except SAVE_FAILURES as error:
            raise _SaveError(first_line(error)) from error
