"""One look for all figures: one column of a paper (3.3 in), fonts of 7 points and more, colours that colour-blind readers
tell apart (Okabe and Ito 2008), and other markers and dashes besides, for print in black."""

import math
import textwrap
from dataclasses import dataclass

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import pandas as pd

WIDTH = 3.3  # inches
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MAX_LINES = len(COLORS)  # lines of one figure; more go to further figures
GREY = "#999999"

matplotlib.rcParams.update(
    {
        "font.size": 7,
        "axes.titlesize": 7,
        "axes.labelsize": 7.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "figure.titlesize": 7,
        "font.family": "DejaVu Sans",
        "pdf.fonttype": 42,
        "ps.fonttype": 42,  # text that stays text
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.5,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.5,
        "errorbar.capsize": 2,
        "legend.frameon": False,
        "legend.handlelength": 2.2,
        "legend.columnspacing": 1.2,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 300,
    }
)


@dataclass
class Figure:
    """fig: matplotlib's. caption: what it shows, of which runs, and what its intervals are. data: the numbers drawn."""

    name: str
    fig: matplotlib.figure.Figure
    caption: str
    data: pd.DataFrame


def panels(rows=1, height=2.2, **options):
    """(figure, [axes]) of one column's width; height: of a panel, in inches."""
    fig = matplotlib.figure.Figure(
        figsize=(WIDTH, height * rows)
    )  # not pyplot's: no window, no state to free
    return fig, list(fig.subplots(rows, 1, squeeze=False, **options)[:, 0])


def look(k):
    """Colour, marker and dashes of the k-th line."""
    return {
        "color": COLORS[k % MAX_LINES],
        "marker": MARKERS[k % MAX_LINES],
        "linestyle": DASHES[k % MAX_LINES],
    }


def note(ax, text):
    """A remark that must not part from the figure, above it."""
    ax.set_title(textwrap.fill(text, 58), loc="left", color="#444444")


def readable(number):
    """A number as people write it: 2.67e-4, 0.5, 768, 50k, 5.03M."""
    if 0 < number < 0.001:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if number >= 999_500:
        return f"{number / 1e6:.3g}M"
    return f"{number / 1e3:.3g}k" if number >= 10_000 else f"{number:.4g}"


def plain_log(axis):
    """Ticks at 1, 2, 5, 10, 20, ... on a logarithmic axis, in plain numbers."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: readable(value)))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def ticks_at(ax, values):
    """Ticks of a logarithmic x axis at `values` (sorted), in plain numbers; of two that are too near for both names, the smaller has one."""
    apart, names, last = 0.13 * math.log(values[-1] / values[0]), [], -math.inf
    for value in values:
        near = math.log(value) - last < apart
        names.append("" if near else readable(value))
        last = last if near else math.log(value)
    ax.minorticks_off()
    ax.set_xticks(values, names)


def legend_below(fig, handles, labels):
    if not handles:
        return
    columns = 2 if max(map(len, labels)) <= 22 and len(labels) > 1 else 1
    labels = [textwrap.fill(label, 48) for label in labels]
    inches = 0.14 * -(-sum(1 + label.count("\n") for label in labels) // columns) + 0.1
    fig.set_figheight(fig.get_figheight() + inches)  # the axes keep their height
    fig.legend(handles, labels, loc="outside lower center", ncols=columns)


def save(figure, folder):
    """Write NAME.png, NAME.pdf and NAME.csv (the numbers drawn) into a pathlib folder; returns the PNG's path."""
    for suffix in ("png", "pdf"):
        # no date in the file: the same results give the same bytes
        figure.fig.savefig(
            folder / f"{figure.name}.{suffix}",
            metadata={"CreationDate": None} if suffix == "pdf" else None,
        )
    figure.data.to_csv(folder / f"{figure.name}.csv", index=False)
    return folder / f"{figure.name}.png"
