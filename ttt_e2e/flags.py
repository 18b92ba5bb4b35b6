"""Parses command-line flags (absl) and overrides of the config, and loads config files (ml_collections).

Flags are defined when the subcommand is known, so that each has its own.
"""

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from ttt_e2e.config import Config, as_dict, default_config, expand_home, from_config_dict, suggestion, to_dict
from ttt_e2e.errors import JSON_ERRORS, UserError, first_line
from ttt_e2e.paths import check_local

logger = logging.getLogger(__name__)


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None], usage: str
) -> tuple[flags.FlagValues, list[str]]:
    """Parses the flags of one subcommand; `--help` prints them and exits.

    Args:
      argv: arguments after the subcommand.
      define: function that defines the subcommand's flags in a `FlagValues`.
      usage: first lines of the help text.

    Returns:
      The flags, and the overrides of the config (`--config.section.field=value`) as arguments for `override`.

    Raises:
      UserError: a flag is unknown (with a suggestion) or has an illegal value, or an argument is no flag.

    A flag that is given different values is logged: the last counts.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Print this and exit.", flag_values=values, short_name="h")
    define(values)
    kinds = _field_kinds() if "config" in values else {}
    given = _given(argv, values, kinds)
    ours = [argument for name, _, argument in given if name in values]
    try:
        values(["ttt-e2e", *ours])
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if values.help:
        print(f"{usage}\n{values.main_module_help() or values.get_help()}")
        sys.exit(0)
    _warn_of_repeated(given, values)
    return values, [argument for name, _, argument in given if name not in values]


def _given(argv: list[str], values: flags.FlagValues, kinds: dict[str, type]) -> list[tuple[str, str, str]]:
    """Divides arguments into flags: (name, value, the flag as --name=VALUE).

    A value may also be the argument after a flag; of a boolean, only where it reads true or false. `--noNAME` is the
    value false of a boolean, and an integer may be written 1e3.

    Raises `UserError` for an argument that is no flag, or an unknown one (with a suggestion), and where the next
    argument may be a value or a flag.
    """
    given, waiting = [], list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name:
            raise UserError(f"unexpected argument {argument!r}: every argument has the form --name=value")
        kind = _kind(name, values, kinds)
        if kind is None and not equals and _kind(name.removeprefix("no"), values, kinds) is bool:
            name, equals, value = name.removeprefix("no"), "=", "false"
        elif kind is bool and not equals:
            is_next = bool(waiting) and waiting[0].lower() in ("true", "false")
            equals, value = "=", waiting.pop(0) if is_next else "true"
        elif kind and not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"--{name} has no value: write --{name}=VALUE")
            equals, value = "=", waiting.pop(0)
        elif kind is None:
            raise UserError(_unknown(name, values, kinds))
        name = values[name].name if name in values else name  # -h is --help
        if kind is int:
            value = _integer_text(value)
        given.append((name, value, f"--{name}{equals}{value}"))
    return given


def _kind(name: str, values: flags.FlagValues, kinds: dict[str, type]) -> type | None:
    """The type of the value of a flag, or of a config field's override; None where there is no such flag."""
    if name in values:
        flag = values[name]
        return bool if flag.boolean else int if flag.flag_type() == "int" else str
    return kinds.get(name.removeprefix("config.")) if name.startswith("config.") else None


def _integer_text(text: str) -> str:
    """An integer that is written as a float, such as 1e3, in digits; any other text as it is."""
    try:
        return str(integer(text))
    except ValueError:
        return text


def _unknown(name: str, values: flags.FlagValues, kinds: dict[str, type]) -> str:
    """What is said of an unknown flag: the config fields of that name, or else the flag that is most like it."""
    if name.startswith("config.") and kinds:
        return _unknown_field(name.removeprefix("config."), kinds)
    fields = [f"--config.{field}" for field in kinds if field == name or field.endswith(f".{name}")]
    hint = f"did you mean {' or '.join(fields)}?" if fields else suggestion(name, sorted(values))
    return f"unknown flag --{name}: {hint}"


