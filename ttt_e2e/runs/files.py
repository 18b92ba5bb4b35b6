"""Writes files whole or not at all, and reads text and JSON that a disk, an editor or a kill may have damaged."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator

from etils import epath

from ttt_e2e.errors import JSON_ERRORS, UserError
from ttt_e2e.outputs import writing
from ttt_e2e.paths import in_bucket

SECONDS_BETWEEN_WRITES = 30.0  # of a file of lines in a bucket


def read_text(path) -> str:
    """Reads a text file. Raises `UserError` if it is missing or cannot be read."""
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json(path) -> dict:
    """Reads the JSON object in a file. Raises `UserError` if the file is missing, or holds anything else."""
    values = parse_json(read_text(path), path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, but it takes a JSON object")
    return values


def parse_json(text: str, where):
    """Parses JSON; NaN and Infinity, which are no JSON but were written once, are read as null is.

    Raises `UserError` if it is not valid; the message begins with `where`, the place it is from.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except JSON_ERRORS as error:
        raise UserError(f"{where} is not readable JSON: {error}") from None


@contextlib.contextmanager
def replacing(path) -> Iterator[epath.Path]:
    """Gives a temporary path, whose file replaces the one at `path` when the `with` block ends without an exception.

    Raises `UserError` where the file cannot be written.
    """
    path = epath.Path(path)
    if in_bucket(path):  # objects are written whole, and renaming one would copy it
        with tempfile.TemporaryDirectory() as directory, writing(path):
            yield (file := epath.Path(directory) / path.name)
            path.write_bytes(file.read_bytes())
        return
    temporary = path.parent / f"{path.name}.tmp"
    with writing(path):
        try:
            yield temporary
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def replace_text(path, text: str) -> None:
    """Writes a text file, whole or not at all. Raises `UserError` where it cannot be written."""
    replace_bytes(path, text.encode())


def replace_bytes(path, contents: bytes) -> None:
    """Writes a file, whole or not at all. Raises `UserError` where it cannot be written."""
    with replacing(path) as file:
        file.write_bytes(contents)


class LinesFile:
    """A file to which a program adds lines while it runs.

    On disk, they are there at once. Objects in a bucket cannot grow: there, the file is written anew, whole, by `flush`
    and `close`, and by `add` if the last time was `SECONDS_BETWEEN_WRITES` ago. All methods raise `UserError` where it
    cannot be written.
    """

    def __init__(self, path, lines: list[str]):
        """Begins the file with these lines, in place of one that is there. A line includes its line end."""
        self._path, self._lines, self._file = epath.Path(path), list(lines), None
        self.flush()
        if not in_bucket(path):
            with writing(path):
                self._file, self._lines = self._path.open("a", encoding="utf-8"), []

    def add(self, lines: list[str]) -> None:
        """Adds lines at the end."""
        if self._file:
            with writing(self._path):
                self._file.write("".join(lines))
                self._file.flush()
            return
        self._lines += lines
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.flush()

    def flush(self) -> None:
        """Returns when all lines are in the file."""
        if not self._file:
            replace_text(self._path, "".join(self._lines))
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes what is not written yet, and closes the file."""
        self.flush()
        if self._file:
            with writing(self._path):  # again, where a line before could not be
                self._file.close()
