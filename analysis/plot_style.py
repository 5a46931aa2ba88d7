"""The style that all figures share, and what draws and saves them.

A figure is one column of a paper wide (3.3 inches), its fonts have 7 points or more, and its
colours can be told apart by colour-blind readers (Okabe and Ito 2008). Lines differ in marker and
dashes, too, for print in black.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from results import Run
from run_groups import Group
from study_statistics import wilson

WIDTH = 3.3  # inches
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MAX_LINES = len(COLORS)  # lines of one figure; more go to further figures
GREY = "#999999"
TICKS = [1, 2, 2.5, 5, 10]  # multiples of a power of ten, as matplotlib has them
EXACT = "exact accuracy (%)"
# (points to the right, points up, alignments) of a label beside its point
SIDES = (
    (0, 4, "center", "bottom"),
    (0, -4, "center", "top"),
    (4, 0, "left", "center"),
    (-4, 0, "right", "center"),
    (-3, 3, "right", "bottom"),
    (3, -3, "left", "top"),
)
INTERVALS = "Bars: one run, 95% Wilson interval over puzzles; several seeds, mean and range."
SEEDS = (
    "Filled markers: one run, with the 95% Wilson interval over puzzles, or the mean of several "
    "seeds; small open circles: the seeds, and the bars their range where they are three or more."
)

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
        # fonts in PDF and PostScript as TrueType, so that text can be selected and edited
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
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


class NoData(Exception):
    """A figure has nothing to draw; the message says why."""


@dataclass
class Drawing:
    """A figure without its name.

    fig: matplotlib's. caption: what it shows, of which runs, and what its intervals are.
    data: the numbers drawn. finding: what came out, in sentences; "" where the caption says it all.
    """

    fig: matplotlib.figure.Figure
    caption: str
    data: pd.DataFrame
    finding: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    title: its heading in a report. draw: a function of the groups, which returns [Drawing] or
    raises NoData.
    """

    title: str
    draw: Callable[[Sequence[Group]], list[Drawing]]


@dataclass
class Figure(Drawing):
    """A figure with the name of its files and its heading in a report.

    kind_name: its key in plot_results.FIGURES; `name` has a number besides where a kind has several
    figures.
    """

    name: str
    kind_name: str
    title: str


# ------------------------------------------------------------------------------
# Parts of a figure
# ------------------------------------------------------------------------------
def panels(
    rows: int = 1, height: float = 2.2, **options: Any
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """(figure, [axes]) of one column's width; height: of each panel, in inches."""
    # a figure of pyplot would open a window and would have to be closed
    fig = matplotlib.figure.Figure(figsize=(WIDTH, height * rows))
    return fig, list(fig.subplots(rows, 1, squeeze=False, **options)[:, 0])


def line_style(k: int) -> dict[str, Any]:
    """Colour, marker and dashes of the k-th line."""
    return {
        "color": COLORS[k % MAX_LINES],
        "marker": MARKERS[k % MAX_LINES],
        "linestyle": DASHES[k % MAX_LINES],
    }


def bar_axis(ax: Axes, names: Sequence[str]) -> np.ndarray:
    """Prepare the y axis for one horizontal bar a name, the first on top; returns their places."""
    places = np.arange(len(names))
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    return places


def error_bars(rows: pd.DataFrame) -> np.ndarray:
    """Lengths of error bars in percent, [2, N], from the columns exact_accuracy, low, high."""
    accuracy = rows.exact_accuracy.to_numpy()
    return 100 * np.maximum(0, [accuracy - rows.low.to_numpy(), rows.high.to_numpy() - accuracy])


def note(ax: Axes, text: str, width: int = 58) -> None:
    """Write a remark above the axes, for what must not be lost where the caption is.

    width: characters of a line; 58 fill a column.
    """
    ax.set_title(textwrap.fill(text, width), loc="left", color="#444444")


def readable(number: float) -> str:
    """A number as people write it: 2.67e-4, 0.5, 768, 50k, 5.03M."""
    if 0 < number < 0.001:
        mantissa, exponent = f"{number:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if number >= 999_500:
        return f"{number / 1e6:.3g}M"
    return f"{number / 1e3:.3g}k" if number >= 10_000 else f"{number:.4g}"


def plain_numbers(axis: Any) -> None:
    """Ticks as `readable` writes them: 10k in place of 10000."""
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: readable(value)))


