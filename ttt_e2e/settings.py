"""Settings: frozen dataclasses that command-line flags are made of, one a field.

    @dataclass(frozen=True)
    class Settings:
        samples: int = setting("needle_samples", "Prompts for each task, length and depth.", 4)

A field that is such a dataclass itself stands for its fields; one without a flag keeps its default.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, Field, field
from typing import get_type_hints

from absl import flags

from ttt_e2e.errors import UserError

INTEGERS = tuple[int, ...]  # listed with commas

_DEFINERS = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    str: flags.DEFINE_string,
    INTEGERS: flags.DEFINE_list,
}


def setting(flag: str, help: str, default=MISSING):
    """A field of a settings dataclass, given by `--flag`; without a default, its flag is empty or 0 by default."""
    return field(default=default, metadata={"flag": flag, "help": help})


def define(values: flags.FlagValues, settings: type) -> None:
    """Defines the flags of a settings dataclass."""
    for of, kind in _flagged(settings):
        default = kind() if of.default is MISSING else of.default
        default = list(map(str, default)) if kind == INTEGERS else default
        _DEFINERS[kind](of.metadata["flag"], default, of.metadata["help"], flag_values=values)


def flag_names(settings: type) -> list[str]:
    """The flags of a settings dataclass."""
    return [of.metadata["flag"] for of, _ in _flagged(settings)]


def read(values: flags.FlagValues, settings: type):
    """The settings that the flags give. Raises `UserError` where one lists anything but integers, or as the class."""
    given = {}
    for of, kind in _fields(settings):
        if dataclasses.is_dataclass(kind):
            given[of.name] = read(values, kind)
        elif "flag" in of.metadata:
            value = values[of.metadata["flag"]].value
            given[of.name] = _integers(of.metadata["flag"], value) if kind == INTEGERS else value
    return settings(**given)


def _fields(settings: type) -> list[tuple[Field, type]]:
    kinds = get_type_hints(settings)
    return [(of, kinds[of.name]) for of in dataclasses.fields(settings)]


def _flagged(settings: type) -> Iterator[tuple[Field, type]]:
    for of, kind in _fields(settings):
        if dataclasses.is_dataclass(kind):
            yield from _flagged(kind)
        elif "flag" in of.metadata:
            yield of, kind


def _integers(flag: str, listed: list[str]) -> tuple[int, ...]:
    try:
        return tuple(map(int, listed))
    except ValueError:
        raise UserError(f"--{flag}={','.join(listed)}: it takes integers separated by commas") from None
