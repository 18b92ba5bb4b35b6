"""How a Hopper kernel visits the band: a program holds a block of one side and streams tiles of the other past it.

Sweeping keys, a program holds queries and visits the tiles of keys that these see: for outputs and gradients of rows.
Sweeping rows, it holds keys and visits the tiles of queries that see them, of all query heads that share them: for
gradients of keys. Either way there is no program, and no step of one, for a tile outside the band. A program is one or
two warpgroups that compute, with 64 queries or keys each, and one that fetches tiles ahead of them (TMA).

Shapes: `M` = rows or keys of a warpgroup (64, that of its matrix instruction), `N` of a tile; `B` batches and key heads
together, `R` query heads per key head, `T` queries, `S` keys (both padded), `H` head width. Rows [B, R, T, H], row
statistics [B, R, T] float32, keys [B, S, H].
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ttt_e2e.kernels import score_tiles

M = 64
SHARED_MEMORY = 227 * 1024  # bytes a program may have


class Plan(NamedTuple):
    """How a sweep is divided."""

    warpgroups: int = 2  # that compute, in a program
    tile: int = 64  # N
    stages: int = 2  # tiles in flight

    @property
    def block(self) -> int:
        """Rows or keys of a program."""
        return self.warpgroups * M


def plan(rows, num_held: int, num_streamed: int, num_staged: int) -> Plan:
    """The largest plan that fits into shared memory: arrays a program holds, streams, and stages weights in."""
    width, size = rows.shape[-1], rows.dtype.itemsize
    for chosen in (Plan(2, stages=3), Plan(2), Plan(1)):
        held = chosen.block * (num_held * width + num_staged * chosen.tile) * size
        if held + chosen.stages * chosen.tile * num_streamed * (width * size + 4) + 2048 <= SHARED_MEMORY:
            return chosen
    raise AssertionError(f"{num_held} + {num_streamed} tiles of head width {width} do not fit into shared memory")


class Band(NamedTuple):
    """Which queries see which keys; positions count keys, padding included."""

    num_rows: int
    num_keys: int
    first_row: int  # position of query 0
    window: int
    first_moving: int  # position of the first key that has a tangent

    def tiles_of_keys(self, row, num_rows: int, num_empty, tile: int):
        """First and last (exclusive) tile of keys that queries [row, row + num_rows) see."""
        position = self.first_row + row
        first = lax.max(lax.max(position - self.window + 1, num_empty), 0)
        last = lax.min(position + num_rows, self.num_keys)
        return lax.div(first, tile), lax.div(last + tile - 1, tile)

    def tiles_of_rows(self, key, num_keys: int, num_empty, tile: int):
        """First and last (exclusive) tile of queries that see any of the keys [key, key + num_keys)."""
        first = lax.max(key - self.first_row, 0)
        last = lax.min(key + num_keys + self.window - 1 - self.first_row, self.num_rows)
        last = jnp.where(key + num_keys > num_empty, lax.max(last, first), first)
        return lax.div(first, tile), lax.div(last + tile - 1, tile)


class Operands(NamedTuple):
    """What a pass reads, by name. Keys that have tangents come with them in `moving`."""

    rows: dict
    statistics: dict
    keys: dict
    moving: dict
    num_empty: jax.Array  # int32 [B], padding counted


class Tile:
    """A tile of scores, queries x keys where keys are swept and keys x queries where rows are, and what makes it."""

    def __init__(self, held, streamed, statistics, staging, by_keys: bool, is_moving: bool, visible):
        self.held, self.streamed, self._statistics, self._staging = held, streamed, statistics, list(staging)
        self.by_keys, self.is_moving, self._visible = by_keys, is_moving, visible
        self.shape = (M, next(iter(streamed.values())).shape[0])

    def products(self, *pairs):
        """The sum over (rows, keys) of rows x keys^T, or its transpose."""

        def compute(sums):
            for rows, keys in pairs:
                held, streamed = (rows, keys) if self.by_keys else (keys, rows)
                plgpu.wgmma(sums, self.held[held], self.streamed[streamed].transpose((1, 0)))
            return sums[...]

        return pl.run_scoped(compute, plgpu.ACC(self.shape, jnp.float32))

    def statistic(self, name):
        """A statistic of the rows, for every score."""
        return self.spread(self._statistics[name])

    def spread(self, statistic):
        """One number a row, for every score."""
        return lax.broadcast_in_dim(statistic, self.shape, [0 if self.by_keys else 1])

    def mask(self, scores):
        """`scores`, very low where a key is not seen; a tile that is seen as a whole is left alone."""
        return self._visible(scores)

    def add(self, *terms):
        """For each (weights, ((sums, name), ...)): adds weights x the streamed array `name` to each of the sums.

        The weights go through shared memory, in the arrays' dtype.
        """
        staged = list(zip(self._staging, terms))
        for staging, (weights, _) in staged:
            staging[...] = weights
        plgpu.commit_smem()
        for staging, (_, products) in staged:
            for sums, name in products:
                plgpu.wgmma(sums, staging, self.streamed[name])

    def added(self, count: int, terms):
        """What `add` makes of `count` sums that start at zero, as arrays; `terms` is given these sums."""
        width = next(iter(self.streamed.values())).shape[1]

        def compute(*sums):
            self.add(*terms(*sums))
            return [total[...] for total in sums]

        return pl.run_scoped(compute, *[plgpu.ACC((M, width), jnp.float32)] * count)


def per_row(value):
    """A constant number for each of a warpgroup's rows."""
    return plgpu.layout_cast(jnp.full((M,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(width: int):
    """Of a warpgroup's rows, in registers."""
    return plgpu.layout_cast(jnp.zeros((M, width), jnp.float32), plgpu.Layout.WGMMA)


def over_keys(step, operands: Operands, *, band: Band, plan: Plan, num_outputs, num_statistics, interpret, **options):
    """Sweeps keys. Returns float32 outputs [B, R, T, H] and statistics [B, R, T].

    See `_sweep` for `step` and `options`.
    """
    B, R, T, H = operands.rows["q"].shape
    out = [jax.ShapeDtypeStruct((B, R, T, H), jnp.float32)] * num_outputs
    out += [jax.ShapeDtypeStruct((B, R, T), jnp.float32)] * num_statistics
    return _sweep(step, operands, band, plan, True, (T // plan.block, R, B), 0, out, interpret, **options)


def over_rows(
    step,
    operands: Operands,
    *,
    band: Band,
    plan: Plan,
    first_key: int,
    num_keys: int,
    num_outputs,
    interpret,
    **options,
):
    """Sweeps rows, for keys [first_key, first_key + num_keys). Returns float32 outputs [B, num_keys, H]."""
    B, _, H = operands.keys["k"].shape
    out = [jax.ShapeDtypeStruct((B, num_keys, H), jnp.float32)] * num_outputs
    return _sweep(
        step, operands, band, plan, False, (num_keys // plan.block, 1, B), first_key, out, interpret, **options
    )


def _sweep(
    step, operands, band, plan, by_keys, grid, first_key, out, interpret, *, accumulators, stagings, carry=(), finish
):
    """The kernel.

    Args:
      step: (tile, accumulators, carry) -> carry, for one tile.
      accumulators: how many sums [M, H] in registers `step` may add to.
      stagings: how many tiles of weights `step` puts into shared memory.
      carry: functions that make the first carry.
      finish: (sums, carry) -> outputs [M, H], statistics [M].
    """
    names = tuple(operands.rows), tuple(operands.statistics), tuple(operands.keys), tuple(operands.moving)
    row_names, statistic_names, key_names, moving_names = names
    arrays = [a for group in operands[:4] for a in group.values()] + [operands.num_empty]
    H, dtype = operands.rows["q"].shape[-1], operands.rows["q"].dtype
    held_names = row_names if by_keys else key_names + moving_names
    streamed_names = key_names if by_keys else row_names
    late_names = moving_names if by_keys else ()  # streamed, but not in every tile
    num_early = len(streamed_names) + (0 if by_keys else len(statistic_names))
    transforms = _transforms(H, dtype)

    def shared(count, rows, columns=H):
        return plgpu.SMEM((count, rows, columns), dtype, transforms=transforms)

    scratch = {
        "held": [shared(plan.warpgroups, M) for _ in held_names],
        "held_barrier": plgpu.Barrier(num_arrivals=len(held_names), num_barriers=plan.warpgroups),
        "streamed": [shared(plan.stages, plan.tile) for _ in streamed_names + late_names],
        "loaded": plgpu.Barrier(num_arrivals=num_early, num_barriers=plan.stages),
        "used": plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        "staging": [shared(plan.warpgroups, M, plan.tile) for _ in range(stagings)],
    }
    if late_names:
        scratch["late"] = plgpu.Barrier(num_arrivals=len(late_names), num_barriers=plan.stages)
    if not by_keys:
        scratch["statistics"] = [plgpu.SMEM((plan.stages, plan.tile), jnp.float32) for _ in statistic_names]

    def body(*refs):
        refs, scratch = refs[:-1], refs[-1]
        gmem = dict(zip((*row_names, *statistic_names, *key_names, *moving_names), refs))
        num_empty_ref, outputs = refs[len(gmem)], refs[len(gmem) + 1 :]
        block, head, batch, warpgroup = (lax.axis_index(name) for name in ("block", "head", "batch", "warpgroup"))
        num_empty = num_empty_ref[batch]
        start = first_key + block * plan.block
        if by_keys:
            first, last = band.tiles_of_keys(start, plan.block, num_empty, plan.tile)
            middle = lax.clamp(first, band.first_moving // plan.tile, last) if late_names else last
            num_steps, num_static = last - first, middle - first
        else:
            first, last = band.tiles_of_rows(start, plan.block, num_empty, plan.tile)
            num_tiles = last - first
            num_steps = num_static = num_tiles * operands.rows["q"].shape[1]

        def source(name, i):
            """Of step i, what is streamed."""
            if by_keys:
                position = (first + i) * plan.tile - (band.first_moving if name in moving_names else 0)
                return gmem[name].at[batch, pl.ds(position, plan.tile)]
            head, tile = lax.div(i, num_tiles), first + lax.rem(i, num_tiles)
            return gmem[name].at[batch, head, pl.ds(tile * plan.tile, plan.tile)]

        def fetch():
            def load(is_moving, i, _):
                slot = lax.rem(i, plan.stages)

                @pl.when(i >= plan.stages)
                def _():
                    plgpu.barrier_wait(scratch["used"].at[slot])

                targets = dict(zip(streamed_names + late_names, scratch["streamed"]))
                if not by_keys:
                    targets |= dict(zip(statistic_names, scratch["statistics"]))
                for name, target in targets.items():
                    if name not in late_names or is_moving:
                        barrier = scratch["late" if name in late_names else "loaded"]
                        plgpu.copy_gmem_to_smem(source(name, i), target.at[slot], barrier.at[slot])
                return ()

            def drain(i, _):
                plgpu.barrier_wait(scratch["used"].at[lax.rem(i, plan.stages)])
                return ()

            lax.fori_loop(0, num_static, partial(load, False), ())
            if late_names:
                lax.fori_loop(num_static, num_steps, partial(load, True), ())
            lax.fori_loop(lax.max(num_steps - plan.stages, 0), num_steps, drain, ())

        def compute():
            own = start + warpgroup * M
            barrier = scratch["held_barrier"].at[warpgroup]
            held = {name: ref.at[warpgroup] for name, ref in zip(held_names, scratch["held"])}

            def place(offset):
                return (batch, head, pl.ds(own, M)) if by_keys else (batch, pl.ds(own - offset, M))

            for name, ref in held.items():
                offset = band.first_moving if name in moving_names else 0
                plgpu.copy_gmem_to_smem(gmem[name].at[place(offset)], ref, barrier)
            plgpu.barrier_wait(barrier)
            if by_keys:
                own_statistics = {name: _load(gmem[name].at[place(0)], 1) for name in statistic_names}

            def visit(sums, is_moving, i, carry):
                slot = lax.rem(i, plan.stages)
                plgpu.barrier_wait(scratch["loaded"].at[slot])
                if is_moving and late_names:
                    plgpu.barrier_wait(scratch["late"].at[slot])
                streamed = {name: ref.at[slot] for name, ref in zip(streamed_names + late_names, scratch["streamed"])}
                if by_keys:
                    statistics, row, key = own_statistics, own, (first + i) * plan.tile
                else:
                    statistics = {n: _load(ref.at[slot], 0) for n, ref in zip(statistic_names, scratch["statistics"])}
                    row, key = (first + lax.rem(i, num_tiles)) * plan.tile, own
                visible = partial(_mask, band, row, key, num_empty, by_keys)
                staging = [ref.at[warpgroup] for ref in scratch["staging"]]
                tile = Tile(held, streamed, statistics, staging, by_keys, is_moving, visible)
                carry = step(tile, sums, carry)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch["used"].at[slot])
                return carry

            def loop(*sums):
                state = tuple(make() for make in carry)
                state = lax.fori_loop(0, num_static, partial(visit, sums, bool(moving_names) and not by_keys), state)
                if late_names:
                    state = lax.fori_loop(num_static, num_steps, partial(visit, sums, True), state)
                return [total[...] for total in sums], state

            if accumulators:
                sums, state = pl.run_scoped(loop, *[plgpu.ACC((M, H), jnp.float32)] * accumulators)
            else:
                sums, state = loop()
            for ref, result in zip(outputs, finish(sums, state), strict=True):
                ref[place(first_key)] = result

        if not interpret and plan.warpgroups == 2:  # those that compute get the registers of the one that fetches
            compute, fetch = _with_registers(compute, 232, "increase"), _with_registers(fetch, 40, "decrease")
        pl.when(warpgroup < plan.warpgroups)(compute)
        pl.when(warpgroup == plan.warpgroups)(fetch)

    return plgpu.kernel(
        lambda *refs: pl.run_scoped(lambda s: body(*refs, s), scratch, collective_axes="warpgroup"),
        out_type=out,
        grid=grid,
        grid_names=("block", "head", "batch"),
        num_threads=plan.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )(*arrays)


def _load(statistic, reduced: int):
    """Into the registers of threads that hold a tile of scores, of which it is a statistic over axis `reduced`."""
    index = ((),) if jax.__version_info__ < (0, 11, 2) else ()
    return plgpu.load(statistic, *index, layout=plgpu.Layout.WGMMA.reduce(reduced), optimized=False)


def _with_registers(function, number: int, action: str):
    def run():
        plgpu.set_max_registers(number, action=action)
        function()

    return run


def _mask(band: Band, row, key, num_empty, by_keys: bool, scores):
    """`scores` of queries from `row` on and keys from `key` on, masked; tiles inside the band are left as they are."""
    num_rows, num_keys = scores.shape if by_keys else scores.shape[::-1]
    row = band.first_row + row
    is_inside = (key + num_keys - 1 <= row) & (key > row + num_rows - 1 - band.window) & (key >= num_empty)

    def at_the_edge(scores):
        def positions(first, axis):
            layout = plgpu.Layout.WGMMA
            return first + plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=layout)

        query, key_of = positions(row, 0 if by_keys else 1), positions(key, 1 if by_keys else 0)
        visible = (key_of <= query) & (key_of > query - band.window) & (key_of >= num_empty)
        return score_tiles.mask(scores, visible)

    return lax.cond(is_inside, lambda scores: scores, at_the_edge, scores)


def _transforms(width: int, dtype):
    """How a tile lies in shared memory: as wide a swizzle as the head width divides into."""
    swizzle = next(bytes for bytes in (128, 64, 32) if width * dtype.itemsize % bytes == 0)
    return plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)
