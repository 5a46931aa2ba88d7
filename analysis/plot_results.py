"""Figures of a study, from its run folders.

    python analysis/plot_results.py --results_dir runs --out figures
    python analysis/plot_results.py --results_dir gs://my-bucket/runs --out figures

Each figure is written as NAME.png, NAME.pdf and NAME.csv (the numbers drawn), 3.3 inches wide. One that has nothing to draw is not
written, and named with the reason.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import matplotlib.lines
import numpy as np
import pandas as pd
import results  # first: it says which package is missing, and puts the top level on the path
import scipy.stats
from plot_style import (
    COLORS,
    GREY,
    MAX_LINES,
    Figure,
    legend_below,
    look,
    note,
    panels,
    plain_log,
    readable,
    save,
    ticks_at,
)
from results import accuracy_interval, families

from utils import UserError, run_cli

EXACT = "exact accuracy (%)"
MIN_FIT_POINTS = 4  # different sizes; with fewer the interval of the exponent says nothing
INTERVALS = "Bars: one run, 95% Wilson interval over puzzles; several seeds, mean and range."
X_AXES = {
    "step": "training step",
    "examples": "training examples",
    "hours": "hours of training",
    "chip_hours": "chip-hours of training",
}


class NoData(Exception):
    """A figure has nothing to draw; the message says why."""


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results_dir",
        required=True,
        metavar="DIR",
        help="folder with runs at any depth, local or gs://",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the figures")
    return parser.parse_args()


def main():
    args = parse_args()
    groups = results.group_runs(results.load_runs(args.results_dir))
    write_figures(groups, args.out)


def write_figures(groups, out):
    """Draw and save all figures; returns [(Figure, path of its PNG)]. Prints a line for each figure, drawn or not."""
    out, written = out_folder(out), []
    for name, drawn in draw_all(groups):
        if isinstance(drawn, str):
            print(f"not drawn: {name}: {drawn}")
        else:
            written.append((drawn, save(drawn, out)))
            print(f"{written[-1][1]}: {drawn.caption}")
    return written


def out_folder(path):
    """The folder at `path`, made if need be; UserError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: this folder cannot be made ({error.strerror}): name another"
        ) from None
    return Path(path)


def draw_all(groups):
    """(name, Figure or why there is none) of every kind of figure; a kind may have several: figures of at most MAX_LINES groups,
    or one for each set of comparable runs."""
    for name, draw in FIGURES.items():
        try:
            drawn = draw(groups)
        except NoData as reason:
            yield name, str(reason)
            continue
        for k, (fig, caption, data) in enumerate(drawn):
            full = name if k == 0 else f"{name}_{k + 1}"
            yield full, Figure(full, fig, caption, data)


