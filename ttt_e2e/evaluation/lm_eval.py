"""Evaluates a checkpoint on tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.answers import Answers
from ttt_e2e.evaluation.base import Evaluation, Table, number, register
from ttt_e2e.evaluation.harness import KEY, AutoTokenizer, Desk, check_tasks, load_tasks, make_model, require_lm_eval
from ttt_e2e.evaluation.records import Records
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.runs.files import parse_json
from ttt_e2e.settings import setting

MODES = {"all": (True,), "none": (False,), "both": (True, False)}  # of `learn`: whether inner steps are taken
SUFFIX = {True: "", False: "_without_learning"}
BOOTSTRAPS = 1000  # of the standard errors that have no formula: they are then within some 2 percent


@dataclass(frozen=True)
class Settings:
    """Settings of the evaluation, made from its flags. Raises `UserError` for an illegal value."""

    tasks: str = setting("lm_eval", "Instead: tasks of lm-evaluation-harness, A,B,....")
    directory: str = setting(
        "lm_eval_tasks_dir", "Directory of your own tasks, YAML files as the harness's.", "", is_path=True
    )
    learn: str = setting("lm_eval_learn", "Learn while reading: all, none, or both, one after the other.", "all")
    limit: int = setting("lm_eval_limit", "Documents of each task, at most; 0 = all.", 0)
    num_fewshot: int = setting("lm_eval_num_fewshot", "Examples before each request; -1 = as the tasks say.", -1)
    max_length: int = setting(
        "lm_eval_max_length",
        "Tokens of a request: longer ones lose their beginning, or are cut in the harness's windows; 0 = any number.",
        0,
    )
    add_bos_token: bool = setting("lm_eval_add_bos_token", "Begin every request with BOS, as documents begin.", True)
    metadata: str = setting("lm_eval_metadata", "JSON object for tasks that make their own data, as RULER's.", "")

    def __post_init__(self):
        if not self.names:
            raise UserError(f"lm_eval is {self.tasks!r}, but it takes the names of tasks, A,B,...")
        if self.learn not in MODES:
            raise UserError(f"lm_eval_learn is {self.learn!r}, but it must be one of {', '.join(MODES)}")
        for name, least in (("limit", 0), ("num_fewshot", -1), ("max_length", 0)):
            if getattr(self, name) < least:
                raise UserError(f"lm_eval_{name} is {getattr(self, name)}, but it must be at least {least}")
        if not isinstance(parse_json(self.metadata or "{}", "lm_eval_metadata"), dict):
            raise UserError(f"lm_eval_metadata is {self.metadata!r}, but it must be a JSON object")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(dict.fromkeys(filter(None, map(str.strip, self.tasks.split(",")))))


@register
class LMEval(Evaluation):
    """Answers the requests of tasks of lm-evaluation-harness, which then computes the tasks' metrics."""

    name = "lm_eval"
    Settings = Settings
    fields = ("tasks",)
    note = (
        "Tasks of lm-evaluation-harness, with standard errors over documents. Learned in: requests that are longer "
        "than a mini-batch, so that an inner step came before one of their predictions; where it is never, the metrics "
        "are those of a model that does not learn."
    )

    def check(self, subject: Subject, settings: Settings) -> Any:
        """Loads the tasks into the `TaskManager` that it returns.

        Raises:
          UserError: the harness or the tokenizer is missing; a task is unknown, cannot be loaded, or asks for what is
            not there.
        """
        require_lm_eval()
        tokenizer = subject.tokenizer
        AutoTokenizer.known[tokenizer.fingerprint] = tokenizer
        manager = load_tasks(settings.names, settings.directory, settings.metadata, tokenizer.fingerprint)
        check_tasks(manager, settings.max_length)
        return manager

    def evaluate(self, subject: Subject, output, settings: Settings) -> dict:
        """Answers the requests that have no record yet, and has the harness compute the metrics."""
        import lm_eval

        from ttt_e2e.inference.reader import ENDLESS

        manager = self.check(subject, settings)
        reader, batch_size = subject.reader(ENDLESS), subject.config.eval.batch_size
        about = subject.about_model(reader, settings) | {"tokenizer": subject.tokenizer.fingerprint}
        records = Records(output, self.name, about | {"harness": lm_eval.__version__}, key=KEY)
        learns = subject.config.model.num_fast_blocks > 0
        # A pool of processes would compute standard errors, forked from one that runs JAX.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        found, answered = {}, []
        for learn in MODES[settings.learn] if learns else (True,):
            answers = Answers(reader, subject.tokenizer, subject.bos_id, learn)
            desk = Desk(answers, records, batch_size, settings.max_length, settings.add_bos_token)
            with redirect_stdout(sys.stderr):  # the harness prints, too
                found[learn] = lm_eval.simple_evaluate(
                    make_model(desk),
                    tasks=list(settings.names),
                    task_manager=manager,
                    num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
                    limit=settings.limit or None,
                    bootstrap_iters=BOOTSTRAPS,
                    log_samples=False,
                )
            answered += desk.answered if learn and learns else []
        return records.finish({"step": subject.step, "tasks": summarise(found, answered)})

    def table(self, rows: dict[str, dict]) -> Table:
        """Makes the report's table: a line for each run, task and metric."""
        metrics = [metric for row in rows.values() for task in row["tasks"] for metric in task["metrics"]]
        suffixes = [suffix for suffix in SUFFIX.values() if any(f"value{suffix}" in metric for metric in metrics)]
        header = ["run", "task", "learned in", "metric", "documents"]
        for suffix in suffixes:
            header += [f"value{suffix}".replace("_", " "), "std. error"]
        lines = []
        for run, row in rows.items():
            for task in row["tasks"]:
                words = [run, task["task"], _learned_in(task)]
                for metric in task["metrics"]:
                    name = metric["metric"] if metric["filter"] == "none" else f"{metric['metric']}, {metric['filter']}"
                    values = [
                        metric.get(f"{each}{suffix}") for suffix in suffixes for each in ("value", "standard_error")
                    ]
                    lines.append([*words, name, *map(number, (task["num_documents"], *values))])
        return Table(header, lines, 4, self.note)


