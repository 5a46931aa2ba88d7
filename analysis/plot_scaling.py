"""Figures of error against size with a fitted power law, and of accuracy against cost."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import scipy.stats
import tables
from matplotlib.axes import Axes
from plot_style import (
    COLORS,
    EXACT,
    GREY,
    INTERVALS,
    Drawing,
    NoData,
    error_bars,
    legend_below,
    line_style,
    note,
    panels,
    plain_log,
    run_table,
    ticks_at,
    whole_numbers,
    with_final,
)
from results import Run
from run_groups import Group, families

MIN_FIT_POINTS = 4  # different sizes; with fewer the interval of the exponent says nothing
PowerLaw = tuple[float, float, float, Callable[[np.ndarray], np.ndarray]]


# ------------------------------------------------------------------------------
# Error against size
# ------------------------------------------------------------------------------
def power_law(x: np.ndarray, error: np.ndarray) -> PowerLaw:
    """Fit error = a * x^exponent by least squares of log(error) on log(x).

    x, error: [N], above 0, N > 2. Returns (exponent, low, high, band). low and high bound the 95%
    t interval of the exponent. band(x [M]) is [3, M]: the line, and the bounds of the 95% band of
    its mean.
    """
    logs, values = np.log(x), np.log(error)
    fit = scipy.stats.linregress(logs, values)
    t = scipy.stats.t.ppf(0.975, len(x) - 2)
    residual = np.sqrt(((values - fit.intercept - fit.slope * logs) ** 2).sum() / (len(x) - 2))
    mean, squares = logs.mean(), ((logs - logs.mean()) ** 2).sum()

    def band(at):
        line = fit.intercept + fit.slope * np.log(at)
        half = t * residual * np.sqrt(1 / len(x) + (np.log(at) - mean) ** 2 / squares)
        return np.exp([line, line - half, line + half])

    return fit.slope, fit.slope - t * fit.stderr, fit.slope + t * fit.stderr, band


def scaling(
    keys: Sequence[str], also: Sequence[str], size: Callable[[Run], float | None], label: str
) -> Callable[[Sequence[Group]], list[Drawing]]:
    """A drawing function: the share of puzzles not solved against size(run).

    It is of the runs that differ in `keys` (and `also`) alone. label: what `size` is.
    """

    def draw(groups):
        drawings = []
        for family in families(with_final(groups), keys, also):
            table = run_table(family, size)
            if table.x.nunique() > 1:
                drawings.append(error_figure(table, label))
        if not drawings:
            raise NoData(
                f"no two runs with a final evaluation differ in {' and '.join(keys)} alone"
            )
        return drawings

    return draw


def error_figure(table: pd.DataFrame, label: str) -> Drawing:
    """The share of puzzles not solved, one point a run of plot_style.run_table, with its fit."""
    error = 1 - table.exact_accuracy.to_numpy()
    table = table.assign(error=error, low=1 - table.high, high=1 - table.low)
    low, high = table.low.to_numpy(), table.high.to_numpy()
    fitted = _best_of_each_size(table)
    fig, (ax,) = panels(1, 2.2)
    ax.errorbar(
        table.x.to_numpy(),
        100 * error,
        100 * np.maximum(0, [error - low, high - error]),
        color=COLORS[0],
        marker="o",
        linestyle="",
        elinewidth=0.7,
    )
    text = _draw_fit(ax, fitted)
    note(ax, text)
    ax.set_xscale("log")
    if (error > 0).all():
        ax.set_yscale("log")
        ax.set_ylim(top=min(ax.get_ylim()[1], 110))  # a fitted band may go above 100%
        plain_log(ax.yaxis)
    ticks_at(ax, sorted(set(table.x)))
    ax.set_xlabel(label)
    ax.set_ylabel("puzzles not solved (%)")
    caption = (
        f"Share of test puzzles not solved, against {label}; one point a run, with 95% Wilson "
        "intervals. Line: power law fitted to the runs by least squares in logarithms, with the "
        f"95% band of its mean, where there are {MIN_FIT_POINTS} sizes or more; of several "
        f"settings of one size the best is fitted. Here: {text}."
    )
    data = table.assign(fitted=table.index.isin(fitted.index))
    return Drawing(fig, caption, data)


def _best_of_each_size(table: pd.DataFrame) -> pd.DataFrame:
    """The rows to fit: of several groups of one size those of the group with the fewest errors.

    Another learning rate, for example, is another try at the same size.
    """
    means = table.groupby(["x", "group"], sort=False).error.mean()
    best = means.groupby("x").idxmin().map(lambda pair: pair[1])
    return table[table.group == table.x.map(best)]


def _draw_fit(ax: Axes, fitted: pd.DataFrame) -> str:
    """Draw the power law of these rows, if one can be fitted; returns it, or why not, as text."""
    sizes = fitted.x.nunique()
    if sizes < MIN_FIT_POINTS:
        return f"no fit: {sizes} sizes, {MIN_FIT_POINTS} are needed"
    if not (fitted.error > 0).all():
        return "no fit: a run solves every puzzle"
    exponent, least, most, band = power_law(fitted.x, fitted.error)
    at = np.geomspace(fitted.x.min(), fitted.x.max(), 50)
    line, below, above = 100 * band(at)
    ax.plot(at, line, color=COLORS[2])
    ax.fill_between(at, below, above, color=COLORS[2], alpha=0.2, linewidth=0)
    return (
        f"not solved ∝ x^{exponent:.2f} (95% interval {least:.2f} to {most:.2f}, "
        f"{len(fitted)} runs)"
    )


# ------------------------------------------------------------------------------
# Accuracy against cost
# ------------------------------------------------------------------------------
def frontier(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of the points [N] are on the Pareto frontier of low cost x and high y, as bool [N].

    No other point has at most their cost and a higher y, or less cost and the same y.
    """
    order = np.lexsort((-np.asarray(y), np.asarray(x)))
    best, on = -np.inf, np.zeros(len(x), bool)
    for k in order:
        if y[k] > best:
            best, on[k] = y[k], True
    return on


