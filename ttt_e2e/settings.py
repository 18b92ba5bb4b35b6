"""Makes command-line flags from settings: frozen dataclasses, whose fields are made by `setting`.

    @dataclass(frozen=True)
    class Settings:
        samples: int = setting("needle_samples", "Prompts for each task, length and depth.", 4)

The fields of a field that is such a dataclass itself have flags too. A field without a flag keeps its default.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, Field, field
from typing import get_type_hints

from absl import flags

from ttt_e2e.errors import UserError
from ttt_e2e.flags import integer, path

INTEGERS = tuple[int, ...]  # type of a field whose flag takes integers, separated by commas

_DEFINERS = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    str: flags.DEFINE_string,
    INTEGERS: flags.DEFINE_list,
}


def setting(flag: str, help: str, default=MISSING, *, is_path: bool = False):
    """Makes a dataclass field with the flag `--flag`; without a default, the flag's is empty, 0 or false.

    is_path: whether `~` means home in it.
    """
    return field(default=default, metadata={"flag": flag, "help": help, "is_path": is_path})


def define(values: flags.FlagValues, settings: type) -> None:
    """Defines the flags of a settings dataclass."""
    for f, kind in _flagged(settings):
        default = kind() if f.default is MISSING else f.default
        default = list(map(str, default)) if kind == INTEGERS else default
        if f.metadata["is_path"]:
            path(values, f.metadata["flag"], f.metadata["help"], default)
        else:
            _DEFINERS[kind](f.metadata["flag"], default, f.metadata["help"], flag_values=values)


def flag_names(settings: type) -> list[str]:
    """Names of the flags of a settings dataclass."""
    return [f.metadata["flag"] for f, _ in _flagged(settings)]


def read(values: flags.FlagValues, settings: type):
    """Makes the settings from the values of their flags.

    Raises `UserError` where a list of integers has anything else in it, and for values that the dataclass refuses.
    """
    fields = {}
    for f, kind in _fields(settings):
        if dataclasses.is_dataclass(kind):
            fields[f.name] = read(values, kind)
        elif "flag" in f.metadata:
            value = values[f.metadata["flag"]].value
            fields[f.name] = _integers(f.metadata["flag"], value) if kind == INTEGERS else value
    return settings(**fields)


def _fields(settings: type) -> list[tuple[Field, type]]:
    """Fields of a dataclass, with their types."""
    kinds = get_type_hints(settings)
    return [(f, kinds[f.name]) for f in dataclasses.fields(settings)]


def _flagged(settings: type) -> Iterator[tuple[Field, type]]:
    """Yields the fields that have a flag, with their types, those of nested dataclasses included."""
    for f, kind in _fields(settings):
        if dataclasses.is_dataclass(kind):
            yield from _flagged(kind)
        elif "flag" in f.metadata:
            yield f, kind


def _integers(flag: str, items: list[str]) -> tuple[int, ...]:
    """Parses the items of a list flag as integers. Raises `UserError` where one is none."""
    try:
        return tuple(map(integer, items))
    except ValueError:
        raise UserError(f"--{flag}={','.join(items)}: it takes integers separated by commas") from None
