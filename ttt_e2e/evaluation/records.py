"""Stores the records of an evaluation as they are finished, so that it can be killed and continued.

`NAME.jsonl` has on its first line what the records depend on, and then one finished record a line; `NAME.json`, the
result, is written when all records are finished.
"""

import logging

from etils import epath

from ttt_e2e.errors import UserError
from ttt_e2e.outputs import writing
from ttt_e2e.runs.files import LinesFile, parse_json, replace_text
from ttt_e2e.strict_json import to_json

logger = logging.getLogger(__name__)


class Records:
    """The finished records of one evaluation, in memory by key (`done`) and in a file."""

    def __init__(self, output, name: str, about: dict, key: tuple[str, ...]):
        """Reads the records of an earlier start with an equal `about`; else starts with none, and logs why.

        Args:
          output: directory to write into, made if needed.
          name: name of the evaluation.
          about: everything that the records depend on, as JSON values; becomes part of the result.
          key: names of the fields that identify a record.

        Raises:
          UserError: the directory cannot be made or written to.
        """
        directory = epath.Path(output)
        self._path, self._result = directory / f"{name}.jsonl", directory / f"{name}.json"
        self._key, self.about = key, parse_json(to_json(about), self._path)
        with writing(f"output {output}"):
            directory.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(self._path)
            if lines and (difference := _difference(lines[0].get("about"), self.about)):
                logger.warning("%s is of other settings (%s): starting anew", self._path, difference)
                lines = []
            if not lines:
                self._result.unlink(missing_ok=True)  # it is a result of other records
            # The file is written again, as a killed process may have left half a line at its end.
            self._file = LinesFile(self._path, [to_json(line) + "\n" for line in lines or [{"about": self.about}]])
        self.done = {self._key_of(record): record for record in lines[1:]}
        if self.done:
            logger.info("%s: going on after %d finished records", self._path, len(self.done))

    def unfinished(self, first: tuple, count: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """Divides the numbers below `count` into batches; returns those that are not finished.

        A batch is not finished where one of its numbers n has no record of key (*first, n).

        Returns:
          A pair for each: the batch, and the batch padded to `batch_size` with its last number, since every other size
          would compile another program.
        """
        batches = [list(range(begin, min(begin + batch_size, count))) for begin in range(0, count, batch_size)]
        missing = [batch for batch in batches if not all((*first, n) in self.done for n in batch)]
        return [(batch, batch + batch[-1:] * (batch_size - len(batch))) for batch in missing]

    def add(self, records: list[dict]) -> None:
        """Appends finished records to the file, and to `done`; in both, numbers that are not finite are None."""
        lines = [to_json(record) + "\n" for record in records]
        self._file.add(lines)
        self._file.flush()
        self.done |= {self._key_of(record): record for record in (parse_json(line, self._path) for line in lines)}

    def finish(self, summary: dict) -> dict:
        """Writes summary and `about` to `NAME.json`, whole or not at all; returns its contents.

        With `diverged`, the first record that has a number that is not finite, if there is one.
        """
        diverged = self._diverged()
        result = to_json({**summary, **({"diverged": diverged} if diverged else {}), "about": self.about}, indent=2)
        self._file.close()
        replace_text(self._result, result + "\n")
        return parse_json(result, self._result)

    def _diverged(self) -> str:
        """Names a number that is not finite, and its record, the first in the order of keys; "" if there is none."""
        for record in sorted(self.done.values(), key=self._key_of):
            for field, value in record.items():
                if value is None:
                    place = ", ".join(f"{name} {record[name]}" for name in self._key)
                    return f"{field} of {place} is NaN or infinite"
        return ""

    def _key_of(self, record: dict) -> tuple:
        return tuple(record[field] for field in self._key)


def read_records(folder, name: str, about: dict | None) -> list[dict]:
    """Reads the records in a directory that a result of this `about` was made of; [] where they are others, or gone."""
    header, *records = _whole_lines(epath.Path(folder) / f"{name}.jsonl") or [{}]
    return records if about and header.get("about") == about else []


def _whole_lines(path: epath.Path) -> list[dict]:
    """Reads the objects of a JSONL file up to the first broken or unfinished line; [] where there is no file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    objects = []
    for line in lines:
        try:
            value = parse_json(line, path)
        except UserError:
            break
        if not isinstance(value, dict):
            break
        objects.append(value)
    return objects


def _difference(theirs, ours, name: str = "") -> str:
    """Describes the first field in which two nested dicts differ; "" where they are equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        fields = dict.fromkeys([*ours, *theirs])
        differences = (_difference(theirs.get(f), ours.get(f), f"{name}.{f}".strip(".")) for f in fields)
        return next(filter(None, differences), "")
    return "" if theirs == ours else f"{name or 'about'} was {theirs!r}, is {ours!r}"
