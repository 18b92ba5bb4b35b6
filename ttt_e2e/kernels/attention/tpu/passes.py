"""The passes as Pallas kernels for TPUs (Mosaic); on other platforms they are interpreted. Not yet run on hardware.

A kernel computes one tile of scores at a time. Results of queries are sums over keys: their tiles are visited row by
row. Results of keys are sums over the queries that see them: column by column. The sums stay in scratch memory in
between. Products that only tangents or gradients of a tile's keys need are left out where it has none.

Statistics of a row go in and out side by side in one array [..., n]: on a TPU the last axis of any takes 128 lanes.

Precision: as in tiles.py, what rounding takes from a row's total is given back at one key, here at the row's own. The
means that a reverse pass subtracts are dot products with the rounded o and o_dot. The kernels by rows compute how far
these are from the true means, correct their sums for it, and give the true ones to the kernels by keys. Tangents of
scores are taken relative to that of the row's own key, so that nothing cancels where all scores move alike.

Shapes: of the functions, those of xla.py. In kernels, references to one block of t positions: rows and keys [t, H], row
statistics [t, 1]; scores [t, t].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention import bands, score_tiles
from ttt_e2e.kernels.attention.tpu.sweep import WIDE, by_keys, by_rows, last

LANES = 128  # blocks are multiples of it
MAX_BLOCK = 512  # positions
MAX_SECOND_REVERSE_BLOCK = 256  # its kernels hold a dozen arrays of the size of scores
DTYPES = ("bfloat16", "float16", "float32")
MAX_WIDTH = 256  # of heads, for blocks to fit into a TPU's memory


def obstacle(problem) -> str:
    """Why the kernels cannot compute a problem whose arrays are all of one dtype; empty where they can."""
    [dtype], width = problem.dtypes, max(problem.width, problem.value_width)
    if dtype not in DTYPES:
        return f"takes {', '.join(DTYPES)}, all arrays alike, not {dtype}"
    if width > MAX_WIDTH:
        return f"takes head widths up to {MAX_WIDTH}, not {width}"
    return ""


def can_interpret() -> bool:
    """Whether this JAX runs the kernels where there is no TPU."""
    return True


def plan(num_queries: int, num_keys: int, window: int, block: int = 0, max_block: int = MAX_BLOCK) -> bands.Tiles:
    """The band in tiles of `block` positions; 0 = at most a quarter of the window, but 128 at least."""
    window = min(window or num_keys, num_keys)
    if not block:
        block = LANES
        while 2 * block <= min(max_block, window // 4, num_queries):
            block *= 2
    return bands.Tiles(num_queries, num_keys, window, block)


# ---- the passes


def forward(q, k, v, num_empty, *, window, block=0):
    """Output [..., R, T, H] and lse [..., R, T]."""
    tiles, H = plan(q.shape[-2], k.shape[-2], window, block), v.shape[-1]
    o, stats = by_rows(_forward, tiles, num_empty, (q,), (k, v), (H, 1), scratch=(1, 1, H, 1))
    return o, stats[..., 0]


def dual(q, k, v, num_empty, q_dot, k_dot, v_dot, *, window, block=0):
    """`forward` and `tangent` in one: output, lse and the tangents of both."""
    tiles, H = plan(q.shape[-2], k.shape[-2], window, block), v.shape[-1]
    rows = (q, q_dot, _own_scores_dot(q, k, q_dot, k_dot)[..., None])
    keys = (k, v, k_dot, v_dot)
    o, o_dot, stats = by_rows(_dual, tiles, num_empty, rows, keys, (H, H, 2), scratch=(1, 1, 1, *(H, 1) * 3))
    return o, stats[..., 0], o_dot, stats[..., 1]


def tangent(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, *, window, block=0):
    """Tangents of the output and of lse."""
    tiles, H = plan(q.shape[-2], k.shape[-2], window, block), v.shape[-1]
    rows = (q, q_dot, o, _side_by_side(lse, _own_scores_dot(q, k, q_dot, k_dot)))
    keys = (k, v, k_dot, v_dot)
    o_dot, stats = by_rows(_tangent, tiles, num_empty, rows, keys, (H, 1), scratch=(1, *(H, 1) * 2))
    return o_dot, stats[..., 0]


def reverse(q, k, v, num_empty, o, lse, o_bar, lse_bar, *, window, num_keys, block=0):
    """Gradients of q and of the last `num_keys` of k and v."""
    tiles, H = plan(q.shape[-2], k.shape[-2], window, block), q.shape[-1]
    rows = (q, o_bar, _side_by_side(lse, _dot(o_bar, o) - lse_bar, lse_bar))
    q_bar, mean = by_rows(_reverse_by_rows, tiles, num_empty, rows, (k, v), (H, 1), scratch=(1, H, 1))
    rows = (q, o_bar, _side_by_side(lse, mean[..., 0]))
    sums = ((num_keys, H), (num_keys, v.shape[-1]))
    return q_bar, *by_keys(_reverse_by_keys, tiles, num_empty, rows, (k, v), sums)


def second_reverse(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, o_dot, lse_dot, *bars, window, num_keys, block=0):
    """Gradients of q, the last `num_keys` of k and v, and of q_dot, k_dot, v_dot, given those of the tangent.

    `bars` are the cotangents of (o_dot, lse_dot) and, where these have any, of (o, lse).
    """
    tiles, H = plan(q.shape[-2], k.shape[-2], window, block, MAX_SECOND_REVERSE_BLOCK), q.shape[-1]
    o_dot_bar, lse_dot_bar, *o_bars = bars
    dot_mean, mean, lse_bar = _dot(o_dot_bar, o) - lse_dot_bar, _dot(o_dot_bar, o_dot), jnp.zeros_like(lse)
    if o_bars:
        mean, lse_bar = mean + _dot(o_bars[0], o) - o_bars[1], o_bars[1]
    keys, moving = (k, v, k_dot, v_dot), (q, q_dot, o_dot_bar, *o_bars[:1])
    rows = (_side_by_side(lse, lse_dot, dot_mean, mean, lse_dot_bar, lse_bar), *moving)
    q_bar, q_dot_bar, means = by_rows(
        _second_reverse_by_rows, tiles, num_empty, rows, keys, (H, H, 2), scratch=(1, 1, 1, H, *(H, 1) * 3)
    )
    rows = (jnp.concatenate([_side_by_side(lse, lse_dot), means], axis=-1), *moving)
    sums = ((num_keys, H), (num_keys, v.shape[-1]), k_dot.shape[-2:], v_dot.shape[-2:])
    k_bar, v_bar, *dots = by_keys(_second_reverse_by_keys, tiles, num_empty, rows, keys, sums)
    return q_bar, k_bar, v_bar, q_dot_bar, *dots


def _dot(a, b):
    """Dot products of rows [..., R, T, H] with rows: [..., R, T], float32."""
    return jnp.sum(a.astype(WIDE) * b.astype(WIDE), axis=-1)


def _own_scores_dot(q, k, q_dot, k_dot):
    """The tangent of every query's score with its own key, [..., R, T]."""
    T = q.shape[-2]
    k, k_dot = (last(a, T)[..., None, :, :] for a in (k, k_dot))
    return (_dot(q_dot, k) + _dot(q, k_dot)) * _scale(q)


