"""The grid of the TPU kernels: one program for each tile of the band and each query head, and none outside the band.

Tiles are listed in memory that is read ahead, row by row or column by column. What is missing of a block of positions
is padded in front: padded keys count as empty ones, and padded queries have cotangents of 0.

Shapes: `t` positions of a block, `X` leading axes as one, else those of xla.py.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ttt_e2e.kernels.attention import bands

WIDE = jnp.float32
COLUMN_BITS = 16  # of the int32 that says where a tile is; a TPU's scalar memory holds some 250 000 of these


class Step(NamedTuple):
    """One program of the grid, which visits one tile. Its methods are decorators of the functions it runs."""

    is_first: jax.Array  # in its row of tiles; by keys, in its column for all query heads
    is_last: jax.Array
    parts: list  # (whether the tile is in a part of the columns, options of `visit` for that part)
    visible: Callable  # () -> whether each score is visible, [t, t]

    def start(self, function):
        """Runs the function before the first tile."""
        pl.when(self.is_first)(function)

    def visit(self, function):
        """Calls the function on the tile: (visible [t, t], is_new, is_wanted).

        `is_new`: the tile's keys have tangents; `is_wanted`: their gradients are asked for.
        """
        for condition, options in self.parts:
            pl.when(condition)(lambda options=options: function(self.visible(), **options))

    def finish(self, function):
        """Runs the function after the last tile."""
        pl.when(self.is_last)(function)


def _step(tiles, place, empty, firsts, is_by_keys: bool, num_heads: int) -> Step:
    """The step of a program.

    Args:
      tiles: the band.
      place: query head, row and column of the tile.
      empty: how many leading keys are empty, padding counted.
      firsts: the first columns that are visited, whose keys have tangents, whose gradients are asked for.
      is_by_keys: whether tiles are visited column by column, by all query heads in turn.
      num_heads: R.
    """
    head, row, column = place
    if is_by_keys:
        start, end = tiles.rows(column)
        is_first, is_last = (row == start) & (head == 0), (row == end) & (head == num_heads - 1)
    else:
        start, end = tiles.columns(row)
        is_first, is_last = column == start, column == end
    own = row + tiles.cached_blocks
    first_visited, first_new, first_wanted = firsts
    is_visible = (column == own) | ((column + 1) * tiles.block > empty)
    edges = [*sorted({max(first, first_visited) for first in firsts}), tiles.key_blocks]
    parts = []
    for start, stop in pairwise(edges):
        options = {"is_new": start >= first_new, "is_wanted": start >= first_wanted}
        parts.append((is_visible & (column >= start) & (column < stop), options))

    def visible():
        query, key = (jax.lax.broadcasted_iota(jnp.int32, (tiles.block,) * 2, axis) for axis in (0, 1))
        distance = query - key + (own - column) * tiles.block
        return (distance >= 0) & (distance < tiles.window) & (key >= empty - column * tiles.block)

    return Step(is_first, is_last, parts, visible)


def by_rows(kernel, tiles, num_empty, rows, keys, widths, scratch):
    """Sums over keys, row by row: outputs [..., R, T, width] in the keys' dtype; the last holds statistics, float32."""
    *leading, T, _ = rows[0].shape
    dtypes = [*[keys[0].dtype] * (len(widths) - 1), WIDE]
    shapes = [(T, width, dtype) for width, dtype in zip(widths, dtypes)]
    outputs = _sweep(kernel, tiles, num_empty, rows, keys, shapes, scratch, is_by_keys=False)
    return [a[..., -T:, :].reshape(*leading, T, -1).astype(dtype) for a, dtype in zip(outputs, dtypes)]


def by_keys(kernel, tiles, num_empty, rows, keys, sums):
    """Sums over rows, column by column: [..., length, width] in the keys' dtype.

    The first one's length says for how many keys `is_wanted` holds.
    """
    leading, dtype = keys[0].shape[:-2], keys[0].dtype
    shapes = [(length, width, dtype) for length, width in sums]
    outputs = _sweep(kernel, tiles, num_empty, rows, keys, shapes, [width for _, width in sums], is_by_keys=True)
    return [last(a, length).reshape(*leading, length, -1).astype(dtype) for a, (length, _) in zip(outputs, sums)]


