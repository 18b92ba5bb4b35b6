"""Text files of a run directory: written whole, and read as what a disk, an editor or a kill may have damaged."""

import json

from etils import epath

from ttt_e2e.errors import UserError


def read_text(path) -> str:
    """The text of a file. Raises `UserError` where there is none, or it cannot be read."""
    try:
        return epath.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json(path) -> dict:
    """The JSON object in a file. Raises `UserError` where there is no file, or anything else in it."""
    values = parse_json(read_text(path), path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, but it takes a JSON object")
    return values


def parse_json(text: str, where):
    """What JSON says. Raises `UserError`, which begins with `where`, for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # what `json` raises, also of numbers too long and nests too deep
        raise UserError(f"{where} is not readable JSON: {error}") from None


def replace_text(path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path, contents: bytes) -> None:
    """Writes a file, whole or not at all."""
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(contents)
    temporary.replace(path)
