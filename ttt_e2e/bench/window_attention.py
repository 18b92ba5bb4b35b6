"""`ttt-e2e bench window_attention`: time, FLOP/s and memory of attention and its derivatives, blocked and dense.

Shapes: `B` batch, `T` sequence, `N` heads, `H` head width.
"""

import itertools

import jax
import jax.numpy as jnp

from ttt_e2e.bench import compiled, table
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.attention import backends, bands
from ttt_e2e.kernels.precision import matmul_precision

# What is measured, and the matrix products a tile of scores needs for it at least (docs/kernels.md). Each includes the
# passes before it: a gradient its forward, the reverse of the tangent both.
PASSES = {"forward": 2, "reverse": 7, "tangent": 6, "reverse_of_tangent": 21}
FUSED = backends.names("fused")
FUSED_PASSES = ("forward", "reverse")
KERNELS = backends.names("passes", "gpu", "tpu")  # called pass by pass, which works where they are interpreted, too
VARIANTS = tuple(backends.REGISTRY)


def run(  # noqa: PLR0913 -- each is a flag
    output,
    *,
    seq_lens=(1024, 4096),
    cached_lens=(0,),
    windows=(128, 512),
    head_dims=(64,),
    dtypes=("float32",),
    variants=("xla", "reference"),
    num_heads: int = 4,
    batch: int = 1,
    repeats: int = 3,
) -> list[dict]:
    """Measures every combination, writes the results to the directory `output`, returns the rows.

    `cached_lens` are numbers of constant keys before the sequence, as a mini-batch has them in its window cache; a
    window of 0 is full attention. Figures of a row: `flops` of the compiled program's matrix products, `band_flops`
    that the band needs at least, `step_seconds`, `band_flops_per_second`, `temp_bytes`, `compile_seconds`; and where
    cuDNN is among the variants, `rate_vs_cudnn`: FLOP/s of the band in terms of the best that cuDNN reaches in that
    pass at any length (it takes no cached keys), at that head width and dtype.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants={variant}: legal are {', '.join(VARIANTS)}")
    rows = []
    for T, C, window, H, dtype in itertools.product(seq_lens, cached_lens, windows, head_dims, dtypes):
        sizes = {"batch": batch, "seq_len": T, "cached": C, "window": window, "num_heads": num_heads, "head_dim": H}
        for variant in variants:
            if window <= T + C and not (C and variant in FUSED):
                rows += _measure(variant, sizes | {"dtype": dtype}, repeats)
    _compare(rows, "cudnn")
    print(table.write(output, rows, "Window attention"))
    return rows


def _compare(rows: list[dict], variant: str) -> None:
    """Adds to every row its rate relative to the best rate of that variant, where that was measured."""

    def case(row):
        return row["variant"].split("/")[1], row["head_dim"], row["dtype"]

    best = {}
    for row in rows:
        if row["variant"].startswith(f"{variant}/"):
            best[case(row)] = max(best.get(case(row), 0), row["band_flops_per_second"])
    for row in rows:
        if case(row) in best:
            row[f"rate_vs_{variant}"] = row["band_flops_per_second"] / best[case(row)]


def _measure(variant: str, sizes: dict, repeats: int) -> list[dict]:
    """A row for every pass that the variant has."""
    B, T, C, window, N, H, dtype = sizes.values()
    keys = jax.random.split(jax.random.key(0), 10)
    arrays = [jax.random.normal(key, (B, N, C if i < 2 else T, H), dtype) for i, key in enumerate(keys)]
    visible = bands.num_visible(T, T + C, window)
    rows = []
    for name in PASSES:
        if variant in FUSED and name not in FUSED_PASSES:
            continue
        program = _passes(name, variant, window) if variant in KERNELS else _pass(name, variant, window)
        measured = compiled.measure(matmul_precision(dtype)(program), *arrays)
        seconds = compiled.seconds_per_call(measured.call, *arrays, repeats=repeats)
        band_flops = 2 * PASSES[name] * visible * B * N * H
        figures = {
            "flops": measured.flops,
            "band_flops": band_flops,
            "step_seconds": seconds,
            "band_flops_per_second": band_flops / seconds,
            "temp_bytes": measured.temp_bytes,
            "compile_seconds": measured.compile_seconds,
        }
        rows.append({"variant": f"{variant}/{name}"} | sizes | figures)
    return rows


def _pass(name: str, variant: str, window: int):
    """A function of cached keys and values [B, N, C, H] and of [B, N, T, H]: q, k, v, tangents, two cotangents."""
    derivatives = "reverse_of_tangent" if "tangent" in name else "first_order"

    def program(cached_k, cached_v, *arrays):
        x, x_dot, bars = arrays[:3], arrays[3:6], arrays[6:]

        def attend(*x):
            def one(cached_k, cached_v, q, k, v):
                cached = {"cached_k": cached_k, "cached_v": cached_v} if cached_k.shape[1] else {}
                return window_attention(q, k, v, window=window, backend=variant, derivatives=derivatives, **cached)

            return jax.vmap(one)(cached_k, cached_v, *x)

        def with_tangent(x, x_dot):
            return jax.jvp(attend, x, x_dot)

        if name == "forward":
            return attend(*x)
        if name == "tangent":
            return with_tangent(x, x_dot)
        if name == "reverse":
            out, pullback = jax.vjp(attend, *x)
            return out, pullback(bars[0])
        out, pullback = jax.vjp(with_tangent, x, x_dot)
        return out, pullback(bars)

    return program


def _passes(name: str, variant: str, window: int):
    """The same function as `_pass`, made of a backend's passes, which `window_attention` and its derivatives call."""
    kernels = backends.load(variant)

    def program(cached_k, cached_v, *arrays):
        q, q_dot, o_bar, o_dot_bar = (arrays[i][:, :, None] for i in (0, 3, 6, 7))  # a query head per key head
        k, v = (jnp.concatenate([c, a], axis=2) for c, a in zip((cached_k, cached_v), arrays[1:3]))
        x, y = (q, k, v, jnp.zeros(len(q), jnp.int32)), (q_dot, *arrays[4:6])
        new = {"window": window, "num_keys": y[1].shape[2]}
        if name == "forward":
            return kernels.forward(*x, window=window)
        if name == "reverse":
            out = kernels.forward(*x, window=window)
            return out, kernels.reverse(*x, *out, o_bar, jnp.zeros_like(out[1]), **new)
        out = kernels.dual(*x, *y, window=window)
        if name == "tangent":
            return out
        bars = (o_dot_bar, jnp.zeros_like(out[1]), o_bar, jnp.zeros_like(out[1]))
        return out, kernels.second_reverse(*x, *out[:2], *y, *out[2:], *bars, **new)

    return program
