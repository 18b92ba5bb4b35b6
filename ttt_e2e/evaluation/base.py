"""The base class and the registry of evaluations: each is one class, in one file of this folder, under `@register`.

Its flags are made from its settings, the command `evaluate` runs it, and `report` asks it for its row, table and
figure. All files of this folder are imported to define flags, and so must import JAX, and modules that import JAX, in
functions only.
"""

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
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
    """Settings of an evaluation that has no flags of its own."""


class Table(NamedTuple):
    """A table of a report: one or more lines for each run."""

    header: list[str]
    lines: list[list[str]]
    num_words: int  # number of columns at the left that are text; the others are numbers
    note: str  # explains the columns, printed below the table


class Evaluation(ABC):
    """An evaluation: its settings, the method that runs it, and what a report shows of its result.

    A subclass must define `name` and `evaluate`; everything else has defaults.
    """

    name: ClassVar[str]  # name of its flag, its files NAME.json and NAME.jsonl, and its key in report.json
    help: ClassVar[str] = ""  # help of the flag --NAME, a boolean; unused where one of the settings has that flag
    Settings: ClassVar[type] = NoSettings  # a frozen dataclass, its fields made by `ttt_e2e.settings.setting`
    is_default: ClassVar[bool] = False  # runs where no flag asks for another evaluation
    in_one_process: ClassVar[bool] = True  # refuses to run in several processes
    fields: ClassVar[tuple[str, ...]] = ()  # fields of the result that a report needs
    unprinted: ClassVar[tuple[str, ...]] = ()  # fields of the result that the command does not print
    columns: ClassVar[tuple[str, ...]] = ()  # fields of `row`, numbers, that are the columns of the report's table
    note: ClassVar[str] = ""  # explains these columns, below the table
    caption: ClassVar[str] = ""  # caption of the figure
    figure_name: ClassVar[str] = ""  # name of the figure's file, without .png; "" = NAME

    def check(self, subject: Subject, settings) -> Any:
        """Raises `UserError` where this subject cannot be evaluated with these settings.

        The checks of all evaluations come before the first one runs, as that may take hours.
        """
        return None

    @abstractmethod
    def evaluate(self, subject: Subject, output, settings) -> dict:
        """Evaluates the subject, writes `NAME.json` into the directory `output`, and returns its contents.

        `Records.finish` does the writing. If the model computed a number that is not finite, the result has `diverged`:
        a text that says which, and where.
        """

    def printed(self, result: dict) -> dict:
        """The part of a result that the command prints, as a dict for JSON."""
        return {self.name: {k: v for k, v in result.items() if k not in ("about", *self.unprinted)}}

    def read(self, folder: Path) -> Any:
        """Reads the result in `folder`; None where there is none. Raises `UserError` where a field is missing."""
        return read_result(folder / f"{self.name}.json", self.fields)

    def row(self, result) -> Any:
        """The part of a run's result that goes into `report.json`, as JSON values."""
        return {field: result[field] for field in self.fields}

    def table(self, rows: dict[str, Any]) -> Table | None:
        """Makes the report's table; None = this evaluation has none.

        rows: `row` of each run that has a result, by the name of the run.
        """
        if not self.columns:
            return None
        lines = [[run, *(number(row[column]) for column in self.columns)] for run, row in rows.items()]
        return Table(["run", *(column.replace("_", " ") for column in self.columns)], lines, 1, self.note)

    def figure(self, runs: Sequence["Run"]):
        """Draws the report's figure; None = this evaluation has none.

        runs: all runs of the report; at least one has a result, which is `run.results[NAME]`.
        """
        return None


REGISTERED: dict[str, Evaluation] = {}


def register(evaluation: type[Evaluation]) -> type[Evaluation]:
    """Class decorator: registers an evaluation for the commands `evaluate` and `report`."""
    REGISTERED[evaluation.name] = evaluation()
    return evaluation


def evaluations() -> dict[str, Evaluation]:
    """All registered evaluations by name, the default first; imports every file of this folder to register them."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"ttt_e2e.evaluation.{module.name}")
    return dict(sorted(REGISTERED.items(), key=lambda item: (not item[1].is_default, item[0])))


def run_all(asked: list[tuple[Evaluation, Any]], config: Config, checkpoint, output) -> tuple[dict, list[str]]:
    """Runs evaluations, each with its settings.

    Returns what the command prints, as a dict for JSON, and what diverged, one text for each evaluation in which
    anything did.

    Raises:
      UserError: there is no such checkpoint, or checkpoint, held-out text or settings do not fit the config; then
        nothing was run.
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
    printed, diverged = {"output": output}, []
    for evaluation, settings in asked:
        result = evaluation.evaluate(subject, output, settings)
        printed |= evaluation.printed(result)
        diverged += [f"{evaluation.name}: {result['diverged']}"] if "diverged" in result else []
    return printed, diverged


def read_result(path: Path, fields: Sequence[str]) -> dict | None:
    """Reads the JSON object that an evaluation wrote; None where there is no file.

    Raises:
      UserError: the file is damaged, or one of `fields` is missing.
    """
    if not path.is_file():
        return None
    result = read_json(path)
    for field in fields:
        if field not in result:
            raise UserError(f"{path} has no {field!r}: evaluate the run again")
    return result


def number(value: float | None, form: str = ".4f") -> str:
    """Formats a number for a table: integers as they are, others by `form`, None and NaN as a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:{form}}"
