"""Figures of final accuracies and speeds as bars."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from plot_style import (
    COLORS,
    EXACT,
    INTERVALS,
    MAX_LINES,
    Drawing,
    NoData,
    bar_axis,
    error_bars,
    legend_below,
    panels,
    with_final,
)
from run_groups import Group, families

BAR_HEIGHT = 0.21  # inches, with the space to the next one
AVERAGED, RAW = COLORS[6], COLORS[1]


# ------------------------------------------------------------------------------
# Accuracies
# ------------------------------------------------------------------------------
def final_accuracy(groups: Sequence[Group]) -> list[Drawing]:
    """The final accuracy of every group."""
    entries = [(group.label, group, group.first.weights) for group in with_final(groups)]
    caption = (
        "Exact accuracy on all test puzzles at the end of the training (averaged weights where "
        "there are any)."
    )
    return [_bars(_accuracies(entries), caption)]


def ema(groups: Sequence[Group]) -> list[Drawing]:
    """Averaged and raw weights of the trainings that are alike but for the average.

    If there is no such set, it is of every training that has both.
    """
    candidates = with_final(groups)
    both = [group for group in candidates if group.accuracy("ema") and group.accuracy("raw")]
    sets = families(candidates, ("training.ema",), ("training.ema_rate",)) or [both]
    if not sets[0]:
        raise NoData(
            "no run has a final evaluation of averaged and of raw weights, and no two differ in "
            "training.ema alone"
        )
    drawings = []
    for family in sets:
        entries = [
            (f"{group.label}: {name}", group, weights)
            for group in family
            for weights, name in (("ema", "averaged"), ("raw", "raw"))
        ]
        table = _accuracies(entries)
        colors = [AVERAGED if weights == "ema" else RAW for weights in table.weights]
        caption = "Averaged (EMA) and raw weights at the end of the training."
        drawings.append(_bars(table, caption, colors))
    return drawings


def ablation(
    keys: Sequence[str], also: Sequence[str], name_of: Callable[[dict[str, Any]], str], caption: str
) -> Callable[[Sequence[Group]], list[Drawing]]:
    """A drawing function: bars of the groups that differ in `keys` (and `also`) alone.

    name_of: a bar's name from the group's settings.
    """

    def draw(groups):
        drawings = []
        for family in families(with_final(groups), keys, also):
            family = sorted(family, key=lambda group: [group.settings[key] for key in keys])
            entries = [(name_of(group.settings), group, group.first.weights) for group in family]
            drawings.append(_bars(_accuracies(entries), caption))
        if not drawings:
            raise NoData(
                f"no two runs with a final evaluation differ in {' and '.join(keys)} alone"
            )
        return drawings

    return draw


def _accuracies(entries: Sequence[tuple[str, Group, str]]) -> pd.DataFrame:
    """One row for each (name, group, weights) with such a final evaluation."""
    rows = []
    for name, group, weights in entries:
        if interval := group.accuracy(weights):
            rows.append(
                {
                    "name": name,
                    "group": group.label,
                    "weights": weights,
                    "runs": interval.runs,
                    "exact_accuracy": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "kind": interval.kind,
                }
            )
    return pd.DataFrame(rows)


def _bars(table: pd.DataFrame, caption: str, colors: Any = AVERAGED) -> Drawing:
    """Horizontal bars of _accuracies, the first on top, each with its value."""
    fig, (ax,) = panels(1, 0.45 + BAR_HEIGHT * len(table))
    places = bar_axis(ax, table.name)
    ax.barh(
        places,
        100 * table.exact_accuracy,
        0.7,
        color=colors,
        xerr=error_bars(table).tolist(),
        error_kw={"elinewidth": 0.8},
    )
    ax.set_xlim(0, 128)  # room for the values
    ax.set_xticks(range(0, 101, 20))
    ax.spines["bottom"].set_bounds(0, 100)
    ax.set_xlabel(EXACT)
    for place, value, high in zip(places, table.exact_accuracy, table.high):
        ax.text(100 * max(value, high) + 3, place, f"{100 * value:.1f}", va="center")
    return Drawing(fig, f"{caption} {INTERVALS}", table)


# ------------------------------------------------------------------------------
# Speed
# ------------------------------------------------------------------------------
def throughput(groups: Sequence[Group]) -> list[Drawing]:
    """Training speed of one run of each group, coloured by device."""
    rows = []
    for group in groups:
        rates = group.first.train.examples_per_second.dropna()
        if len(rates):
            rows.append(
                {
                    "group": group.label,
                    "device": group.first.device,
                    "examples_per_second": rates.median(),
                    "low": rates.quantile(0.1),
                    "high": rates.quantile(0.9),
                }
            )
    if not rows:
        raise NoData("no run has training records with examples_per_second")
    table = pd.DataFrame(rows)
    devices = list(dict.fromkeys(table.device))
    rate = table.examples_per_second.to_numpy()
    fig, (ax,) = panels(1, 0.45 + BAR_HEIGHT * len(table))
    drawn = ax.barh(
        bar_axis(ax, table.group),
        rate,
        0.7,
        color=[COLORS[(devices.index(device) + 6) % MAX_LINES] for device in table.device],
        xerr=[(rate - table.low).tolist(), (table.high - rate).tolist()],
        error_kw={"elinewidth": 0.8},
    )
    # at the right end, because long names of runs make the axis short
    ax.set_xlabel("training examples a second", loc="right")
    legend_below(fig, [drawn[table.device.tolist().index(device)] for device in devices], devices)
    caption = (
        "Training speed of one run of each: median over the logging intervals, with the 10th and "
        "90th percentile."
    )
    return [Drawing(fig, caption, table)]
