"""Config fields, whose metadata are help, legal values and resume rule, and the checks that go by these."""

import dataclasses
import difflib
import enum
import math
import operator
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from ttt_e2e.errors import UserError

# What a resumed run does if a field differs from its value at the last start.
REFUSED = "refused"  # the run ends with an error: another model, loss, optimizer or order of the data is another run
LOGGED = "logged"  # the run continues, with a line in the log: schedules, and what is evaluated
FREE = "free"  # the run continues: only rounding depends on the field, or another check is made of it

# The largest size or number of steps: JAX counts in 32 bits, and a product of two must fit in 64.
LARGEST = 2**31 - 1

BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def field(  # noqa: PLR0913 -- each is an entry of the metadata
    default,
    help: str,
    *,
    least=None,
    above=None,
    below=None,
    most=None,
    choices: Collection[str] = (),
    resume=REFUSED,
    is_path: bool = False,
):
    """A dataclass field of a section, with its help, its legal values and its resume rule as metadata.

    Args:
      default: of the field's type; never None, which a flag cannot override.
      help: its entry in docs/configuration.md, which adds the range and the choices by itself.
      least, above, below, most: bounds of a number. They are checked after a 0 is replaced by the derived value.
      choices: the legal strings. The collection may grow later; it is read when a config is validated.
      resume: REFUSED, LOGGED or FREE.
      is_path: whether `~` means home in it.
    """
    bounds = {"least": least, "above": above, "below": below, "most": most}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "bounds": bounds, "choices": choices, "resume": resume, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


def each_field(config) -> Iterator[tuple[str, dataclasses.Field, object]]:
    """(section, field, value) of every field of a config, in the order in which they are defined."""
    for section, values in vars(config).items():
        yield from _each_of_section(section, values)


def _each_of_section(section: str, values) -> Iterator[tuple[str, dataclasses.Field, object]]:
    """The same of one section, sections in it included."""
    for f in dataclasses.fields(values):
        if dataclasses.is_dataclass(f.default):
            yield from _each_of_section(f"{section}.{f.name}", getattr(values, f.name))
        elif f.name != "mixer_sections":
            yield section, f, getattr(values, f.name)
    for mixer, nested in getattr(values, "mixer_sections", ()):
        yield from _each_of_section(f"{section}.{mixer}", nested)


def file_names(directory: str) -> list[str]:
    """Names of the modules in a directory of the package, each of which is a legal value; imports none of them."""
    return sorted(file.stem for file in (Path(__file__).parents[1] / directory).glob("[a-z]*.py"))


def suggestion(name: str, legal: Collection[str]) -> str:
    """A hint for a mistyped name: "did you mean" the most similar legal one, or a list of all."""
    near = difflib.get_close_matches(str(name), legal, n=1)
    return f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(legal)}"


def expand_home(paths: str) -> str:
    """Replaces `~` and `~USER` by home directories where a path begins: in front, and after a comma or a colon."""
    return re.sub(r"(^|[,:]\s*)(~[^/,:]*)", lambda match: match[1] + os.path.expanduser(match[2]), paths)


def require(condition: bool, name: str, value, legal: str) -> None:
    """Raises `UserError` unless the condition holds. The message says that `name` is `value` but must be `legal`."""
    if not condition:
        raise UserError(f"{name} is {value!r}, but it must be {legal}")


def coerce(name: str, value, kind: type):
    """Converts `value` to `kind` without loss (1 is a legal float, 8.0 a legal int); else raises `UserError`.

    NumPy's numbers, enumerations of numbers or strings, and paths are taken for what they stand for.
    """
    value = _plain(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
    if isinstance(value, kind) and kind in (bool, str):
        return value
    if kind is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    legal = {
        bool: "True or False",
        int: "one integer below 2**63",
        float: "one finite number below 2**63",
        str: "one string",
    }[kind]
    raise UserError(f"{name} is {value!r}, but it takes {legal}")


def _plain(value):
    """A scalar of NumPy, an enumeration's member or a path as Python's own bool, int, float or str; others as is."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check(name: str, value, f: dataclasses.Field) -> None:
    """Raises `UserError` if a value, of the right type, is out of the field's range or not one of its choices."""
    bounds, choices = f.metadata["bounds"], f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{name} is {value!r}: {suggestion(value, choices)}")
    legal = " and ".join(f"{BOUNDS[key][0]} {bound}" for key, bound in bounds.items())
    require(all(BOUNDS[key][1](value, bound) for key, bound in bounds.items()), name, value, legal)
    if type(value) is int and "most" not in bounds:
        require(value <= LARGEST, name, value, f"at most {LARGEST}")