def pareto(cost: str, label: str, needed: str) -> Callable[[Sequence[Group]], list[Drawing]]:
    """A drawing function: final accuracy against Group.mean(cost), one point a group.

    Groups without a finished run are left out, and at least two must remain. label: of the axis.
    needed: what a run must have.
    """

    def draw(groups):
        rows = []
        for group in groups:
            mean, accuracy = group.mean(cost), group.accuracy()
            if group.finished and not np.isnan(mean):
                row = {"group": group.label, cost: mean, "exact_accuracy": accuracy.mean}
                rows.append(row | {"low": accuracy.low, "high": accuracy.high})
        if not rows:
            raise NoData(f"no finished run has {needed}")
        if len(rows) == 1:
            raise NoData(f"only {rows[0]['group']} is finished and has {label}")
        caption = f"Exact accuracy at the end of the training against {label}."
        return [_pareto_figure(pd.DataFrame(rows), cost, label, caption)]

    return draw


def pareto_steps(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against the supervision steps at test time."""
    table = tables.steps_table(groups)
    if not len(table):
        raise NoData("no run has exact_accuracy_by_step (eval.json)")
    caption = "Exact accuracy against supervision steps at test time, of every training."
    label = "supervision steps at test time"
    return [_pareto_figure(table, "supervision_steps", label, caption)]


def _pareto_figure(table: pd.DataFrame, cost: str, label: str, caption: str) -> Drawing:
    """Every point in grey, those on the frontier in the colour of their group."""
    on_frontier = frontier(table[cost].to_numpy(), table.exact_accuracy.to_numpy())
    table = table.assign(on_frontier=on_frontier)
    fig, (ax,) = panels(1, 2.3)

    def points(rows, **style):
        accuracy = 100 * rows.exact_accuracy.to_numpy()
        bars = error_bars(rows)
        return ax.errorbar(rows[cost].to_numpy(), accuracy, bars, **style | {"linestyle": ""})

    points(table, color=GREY, marker="o", elinewidth=0.5, markersize=2.5, zorder=1)
    best = table[table.on_frontier].sort_values(cost)
    x, y = best[cost], 100 * best.exact_accuracy
    ax.step(x, y, where="post", color=COLORS[0], linewidth=0.8, zorder=2)
    names = list(dict.fromkeys(best.group))
    handles = [
        points(best[best.group == name], **line_style(k), elinewidth=0.8, zorder=3)
        for k, name in enumerate(names)
    ]
    if cost == "supervision_steps":
        whole_numbers(ax.xaxis)
    elif table[cost].max() > 10 * table[cost].min():
        ax.set_xscale("log")
        if cost != "flops":
            plain_log(ax.xaxis)
    ax.set_xlabel(label)
    ax.set_ylabel(EXACT)
    legend_below(fig, handles, names)
    caption += " The line is the Pareto frontier; the runs on it are named, the others grey."
    return Drawing(fig, f"{caption} {INTERVALS}", table)
