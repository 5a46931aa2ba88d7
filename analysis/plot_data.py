"""Figures of how much there is to learn from: training puzzles, and symmetries of each."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from plot_scaling import MIN_FIT_POINTS, error_figure
from plot_style import (
    EXACT,
    GREY,
    SEEDS,
    Drawing,
    NoData,
    draw_seeds,
    in_words,
    line_style,
    means,
    panels,
    points_of,
    readable,
    run_table,
    ticks_at,
    with_final,
)
from results import Run
from run_groups import AUGMENTATION, Group, families

FRESH = np.inf  # as a number of symmetries: a new one each time that a puzzle is drawn


def data_scaling(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against the number of training puzzles, or the error with its power law."""
    drawings = []
    for family in families(with_final(groups), ("dataset.train",), ("training.epochs",)):
        table = run_table(family, lambda run: run.train_puzzles)
        sizes = table.x.nunique()
        if sizes < 2:
            continue
        fitted = sizes >= MIN_FIT_POINTS
        drawing = error_figure(table, "training puzzles") if fitted else _accuracy_by_size(table)
        drawing.finding = _what_puzzles_give(family, table)
        drawings.append(drawing)
    if not drawings:
        raise NoData(
            "no two runs with a final evaluation differ in their number of training puzzles alone"
        )
    return drawings


def _what_puzzles_give(family: Sequence[Group], table: pd.DataFrame) -> str:
    """The accuracy with each number of puzzles, and whether all trained for as many steps."""
    rows = means(table)
    change = rows.exact_accuracy.iloc[-1] - rows.exact_accuracy.iloc[0]
    steps: dict[int, int] = {}
    for group in family:
        if group.first.train_puzzles and group.first.final():
            steps[group.first.train_puzzles] = group.first.step
    text = (
        f"Exact accuracy by training puzzles is {in_words(table, 'x', lambda n: f'{n:,}')}. From "
        f"the fewest to the most puzzles it changes by {points_of(change)}. "
    )
    if len(set(steps.values())) == 1:
        return f"{text}All were trained for {next(iter(steps.values())):,} steps."
    each = "; ".join(f"{puzzles:,}: {number:,}" for puzzles, number in sorted(steps.items()))
    return f"{text}They were not trained for as many steps, which counts, too: {each}."


def _accuracy_by_size(table: pd.DataFrame) -> Drawing:
    fig, (ax,) = panels(1, 2.2)
    draw_seeds(ax, table, "x", line_style(0))
    ax.set_xscale("log")
    ticks_at(ax, sorted(set(table.x)))
    ax.margins(x=0.08)
    ax.set_xlabel("training puzzles")
    ax.set_ylabel(EXACT)
    caption = (
        "Exact accuracy on all test puzzles at the end of the training, against the number of "
        f"training puzzles. {SEEDS} No power law is fitted: {table.x.nunique()} sizes, "
        f"{MIN_FIT_POINTS} are needed."
    )
    return Drawing(fig, caption, table)


def augmentations(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against the number of symmetries of each puzzle that the training shows."""
    drawings = []
    for family in families(with_final(groups), AUGMENTATION):
        table = run_table(family, symmetries)
        if table.x.nunique() > 1:
            drawings.append(_augmentations_figure(table))
    if not drawings:
        raise NoData(
            "no two runs with a final evaluation differ in data.augmentations (or data.augment) "
            "alone"
        )
    return drawings


def symmetries(run: Run) -> float:
    """The symmetries of each puzzle beside itself that a training shows; FRESH: no fixed number."""
    data = run.config.data
    if not data.augment:
        return 0
    return FRESH if data.augmentations is None else data.augmentations


def _augmentations_figure(table: pd.DataFrame) -> Drawing:
    numbers = sorted(set(table.x))
    places = _places(numbers)
    table = table.assign(place=table.x.map(places))
    fig, (ax,) = panels(1, 2.2)
    style = line_style(0)
    draw_seeds(ax, table[table.x < FRESH], "place", style)
    if (table.x == FRESH).any():
        draw_seeds(ax, table[table.x == FRESH], "place", style | {"linestyle": "", "marker": "D"})
        ax.axvline(places[FRESH] - 0.25, color=GREY, linewidth=0.6, linestyle=(0, (2, 2)))
    ax.set_xticks([places[number] for number in numbers], [_name_of(n) for n in numbers])
    ax.margins(x=0.08)
    ax.set_xlabel("fixed symmetries of each training puzzle")
    ax.set_ylabel(EXACT)
    caption = (
        "Exact accuracy on all test puzzles at the end of the training, against the number of "
        "symmetric copies of each training puzzle that the training shows beside the puzzle "
        f"itself. none: the puzzles alone. fresh: a new copy each time. {SEEDS}"
    )
    found = f"Exact accuracy by symmetric copies is {in_words(table, 'x', _in_text)}."
    rows = means(table).set_index("x").exact_accuracy
    if FRESH in rows.index:
        most = max(number for number in rows.index if number < FRESH)
        change = points_of(rows[FRESH] - rows[most])
        found += f" Fresh copies change it by {change} against {_in_text(most)}."
    return Drawing(fig, caption, table.drop(columns="place"), finding=found)


def _in_text(number: float) -> str:
    return f"{number:,.0f}" if 0 < number < FRESH else _name_of(number)


def _name_of(number: float) -> str:
    return "none" if number == 0 else "fresh" if number == FRESH else readable(number)


def _places(numbers: Sequence[float]) -> dict[float, float]:
    """{number: its place on the axis}: logarithmic, with 0 at the left end and FRESH at the right.

    Two neighbours are at least 0.3 apart, which is room for their names.
    """
    places: dict[float, float] = {}
    for number in numbers:
        last = max(places.values(), default=0.0)
        if number == 0 or not places:
            places[number] = 0.0
        elif number == FRESH:
            places[number] = last + 0.5
        else:
            before = max(known for known in places)
            step = np.log10(number / before) if before else 0.5
            places[number] = last + max(0.3, step)
    return places
