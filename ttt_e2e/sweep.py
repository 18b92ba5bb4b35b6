"""Makes the points of a sweep: the product of the lists that a config file's `sweep()` returns (docs/sweeps.md)."""

import hashlib
import itertools
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ttt_e2e.checkpoints.progress import load_progress
from ttt_e2e.config import Config, suggestion
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, load_sweep, override
from ttt_e2e.runs.directory import load_config, refuse_secrets

MAX_NAME = 120  # characters of a directory name; file systems take 255 bytes
# Sections that must not change once a point has a run, as its results depend on them. Others, such as the mesh, may.
FIXED_SECTIONS = ("model", "inner", "train", "optimizer", "data")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    overrides: dict  # {"section.field": value}, and "arg": ARG of the config file
    config: Config
    workdir: Path


def make_points(spec: str, overrides: list[str], chosen: list[str], output: Path) -> list[Point]:
    """Makes the points of a sweep: the product of the named sweeps of a config file, in their order.

    Args:
      spec: the config file, "FILE.py" or "FILE.py:ARG".
      overrides: `--config.section.field=value`, applied to all points.
      chosen: names of the sweeps to multiply; none = all.
      output: directory of the sweep.

    Raises:
      UserError: `sweep()` does not return what docs/sweeps.md says, or a point has no legal config.
    """
    sweeps = _alternatives(spec, load_sweep(spec))
    for name in chosen:
        if name not in sweeps:
            raise UserError(f"--sweeps names {name!r}, which {spec} has not: {suggestion(name, list(sweeps))}")
    factors = [sweeps[name] for name in sweeps if name in (chosen or sweeps)]
    fixed = {argument.removeprefix("--config.").partition("=")[0] for argument in overrides}
    fixed |= {"arg"} if ":" in spec else set()
    points = [_point(spec, overrides, fixed, alternatives, output) for alternatives in itertools.product(*factors)]
    for name, count in Counter(point.name for point in points).items():
        if count > 1:
            raise UserError(f"sweep() of {spec} has {count} points that are the same: {name}")
    return points


def _alternatives(spec: str, sweeps) -> dict[str, list[dict]]:
    """Normalises each named sweep to a list of dicts of overrides.

    An alternative that is a plain value sets the field that the sweep is named after. Raises `UserError` for anything
    that docs/sweeps.md does not allow.
    """
    if not isinstance(sweeps, dict) or not sweeps:
        raise UserError(f"sweep() of {spec} gives {sweeps!r}, but it takes a dict of named sweeps")
    normalised = {}
    for name, alternatives in sweeps.items():
        if not isinstance(alternatives, (list, tuple)) or not alternatives:
            raise UserError(f"sweep() of {spec} has {name!r}: {alternatives!r}, but it takes a list of alternatives")
        normalised[name] = [value if isinstance(value, dict) else {name: value} for value in alternatives]
        for field in itertools.chain(*normalised[name]):
            if field != "arg" and field.count(".") != 1:
                raise UserError(f"sweep() of {spec} names {field!r} in {name!r}, but a field is section.field, or arg")
    return normalised


def _point(spec: str, overrides: list[str], fixed: set[str], alternatives: tuple[dict, ...], output: Path) -> Point:
    """Makes the point of one alternative from each sweep; `fixed` are the fields that the command line sets."""
    merged = {}
    for alternative in alternatives:
        for field, value in alternative.items():
            if field in merged or field in fixed:
                where = "--config" if field in fixed else "another of its sweeps"
                raise UserError(f"sweep() of {spec} sets {field}, which {where} sets too")
            merged[field] = value
    if not isinstance(merged.get("arg", ""), str):
        raise UserError(f"sweep() of {spec} has the arg {merged['arg']!r}, but it takes a string")
    base = load_config_file(f"{spec}:{merged['arg']}" if "arg" in merged else spec)
    config = override(base, overrides, {field: value for field, value in merged.items() if field != "arg"})
    refuse_secrets(config)
    name = _name({field: _resolved(config, field, value) for field, value in merged.items()})
    return Point(name, merged, config, output / name)


def _resolved(config: Config, field: str, value):
    """The value of a field as the config stores it, so that 1 and 1.0 are the same point."""
    section, _, name = field.partition(".")
    return value if field == "arg" else getattr(getattr(config, section), name)


def _name(overrides: dict) -> str:
    """Directory name of a point: its overrides `section.field=value`, joined; shortened to `MAX_NAME` and a hash."""
    text = "_".join(f"{field}={value}" for field, value in overrides.items())
    name = re.sub(r"[^\w.=+-]", "-", text)
    if name == text and len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_unchanged(point: Point) -> None:
    """Raises `UserError` where the run directory has a run of the same name and another config."""
    if not (point.workdir / "config.json").exists():
        return
    ours, theirs = asdict(point.config), asdict(load_config(point.workdir))
    for section in FIXED_SECTIONS:
        for field, value in ours[section].items():
            if value != theirs[section][field]:
                raise UserError(
                    f"{point.workdir} has config.{section}.{field} = {theirs[section][field]!r}, but the sweep now "
                    f"says {value!r}: choose another --output, or remove that run"
                )


def seems_whole(workdir: Path, step: int) -> bool:
    """Whether a checkpoint has all of its items, and an undamaged record of its progress.

    Reads no array, as there may be hundreds of runs, and starts no JAX device, as the runs need them.
    """
    directory = workdir / "checkpoints" / str(step)
    if not all((directory / item / "_METADATA").is_file() for item in ("params", "optimizer")):
        return False
    try:
        return load_progress(directory)["step"] == step
    except UserError:
        return False
