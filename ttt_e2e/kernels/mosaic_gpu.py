"""The passes as Mosaic GPU kernels for NVIDIA GPUs of the Hopper generation. Not yet run on hardware: docs/kernels.md.

Every pass is one sweep of keys, for what belongs to rows, and where keys have gradients one or two sweeps of rows. What
does not need a matrix product of scores stays outside, in plain JAX: means of rows as dot products, and the correction
of sums for the rounding of their weights. Off GPUs the kernels are interpreted, for tests.

Shapes: those of xla.py.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_e2e import targets
from ttt_e2e.kernels import bands, score_tiles
from ttt_e2e.kernels import mosaic_gpu_sweep as sweep
from ttt_e2e.kernels.mosaic_gpu_sweep import Band, Operands, over_keys, over_rows, per_row
from ttt_e2e.targets import marks

UNIT = 128  # positions are padded to multiples of it, so that every block and tile is whole
WIDTH_UNIT = 16  # head widths likewise: the depth of a matrix instruction
MAX_WIDTH = 128
MAX_TILE_WIDTH = 64  # wider, the second reverse of queries takes tiles of 32 keys; with 64, it spills 28 bytes at 80
MAX_DUAL_WIDTH = 96  # wider, the sums of two outputs and a third that is to be added to them do not fit into registers
HOPPER = ("NVIDIA H", "NVIDIA GH")  # H100, H200, GH200, ...: how their names begin


def obstacle(q, k, v) -> str:
    """Why the kernels cannot take these arrays [..., H] here; empty where they can."""
    dtypes = {a.dtype for a in (q, k, v)}
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        return f"takes bfloat16 or float16, all alike, not {', '.join(sorted(map(str, dtypes)))}"
    if v.shape[-1] != q.shape[-1] or q.shape[-1] > MAX_WIDTH:
        return f"takes values as wide as queries, and head widths up to {MAX_WIDTH}, not {q.shape[-1]}"
    kind = targets.current().kind
    if not kind.startswith(HOPPER):
        return f"needs an NVIDIA GPU of the Hopper generation, not {kind}"
    return ""


def can_interpret() -> bool:
    """Whether this JAX runs the kernels where there is no GPU: from 0.11.2 on, in a program of their own."""
    return hasattr(plgpu, "InterpretGPUParams")


def _is_interpreted() -> bool:
    return targets.current().platform != "gpu"


# ---- the passes


def forward(q, k, v, num_empty, *, window):
    """Output [..., R, T, H] and lse [..., R, T]."""
    problem = _problem(q, k, v, num_empty, window)
    rows, keys = problem.rows(q=q), problem.keys(k=k, v=v)
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

    o, lse = problem.over_keys(
        step, rows, {}, keys, {},
        name="forward", products=(2, 2), num_scores=1, num_outputs=1, num_statistics=1, stagings=1,
        carry=(problem.zeros, *_NOTHING_SEEN), finish=finish,
    )  # fmt: skip
    return problem.row_output(o).astype(v.dtype), problem.statistic_output(lse)


def tangent(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, *, window):
    """Tangents of the output and of lse."""
    problem = _problem(q, k, v, num_empty, window, k_dot.shape[-2])
    rows, keys = problem.rows(q=q, q_dot=q_dot), problem.keys(k=k, v=v)
    moving = problem.moving(k_dot=k_dot, v_dot=v_dot)
    near = _own_score_dot(q, k, q_dot, k_dot)
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

    statistics = problem.statistics(lse=lse, near=near)
    zero = partial(per_row, 0.0)
    o_dot, mean, narrow_total = problem.over_keys(
        step, rows, statistics, keys, moving,
        name="tangent", products=(5, 3), num_scores=2, num_outputs=1, num_statistics=2, accumulators=1, stagings=2,
        carry=(zero, zero), finish=_as_they_are,
    )  # fmt: skip
    mean, narrow_total = map(problem.statistic_output, (mean, narrow_total))
    o_dot = problem.row_output(o_dot) + _column(mean - narrow_total) * _own(v, q) - _column(mean) * o
    return o_dot.astype(o.dtype), mean + near


def dual(q, k, v, num_empty, q_dot, k_dot, v_dot, *, window):
    """`forward` and `tangent` in one: output, lse and the tangents of both."""
    if q.shape[-1] > MAX_DUAL_WIDTH:
        o, lse = forward(q, k, v, num_empty, window=window)
        return o, lse, *tangent(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, window=window)
    problem = _problem(q, k, v, num_empty, window, k_dot.shape[-2])
    rows, keys = problem.rows(q=q, q_dot=q_dot), problem.keys(k=k, v=v)
    moving = problem.moving(k_dot=k_dot, v_dot=v_dot)
    near = _own_score_dot(q, k, q_dot, k_dot)
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
    o, o_dot, *row = problem.over_keys(
        step, rows, problem.statistics(near=near), keys, moving,
        name="dual", products=(6, 4), num_scores=3, num_outputs=2, num_statistics=3, stagings=2,
        carry=(problem.zeros, problem.zeros, zero, zero, *_NOTHING_SEEN), finish=finish,
    )  # fmt: skip
    lse, mean, lost = map(problem.statistic_output, row)
    o_dot = problem.row_output(o_dot) + _column(lost) * _own(v, q)
    return problem.row_output(o).astype(v.dtype), lse, o_dot.astype(v.dtype), mean + near


def reverse(q, k, v, num_empty, o, lse, o_bar, lse_bar, *, window, num_keys):
    """Gradients of q and of the last `num_keys` of k and v [3 matrix products by keys and 4 by rows]."""
    problem = _problem(q, k, v, num_empty, window, num_keys)
    rows, keys = problem.rows(q=q, o_bar=o_bar), problem.keys(k=k, v=v)
    statistics = problem.statistics(lse=lse, centre=_dot(o_bar, o) - lse_bar)
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

    q_bar, total = problem.over_keys(
        by_keys, rows, statistics, keys, {},
        name="reverse_queries", products=(3, 3), num_scores=2, num_outputs=1, num_statistics=1,
        accumulators=1, stagings=1, carry=(partial(per_row, 0.0),), finish=_as_they_are,
    )  # fmt: skip
    k_bar, v_bar = problem.over_rows(
        by_rows,
        rows,
        statistics,
        keys,
        {},
        name="reverse_keys",
        products=(4, 4),
        num_scores=2,
        accumulators=2,
        stagings=2,
        start=problem.num_keys - num_keys,
        stop=problem.num_keys,
    )
    q_bar = problem.row_output(q_bar) + _column(lse_bar - problem.statistic_output(total)) * _own(k, q)
    return (q_bar * scale).astype(q.dtype), (k_bar * scale).astype(k.dtype), v_bar.astype(v.dtype)


def second_reverse(q, k, v, num_empty, o, lse, q_dot, k_dot, v_dot, o_dot, lse_dot, *bars, window, num_keys):
    """Gradients of q, the last `num_keys` of k and v, and of q_dot, k_dot, v_dot, given those of the tangent.

    `bars` are the cotangents of (o_dot, lse_dot) and, where these have any, of (o, lse). [9 products by keys, 9 by rows
    for gradients of keys and 6 for those of values; each of them has to recompute the scores that it needs.]
    """
    o_dot_bar, lse_dot_bar, *o_bars = bars
    L = k_dot.shape[-2]
    problem = _problem(q, k, v, num_empty, window, L)
    rows, keys = problem.rows(q=q, q_dot=q_dot, o_dot_bar=o_dot_bar), problem.keys(k=k, v=v)
    moving = problem.moving(k_dot=k_dot, v_dot=v_dot)
    mean, lse_bar = _dot(o_dot_bar, o_dot), jnp.zeros_like(lse)
    if o_bars:
        o_bar, lse_bar = o_bars
        rows |= problem.rows(o_bar=o_bar)
        mean += _dot(o_bar, o)
    statistics = problem.statistics(
        lse=lse, lse_dot=lse_dot, centre_dot=_dot(o_dot_bar, o) - lse_dot_bar, centre=mean - lse_bar
    )
    scale = q.shape[-1] ** -0.5

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
        narrow_dot = scores_dot_bar.astype(q.dtype)
        [staged_dot] = tile.stage(narrow_dot)
        row = [_total(narrow_dot)] if tile.by_keys else []
        row += [scores_dot_bar.sum(axis=1) - row[0]] if tile.by_keys and tile.is_moving else []
        p, scores_bar, *row = lax.optimization_barrier((p, scores_dot_bar * centred(tile), *row))
        p_bar_pairs = [("o_dot_bar", "v_dot")] * tile.is_moving + [("o_bar", "v")] * bool(o_bars)
        p_bar = tile.products(*p_bar_pairs) if p_bar_pairs else 0
        narrow = (scores_bar + score_tiles.scores_bar(p, p_bar, tile.statistic("centre"))).astype(q.dtype)
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
        p_dot, p = tile.stage((p * scores_dot).astype(q.dtype), p.astype(q.dtype))
        tile.add(v_bar, (p_dot, "o_dot_bar"), *([(p, "o_bar")] if o_bars else []))
        for sums in v_dot_bar:
            tile.add(sums, (p, "o_dot_bar"))
        return carry

    zero = partial(per_row, 0.0)
    num_scores = 3 if q.shape[-1] <= MAX_TILE_WIDTH else 4
    q_bar, q_dot_bar, *totals = problem.over_keys(
        by_keys, rows, statistics, keys, moving,
        name="second_reverse_queries", products=(9, 6), num_scores=num_scores, num_outputs=2, num_statistics=3,
        accumulators=2, stagings=2, carry=(zero, zero, zero), finish=_as_they_are,
    )  # fmt: skip
    total, total_dot, lost_moving = map(problem.statistic_output, totals)
    lost_dot = lse_dot_bar - total_dot
    q_bar = problem.row_output(q_bar) + _column(lse_bar - total) * _own(k, q)
    q_bar += _column(lost_dot if k.shape[-2] == L else lost_moving) * _own(k_dot, q)
    q_dot_bar = problem.row_output(q_dot_bar) + _column(lost_dot) * _own(k, q)

    value_statistics = {name: statistics[name] for name in ("lse", "lse_dot")}

    def sums(name, num_scores, step, keys, moving, statistics, start, stop):
        options = {
            "name": f"second_reverse_{name}",
            "products": (9, 6) if num_scores == 3 else (6, 4),
            "num_scores": num_scores,
            "accumulators": 2 if moving else 1,
            "stagings": 2,
        }
        return problem.over_rows(step, rows, statistics, keys, moving, start=start, stop=stop, **options)

    boundary = problem.num_keys - L
    key_sums = sums("keys", 3, keys_by_rows, keys, moving, statistics, boundary, problem.num_keys)
    value_operands = {"k": keys["k"]}, {"k_dot": moving["k_dot"]}
    value_sums = sums("values", 2, values_by_rows, *value_operands, value_statistics, boundary, problem.num_keys)
    k_bar, k_dot_bar, v_bar, v_dot_bar = *key_sums, *value_sums
    if num_keys > L:
        start = problem.num_keys - num_keys
        [k_static] = sums("constant_keys", 3, keys_by_rows, keys, {}, statistics, start, boundary)
        [v_static] = sums("constant_values", 2, values_by_rows, {"k": keys["k"]}, {}, value_statistics, start, boundary)
        k_bar, v_bar = jnp.concatenate([k_static, k_bar], axis=-2), jnp.concatenate([v_static, v_bar], axis=-2)
    k_bar, v_bar = k_bar[..., -num_keys:, :], v_bar[..., -num_keys:, :]
    out = q_bar * scale, k_bar * scale, v_bar, q_dot_bar * scale, k_dot_bar * scale, v_dot_bar
    return tuple(a.astype(q.dtype) for a in out)


# ---- of tiles


_NOTHING_SEEN = (partial(per_row, score_tiles.MASKED_SCORE), partial(per_row, 0.0), partial(per_row, 0.0))


def _as_they_are(sums, carry):
    return (*sums, *carry)


def _soften(tile, scores, row, dtype):
    """One more tile of the softmax: unnormalised weights, the same in `dtype`, what decays the sums before, statistics.

    The statistics `row` are the largest score and the total of the weights as they are, and as rounded to `dtype`.
    Output is divided by the latter: its weights then sum to 1 whatever rounding did to them.
    """
    largest, total, narrow_total = row
    new_largest = jnp.maximum(largest, scores.max(axis=1))
    decay = jnp.exp(largest - new_largest)
    p = jnp.exp(scores - tile.spread(new_largest))
    narrow = p.astype(dtype)
    return p, narrow, decay, (new_largest, total * decay + p.sum(axis=1), narrow_total * decay + _total(narrow))


def _probabilities(tile, scale):
    """The softmax of a tile, of rows whose lse is known; not masked."""
    return score_tiles.probabilities(tile.products(("q", "k")) * scale, tile.statistic("lse"))


def _scores_dot(tile):
    """Tangent of the scores, but for their scale."""
    return tile.products(("q_dot", "k"), *([("q", "k_dot")] if tile.is_moving else []))


def _total(narrow):
    """Of each row of weights, as rounded."""
    return narrow.astype(jnp.float32).sum(axis=1)


def _over_row(statistic, like):
    return lax.broadcast_in_dim(statistic, like.shape, [0])


# ---- of whole arrays


def _dot(a, b):
    """Of rows: [..., R, T]."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)


