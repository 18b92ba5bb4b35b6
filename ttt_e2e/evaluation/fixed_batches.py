"""Batches of a fixed size: one of another size would compile another program."""

from collections.abc import Iterator, Sequence


def batches(items: Sequence, batch_size: int) -> Iterator[list]:
    """Items in their order, `batch_size` at a time (the last batch may be shorter)."""
    for begin in range(0, len(items), batch_size):
        yield list(items[begin : begin + batch_size])


def fill_up(rows: list, batch_size: int) -> list:
    """Rows of a batch with copies of the last, up to `batch_size`."""
    return rows + rows[-1:] * (batch_size - len(rows))
