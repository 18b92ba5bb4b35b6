"""The common style of all figures. Imports Matplotlib in functions only, as it is an optional dependency."""

from ttt_e2e.errors import UserError

# The palette of Okabe and Ito, which people with colour vision deficiency can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.solid_capstyle": "round",
}


def require_matplotlib() -> None:
    """Raises `UserError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install 'ttt-e2e[plot]'") from None


MOST_INSIDE = 6  # curves whose legend has room in a panel


def add_legend(figure, panel) -> None:
    """Adds the legend of a panel's curves, in it, or if there are many beside the panels, which keep their width."""
    handles, labels = panel.get_legend_handles_labels()
    if len(handles) <= MOST_INSIDE:
        panel.legend()
        return
    legend = figure.legend(handles, labels, loc="outside right upper")
    size = legend.get_window_extent(figure.canvas.get_renderer()).size / figure.dpi
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + size[0], max(height, size[1] + 0.2))


def make_figure(**options):
    """Makes a figure that Agg draws: without a window, and without pyplot, which has global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure
