"""One run at a time trains in a run directory, whatever its file system knows of locks; the second changes nothing."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.tiny_run import tiny_run
from ttt_e2e.errors import UserError
from ttt_e2e.runs import lock
from ttt_e2e.runs.lock import lock_run
from ttt_e2e.train import loop


def no_locks(monkeypatch, number: int) -> None:
    """A file system that answers so."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "DEAD_AFTER_SECONDS", 3.0)


@pytest.fixture(params=("locks", errno.ENOSYS, errno.ENOLCK))
def file_system(request, monkeypatch, short):
    if request.param != "locks":
        no_locks(monkeypatch, request.param)
    return request.param


def test_the_second_is_refused_while_the_first_lives_and_then_is_not(file_system, tmp_path):
    with lock_run(tmp_path / "run"):
        for _ in range(2):  # a refused one must not take it away either
            with (
                pytest.raises(UserError, match=f"run: process {os.getpid()} on .* trains in it: end that"),
                lock_run(tmp_path / "run"),
            ):
                pass
        time.sleep(0.3)
    assert (tmp_path / "run" / "train.lock").read_text() == ""
    start = time.monotonic()
    with lock_run(tmp_path / "run"):
        assert time.monotonic() - start < 2.5  # what was given back is not waited for


HOLDER = """
import errno, fcntl, os, sys, time
from ttt_e2e.runs import lock
lock.BEAT_SECONDS = 0.1
if sys.argv[2] != "locks":
    def flock(*_):
        raise OSError(int(sys.argv[2]), "no locks")
    fcntl.flock = flock
with lock.lock_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_that_of_a_killed_process_is_taken(file_system, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path, str(file_system)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on"), lock_run(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock_run(tmp_path):
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()


def test_one_that_was_frozen_until_another_took_over_ends(tmp_path, short, monkeypatch):
    no_locks(monkeypatch, errno.ENOSYS)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path, str(errno.ENOSYS)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)
        with lock_run(tmp_path):
            holder.send_signal(signal.SIGCONT)
            assert holder.wait(60) == 1
            time.sleep(0.3)
            assert json.loads((tmp_path / "train.lock").read_text())["pid"] == os.getpid()
    finally:
        holder.kill()


@pytest.mark.parametrize("beats", (False, True))
def test_a_lock_that_another_machine_does_not_see_is_seen_by_its_heartbeat(beats, tmp_path, short, caplog):
    """Some file systems lock on each machine by itself: the kernel then gives the lock."""
    path = tmp_path / "train.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "name": "x", "time": "1"}))
    if beats:
        read, numbers = lock._RunLock._read, iter(range(10**6))
        lock_read = lambda self: read(self) and f"{read(self)} {next(numbers)}"  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lock._RunLock, "_read", lock_read)
            with pytest.raises(UserError, match="trains in it"), lock_run(tmp_path):
                pass
        assert "elsewhere" in path.read_text()
    else:
        with lock_run(tmp_path):
            assert json.loads(path.read_text())["host"] == socket.gethostname()
        assert "process 7 on elsewhere trained here" in caplog.text


@pytest.mark.parametrize("contents", (b"", b"not JSON", b"\xff\xfe", b"[1]", b'{"pid": 1}'))
def test_whatever_the_file_holds_it_can_be_taken(contents, tmp_path, short):
    (tmp_path / "train.lock").write_bytes(contents)
    with lock_run(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"workdir .*file/run cannot be written"), lock_run(tmp_path / "file" / "run"):
        pass


def test_only_process_0_locks_and_all_are_refused_with_it(tmp_path, monkeypatch):
    from ttt_e2e.cluster import agreement

    monkeypatch.setattr(lock.jax, "process_index", lambda: 1)
    with lock_run(tmp_path / "run"):
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(agreement, "any_process", lambda mine: True)
    with pytest.raises(UserError, match="process 0 could not lock it"), lock_run(tmp_path / "run"):
        pass


def test_a_second_trainer_changes_nothing(token_store, tmp_path):
    """Neither the metrics nor the unfinished save of the first."""
    config = tiny_run(token_store)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with lock_run(tmp_path):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "train.lock"}
        with pytest.raises(UserError, match="trains in it"):
            loop.train(config, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "train.lock"} == before
