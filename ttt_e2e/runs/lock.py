"""The lock of a run directory, `train.lock`: one run at a time trains in it. Process 0 holds it for all of its run.

The kernel ends a lock (`flock`) together with the process that holds it. But some file systems and all buckets have
none, and on others the machines do not see each other's. So the holder also writes into the file, every few seconds,
who it is and when (heartbeat). A file that another machine has filled counts as held until it has not changed for long.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import contextmanager

import jax
from etils import epath

from ttt_e2e.cluster.agreement import fail_together
from ttt_e2e.errors import JSON_ERRORS, UserError, first_line
from ttt_e2e.paths import in_bucket
from ttt_e2e.runs.files import replace_text
from ttt_e2e.strict_json import to_json

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 20.0  # without a heartbeat; less than collectives wait for process 0


def try_flock(file, *, shared: bool = False) -> bool | None:
    """Locks an open file, or its descriptor: True, or False if another process has; None where there are no locks."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP
        return None
    return True


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # the latter: a number that no process has
        return False
    except PermissionError:  # of another user
        return True
    return True


@contextmanager
def lock_run(workdir):
    """Keeps other runs from training in a run directory, which it makes, for the length of a `with` block.

    Every process of the run must call it, and waits for process 0.

    Raises:
      UserError: another run trains in it, or it cannot be written. All processes raise it.
    """
    with fail_together(UserError, f"{workdir}: process 0 could not lock it"):
        try:
            lock = _RunLock(epath.Path(workdir)) if jax.process_index() == 0 else None
        except OSError as error:
            raise UserError(f"workdir {workdir} cannot be written: {first_line(error)}") from None
    try:
        yield
    finally:
        if lock:
            lock.close()


class _RunLock:
    """The lock, and the thread that writes the heartbeat."""

    def __init__(self, workdir: epath.Path):
        """Takes the lock. Raises `UserError` if another process holds it."""
        self._path = workdir / "train.lock"
        self._name = uuid.uuid4().hex
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = -1 if in_bucket(workdir) else os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = None if in_bucket(workdir) else try_flock(self._file)
            if locked is False:
                raise self._refusal(self._read())
            self._has_lock = bool(locked)
            self._wait_for_silence()
            self._beat()
            self._check_that_it_is_ours()
        except BaseException:
            self._close_file()
            raise
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives the lock back. The file stays, and is empty: two processes could lock two files of one name."""
        self._closed.set()
        self._thread.join()
        try:
            if self._name in self._read():
                self._write("")
        except OSError as error:
            logger.warning("%s could not be emptied (%s)", self._path, first_line(error))
        self._close_file()

    def _wait_for_silence(self) -> None:
        """Returns when no other process beats. Raises `UserError` as soon as one does."""
        before = self._read()
        here = f'"host": {to_json(socket.gethostname())}'
        if not self._has_lock:
            logger.warning("%s: there are no locks here; a heartbeat in this file takes their place", self._path)
        if not before or (self._has_lock and here in before):
            return
        logger.warning("%s: %s trained here; waiting whether it still does", self._path.parent, _describe(before))
        deadline = time.monotonic() + DEAD_AFTER_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 2)
            if self._read() not in (before, ""):
                raise self._refusal(self._read())

    def _check_that_it_is_ours(self) -> None:
        """Raises `UserError` if another process took the lock at the same moment, where the kernel does not decide."""
        if not self._has_lock:
            time.sleep(BEAT_SECONDS)
            if self._name not in (now := self._read()):
                raise self._refusal(now)

    def _keep_beating(self) -> None:
        """Writes the heartbeat until the lock is closed. Ends the process if another one has taken the lock."""
        while not self._closed.wait(BEAT_SECONDS):
            try:
                now = self._read()
                if now and self._name not in now:
                    logger.error("%s: %s has taken over, as this run was silent", self._path.parent, _describe(now))
                    os._exit(1)  # it was stopped for long, and must not write any more
                self._beat()
            except Exception as error:  # a full disk, or what a bucket's client raises; the next beat may succeed
                logger.warning("%s cannot be written (%s)", self._path, first_line(error))

    def _beat(self) -> None:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "name": self._name, "time": f"{time.time():.3f}"}
        self._write(to_json(who) + "\n")

    def _write(self, text: str) -> None:
        """Replaces the contents at once, so that no reader finds half of them; a file that is locked stays the same."""
        if self._has_lock:
            os.pwrite(self._file, text.encode(), 0)
            os.ftruncate(self._file, len(text.encode()))
        else:
            replace_text(self._path, text)

    def _read(self) -> str:
        return self._path.read_bytes().decode(errors="replace") if self._path.exists() else ""

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def _refusal(self, holder: str) -> UserError:
        workdir = self._path.parent
        return UserError(f"{workdir}: {_describe(holder)} trains in it: end that one first, or choose another workdir")


def _describe(holder: str) -> str:
    """Who has filled the file, as a text."""
    try:
        who = json.loads(holder)
        return f"process {who['pid']} on {who['host']}"
    except (*JSON_ERRORS, KeyError, TypeError):
        return "another process"
