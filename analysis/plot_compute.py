"""Figures of what compute buys: a growing depth, early stops at test time, and precision."""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.lines
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from plot_style import (
    COLORS,
    EXACT,
    GREY,
    Drawing,
    NoData,
    draw_band,
    legend_below,
    line_style,
    note,
    panels,
    place_labels,
    plain_log,
    plain_numbers,
    readable,
)
from results import Run
from run_groups import Group, families, paired_test

from schedule import stages

CURRICULUM, DECAY = "training.curriculum", "training.step_loss_decay"
PONDER, DTYPE = "training.ponder_cost", "model.forward_dtype"


# ------------------------------------------------------------------------------
# A growing depth
# ------------------------------------------------------------------------------
def curriculum(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against training compute, with and without a curriculum of depth."""
    drawings = []
    for family in families(groups, (CURRICULUM, DECAY)):
        parts = {group.label: _accuracy_by_flops(group) for group in family}
        drawn = [group for group in family if len(parts[group.label])]
        if len(drawn) > 1 and any(group.settings[CURRICULUM] for group in drawn):
            drawn.sort(key=lambda group: group.settings[CURRICULUM] is not None)
            table = pd.concat([parts[group.label] for group in drawn], ignore_index=True)
            drawings.append(_curriculum_figure(drawn, table))
    if not drawings:
        raise NoData(
            f"no two runs with evaluations and known FLOP differ in {CURRICULUM} (or {DECAY}) alone"
        )
    return drawings


def _accuracy_by_flops(group: Group) -> pd.DataFrame:
    """The evaluations during training of the group's averaged runs, with their FLOP so far."""
    parts = [
        run.evaluations.assign(
            group=group.label, run=run.name, flops=run.flops_at(run.evaluations.step)
        )
        for run in group.averaged
    ]
    keys = ["group", "run", "step", "flops", "exact_accuracy", "count"]
    return pd.concat(parts, ignore_index=True)[keys].dropna(subset="flops")


def _curriculum_figure(groups: Sequence[Group], table: pd.DataFrame) -> Drawing:
    fig, (ax,) = panels(1, 2.4)
    power = 3 * int(np.log10(table.flops.max()) // 3)
    handles: list[Any] = []
    marked: dict[str, tuple[Run, str]] = {}
    for k, group in enumerate(groups):
        runs = table[table.group == group.label]
        handles.append(draw_band(ax, runs.flops / 10.0**power, 100 * runs.exact_accuracy, k))
        if group.settings[CURRICULUM]:
            marked.setdefault(str(group.settings[CURRICULUM]), (group.first, COLORS[k]))
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    for run, color in marked.values():
        _mark_stages(ax, run, 10.0**power, color)
    ax.set_xlabel(rf"training compute ($10^{{{power}}}$ FLOP)")
    ax.set_ylabel(EXACT)
    labels = [curriculum_name(group, len(marked) > 1) for group in groups]
    legend_below(fig, handles, labels)
    ends = table.groupby("group").flops.max()
    shares = "; ".join(
        f"{label} {100 * ends[group.label] / ends[groups[0].label]:.0f}%"
        for group, label in zip(groups[1:], labels[1:])
    )
    caption = (
        "Exact accuracy in the evaluations during training (averaged weights where there are any), "
        "always at the model's own depth, against the FLOP of the training so far. Lines: one run, "
        "or the mean of several seeds, with the band of their range. Dotted: where a further stage "
        f"of the curriculum begins ({_stages_of(marked)}). Compute at the end of the line, against "
        f"{labels[0]}: {shares}."
    )
    return Drawing(fig, caption, table)


def _mark_stages(ax: Axes, run: Run, unit: float, color: str) -> None:
    """Dotted lines where the stages of a run's curriculum begin, all but the first."""
    if run.total_steps:
        for begin, _ in stages(run.config, run.total_steps)[1:]:
            place = float(run.flops_at(begin)) / unit
            ax.axvline(place, color=color, linewidth=0.8, linestyle=":", zorder=1)


def _stages_of(marked: dict[str, tuple[Run, str]]) -> str:
    """The cycles T and updates n of the stages of each curriculum that is drawn."""
    return "; ".join(
        ", then ".join(
            f"T {stage.H_cycles} n {stage.L_cycles}"
            for stage in run.config.training.curriculum or ()
        )
        for run, _ in marked.values()
    )


def curriculum_name(group: Group, with_stages: bool = False) -> str:
    """A group's depth in words, such as "growing depth, loss decay 0.7".

    with_stages: name the stages, too, where there are several curricula.
    """
    found, model = group.settings[CURRICULUM], group.first.config.model
    name = f"T {model.H_cycles}, n {model.L_cycles} throughout"
    if found:
        name = "growing depth"
    if found and with_stages:
        each = [f"T {s['H_cycles']} n {s['L_cycles']} from {100 * s['begin']:.3g}%" for s in found]
        name += f" ({', '.join(each)})"
    decay = group.settings[DECAY]
    return name if decay == 1 else f"{name}, loss decay {decay:g}"


# ------------------------------------------------------------------------------
# Early stops at test time
# ------------------------------------------------------------------------------
def early_stop(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy against supervision steps where the halting head may end them, by ponder cost."""
    drawings = []
    for family in families(groups, (PONDER,)):
        family = sorted(family, key=lambda group: group.settings[PONDER])
        table = pd.concat([_stops(group) for group in family], ignore_index=True)
        if table.ponder_cost.nunique() > 1:
            drawings.append(_early_stop_figure(table))
    if not drawings:
        raise NoData(f"no two runs with early_stop in eval.json differ in {PONDER} alone")
    return drawings


def _stops(group: Group) -> pd.DataFrame:
    """One row for each run and threshold of the halting head, and one for no early stop (inf)."""
    rows = []
    for run in group.averaged:
        final = run.final()
        if final and final.get("early_stop"):
            row = {"group": group.label, "run": run.name, "ponder_cost": group.settings[PONDER]}
            rows += [{**row, **stop} for stop in final["early_stop"]]
            steps, accuracy = run.config.model.halt_max_steps, final["exact_accuracy"]
            last = {"threshold": np.inf, "exact_accuracy": accuracy, "mean_steps": steps}
            rows.append({**row, **last})
    keys = ["group", "run", "ponder_cost", "threshold", "exact_accuracy", "mean_steps"]
    return pd.DataFrame(rows, columns=keys)


def _early_stop_figure(table: pd.DataFrame) -> Drawing:
    fig, (ax,) = panels(1, 2.6)
    handles, labels, points = [], [], []
    for k, (cost, runs) in enumerate(table.groupby("ponder_cost")):
        means = runs.groupby("threshold")[["mean_steps", "exact_accuracy"]].mean()
        x, y = means.mean_steps.to_numpy(), 100 * means.exact_accuracy.to_numpy()
        style = line_style(k)
        handles += ax.plot(x, y, **style)
        if runs.run.nunique() > 1:
            each = {"marker": "o", "markersize": 2.2, "linestyle": "", "color": style["color"]}
            accuracy = 100 * runs.exact_accuracy
            ax.plot(runs.mean_steps, accuracy, **each, markerfacecolor="white", alpha=0.7)
        labels.append(f"price {cost:g} of a step" if cost else "no price of a step")
        points += [
            (at, height, "all" if np.isinf(threshold) else f"{threshold:g}", style["color"])
            for at, height, threshold in zip(x, y, means.index)
        ]
    ax.set_xscale("log")
    plain_log(ax.xaxis)
    ax.set_xlabel("supervision steps a puzzle, mean")
    ax.set_ylabel(EXACT)
    ax.margins(0.1)
    legend_below(fig, handles, labels)
    place_labels(fig, ax, points)
    caption = (
        "Exact accuracy against the mean number of supervision steps, where each test puzzle stops "
        "at the first step at which the halting head's probability reaches a threshold (the "
        "number at a point, left out where there is no room); all: every step is done. One line "
        f"for each price of a further step in the loss ({PONDER}); small open circles: seeds."
    )
    return Drawing(fig, caption, table)


# ------------------------------------------------------------------------------
# Precision
# ------------------------------------------------------------------------------
def precision(groups: Sequence[Group]) -> list[Drawing]:
    """The loss in bfloat16 and in float32, and how many test puzzles come out otherwise."""
    drawings = []
    for family in families(groups, (DTYPE,)):
        both = {group.settings[DTYPE]: group for group in family if len(group.first.train)}
        if len(both) == 2 and {"bfloat16", "float32"} == set(both):
            drawings.append(_precision_figure(both["bfloat16"], both["float32"]))
    if not drawings:
        raise NoData(f"no two runs, one in bfloat16 and one in float32, differ in {DTYPE} alone")
    return drawings


def _precision_figure(half: Group, full: Group) -> Drawing:
    fig, (above, below) = panels(2, 1.4, sharex=True)
    tables = []
    for k, group in enumerate((half, full)):
        table = pd.concat(
            [run.train.assign(run=run.name) for run in group.averaged], ignore_index=True
        )
        tables.append(table.assign(dtype=group.settings[DTYPE], group=group.label))
        draw_band(above, table.step, table.loss, k, marker="")
    means = [table.groupby("step").loss.mean() for table in tables]
    difference = 100 * (means[1] / means[0] - 1).dropna()
    below.plot(difference.index, difference, color=COLORS[1])
    below.axhline(0, color=GREY, linewidth=0.6)
    above.set_yscale("log")
    plain_log(above.yaxis)
    above.set_ylabel("training loss")
    below.set_ylabel("difference (%)")
    below.set_xlabel("training step")
    plain_numbers(below.xaxis)
    fig.align_ylabels([above, below])
    names = ["bfloat16", "float32"]
    styles = [line_style(k) | {"marker": ""} for k in range(2)]
    legend_below(fig, [matplotlib.lines.Line2D([], [], **style) for style in styles], names)
    differ, times = _differing(half, full), _step_times(half, full)
    note(above, differ.partition(" (")[0])  # without the test of each pair
    caption = (
        "Training loss with bfloat16 and with float32 activations: one run, or the mean of several "
        "seeds and the band of their range. Below: by how much the (mean) loss in float32 is above "
        f"that in bfloat16. {differ}. {times}"
    )
    keys = ["dtype", "group", "run", "step", "loss", "steps_per_second"]
    return Drawing(fig, caption, pd.concat(tables, ignore_index=True)[keys])


def _differing(half: Group, full: Group) -> str:
    """On what share of the test puzzles two runs differ, one of each, and two seeds of one."""
    text = "They differ on " + (_share(_pairs_of(half, full)) or "an unknown share of the puzzles")
    seeds = [pair for group in (half, full) for pair in itertools.combinations(group.averaged, 2)]
    between = _share(seeds)
    return f"{text}; two seeds of one precision differ on {between}" if between else text


def _pairs_of(half: Group, full: Group) -> list[tuple[Run, Run]]:
    """The runs of the same seed; without any, the first of each."""
    by_seed = {run.seed: run for run in half.averaged}
    pairs = [(run, by_seed[run.seed]) for run in full.averaged if run.seed in by_seed]
    return pairs or [(full.first, half.first)]


def _share(pairs: Sequence[tuple[Run, Run]]) -> str:
    """Such as "1.2% of the 400 test puzzles (+3 -2, p=1)", over pairs that can be paired, or ""."""
    found: list[Any] = []
    for run, other in pairs:
        try:
            gained, lost, p = paired_test(run, other)
        except ValueError:
            continue
        final = run.final()
        assert final is not None  # it was paired
        found.append((gained, lost, p, final["count"]))
    if not found:
        return ""
    share = np.mean([(gained + lost) / count for gained, lost, _, count in found])
    each = "; ".join(f"+{gained} -{lost} p={p:.2g}" for gained, lost, p, _ in found)
    return f"{100 * share:.1f}% of the {found[0][3]:,} test puzzles (McNemar: {each})"


def _step_times(half: Group, full: Group) -> str:
    """A sentence on how long a step takes in each, and on which device where they differ."""
    texts, devices = [], set()
    for group in (half, full):
        rates = pd.concat([run.train.steps_per_second for run in group.averaged]).dropna()
        devices |= {run.device for run in group.averaged}
        time = _duration(1 / rates.median()) if len(rates) else "an unknown time"
        texts.append(f"{time} in {group.settings[DTYPE]}")
    text = f"A training step takes {' and '.join(texts)} (medians)"
    if len(devices) > 1:
        text += f", but not on one kind of device: {'; '.join(sorted(devices))}"
    return f"{text}."


def _duration(seconds: float) -> str:
    return f"{readable(seconds)} s" if seconds >= 1 else f"{readable(1000 * seconds)} ms"