def _sweep(kernel, tiles, num_empty, rows, keys, outputs, scratch, *, is_by_keys: bool):
    """Runs a kernel over the tiles of all heads and batches.

    Args:
      kernel: function of a `Step` and of four lists of references: to rows, keys, outputs and scratch memory.
      tiles: the band.
      num_empty: leading keys that no query sees.
      rows: arrays [..., R, T, any].
      keys: arrays [..., L, any] of the last L keys; the first has them all, the last as many as have tangents.
      outputs: (positions, width, dtype) of every output.
      scratch: widths of the arrays [t, width] of scratch memory.
      is_by_keys: whether outputs are of keys, not of rows.

    Returns:
      The outputs [X, R, positions, width] or [X, positions, width], their positions padded in front, or cut in front
      where nobody sees the keys; X = the leading axes as one.
    """
    *leading, R, _, _ = rows[0].shape
    X, t, grid = prod(leading), tiles.block, _Grid(tiles, is_by_keys)
    columns = [tiles.blocks_of(a.shape[-2]) for a in keys]
    out_columns = [tiles.blocks_of(length) for length, *_ in outputs] if is_by_keys else [tiles.key_blocks]
    firsts = [tiles.key_blocks - n for n in (max(out_columns), columns[-1], out_columns[0])]
    rows, keys = ([a.astype(_lowered(a.dtype)) for a in arrays] for arrays in (rows, keys))
    rows = [last(a, tiles.query_blocks * t).reshape(X, R, -1, a.shape[-1]) for a in rows]
    keys = [last(a, n * t).reshape(X, -1, a.shape[-1]) for a, n in zip(keys, columns)]
    empty = jnp.broadcast_to(num_empty[..., None], leading).reshape(X) + (tiles.key_blocks * t - tiles.num_keys)
    row, column = tiles.visit(max(out_columns), is_by_keys)
    visited = jnp.asarray(row << COLUMN_BITS | column)
    widths = [width for _, width, _ in outputs]
    if is_by_keys:
        out_specs = [grid.key_block(*sizes) for sizes in zip(out_columns, widths)]
        out_shapes = [(X, n * t, width) for n, width in zip(out_columns, widths)]
    else:
        out_specs = [grid.row_block(width) for width in widths]
        out_shapes = [(X, R, tiles.query_blocks * t, width) for width in widths]
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(X, len(visited), R) if is_by_keys else (X, R, len(visited)),
        in_specs=[grid.row_block(a.shape[-1]) for a in rows]
        + [grid.key_block(n, a.shape[-1]) for n, a in zip(columns, keys)],
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM((t, width), WIDE) for width in scratch],
    )
    out_shapes = [jax.ShapeDtypeStruct(shape, _lowered(output[-1])) for shape, output in zip(out_shapes, outputs)]

    def body(empty, visited, *references):
        x, head, tile = grid.program([pl.program_id(axis) for axis in range(3)])
        step = _step(tiles, (head, *_place(visited[tile])), empty[x], firsts, is_by_keys, R)
        ends = list(accumulate(map(len, (rows, keys, outputs))))
        kernel(step, *(references[start:end] for start, end in pairwise([0, *ends, None])))

    name = kernel.__name__.strip("_")
    return _run(body, grid_spec, out_shapes, name, is_by_keys, (empty, visited, *rows, *keys))


def _run(body, grid_spec, out_shapes, name: str, is_by_keys: bool, operands):
    """Runs a kernel, compiled on TPUs and interpreted elsewhere; which one is decided when the program is lowered."""
    semantics = ("parallel", "arbitrary" if is_by_keys else "parallel", "arbitrary")

    def call(interpret):
        return pl.pallas_call(
            body,
            grid_spec=grid_spec,
            out_shape=out_shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=interpret,
            name=name,
        )

    return jax.lax.platform_dependent(*operands, tpu=call(interpret=False), default=call(interpret=True))


class _Grid(NamedTuple):
    """Which block of every array a program of the grid is given."""

    tiles: bands.Tiles
    is_by_keys: bool

    def program(self, ids):
        """Leading index, query head, and number of the tile, of the grid's indices, the last of which moves first."""
        return (ids[0], ids[2], ids[1]) if self.is_by_keys else ids

    def row_block(self, width: int):
        """The block [t, width] of rows in the tile's row."""

        def index(*args):
            x, head, tile = self.program(args[:3])
            return x, head, _place(args[-1][tile])[0], 0

        return pl.BlockSpec((None, None, self.tiles.block, width), index)

    def key_block(self, num_columns: int, width: int):
        """The block [t, width] of keys in the tile's column, of an array that has the last `num_columns` alone.

        For columns before these it is the array's first block, which is then not read.
        """

        def index(*args):
            x, _, tile = self.program(args[:3])
            return x, jnp.maximum(_place(args[-1][tile])[1] - (self.tiles.key_blocks - num_columns), 0), 0

        return pl.BlockSpec((None, self.tiles.block, width), index)


def _place(tile):
    """Row and column of a tile, from the number that says where it is."""
    return tile >> COLUMN_BITS, tile & (2**COLUMN_BITS - 1)


def _lowered(dtype):
    """The dtype of a kernel's array: float32 for float16, a dtype that TPU kernels lack."""
    return WIDE if dtype == jnp.float16 else dtype


def last(a, length):
    """The last `length` positions [..., length, any], with zeros in front where there are fewer."""
    a = a[..., -length:, :]
    missing = length - a.shape[-2]
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(missing, 0), (0, 0)]) if missing else a
