"""Runs a program with standard streams that no text and no reader can break."""

import contextlib
import os
import sys
from collections.abc import Callable

from ttt_e2e.errors import first_line


class LastingStream:
    """A text stream whose `write` never fails: it escapes what the encoding lacks, and drops what nobody reads."""

    def __init__(self, stream):
        """stream: the stream to write to; None where the process was started without, which reads nothing."""
        self.is_read = stream is not None
        self.failure = ""  # why it cannot be written, other than that its reader has gone
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 -- lives as long as the process

    def write(self, text: str) -> int:
        """Writes a text; a character that the encoding lacks as `\\uXXXX`."""
        with self._dropping():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self):
        """Runs a `with` block that writes; if it fails, all that is written from then on goes nowhere."""
        try:
            yield
        except OSError as error:
            self.is_read = False
            self.failure = "" if isinstance(error, BrokenPipeError) else error.strerror or first_line(error)
            with contextlib.suppress(OSError):  # a stream of Python alone has no file number
                # What is buffered still would fail once more, with a message, when Python closes the stream.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def is_read() -> bool:
    """Whether standard output has a reader, as far as is known."""
    return getattr(sys.stdout, "is_read", True)


def run(main: Callable[[], int]) -> int:
    """Runs a program's main function, and returns its exit code, with streams that outlive their readers.

    When a reader goes, as `| head` does, the program goes on: what it writes into files is still wanted. Where standard
    output cannot be written for another reason, such as a full disk, it says so at the end; the exit code is then 2.
    """
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        finally:
            out.flush()
        if out.failure:
            print(f"error: standard output cannot be written ({out.failure})", file=err)
            code = code or 2
        err.flush()
        return code