def pages(groups):
    """The groups in parts of at most MAX_LINES, of about the same length."""
    count = -(-len(groups) // MAX_LINES)
    return (
        [[groups[k] for k in part] for part in np.array_split(np.arange(len(groups)), count)]
        if groups
        else []
    )


def with_final(groups, what="a final evaluation (eval.json)"):
    found = [group for group in groups if len(group.accuracies())]
    if not found:
        raise NoData(f"no run has {what}")
    return found


# ---------------------------------------------------------------------------------------------------------
# Curves
# ---------------------------------------------------------------------------------------------------------
def learning_curves(x):
    """A drawing function for the curves against `x`, a key of X_AXES."""

    def draw(groups):
        train, looks = (results.curves_table(groups, which) for which in ("train", "looks"))
        train, looks = train[train[x].notna()], looks[looks[x].notna()]
        if not len(train):
            raise NoData(
                f"no run has training records with {x}"
                + (" (starts.jsonl tells the number of chips)" if x == "chip_hours" else "")
            )
        return [
            curves_page(page, x, train, looks)
            for page in pages([group for group in groups if group.label in set(train.group)])
        ]

    return draw


def curves_page(groups, x, train, looks):
    fig, axes = panels(3, 1.5, sharex=True)
    for k, group in enumerate(groups):
        style = look(k)
        for ax, table, key, scale in (
            (axes[0], train, "loss", 1),
            (axes[1], looks, "exact_accuracy", 100),
            (axes[2], looks, "cell_accuracy", 100),
        ):
            for _, run in table[table.group == group.label].groupby("run", sort=False):
                marked = {} if len(run) <= 25 else {"marker": ""}
                ax.plot(
                    run[x],
                    scale * run[key],
                    **style | marked,
                    alpha=1 if len(group.runs) == 1 else 0.7,
                )
    axes[0].set_yscale("log")
    plain_log(axes[0].yaxis)
    for ax, label, table in zip(
        axes, ("training loss", EXACT, "cell accuracy (%)"), (train, looks, looks)
    ):
        ax.set_ylabel(label)
        if not len(table):
            ax.set_yticks([])
            ax.text(0.5, 0.5, "nothing yet", transform=ax.transAxes, ha="center", va="center")
    axes[-1].set_xlabel(X_AXES[x])
    fig.align_ylabels(axes)
    labels = [group.label for group in groups]
    legend_below(
        fig, [matplotlib.lines.Line2D([], [], **look(k)) for k in range(len(groups))], labels
    )
    data = pd.concat(
        [
            table.assign(split=split)
            for table, split in ((train, "train"), (looks, "evaluation"))
            if len(table)
        ],
        ignore_index=True,
    )
    return (
        fig,
        (
            f"Training loss, and exact and cell accuracy in the evaluations during training (averaged weights where there are any), against {X_AXES[x]}. "
            "One line a run."
        ),
        data[data.group.isin(labels)],
    )


def accuracy_by_step(groups):
    table = results.steps_table(groups)
    if not len(table):
        raise NoData("no run has exact_accuracy_by_step (eval.json)")
    return [
        lines_page(
            page,
            table,
            "supervision_steps",
            "supervision steps at test time",
            "Exact accuracy on all test puzzles after each supervision step, in one pass through the test set.",
        )
        for page in pages([group for group in groups if group.label in set(table.group)])
    ]


def accuracy_by_rating(groups):
    table = results.rating_table(groups)
    if not len(table):
        raise NoData("no run has by_rating (eval.json): its dataset has no ratings")
    lows = sorted(set(table.rating_min))
    table = table.assign(bucket=table.rating_min.map(lows.index))
    counts = [set(table["count"][table.rating_min == low]) for low in lows]
    names = [
        f"{low:g}\n{readable(min(count)) if len(count) == 1 else 'varies'}"
        for low, count in zip(lows, counts)
    ]
    drawn = []
    for page in pages([group for group in groups if group.label in set(table.group)]):
        fig, caption, data = lines_page(
            page,
            table,
            "bucket",
            "lowest rating, and puzzles, of each bucket",
            "Exact accuracy on the test puzzles by difficulty: the dataset's rating, from the given one up to the next.",
            spread_out=True,
        )
        fig.axes[0].set_xticks(range(len(lows)), names)
        fig.axes[0].set_xlim(-0.5, len(lows) - 0.5)
        drawn.append((fig, caption, data))
    return drawn


def lines_page(groups, table, x, label, caption, spread_out=False):
    """One line with intervals for each group. spread_out: beside each other, where all have the same few values of x."""
    fig, (ax,) = panels(1, 2.2)
    handles = []
    for k, group in enumerate(groups):
        rows = table[table.group == group.label]
        shift = 0.5 * ((k + 0.5) / len(groups) - 0.5) if spread_out else 0
        style = look(k) | ({"linestyle": ""} if spread_out else {})
        handles.append(
            ax.errorbar(
                rows[x].to_numpy() + shift,
                100 * rows.exact_accuracy.to_numpy(),
                intervals(rows),
                **style,
                elinewidth=0.7,
            )
        )
    ax.set_xlabel(label)
    ax.set_ylabel(EXACT)
    if not spread_out:
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend_below(fig, handles, [group.label for group in groups])
    return fig, f"{caption} {INTERVALS}", table[table.group.isin([group.label for group in groups])]


def intervals(rows):
    """Error bars in percent, [2, N], from the columns exact_accuracy, low, high."""
    accuracy = rows.exact_accuracy.to_numpy()
    return 100 * np.maximum(0, [accuracy - rows.low.to_numpy(), rows.high.to_numpy() - accuracy])


# ---------------------------------------------------------------------------------------------------------
# Ablations
# ---------------------------------------------------------------------------------------------------------
def interval_table(entries):
    """One row for each (name, group, weights) with such a final evaluation: name, group, weights, runs, exact_accuracy, low, high, kind."""
    rows = [
        {
            "name": name,
            "group": group.label,
            "weights": weights,
            "runs": len(group.accuracies(weights)),
            **dict(
                zip(("exact_accuracy", "low", "high", "kind"), accuracy_interval(group, weights))
            ),
        }
        for name, group, weights in entries
        if len(group.accuracies(weights))
    ]
    return pd.DataFrame(rows)


def bars(table, caption, colors=None):
    """Horizontal bars of interval_table, the first on top, each with its value."""
    fig, (ax,) = panels(1, 0.45 + 0.21 * len(table))
    places = np.arange(len(table))
    ax.barh(
        places,
        100 * table.exact_accuracy,
        0.7,
        color=colors or COLORS[6],
        xerr=intervals(table),
        error_kw={"elinewidth": 0.8},
    )
    ax.set_yticks(places, table.name)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, 128)  # room for the values
    ax.set_xticks(range(0, 101, 20))
    ax.spines["bottom"].set_bounds(0, 100)
    ax.set_xlabel(EXACT)
    for place, value, high in zip(places, table.exact_accuracy, table.high):
        ax.text(100 * max(value, high) + 3, place, f"{100 * value:.1f}", va="center")
    return fig, f"{caption} {INTERVALS}", table


