"""Reading the text files of a run directory, any of which a disk, an editor or a kill may have damaged."""

import contextlib
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
    values = _parse(read_text(path), path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, but it takes a JSON object")
    return values


def read_json_lines(path) -> list[dict]:
    """The objects of a JSONL file of metrics, each with its `step`.

    Only a last line without its end may be broken, and is left out: a kill cuts it short.

    Raises:
      UserError: another line is no such object, or the file cannot be read.
    """
    *whole, rest = read_text(path).split("\n")
    objects = [_line(path, number, line) for number, line in enumerate(whole, start=1) if line.strip()]
    with contextlib.suppress(UserError):
        objects += [_line(path, len(whole) + 1, rest)] if rest else []
    return objects


def _line(path, number: int, line: str) -> dict:
    values = _parse(line, f"{path}, line {number}")
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise UserError(f"{path}, line {number} is {line[:80]!r}, but it takes a JSON object with an integer 'step'")
    return values


def _parse(text: str, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # what `json` raises, also of numbers too long and nests too deep
        raise UserError(f"{where} is not readable JSON: {error}") from None
