"""Decides which backend `auto` takes for a run: checks and times them on the device, at the run's own shapes.

A backend that is wrong, does not compile or is slower is rejected. Verdicts, the names of the backends that were
chosen, are stored in a file for the runs that follow.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttt_e2e import targets
from ttt_e2e.errors import JSON_ERRORS, UserError
from ttt_e2e.kernels.attention import problems, trials
from ttt_e2e.kernels.attention.backends import REGISTRY
from ttt_e2e.kernels.attention.problems import Problem
from ttt_e2e.kernels.attention.window_attention import window_attention
from ttt_e2e.strict_json import to_json

logger = logging.getLogger(__name__)


def check(model) -> None:
    """Raises a `UserError` where the backend named in `config.model`, `model`, cannot compute such a model here."""
    if model.attention_backend == "auto":
        return
    problem = Problem(
        kind=targets.current().kind,
        num_queries=1,
        num_cached=0,
        num_heads=model.num_attention_heads,
        num_key_heads=model.num_key_value_heads,
        width=model.head_dim,
        value_width=model.head_dim,
        dtypes=(model.compute_dtype,),
        window=model.sliding_window,
        may_be_empty=False,
        derivatives="first_order",
        with_lse=False,
        is_recorded=False,
    )
    if obstacle := problems.obstacle(model.attention_backend, problem):
        legal = [name for name in REGISTRY if not problems.obstacle(name, problem)]
        raise UserError(
            f"config.model.attention_backend is {model.attention_backend!r}, which {obstacle}: "
            f"legal here are auto, {', '.join(legal)}"
        )


def measure(
    trace: Callable[[], Any], candidates: dict[str, Callable] | None = None, file: Path | None = None
) -> dict[Problem, str]:
    """Decides what `auto` takes for each call of window attention in a program; returns the verdicts. On CPUs: none.

    All processes of a run call this together: the first one measures, or reads the file, and tells the others.

    Args:
      trace: traces the program, and runs nothing. JAX's caches are cleared after it, so that the program is traced
        again, with the verdicts.
      candidates: name -> function of the arguments of `window_attention`; by default the backends that can do it.
      file: of verdicts; by default in the user's cache directory.
    """
    if candidates is None and targets.current().platform == "cpu":
        return {}
    jax.clear_caches()  # JAX does not trace again what it has cached, and `noting` would miss it
    with problems.noting() as noted:
        trace()
    names = {p: tuple(candidates or backends) for p, backends in noted.items() if problems.is_at_hand(p.kind)}
    if not names:
        return {}
    chosen = np.zeros(len(names), np.int32)  # for each problem, the index of its backend among the candidates
    if jax.process_index() == 0:
        decided = _decide(names, candidates, file or default_file())
        chosen[:] = [backends.index(decided[problem]) for problem, backends in names.items()]
    if jax.process_count() > 1:
        chosen = multihost_utils.broadcast_one_to_all(chosen)
    verdicts = {problem: backends[i] for (problem, backends), i in zip(names.items(), chosen)}
    problems.measured |= verdicts
    jax.clear_caches()
    return verdicts


def default_file() -> Path:
    """The file of verdicts: `$XDG_CACHE_HOME/ttt_e2e/attention.json`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_e2e" / "attention.json"


def _decide(names: dict[Problem, tuple[str, ...]], candidates, file: Path) -> dict[Problem, str]:
    """The fastest correct candidate for each problem: as the file says, or else by trial, which then goes into it."""
    stored = _read(file)
    decided, new = {}, {}
    for problem, backends in names.items():
        backend = stored.get(_key(problem))
        if len(backends) == 1:
            backend = backends[0]
        elif backend not in backends:
            table = candidates or {name: partial(window_attention, backend=name) for name in backends}
            backend = new[_key(problem)] = _fastest(problem, table)
        decided[problem] = backend
    if new:
        _write(file, _read(file) | new)
    return decided


def _fastest(problem: Problem, table: dict[str, Callable]) -> str:
    """The fastest correct candidate, by trial; logs what each trial gave."""
    try:
        tried = trials.run(problem, table)
    except jax.errors.JaxRuntimeError as error:  # such as too little memory for the oracle
        logger.warning("window_attention, %s: takes xla, as nothing can be checked: %s", problem, error)
        return "xla"
    best = min(tried, key=lambda name: tried[name].seconds)
    if tried[best].rejected:
        raise UserError(f"window_attention, {problem}: no backend works here: {_line(tried)}")
    logger.info("window_attention, %s: takes %s (%s)", problem, best, _line(tried))
    return best


def _line(tried: dict[str, trials.Trial]) -> str:
    return ", ".join(f"{name} {trial}" for name, trial in tried.items())


# ---- the file: {"versions": {"jax": ..., "kernels": ...}, "verdicts": {problem: backend}}


def _key(problem: Problem) -> str:
    return to_json(problem)


def _versions() -> dict[str, str]:
    """The versions that verdicts depend on: JAX's, and a digest of the source files of `ttt_e2e/kernels`."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return {"jax": jax.__version__, "kernels": digest.hexdigest()[:16]}


def _read(file: Path) -> dict[str, str]:
    """The file's verdicts; none where it is missing, damaged or of other versions."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        versions, verdicts = content["versions"], dict(content["verdicts"])
    except FileNotFoundError:
        return {}
    except (OSError, *JSON_ERRORS, KeyError, TypeError) as error:
        logger.warning("%s is damaged and will be written anew: %r", file, error)
        return {}
    if versions != _versions():
        logger.warning("%s is of %s and will be written anew, of %s", file, versions, _versions())
        return {}
    return verdicts


def _write(file: Path, verdicts: dict[str, str]) -> None:
    """Replaces the file at once, so that no reader finds half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".new", delete=False, encoding="utf-8") as new:
            new.write(to_json({"versions": _versions(), "verdicts": verdicts}, indent=1))
        os.replace(new.name, file)
    except OSError as error:
        logger.warning("%s cannot be written, and what was measured will be again: %s", file, error)
