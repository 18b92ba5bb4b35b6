"""Writes files whole or not at all, and reads text and JSON that a disk, an editor or a kill may have damaged."""

import contextlib
import json
from collections.abc import Iterator

from etils import epath

from ttt_e2e.errors import JSON_ERRORS, UserError
from ttt_e2e.outputs import writing


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