def _column(statistic):
    return statistic[..., None]


def _own(keys, q):
    """Of each query its own position's key, which it sees whatever else it does: [..., 1, T, H], float32."""
    missing = max(0, q.shape[-2] - keys.shape[-2])
    keys = jnp.pad(keys, [(0, 0)] * (keys.ndim - 2) + [(missing, 0), (0, 0)])
    return keys[..., None, -q.shape[-2] :, :].astype(jnp.float32)


def _own_score_dot(q, k, q_dot, k_dot):
    """Tangent of each query's score of itself: a reference near the mean of the row, subtracted before rounding."""
    return (_dot(q_dot, _own(k, q)) + _dot(q, _own(k_dot, q))) * q.shape[-1] ** -0.5


class _Problem(NamedTuple):
    """Arrays of any leading axes and sizes as the kernels want them, and their results back again."""

    band: Band
    leading: tuple[int, ...]  # become one axis, B
    num_rows: int  # T
    num_keys: int  # S
    width: int  # H
    before: int  # keys of padding before the first
    num_empty: jax.Array  # [B], these included

    @property
    def zeros(self):
        """Makes sums of a warpgroup's rows."""
        return partial(sweep.zeros, _rounded(self.width, WIDTH_UNIT))

    def rows(self, **arrays):
        return {name: self._padded(a, 0, self.band.num_rows - self.num_rows) for name, a in arrays.items()}

    def statistics(self, **arrays):
        return {
            name: self._padded(a[..., None], 0, self.band.num_rows - self.num_rows, 1)[..., 0]
            for name, a in arrays.items()
        }

    def keys(self, **arrays):
        after = self.band.num_keys - self.num_keys - self.before
        return {name: self._padded(a, self.before, after) for name, a in arrays.items()}

    def moving(self, **arrays):
        after = self.band.num_keys - self.num_keys - self.before
        return {name: self._padded(a, 0, after) for name, a in arrays.items()}

    def row_output(self, a):
        return a[..., : self.num_rows, : self.width].reshape(*self.leading, -1, self.num_rows, self.width)

    def statistic_output(self, a):
        return a[..., : self.num_rows].reshape(*self.leading, -1, self.num_rows)

    def _padded(self, a, before, after, width_unit=WIDTH_UNIT):
        """[*leading, ..., any, any] -> [B, ..., any, any]."""
        a = a.reshape(-1, *a.shape[len(self.leading) :])
        width = (0, -a.shape[-1] % width_unit)
        return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(before, after), width])

    def over_keys(self, step, rows, statistics, keys, moving, *, num_scores, products, accumulators=0, **options):
        """See `mosaic_gpu_sweep.over_keys`; `products` are those of a tile of moving and of constant keys."""
        operands = Operands(rows, statistics, keys, moving, self.num_empty)
        plan = sweep.plan(
            rows["q"], len(rows), len(keys) + len(moving), options["stagings"], options["num_outputs"], num_scores
        )
        options |= {"interpret": _is_interpreted(), "accumulators": accumulators}
        with self._counted(options["name"], products, rows, moving, 0, self.num_keys):
            return over_keys(step, operands, band=self.band, plan=plan, **options)

    def over_rows(self, step, rows, statistics, keys, moving, *, num_scores, products, start, stop, **options):
        """Sums [..., stop - start, H] of these keys. See `mosaic_gpu_sweep.over_rows`; `products` as of `over_keys`."""
        operands = Operands(rows, statistics, keys, moving, self.num_empty)
        plan = sweep.plan(
            rows["q"], len(keys) + len(moving), len(rows), options["stagings"], options["accumulators"], num_scores
        )
        first, last = self.before + start, _rounded(self.before + stop, UNIT)
        seen = max(first, self.band.first_row - self.band.window + 1)  # no query sees a key before it
        seen -= seen % plan.block
        options |= {"finish": lambda sums, _: sums, "interpret": _is_interpreted()}
        with self._counted(options["name"], products, rows, moving, start, stop):
            sums = over_rows(step, operands, band=self.band, plan=plan, first_key=seen, num_keys=last - seen, **options)

        def placed(a):
            a = jnp.pad(a, [(0, 0), (max(0, seen - first), 0), (0, 0)])[:, max(0, first - seen) :]
            return a.reshape(*self.leading, *a.shape[1:])[..., : stop - start, : self.width]

        return map(placed, sums)

    def _counted(self, name: str, products: tuple[int, int], rows, moving, start: int, stop: int):
        """A scope for a kernel over keys [start, stop), by which a program's text says what it is and computes."""

        def seen(num_keys):
            """Scores of the last `num_keys` keys."""
            return bands.num_visible(min(self.num_rows, num_keys), num_keys, self.band.window) if num_keys else 0

        first_moving = self.band.first_moving - self.before
        scores_moving = seen(self.num_keys - first_moving) if moving else 0
        scores_constant = seen(self.num_keys - start) - max(scores_moving, seen(self.num_keys - stop))
        heads = math.prod(self.leading) * rows["q"].shape[1]
        flops = products[0] * scores_moving + products[1] * scores_constant
        return marks.kernel(name, 2 * self.width * heads * flops)


def _problem(q, k, v, num_empty, window, num_moving=0) -> _Problem:
    """Keys are padded so that the last `num_moving` of them begin a block."""
    T, S, leading = q.shape[-2], k.shape[-2], k.shape[:-2]
    before = -(S - num_moving) % UNIT
    band = Band(
        num_rows=_rounded(T, UNIT),
        num_keys=_rounded(before + S, UNIT),
        first_row=before + S - T,
        window=min(window or S, S),
        first_moving=before + S - num_moving,
    )
    num_empty = jnp.broadcast_to(num_empty[..., None], leading).reshape(-1) + before
    return _Problem(band, leading, T, S, q.shape[-1], before, num_empty.astype(jnp.int32))


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
