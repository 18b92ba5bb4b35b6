"""Standard streams that lack characters, lose their reader or are full end no command: it still writes its files."""

import io
import os
import subprocess
import sys

import pytest

from tests.evaluation.test_report import make_run
from ttt_e2e import streams
from ttt_e2e.cli import main


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


@pytest.fixture
def unread():
    """A stream into a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", encoding="utf-8")
    yield stream
    stream.close()  # raises if what was buffered would be written still


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    stream = ascii_stream()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(UnicodeEncodeError):  # as it is without
        print("a – b")
    assert streams.run(lambda: print("a – 实验 \udcff b", flush=True) or 0) == 0
    assert stream.buffer.getvalue() == b"a \\u2013 \\u5b9e\\u9a8c \\udcff b\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_program_goes_on_when_its_reader_has_gone(name, unread, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, name, unread)
    monkeypatch.setattr(sys, "stdin", None)

    def write():
        for _ in range(3):
            print("x" * 100_000, file=getattr(sys, name), flush=True)  # more than any buffer
        (tmp_path / "file").touch()
        assert streams.is_read() == (name == "stderr")
        return 0

    with pytest.raises(BrokenPipeError):  # without
        print("x" * 100_000, file=unread, flush=True)
    assert streams.run(write) == 0
    assert (tmp_path / "file").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_said_at_the_end(monkeypatch, capsys, tmp_path):
    for text in ("x", "x" * 100_000):  # noticed when the buffer is written at the end, and at once
        with open("/dev/full", "w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert streams.run(lambda text=text: print(text) or 0) == 2
        assert capsys.readouterr().err == "error: standard output cannot be written (No space left on device)\n"


def test_a_program_runs_without_streams(monkeypatch):
    """As a process is started with `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert streams.run(lambda: print("x", sys.stdout.isatty()) or print("y", file=sys.stderr) or 3) == 3


def test_a_report_is_written_whatever_becomes_of_its_table(unread, monkeypatch, tmp_path):
    command = ["report", f"--workdirs={make_run(tmp_path / 'run', kind='window', evaluated=False, steps=3)}"]
    stream = ascii_stream()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*command, f"--output={tmp_path / 'a'}"]) == 0
    assert b"\\u2013" in stream.buffer.getvalue()
    monkeypatch.setattr(sys, "stdout", unread)
    assert main([*command, f"--output={tmp_path / 'b'}"]) == 0
    assert (tmp_path / "b" / "report.html").exists()


def test_a_closed_pipe_leaves_no_traceback_of_the_process():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ttt_e2e", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
