"""The checkpoints of a run: a directory of steps, each with `params`, `optimizer` and `progress`.

Orbax writes a step under a temporary name and renames it when it is whole, so a step that is listed is complete. What
has happened to it since, the digests of `progress` tell.
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

logger = logging.getLogger(__name__)

# Seconds before a save that failed is tried again; after as many failures and one more, it is reported.
RETRY_AFTER_SECONDS = (1.0, 10.0)
# What Orbax raises where a save fails.
SAVE_FAILURES = (OSError, ValueError, RuntimeError)


class _SaveError(Exception):
    """A save failed; the text is one line that says why."""


class Checkpoints:
    """The checkpoints of a run, saved asynchronously. With many processes, each calls the same methods."""

    def __init__(self, directory, config: CheckpointConfig):
        self.directory = epath.Path(directory).resolve()
        self._config = config
        self._manager = self._open()
        self._failures = 0  # since a save was last finished

    def save(self, state, progress: dict, *, wait: bool = False) -> None:
        """Begins to save; returns once the state is copied and may be donated, or with `wait` when all is on disk.

        A save that cannot begin is tried again. Where the one before turns out to have failed, that is logged, and this
        one is to make up for it.

        Raises:
          UserError: it failed, and so did those before (disk full, say). Steps saved earlier are whole.
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
        """Returns when the save under way is on disk. Raises `UserError` where it failed."""
        try:
            self._finish()
        except _SaveError as failure:
            raise self._error(failure) from failure

    def restore(self, step: int, abstract_state):
        """(state, progress) of a step; `abstract_state` gives the shapes and the shardings to restore to.

        Raises:
          DamagedError: it is not what was saved, or cannot be read; in all processes alike.
          UserError: a parameter differs.
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
        restored = jax.device_put(jax.numpy.asarray(progress["step"], scalar.dtype), scalar.sharding)
        return type(abstract_state)(params, optimizer, restored), progress

    def restore_newest(self, abstract_state):
        """(state, progress) of the newest step that is not damaged, or None where there is no step.

        Damaged ones that are newer are renamed to `STEP.damaged`, and a line is logged for each.

        Raises:
          UserError: every step is damaged; then, none is renamed. Or as `restore`.
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
        """Finishes a save under way and releases the manager's threads. Unlike the others, asks no other process."""
        try:
            self._manager.close()
        except SAVE_FAILURES as error:
            raise self._error(first_line(error)) from error

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
            raise UserError(
                f"{self.directory}: _CHECKPOINT_METADATA of a step is damaged ({first_line(error)}): remove it"
            ) from None

    def _reopen(self) -> None:
        """A manager that knows what is on disk now, and nothing of failures before."""
        with suppress(*SAVE_FAILURES):
            self._manager.close()
        self._manager = self._open()

    def _begin(self, step: int, items) -> None:
        """Begins to save. Raises `_SaveError` in all processes where it fails in one."""
        with _save_errors_of_all():
            if not self._manager.save(step, args=items):
                raise ValueError(f"a step from {step} on is there already")

    def _finish(self) -> None:
        """Waits for a save under way. Raises `_SaveError` in all processes where it failed in one."""
        with _save_errors_of_all():
            self._manager.wait_until_finished()
        self._failures = 0

    def _give_up_or_reopen(self, what: str, failure: _SaveError) -> None:
        """Raises `UserError` after too many failures; otherwise makes ready for the next attempt."""
        self._failures += 1
        if self._failures > len(RETRY_AFTER_SECONDS):
            raise self._error(failure) from failure
        logger.warning("could not save %s in %s (%s): to be tried again", what, self.directory, failure)
        self._reopen()

    def _error(self, reason) -> UserError:
        steps = saved_steps(self.directory)
        still = f"step {steps[-1]} is whole" if steps else "there is none before it"
        return UserError(f"could not save a checkpoint in {self.directory} ({reason}); {still}")

    def _set_aside(self, step: int) -> epath.Path:
        path = self.directory / str(step)
        names = [f"{step}.damaged", *(f"{step}.damaged-{n}" for n in range(2, 1000))]
        target = next(self.directory / name for name in names if not (self.directory / name).exists())
        barrier(f"step {step} is to be set aside")  # all have chosen its name
        if jax.process_index() == 0:
            path.rename(target)
        return target


@contextmanager
def _save_errors_of_all():
    """A block whose failure to save, in any process, is a `_SaveError` in every one."""
    with fail_together(_SaveError, "another process could not"):
        try:
            yield
        except SAVE_FAILURES as error:
            raise _SaveError(first_line(error)) from error
