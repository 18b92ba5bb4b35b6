"""Reading what a run directory tells about its run.

It holds `config.json` and `metrics.jsonl`, and once evaluated `evaluation/metrics.json`, `evaluation/token_nll.npy`
and, where the model has fast weights, `evaluation/token_nll_without_learning.npy`; and the results of those evaluations
of long contexts that were made, `evaluation/NAME.json`. Losses are in nats per token.
Shapes: `T` positions of a sequence.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.runs.directory import load_config
from ttt_e2e.runs.files import read_json
from ttt_e2e.runs.metrics import read_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What is known of one run: its name among the others, and the lines of its metrics in the order of their steps.

    What follows `held_out` is None where it has not been evaluated (so), `nll_without_learning_T` also where the model
    has no fast weights.
    """

    name: str
    config: Config
    training: list[dict]
    held_out: list[dict]
    metrics: dict | None
    nll_T: np.ndarray | None
    nll_without_learning_T: np.ndarray | None
    context_lengths: dict | None
    needle: dict | None
    generation: dict | None


# The fields of each evaluation of long contexts that a report reads.
LONG_CONTEXT = {
    "context_lengths": ("lengths", "scored_tokens", "num_stretches"),
    "needle": ("lengths", "depths", "samples", "tasks", "cells"),
    "generation": ("judge", "num_samples", "prompt_tokens", "generated", "reference"),
}


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs of these directories, in their order; a sweep directory stands for its runs that have begun.

    Raises `UserError` if there are none, if one is no run directory or named twice, or for a file that cannot be read.
    """
    if not workdirs:
        raise UserError("--workdirs is empty, but it takes one or more run directories")
    paths = [path for workdir in workdirs for path in _expand(Path(os.path.abspath(workdir)))]
    return [_read_run(path, name) for path, name in zip(paths, _names(paths))]


def _expand(workdir: Path) -> list[Path]:
    """A run directory itself; of the directory of a sweep (docs/sweeps.md), its points that have made a step."""
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


def _has_begun(workdir: Path) -> bool:
    path = workdir / "metrics.jsonl"
    return path.is_file() and any("loss" in line for line in read_metrics(path))


def _names(paths: list[Path]) -> list[str]:
    """The end of each path, as short as tells it from the others."""
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--workdirs names {path} twice")

    def is_unique(end):
        return sum(other.parts[-len(end) :] == end for other in paths) == 1

    ends = [[path.parts[-n:] for n in range(1, len(path.parts) + 1)] for path in paths]
    return ["/".join(next(end for end in of_path if is_unique(end))) for of_path in ends]


def _read_run(workdir: Path, name: str) -> Run:
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is no run directory: it has no config.json")
    config = load_config(workdir)
    lines = read_metrics(workdir / "metrics.jsonl")
    # A run that was killed and resumed logs the steps since its checkpoint again: the later line counts.
    training = {line["step"]: line for line in lines if "loss" in line}
    held_out = {line["step"]: line for line in lines if "eval_loss" in line}
    if not training:
        raise UserError(f"{workdir / 'metrics.jsonl'} holds no training step yet")
    by_step = [[of[step] for step in sorted(of)] for of in (training, held_out)]
    folder = workdir / "evaluation"
    long_context = {of: _read_result(folder / f"{of}.json", fields) for of, fields in LONG_CONTEXT.items()}
    return Run(name, config, *by_step, *_read_evaluation(folder), **long_context)


def _read_result(path: Path, fields: tuple[str, ...]) -> dict | None:
    """The result of an evaluation of long contexts; None where there is none."""
    if not path.is_file():
        return None
    result = read_json(path)
    for field in fields:
        if field not in result:
            raise UserError(f"{path} has no {field!r}: evaluate the run again")
    return result


def _read_evaluation(folder: Path):
    """Contents of `metrics.json`, and mean NLL [T] with and without learning; each None where there is none."""
    if not (folder / "metrics.json").is_file():
        return None, None, None
    metrics = read_json(folder / "metrics.json")
    for field in ("loss", "token_loss", "seq_len", "step"):
        if field not in metrics:
            raise UserError(f"{folder / 'metrics.json'} has no {field!r}: evaluate the run again")
    nll_T = _read_nll(folder / "token_nll.npy", metrics["seq_len"])
    if "loss_without_learning" not in metrics:
        return metrics, nll_T, None
    return metrics, nll_T, _read_nll(folder / "token_nll_without_learning.npy", metrics["seq_len"])


def _read_nll(path: Path, seq_len: int) -> np.ndarray:
    """Mean over sequences [T] of the array [sequences, T] in a file; BOS targets count here."""
    try:
        nll = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: evaluate the run again") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable .npy array: {error}") from None
    if nll.ndim != 2 or nll.shape[0] == 0 or nll.shape[1] != seq_len or nll.dtype.kind != "f":
        raise UserError(f"{path} holds {nll.dtype} {list(nll.shape)}, but it takes floats [sequences, {seq_len}]")
    return nll.mean(axis=0, dtype=np.float64)
