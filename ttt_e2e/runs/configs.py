"""Finds the config that a caller from Python names."""

import copy
import os

from etils import epath
from ml_collections import ConfigDict

from ttt_e2e.config import Config, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, override
from ttt_e2e.runs.directory import find_run, load_config


def find_config(config, arguments: list[str]) -> Config:
    """Makes the config that `config` names, with overrides applied.

    Args:
      config: a config file, "FILE.py:ARG" or "FILE.py"; the `config.json` of a run; a run directory, or a checkpoint in
        one; a ConfigDict, which is not changed; or a Config.
      arguments: the overrides, as `override` takes them.

    Raises:
      UserError: there is no such file, or the config is not legal.
    """
    if isinstance(config, Config):
        base = ConfigDict(to_dict(config))
    elif isinstance(config, ConfigDict):
        base = copy.deepcopy(config)
    elif not isinstance(config, str | os.PathLike):
        raise UserError(f"config is {config!r:.80}, but it must be a path, a ConfigDict or a Config")
    elif epath.Path(path := os.path.expanduser(os.fspath(config))).is_dir():
        base = ConfigDict(to_dict(load_config(find_run(path))))
    else:
        base = load_config_file(path)
    return override(base, arguments)