def _side_by_side(*stats):
    return jnp.stack(stats, axis=-1)


# ---- the kernels: functions of a step and of references to rows, keys, outputs and scratch memory


def _forward(step, rows, keys, outputs, scratch):
    (q,), (k, v), (o, stats) = rows, keys, outputs
    largest, total, o_sum = *scratch[:2], _KeySum(*scratch[2:])

    @step.start
    def _():
        _clear(scratch)
        largest[...] = jnp.full_like(largest, score_tiles.MASKED_SCORE)

    @step.visit
    def _(visible, **_):
        scores = score_tiles.mask(_scores(q, k), visible)
        weights, largest[...], total[...], decay = score_tiles.soften_more(scores, largest[...], total[...])
        o_sum.decay(decay)
        o_sum.add(weights, v)

    @step.finish
    def _():
        o[...] = (o_sum.read(v) / total[...]).astype(o.dtype)
        stats[...] = score_tiles.lse(largest[...], total[...])


def _dual(step, rows, keys, outputs, scratch):
    (q, q_dot, reference), (k, v, k_dot, v_dot), (o, o_dot, stats) = rows, keys, outputs
    largest, total, centred_total, *key_sums = scratch
    o_sum, centred_sum, v_dot_sum = key_sums = _KeySum.of(key_sums)

    @step.start
    def _():
        _clear(scratch)
        largest[...] = jnp.full_like(largest, score_tiles.MASKED_SCORE)

    @step.visit
    def _(visible, is_new, **_):
        scores = score_tiles.mask(_scores(q, k), visible)
        centred = _scores_dot(q, k, q_dot, k_dot, is_new) - reference[...]
        weights, largest[...], total[...], decay = score_tiles.soften_more(scores, largest[...], total[...])
        centred_total[...] = centred_total[...] * decay + score_tiles.mean(weights, centred)
        for key_sum in key_sums:
            key_sum.decay(decay)
        o_sum.add(weights, v)
        centred_sum.add(weights * centred, v)
        if is_new:
            v_dot_sum.add(weights, v_dot)

    @step.finish
    def _():
        out, mean = o_sum.read(v) / total[...], centred_total[...] / total[...]
        out_dot = (centred_sum.read(v) + v_dot_sum.read(v_dot)) / total[...] - mean * out
        o[...], o_dot[...] = out.astype(o.dtype), out_dot.astype(o_dot.dtype)
        stats[:, 0:1] = score_tiles.lse(largest[...], total[...])
        stats[:, 1:2] = mean + reference[...]


