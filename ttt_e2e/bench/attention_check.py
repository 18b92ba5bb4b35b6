"""`ttt-e2e bench attention_check`: the error of every pass of every backend of window attention, against float64.

For the first minute on a new machine: says whether the kernels compute the right numbers there. Where their device is
missing, kernels are interpreted, so that the check itself can be tried anywhere.

Shapes: those of kernels/attention/xla.py.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ttt_e2e import targets
from ttt_e2e.bench import table
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.attention import backends, xla
from ttt_e2e.kernels.attention.trials import MAX_RATIO, SMALLEST, relative_error
from ttt_e2e.kernels.precision import matmul_precision
from ttt_e2e.progress import progress_bar

PASSES = ("forward", "tangent", "dual", "reverse", "second_reverse")
KERNELS = backends.names("passes", "", "gpu")  # checked in all five passes
FUSED = backends.names("fused", "gpu")  # in forward and reverse, where queries and keys are the same positions

logger = logging.getLogger(__name__)


def run(  # noqa: PLR0913 -- each is a flag
    output,
    *,
    variants=(*KERNELS, *FUSED),
    head_dims=(64, 80, 128),
    dtypes=("bfloat16", "float16"),
    seq_len: int = 320,
    cached: int = 500,
    window: int = 400,
    num_empty: int = 30,
    heads_per_key_head: int = 2,
    batch: int = 2,
) -> list[dict]:
    """Checks every combination, writes the errors to the directory `output`, returns the rows; fails if one is large.

    A row is one pass: the `relative_error` of its worst result, by Euclidean norm, and the `ratio` of that error to the
    error of `xla` in the same dtype. A variant that cannot run here has a row that says why.
    """
    for variant in variants:
        if variant not in KERNELS + FUSED:
            raise UserError(f"--variants={variant}: legal are {', '.join(KERNELS + FUSED)}")
    rows = []
    cases = [(H, dtype) for H in head_dims for dtype in dtypes]
    for H, dtype in progress_bar(cases, desc="bench attention_check", unit="case"):
        sizes = {"seq_len": seq_len, "cached": cached, "window": window, "head_dim": H, "dtype": dtype}
        shape = (batch, heads_per_key_head, seq_len, cached, H)
        for variant in variants:
            check = _fused_errors if variant in FUSED else _errors
            for name, figures in check(variant, shape, window, num_empty, jnp.dtype(dtype)).items():
                rows.append({"variant": f"{variant}/{name}"} | sizes | figures)
    text = table.write(output, rows, "Errors of window attention against float64")
    print(text)
    wrong = [f"{row['variant']} ({row['dtype']}, head width {row['head_dim']})" for row in rows if not _is_right(row)]
    if wrong:
        raise UserError(f"attention_check: wrong, see {output}/results.md: {', '.join(wrong)}")
    return rows


def _is_right(row: dict) -> bool:
    return "ratio" not in row or row["relative_error"] <= SMALLEST or row["ratio"] <= MAX_RATIO


def _operands(shape, window: int, num_empty: int, dtype, wide) -> dict:
    """Operands of every pass, the numbers exact in `dtype`, as `wide`; only new keys have tangents."""
    B, R, T, C, H = shape
    random = np.random.default_rng(0)

    def array(*sizes):
        return jnp.asarray(np.asarray(random.normal(size=sizes).astype(dtype), np.float64), wide)

    def rows():
        return array(B, 1, R, T, H)

    def statistics():
        return array(B, 1, R, T).astype(jnp.promote_types(wide, jnp.float32))

    num_empty = jnp.arange(B, dtype=jnp.int32) % 2 * min(num_empty, C)
    x = rows(), array(B, 1, C + T, H), array(B, 1, C + T, H), num_empty
    y = rows(), array(B, 1, T, H), array(B, 1, T, H)
    bars = rows(), statistics(), rows(), statistics()
    return pass_operands(x, y, bars, window)


def pass_operands(x, y, bars, window: int) -> dict:
    """Operands of every pass at the point x = (q, k, v, num_empty), with tangents y and four cotangents `bars`."""
    out = xla.forward(*x, window=window)
    out_dot = xla.tangent(*x, *out, *y, window=window)
    return {
        "forward": x,
        "tangent": (*x, *out, *y),
        "dual": (*x, *y),
        "reverse": (*x, *out, *bars[:2]),
        "second_reverse": (*x, *out, *y, *out_dot, *bars),
    }


def _run(module, name: str, operands, window: int):
    options = {"num_keys": operands[1].shape[-2]} if "reverse" in name else {}
    run = matmul_precision(operands[0].dtype)(getattr(module, name))
    return jax.jit(partial(run, window=window, **options))(*operands)


def _errors(variant: str, shape, window: int, num_empty: int, dtype) -> dict:
    """Figures of every pass, by name."""
    module = backends.load(variant)
    if targets.current().platform == "cpu" and variant != "xla" and not module.can_interpret():
        return {"all": {"skipped": f"JAX {jax.__version__} does not interpret it"}}
    with jax.enable_x64(True):
        exact = _operands(shape, window, num_empty, dtype, jnp.float64)
        expected = {name: list(map(np.asarray, _run(xla, name, exact[name], window))) for name in PASSES}
    operands = _operands(shape, window, num_empty, dtype, dtype)
    rows = {}
    for name in PASSES:
        try:
            ours = jax.block_until_ready(_run(module, name, operands[name], window))
        except (RuntimeError, ValueError, NotImplementedError) as error:
            # The kernel's compiler refused it: the check fails in the end, but first tries the other passes.
            logger.exception("%s/%s, %s, head width %d", variant, name, dtype, shape[-1])
            rows[name] = {"relative_error": float("inf"), "ratio": float("inf"), "failed": str(error)[:100]}
        else:
            theirs = ours if module is xla else _run(xla, name, operands[name], window)
            rows[name] = _figures(ours, theirs, expected[name])
    return rows


def _fused_errors(variant: str, shape, window: int, num_empty: int, dtype) -> dict:
    """Figures of forward and reverse, by name."""
    if targets.current().platform != "gpu":
        return {"all": {"skipped": "needs an NVIDIA GPU"}}
    B, R, T, _, H = shape
    random = np.random.default_rng(0)
    exact = [np.asarray(random.normal(size=(B, n, T, H)).astype(dtype), np.float64) for n in (R, 1, 1, R)]

    def results(backend, as_dtype):
        *x, bar = (jnp.asarray(a, as_dtype) for a in exact)
        options = {"window": min(window, T), "derivatives": "first_order", "backend": backend}

        def program(bar, *x):
            out, pullback = jax.vjp(jax.vmap(partial(window_attention, **options)), *x)
            return {"forward": [out], "reverse": pullback(bar)}

        return jax.tree.map(np.asarray, jax.jit(program)(bar, *x))

    ours, theirs = results(variant, dtype), results("xla", dtype)
    with jax.enable_x64(True):
        expected = results("xla", jnp.float64)
    return {name: _figures(ours[name], theirs[name], expected[name]) for name in expected}


def _figures(ours, theirs, truths) -> dict:
    """The worst result's error, and the worst ratio to the error of `theirs`."""
    pairs = [
        (relative_error(a, truth), relative_error(b, truth)) for a, b, truth in zip(ours, theirs, truths, strict=True)
    ]
    ratio = max(error / max(usual, SMALLEST) for error, usual in pairs)
    return {"relative_error": max(error for error, _ in pairs), "ratio": ratio}
