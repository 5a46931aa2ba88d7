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
    ticks_at,
)
from results import Run
from run_groups import Group, families, paired_test

from schedule import stages

CURRICULUM, DECAY = "training.curriculum", "training.step_loss_decay"
PONDER, DTYPE = "training.ponder_cost", "model.forward_dtype"
NEARLY = 0.01  # of exact accuracy (0 to 1), which an early stop may lose


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
            drawn.sort(key=lambda g: (g.settings[CURRICULUM] is not None, g.settings[DECAY] != 1))
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
    caption = (
        f"Exact accuracy in the evaluations during training (of {_range(table['count'])} puzzles, "
        "with averaged weights where there are any), "
        "always at the model's own depth, against the FLOP of the training so far. Lines: one run, "
        "or the mean of several seeds, with the band of their range. Dotted: where a further stage "
        f"of the curriculum begins ({_stages_of(marked)})."
    )
    curves = [
        table[table.group == group.label].groupby("flops").exact_accuracy.mean() for group in groups
    ]
    return Drawing(fig, caption, table, finding=_compute_in_words(labels, curves))


def _compute_in_words(labels: Sequence[str], curves: Sequence[pd.Series]) -> str:
    """Where each curve (accuracy by FLOP) ends, and its compute to the accuracy that all reach."""
    ends: list[str] = []
    reached: list[str] = []
    common = min(curve.max() for curve in curves)
    for label, curve in zip(labels, curves):
        accuracy, flops = 100 * curve.iloc[-1], curve.index[-1]
        first = curve.index[(curve >= common).argmax()]
        text = f"{label}: {accuracy:.1f}% after {flops:.3g} FLOP"
        if not ends:
            base_flops, base_first = flops, first
        else:
            text += f" ({100 * flops / base_flops:.0f}%)"
            reached.append(f"{label} {100 * first / base_first:.0f}%")
        ends.append(text)
    return (
        f"Exact accuracy in the last evaluation is, with the compute up to it, {'; '.join(ends)}. "
        f"To reach {100 * common:.1f}%, the best that every line comes to, takes of the compute of "
        f"{labels[0]}: {', '.join(reached)}, to within the interval of the evaluations."
    )


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _mark_stages(ax: Axes, run: Run, unit: float, color: str) -> None:
    """Dotted lines where the stages of a run's curriculum begin, all but the first."""
    if run.total_steps:
        begins = [begin for begin, _ in stages(run.config, run.total_steps)[1:]]
        for begin in [begin for begin in begins if begin <= run.step]:
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
    handles: list[Any] = []
    labels, points = [], []
    for k, (cost, runs) in enumerate(table.groupby("ponder_cost")):
        means = runs.groupby("threshold")[["mean_steps", "exact_accuracy"]].mean()
        x, y = means.mean_steps.to_numpy(), 100 * means.exact_accuracy.to_numpy()
        style = line_style(k)
        handles += ax.plot(x, y, **style)
        for _, one in runs.groupby("run") if runs.run.nunique() > 1 else ():
            faint = {"color": style["color"], "linewidth": 0.5, "alpha": 0.5}
            ax.plot(one.mean_steps, 100 * one.exact_accuracy, **faint)
        labels.append(f"ponder_cost {cost:g}")
        points += [
            (at, height, "all" if np.isinf(threshold) else f"{threshold:g}", style["color"])
            for at, height, threshold in zip(x, y, means.index)
        ]
    ax.set_xscale("log")
    ax.margins(0.1)
    doublings = np.log2([table.mean_steps.min(), table.mean_steps.max()]).round(9)
    ticks_at(ax, list(2.0 ** np.arange(np.floor(doublings[0]), np.floor(doublings[1]) + 1)))
    ax.set_xlabel("supervision steps a puzzle, mean")
    ax.set_ylabel(EXACT)
    legend_below(fig, handles, labels)
    place_labels(fig, ax, points, handles)
    caption = (
        "Exact accuracy against the mean number of supervision steps, where each test puzzle stops "
        "at the first step at which the halting head's probability reaches a threshold (the "
        "number at a point, left out where there is no room); all: every step is done. One line "
        f"for each price of a further step in the loss ({PONDER}): one run, or the mean of several "
        "seeds, which are the thin lines."
    )
    return Drawing(fig, caption, table, finding=_stops_in_words(table))


