"""Reads run directories for a report: `config.json`, `metrics.jsonl`, and the results of evaluations."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import evaluations
from ttt_e2e.paths import absolute
from ttt_e2e.runs.files import read_json
from ttt_e2e.runs.metrics import read_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run of a report."""

    name: str  # unique among the runs of the report
    config: Config
    training: list[dict]  # lines of metrics.jsonl with a training loss, by ascending step; [] of an imported one
    held_out: list[dict]  # lines with a held-out loss, by ascending step
    results: dict[str, Any]  # by name of the evaluation, what its `read` returns; None = it was not run


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """Reads the runs of these directories, in order; a sweep directory stands for its runs that have made a step.

    Raises `UserError` if there are none, if one is no run directory or is named twice, or if a file cannot be read.
    """
    if not workdirs:
        raise UserError("--workdirs is empty, but it takes one or more run directories")
    paths = [path for workdir in workdirs for path in _expand(absolute(workdir))]
    return [_read_run(path, name) for path, name in zip(paths, _names(paths))]


def _expand(workdir: epath.Path) -> list[epath.Path]:
    """Expands a sweep directory (docs/sweeps.md) to its run directories that have made a step; others to themselves."""
    if not (workdir / "sweep.json").is_file():
        return [workdir]
    try:
        points = [workdir / point["name"] for point in read_json(workdir / "sweep.json")["points"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{workdir / 'sweep.json'} is no list of the points of a sweep: {error!r}") from None
    begun = [point for point in points if _has_begun(point)]
    for point in points:
        if point not in begun:
            logger.warning("%s has made no step yet and is left out", point)
    if not begun:
        raise UserError(f"sweep {workdir} has no run that has made a step yet")
    return begun


def _has_begun(workdir: epath.Path) -> bool:
    path = workdir / "metrics.jsonl"
    return path.is_file() and any("loss" in line for line in read_metrics(path))


def _names(paths: list[epath.Path]) -> list[str]:
    """Names runs by the shortest end of their path that no other path has. Raises `UserError` for equal paths."""
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--workdirs names {path} twice")

    def is_unique(end):
        return sum(other.parts[-len(end) :] == end for other in paths) == 1

    ends = [[path.parts[-n:] for n in range(1, len(path.parts) + 1)] for path in paths]
    return ["/".join(next(end for end in candidates if is_unique(end))) for candidates in ends]


def _read_run(workdir: epath.Path, name: str) -> Run:
    from ttt_e2e.runs.directory import load_config

    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is no run directory: it has no config.json")
    config = load_config(workdir)
    results = {each: evaluation.read(workdir / "evaluation") for each, evaluation in evaluations().items()}
    is_untrained = not (workdir / "metrics.jsonl").exists() and any(results.values())
    lines = [] if is_untrained else read_metrics(workdir / "metrics.jsonl")
    # A run that was killed and resumed logs the steps since its checkpoint again: the later line counts.
    training = {line["step"]: line for line in lines if "loss" in line}
    held_out = {line["step"]: line for line in lines if "eval_loss" in line}
    if not (training or is_untrained):
        raise UserError(f"{workdir / 'metrics.jsonl'} holds no training step yet")
    by_step = [[lines[step] for step in sorted(lines)] for lines in (training, held_out)]
    return Run(name, config, *by_step, results)
