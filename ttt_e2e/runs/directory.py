"""The run directory: `config.json`, and the record of every start of the run, `starts.jsonl` and `starts/`."""

import calendar
import json
import logging
import subprocess
import time
from pathlib import Path

import jax
from etils import epath

from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.config import Config, from_config_dict, to_dict
from ttt_e2e.errors import JSON_ERRORS, UserError
from ttt_e2e.outputs import writing
from ttt_e2e.paths import absolute
from ttt_e2e.runs.files import read_json, read_text, replace_text
from ttt_e2e.runs.resume import check_resume, log_changes
from ttt_e2e.runs.secrets import find_secrets, redact
from ttt_e2e.strict_json import to_json

logger = logging.getLogger(__name__)

MAX_DIFF_BYTES = 1_000_000
MAX_UNTRACKED = 200  # names of untracked files that are recorded
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def check(workdir, config: Config) -> None:
    """Checks that a run directory is new, or that its run may be resumed with this config. Writes nothing.

    Raises:
      UserError: it holds a run from which a field differs that may not (resume.py; the message names the field), or one
        of more steps than `train.num_steps`; or the config holds a secret.
    """
    refuse_secrets(config)
    newest = max(saved_steps(epath.Path(workdir) / "checkpoints"), default=0)
    if newest > config.train.num_steps:
        raise UserError(
            f"config.train.num_steps is {config.train.num_steps}, but workdir {workdir} has made {newest} steps: set "
            f"--config.train.num_steps={newest} or more, or choose another workdir"
        )
    if (epath.Path(workdir) / "config.json").exists():
        check_resume(workdir, config, load_config(workdir), newest > 0)


def claim(workdir, config: Config) -> None:
    """Writes `config.json` into a run directory, and logs what a resumed run changes. Raises `UserError` as `check`."""
    check(workdir, config)
    if jax.process_index() == 0:
        directory = epath.Path(workdir)
        if (directory / "config.json").exists() and saved_steps(directory / "checkpoints"):
            log_changes(config, load_config(workdir))
        write_config(workdir, config)


def write_config(workdir, config: Config) -> None:
    """Writes `config.json`, whole or not at all."""
    directory = epath.Path(workdir)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / "config.json", to_json(to_dict(config), indent=2) + "\n")


def refuse_secrets(config: Config) -> None:
    """Raises `UserError` if a field holds a credential, which everyone who can read `config.json` would see."""
    if field := find_secrets(to_dict(config)):
        raise UserError(
            f"{field} holds a credential (a password in a URL, or the value of a secret environment variable), which "
            "the run directory would show: leave it in the environment"
        )


def find_run(path) -> epath.Path:
    """The run directory that a path refers to: itself, or the one that holds this checkpoint.

    Raises:
      UserError: neither it nor the two directories above have a `config.json`.
    """
    path = absolute(path)
    for directory in (path, path.parent, path.parent.parent):  # WORKDIR/checkpoints/STEP
        if (directory / "config.json").exists():
            return directory
    raise UserError(f"{path} is no run directory, and no checkpoint in one: there is no config.json")


def load_config(workdir) -> Config:
    """Loads the resolved config of a run. Raises `UserError` if it is missing or damaged."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"workdir {workdir} holds no run: it has no config.json")
    values = read_json(path)
    try:
        return from_config_dict(values)
    except (UserError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def record_start(workdir, overrides: list[str], policies: dict[str, str], started: float = 0.0) -> None:
    """Appends a line for this start of the run to `starts.jsonl`: time, overrides, code revision, devices, policies.

    For start N, counted from 1, the resolved config is in `starts/N.json` and, if the checkout has uncommitted changes,
    their diff in `starts/N.diff`; the line names both files.

    Args:
      workdir: the run directory.
      overrides: of the config, as given on the command line.
      policies: what was chosen for the fields that are "auto".
      started: its time, in seconds since 1970; 0 = the present time.
    """
    devices = [device.device_kind for device in jax.devices()]
    if jax.process_index() != 0:
        return
    directory = epath.Path(workdir)
    with writing(directory):
        (directory / "starts").mkdir(parents=True, exist_ok=True)
    path = directory / "starts.jsonl"
    before = read_text(path) if path.exists() else ""
    name = f"starts/{before.count(chr(10)) + 1}"
    start = {
        "time": time.strftime(TIME_FORMAT, time.gmtime(started or time.time())),
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
    if saved_steps(directory / "checkpoints"):
        _warn_of_other_code(directory, before, start)
    replace_text(path, before + to_json(start) + "\n")


def first_start(workdir) -> float:
    """Time of the run's first start, in seconds since 1970; the present time if it is not recorded."""
    path = epath.Path(workdir) / "starts.jsonl"
    try:
        start = json.loads(read_text(path).split("\n", 1)[0])
        return float(calendar.timegm(time.strptime(start["time"], TIME_FORMAT)))
    except (UserError, *JSON_ERRORS, KeyError, TypeError):
        return time.time()


def _warn_of_other_code(directory, before: str, start: dict) -> None:
    """Logs a warning if the code revision, the uncommitted diff or the version of JAX differs from the last start's.

    before: the text of `starts.jsonl`. start: the new line of it, as a dict.
    """
    try:
        last = json.loads(before.splitlines()[-1])
        versions = {name: (last[name], start[name]) for name in ("revision", "jax")}
        diffs = [read_text(directory / line["diff"]) if line["diff"] else "" for line in (last, start)]
    except (IndexError, KeyError, TypeError, *JSON_ERRORS, UserError):  # no start before, or its record is damaged
        return
    for name, (theirs, ours) in versions.items():
        if ours != theirs:
            logger.warning("%s is %s from here on; until now it was %s", name, ours or "unknown", theirs or "unknown")
    if versions["revision"][0] == versions["revision"][1] and diffs[0] != diffs[1]:
        logger.warning(
            "uncommitted changes are %s from here on, not %s", start["diff"] or "none", last["diff"] or "none"
        )


def _code(directory, name: str) -> dict:
    """Describes the code that runs, and writes its uncommitted changes to `NAME.diff`.

    Returns:
      `revision` of the git checkout, followed by "+" if there are changes; `diff`, the file with these; `untracked`,
      names of the files that git neither tracks nor ignores, which are not in the diff. All are empty outside of a
      checkout, and in one that does not track this package.
    """
    package = Path(__file__).parents[1]
    if not _git(package, "ls-files", "__init__.py"):
        return {"revision": "", "diff": "", "untracked": []}
    revision = _git(package, "describe", "--always", "--abbrev=40", "--dirty=+").strip()
    root = Path(_git(package, "rev-parse", "--show-toplevel").rstrip("\n"))
    diff = redact(_git(root, "diff", "HEAD"))
    if len(diff.encode()) > MAX_DIFF_BYTES:
        beginning = diff.encode()[:MAX_DIFF_BYTES].decode(errors="ignore")
        diff = f"{beginning}\n[cut here: {len(diff.encode())} bytes in all]\n"
    if diff:
        replace_text(directory / f"{name}.diff", diff)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    if len(untracked) > MAX_UNTRACKED:
        untracked = [*untracked[:MAX_UNTRACKED], f"[and {len(untracked) - MAX_UNTRACKED} more]"]
    return {
        "revision": revision,
        "diff": f"{name}.diff" if diff else "",
        "untracked": [redact(path) for path in untracked],
    }


def _git(directory: Path, *arguments: str) -> str:
    """Output of a git command; "" if there is no git, no checkout, or no answer within a minute."""
    try:
        result = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.decode(errors="replace")
