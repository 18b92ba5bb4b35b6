"""Progress of long work: a bar on a terminal; in a log file, which people read too, a plain line now and then.

And how to hide it, and other lines on stderr.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from absl import logging as absl_logging
from tqdm import tqdm

logger = logging.getLogger(__name__)

FIRST_AFTER_SECONDS = 5.0  # shorter work has no line
EVERY_SECONDS = 30.0

_hidden = ContextVar("hidden", default=False)


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def progress_bar(iterable: Iterable | None = None, *, disable: bool = False, **options):
    """Shows how far work has come: tqdm's bar with these options, or an object that logs lines in its place.

    It shows nothing where it is disabled, or inside of `hidden_progress`.
    """
    return (tqdm if on_terminal() else _Lines)(iterable, disable=disable or _hidden.get(), **options)


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


class _Lines:
    """What is used of a bar of tqdm, in lines: the first after `FIRST_AFTER_SECONDS`, the last at the end."""

    def __init__(self, iterable=None, *, total=None, initial=0, desc="", disable=False, leave=True, **units):
        self.n, self._total = initial, total if total is not None else getattr(iterable, "__len__", lambda: None)()
        self._iterable, self._desc, self._disable, self._postfix = iterable, desc, disable, ""
        self._units = units
        self._start = time.monotonic()
        self._due, self._last = self._start + FIRST_AFTER_SECONDS, 0  # `n` of the last line

    def __iter__(self) -> Iterator:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, n: int = 1) -> None:
        """Adds to what is done."""
        self.n += n
        if time.monotonic() >= self._due:
            self._log()

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """Sets what the next line ends with."""
        self._postfix = text

    def close(self) -> None:
        """Logs the last line, if there were others and work since."""
        if 0 < self._last < self.n:
            self._log()

    def _log(self) -> None:
        self._due, self._last = time.monotonic() + EVERY_SECONDS, self.n
        if self._disable:
            return
        form = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"
        if not self._total:
            form = "{desc}: {n_fmt}, {rate_fmt}, {elapsed} gone{postfix}"
        shown = {"prefix": self._desc, "postfix": self._postfix or None, "bar_format": form, **self._units}
        logger.info("%s", tqdm.format_meter(self.n, self._total, time.monotonic() - self._start, **shown))