def _tangent(step, rows, keys, outputs, scratch):
    (q, q_dot, o, row_stats), (k, v, k_dot, v_dot), (o_dot, stats) = rows, keys, outputs
    lse, reference = _columns(row_stats)
    centred_total, *key_sums = scratch
    centred_sum, v_dot_sum = _KeySum.of(key_sums)
    step.start(lambda: _clear(scratch))

    @step.visit
    def _(visible, is_new, **_):
        p = _probabilities(q, k, lse, visible)
        centred = _scores_dot(q, k, q_dot, k_dot, is_new) - reference[...]
        centred_total[...] += score_tiles.mean(p, centred)
        centred_sum.add(p * centred, v)
        if is_new:
            v_dot_sum.add(p, v_dot)

    @step.finish
    def _():
        mean = centred_total[...]
        out_dot = centred_sum.read(v) + v_dot_sum.read(v_dot) - mean * o[...].astype(WIDE)
        o_dot[...] = out_dot.astype(o_dot.dtype)
        stats[...] = mean + reference[...]


def _reverse_by_rows(step, rows, keys, outputs, scratch):
    """Gradient of q; and the exact means to subtract, less lse_bar."""
    (q, o_bar, stats), (k, v), (q_bar, exact_mean) = rows, keys, outputs
    lse, mean, lse_bar = _columns(stats)
    total, q_sum = scratch[0], _KeySum(*scratch[1:])
    step.start(lambda: _clear(scratch))

    @step.visit
    def _(visible, **_):
        p = _probabilities(q, k, lse, visible)
        scores_bar = score_tiles.scores_bar(p, _products(o_bar, v), mean[...])
        total[...] += _row_total(scores_bar)
        q_sum.add(scores_bar, k)

    @step.finish
    def _():
        excess = total[...] - lse_bar[...]  # what the mean lacks
        exact_mean[...] = mean[...] + excess
        q_bar[...] = ((q_sum.read(k) - excess * k[...].astype(WIDE)) * _scale(q)).astype(q_bar.dtype)


def _reverse_by_keys(step, rows, keys, outputs, scratch):
    (q, o_bar, stats), (k, v), (k_sum, v_sum) = rows, keys, scratch
    lse, mean = _columns(stats)
    step.start(lambda: _clear(scratch))

    @step.visit
    def _(visible, **_):
        p = _probabilities(q, k, lse, visible)
        k_sum[...] += _sum_rows(score_tiles.scores_bar(p, _products(o_bar, v), mean[...]), q)
        v_sum[...] += _sum_rows(p, o_bar)

    step.finish(lambda: _write(outputs, scratch, (_scale(q), 1)))


def _second_reverse_by_rows(step, rows, keys, outputs, scratch):
    """Gradients of q and q_dot; and the exact means of B and A of docs/kernels.md, less lse_dot_bar and lse_bar."""
    (stats, q, *_), (k, _, k_dot, _), (q_bar, q_dot_bar, exact_means) = rows, keys, outputs
    _, _, dot_mean, mean, lse_dot_bar, lse_bar = _columns(stats)
    dot_total, total, new_p, p_sum, *key_sums = scratch
    q_sum, new_sum, q_dot_sum = _KeySum.of(key_sums)
    step.start(lambda: _clear(scratch))

    @step.visit
    def _(visible, is_new, **_):
        p, _, scores_dot_bar, scores_bar = _second_reverse_scores(rows, keys, visible, is_new)
        dot_total[...] += _row_total(scores_dot_bar)
        total[...] += _row_total(scores_bar)
        p_sum[...] += _sum_keys(p.astype(k.dtype), k)
        q_sum.add(scores_bar, k)
        q_dot_sum.add(scores_dot_bar, k)
        if is_new:
            new_p[...] += _row_total(p)
            new_sum.add(scores_dot_bar, k_dot)

    @step.finish
    def _():
        dot_excess, excess = dot_total[...] - lse_dot_bar[...], total[...] - lse_bar[...]  # what the means lack
        exact_means[:, 0:1], exact_means[:, 1:2] = dot_mean[...] + dot_excess, mean[...] + excess
        from_dot = new_sum.read(k_dot) - dot_excess * new_p[...] * k_dot[...].astype(WIDE)
        from_q = q_sum.read(k) - excess * p_sum[...]
        q_bar[...] = ((from_q + from_dot) * _scale(q)).astype(q_bar.dtype)
        q_dot_bar[...] = ((q_dot_sum.read(k) - dot_excess * p_sum[...]) * _scale(q)).astype(q_dot_bar.dtype)


