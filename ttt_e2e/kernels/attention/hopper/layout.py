"""Lays arrays out for Hopper kernels and runs these: padding, the plan of a sweep, and the count of its products.

Shapes: outside, those of xla.py. Inside, `B` batches and key heads as one axis, `T` queries and `S` keys padded to
multiples of `UNIT`, head widths to multiples of `WIDTH_UNIT`.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.kernels.attention import bands
from ttt_e2e.kernels.attention.hopper import sweep
from ttt_e2e.kernels.attention.hopper.sweep import Band, Operands
from ttt_e2e.targets import marks

UNIT = 128  # positions are padded to multiples of it, so that every block and tile is whole
WIDTH_UNIT = 16  # head widths likewise: the depth of a matrix instruction


class Layout(NamedTuple):
    """How the arrays of one call lie in the kernels' arrays."""

    band: Band
    leading: tuple[int, ...]  # axes that become one, B
    num_rows: int  # T without padding
    num_keys: int  # S without padding
    width: int  # H without padding
    before: int  # keys of padding before the first
    num_empty: jax.Array  # [B], padding counted

    @property
    def zeros(self):
        """A function that makes sums of a warpgroup's rows, all 0."""
        return partial(sweep.zeros, rounded(self.width, WIDTH_UNIT))

    def operands(self, rows: dict, statistics: dict, keys: dict, moving: dict) -> Operands:
        """Padded arrays by name: rows [..., R, T, H], statistics [..., R, T], all keys, tangents of the last ones."""
        after_rows = self.band.num_rows - self.num_rows
        after_keys = self.band.num_keys - self.num_keys - self.before
        return Operands(
            rows={name: self._padded(a, 0, after_rows) for name, a in rows.items()},
            statistics={name: self._padded(a[..., None], 0, after_rows, 1)[..., 0] for name, a in statistics.items()},
            keys={name: self._padded(a, self.before, after_keys) for name, a in keys.items()},
            moving={name: self._padded(a, 0, after_keys) for name, a in moving.items()},
            num_empty=self.num_empty,
        )

    def _padded(self, a, before, after, width_unit=WIDTH_UNIT):
        """[*leading, ..., any, any] -> [B, ..., any, any]."""
        a = a.reshape(-1, *a.shape[len(self.leading) :])
        width = (0, -a.shape[-1] % width_unit)
        return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(before, after), width])

    def over_keys(
        self, step, operands, *, products, num_scores, num_outputs, num_statistics, stagings, accumulators=0, **options
    ):
        """Sweeps keys, for rows. Returns float32 outputs [..., R, T, H], then statistics [..., R, T].

        Args:
          step: see `sweep.Kernel`, as are operands, stagings, accumulators and the options name, carry and finish.
          products: matrix products for a score of a moving key, and of a constant key.
          num_scores: arrays of scores that are alive at once.
          num_outputs: how many outputs `finish` gives; each takes registers.
          num_statistics: how many statistics it gives.
        """
        q, num_keys = operands.rows["q"], len(operands.keys) + len(operands.moving)
        plan = sweep.plan(q, len(operands.rows), num_keys, stagings, num_outputs, num_scores)
        out = [jax.ShapeDtypeStruct(q.shape, jnp.float32)] * num_outputs
        out += [jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)] * num_statistics
        options |= {"by_keys": True, "first": 0, "stagings": stagings, "accumulators": accumulators}
        kernel = sweep.Kernel(step, operands, self.band, plan, **options)
        B, R, T, _ = q.shape
        with self._counted(options["name"], products, operands, 0, self.num_keys):
            results = kernel.run((T // plan.block, R, B), out)
        outputs = [a[..., : self.num_rows, : self.width] for a in results[:num_outputs]]
        outputs = [a.reshape(*self.leading, -1, self.num_rows, self.width) for a in outputs]
        statistics = [a[..., : self.num_rows] for a in results[num_outputs:]]
        return *outputs, *(a.reshape(*self.leading, -1, self.num_rows) for a in statistics)

    def over_rows(  # noqa: PLR0913 -- describes a kernel
        self, step, operands, *, name, products, num_scores, accumulators, stagings, start, stop
    ):
        """Sweeps rows, for keys [start, stop). Returns the sums in the accumulators, float32 [..., stop - start, H].

        For the arguments see `over_keys`.
        """
        q, num_keys = operands.rows["q"], len(operands.keys) + len(operands.moving)
        plan = sweep.plan(q, num_keys, len(operands.rows), stagings, accumulators, num_scores)
        first, last = self.before + start, rounded(self.before + stop, UNIT)
        visible = max(first, self.band.first_row - self.band.window + 1)  # no query sees a key before it
        visible -= visible % plan.block
        B, _, H = operands.keys["k"].shape
        out = [jax.ShapeDtypeStruct((B, last - visible, H), jnp.float32)] * accumulators
        options = {"name": name, "by_keys": False, "first": visible, "stagings": stagings, "accumulators": accumulators}
        kernel = sweep.Kernel(step, operands, self.band, plan, finish=lambda sums, _: sums, **options)
        with self._counted(name, products, operands, start, stop):
            sums = kernel.run(((last - visible) // plan.block, 1, B), out)

        def from_start(a):
            a = jnp.pad(a, [(0, 0), (max(0, visible - first), 0), (0, 0)])[:, max(0, first - visible) :]
            return a.reshape(*self.leading, *a.shape[1:])[..., : stop - start, : self.width]

        return [from_start(a) for a in sums]

    def _counted(self, name: str, products: tuple[int, int], operands: Operands, start: int, stop: int):
        """A scope for a kernel over keys [start, stop), in which a program's text says its name and its FLOPs."""

        def visible(num_keys):
            """How many scores of the last `num_keys` keys are visible."""
            return bands.num_visible(min(self.num_rows, num_keys), num_keys, self.band.window) if num_keys else 0

        first_moving = self.band.first_moving - self.before
        scores_moving = visible(self.num_keys - first_moving) if operands.moving else 0
        scores_constant = visible(self.num_keys - start) - max(scores_moving, visible(self.num_keys - stop))
        heads = math.prod(self.leading) * operands.rows["q"].shape[1]
        flops = products[0] * scores_moving + products[1] * scores_constant
        return marks.kernel(name, 2 * self.width * heads * flops)


def lay_out(q, k, num_empty, window: int, num_moving: int = 0) -> Layout:
    """The layout of a call with queries q [..., R, T, H] and keys k [..., S, H].

    Keys are padded so that the last `num_moving` of them begin a block.
    """
    T, S, leading = q.shape[-2], k.shape[-2], k.shape[:-2]
    before = -(S - num_moving) % UNIT
    band = Band(
        num_rows=rounded(T, UNIT),
        num_keys=rounded(before + S, UNIT),
        first_row=before + S - T,
        window=min(window or S, S),
        first_moving=before + S - num_moving,
    )
    num_empty = jnp.broadcast_to(num_empty[..., None], leading).reshape(-1) + before
    return Layout(band, leading, T, S, q.shape[-1], before, num_empty.astype(jnp.int32))


def rounded(size: int, unit: int) -> int:
    """The size, rounded up to a multiple of the unit."""
    return -(-size // unit) * unit