def final_accuracy(groups):
    return [
        bars(
            interval_table(
                [(group.label, group, group.first.weights) for group in with_final(groups)]
            ),
            "Exact accuracy on all test puzzles at the end of the training (averaged weights where there are any).",
        )
    ]


def ema(groups):
    """Averaged and raw weights of the trainings that are alike but for the average; without such a set, of every training that has both."""
    both = [
        group
        for group in with_final(groups)
        if len(group.accuracies("ema")) and len(group.accuracies("raw"))
    ]
    sets = families(with_final(groups), ("training.ema",), ("training.ema_rate",)) or [both]
    if not sets[0]:
        raise NoData(
            "no run has a final evaluation of averaged and of raw weights, and no two differ in training.ema alone"
        )
    drawn = []
    for family in sets:
        table = interval_table(
            [
                (f"{group.label}: {'averaged' if weights == 'ema' else 'raw'}", group, weights)
                for group in family
                for weights in ("ema", "raw")
            ]
        )
        drawn.append(
            bars(
                table,
                "Averaged (EMA) and raw weights at the end of the training.",
                [COLORS[6] if weights == "ema" else COLORS[1] for weights in table.weights],
            )
        )
    return drawn


def ablation(keys, also, name_of, caption):
    """A drawing function: bars of the runs that are alike but for `keys` (and `also`)."""

    def draw(groups):
        drawn = []
        for family in families(with_final(groups), keys, also):
            family = sorted(family, key=lambda group: [group.settings[key] for key in keys])
            drawn.append(
                bars(
                    interval_table(
                        [(name_of(group.settings), group, group.first.weights) for group in family]
                    ),
                    caption,
                )
            )
        if not drawn:
            raise NoData(
                f"no two runs with a final evaluation differ in {' and '.join(keys)} alone"
            )
        return drawn

    return draw


def schedule(groups):
    """T x n."""
    keys = ("model.H_cycles", "model.L_cycles")
    return heat_maps(
        groups,
        keys,
        (),
        "T (H_cycles)",
        "n (L_cycles)",
        lambda cells: True,
        "Exact accuracy (%) by cycles T and latent updates n a cycle; cells without a run are empty. Mean over seeds where there are several.",
    )


def learning_rate_and_batch(groups):
    keys = ("training.lr", "training.global_batch_size")

    def is_grid(cells):  # and no diagonal, on which the one follows the other
        return (
            len(cells) > max(len({lr for lr, _ in cells}), len({batch for _, batch in cells}))
            and len({batch for _, batch in cells}) > 1
        )

    return heat_maps(
        groups,
        keys,
        ("training.epochs", "training.lr_warmup_steps"),
        "learning rate",
        "global batch",
        is_grid,
        "Exact accuracy (%) by learning rate and global batch; cells without a run are empty. Mean over seeds where there are several.",
    )


