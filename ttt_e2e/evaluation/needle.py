"""Evaluates the retrieval of a single needle, by its depth in the prompt and the prompt's length.

Shapes: `B` sequences, `L` tokens of a prompt, `n` tokens that follow it, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from ttt_e2e.errors import UserError
from ttt_e2e.evaluation.base import Evaluation, register
from ttt_e2e.evaluation.haystacks import TASKS, Haystacks, Prompt
from ttt_e2e.evaluation.records import Records
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.figures import STYLE, make_figure
from ttt_e2e.progress import progress_bar
from ttt_e2e.settings import setting

if TYPE_CHECKING:
    from ttt_e2e.evaluation.runs import Run
    from ttt_e2e.inference.reader import Reader, ReaderState

MARGIN = 4  # tokens generated beyond those of the answer, as the model may spell its text with more tokens
CELL = ("task", "length", "depth")
NLLS = ("nll", "nll_control", "nll_other_value")
# A row of panels of the figure each: field, title, number format.
PANELS = (
    ("exact_match", "exact match", "{:.0%}"),
    ("recall_gain", "recall gain (nats per token)", "{:+.2f}"),
    ("value_gain", "value gain (nats per token)", "{:+.2f}"),
)


@dataclass(frozen=True)
class Settings:
    """Settings of the evaluation, made from its flags. Raises `UserError` for an illegal value."""

    tasks: tuple[int, ...] = setting(
        "needle", "Instead: retrieval of 1 = a number in noise, 2 = a number in text, 3 = a UUID in text, as 1,2,3."
    )
    lengths: tuple[int, ...] = setting(
        "needle_lengths",
        "Tokens of the prompts; default: a quarter, half, one and two of the trained length, where they fit.",
        (),
    )
    depths: tuple[int, ...] = setting(
        "needle_depths", "Where in the text the needle is, in percent.", (0, 25, 50, 75, 100)
    )
    samples: int = setting("needle_samples", "Prompts for each task, length and depth.", 4)

    def __post_init__(self):
        for name in ("tasks", "lengths", "depths"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            legal = ", ".join(f"{task} ({text})" for task, text in TASKS.items())
            raise UserError(f"needle is {_listed(self.tasks)}, but it takes some of {legal}")
        if self.lengths and self.lengths[0] < 1:
            raise UserError(f"needle_lengths is {_listed(self.lengths)}, but it takes integers of at least 1")
        if not self.depths or not 0 <= self.depths[0] <= self.depths[-1] <= 100:
            raise UserError(f"needle_depths is {_listed(self.depths)}, but it takes percentages, from 0 to 100")
        if self.samples < 1:
            raise UserError(f"needle_samples is {self.samples}, but it must be at least 1")


@register
class Needle(Evaluation):
    """Measures the recall of needles, by exact match and by NLL.

    `match` is whether the model's greedy continuation of a prompt begins with the value. The NLL of the value shows
    whether anything was recalled long before a model is able to say it. The recall gain compares it with the NLL after
    the same prompt without the needle. The value gain compares it with the NLL of another value after the same prompt:
    to have one, a model must recall the value itself, and not only what such values look like.
    """

    name = "needle"
    Settings = Settings
    fields = ("lengths", "depths", "samples", "tasks", "cells")
    unprinted = ("cells",)
    caption = (
        "Needles: a number in noise (task 1), a number (2) or a UUID (3) in held-out text, by length of the prompt and "
        "depth of the needle. Recall gain: how much likelier the value is than without the needle; value gain: how "
        "much likelier than another value, which takes recalling the value itself and not only what values look like."
    )

    def check(self, subject: Subject, settings: Settings) -> tuple[Haystacks, tuple[int, ...]]:
        """Makes the `Haystacks`, and the lengths of the prompts: those of the settings, or default ones that fit.

        Raises:
          UserError: there is no tokenizer, the held-out text does not fit the config, or a length is too short or too
            long.
        """
        config, store, tokenizer = subject.config, subject.store, subject.tokenizer
        haystacks = Haystacks(tokenizer, store, subject.bos_id, config.model.vocab_size)
        if settings.lengths:
            _longest_answer(haystacks, settings, settings.lengths)
            return haystacks, settings.lengths
        lengths, reason = [], None
        for length in sorted({max(1, int(config.train.seq_len * share)) for share in (0.25, 0.5, 1, 2)}):
            try:
                _longest_answer(haystacks, settings, (length,))
                lengths.append(length)
            except UserError as error:
                reason = error
        if not lengths:
            raise UserError(f"{reason} (by default, lengths are a quarter, half, one and two of config.train.seq_len)")
        return haystacks, tuple(lengths)

    def evaluate(self, subject: Subject, output, settings: Settings) -> dict:
        """Runs the prompts of every task, length and depth that have no record yet."""
        haystacks, lengths = self.check(subject, settings)
        B = min(subject.config.eval.batch_size, settings.samples)
        reader = subject.reader(lengths[-1] + _longest_answer(haystacks, settings, lengths) + MARGIN)
        about = subject.about(reader, settings) | {"lengths": lengths}
        records = Records(output, self.name, about, key=(*CELL, "sample"))
        todo = [
            (cell, *batches)
            for cell in product(settings.tasks, lengths, settings.depths)
            for batches in records.unfinished(cell, settings.samples, B)
        ]
        total = sum(2 * length for (_, length, _), *_ in todo) * B
        with progress_bar(total=total, desc="needle", unit="token", unit_scale=True, disable=not todo) as bar:
            for cell, batch, filled in todo:
                bar.set_postfix_str("task {}, length {}, depth {}".format(*cell), refresh=False)
                answers = ask(reader, haystacks, [haystacks.prompt(*cell, sample) for sample in filled], bar)
                ids = [dict(zip(CELL, cell)) | {"sample": sample} for sample in batch]
                records.add([names | record for names, record in zip(ids, answers)])
        return records.finish(summarise(list(records.done.values()), settings, lengths, subject.step))

    def row(self, result: dict) -> list[dict]:
        """The list `tasks` of the result, one dict for each task."""
        return result["tasks"]

    def figure(self, runs: Sequence[Run]):
        """Draws grids of depth by length: a column of panels for each run and task, a row for each of `PANELS`."""
        import matplotlib

        results = [(run.name, run.results[self.name]) for run in runs if run.results[self.name]]
        columns = [(name, result, task["task"]) for name, result in results for task in result["tasks"]]
        style = STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
        with matplotlib.rc_context(style):
            widths = [max(2.6, 0.4 + 0.62 * len(result["lengths"])) for _, result, _ in columns]
            figure = make_figure(figsize=(1 + sum(widths), 8.4))
            panels = figure.subplots(len(PANELS), len(columns), squeeze=False, width_ratios=widths)
            for row, (field, title, text) in zip(panels, PANELS):
                grids = [_grid(result, task, field) for _, result, task in columns]
                # One colour scale for each row, white at 0.
                largest = max(float(np.abs(np.nan_to_num(grid)).max()) for grid in grids)
                limit = 1.0 if field == "exact_match" else max(0.1, largest)
                colors = {"cmap": "Blues", "vmin": 0} if field == "exact_match" else {"cmap": "RdBu", "vmin": -limit}
                for panel, grid, (name, result, task) in zip(row, grids, columns):
                    image = panel.imshow(grid, vmax=limit, aspect="auto", **colors)
                    _label(panel, grid, result, text, limit)
                    panel.set_title(f"{name}, task {task}: {title.partition(' (')[0]}", fontsize=9)
                row[0].set_ylabel("depth (%)")
                figure.colorbar(image, ax=list(row), label=title, aspect=12, shrink=0.9)
            for panel in panels[-1]:
                panel.set_xlabel("length (tokens)")
            return figure


def ask(reader: Reader, haystacks: Haystacks, prompts: list[Prompt], bar) -> list[dict]:
    """Continues prompts of one length greedily and scores their values; returns a record for each prompt."""
    B = len(prompts)
    start = reader.start(haystacks.bos_id, B)
    with_needle, _ = reader.read(start, np.stack([prompt.tokens_L for prompt in prompts]), bar=bar)
    control, _ = reader.read(start, np.stack([prompt.control_L for prompt in prompts]), bar=bar)
    n = max(len(prompt.answer) for prompt in prompts) + MARGIN
    greedy_Bn, _ = _follow(reader, with_needle, n, lambda i, logits_BV: logits_BV.argmax(-1))
    answers, others = [prompt.answer for prompt in prompts], [prompt.other for prompt in prompts]
    nlls = {
        "nll": _mean_nll(reader, with_needle, answers),
        "nll_control": _mean_nll(reader, control, answers),
        "nll_other_value": _mean_nll(reader, with_needle, others),
    }
    records = []
    for i, prompt in enumerate(prompts):
        text = haystacks.tokenizer.decode(greedy_Bn[i])
        match = text.lstrip().startswith(prompt.value)
        record = {"answer": prompt.value, "said": text, "match": match, **{name: nll[i] for name, nll in nlls.items()}}
        records.append(record | {"num_answer_tokens": len(prompt.answer), "position": prompt.position})
    return records


def summarise(records: list[dict], settings: Settings, lengths: tuple[int, ...], step: int) -> dict:
    """Computes the result from a record for each prompt: means over each task, and over each cell of its grid."""
    cells = []
    for cell in product(settings.tasks, lengths, settings.depths):
        in_cell = [r for r in records if tuple(r[name] for name in CELL) == cell]
        cells.append(dict(zip(CELL, cell)) | _means(in_cell))
    tasks = [{"task": task} | _means([r for r in records if r["task"] == task]) for task in settings.tasks]
    grid = {"lengths": list(lengths), "depths": list(settings.depths), "samples": settings.samples}
    return {"step": step, **grid, "tasks": tasks, "cells": cells}


def _means(records: list[dict]) -> dict:
    """Means over records of exact match, NLLs and gains, and standard errors of the gains (None of a single record)."""
    records = sorted(records, key=lambda r: tuple(r[name] for name in (*CELL, "sample")))
    match, *nlls = (np.array([r[name] for r in records], float) for name in ("match", *NLLS))
    means = {"exact_match": float(match.mean())} | {name: float(nll.mean()) for name, nll in zip(NLLS, nlls)}
    n = len(records)
    for name, without in (("recall_gain", nlls[1]), ("value_gain", nlls[2])):
        gain = without - nlls[0]
        means[name] = float(gain.mean())
        means[f"{name}_standard_error"] = float(gain.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return means


def _mean_nll(reader: Reader, state: ReaderState, answers: list[np.ndarray]) -> list[float]:
    """Mean NLL, in nats, of the tokens of each answer after the state of its prompt."""
    n = max(map(len, answers))
    # Padded with zeros at the end, where by causality they change no NLL that is used.
    answers_Bn = np.stack([np.pad(answer, (0, n - len(answer))) for answer in answers])
    _, nll_Bn = _follow(reader, state, n, lambda i, logits_BV: answers_Bn[:, i])
    return [float(nll_n[: len(answer)].mean(dtype=np.float64)) for nll_n, answer in zip(nll_Bn, answers)]


def _follow(reader: Reader, state: ReaderState, count: int, choose: Callable):
    """Decodes `count` tokens, each chosen by `choose(i, logits [B, V])`; returns tokens and NLL, both [B, count]."""
    tokens, nlls = [], []
    for i in range(count):
        state, token_B, nll_B = reader.step(state, lambda logits_BV, i=i: choose(i, logits_BV))
        tokens.append(token_B)
        nlls.append(nll_B)
    # Fetched at the end, so that the device never waits for the host.
    return np.stack([np.asarray(t) for t in tokens], axis=1), np.stack([np.asarray(x) for x in nlls], axis=1)


def _longest_answer(haystacks: Haystacks, settings: Settings, lengths: tuple[int, ...]) -> int:
    """Largest number of tokens of a value of any prompt. Raises `UserError` where a prompt cannot be made."""
    places = product(settings.tasks, lengths, settings.depths, range(settings.samples))
    parts = (haystacks.parts(*place) for place in places)
    return max(max(len(p.answer), len(p.other)) for p in parts)


def _listed(values) -> str:
    return ",".join(map(str, values))


def _grid(result: dict, task: int, field: str) -> np.ndarray:
    """One field of the cells of one task, as an array [depths, lengths]; NaN where it diverged."""
    cells = {(cell["depth"], cell["length"]): cell[field] for cell in result["cells"] if cell["task"] == task}
    return np.array([[cells[depth, length] for length in result["lengths"]] for depth in result["depths"]], float)


def _label(panel, grid: np.ndarray, result: dict, text: str, limit: float) -> None:
    """Labels a panel: ticks, and the number in every cell, white on dark colours."""
    panel.set_xticks(range(len(result["lengths"])), result["lengths"])
    panel.set_yticks(range(len(result["depths"])), result["depths"])
    panel.tick_params(length=0)
    for (i, j), value in np.ndenumerate(grid):
        color = "white" if abs(value) > 0.6 * limit else "#333333"
        label = text.format(value) if np.isfinite(value) else "–"
        panel.text(j, i, label, ha="center", va="center", fontsize=8, color=color)