def _unknown_field(name: str, kinds: dict[str, type]) -> str:
    """What is said of an unknown field: those of that name in other sections, or else the one that is most like it."""
    fields = [repr(field) for field in kinds if field.split(".")[-1] == name.split(".")[-1]]
    hint = f"did you mean {' or '.join(fields)}?" if fields else suggestion(name, sorted(kinds))
    return f"unknown config field config.{name}: {hint}"


def _warn_of_repeated(given: list[tuple[str, str, str]], values: flags.FlagValues) -> None:
    """Logs a line for each flag that was given different values, of which the last counts."""
    by_name = {}
    for name, value, _ in given:
        if name not in values or not isinstance(values[name], flags.MultiFlag):
            by_name.setdefault(name, {})[value] = None
    for name, different in by_name.items():
        if len(different) > 1:
            # The values are left out: one may be a URL with a password.
            logger.warning("--%s is given with %d different values: the last one counts", name, len(different))


def load_config_file(spec: str) -> ConfigDict:
    """Calls `get_config(ARG)` of a config file, "FILE.py:ARG" or "FILE.py", and returns its config as a ConfigDict.

    Or reads the `config.json` of a run. The function may return a ConfigDict, frozen or not, a dict of sections, or a
    `Config`.

    Raises:
      UserError: there is no such file, it raises an exception, or returns anything else.
    """
    check_local("--config", spec)
    path, colon, arg = spec.partition(":")
    if path.endswith(".json"):
        return _load_json(path)
    config = _call_config_file(spec, "get_config", *([arg] if colon else []))
    config = to_dict(config) if isinstance(config, Config) else config
    if not isinstance(config, (ConfigDict, dict)):
        raise UserError(f"config file {spec}: get_config() gives {type(config).__name__}, but it takes a ConfigDict")
    try:
        return ConfigDict(config)  # thaws it, its sections too
    except ValueError as error:  # a key with a dot
        raise UserError(f"config file {spec}: {first_line(error)}") from None


def _load_json(path: str) -> ConfigDict:
    """Reads the config of a `config.json`. Raises `UserError` if there is none, or it is damaged."""
    try:
        return ConfigDict(to_dict(from_config_dict(json.loads(Path(path).read_text(encoding="utf-8"))))).lock()
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, *JSON_ERRORS) as error:
        raise UserError(f"config file {path} is not readable JSON: {error}") from None


def load_sweep(spec: str) -> dict[str, list]:
    """Calls `sweep()` of a config file, "FILE.py:ARG" or "FILE.py", and returns its result (docs/sweeps.md).

    Raises:
      UserError: there is no such file or function, or it raises an exception.
    """
    return _call_config_file(spec, "sweep")


