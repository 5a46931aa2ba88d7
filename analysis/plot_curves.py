"""Figures of curves: learning curves, accuracy by supervision step and by difficulty."""

from collections.abc import Callable, Sequence

import matplotlib.lines
import pandas as pd
import tables
from plot_style import (
    EXACT,
    INTERVALS,
    Drawing,
    NoData,
    error_bars,
    legend_below,
    line_style,
    pages,
    panels,
    plain_log,
    plain_numbers,
    readable,
    whole_numbers,
)
from run_groups import Group

X_AXES = {
    "step": "training step",
    "examples": "training examples",
    "hours": "hours of training",
    "chip_hours": "chip-hours of training",
}
MANY_POINTS = 25  # a line of more points is drawn without markers


def learning_curves(x: str) -> Callable[[Sequence[Group]], list[Drawing]]:
    """A drawing function for the curves against `x`, a key of X_AXES."""

    def draw(groups):
        train = tables.curves_table(groups, "train")
        evaluations = tables.curves_table(groups, "evaluations")
        train, evaluations = train[train[x].notna()], evaluations[evaluations[x].notna()]
        if not len(train):
            reason = f"no run has training records with {x}"
            if x == "chip_hours":
                reason += ": none was trained on TPU chips or GPUs and has a starts.jsonl"
            raise NoData(reason)
        drawn = [group for group in groups if group.label in set(train.group)]
        return [_curves_page(page, x, train, evaluations) for page in pages(drawn)]

    return draw


def _curves_page(
    groups: Sequence[Group], x: str, train: pd.DataFrame, evaluations: pd.DataFrame
) -> Drawing:
    fig, axes = panels(3, 1.5, sharex=True)
    curves = (
        (axes[0], train, "loss", 1, "training loss"),
        (axes[1], evaluations, "exact_accuracy", 100, EXACT),
        (axes[2], evaluations, "cell_accuracy", 100, "cell accuracy (%)"),
    )
    for ax, table, key, scale, label in curves:
        for k, group in enumerate(groups):
            style = line_style(k) | {"alpha": 1 if len(group.runs) == 1 else 0.7}
            for _, run in table[table.group == group.label].groupby("run", sort=False):
                marked = {"marker": ""} if len(run) > MANY_POINTS else {}
                ax.plot(run[x], scale * run[key], **style | marked)
        ax.set_ylabel(label)
        if not len(table):
            ax.set_yticks([])
            ax.text(0.5, 0.5, "nothing yet", transform=ax.transAxes, ha="center", va="center")
    axes[0].set_yscale("log")
    plain_log(axes[0].yaxis)
    axes[-1].set_xlabel(X_AXES[x])
    plain_numbers(axes[-1].xaxis)
    fig.align_ylabels(axes)
    handles = [matplotlib.lines.Line2D([], [], **line_style(k)) for k in range(len(groups))]
    labels = [group.label for group in groups]
    legend_below(fig, handles, labels)
    parts = [train.assign(split="train"), evaluations.assign(split="evaluation")]
    data = pd.concat([part for part in parts if len(part)], ignore_index=True)
    caption = (
        "Training loss, and exact and cell accuracy in the evaluations during training (averaged "
        f"weights where there are any), against {X_AXES[x]}. One line a run."
    )
    return Drawing(fig, caption, data[data.group.isin(labels)])


def accuracy_by_step(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy after each supervision step at test time, one line a group."""
    table = tables.steps_table(groups)
    if not len(table):
        raise NoData("no run has exact_accuracy_by_step (eval.json)")
    caption = (
        "Exact accuracy on all test puzzles after each supervision step, in one pass through the "
        "test set."
    )
    x, label = "supervision_steps", "supervision steps at test time"
    drawn = [group for group in groups if group.label in set(table.group)]
    return [_lines_page(page, table, x, label, caption) for page in pages(drawn)]


def accuracy_by_rating(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy by the dataset's rating of a puzzle's difficulty."""
    table = tables.rating_table(groups)
    if not len(table):
        raise NoData("no run has by_rating (eval.json): its dataset has no ratings")
    lows = sorted(set(table.rating_min))
    table = table.assign(bucket=table.rating_min.map(lows.index))
    names = []
    for low in lows:
        counts = set(table["count"][table.rating_min == low])
        names.append(f"{low:g}\n{readable(min(counts)) if len(counts) == 1 else 'varies'}")
    caption = (
        "Exact accuracy on the test puzzles by difficulty: the dataset's rating, from the given "
        "one up to the next."
    )
    label = "lowest rating, and puzzles, of each bucket"
    drawings = []
    for page in pages([group for group in groups if group.label in set(table.group)]):
        drawing = _lines_page(page, table, "bucket", label, caption, spread_out=True)
        drawing.fig.axes[0].set_xticks(range(len(lows)), names)
        drawing.fig.axes[0].set_xlim(-0.5, len(lows) - 0.5)
        drawings.append(drawing)
    return drawings


def _lines_page(
    groups: Sequence[Group],
    table: pd.DataFrame,
    x: str,
    label: str,
    caption: str,
    spread_out: bool = False,
) -> Drawing:
    """Points with intervals for each group, joined by a line.

    spread_out: the groups stand beside each other, without lines. This is for a few values of x
    that all groups share.
    """
    fig, (ax,) = panels(1, 2.2)
    handles, labels = [], [group.label for group in groups]
    for k, group_label in enumerate(labels):
        rows = table[table.group == group_label]
        shift, style = 0.0, line_style(k)
        if spread_out:
            shift = 0.5 * ((k + 0.5) / len(groups) - 0.5)
            style["linestyle"] = ""
        places, accuracy = rows[x].to_numpy() + shift, 100 * rows.exact_accuracy.to_numpy()
        handles.append(ax.errorbar(places, accuracy, error_bars(rows), **style, elinewidth=0.7))
    ax.set_xlabel(label)
    ax.set_ylabel(EXACT)
    if not spread_out:
        whole_numbers(ax.xaxis)
    legend_below(fig, handles, labels)
    return Drawing(fig, f"{caption} {INTERVALS}", table[table.group.isin(labels)])
