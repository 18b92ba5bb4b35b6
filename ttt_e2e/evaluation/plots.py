"""The figures of a report.

Shapes: `T` positions of a sequence.
"""

import numpy as np

from ttt_e2e.evaluation.runs import Run
from ttt_e2e.figures import COLORS, STYLE, make_figure

MAX_BINS = 64


def training_figure(runs: list[Run]):
    """Loss, held-out loss, gradient norm and speed against the step."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = make_figure(figsize=(9, 6.4))
        panels = figure.subplot_mosaic([["loss", "loss"], ["grad", "speed"]], height_ratios=[2, 1])
        for run, color in zip(runs, colors_of(runs)):
            _draw_smoothed(panels["loss"], run, "loss", color, label=f"{run.name}, training")
            _draw_smoothed(panels["grad"], run, "grad_norm", color)
            _draw_smoothed(panels["speed"], run, "tokens_per_second", color)
            if run.held_out:
                marks = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linestyle": ":"}
                held_out = _series(run.held_out, "eval_loss")
                panels["loss"].plot(*held_out, color=color, label=f"{run.name}, held-out", **marks)
        panels["loss"].set(title="Loss while training", xlabel="step", ylabel="loss (nats per token)")
        panels["loss"].set_ylim(*_loss_limits(runs))
        panels["loss"].legend()
        panels["grad"].set(title="Gradient norm, before clipping", xlabel="step", yscale="log")
        panels["grad"].yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
        panels["grad"].yaxis.set_major_formatter("{x:g}")
        panels["grad"].yaxis.set_minor_formatter("{x:g}")
        panels["speed"].set(title="Tokens per second", xlabel="step", ylim=(0, None))
        panels["speed"].yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        return figure


def _draw_smoothed(panel, run: Run, field: str, color: str, label: str | None = None) -> None:
    """The logged values, faint, and their running mean over a thirtieth of the curve."""
    steps, values = _series(run.training, field)
    panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    panel.plot(_running_mean(steps), _running_mean(values), color=color, linewidth=1.6, label=label)


def _loss_limits(runs: list[Run]) -> tuple[float, float]:
    """From the lowest loss to the highest after the first twentieth of a run: the first fall would flatten the rest."""
    losses = [_series(run.training, "loss")[1] for run in runs]
    held_out = [_series(run.held_out, "eval_loss")[1] for run in runs]
    low = min((values.min() for values in losses + held_out if len(values)), default=0.0)
    high = max((values[len(values) // 20 :].max() for values in losses if len(values)), default=1.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def position_figure(runs: list[Run]):
    """Held-out NLL against the position in context, and below it the difference from the first curve.

    At least one of the runs must have been evaluated.
    """
    import matplotlib

    size = _bin_size(runs)
    curves = []  # (label, color, linestyle, NLL of each bin)
    for run, color in zip(runs, colors_of(runs)):
        if run.nll_T is not None:
            curves.append((run.name, color, "-", _binned(run.nll_T, size)))
        if run.nll_without_learning_T is not None:
            curves.append((f"{run.name}, not learning", color, "--", _binned(run.nll_without_learning_T, size)))
    reference_label, *_, reference = curves[0]

    with matplotlib.rc_context(STYLE):
        figure = make_figure(figsize=(9, 6.4 if len(curves) > 1 else 4.2))
        if len(curves) > 1:
            top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
        else:
            top, bottom = figure.subplots(), None
        for label, color, style, nll in curves:
            positions = (np.arange(len(nll)) + 0.5) * size
            top.plot(positions, nll, style, color=color, linewidth=1.6, label=label)
            shared = min(len(nll), len(reference))
            if bottom is not None:
                difference = nll[:shared] - reference[:shared]
                bottom.plot(positions[:shared], difference, style, color=color, linewidth=1.6)
        _draw_windows(runs, [top, bottom] if bottom else [top])
        top.set(title="Held-out loss by position in context", ylabel="NLL (nats per token)")
        top.legend()
        if bottom is not None:
            bottom.set(title=f"Difference from {reference_label}", ylabel="difference (nats)")
        longest = max(len(run.nll_T) for run in runs if run.nll_T is not None)
        last = bottom or top
        last.set(xlabel=f"position in context (tokens, means over {size})", xlim=(0, longest))
        last.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(max(1, longest // 8)))
        return figure


def _draw_windows(runs: list[Run], panels: list) -> None:
    """A light line at each window shorter than the context: from there on attention no longer sees the beginning."""
    evaluated = [run for run in runs if run.nll_T is not None]
    for window in sorted({k for run in evaluated for k in run.config.model.windows if 0 < k < len(run.nll_T)}):
        for panel in panels:
            panel.axvline(window, color="#bbbbbb", linewidth=1, zorder=1)
        at_top = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        panels[0].annotate(
            f"window {window}", (window, 1), xytext=(4, -2), va="top", color="#777777", fontsize=9, **at_top
        )


def _bin_size(runs: list[Run]) -> int:
    """Positions that a point of the plot is a mean over: a mini-batch, or as many as keep the points few."""
    lengths = [len(run.nll_T) for run in runs if run.nll_T is not None]
    mini_batches = [run.config.inner.mini_batch_size for run in runs if run.config.model.num_fast_blocks]
    size = min(mini_batches, default=max(1, min(lengths) // 32))
    while max(lengths) > MAX_BINS * size:
        size *= 2
    return size


def _binned(nll_T: np.ndarray, size: int) -> np.ndarray:
    starts = np.arange(0, len(nll_T), size)
    return np.add.reduceat(nll_T, starts) / np.diff(np.append(starts, len(nll_T)))


def _series(lines: list[dict], field: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
    series = np.array(points, dtype=np.float64).reshape(-1, 2)
    return tuple(series[np.isfinite(series).all(axis=1)].T)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Shorter than `values` by the width of the mean less one."""
    width = max(1, len(values) // 30)
    return np.convolve(values, np.full(width, 1 / width), mode="valid") if len(values) else values


def colors_of(runs: list[Run]) -> list[str]:
    """A colour for each run, the same in all figures."""
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]