def _stops_in_words(table: pd.DataFrame) -> str:
    """For each price the fewest steps with which at most NEARLY of the accuracy is lost."""
    texts = []
    for cost, runs in table.groupby("ponder_cost"):
        by_threshold = runs.groupby("threshold")[["mean_steps", "exact_accuracy"]].mean()
        last = by_threshold.loc[np.inf]
        near = by_threshold[by_threshold.exact_accuracy >= last.exact_accuracy - NEARLY]
        threshold = near.mean_steps.idxmin()
        text = f"ponder_cost {cost:g}: {100 * last.exact_accuracy:.1f}% with all "
        text += f"{last.mean_steps:.4g} steps, "
        if np.isinf(threshold):
            texts.append(f"{text}and no threshold comes near it")
            continue
        chosen = near.loc[threshold]
        text += f"{100 * chosen.exact_accuracy:.1f}% with {chosen.mean_steps:.2f} on average"
        texts.append(f"{text} (threshold {threshold:g})")
    return (
        "Exact accuracy with all supervision steps, and at the threshold with the fewest steps of "
        f"those that lose at most {100 * NEARLY:g} point, is {'; '.join(texts)}."
    )


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
    differing, times = _differing(half, full), _step_times(half, full)
    note(above, f"{differing} {times}", 50)
    caption = (
        "Training loss with bfloat16 and with float32 activations: one run, or the mean of several "
        "seeds and the band of their range. Below: by how much the (mean) loss in float32 is above "
        "that in bfloat16. Above: the share of test puzzles that one run of a pair solves and the "
        "other does not, and the median time of a training step."
    )
    table = pd.concat(tables, ignore_index=True)
    keys = ["dtype", "group", "run", "step", "loss", "steps_per_second"]
    found = f"{differing} {times} {_accuracies(half, full)}{_devices(half, full)}"
    return Drawing(fig, caption, table[keys], finding=found)


def _differing(half: Group, full: Group) -> str:
    """On what share of the test puzzles two runs differ: one of each, and two seeds of one."""
    pairs = _pairs_of(half, full)
    between, count = _share(pairs)
    if not count:
        return "On how many puzzles bfloat16 and float32 differ is not known."
    which = "of the same seed " if pairs[0][0].seed == pairs[0][1].seed else ""
    text = f"bfloat16 and float32 {which}differ on {between} of the {count:,} test puzzles"
    seeds = [pair for group in (half, full) for pair in itertools.combinations(group.averaged, 2)]
    among, count = _share(seeds)
    return f"{text}, two seeds of one of them on {among}." if count else f"{text}."


def _accuracies(half: Group, full: Group) -> str:
    """A sentence on the final accuracy in each, and McNemar's test of each pair, or ""."""
    ours, theirs = full.accuracy(), half.accuracy()
    if not ours or not theirs:
        return ""
    means = f"{100 * theirs.mean:.1f}% in bfloat16 and {100 * ours.mean:.1f}% in float32"
    tests = "; ".join(
        f"+{gained} -{lost}, p = {p:.2g}" for gained, lost, p, _ in _paired(_pairs_of(half, full))
    )
    tests = f" (puzzles that only float32 solves, +, and only bfloat16, -, McNemar: {tests})"
    return f"Exact accuracy is {means}{tests if _paired(_pairs_of(half, full)) else ''}."


def _pairs_of(half: Group, full: Group) -> list[tuple[Run, Run]]:
    """The runs of the same seed; without any, the first of each."""
    by_seed = {run.seed: run for run in half.averaged}
    pairs = [(run, by_seed[run.seed]) for run in full.averaged if run.seed in by_seed]
    return pairs or [(full.first, half.first)]


def _paired(pairs: Sequence[tuple[Run, Run]]) -> list[tuple[int, int, float, int]]:
    """paired_test's (gained, lost, p), and the test puzzles, of the pairs that can be paired."""
    found = []
    for run, other in pairs:
        try:
            gained, lost, p = paired_test(run, other)
        except ValueError:
            continue
        final = run.final()
        assert final is not None  # it was paired
        found.append((gained, lost, p, final["count"]))
    return found


def _share(pairs: Sequence[tuple[Run, Run]]) -> tuple[str, int]:
    """(the mean share of puzzles on which the runs of a pair differ, the test puzzles); ("", 0)
    where no pair can be paired."""
    found = _paired(pairs)
    if not found:
        return "", 0
    share = np.mean([(gained + lost) / count for gained, lost, _, count in found])
    return f"{100 * share:.1f}%", found[0][3]


def _step_times(half: Group, full: Group) -> str:
    """A sentence on how long a step takes in each, and how many times as long in float32."""
    medians = []
    for group in (half, full):
        rates = pd.concat([run.train.steps_per_second for run in group.averaged]).dropna()
        if not len(rates):
            return "How long a step takes is not known."
        medians.append(1 / rates.median())
    texts = [f"{readable(s)} s" if s >= 1 else f"{readable(1000 * s)} ms" for s in medians]
    return (
        f"A step takes {texts[0]} in bfloat16 and {texts[1]} in float32 "
        f"({medians[1] / medians[0]:.2f} times)."
    )


def _devices(half: Group, full: Group) -> str:
    """A sentence for step times that cannot be compared, or ""."""
    devices = sorted({run.device for group in (half, full) for run in group.averaged})
    return f" The steps were not on one kind of device: {'; '.join(devices)}." * (len(devices) > 1)
