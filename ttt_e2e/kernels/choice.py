"""What `auto` takes for a run: backends of window attention, checked and timed on the device at the run's own shapes.

Whatever is wrong, does not compile or is slower is rejected. Verdicts are kept in a file, for the runs that follow.
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
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import problems, trials
from ttt_e2e.kernels.problems import Problem
from ttt_e2e.kernels.window_attention import window_attention

logger = logging.getLogger(__name__)


def check(model) -> None:
    """Raises a `UserError` where `config.model.attention_backend` cannot compute such a model here."""
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
        is_known=False,
    )
    if obstacle := problems.obstacle(model.attention_backend, problem):
        legal = [name for name in problems.BACKENDS if not problems.obstacle(name, problem)]
        raise UserError(
            f"config.model.attention_backend is {model.attention_backend!r}, which {obstacle}: "
            f"legal here are auto, {', '.join(legal)}"
        )


def measure(
    trace: Callable[[], Any], candidates: dict[str, Callable] | None = None, file: Path | None = None
) -> dict[Problem, str]:
    """Decides what `auto` takes for each call of window attention in a program, and returns it; on CPUs nothing.

    All processes of a run call this together: the first one measures, or finds it in the file, and tells the others.

    Args:
      trace: traces the program, and runs nothing. What it traced is forgotten, so as to be traced with the verdicts.
      candidates: name -> function of the arguments of `window_attention`; by default the backends that can do it.
      file: of verdicts; by default in the user's cache directory.
    """
    if candidates is None and targets.current().platform == "cpu":
        return {}
    jax.clear_caches()  # what JAX remembers of a function is not traced, and would not be noted
    with problems.noting() as noted:
        trace()
    names = {p: tuple(candidates or backends) for p, backends in noted.items() if problems.is_at_hand(p.kind)}
    if not names:
        return {}
    chosen = np.zeros(len(names), np.int32)  # of each problem, the number of the candidate
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
    """Where verdicts are kept: `$XDG_CACHE_HOME/ttt_e2e/attention.json`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_e2e" / "attention.json"


def _decide(names: dict[Problem, tuple[str, ...]], candidates, file: Path) -> dict[Problem, str]:
    """The fastest right candidate of each problem, from the file where it is there."""
    known = _read(file)
    decided, new = {}, {}
    for problem, backends in names.items():
        backend = known.get(_key(problem))
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


# ---- the file: {"versions": of what verdicts depend on, "verdicts": {problem: backend}}


def _key(problem: Problem) -> str:
    return json.dumps(problem)


def _versions() -> dict[str, str]:
    """Of JAX, and of the kernels: a digest of their code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return {"jax": jax.__version__, "kernels": digest.hexdigest()[:16]}


def _read(file: Path) -> dict[str, str]:
    """Verdicts; none where the file is missing, damaged or of another version."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        versions, verdicts = content["versions"], dict(content["verdicts"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
            json.dump({"versions": _versions(), "verdicts": verdicts}, new, indent=1)
        os.replace(new.name, file)
    except OSError as error:
        logger.warning("%s cannot be written, and what was measured will be again: %s", file, error)
