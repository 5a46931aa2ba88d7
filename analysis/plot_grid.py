"""Figures of accuracy by two settings, as a grid of cells."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib.patches
import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_style import COLORS, EXACT, GREY, Drawing, NoData, note, panels, readable, with_final
from run_groups import Group, families

MARK = COLORS[4]  # of the best cells
RATE, BATCH = "training.lr", "training.global_batch_size"
# settings that may follow the batch; how they do makes two kinds of grid
FOLLOW = ("training.lr_warmup_steps", "training.puzzle_emb_lr")
EPOCHS = "training.epochs"
Cells = dict[tuple[float, float], list[float]]  # {(row's value, column's value): accuracies}


# ------------------------------------------------------------------------------
# The figures
# ------------------------------------------------------------------------------
def schedule(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy by T and n."""
    keys, drawings = ("model.H_cycles", "model.L_cycles"), []
    for family in families(with_final(groups), keys):
        cells = _cells(family, keys)
        fig, ax = _heat_map(cells, ("T (H_cycles)", "n (L_cycles)"))
        caption = (
            "Exact accuracy (%) by cycles T and latent updates n a cycle. Mean over seeds where "
            f"there are several. {_missing(cells, ('T', 'n'))}"
        )
        drawings.append(Drawing(fig, caption, _table(cells, keys)))
    if not drawings:
        raise NoData(
            "no runs with a final evaluation make a grid of model.H_cycles and model.L_cycles, "
            "alike otherwise"
        )
    return drawings