def heat_maps(groups, keys, also, label_y, label_x, wanted, caption):
    drawn = []
    for family in families(with_final(groups), keys, also):
        cells = {}
        for group in family:
            cells.setdefault(tuple(float(f"{group.settings[key]:.4g}") for key in keys), []).extend(
                group.accuracies()
            )
        if not wanted(cells):
            continue
        rows, columns = (sorted({cell[k] for cell in cells}) for k in (0, 1))
        grid = np.full((len(rows), len(columns)), np.nan)
        for (row, column), values in cells.items():
            grid[rows.index(row), columns.index(column)] = 100 * np.mean(values)
        fig, (ax,) = panels(1, 0.8 + 0.36 * len(rows))
        picture = ax.pcolormesh(grid, cmap="cividis", edgecolors="white", linewidth=1)
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                seeds = len(cells[rows[row], columns[column]])
                ax.text(
                    column + 0.5,
                    row + 0.5,
                    f"{value:.1f}" + (f"\n{seeds} seeds" if seeds > 1 else ""),
                    ha="center",
                    va="center",
                    color="black" if value > middle else "white",
                )
        ax.set_xticks(np.arange(len(columns)) + 0.5, [readable(value) for value in columns])
        ax.set_yticks(np.arange(len(rows)) + 0.5, [readable(value) for value in rows])
        ax.grid(visible=False)
        ax.set_xlabel(label_x)
        ax.set_ylabel(label_y)
        fig.colorbar(picture, label=EXACT)
        data = pd.DataFrame(
            [
                {**dict(zip(keys, cell)), "runs": len(values), "exact_accuracy": np.mean(values)}
                for cell, values in cells.items()
            ]
        )
        drawn.append((fig, caption, data))
    if not drawn:
        raise NoData(
            f"no runs with a final evaluation make a grid of {' and '.join(keys)}, alike otherwise"
        )
    return drawn


# ---------------------------------------------------------------------------------------------------------
# Scaling
# ---------------------------------------------------------------------------------------------------------
def power_law(x, error):
    """Least squares of log(error) on log(x): exponent with its 95% t interval, and the line with the 95% band of its mean.

    x, error: [N], above 0. Returns (exponent, low, high, band), band(x [M]) = (line, low, high), each [M].
    """
    logs, values = np.log(x), np.log(error)
    fit = scipy.stats.linregress(logs, values)
    t = scipy.stats.t.ppf(0.975, len(x) - 2)
    residual = np.sqrt(((values - fit.intercept - fit.slope * logs) ** 2).sum() / (len(x) - 2))

    def band(at):
        line = fit.intercept + fit.slope * np.log(at)
        half = (
            t
            * residual
            * np.sqrt(
                1 / len(x) + (np.log(at) - logs.mean()) ** 2 / ((logs - logs.mean()) ** 2).sum()
            )
        )
        return np.exp(line), np.exp(line - half), np.exp(line + half)

    return fit.slope, fit.slope - t * fit.stderr, fit.slope + t * fit.stderr, band


def scaling(keys, also, size, label):
    """A drawing function: share of puzzles not solved against the size of something, size(run)."""

    def draw(groups):
        drawn = []
        for family in families(with_final(groups), keys, also):
            rows = [
                {
                    "group": group.label,
                    "run": run.name,
                    "x": size(run),
                    "error": 1 - final["exact_accuracy"],
                    "count": final["count"],
                }
                for group in family
                for run in group.runs
                if (final := run.final(run.weights))
            ]
            table = pd.DataFrame(rows).dropna(subset="x")
            if table.x.nunique() > 1:
                drawn.append(scaling_figure(table, label))
        if not drawn:
            raise NoData(
                f"no two runs with a final evaluation differ in {' and '.join(keys)} alone"
            )
        return drawn

    return draw


