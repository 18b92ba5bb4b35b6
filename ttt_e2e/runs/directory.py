"""The run directory: `config.json`, which ties it to one model, and `starts.jsonl` and `starts/`, how it came about."""

import calendar
import json
import logging
import subprocess
import time
from pathlib import Path

import jax
from etils import epath

from ttt_e2e.config import Config, from_config_dict, to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.runs.files import read_json, read_text, replace_text
from ttt_e2e.runs.resume import check_resume
from ttt_e2e.runs.secrets import find_secrets, redact

logger = logging.getLogger(__name__)

MAX_DIFF_BYTES = 1_000_000
MAX_UNTRACKED = 200  # names of files
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def claim(workdir, config: Config) -> None:
    """Writes `config.json` into the run directory, unless that holds a run which this config would make another one.

    Raises:
      UserError: it does; the message names the first field that differs (resume.py). Or the config holds a secret.
    """
    refuse_secrets(config)
    if (epath.Path(workdir) / "config.json").exists():
        check_resume(workdir, config, load_config(workdir), bool(saved_steps(workdir)))
    if jax.process_index() == 0:
        write_config(workdir, config)


def saved_steps(workdir) -> list[int]:
    """The steps of a run that are listed as checkpoints, in their order; each was written whole."""
    directory = epath.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted(int(child.name) for child in directory.iterdir() if child.name.isdigit())


def write_config(workdir, config: Config) -> None:
    """Writes `config.json`, whole or not at all."""
    directory = epath.Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def refuse_secrets(config: Config) -> None:
    """Raises `UserError` where a field holds a credential, which `config.json` would show to whoever reads it."""
    if field := find_secrets(to_dict(config)):
        raise UserError(
            f"{field} holds a credential (a password in a URL, or the value of a secret environment variable), which "
            "the run directory would show: leave it in the environment"
        )


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
    values = read_json(path)
    try:
        return from_config_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def record_start(workdir, overrides: list[str], policies: dict[str, str]) -> None:
    """Appends to `starts.jsonl`: when, with which overrides of the config, of which code, on what; and the policies
    that it takes, where the config says "auto".

    Start N, counted from 1, has the resolved config in `starts/N.json` and, where the checkout has uncommitted changes,
    their difference in `starts/N.diff`, both named by its line.
    """
    devices = [device.device_kind for device in jax.devices()]
    if jax.process_index() != 0:
        return
    directory = epath.Path(workdir)
    (directory / "starts").mkdir(parents=True, exist_ok=True)
    path = directory / "starts.jsonl"
    before = read_text(path) if path.exists() else ""
    name = f"starts/{before.count(chr(10)) + 1}"
    start = {
        "time": time.strftime(TIME_FORMAT, time.gmtime()),
        "overrides": [redact(override) for override in overrides],
        "config": "",
        **_code(directory, name),
        "jax": jax.__version__,
        "devices": devices,
        "policies": policies,
    }
    if (directory / "config.json").exists():
        start["config"] = f"{name}.json"
        replace_text(directory / start["config"], (directory / "config.json").read_text())
    if saved_steps(workdir):
        _warn_of_other_code(directory, before, start)
    replace_text(path, before + json.dumps(start) + "\n")


def first_start(workdir) -> float:
    """When the run was first started, in seconds since 1970; now, where that is not recorded."""
    path = epath.Path(workdir) / "starts.jsonl"
    try:
        start = json.loads(read_text(path).split("\n", 1)[0])
        return float(calendar.timegm(time.strptime(start["time"], TIME_FORMAT)))
    except (UserError, ValueError, KeyError, TypeError):
        return time.time()


def _warn_of_other_code(directory, before: str, start: dict) -> None:
    """Logs where the run goes on under another revision, difference or version of JAX than at its last start."""
    try:
        last = json.loads(before.splitlines()[-1])
        what = {name: (last[name], start[name]) for name in ("revision", "jax")}
        differences = [read_text(directory / of["diff"]) if of["diff"] else "" for of in (last, start)]
    except (IndexError, KeyError, TypeError, ValueError, UserError):  # no start before, or its record is damaged
        return
    for name, (theirs, ours) in what.items():
        if ours != theirs:
            logger.warning("%s is %s from here on; until now it was %s", name, ours or "unknown", theirs or "unknown")
    if what["revision"][0] == what["revision"][1] and differences[0] != differences[1]:
        logger.warning(
            "uncommitted changes are %s from here on, not %s", start["diff"] or "none", last["diff"] or "none"
        )


def _code(directory, name: str) -> dict:
    """Which code runs; all empty outside of a checkout, or in one that does not track this package.

    Returns:
      `revision` of the checkout, "+" after it if there are changes; `diff`, the file that has them; `untracked`, the
      files that git neither tracks nor ignores: their names, as the difference does not have them.
    """
    package = Path(__file__).parents[1]
    if not _git(package, "ls-files", "__init__.py"):
        return {"revision": "", "diff": "", "untracked": []}
    revision = _git(package, "describe", "--always", "--abbrev=40", "--dirty=+").strip()
    root = Path(_git(package, "rev-parse", "--show-toplevel").rstrip("\n"))
    difference = redact(_git(root, "diff", "HEAD"))
    if len(difference.encode()) > MAX_DIFF_BYTES:
        kept = difference.encode()[:MAX_DIFF_BYTES].decode(errors="ignore")
        difference = f"{kept}\n[cut here: {len(difference.encode())} bytes in all]\n"
    if difference:
        replace_text(directory / f"{name}.diff", difference)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    if len(untracked) > MAX_UNTRACKED:
        untracked = [*untracked[:MAX_UNTRACKED], f"[and {len(untracked) - MAX_UNTRACKED} more]"]
    return {
        "revision": revision,
        "diff": f"{name}.diff" if difference else "",
        "untracked": [redact(path) for path in untracked],
    }


def _git(directory: Path, *arguments: str) -> str:
    """What a git command prints; "" where there is no git, no checkout, or no answer within a minute."""
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")