def _call_config_file(spec: str, function: str, *arguments):
    """Imports a config file and calls one of its functions. Raises `UserError` for whatever goes wrong in it."""
    path = spec.partition(":")[0]
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist")
    path = os.path.abspath(path)
    # Its path is its name, so that no two files, and no file and a module of Python, are taken for one another.
    module_spec = importlib.util.spec_from_file_location(path, path)
    if module_spec is None:
        raise UserError(f"config file {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        with _importing_beside(path):
            sys.modules[path] = module  # dataclasses look their module up there
            module_spec.loader.exec_module(module)
            return getattr(module, function)(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # an exception in the user's file is an error of the user's
        raise UserError(f"config file {spec}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def as_arguments(overrides: Mapping | None) -> list[str]:
    """Writes overrides {"section.field": value} as arguments for `override`. Raises `UserError` unless it is a dict."""
    if not isinstance(overrides, Mapping | None):
        raise UserError(f"overrides is {overrides!r:.80}, but it must be a dict such as {{'train.num_steps': 100}}")
    return [f"--config.{name}={value}" for name, value in (overrides or {}).items()]


@contextlib.contextmanager
def _importing_beside(path: str) -> Iterator[None]:
    """Lets a config file import its neighbours, and modules below the working directory, in the `with` block.

    Neighbours are forgotten afterwards: another config file may have one of the same name.
    """
    before, places = set(sys.modules), [os.path.dirname(path), os.getcwd()]
    sys.path[:0] = places
    try:
        yield
    finally:
        for place in places:
            sys.path.remove(place)
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if name != path and file and os.path.dirname(os.path.abspath(file)) == places[0]:
                del sys.modules[name]


def override(base: ConfigDict, overrides: list[str], more: dict[str, Any] | None = None) -> Config:
    """Applies the overrides `--config.section.field=value` to `base`, and validates the result.

    more: values of other fields, {"section.field": value}.

    Raises:
      UserError: an override names no field or has a value of the wrong type, or the resulting config is not legal.
    """
    kinds, values = _field_kinds(), dict(more or {})
    for argument in overrides:
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if name not in kinds:
            raise UserError(_unknown_field(name, kinds))
        if not equals:
            raise UserError(f"config.{name} has no value: write --config.{name}=VALUE")
        values[name] = _parse_value(name, text, kinds[name])
    return from_config_dict(assign(base, values))


def assign(base: ConfigDict, values: dict[str, Any]) -> dict:
    """Sets fields {"section.field": value} of `base`, and returns all of its fields as a dict.

    Fields that refer to one of them follow it. The dict may have more sections than `base`: the config of a run has
    none that its model does not use.
    """
    absent = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        found = base
        for section in sections:
            found = found[section] if isinstance(found, ConfigDict) and section in found else None
        if isinstance(found, ConfigDict) and field in found:
            with found.ignore_type():
                found[field] = value
        else:
            absent[name] = value
    fields = as_dict(base)
    for name, value in absent.items():
        *sections, field = name.split(".")
        found = fields
        for section in sections:
            found = found.setdefault(section, {}) if isinstance(found, dict) else None
        if isinstance(found, dict):  # otherwise validation says that it is no section
            found[field] = value
    return fields


def _parse_value(name: str, text: str, kind: type):
    """Parses the value of an override as the type of its field."""
    try:
        return {bool: flags.BooleanParser().parse, int: integer, float: float, str: str}[kind](text)
    except ValueError:
        legal = {bool: "true or false", int: "one integer", float: "one number"}[kind]
        raise UserError(f"--config.{name}={text[:80]}: it takes {legal}") from None


def _field_kinds() -> dict[str, type]:
    """The types of all fields by dotted name, those of sections within sections (a mixer's, in `model`) too."""
    return dict(_kinds_below(default_config(), ""))


def _kinds_below(values: ConfigDict, prefix: str) -> Iterator[tuple[str, type]]:
    for name, value in values.items():
        if isinstance(value, ConfigDict):
            yield from _kinds_below(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", type(value)


def string(values: flags.FlagValues, name: str, text: str, default: str = "") -> None:
    """Defines a string flag with the help `text`."""
    flags.DEFINE_string(name, default, text, flag_values=values)


class PathParser(flags.ArgumentParser):
    """Parses the value of a flag that is a path, or paths with commas between them: `~` means home."""

    def parse(self, argument: str) -> str:
        """Returns the text with home directories for `~`."""
        return expand_home(argument)


class PathListParser(flags.ListParser):
    """Parses a list of paths with commas between them."""

    def parse(self, argument: str | list[str]) -> list[str]:
        """Returns the paths with home directories for `~`."""
        return [expand_home(path) for path in super().parse(argument)]


def path(values: flags.FlagValues, name: str, text: str, default: str = "") -> None:
    """Defines a flag with the help `text` that takes a path."""
    flags.DEFINE(PathParser(), name, default, text, flag_values=values)


def path_list(values: flags.FlagValues, name: str, text: str) -> None:
    """Defines a flag with the help `text` that takes a list of paths, with commas between them."""
    flags.DEFINE(PathListParser(), name, [], text, flag_values=values, serializer=flags.CsvListSerializer(","))


def repeated_path(values: flags.FlagValues, name: str, text: str) -> None:
    """Defines a flag with the help `text` that takes a path and may be repeated."""
    flags.DEFINE_multi(PathParser(), flags.ArgumentSerializer(), name, [], text, flag_values=values)


def given_paths(values: flags.FlagValues) -> Iterator[tuple[str, str]]:
    """All paths that flags have as values: (name of the flag, path)."""
    for name in values:
        if isinstance(values[name].parser, PathParser | PathListParser):
            value = values[name].value
            yield from ((name, each) for each in ([value] if isinstance(value, str) else value))


def integer(text: str) -> int:
    """Parses an integer, written in digits or as a float, such as 1e3. Raises ValueError where it is none."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():  # nor are nan and the infinities
            raise
        return int(number)
