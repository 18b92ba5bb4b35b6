"""The common style of all figures. Imports Matplotlib in functions only, as it is an optional dependency."""

from collections.abc import Iterable

from ttt_e2e.errors import UserError

# The palette of Okabe and Ito, which people with colour vision deficiency can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")

STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # a name with a $ is no formula
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


def fonts_for(texts: Iterable[str]) -> list[str]:
    """Font families to draw texts with: the default, and for each character that it lacks, an installed one."""
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    missing = set("".join(texts)) - _characters_of(families)
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: font.name) if missing else []
    for font in fonts:
        found = set() if font.name.startswith("Last Resort") else _characters(font.fname)  # that one has boxes for all
        if missing & found:
            families.append(font.name)
            missing -= found
    return families


def drawable(name: str, families: list[str]) -> str:
    """A name as figures can show it: characters that none of these font families has are escaped, as `\\uXXXX`."""
    has = _characters_of(families)
    shown = "".join(c if c in has else c.encode("unicode_escape").decode() for c in name)
    return f" {shown}" if shown.startswith("_") else shown  # legends leave out what begins with _


def _characters_of(families: list[str]) -> set[str]:
    """The characters that some of these font families has."""
    from matplotlib import font_manager

    paths = [font_manager.findfont(font_manager.FontProperties(family=[family])) for family in families]
    return set().union(*map(_characters, paths))


def _characters(path: str) -> set[str]:
    """The characters that a font file has; none where it cannot be read."""
    from matplotlib import font_manager

    try:
        return set(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):
        return set()


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
