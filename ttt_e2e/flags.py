"""Parses command-line flags (absl) and overrides of the config (ml_collections), and loads config files.

Flags are defined when the subcommand is known, so that each has its own.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from ttt_e2e.config import Config, default_config, from_config_dict, suggestion, to_dict
from ttt_e2e.errors import JSON_ERRORS, UserError, first_line
from ttt_e2e.paths import check_local


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
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "Print this and exit.", flag_values=values, short_name="h")
    define(values)
    try:
        rest = values(["ttt-e2e", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if values.help:
        print(f"{usage}\n{values.main_module_help() or values.get_help()}")
        sys.exit(0)
    overrides = [argument for argument in rest if argument.startswith("--config.") and "config" in values]
    for argument in rest:
        name, _, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            raise UserError(f"unexpected argument {argument!r}: every argument has the form --name=value")
        if argument not in overrides:
            raise UserError(f"unknown flag --{name}: {suggestion(name, sorted(values))}")
    return values, overrides


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
    module_spec = importlib.util.spec_from_file_location("config_file", path)
    if module_spec is None:
        raise UserError(f"config file {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
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


def override(base: ConfigDict, overrides: list[str]) -> Config:
    """Applies the overrides `--config.section.field=value` to `base`, and validates the result.

    Raises:
      UserError: an override names no field or has a value of the wrong type, or the resulting config is not legal.
    """
    defaults = default_config()
    names = set(_field_names(defaults))
    for argument in overrides:
        name, equals, _ = argument.removeprefix("--config.").partition("=")
        if name not in names:
            raise UserError(f"unknown config field config.{name}: {suggestion(name, sorted(names))}")
        if not equals:
            raise UserError(f"config.{name} has no value: write --config.{name}=VALUE")
    _fill_in(base, defaults)
    values = flags.FlagValues()
    argv = ["ttt-e2e", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.IllegalFlagValueError, ValueError) as error:  # ValueError: an integer too long to print
        raise UserError(" ".join(str(error).split())) from None
    return from_config_dict(values.config)


def _fill_in(values: ConfigDict, defaults: ConfigDict) -> None:
    """Adds what a config lacks, for it to be overridden: that of a run has no sections that its model does not use."""
    with values.unlocked():
        for name, default in defaults.items():
            if name not in values:
                values[name] = default
            elif isinstance(default, ConfigDict) and isinstance(values[name], ConfigDict):
                _fill_in(values[name], default)


def _field_names(values: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, those of sections within sections (a mixer's, in `model`) too."""
    for name, value in values.items():
        if isinstance(value, ConfigDict):
            yield from _field_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def string(values: flags.FlagValues, name: str, text: str, default: str = "") -> None:
    """Defines a string flag with the help `text`."""
    flags.DEFINE_string(name, default, text, flag_values=values)
