"""How a Hopper kernel visits the band: a program holds a block of queries and streams tiles of keys, or vice versa.

In a sweep over keys, a program holds queries and visits the tiles of keys that these see: for outputs and gradients of
rows. In a sweep over rows, it holds keys and visits the tiles of queries that see them, of all query heads that share
them: for gradients of keys. Either way there is no program, and no step of one, for a tile outside the band. A program
is one or two warpgroups that compute, with 64 queries or keys each, and one that fetches tiles ahead of them (TMA).

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

from ttt_e2e import targets

M = 64
SHARED_MEMORY = 227 * 1024  # bytes a program may have
REGISTERS = 192  # of the 240 of a thread: what may go to sums and scores


class Plan(NamedTuple):
    """How a sweep is divided into programs and tiles."""

    warpgroups: int = 2  # that compute, in a program
    tile: int = 64  # N
    stages: int = 2  # tiles in flight

    @property
    def block(self) -> int:
        """Rows or keys of a program."""
        return self.warpgroups * M


def plan(rows, num_held: int, num_streamed: int, num_staged: int, num_sums: int, num_scores: int) -> Plan:
    """The largest plan that fits into shared memory and registers.

    In shared memory are the arrays a program holds, those it streams, and staged weights. In the registers of a
    thread are its part of the sums, H/2 numbers each, and of the arrays of scores that are alive at once, N/2 each.
    """
    width, size = rows.shape[-1], rows.dtype.itemsize
    tile = 64 if num_sums * width // 2 + num_scores * 64 // 2 <= REGISTERS else 32
    for chosen in (Plan(2, tile, stages=3), Plan(2, tile), Plan(1, tile)):
        held = chosen.block * (num_held * width + num_staged * chosen.tile) * size
        if held + chosen.stages * chosen.tile * num_streamed * (width * size + 4) + 2048 <= SHARED_MEMORY:
            return chosen
    raise AssertionError(f"{num_held} + {num_streamed} tiles of head width {width} do not fit into shared memory")


class Band(NamedTuple):
    """Which queries see which keys. Positions are indices of keys, padding included."""

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
    """The padded arrays that a kernel reads, by name."""

    rows: dict  # [B, R, T, H]
    statistics: dict  # [B, R, T]
    keys: dict  # [B, S, H]
    moving: dict  # tangents of the last keys, [B, any, H]
    num_empty: jax.Array  # int32 [B], padding counted


class Tile:
    """The operations of a step on one tile of scores: [queries, keys] where keys are swept, else [keys, queries]."""

    def __init__(self, held, streamed, statistics, staging, by_keys: bool, is_moving: bool, masked):
        self.held, self.streamed, self._statistics, self._staging = held, streamed, statistics, list(staging)
        self.by_keys, self.is_moving, self._masked = by_keys, is_moving, masked
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
        """A statistic of the rows, repeated for every score of its row."""
        return self.spread(self._statistics[name]())

    def spread(self, statistic):
        """One number a row, repeated for every score of the row."""
        return lax.broadcast_in_dim(statistic, self.shape, [0 if self.by_keys else 1])

    def mask(self, hidden: float, *arrays):
        """Arrays of scores, with `hidden` where the key is not visible; a wholly visible tile is left as it is."""
        return self._masked(hidden, lax.optimization_barrier(arrays))

    def stage(self, *weights):
        """Copies weights to shared memory, in the arrays' dtype: the place matrix products take operands from."""
        staged = [self._staging.pop(0) for _ in weights]
        for staging, w in zip(staged, weights):
            staging[...] = w
        plgpu.commit_smem()
        return staged

    def add(self, sums, *pairs):
        """For each (staged weights, name): adds weights x the streamed array `name` to the sums."""
        for staged, name in pairs:
            plgpu.wgmma(sums, staged, self.streamed[name])

    def sum(self, *pairs):
        """The same as `add` to sums of 0, returned."""
        width = next(iter(self.streamed.values())).shape[1]

        def compute(sums):
            self.add(sums, *pairs)
            return sums[...]

        return pl.run_scoped(compute, plgpu.ACC((M, width), jnp.float32))


