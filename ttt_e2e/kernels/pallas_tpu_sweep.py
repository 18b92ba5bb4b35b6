"""The grid of the kernels for TPUs: one program for each tile of the band and each query head, and none outside of it.

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

WIDE = jnp.float32
COLUMN_BITS = 16  # of the int32 that says where a tile is; a TPU's scalar memory holds some 250 000 of these


class Step(NamedTuple):
    """One program of the grid, which visits one tile; its methods decorate what it then does."""

    is_first: jax.Array  # of its row of tiles or, by keys, of its column and all query heads
    is_last: jax.Array
    parts: list  # (whether the tile is one of these, options of `visit`)
    visible: Callable  # () -> which scores are seen, [t, t]

    def start(self, function):
        """Before the first tile."""
        pl.when(self.is_first)(function)

    def visit(self, function):
        """On a tile; `is_new`: it has tangents of its keys, `is_wanted`: their gradient is wanted."""
        for condition, options in self.parts:
            pl.when(condition)(lambda options=options: function(self.visible(), **options))

    def finish(self, function):
        """After the last tile."""
        pl.when(self.is_last)(function)


def _step(tiles, place, empty, firsts, is_by_keys: bool, num_heads: int) -> Step:
    """`place`: query head, row and column of a tile; `firsts`: first columns visited, with tangents, wanted."""
    head, row, column = place
    if is_by_keys:
        start, end = tiles.rows(column)
        is_first, is_last = (row == start) & (head == 0), (row == end) & (head == num_heads - 1)
    else:
        start, end = tiles.columns(row)
        is_first, is_last = column == start, column == end
    own = row + tiles.cached_blocks
    first_visited, first_new, first_wanted = firsts
    is_seen = (column == own) | ((column + 1) * tiles.block > empty)
    edges = [*sorted({max(first, first_visited) for first in firsts}), tiles.key_blocks]
    parts = []
    for start, stop in pairwise(edges):
        options = {"is_new": start >= first_new, "is_wanted": start >= first_wanted}
        parts.append((is_seen & (column >= start) & (column < stop), options))

    def visible():
        query, key = (jax.lax.broadcasted_iota(jnp.int32, (tiles.block,) * 2, axis) for axis in (0, 1))
        distance = query - key + (own - column) * tiles.block
        return (distance >= 0) & (distance < tiles.window) & (key >= empty - column * tiles.block)

    return Step(is_first, is_last, parts, visible)


def by_rows(kernel, tiles, num_empty, rows, keys, widths, scratch):
    """Outputs [..., R, T, width] in the keys' dtype, but the last one, which is of statistics."""
    *leading, T, _ = rows[0].shape
    dtypes = [*[keys[0].dtype] * (len(widths) - 1), WIDE]
    shapes = [(T, width, dtype) for width, dtype in zip(widths, dtypes)]
    outputs = _sweep(kernel, tiles, num_empty, rows, keys, shapes, scratch, is_by_keys=False)
    return [a[..., -T:, :].reshape(*leading, T, -1).astype(dtype) for a, dtype in zip(outputs, dtypes)]


def by_keys(kernel, tiles, num_empty, rows, keys, sums):
    """Sums [..., length, width] in the keys' dtype; the first is as long as any whose `is_wanted`."""
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
    X, t = prod(leading), tiles.block
    columns = [tiles.blocks_of(a.shape[-2]) for a in keys]
    out_columns = [tiles.blocks_of(length) for length, *_ in outputs] if is_by_keys else [tiles.key_blocks]
    firsts = [tiles.key_blocks - n for n in (max(out_columns), columns[-1], out_columns[0])]
    # Mosaic has no float16; float32 holds all of it.
    rows, keys = ([a.astype(_lowered(a.dtype)) for a in arrays] for arrays in (rows, keys))
    rows = [last(a, tiles.query_blocks * t).reshape(X, R, -1, a.shape[-1]) for a in rows]
    keys = [last(a, n * t).reshape(X, -1, a.shape[-1]) for a, n in zip(keys, columns)]
    empty = jnp.broadcast_to(num_empty[..., None], leading).reshape(X) + (tiles.key_blocks * t - tiles.num_keys)
    rows_visited, columns_visited = tiles.visit(max(out_columns), is_by_keys)
    visited = jnp.asarray(rows_visited << COLUMN_BITS | columns_visited)
    widths = [width for _, width, _ in outputs]
    if is_by_keys:
        out_specs = [_key_block(tiles, *sizes, is_by_keys) for sizes in zip(out_columns, widths)]
        out_shapes = [(X, n * t, width) for n, width in zip(out_columns, widths)]
    else:
        out_specs = [_row_block(tiles, width, is_by_keys) for width in widths]
        out_shapes = [(X, R, tiles.query_blocks * t, width) for width in widths]
    in_specs = [_row_block(tiles, a.shape[-1], is_by_keys) for a in rows]
    in_specs += [_key_block(tiles, n, a.shape[-1], is_by_keys) for n, a in zip(columns, keys)]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(X, len(visited), R) if is_by_keys else (X, R, len(visited)),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM((t, width), WIDE) for width in scratch],
    )
    semantics = ("parallel", "arbitrary" if is_by_keys else "parallel", "arbitrary")

    def body(empty, visited, *references):
        x, head, tile = _program([pl.program_id(axis) for axis in range(3)], is_by_keys)
        step = _step(tiles, (head, *_place(visited[tile])), empty[x], firsts, is_by_keys, R)
        ends = list(accumulate(map(len, (rows, keys, outputs))))
        kernel(step, *(references[start:end] for start, end in pairwise([0, *ends, None])))

    def call(interpret):
        return pl.pallas_call(
            body,
            grid_spec=grid,
            out_shape=[jax.ShapeDtypeStruct(s, _lowered(o[-1])) for s, o in zip(out_shapes, outputs)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )

    return jax.lax.platform_dependent(
        empty, visited, *rows, *keys, tpu=call(interpret=False), default=call(interpret=True)
    )


def _program(ids, is_by_keys: bool):
    """Leading index, query head, and number of the tile: of the grid's indices, the last of which moves first."""
    return (ids[0], ids[2], ids[1]) if is_by_keys else ids


def _place(tile):
    """Row and column."""
    return tile >> COLUMN_BITS, tile & (2**COLUMN_BITS - 1)


def _row_block(tiles, width, is_by_keys):
    def index(*args):
        x, head, tile = _program(args[:3], is_by_keys)
        return x, head, _place(args[-1][tile])[0], 0

    return pl.BlockSpec((None, None, tiles.block, width), index)


def _key_block(tiles, num_columns, width, is_by_keys):
    """Of an array of the last columns; before these its first stays, unread."""

    def index(*args):
        x, _, tile = _program(args[:3], is_by_keys)
        return x, jnp.maximum(_place(args[-1][tile])[1] - (tiles.key_blocks - num_columns), 0), 0

    return pl.BlockSpec((None, tiles.block, width), index)


def _lowered(dtype):
    return WIDE if dtype == jnp.float16 else dtype


def last(a, length):
    """As many last positions, with zeros in front where there are fewer."""
    a = a[..., -length:, :]
    missing = length - a.shape[-2]
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(missing, 0), (0, 0)]) if missing else a
