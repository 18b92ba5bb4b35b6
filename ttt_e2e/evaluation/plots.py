"""Draws the training figure of a report, and assigns colours to runs for all of its figures.

Matplotlib is imported where it is used: it is an optional dependency.
"""

import numpy as np

from ttt_e2e.evaluation.runs import Run
from ttt_e2e.figures import COLORS, STYLE, add_legend, make_figure


def training_figure(runs: list[Run]):
    """Draws training loss, held-out loss, gradient norm and tokens per second of runs against the step.

    Imported models among them have no such curves.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = make_figure(figsize=(9, 6.4))
        panels = figure.subplot_mosaic([["loss", "loss"], ["grad", "speed"]], height_ratios=[2, 1])
        for run, color in zip(runs, colors_of(runs)):
            if not run.training:
                continue
            _draw_smoothed(panels["loss"], run, "loss", color, label=f"{run.name}, training")
            _draw_smoothed(panels["grad"], run, "grad_norm", color)
            _draw_smoothed(panels["speed"], run, "tokens_per_second", color)
            if run.held_out:
                marks = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linestyle": ":"}
                held_out = _series(run.held_out, "eval_loss")
                panels["loss"].plot(*held_out, color=color, label=f"{run.name}, held-out", **marks)
        panels["loss"].set(title="Loss while training", xlabel="step", ylabel="loss (nats per token)")
        panels["loss"].set_ylim(*_loss_limits(runs))
        add_legend(figure, panels["loss"])
        panels["grad"].set(title="Gradient norm, before clipping", xlabel="step", yscale="log")
        panels["grad"].yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
        panels["grad"].yaxis.set_major_formatter("{x:g}")
        panels["grad"].yaxis.set_minor_formatter("{x:g}")
        panels["speed"].set(title="Tokens per second", xlabel="step", ylim=(0, None))
        panels["speed"].yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        return figure


def costs_figure(rows: list[dict], colors: list[str]):
    """Draws parameters, bytes of state and tokens per second of each row of a report, with its color, as bars."""
    import matplotlib

    panels_of = {"num_parameters": "parameters", "state_bytes": "state (bytes)", "tokens_per_second": "tokens/s"}
    with matplotlib.rc_context(STYLE):
        names = [row["run"] for row in rows]
        figure = make_figure(figsize=(8 + 0.08 * max(map(len, names)), 0.8 + 0.3 * len(rows)))
        for panel, (field, title) in zip(figure.subplots(1, 3, sharey=True), panels_of.items()):
            values = [row[field] or 0 for row in rows]
            panel.barh(range(len(rows)), values, color=colors, height=0.7)
            panel.set(title=title, xlim=(0, 1.3 * max(values) or 1))
            panel.xaxis.set_visible(False)
            panel.grid(visible=False)
            panel.spines["bottom"].set_visible(False)
            panel.tick_params(length=0)
            text = matplotlib.ticker.EngFormatter(places=1, sep="")
            for at, row in enumerate(rows):
                label = "–" if row[field] is None else text(row[field])
                panel.annotate(label, (row[field] or 0, at), (3, 0), textcoords="offset points", va="center")
        panel.set_yticks(range(len(rows)), names)
        panel.invert_yaxis()
        return figure


def _draw_smoothed(panel, run: Run, field: str, color: str, label: str | None = None) -> None:
    """Draws the logged values, faint, and their running mean over a thirtieth of the curve."""
    steps, values = _series(run.training, field)
    panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    panel.plot(_running_mean(steps), _running_mean(values), color=color, linewidth=1.6, label=label)


def _loss_limits(runs: list[Run]) -> tuple[float, float]:
    """Limits of the loss axis: from the lowest loss to the highest after the first twentieth of each run.

    The steep fall at the beginning would flatten the rest of the curves.
    """
    losses = [_series(run.training, "loss")[1] for run in runs]
    held_out = [_series(run.held_out, "eval_loss")[1] for run in runs]
    low = min((values.min() for values in losses + held_out if len(values)), default=0.0)
    high = max((values[len(values) // 20 :].max() for values in losses if len(values)), default=1.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _series(lines: list[dict], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a field of metrics lines, two arrays [points]."""
    points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
    series = np.array(points, dtype=np.float64).reshape(-1, 2)
    return tuple(series[np.isfinite(series).all(axis=1)].T)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Running mean of values [n], over a width of n // 30 (at least 1): [n - width + 1]."""
    width = max(1, len(values) // 30)
    return np.convolve(values, np.full(width, 1 / width), mode="valid") if len(values) else values


def colors_of(runs: list[Run]) -> list[str]:
    """Assigns a colour to each run, by its place in the list, so that it is the same in all figures.

    More runs than the palette has colours get those of a rainbow, in even steps.
    """
    if len(runs) <= len(COLORS):
        return list(COLORS[: len(runs)])
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps["turbo"](i / (len(runs) - 1))) for i in range(len(runs))]
