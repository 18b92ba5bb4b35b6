"""Progress bars on stderr of training, evaluation and generation, which a caller from Python may hide."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
