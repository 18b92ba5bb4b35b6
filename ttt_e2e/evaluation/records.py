"""Records of an evaluation under way: what is finished stays finished when it is killed and started again.

`NAME.jsonl` has on its first line what its records are about, and then a record a line, appended as they are finished;
`NAME.json` is written once all of them are.
"""

import json
import logging

from etils import epath

from ttt_e2e.errors import UserError
from ttt_e2e.runs.files import replace_text

logger = logging.getLogger(__name__)


class Records:
    """The finished records of one evaluation, by their key, in a directory."""

    def __init__(self, output, name: str, about: dict, key: tuple[str, ...]):
        """Reads the records that an earlier start left, where it was about the same; else begins anew, and says so.

        Args:
          output: directory, made if needed.
          name: of the evaluation.
          about: all that the records depend on; JSON. Part of the result.
          key: the fields that tell a record from the others.

        Raises:
          UserError: the directory cannot be made or written to.
        """
        directory = epath.Path(output)
        self._path, self._result = directory / f"{name}.jsonl", directory / f"{name}.json"
        self._key, self.about = key, json.loads(json.dumps(about))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(self._path)
            if lines and (difference := _difference(lines[0].get("about"), self.about)):
                logger.warning("%s is of other settings (%s): starting anew", self._path, difference)
                lines = []
            if not lines:
                self._result.unlink(missing_ok=True)  # it would stand beside records that are not its own
            # Written again, as a kill may have left half a line at the end.
            replace_text(self._path, "".join(json.dumps(line) + "\n" for line in lines or [{"about": self.about}]))
        except OSError as error:
            raise UserError(f"output {output} cannot be written ({error.strerror or error})") from None
        self.done = {self._key_of(record): record for record in lines[1:]}
        if self.done:
            logger.info("%s: going on after %d finished records", self._path, len(self.done))

    def unfinished(self, first: tuple, count: int, batch_size: int) -> list[tuple[list[int], list[int]]]:
        """Batches of the numbers below `count` that have a number n whose record, of key (*first, n), is not finished.

        Returns:
          (a batch, the same filled up to `batch_size` with its last number) for each: another size would compile
          another program.
        """
        batches = [list(range(begin, min(begin + batch_size, count))) for begin in range(0, count, batch_size)]
        missing = [batch for batch in batches if not all((*first, n) in self.done for n in batch)]
        return [(batch, batch + batch[-1:] * (batch_size - len(batch))) for batch in missing]

    def add(self, records: list[dict]) -> None:
        """Appends finished records."""
        with self._path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.done |= {self._key_of(record): record for record in records}

    def finish(self, summary: dict) -> dict:
        """Writes `NAME.json`, whole or not at all; returns what it holds."""
        result = {**summary, "about": self.about}
        replace_text(self._result, json.dumps(result, indent=2) + "\n")
        return result

    def _key_of(self, record: dict) -> tuple:
        return tuple(record[field] for field in self._key)


def _whole_lines(path: epath.Path) -> list[dict]:
    """The objects of a JSONL file up to the first line that is broken or has no end; none where there is no file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
        if not isinstance(found[-1], dict):
            return found[:-1]
    return found


def _difference(theirs, ours, name: str = "") -> str:
    """The first field in which two nested dicts differ, in words; "" where there is none."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        fields = dict.fromkeys([*ours, *theirs])
        found = (_difference(theirs.get(f), ours.get(f), f"{name}.{f}".strip(".")) for f in fields)
        return next(filter(None, found), "")
    return "" if theirs == ours else f"{name or 'about'} was {theirs!r}, is {ours!r}"
