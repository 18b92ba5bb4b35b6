"""What an evaluation is: one class, in one file of this folder, under `@register`.

Its flags are made from its settings, the command `evaluate` runs it, and `report` asks it for its row, table and
figure. Flags are made from all files of this folder, so that these import JAX, and what imports it, in functions only.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ttt_e2e.config import Config
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.runs.files import read_json

if TYPE_CHECKING:
    from ttt_e2e.evaluation.runs import Run


@dataclass(frozen=True)
class NoSettings:
    """Of an evaluation that has none."""


class Table(NamedTuple):
    """A table of a report, of several runs."""

    header: list[str]
    lines: list[list[str]]
    num_words: int  # the first columns, which are text; the others are numbers
    note: str


class Evaluation:
    """One evaluation: its settings, how it is made, and what a report shows of it.

    A subclass must have a `name` and the method `evaluate`; all else has defaults.
    """

    name: ClassVar[str]  # of its flag, of its files NAME.json and NAME.jsonl, and of its part of a report
    help: ClassVar[str] = ""  # of the flag --NAME, where none of the settings has that flag: it is then a boolean
    Settings: ClassVar[type] = NoSettings  # a frozen dataclass, its fields made by `ttt_e2e.settings.setting`
    is_default: ClassVar[bool] = False  # made where no flag asks for another
    in_one_process: ClassVar[bool] = True
    fields: ClassVar[tuple[str, ...]] = ()  # of the result, that a report needs
    unprinted: ClassVar[tuple[str, ...]] = ()  # fields of the result that the command does not print
    columns: ClassVar[tuple[str, ...]] = ()  # fields of `row` that are numbers, for the report's table
    note: ClassVar[str] = ""  # what the table's columns mean
    caption: ClassVar[str] = ""  # of the figure
    figure_name: ClassVar[str] = ""  # of the figure's file; "" = NAME

    def check(self, subject: Subject, settings) -> Any:
        """Raises `UserError` for what cannot be evaluated so. All checks come before what may take hours."""

    def evaluate(self, subject: Subject, output, settings) -> dict:
        """Evaluates, writes `NAME.json` into the directory `output` (`Records` does), and returns what that holds."""
        raise NotImplementedError

    def printed(self, result: dict) -> dict:
        """What the command prints of a result."""
        return {self.name: {k: v for k, v in result.items() if k not in ("about", *self.unprinted)}}

    def read(self, folder: Path) -> Any:
        """The result that `evaluate` wrote; None where there is none. Raises `UserError` where it lacks a field."""
        return read_result(folder / f"{self.name}.json", self.fields)

    def row(self, result) -> Any:
        """What `report.json` has of a result of one run, as JSON."""
        return {field: result[field] for field in self.fields}

    def table(self, rows: dict[str, Any]) -> Table | None:
        """A table of the rows of all runs that have one, by their names; None = there is none."""
        if not self.columns:
            return None
        lines = [[run, *(number(row[column]) for column in self.columns)] for run, row in rows.items()]
        return Table(["run", *(column.replace("_", " ") for column in self.columns)], lines, 1, self.note)

    def figure(self, runs: Sequence["Run"]):
        """A figure of all runs, at least one of which has a result, `run.results[NAME]`; None = there is no figure."""


REGISTERED: dict[str, Evaluation] = {}


def register(evaluation: type[Evaluation]) -> type[Evaluation]:
    """Makes an evaluation known to `evaluate` and `report`."""
    REGISTERED[evaluation.name] = evaluation()
    return evaluation


def evaluations() -> dict[str, Evaluation]:
    """All evaluations by their names, the default first: those of this folder, and what was registered elsewhere."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"ttt_e2e.evaluation.{module.name}")
    return dict(sorted(REGISTERED.items(), key=lambda item: (not item[1].is_default, item[0])))


def run_all(asked: list[tuple[Evaluation, Any]], config: Config, checkpoint, output) -> dict:
    """Makes evaluations, each with its settings; what the command prints.

    Raises:
      UserError: no such checkpoint, or it, the held-out text or some settings do not fit the config; nothing was run.
    """
    import jax

    from ttt_e2e.checkpoints.steps import find_step

    subject = Subject(config, checkpoint)
    for evaluation, settings in asked:
        if evaluation.in_one_process:
            if jax.process_count() > 1:
                raise UserError(f"--{evaluation.name} runs in one process, and this is one of several: start it alone")
            find_step(checkpoint)
        evaluation.check(subject, settings)
    printed = {"output": output}
    for evaluation, settings in asked:
        printed |= evaluation.printed(evaluation.evaluate(subject, output, settings))
    return printed


def read_result(path: Path, fields: Sequence[str]) -> dict | None:
    """The JSON object that an evaluation wrote; None where there is no file.

    Raises:
      UserError: it is damaged, or has not all of these fields.
    """
    if not path.is_file():
        return None
    result = read_json(path)
    for field in fields:
        if field not in result:
            raise UserError(f"{path} has no {field!r}: evaluate the run again")
    return result


def number(value: float | None) -> str:
    """A number in a table: an integer as it is, another one with four decimals, a dash for None."""
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"
