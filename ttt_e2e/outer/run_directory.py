"""The run directory: `config.json`, which ties it to one model, and `starts.jsonl`, how it came about."""

import json
import subprocess
import time
from pathlib import Path

import jax
from etils import epath

from ttt_e2e.config import Config, from_config_dict, to_dict
from ttt_e2e.errors import UserError


def claim(workdir, config: Config) -> None:
    """Writes `config.json` into the run directory, unless that holds a run of another model.

    Raises:
      UserError: it does; the message names the first field that differs.
    """
    path = epath.Path(workdir) / "config.json"
    if path.exists():
        theirs = load_config(workdir).model
        for field in type(theirs).__dataclass_fields__:
            ours, other = getattr(config.model, field), getattr(theirs, field)
            if ours != other:
                raise UserError(
                    f"workdir {workdir} holds a run whose model.{field} is {other!r}, but the config says {ours!r}: "
                    "choose another workdir"
                )
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / "config.json.tmp"
        temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        temporary.replace(path)


def find_run(path) -> epath.Path:
    """The run directory that a path means: itself, or that of the checkpoint that it is.

    Raises:
      UserError: there is none.
    """
    path = epath.Path(path).resolve()
    for directory in (path, path.parent, path.parent.parent):  # WORKDIR/checkpoints/STEP
        if (directory / "config.json").exists():
            return directory
    raise UserError(f"{path} is no run directory, and no checkpoint in one: there is no config.json")


def load_config(workdir) -> Config:
    """The resolved config of a run. Raises `UserError` where the directory holds none, or it is damaged."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"workdir {workdir} holds no run: it has no config.json")
    try:
        return from_config_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from None


def record_start(workdir, overrides: list[str]) -> None:
    """Appends to `starts.jsonl`: when, with which overrides of the config, at which git revision, on what."""
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "overrides": overrides,
        "revision": _git_revision(),
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
    }
    if jax.process_index() == 0:
        directory = epath.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "starts.jsonl"
        before = path.read_text() if path.exists() else ""
        path.write_text(before + json.dumps(start) + "\n")


def _git_revision() -> str:
    """Revision of the checkout that this package runs from, "+" after it if there are changes; "" outside of one."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