def _second_reverse_by_keys(step, rows, keys, outputs, scratch):
    (_, q, q_dot, o_dot_bar, *o_bar), (k_sum, v_sum, k_dot_sum, v_dot_sum) = rows, scratch
    step.start(lambda: _clear(scratch))

    @step.visit
    def _(visible, is_new, is_wanted):
        p, centred, scores_dot_bar, scores_bar = _second_reverse_scores(rows, keys, visible, is_new)
        if is_wanted:
            k_sum[...] += _sum_rows(scores_bar, q) + _sum_rows(scores_dot_bar, q_dot)
            v_sum[...] += _sum_rows(p * centred, o_dot_bar)
            if o_bar:
                v_sum[...] += _sum_rows(p, *o_bar)
        if is_new:
            k_dot_sum[...] += _sum_rows(scores_dot_bar, q)
            v_dot_sum[...] += _sum_rows(p, o_dot_bar)

    step.finish(lambda: _write(outputs, scratch, (_scale(q), 1) * 2))


def _second_reverse_scores(rows, keys, visible, is_new):
    """The matrices P, C, R and Z of docs/kernels.md, for one tile."""
    (stats, q, q_dot, o_dot_bar, *o_bar), (k, v, k_dot, v_dot) = rows, keys
    lse, lse_dot, dot_mean, mean, *_ = _columns(stats)
    p = _probabilities(q, k, lse, visible)
    centred = _scores_dot(q, k, q_dot, k_dot, is_new) - lse_dot[...]
    centred_bar = score_tiles.deviation(_products(o_dot_bar, v), dot_mean[...])
    p_bar = centred * centred_bar
    if is_new:
        p_bar += _products(o_dot_bar, v_dot)
    if o_bar:
        p_bar += _products(*o_bar, v)
    return p, centred, p * centred_bar, score_tiles.scores_bar(p, p_bar, mean[...])


class _KeySum(NamedTuple):
    """Sums of keys, weighted, over a row's tiles, in scratch memory; see "Precision" above."""

    total: jax.Array  # reference [t, H]
    lost: jax.Array  # reference [t, 1]: what rounding took from the weights' total

    @classmethod
    def of(cls, scratch):
        """The sums whose references follow one another in `scratch`: total, lost, total, lost, ..."""
        return [cls(*pair) for pair in zip(scratch[::2], scratch[1::2], strict=True)]

    def decay(self, factor):
        """Multiplies the sum so far, when the scale of weights changes."""
        self.total[...] *= factor
        self.lost[...] *= factor

    def add(self, weights, keys):
        """Adds the keys of one tile, weighted."""
        rounded, lost = score_tiles.narrow(weights, keys.dtype)
        self.total[...] += _sum_keys(rounded, keys)
        if lost is not None:
            self.lost[...] += lost

    def read(self, own_keys):
        """The sum, corrected. `own_keys`: those at the rows' own positions, as a row's last tile has them."""
        return self.total[...] + self.lost[...] * own_keys[...].astype(WIDE)


def _clear(references):
    for reference in references:
        reference[...] = jnp.zeros_like(reference)


def _write(outputs, sums, scales):
    for output, total, scale in zip(outputs, sums, scales, strict=True):
        output[...] = (total[...] * scale).astype(output.dtype)


def _columns(stats):
    """References [t, 1] to the statistics that stand side by side in one reference [t, n]."""
    return [stats.at[:, i : i + 1] for i in range(stats.shape[-1])]


def _product(a, b, contracted):
    precision = jax.lax.Precision.HIGHEST if a.dtype == WIDE else None
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision, preferred_element_type=WIDE)


def _products(rows, keys):
    return _product(rows[...], keys[...], ((1,), (1,)))


def _sum_keys(weights, keys):
    return _product(weights, keys[...], ((1,), (0,)))


def _sum_rows(weights, rows):
    return _product(weights.astype(rows.dtype), rows[...], ((0,), (0,)))


def _row_total(scores):
    return jnp.sum(scores, axis=-1, keepdims=True)


def _scale(q):
    return q.shape[-1] ** -0.5


def _scores(q, k):
    return _products(q, k) * _scale(q)


def _scores_dot(q, k, q_dot, k_dot, is_new):
    scores_dot = _scores(q_dot, k)
    return scores_dot + _scores(q, k_dot) if is_new else scores_dot


def _probabilities(q, k, lse, visible):
    return score_tiles.probabilities(score_tiles.mask(_scores(q, k), visible), lse[...])
