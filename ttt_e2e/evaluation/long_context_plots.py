"""The figures of a report about long contexts: loss by context length, and grids of needles.

Matplotlib is imported where it is used: it is an optional dependency.
"""

import numpy as np

from ttt_e2e.evaluation.plots import colors_of
from ttt_e2e.evaluation.runs import Run
from ttt_e2e.figures import STYLE, make_figure

# What a row of panels of the needle figure shows: field, title, how a number is written.
NEEDLE_ROWS = (
    ("exact_match", "exact match", "{:.0%}"),
    ("recall_gain", "recall gain (nats per token)", "{:+.2f}"),
    ("value_gain", "value gain (nats per token)", "{:+.2f}"),
)


def context_lengths_figure(runs: list[Run]):
    """Loss of the same tokens against the length of the context before them, and its change from the shortest length.

    At least one of the runs must have been evaluated so.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = make_figure(figsize=(9, 6.4))
        top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
        lengths = set()
        for run, color in zip(runs, colors_of(runs)):
            if run.context_lengths is None:
                continue
            entries = run.context_lengths["lengths"]
            at = [entry["length"] for entry in entries]
            lengths |= set(at)
            for suffix, style, label in (("", "-", run.name), ("_without_learning", "--", f"{run.name}, not learning")):
                if f"loss{suffix}" not in entries[0]:
                    continue
                marks = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.6}
                marks |= {"color": color, "linestyle": style, "label": label}
                _draw(top, at, entries, f"loss{suffix}", f"standard_error{suffix}", marks)
                names = f"difference{suffix}", f"difference_standard_error{suffix}"
                _draw(bottom, at, entries, *names, marks)
            trained = run.config.train.seq_len
            if min(at) <= trained <= max(at):
                for panel in (top, bottom):
                    panel.axvline(trained, color="#bbbbbb", linewidth=1, zorder=1)
        top.set(title="Held-out loss of the same last tokens", ylabel="NLL (nats per token)")
        top.set_xscale("log", base=2)
        top.legend()
        bottom.set(title="Difference from the shortest length", ylabel="difference (nats)")
        bottom.set_xlabel("length of the context (tokens)")
        bottom.set_xticks(sorted(lengths), [f"{length}" for length in sorted(lengths)])
        bottom.minorticks_off()
        return figure


def needle_figure(runs: list[Run]):
    """Grids of depth by length: a column of panels for each run and task, a row each for match and gains.

    At least one of the runs must have been evaluated so.
    """
    import matplotlib

    columns = [(run, task["task"]) for run in runs if run.needle is not None for task in run.needle["tasks"]]
    style = STYLE | {"axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}
    with matplotlib.rc_context(style):
        widths = [max(2.6, 0.4 + 0.62 * len(run.needle["lengths"])) for run, _ in columns]
        figure = make_figure(figsize=(1 + sum(widths), 8.4))
        panels = figure.subplots(len(NEEDLE_ROWS), len(columns), squeeze=False, width_ratios=widths)
        for row, (field, title, text) in zip(panels, NEEDLE_ROWS):
            grids = [_grid(run.needle, task, field) for run, task in columns]
            # One scale for all of a row; gains are white at 0, and matches where there is none.
            limit = 1.0 if field == "exact_match" else max(0.1, *(float(np.abs(grid).max()) for grid in grids))
            colors = {"cmap": "Blues", "vmin": 0} if field == "exact_match" else {"cmap": "RdBu", "vmin": -limit}
            for panel, grid, (run, task) in zip(row, grids, columns):
                image = panel.imshow(grid, vmax=limit, aspect="auto", **colors)
                _label(panel, grid, run.needle, text, limit)
                panel.set_title(f"{run.name}, task {task}: {title.partition(' (')[0]}", fontsize=9)
            row[0].set_ylabel("depth (%)")
            figure.colorbar(image, ax=list(row), label=title, aspect=12, shrink=0.9)
        for panel in panels[-1]:
            panel.set_xlabel("length (tokens)")
        return figure


def _draw(panel, at: list[int], entries: list[dict], field: str, error: str, marks: dict) -> None:
    """A line with bars of one standard error; numbers that there are none of (null) are left out."""
    values, errors = ([np.nan if e[name] is None else e[name] for e in entries] for name in (field, error))
    panel.errorbar(at, values, yerr=np.nan_to_num(errors), **marks)


def _grid(needle: dict, task: int, field: str) -> np.ndarray:
    """[depths, lengths] of one field of one task."""
    found = {(cell["depth"], cell["length"]): cell[field] for cell in needle["cells"] if cell["task"] == task}
    return np.array([[found[depth, length] for length in needle["lengths"]] for depth in needle["depths"]], float)


def _label(panel, grid: np.ndarray, needle: dict, text: str, limit: float) -> None:
    """Ticks, and the number in every cell, light on dark."""
    panel.set_xticks(range(len(needle["lengths"])), needle["lengths"])
    panel.set_yticks(range(len(needle["depths"])), needle["depths"])
    panel.tick_params(length=0)
    for (i, j), value in np.ndenumerate(grid):
        color = "white" if abs(value) > 0.6 * limit else "#333333"
        panel.text(j, i, text.format(value), ha="center", va="center", fontsize=8, color=color)