def summarise(found: dict[bool, dict], answered: list[dict]) -> list[dict]:
    """Makes the list `tasks` of the result, one dict for each task and group of tasks.

    Args:
      found: what `simple_evaluate` returned, by whether the model learned.
      answered: records of the requests that a model with fast weights was asked while it learned.
    """
    tasks = []
    for name, first in next(iter(found.values()))["results"].items():
        metrics = {}
        for learn, results in found.items():
            of_name = results["results"][name]
            for key, value in of_name.items():
                metric, comma, filter_name = key.partition(",")
                if comma and not metric.endswith("_stderr"):
                    error = of_name.get(f"{metric}_stderr,{filter_name}")
                    entry = metrics.setdefault(key, {"metric": metric, "filter": filter_name})
                    entry[f"value{SUFFIX[learn]}"] = _number_or_none(value)
                    entry[f"standard_error{SUFFIX[learn]}"] = _number_or_none(error)
        if not metrics:
            continue  # a group that is only a list of tasks
        task = {"task": name, "num_documents": first.get("sample_len"), "metrics": list(metrics.values())}
        of_task = [record for record in answered if record["task"] == name]
        if of_task:
            requests, learned = (
                {(record["kind"], record["request"]) for record in of_task if record["inner_steps"] >= least}
                for least in (0, 1)
            )
            task |= {"num_requests": len(requests), "num_requests_learned_in": len(learned)}
        tasks.append(task)
    return tasks


def _number_or_none(value) -> float | None:
    """The number that the harness gives; None where it gives words, such as N/A, or what is no finite number."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _learned_in(task: dict) -> str:
    """How many of a task's requests the model learned in, for the table."""
    if "num_requests" not in task:
        return "–"
    learned, count = task["num_requests_learned_in"], task["num_requests"]
    return f"{learned} of {count} requests" if learned else f"never ({count} requests)"