def plain_log(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10, 20, ... on a logarithmic axis, in plain numbers.

    Where what is drawn spans more than two decades, they are at powers of ten.
    """
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    plain_numbers(axis)
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers alone on a linear axis."""
    axis.set_major_locator(matplotlib.ticker.MaxNLocator("auto", steps=TICKS, integer=True))


def ticks_at(ax: Axes, values: Sequence[float]) -> None:
    """Ticks of a logarithmic x axis at `values` (sorted), in plain numbers.

    Where two are too near for both names, the larger has none.
    """
    apart, names, last = 0.13 * math.log(values[-1] / values[0]), [], -math.inf
    for value in values:
        near = math.log(value) - last < apart
        names.append("" if near else readable(value))
        last = last if near else math.log(value)
    ax.minorticks_off()
    ax.set_xticks(values, names)


def legend_below(
    fig: matplotlib.figure.Figure, handles: Sequence[Any], labels: Sequence[str]
) -> None:
    """Put a legend below the axes, for which the figure grows: the axes keep their height."""
    if not handles:
        return
    columns = 2 if max(map(len, labels)) <= 22 and len(labels) > 1 else 1
    labels = [textwrap.fill(label, 48) for label in labels]
    lines = sum(1 + label.count("\n") for label in labels)
    fig.set_figheight(fig.get_figheight() + 0.14 * math.ceil(lines / columns) + 0.1)
    fig.legend(handles, labels, loc="outside lower center", ncols=columns)


# ------------------------------------------------------------------------------
# Groups of a figure
# ------------------------------------------------------------------------------
def pages(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in parts of at most MAX_LINES, of about the same length."""
    count = math.ceil(len(groups) / MAX_LINES)
    parts = np.array_split(np.arange(len(groups)), count) if groups else []
    return [[groups[k] for k in part] for part in parts]


def run_table(groups: Sequence[Group], x: Callable[[Run], float | None]) -> pd.DataFrame:
    """One row for each averaged run with a final evaluation and an x(run), in the order of x.

    Its columns are group, run, seed, x, exact_accuracy, low and high (the 95% Wilson interval over
    its puzzles) and count.
    """
    rows = []
    for group in groups:
        for run in group.averaged:
            final, place = run.final(), x(run)
            if final and place is not None:
                accuracy, count = final["exact_accuracy"], final["count"]
                low, high = wilson(accuracy, count)
                row = {"group": group.label, "run": run.name, "seed": run.seed, "x": place}
                row |= {"exact_accuracy": accuracy, "low": low, "high": high, "count": count}
                rows.append(row)
    columns = ["group", "run", "seed", "x", "exact_accuracy", "low", "high", "count"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("x", kind="stable").reset_index(drop=True)


def means(table: pd.DataFrame, by: str = "x") -> pd.DataFrame:
    """One row for each value of `by` in a table with one row a run.

    Its columns are `by`, exact_accuracy, low, high and runs. low and high: of one run those that it
    has, of three or more seeds their range, and of two the mean, because two points show what there
    is.
    """
    rows = []
    for value, runs in table.groupby(by, sort=False):
        mean, low, high = (runs[key].mean() for key in ("exact_accuracy", "low", "high"))
        if len(runs) == 2:
            low = high = mean
        elif len(runs) > 2:
            low, high = runs.exact_accuracy.min(), runs.exact_accuracy.max()
        row = {by: value, "exact_accuracy": mean, "low": low, "high": high, "runs": len(runs)}
        rows.append(row)
    return pd.DataFrame(rows)


def in_words(table: pd.DataFrame, by: str, name: Callable[[Any], str]) -> str:
    """The accuracy at each value of `by` in a table with one row a run, as text.

    Such as "1,000: 32.5% (mean of 2 seeds); 5,000: 52.5%". name: of a value of `by`.
    """
    texts = []
    for row in means(table, by).to_dict("records"):
        seeds = f" (mean of {row['runs']} seeds)" if row["runs"] > 1 else ""
        texts.append(f"{name(row[by])}: {100 * row['exact_accuracy']:.1f}%{seeds}")
    return "; ".join(texts)


def points_of(difference: float) -> str:
    """A difference of two accuracies (0 to 1) as text, such as "+1.8 points"."""
    return f"{round(100 * difference, 6):+.1f} points"


def draw_seeds(ax: Axes, table: pd.DataFrame, places: str, style: dict[str, Any]) -> Any:
    """Draw SEEDS of a table with one row a run at the numbers in its column `places`.

    Returns the handle for a legend.
    """
    one = means(table, places)
    accuracy = 100 * one.exact_accuracy.to_numpy()
    handle = ax.errorbar(
        one[places].to_numpy(), accuracy, error_bars(one), **style, elinewidth=0.7, zorder=3
    )
    several = table[table.groupby(places)[places].transform("size") > 1]
    ax.plot(
        several[places],
        100 * several.exact_accuracy,
        color=style["color"],
        marker="o",
        markersize=2.6,
        markerfacecolor="white",
        markeredgewidth=0.6,
        linestyle="",
        zorder=4,
    )
    return handle


def draw_band(ax: Axes, x: pd.Series, y: pd.Series, k: int, **style: Any) -> Any:
    """The k-th line: the mean of y at each x, and the band of its range where there are several.

    x, y: of all runs, one after the other. style: in place of line_style's. Returns the line.
    """
    style = line_style(k) | style
    at = pd.DataFrame({"x": x, "y": y}).groupby("x").y.agg(["mean", "min", "max"])
    (line,) = ax.plot(at.index, at["mean"], **style)
    ax.fill_between(at.index, at["min"], at["max"], color=style["color"], alpha=0.2, linewidth=0)
    return line


def place_labels(
    fig: matplotlib.figure.Figure,
    ax: Axes,
    points: Sequence[tuple[float, float, str, str]],
    lines: Sequence[matplotlib.lines.Line2D],
) -> None:
    """Write the text of points (x, y, text, colour) beside them where there is room.

    A text that would cover another one, a point or one of `lines` on every side of its own point is
    left out. To be called when everything else is drawn, because the layout decides what has room.
    """
    fig.draw_without_rendering()
    pixels = ax.transData.transform([(x, y) for x, y, _, _ in points])
    reach = 0.03 * fig.dpi
    taken = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in pixels]
    taken += [box for line in lines for box in _boxes_along(ax, line)]
    for x, y, text, color in points:
        for right, up, horizontal, vertical in SIDES:
            label = ax.annotate(text, (x, y), (right, up), textcoords="offset points", color=color)
            label.set(ha=horizontal, va=vertical)
            box = label.get_window_extent()
            inside = all(ax.bbox.contains(*corner) for corner in (box.min, box.max))
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _boxes_along(ax: Axes, line: matplotlib.lines.Line2D) -> list[Bbox]:
    """Boxes of two pixels along a line, four pixels apart."""
    corners = ax.transData.transform(line.get_xydata())
    boxes = []
    for start, end in zip(corners, corners[1:]):
        number = int(np.hypot(*(end - start)) / 4) + 1
        places = np.linspace(start, end, number, endpoint=False)
        boxes += [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in places]
    return boxes


def with_final(groups: Sequence[Group]) -> list[Group]:
    """The groups with a final accuracy; raises NoData if there is none."""
    found = [group for group in groups if group.accuracy()]
    if not found:
        raise NoData("no run has a final evaluation (eval.json)")
    return found


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------
def save(figure: Figure, folder: Path) -> Path:
    """Write NAME.png, NAME.pdf and NAME.csv (the numbers drawn) into a folder.

    Returns the path of the PNG. The same results give the same bytes.
    """
    for suffix in ("png", "pdf"):
        without_date = {"CreationDate": None} if suffix == "pdf" else None
        figure.fig.savefig(folder / f"{figure.name}.{suffix}", metadata=without_date)
    figure.data.to_csv(folder / f"{figure.name}.csv", index=False)
    return folder / f"{figure.name}.png"