def per_row(value):
    """The same number for each of a warpgroup's rows: [M], in registers."""
    return plgpu.layout_cast(jnp.full((M,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(width: int):
    """Zeros [M, width] for a warpgroup's rows, in registers."""
    return plgpu.layout_cast(jnp.zeros((M, width), jnp.float32), plgpu.Layout.WGMMA)


class _Place(NamedTuple):
    """Which rows or keys a program is for, and which tiles of the other side it visits."""

    batch: jax.Array
    head: jax.Array
    start: jax.Array  # its first row or key
    num_empty: jax.Array
    first: jax.Array  # tile of the other side
    num_tiles: jax.Array
    num_static: jax.Array  # steps before the first whose keys have tangents
    num_steps: jax.Array


class Kernel:
    """One kernel: a sweep over keys or over rows.

    Args:
      step: (tile, accumulators, carry) -> carry, which visits one tile.
      operands: the arrays that are read.
      band: says which tiles there are.
      plan: says how large they are.
      name: of the compiled kernel.
      by_keys: whether keys are swept, for rows, or rows, for keys.
      first: the first row or key that a program is for.
      accumulators: how many sums [M, H] in registers `step` may add to.
      stagings: how many tiles of weights `step` puts into shared memory.
      finish: (sums, carry) -> outputs [M, H], statistics [M].
      carry: functions that make the first carry.
    """

    def __init__(  # noqa: PLR0913 -- a pass describes its kernel in these words
        self, step, operands, band, plan, *, name, by_keys, first, accumulators, stagings, finish, carry=()
    ):
        self.name = name
        self.step, self.operands, self.band, self.plan = step, operands, band, plan
        self.by_keys, self.first, self.interpret = by_keys, first, targets.current().platform != "gpu"
        self.accumulators, self.stagings, self.carry, self.finish = accumulators, stagings, carry, finish
        rows, statistics, keys, moving = map(tuple, operands[:4])
        self.moving, self.statistics = moving, statistics
        self.held = rows if by_keys else keys + moving
        self.late = moving if by_keys else ()  # streamed, but not at every step
        self.streamed = (keys if by_keys else rows) + self.late
        self.streamed_statistics = () if by_keys else statistics

    def run(self, grid, out):
        """Runs the kernel. Returns arrays of the shapes `out`."""
        arrays = [a for group in self.operands[:4] for a in group.values()] + [self.operands.num_empty]
        names = [name for group in self.operands[:4] for name in group]

        def body(*refs):
            gmem, (num_empty, *outputs) = dict(zip(names, refs)), refs[len(names) :]
            allocated = partial(self._program, gmem, num_empty, outputs)
            pl.run_scoped(allocated, self._scratch(), collective_axes="warpgroup")

        return plgpu.kernel(
            body,
            out_type=out,
            grid=grid,
            grid_names=("block", "head", "batch"),
            num_threads=self.plan.warpgroups + 1,
            thread_name="warpgroup",
            kernel_name=self.name,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **({"interpret": plgpu.InterpretGPUParams()} if self.interpret else {}),
        )(*arrays)

    def _scratch(self) -> dict:
        """Shared memory and barriers, with a slot for every warpgroup or every tile in flight."""
        q, plan = self.operands.rows["q"], self.plan

        def shared(count, rows, columns=q.shape[-1]):
            transforms = _transforms((q.shape[-1], plan.tile), q.dtype)
            return plgpu.SMEM((count, rows, columns), q.dtype, transforms=transforms)

        def barrier(arrivals, count=plan.stages):
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

        scratch = {
            "held": {name: shared(plan.warpgroups, M) for name in self.held},
            "streamed": {name: shared(plan.stages, plan.tile) for name in self.streamed},
            "staging": [shared(plan.warpgroups, M, plan.tile) for _ in range(self.stagings)],
            "holding": barrier(len(self.held), plan.warpgroups),
            "loaded": barrier(len(self.streamed) - len(self.late) + len(self.streamed_statistics)),
            "used": barrier(plan.warpgroups),
        }
        if self.late:
            scratch["late"] = barrier(len(self.late))
        for name in self.streamed_statistics:
            scratch["streamed"][name] = plgpu.SMEM((plan.stages, plan.tile), jnp.float32)
        return scratch

    def _program(self, gmem, num_empty, outputs, scratch):
        warpgroup = lax.axis_index("warpgroup")
        compute = partial(self._compute, gmem, num_empty, outputs, scratch, warpgroup)
        fetch = partial(self._fetch, gmem, num_empty, scratch)
        if not self.interpret and self.plan.warpgroups == 2:  # those that compute get registers of the one that fetches
            compute, fetch = _with_registers(compute, 240, "increase"), _with_registers(fetch, 24, "decrease")
        pl.when(warpgroup < self.plan.warpgroups)(compute)
        pl.when(warpgroup == self.plan.warpgroups)(fetch)

    def _place(self, num_empty) -> _Place:
        block, head, batch = (lax.axis_index(name) for name in ("block", "head", "batch"))
        num_empty, start, plan = num_empty[batch], self.first + block * self.plan.block, self.plan
        if not self.by_keys:  # every query head in turn
            first, last = self.band.tiles_of_rows(start, plan.block, num_empty, plan.tile)
            num_steps = (last - first) * self.operands.rows["q"].shape[1]
            return _Place(batch, head, start, num_empty, first, last - first, num_steps, num_steps)
        first, last = self.band.tiles_of_keys(start, plan.block, num_empty, plan.tile)
        static = lax.clamp(first, self.band.first_moving // plan.tile, last) if self.late else last
        return _Place(batch, head, start, num_empty, first, last - first, static - first, last - first)

    def _offset(self, name: str) -> int:
        """The position of an array's first key."""
        return self.band.first_moving if name in self.moving else 0

    def _tile(self, place: _Place, i):
        """The tile visited at step i: each tile of keys once, each tile of rows once for every query head."""
        return place.first + (i if self.by_keys else lax.rem(i, place.num_tiles))

    def _source(self, gmem, place: _Place, name: str, i):
        """The part of an array that is streamed at step i."""
        tile, size = self._tile(place, i), self.plan.tile
        if self.by_keys:
            return gmem[name].at[place.batch, pl.ds(tile * size - self._offset(name), size)]
        return gmem[name].at[place.batch, lax.div(i, place.num_tiles), pl.ds(tile * size, size)]

    def _fetch(self, gmem, num_empty, scratch):
        """Runs in the warpgroup that fetches: copies the tiles of every step into shared memory, ahead of their use."""
        place, stages = self._place(num_empty), self.plan.stages

        def load(is_moving, i, _):
            slot = lax.rem(i, stages)

            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(scratch["used"].at[slot])

            for name, target in scratch["streamed"].items():
                if name not in self.late or is_moving:
                    barrier = scratch["late" if name in self.late else "loaded"]
                    plgpu.copy_gmem_to_smem(self._source(gmem, place, name, i), target.at[slot], barrier.at[slot])
            return ()

        def drain(i, _):
            plgpu.barrier_wait(scratch["used"].at[lax.rem(i, stages)])
            return ()

        lax.fori_loop(0, place.num_static, partial(load, False), ())
        if self.late:
            lax.fori_loop(place.num_static, place.num_steps, partial(load, True), ())
        lax.fori_loop(lax.max(place.num_steps - stages, 0), place.num_steps, drain, ())

    def _compute(self, gmem, num_empty, outputs, scratch, warpgroup):
        """Runs in a warpgroup that computes: visits all tiles, then writes the results of its M rows or keys."""
        place = self._place(num_empty)
        own = place.start + warpgroup * M

        def rows_or_keys(offset):
            at = pl.ds(own - offset, M)
            return (place.batch, place.head, at) if self.by_keys else (place.batch, at)

        barrier = scratch["holding"].at[warpgroup]
        for name, ref in scratch["held"].items():
            source = gmem[name].at[rows_or_keys(self._offset(name))]
            plgpu.copy_gmem_to_smem(source, ref.at[warpgroup], barrier)
        plgpu.barrier_wait(barrier)
        statistics = {}
        if self.by_keys:
            rows = {name: _load(gmem[name].at[rows_or_keys(0)], 1) for name in self.statistics}
            statistics = {name: partial(lambda loaded: loaded, row) for name, row in rows.items()}
        visit = partial(self._visit, scratch, place, warpgroup, statistics)

        def loop(*sums):
            state = tuple(make() for make in self.carry)
            is_moving = bool(self.moving) and not self.by_keys
            state = lax.fori_loop(0, place.num_static, partial(visit, sums, is_moving), state)
            if self.late:
                state = lax.fori_loop(place.num_static, place.num_steps, partial(visit, sums, True), state)
            return [total[...] for total in sums], state

        width = self.operands.rows["q"].shape[-1]
        accumulators = [plgpu.ACC((M, width), jnp.float32)] * self.accumulators
        sums, state = pl.run_scoped(loop, *accumulators) if accumulators else loop()
        for ref, result in zip(outputs, self.finish(sums, state), strict=True):
            ref[rows_or_keys(self.first)] = result

    def _visit(self, scratch, place: _Place, warpgroup, statistics, sums, is_moving, i, carry):
        """One step: waits for a tile, calls the pass's step on it, and gives its memory back."""
        # Without it the compiler computes the addresses and descriptors of all these arrays before the loop: some 40
        # numbers, which leave too few registers for scores.
        warpgroup = lax.optimization_barrier(warpgroup)
        own = place.start + warpgroup * M
        held = {name: ref.at[warpgroup] for name, ref in scratch["held"].items()}
        staging = [ref.at[warpgroup] for ref in scratch["staging"]]
        slot, tile = lax.rem(i, self.plan.stages), self._tile(place, i)
        plgpu.barrier_wait(scratch["loaded"].at[slot])
        if is_moving and self.late:
            plgpu.barrier_wait(scratch["late"].at[slot])
        streamed = {name: scratch["streamed"][name].at[slot] for name in self.streamed}
        loaded = {name: partial(_load, scratch["streamed"][name].at[slot], 0) for name in self.streamed_statistics}
        masked = partial(_mask, self.band, self.by_keys, own, tile * self.plan.tile, place.num_empty)
        carry = self.step(
            Tile(held, streamed, statistics | loaded, staging, self.by_keys, is_moving, masked), sums, carry
        )
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(scratch["used"].at[slot])
        return carry


def _load(statistic, reduced: int):
    """Loads a statistic into registers, laid out as a sum over axis `reduced` of a tile of scores would be."""
    index = ((),) if jax.__version_info__ < (0, 11, 2) else ()
    return plgpu.load(statistic, *index, layout=plgpu.Layout.WGMMA.reduce(reduced), optimized=False)


def _with_registers(function, number: int, action: str):
    def run():
        plgpu.set_max_registers(number, action=action)
        function()

    return run


def _mask(band: Band, by_keys: bool, own, first, num_empty, hidden, arrays):
    """Puts `hidden` where a score is not visible, into arrays over a warpgroup's rows (keys) and a tile's keys (rows).

    The former begin at `own`, the latter at `first`. A row's visible keys (a key's visible rows) are one range; a tile
    inside of all ranges is left as it is.
    """
    shape, position = arrays[0].shape, own + band.first_row if by_keys else own
    first = first if by_keys else first + band.first_row
    last_own, last = position + M - 1, first + shape[1] - 1
    if by_keys:
        is_inside = (last <= position) & (first > last_own - band.window) & (first >= num_empty)
    else:
        is_inside = (first >= last_own) & (last < position + band.window) & (position >= num_empty)

    def at_the_edge(*arrays):
        mine = position + plgpu.broadcasted_iota(jnp.int32, (M,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        if by_keys:
            lowest, highest = lax.max(mine - (band.window - 1), num_empty), mine
        else:
            lowest, highest = mine, jnp.where(mine >= num_empty, mine + (band.window - 1), -1)
        lowest, highest = (lax.broadcast_in_dim(bound, shape, [0]) for bound in (lowest, highest))
        other = first + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        visible = (lowest <= other) & (other <= highest)
        return tuple(jnp.where(visible, a, hidden) for a in arrays)

    return lax.cond(is_inside, lambda *arrays: arrays, at_the_edge, *arrays)


def _transforms(widths, dtype):
    """The layout of all tiles in shared memory: the widest swizzle that divides all of their widths."""
    swizzle = next(n for n in (128, 64, 32) if all(width * dtype.itemsize % n == 0 for width in widths))
    return plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)