def scaling_figure(table, label):
    fig, (ax,) = panels(1, 2.2)
    table = table.sort_values("x", kind="stable").reset_index(drop=True)
    low, high = np.transpose(
        [results.wilson(1 - error, count) for error, count in zip(table.error, table["count"])]
    )
    percent = 100 * table.error.to_numpy()
    half = np.maximum(0, [percent - 100 * (1 - high), 100 * (1 - low) - percent])
    ax.errorbar(
        table.x.to_numpy(), percent, half, color=COLORS[0], marker="o", linestyle="", elinewidth=0.7
    )
    # of several at one size the one with the fewest errors stands for it: another learning rate is another try at the same size
    means = table.groupby(["x", "group"], sort=False).error.mean()
    chosen = means.groupby("x").idxmin().map(lambda pair: pair[1])
    fitted = table[table.group == table.x.map(chosen)]
    sizes = fitted.x.nunique()
    if sizes < MIN_FIT_POINTS:
        text = f"no fit: {sizes} sizes, {MIN_FIT_POINTS} are needed"
    elif not (fitted.error > 0).all():
        text = "no fit: a run solves every puzzle"
    else:
        exponent, least, most, band = power_law(fitted.x, fitted.error)
        at = np.geomspace(fitted.x.min(), fitted.x.max(), 50)
        line, below, above = band(at)
        ax.plot(at, 100 * line, color=COLORS[2])
        ax.fill_between(at, 100 * below, 100 * above, color=COLORS[2], alpha=0.2, linewidth=0)
        text = f"not solved ∝ x^{exponent:.2f} (95% interval {least:.2f} to {most:.2f}, {len(fitted)} runs)"
    note(ax, text)
    ax.set_xscale("log")
    if (percent > 0).all():
        ax.set_yscale("log")
        plain_log(ax.yaxis)
    ticks_at(ax, sorted(set(table.x)))
    ax.set_xlabel(label)
    ax.set_ylabel("puzzles not solved (%)")
    return (
        fig,
        (
            f"Share of test puzzles not solved, against {label}; one point a run, with 95% Wilson intervals. Line: power law fitted to the runs by least "
            f"squares in logarithms, with the 95% band of its mean, where there are {MIN_FIT_POINTS} sizes or more; of several settings of one size "
            f"the best is fitted. Here: {text}."
        ),
        table.assign(fitted=table.index.isin(fitted.index), low=1 - high, high=1 - low),
    )


# ---------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------
def frontier(x, y):
    """Which of the points [N] no other beats: none has at most its cost x with a higher y, or less cost with the same y."""
    order = np.lexsort((-np.asarray(y), np.asarray(x)))
    best, on = -np.inf, np.zeros(len(x), bool)
    for k in order:
        if y[k] > best:
            best, on[k] = y[k], True
    return on


def pareto(cost, label, what):
    """A drawing function: final accuracy against a column of evaluations_table, one point a group."""

    def draw(groups):
        finished, rows = [group for group in groups if group.finished], []
        table = results.evaluations_table(finished)
        for group in finished:
            costs = table[(table.group == group.label) & (table.weights == group.first.weights)][
                cost
            ]
            if costs.notna().any():
                rows.append(
                    {
                        "group": group.label,
                        cost: costs.mean(),
                        **dict(zip(("exact_accuracy", "low", "high"), accuracy_interval(group))),
                    }
                )
        if not rows:
            raise NoData(f"no finished run has {what}")
        return [
            pareto_figure(
                pd.DataFrame(rows),
                cost,
                label,
                f"Exact accuracy at the end of the training against {label}.",
            )
        ]

    return draw


def pareto_steps(groups):
    table = results.steps_table(groups)
    if not len(table):
        raise NoData("no run has exact_accuracy_by_step (eval.json)")
    return [
        pareto_figure(
            table,
            "supervision_steps",
            "supervision steps at test time",
            "Exact accuracy against supervision steps at test time, of every training.",
        )
    ]


