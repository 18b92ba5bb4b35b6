"""Progress bars of training, evaluation and generation, on stderr; and how to hide these, and other lines there."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from absl import logging as absl_logging
from tqdm import tqdm

_hidden = ContextVar("hidden", default=False)


def progress_bar(iterable=None, *, disable: bool = False, **options) -> tqdm:
    """Makes a tqdm progress bar, which shows nothing where it is disabled, or inside of `hidden_progress`."""
    return tqdm(iterable, disable=disable or _hidden.get(), **options)


@contextmanager
def hidden_progress(hidden: bool = True) -> Iterator[None]:
    """Hides the bars that are made inside of a `with` block; with `hidden` False, changes nothing."""
    token = _hidden.set(hidden or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def quietly(*, progress: bool = False) -> Iterator[None]:
    """Hides what Orbax logs, many lines for every save, inside of a `with` block; and bars, but with `progress`."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with hidden_progress(not progress):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)
