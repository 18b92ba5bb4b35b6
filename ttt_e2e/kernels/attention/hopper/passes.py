"""The passes as Mosaic GPU kernels for NVIDIA GPUs of the Hopper generation. Not yet run on hardware: docs/kernels.md.

Every pass is one sweep over keys, which gives the results of rows; where keys have gradients, one or two sweeps over
rows give those. What needs no matrix product of scores is computed outside, in plain JAX: the means of rows, as dot
products, and the correction of sums for the rounding of their weights. Where there is no GPU the kernels are
interpreted, for tests.

Shapes: those of xla.py. In kernels, tiles of scores [queries, keys] in sweeps over keys, [keys, queries] in sweeps over
rows.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_e2e import targets
from ttt_e2e.kernels.attention import score_tiles
from ttt_e2e.kernels.attention.hopper.layout import Layout, lay_out
from ttt_e2e.kernels.attention.hopper.sweep import Operands, per_row

DTYPES = ("bfloat16", "float16")
MAX_WIDTH = 128
MAX_TILE_WIDTH = 64  # wider, the second reverse of queries takes tiles of 32 keys; with 64, it spills 28 bytes at 80
MAX_DUAL_WIDTH = 96  # wider, the sums of two outputs and a third that is to be added to them do not fit into registers
HOPPER = ("NVIDIA H", "NVIDIA GH")  # H100, H200, GH200, ...: how their names begin


def obstacle(problem) -> str:
    """Why the kernels cannot compute a problem whose arrays are all of one dtype; empty where they can."""
    [dtype], width, kind = problem.dtypes, problem.width, targets.current().kind
    if dtype not in DTYPES:
        return f"takes {' or '.join(DTYPES)}, all alike, not {dtype}"
    if problem.value_width != width or width > MAX_WIDTH:
        return f"takes values as wide as queries, and head widths up to {MAX_WIDTH}, not {width}"
    if not kind.startswith(HOPPER):
        return f"needs an NVIDIA GPU of the Hopper generation, not {kind}"
    return ""


def can_interpret() -> bool:
    """Whether this JAX runs the kernels where there is no GPU: from 0.11.2 on, in a program of their own."""
    return hasattr(plgpu, "InterpretGPUParams")


# ---- the passes


def forward(q, k, v, num_empty, *, window):
    """Output [..., R, T, H] and lse [..., R, T]."""
    layout = lay_out(q, k, num_empty, window)
    operands = layout.operands({"q": q}, {}, {"k": k, "v": v}, {})
    scale = q.shape[-1] ** -0.5

    def step(tile, _, carry):
        o, *row = carry
        [scores] = tile.mask(score_tiles.MASKED_SCORE, tile.products(("q", "k")) * scale)
        _, narrow, decay, row = _soften(tile, scores, row, q.dtype)
        [weights] = tile.stage(narrow)
        return (o * _over_row(decay, o) + tile.sum((weights, "v")), *row)

    def finish(_, carry):
        o, largest, total, narrow_total = carry
        return o / _over_row(narrow_total, o), score_tiles.lse(largest, total)

    o, lse = layout.over_keys(
        step, operands,
        name="forward", products=(2, 2), num_scores=1, num_outputs=1, num_statistics=1, stagings=1,
        carry=(layout.zeros, *_EMPTY_SOFTMAX), finish=finish,
    )  # fmt: skip
    return o.astype(v.dtype), lse


def tangent(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, *, window):
    """Tangents of the output and of lse."""
    layout = lay_out(q, k, num_empty, window, k_dot.shape[-2])
    near = _own_score_dot(q, k, q_dot, k_dot)
    rows, statistics = {"q": q, "q_dot": q_dot}, {"lse": lse, "near": near}
    operands = layout.operands(rows, statistics, {"k": k, "v": v}, {"k_dot": k_dot, "v_dot": v_dot})
    scale = q.shape[-1] ** -0.5

    def step(tile, sums, carry):
        mean, narrow_total = carry
        [p] = tile.mask(0.0, _probabilities(tile, scale))
        p_dot = p * (_scores_dot(tile) * scale - tile.statistic("near"))
        narrow = p_dot.astype(q.dtype)
        [o_dot] = sums
        names = ("v", "v_dot") if tile.is_moving else ("v",)
        weights = tile.stage(*(narrow, p.astype(q.dtype))[: len(names)])
        tile.add(o_dot, *zip(weights, names))
        return mean + p_dot.sum(axis=1), narrow_total + _total(narrow)

    zero = partial(per_row, 0.0)
    o_dot, mean, narrow_total = layout.over_keys(
        step, operands,
        name="tangent", products=(5, 3), num_scores=2, num_outputs=1, num_statistics=2, accumulators=1, stagings=2,
        carry=(zero, zero), finish=_as_they_are,
    )  # fmt: skip
    o_dot = o_dot + _column(mean - narrow_total) * _own(v, q) - _column(mean) * o
    return o_dot.astype(o.dtype), mean + near


def dual(q, k, v, num_empty, q_dot, k_dot, v_dot, *, window):
    """`forward` and `tangent` in one: output, lse and the tangents of both."""
    if q.shape[-1] > MAX_DUAL_WIDTH:
        o, lse = forward(q, k, v, num_empty, window=window)
        return o, lse, *tangent(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, window=window)
    layout = lay_out(q, k, num_empty, window, k_dot.shape[-2])
    near = _own_score_dot(q, k, q_dot, k_dot)
    rows, statistics = {"q": q, "q_dot": q_dot}, {"near": near}
    operands = layout.operands(rows, statistics, {"k": k, "v": v}, {"k_dot": k_dot, "v_dot": v_dot})
    scale = q.shape[-1] ** -0.5

    def step(tile, _, carry):
        o, o_dot, mean, lost, *row = carry
        [scores] = tile.mask(score_tiles.MASKED_SCORE, tile.products(("q", "k")) * scale)
        p, narrow, decay, row = _soften(tile, scores, row, q.dtype)
        p_dot = p * (_scores_dot(tile) * scale - tile.statistic("near"))
        narrow_dot = p_dot.astype(q.dtype)
        mean = mean * decay + p_dot.sum(axis=1)
        lost = lost * decay + p_dot.sum(axis=1) - _total(narrow_dot)
        weights, weights_dot = tile.stage(narrow, narrow_dot)
        # One sum after the other: each needs as many registers again as `o` has.
        o = lax.optimization_barrier(o * _over_row(decay, o) + tile.sum((weights, "v")))
        o_dot_terms = [(weights_dot, "v"), *([(weights, "v_dot")] if tile.is_moving else [])]
        return o, o_dot * _over_row(decay, o_dot) + tile.sum(*o_dot_terms), mean, lost, *row

    def finish(_, carry):
        o, o_dot, mean, lost, largest, total, narrow_total = carry
        o, mean = o / _over_row(narrow_total, o), mean / total
        o_dot = o_dot / _over_row(total, o) - _over_row(mean, o) * o
        return o, o_dot, score_tiles.lse(largest, total), mean, lost / total

    zero = partial(per_row, 0.0)
    o, o_dot, lse, mean, lost = layout.over_keys(
        step, operands,
        name="dual", products=(6, 4), num_scores=3, num_outputs=2, num_statistics=3, stagings=2,
        carry=(layout.zeros, layout.zeros, zero, zero, *_EMPTY_SOFTMAX), finish=finish,
    )  # fmt: skip
    o_dot += _column(lost) * _own(v, q)
    return o.astype(v.dtype), lse, o_dot.astype(v.dtype), mean + near


def reverse(q, k, v, num_empty, o, lse, o_bar, lse_bar, *, window, num_keys):
    """Gradients of q and of the last `num_keys` of k and v [3 matrix products by keys and 4 by rows]."""
    layout = lay_out(q, k, num_empty, window, num_keys)
    statistics = {"lse": lse, "centre": _dot(o_bar, o) - lse_bar}
    operands = layout.operands({"q": q, "o_bar": o_bar}, statistics, {"k": k, "v": v}, {})
    scale = q.shape[-1] ** -0.5

    def weights(tile):
        [p] = tile.mask(0.0, _probabilities(tile, scale))
        return p, score_tiles.scores_bar(p, tile.products(("o_bar", "v")), tile.statistic("centre")).astype(q.dtype)

    def by_keys(tile, sums, carry):
        _, scores_bar = weights(tile)
        [staged] = tile.stage(scores_bar)
        tile.add(sums[0], (staged, "k"))
        return (carry[0] + _total(scores_bar),)

    def by_rows(tile, sums, carry):
        p, scores_bar = weights(tile)
        k_bar, v_bar = sums
        scores_bar, p = tile.stage(scores_bar, p.astype(q.dtype))
        tile.add(k_bar, (scores_bar, "q"))
        tile.add(v_bar, (p, "o_bar"))
        return carry

    q_bar, total = layout.over_keys(
        by_keys, operands,
        name="reverse_queries", products=(3, 3), num_scores=2, num_outputs=1, num_statistics=1,
        accumulators=1, stagings=1, carry=(partial(per_row, 0.0),), finish=_as_they_are,
    )  # fmt: skip
    k_bar, v_bar = layout.over_rows(
        by_rows, operands,
        name="reverse_keys", products=(4, 4), num_scores=2, accumulators=2, stagings=2,
        start=layout.num_keys - num_keys, stop=layout.num_keys,
    )  # fmt: skip
    q_bar += _column(lse_bar - total) * _own(k, q)
    return (q_bar * scale).astype(q.dtype), (k_bar * scale).astype(k.dtype), v_bar.astype(v.dtype)


def second_reverse(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, o_dot, lse_dot, *bars, window, num_keys):
    """Gradients of q, the last `num_keys` of k and v, and of q_dot, k_dot, v_dot, given those of the tangent.

    `bars` are the cotangents of (o_dot, lse_dot) and, where these have any, of (o, lse). [9 products by keys, 9 by rows
    for gradients of keys and 6 for those of values; each of them has to recompute the scores that it needs.]
    """
    o_dot_bar, lse_dot_bar, *o_bars = bars
    rows = {"q": q, "q_dot": q_dot, "o_dot_bar": o_dot_bar}
    mean, lse_bar = _dot(o_dot_bar, o_dot), jnp.zeros_like(lse)
    if o_bars:
        rows["o_bar"], lse_bar = o_bars
        mean += _dot(rows["o_bar"], o)
    centres = {"centre_dot": _dot(o_dot_bar, o) - lse_dot_bar, "centre": mean - lse_bar}
    layout, moving = lay_out(q, k, num_empty, window, k_dot.shape[-2]), {"k_dot": k_dot, "v_dot": v_dot}
    operands = layout.operands(rows, {"lse": lse, "lse_dot": lse_dot} | centres, {"k": k, "v": v}, moving)
    scale, zero = q.shape[-1] ** -0.5, partial(per_row, 0.0)
    by_keys, *by_rows = _second_reverse_steps(scale, q.dtype, bool(o_bars))
    q_bar, q_dot_bar, total, total_dot, lost_moving = layout.over_keys(
        by_keys, operands,
        name="second_reverse_queries", products=(9, 6), num_scores=3 if q.shape[-1] <= MAX_TILE_WIDTH else 4,
        num_outputs=2, num_statistics=3, accumulators=2, stagings=2, carry=(zero, zero, zero), finish=_as_they_are,
    )  # fmt: skip
    S, num_moving = k.shape[-2], k_dot.shape[-2]
    lost_dot = lse_dot_bar - total_dot
    q_bar += _column(lse_bar - total) * _own(k, q)
    q_bar += _column(lost_dot if num_moving == S else lost_moving) * _own(k_dot, q)
    q_dot_bar += _column(lost_dot) * _own(k, q)
    k_bar, k_dot_bar, v_bar, v_dot_bar = _second_reverse_of_keys(layout, operands, by_rows, S - num_moving, S)
    if num_keys > num_moving:
        constant = operands._replace(moving={})
        k_more, v_more = _second_reverse_of_keys(layout, constant, by_rows, S - num_keys, S - num_moving)
        k_bar, v_bar = jnp.concatenate([k_more, k_bar], axis=-2), jnp.concatenate([v_more, v_bar], axis=-2)
    k_bar, v_bar = k_bar[..., -num_keys:, :], v_bar[..., -num_keys:, :]
    out = q_bar * scale, k_bar * scale, v_bar, q_dot_bar * scale, k_dot_bar * scale, v_dot_bar
    return tuple(a.astype(q.dtype) for a in out)


def _second_reverse_steps(scale: float, dtype, has_o_bar: bool):
    """The steps of `second_reverse`: over keys; over rows for gradients of keys; over rows for those of values."""

    def centred(tile):
        """Tangent of the scores, less its mean."""
        return _scores_dot(tile) * scale - tile.statistic("lse_dot")

    def weights(tile):
        """Cotangents of the scores and of their tangent, staged, and of the rows of both: totals and what was lost.

        In this order no more than three arrays of scores are alive.
        """
        [p] = tile.mask(0.0, _probabilities(tile, scale))
        p_dot_bar = score_tiles.deviation(tile.products(("o_dot_bar", "v")), tile.statistic("centre_dot"))
        scores_dot_bar = p * p_dot_bar
        narrow_dot = scores_dot_bar.astype(dtype)
        [staged_dot] = tile.stage(narrow_dot)
        row = [_total(narrow_dot)] if tile.by_keys else []
        row += [scores_dot_bar.sum(axis=1) - row[0]] if tile.by_keys and tile.is_moving else []
        p, scores_bar, *row = lax.optimization_barrier((p, scores_dot_bar * centred(tile), *row))
        p_bar_pairs = [("o_dot_bar", "v_dot")] * tile.is_moving + [("o_bar", "v")] * has_o_bar
        p_bar = tile.products(*p_bar_pairs) if p_bar_pairs else 0
        narrow = (scores_bar + score_tiles.scores_bar(p, p_bar, tile.statistic("centre"))).astype(dtype)
        [staged] = tile.stage(narrow)
        return staged, staged_dot, [_total(narrow), *row] if tile.by_keys else ()

    def by_keys(tile, sums, carry):
        q_bar, q_dot_bar = sums
        scores_bar, scores_dot_bar, row = weights(tile)
        tile.add(q_bar, (scores_bar, "k"), *([(scores_dot_bar, "k_dot")] if tile.is_moving else []))
        tile.add(q_dot_bar, (scores_dot_bar, "k"))
        return *(total + more for total, more in zip(carry, row)), *carry[len(row) :]

    def keys_by_rows(tile, sums, carry):
        scores_bar, scores_dot_bar, _ = weights(tile)
        k_bar, *k_dot_bar = sums
        tile.add(k_bar, (scores_bar, "q"), (scores_dot_bar, "q_dot"))
        for sums in k_dot_bar:
            tile.add(sums, (scores_dot_bar, "q"))
        return carry

    def values_by_rows(tile, sums, carry):
        scores_dot = centred(tile)
        [p] = tile.mask(0.0, _probabilities(tile, scale))
        v_bar, *v_dot_bar = sums
        p_dot, p = tile.stage((p * scores_dot).astype(dtype), p.astype(dtype))
        tile.add(v_bar, (p_dot, "o_dot_bar"), *([(p, "o_bar")] if has_o_bar else []))
        for sums in v_dot_bar:
            tile.add(sums, (p, "o_dot_bar"))
        return carry

    return by_keys, keys_by_rows, values_by_rows


def _second_reverse_of_keys(layout: Layout, operands: Operands, steps, start: int, stop: int):
    """Gradients of the keys [start, stop), their tangents, the values and theirs; where constant, of keys and values.

    Not yet multiplied by the scale of scores.
    """
    keys_by_rows, values_by_rows = steps
    prefix = "second_reverse_" if operands.moving else "second_reverse_constant_"
    options = {"accumulators": 2 if operands.moving else 1, "stagings": 2, "start": start, "stop": stop}
    key_bars = layout.over_rows(keys_by_rows, operands, name=f"{prefix}keys", products=(9, 6), num_scores=3, **options)
    read = operands._replace(
        statistics={name: operands.statistics[name] for name in ("lse", "lse_dot")},
        keys={"k": operands.keys["k"]},
        moving={name: a for name, a in operands.moving.items() if name == "k_dot"},
    )
    value_bars = layout.over_rows(
        values_by_rows, read, name=f"{prefix}values", products=(6, 4), num_scores=2, **options
    )
    return *key_bars, *value_bars


# ---- functions of tiles


# The first carry of a softmax: no largest score, totals of 0.
_EMPTY_SOFTMAX = (partial(per_row, score_tiles.MASKED_SCORE), partial(per_row, 0.0), partial(per_row, 0.0))


def _as_they_are(sums, carry):
    return (*sums, *carry)


def _soften(tile, scores, row, dtype):
    """Adds a tile to a softmax: unnormalised weights, the same in `dtype`, the decay of earlier sums, new statistics.

    The statistics `row` are the largest score, the total of the weights, and the total of the weights in `dtype`.
    Output is divided by the last one: its weights then sum to 1 whatever rounding did to them.
    """
    largest, total, narrow_total = row
    new_largest = jnp.maximum(largest, scores.max(axis=1))
    decay = jnp.exp(largest - new_largest)
    p = jnp.exp(scores - tile.spread(new_largest))
    narrow = p.astype(dtype)
    return p, narrow, decay, (new_largest, total * decay + p.sum(axis=1), narrow_total * decay + _total(narrow))


def _probabilities(tile, scale):
    """The softmax of a tile of rows, from their lse; not masked."""
    return score_tiles.probabilities(tile.products(("q", "k")) * scale, tile.statistic("lse"))


def _scores_dot(tile):
    """Tangent of the scores, not yet multiplied by their scale."""
    return tile.products(("q_dot", "k"), *([("q", "k_dot")] if tile.is_moving else []))


def _total(narrow):
    """The total of each row of weights, float32; in sweeps over keys."""
    return narrow.astype(jnp.float32).sum(axis=1)


def _over_row(statistic, like):
    return lax.broadcast_in_dim(statistic, like.shape, [0])


# ---- functions of whole arrays


def _dot(a, b):
    """Dot products of rows [..., R, T, H] with rows: [..., R, T], float32."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _column(statistic):
    return statistic[..., None]


def _own(keys, q):
    """The key at each query's own position, which every query sees: [..., 1, T, H], float32; 0 where there is none."""
    missing = max(0, q.shape[-2] - keys.shape[-2])
    keys = jnp.pad(keys, [(0, 0)] * (keys.ndim - 2) + [(missing, 0), (0, 0)])
    return keys[..., None, -q.shape[-2] :, :].astype(jnp.float32)


def _own_score_dot(q, k, q_dot, k_dot):
    """Tangent of each query's score with its own key, [..., R, T]: a number near the mean of the row's tangents.

    Subtracted from these before they are rounded, so that they do not cancel.
    """
    return (_dot(q_dot, _own(k, q)) + _dot(q, _own(k_dot, q))) * q.shape[-1] ** -0.5
