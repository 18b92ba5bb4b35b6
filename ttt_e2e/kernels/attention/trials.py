"""Tries backends of window attention on a problem: checks their results, and times them.

Shapes: `T` queries, `K` cached keys, `N` query heads, `G` key/value heads, `H` head width.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_e2e.kernels.attention.problems import Problem
from ttt_e2e.kernels.attention.window_attention import window_attention

MAX_RATIO = 3  # of an error to that of `xla`, whose products are rounded likewise; more is a defect
SMALLEST = 1e-5  # relative errors below it are none: statistics are float32
REPEATS = 5
ORACLE = partial(window_attention, backend="xla")


class Trial(NamedTuple):
    """The result of trying one candidate."""

    seconds: float = float("inf")
    rejected: str = ""  # why, in one line

    def __str__(self):
        """As in the log."""
        return self.rejected or f"{1e3 * self.seconds:.3g} ms"


def run(problem: Problem, candidates: dict[str, Callable]) -> dict[str, Trial]:
    """A trial of each candidate, a function of the arguments of `window_attention`.

    All get the same random numbers, rounded to the problem's dtype. Results are compared with those of `ORACLE` in
    float32, and the error with that of `ORACLE` in the problem's dtype.
    """
    exact = _numbers(problem)
    narrow = {name: a.astype(problem.dtypes[0]) for name, a in exact.items()}
    wide = {name: a.astype(np.float32) for name, a in narrow.items()}
    with jax.default_matmul_precision("highest"):
        wide |= _recorded(problem, wide)
        expected = _results(problem, ORACLE, wide)[0]
    narrow |= _recorded(problem, narrow)
    usual = _errors(_results(problem, ORACLE, narrow)[0], expected)
    return {name: _try(problem, attend, narrow, expected, usual) for name, attend in candidates.items()}


def _try(problem: Problem, attend: Callable, arrays: dict, expected, usual: list[float]) -> Trial:
    """Runs and times one candidate; `usual` are the errors of the oracle's results in the same dtype."""
    try:
        results, seconds = _results(problem, attend, arrays, repeats=REPEATS)
    except Exception as error:  # compilers raise what they like, and whatever it is, there are other candidates
        reason = (str(error).splitlines() or [""])[0]
        return Trial(rejected=f"failed ({type(error).__name__}: {reason[:200]})")
    errors = _errors(results, expected)
    ratio = max(error / max(least, SMALLEST) for error, least in zip(errors, usual, strict=True))
    return Trial(seconds) if ratio <= MAX_RATIO else Trial(rejected=f"wrong (its error is {ratio:.2g} times xla's)")


def _numbers(problem: Problem) -> dict[str, np.ndarray]:
    """Queries, new and cached keys and values, tangents `y_*` of those that are new, and a cotangent of the output."""
    T, K, N, G, H = problem[1:6]
    shapes = {"q": (N, T, H), "k": (G, T, H), "v": (G, T, problem.value_width)}
    shapes |= {f"y_{name}": shape for name, shape in shapes.items()}
    shapes |= {"cached_k": (G, K, H), "cached_v": (G, K, problem.value_width), "bar": (N, T, problem.value_width)}
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _recorded(problem: Problem, arrays: dict) -> dict:
    """The output and lse of an earlier call, where the caller gives them."""
    if not problem.is_recorded:
        return {}
    call = _call(problem._replace(is_recorded=False, with_lse=True), ORACLE, problem.num_cached // 3)
    out_NTH, lse_NT = jax.jit(call)(arrays)
    return {"out": out_NTH, "lse": lse_NT}


def _call(problem: Problem, attend: Callable, num_empty):
    """The call, as a function of a dict of arrays."""

    def call(x: dict):
        options = {"window": problem.window, "derivatives": problem.derivatives, "with_lse": problem.with_lse}
        if problem.num_cached:
            options |= {"cached_k": x["cached_k"], "cached_v": x["cached_v"]}
        if problem.may_be_empty:
            options["num_empty"] = num_empty
        if problem.is_recorded:
            options["recorded"] = (x["out"], x["lse"])
        return attend(x["q"], x["k"], x["v"], **options)

    return call


def _results(problem: Problem, attend: Callable, arrays: dict, repeats: int = 0):
    """Results and gradients of the passes that such a caller takes, and their seconds: the least of the repeats."""
    passes = {"first_order": (_reverse,), "reverse_of_tangent": (_reverse_of_tangent,)}
    results, total = [], 0.0
    for function in passes.get(problem.derivatives, (_reverse, _reverse_of_tangent)):
        num_empty = jnp.int32(problem.num_cached // 3)
        program = jax.jit(lambda x, n, function=function: function(_call(problem, attend, n), x))
        arguments = jax.device_put((arrays, num_empty))
        compiled = program.lower(*arguments).compile()
        results.append(jax.block_until_ready(compiled(*arguments)))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
        total += min(seconds, default=0.0)
    return results, total


def _reverse(call, x: dict):
    """The output and the gradients of all keys, values and queries."""
    moving = {name: x[name] for name in ("q", "k", "v", "cached_k", "cached_v")}
    out, pullback = jax.vjp(lambda z: call(x | z), moving)
    return out, pullback(_bars(out, x))


def _reverse_of_tangent(call, x: dict):
    """The output, its tangent along `y_*` of queries, new keys and values, and the gradients of both."""
    new = ("q", "k", "v")

    def with_tangent(x):
        return jax.jvp(lambda z: call(x | z), ({n: x[n] for n in new},), ({n: x[f"y_{n}"] for n in new},))

    moving = {name: x[name] for name in (*new, "cached_k", "cached_v", *(f"y_{n}" for n in new))}
    out, pullback = jax.vjp(lambda z: with_tangent(x | z), moving)
    return out, pullback(jax.tree.map(lambda a: _bars(a, x), out))


def _bars(out, x: dict):
    """Cotangents in the shapes of `out`: an output [N, T, H], or that and lse [N, T]."""
    return jax.tree.map(lambda a: (x["bar"] if a.ndim == 3 else x["bar"][..., 0]).astype(a.dtype), out)


def _errors(actual, expected) -> list[float]:
    """The relative error of each result."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [relative_error(*pair) for pair in pairs]


def relative_error(actual, expected) -> float:
    """The error of an array by Euclidean norm, relative to the expected one; infinite where it is not a number."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-100)
    return float(error) if np.isfinite(error) else float("inf")