def learning_rate_and_batch(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy by learning rate and global batch, with the best rate of each batch.

    Runs of as many examples make one figure, and runs of as many steps another.
    """
    drawings = []
    for same, family in _grids(with_final(groups)):
        cells = _cells(family, (RATE, BATCH))
        rates, batches = ({cell[k] for cell in cells} for k in (0, 1))
        # not a diagonal, on which the learning rate follows the batch
        if len(batches) > 1 and len(cells) > max(len(rates), len(batches)):
            drawings.append(_rates_figure(cells, same))
    if not drawings:
        raise NoData(
            f"no runs with a final evaluation make a grid of {RATE} and {BATCH}, alike otherwise"
        )
    return drawings


def _grids(groups: Sequence[Group]) -> Iterator[tuple[str, list[Group]]]:
    """("examples" or "steps", groups with the same number of them that are alike otherwise)."""
    for same in ("examples", "steps"):
        found: dict[str, list[Group]] = {}
        for group in groups:
            free = (RATE, BATCH, EPOCHS, *FOLLOW)
            rest = {key: value for key, value in group.settings.items() if key not in free}
            amount = group.settings[EPOCHS]
            if same == "steps":
                amount /= group.settings[BATCH]
            # epochs are rounded where a batch does not divide the examples
            found.setdefault(json.dumps([f"{amount:.4g}", rest]), []).append(group)
        for family in found.values():
            yield same, family


def _cells(family: Sequence[Group], keys: tuple[str, str]) -> Cells:
    """The final accuracies of each pair of values; of several groups of one pair the best's."""
    cells: Cells = {}
    for group in family:
        row, column = (float(f"{group.settings[key]:.4g}") for key in keys)
        accuracies = [final["exact_accuracy"] for final in group.finals()]
        if np.mean(accuracies) > np.mean(cells.get((row, column), [-1.0])):
            cells[row, column] = accuracies
    return cells


def _rates_figure(cells: Cells, same: str) -> Drawing:
    best = best_rates(cells)
    fig, ax = _heat_map(cells, ("learning rate", "global batch"))
    rows, columns = _axes_of(cells)
    for one in best:
        column, row = columns.index(one.batch), rows.index(one.rate)
        corner = column + 0.03, row + 0.05
        frame = matplotlib.patches.Rectangle(corner, 0.94, 0.9, fill=False, edgecolor=MARK)
        frame.set_linewidth(1.6)
        ax.add_patch(frame)
        if one.finer != one.rate:
            height = np.interp(np.log(one.finer), np.log(rows), np.arange(len(rows)) + 0.5)
            ax.plot(column + 0.88, height, "<", color=MARK, markersize=5, markeredgecolor="white")
    text = exponent_text(best)
    note(ax, text, 50)
    caption = (
        f"Exact accuracy (%) by learning rate and global batch, after the same number of {same}. "
        "Mean over seeds where there are several. Framed: the best rate of each batch of which two "
        "rates or more were tried. Triangle: the top of the parabola through it and its two "
        "neighbours, over the logarithm of the rate; it is taken for the fit where there is one. "
        f"{_missing(cells, ('learning rate', 'batch'))}"
    )
    rates = "; ".join(f"{readable(one.rate)} at batch {readable(one.batch)}" for one in best)
    found = f"The best learning rate that was tried is {rates}. " if best else ""
    found += f"{text[0].upper()}{text[1:]}.{_edges(best)}{_against_rules(best)}"
    table = _table(cells, (RATE, BATCH))
    framed = {(one.rate, one.batch): one.finer for one in best}
    finer = [framed.get((row[RATE], row[BATCH]), np.nan) for _, row in table.iterrows()]
    table = table.assign(best=~np.isnan(finer), best_rate=finer)
    return Drawing(fig, caption, table, finding=found)


# ------------------------------------------------------------------------------
# The best learning rate of a batch
# ------------------------------------------------------------------------------
@dataclass(frozen=True)
class BestRate:
    """The best learning rate of one batch.

    rate: the best of those tried. finer: where a parabola through it and its two neighbours is
    highest; `rate` without neighbours. at_edge: whether it is the lowest or the highest tried, so
    that the best may lie outside.
    """

    batch: float
    rate: float
    finer: float
    at_edge: bool


def best_rates(cells: Cells) -> list[BestRate]:
    """The best rate of each batch (the cells' second value) of which two rates or more were tried.

    In the order of the batches. At a tie it is the lower rate.
    """
    best = []
    for batch in sorted({batch for _, batch in cells}):
        rates = sorted(rate for rate, other in cells if other == batch)
        if len(rates) < 2:
            continue
        accuracies = [float(np.mean(cells[rate, batch])) for rate in rates]
        k = int(np.argmax(accuracies))
        at_edge = k in (0, len(rates) - 1)
        finer = rates[k]
        if not at_edge:
            finer = parabola_top(rates[k - 1 : k + 2], accuracies[k - 1 : k + 2])
        best.append(BestRate(batch, rates[k], finer, at_edge))
    return best


def parabola_top(rates: Sequence[float], accuracies: Sequence[float]) -> float:
    """The rate at the top of the parabola through three points of accuracy over log(rate).

    The middle one is the best of the three, so that the top lies between the others.
    """
    logs = np.log(rates)
    square, slope, _ = np.polyfit(logs - logs[1], accuracies, 2)
    if square >= 0:  # three equal accuracies
        return rates[1]
    return float(np.exp(logs[1] - slope / (2 * square)))


def exponent_text(best: Sequence[BestRate]) -> str:
    """The exponent of the best rate over the batch, by least squares of the logarithms."""
    if len(best) < 2:
        return (
            "no fit: it needs 2 batches or more, with two learning rates or more each, and there "
            f"{'is 1' if best else 'is none'}"
        )
    exponent, half = _exponent(best)
    text = f"best learning rate ∝ batch^{exponent:.2f}"
    if np.isnan(half):
        return f"{text}, without an interval, because two batches give none"
    at_edge = sum(one.at_edge for one in best)
    edges = f", {at_edge} at an edge of the grid" if at_edge else ""
    interval = f"95% interval {exponent - half:.2f} to {exponent + half:.2f}"
    return f"{text} ({interval}, {len(best)} batches{edges})"


def _exponent(best: Sequence[BestRate]) -> tuple[float, float]:
    """(the exponent, half of its 95% t interval) of two batches or more; NaN for two's interval."""
    fit = scipy.stats.linregress(np.log([b.batch for b in best]), np.log([b.finer for b in best]))
    if len(best) == 2:
        return float(fit.slope), np.nan
    return float(fit.slope), float(scipy.stats.t.ppf(0.975, len(best) - 2) * fit.stderr)


def _against_rules(best: Sequence[BestRate]) -> str:
    """A sentence on whether the fitted exponent agrees with the usual rules, or ""."""
    if len(best) < 3:
        return ""
    exponent, half = _exponent(best)
    each = [
        f"{'agrees' if abs(exponent - rule) <= half else 'does not agree'} with {name}"
        for name, rule in (("linear scaling (1)", 1.0), ("the square root (0.5)", 0.5))
    ]
    return f" The interval {' and '.join(each)}."


def _edges(best: Sequence[BestRate]) -> str:
    """A sentence on the batches whose best rate is the last one tried, or ""."""
    names = [readable(one.batch) for one in best if one.at_edge]
    if not names:
        return ""
    return (
        f" At batch {', '.join(names)} the best rate is the lowest or the highest that was tried, "
        "so the best one may lie outside the grid."
    )


# ------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------
def _axes_of(cells: Cells) -> tuple[list[float], list[float]]:
    """(values of the rows, values of the columns), sorted."""
    rows, columns = (sorted({cell[k] for cell in cells}) for k in (0, 1))
    return rows, columns


def _missing(cells: Cells, names: tuple[str, str]) -> str:
    """A sentence that names the cells without a run, or ""."""
    rows, columns = _axes_of(cells)
    missing = [
        f"{names[0]} {readable(row)} at {names[1]} {readable(column)}"
        for column in columns
        for row in rows
        if (row, column) not in cells
    ]
    if not missing:
        return ""
    return f"Hatched, without a run: {', '.join(missing)}."


def _table(cells: Cells, keys: tuple[str, str]) -> pd.DataFrame:
    rows = [
        {**dict(zip(keys, cell)), "runs": len(values), "exact_accuracy": np.mean(values)}
        for cell, values in sorted(cells.items())
    ]
    return pd.DataFrame(rows)


def _heat_map(cells: Cells, labels: tuple[str, str]) -> tuple[Figure, Axes]:
    """The figure of the cells' means in percent, its axes; labels: of the y and x axes."""
    rows, columns = _axes_of(cells)
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), values in cells.items():
        grid[rows.index(row), columns.index(column)] = 100 * np.mean(values)
    fig, (ax,) = panels(1, 0.8 + 0.36 * len(rows))
    picture = ax.pcolormesh(grid, cmap="cividis", edgecolors="white", linewidth=1)
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if not np.isfinite(value):
            empty = matplotlib.patches.Rectangle((column, row), 1, 1, hatch="////", edgecolor=GREY)
            empty.set(fill=False, linewidth=0)
            ax.add_patch(empty)
            continue
        seeds = len(cells[rows[row], columns[column]])
        text = f"{value:.1f}" + (f"\n{seeds} seeds" if seeds > 1 else "")
        color = "black" if value > middle else "white"
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color)
    ax.set_xticks(np.arange(len(columns)) + 0.5, [readable(value) for value in columns])
    ax.set_yticks(np.arange(len(rows)) + 0.5, [readable(value) for value in rows])
    ax.grid(visible=False)
    ax.set_ylabel(labels[0])
    ax.set_xlabel(labels[1])
    fig.colorbar(picture, label=EXACT)
    return fig, ax