def pareto_figure(table, cost, label, caption):
    """Every point in grey, those on the frontier in the colour of their group."""
    table = table.assign(
        on_frontier=frontier(table[cost].to_numpy(), table.exact_accuracy.to_numpy())
    )
    fig, (ax,) = panels(1, 2.3)
    ax.errorbar(
        table[cost].to_numpy(),
        100 * table.exact_accuracy.to_numpy(),
        intervals(table),
        color=GREY,
        marker="o",
        linestyle="",
        elinewidth=0.5,
        markersize=2.5,
        zorder=1,
    )
    best = table[table.on_frontier].sort_values(cost)
    ax.step(
        best[cost],
        100 * best.exact_accuracy,
        where="post",
        color=COLORS[0],
        linewidth=0.8,
        zorder=2,
    )
    handles, names = [], list(dict.fromkeys(best.group))
    for k, name in enumerate(names):
        rows = best[best.group == name]
        handles.append(
            ax.errorbar(
                rows[cost].to_numpy(),
                100 * rows.exact_accuracy.to_numpy(),
                intervals(rows),
                **look(k) | {"linestyle": ""},
                elinewidth=0.8,
                zorder=3,
            )
        )
    if cost == "supervision_steps":
        ax.xaxis.get_major_locator().set_params(integer=True)
    elif table[cost].max() > 10 * table[cost].min():
        ax.set_xscale("log")
        if cost != "flops":
            plain_log(ax.xaxis)
    ax.set_xlabel(label)
    ax.set_ylabel(EXACT)
    legend_below(fig, handles, names)
    return (
        fig,
        f"{caption} The line is the Pareto frontier; the runs on it are named, the others grey. {INTERVALS}",
        table,
    )


def throughput(groups):
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
    fig, (ax,) = panels(1, 0.45 + 0.21 * len(table))
    places, rate, devices = (
        np.arange(len(table)),
        table.examples_per_second.to_numpy(),
        list(dict.fromkeys(table.device)),
    )
    error = [rate - table.low.to_numpy(), table.high.to_numpy() - rate]
    colors = [COLORS[(devices.index(device) + 6) % MAX_LINES] for device in table.device]
    drawn = ax.barh(places, rate, 0.7, color=colors, xerr=error, error_kw={"elinewidth": 0.8})
    ax.set_yticks(places, table.group)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("training examples a second")
    legend_below(fig, [drawn[table.device.tolist().index(device)] for device in devices], devices)
    return [
        (
            fig,
            "Training speed of one run of each: median over the logging intervals, with the 10th and 90th percentile.",
            table,
        )
    ]


FIGURES = {
    **{f"learning_curves_{x}": learning_curves(x) for x in X_AXES},
    "final_accuracy": final_accuracy,
    "ablation_ema": ema,
    "ablation_mixer": ablation(
        ("model.mlp_t",),
        ("model.pos_encodings",),
        lambda s: (
            "token MLP" if s["model.mlp_t"] else f"self-attention, {s['model.pos_encodings']}"
        ),
        "Token MLP against self-attention.",
    ),
    "ablation_schedule": schedule,
    "ablation_supervision": ablation(
        ("model.halt_max_steps",),
        (),
        lambda s: f"N_sup {s['model.halt_max_steps']}",
        "Exact accuracy by supervision steps in training and at test time (N_sup).",
    ),
    "scaling_batch": scaling(
        ("training.global_batch_size",),
        ("training.lr", "training.lr_warmup_steps", "training.epochs", "training.puzzle_emb_lr"),
        lambda run: run.config.training.global_batch_size,
        "global batch",
    ),
    "scaling_parameters": scaling(
        ("model.hidden_size", "model.L_layers"),
        ("model.puzzle_emb_ndim", "model.puzzle_emb_len", "model.num_heads"),
        lambda run: run.starts[-1].get("parameters") if run.starts else None,
        "parameters",
    ),
    "scaling_data": scaling(
        ("dataset.train",), ("training.epochs",), lambda run: run.train_puzzles, "training puzzles"
    ),
    "scaling_learning_rate_and_batch": learning_rate_and_batch,
    "pareto_hours": pareto("hours", "hours of training", "hours of training"),
    "pareto_chip_hours": pareto(
        "chip_hours", "chip-hours of training", "chip-hours: starts.jsonl tells the number of chips"
    ),
    "pareto_flops": pareto("flops", "FLOP of training", "model_flops_per_second in its records"),
    "pareto_supervision_steps": pareto_steps,
    "accuracy_by_rating": accuracy_by_rating,
    "accuracy_by_supervision_step": accuracy_by_step,
    "throughput": throughput,
}

if __name__ == "__main__":
    run_cli(main)
