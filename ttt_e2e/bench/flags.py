"""Flags of `ttt-e2e bench NAME`: one for each keyword-only parameter of the benchmark's function."""

import inspect
from collections.abc import Callable

from absl import flags

from ttt_e2e.config import expand_home
from ttt_e2e.errors import UserError
from ttt_e2e.flags import integer


def define(values: flags.FlagValues, run: Callable) -> None:
    """Defines a flag for each keyword-only parameter of `run`, with its default."""
    for option in _options(run):
        _flag(values, option.name, option.default)


def arguments(values: flags.FlagValues, run: Callable) -> dict:
    """The flags' values as keyword arguments of `run`. Raises `UserError` if a list of numbers holds anything else."""
    return {option.name: _value(values, option) for option in _options(run)}


def _options(run: Callable) -> list[inspect.Parameter]:
    """The keyword-only parameters of a benchmark's function."""
    return [p for p in inspect.signature(run).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _flag(values: flags.FlagValues, name: str, default) -> None:
    """Defines a flag of the default's type; for a tuple, a flag that takes a list."""
    kinds = {int: flags.DEFINE_integer, str: flags.DEFINE_string, bool: flags.DEFINE_boolean, tuple: flags.DEFINE_list}
    define = kinds[type(default)]
    text = "Several may be given, separated by commas." if isinstance(default, tuple) else "Size of the case."
    define(name, list(map(str, default)) if isinstance(default, tuple) else default, text, flag_values=values)


def _value(values: flags.FlagValues, option: inspect.Parameter):
    """A flag's value, in the type of the option's default; for a tuple, of its first element."""
    value = values[option.name].value
    if not isinstance(option.default, tuple):
        return value
    kinds = {int: (integer, "integers"), float: (float, "numbers"), str: (expand_home, "paths")}
    make, words = kinds[type(option.default[0])]
    try:
        return tuple(map(make, value))
    except ValueError:
        raise UserError(f"--{option.name}={','.join(value)}: it takes {words} separated by commas") from None
