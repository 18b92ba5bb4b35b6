"""Progress of long work: a bar on a terminal; in a log file, which people read too, a plain line now and then."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

logger = logging.getLogger(__name__)

FIRST_AFTER_SECONDS = 5.0  # shorter work has no line
EVERY_SECONDS = 30.0


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def progress_bar(iterable: Iterable | None = None, **options):
    """Shows how far work has come: tqdm's bar with these options, or an object that logs lines in its place."""
    return tqdm(iterable, **options) if on_terminal() else _Lines(iterable, **options)


class _Lines:
    """What is used of a bar of tqdm, in lines: the first after `FIRST_AFTER_SECONDS`, the last at the end."""

    def __init__(self, iterable=None, *, total=None, desc="", unit="it", unit_scale=False, disable=False, leave=True):
        self.n, self._total = 0, total if total is not None else getattr(iterable, "__len__", lambda: None)()
        self._iterable, self._desc, self._disable, self._postfix = iterable, desc, disable, ""
        self._units = {"unit": unit, "unit_scale": unit_scale}
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
