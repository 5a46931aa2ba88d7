"""Does a run match a run of the original code? Its log beside our records.

    python analysis/compare_with_original.py --log original.csv --run runs/e1_1 --out comparison

The log is the history of the original's wandb run as CSV; docs/original_log.md says how to export
it, and which columns count. The run is a folder of this kit, local or gs://. Both should have the
same batch, learning rate and data.

The original logs each step, and this kit means over an interval of steps. So the original's rows
are averaged over the same intervals. The command prints one line for each quantity that both have,
and writes with_original.png, .pdf and .csv into the folder.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import analysis_startup

analysis_startup.require("matplotlib", "pandas")
import matplotlib.lines
import numpy as np
import pandas as pd
from plot_results import make_folder
from plot_style import Figure, legend_below, line_style, panels, plain_log, plain_numbers, save
from results import Run, load_runs

from utils import UserError, run_cli

STEP, SECONDS, COUNT, LM_LOSS = "_step", "_runtime", "train/count", "train/lm_loss"
NAMES = ("original", "this kit")


class Quantity(NamedTuple):
    """Something that both logs have.

    title: for people. column: of the original's log. key: of our training records. of_halted:
    whether it is a mean over the puzzles that a step has finished, and not over the batch. log:
    whether it is drawn on a logarithmic axis.
    """

    title: str
    column: str
    key: str
    of_halted: bool = False
    log: bool = False


QUANTITIES = (
    Quantity("cell loss", LM_LOSS, "lm_loss", log=True),
    Quantity("halting loss", "train/q_halt_loss", "q_halt_loss", log=True),
    Quantity("gradient norm", "train/grad_norm", "grad_norm", log=True),
    Quantity("cell accuracy", "train/accuracy", "cell_accuracy", of_halted=True),
    Quantity("exact accuracy", "train/exact_accuracy", "exact_accuracy", of_halted=True),
    Quantity("halting accuracy", "train/q_halt_accuracy", "q_halt_accuracy", of_halted=True),
    Quantity("supervision steps", "train/steps", "mean_steps", of_halted=True),
    Quantity("learning rate", "train/lr", "lr"),
    Quantity("steps per second", "steps_per_second", "steps_per_second"),  # from _runtime
    Quantity("peak memory (bytes)", "train/peak_memory_bytes", "peak_memory_bytes"),
)
TEST = Quantity("test exact accuracy", "all.exact_accuracy", "exact_accuracy")
DRAWN = ("cell loss", "halting loss", "gradient norm", "exact accuracy")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--log", required=True, metavar="FILE", help="the original's history as CSV")
    add("--run", required=True, metavar="DIR", help="one run of this kit, local or gs://")
    add("--out", required=True, metavar="DIR", help="folder for the figure and its numbers")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    theirs, run = read_log(args.log), read_run(args.run)
    table = side_by_side(theirs, run)
    if not len(table):
        ours = run.train.step
        raise UserError(
            f"--log {args.log}: its steps {theirs[STEP].min():,} to {theirs[STEP].max():,} and "
            f"those of {args.run}, {ours.min():,} to {ours.max():,}, have none in common: give the "
            "logs of the same training"
        )
    out = make_folder(args.out)
    print(f"{'':<22}{'steps':>16}{NAMES[0]:>12}{NAMES[1]:>12}{'ratio':>8}   5% to 95% of intervals")
    for line in summary(table):
        print(line)
    print(f"{save(figure(table), out)}: {table.quantity.nunique()} quantities")


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------
def read_log(path: str) -> pd.DataFrame:
    """The rows of the original's log, in the order of their steps; text that is no number is NaN.

    Raises UserError if it is no CSV file, or lacks STEP or LM_LOSS.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' errors of reading are ValueErrors
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"--log {path}: not readable as CSV ({reason}): export it as docs/original_log.md says"
        ) from None
    missing = [column for column in (STEP, LM_LOSS) if column not in table]
    if missing:
        has = ", ".join(map(str, table.columns[:8]))
        raise UserError(
            f"--log {path}: there is no column {missing[0]} (it has {has}): export it as "
            "docs/original_log.md says"
        )
    table = table.apply(pd.to_numeric, errors="coerce").dropna(subset=STEP)
    return table.sort_values(STEP, kind="stable").reset_index(drop=True)


def read_run(path: str) -> Run:
    """The one run in a folder. Raises UserError if there are several, or without records."""
    runs = load_runs(path)
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs[:4])
        raise UserError(
            f"--run {path}: there are {len(runs)} runs ({names}, ...): name one of them"
        )
    if not len(runs[0].train):
        raise UserError(f"--run {path}: it has no training records: give a run that was trained")
    return runs[0]


# --------------------------------------------------------------------------------------------------
# Side by side
# --------------------------------------------------------------------------------------------------
def side_by_side(theirs: pd.DataFrame, run: Run) -> pd.DataFrame:
    """One row for each quantity and step that both have: quantity, step, original, ours.

    step: the last of an interval of our records, over which the original's rows are averaged; or
    the step of an evaluation.
    """
    training = theirs[theirs[LM_LOSS].notna()]
    ours = pd.DataFrame([r for r in run.records if r.get("split") == "train"])
    ends = ours.step.to_numpy()
    interval = np.searchsorted(ends, training[STEP])  # the record whose interval holds the step
    inside = interval < len(ends)
    training = training.assign(step=ends[np.minimum(interval, len(ends) - 1)])[inside]
    parts = [_part(quantity, training, ours) for quantity in QUANTITIES]
    return pd.concat([*parts, _tests(theirs, run)], ignore_index=True)


def _part(quantity: Quantity, training: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    mean: Callable[[pd.DataFrame], float]
    if quantity.column == "steps_per_second":
        mean, needs = _steps_per_second, SECONDS
    else:
        needs = quantity.column

        def mean(rows):
            weights = rows[COUNT] if quantity.of_halted and COUNT in rows else None
            return _weighted_mean(rows[quantity.column], weights)

    if needs not in training or quantity.key not in ours:
        return _rows(quantity, [], [], [])
    means = {step: mean(rows) for step, rows in training.groupby("step")}
    both = ours[ours.step.isin(list(means))].drop_duplicates("step", keep="last")
    return _rows(quantity, both.step, both.step.map(means), both[quantity.key])


def _tests(theirs: pd.DataFrame, run: Run) -> pd.DataFrame:
    """The evaluations at steps at which both have one."""
    if TEST.column not in theirs:
        return _rows(TEST, [], [], [])
    original = theirs.dropna(subset=TEST.column).drop_duplicates(STEP, keep="last")
    ours = run.evaluations.set_index("step")[TEST.key]
    both = original[original[STEP].isin(ours.index)]
    return _rows(TEST, both[STEP], both[TEST.column], both[STEP].map(ours))


def _rows(
    quantity: Quantity, steps: Sequence[int], original: Sequence[float], ours: Sequence[float]
) -> pd.DataFrame:
    columns = {"step": np.asarray(steps, np.int64)}
    columns |= {"original": np.asarray(original, float), "ours": np.asarray(ours, float)}
    table = pd.DataFrame(columns).dropna()
    return table.assign(quantity=quantity.title)[["quantity", "step", "original", "ours"]]


def _weighted_mean(values: pd.Series, weights: pd.Series | None) -> float:
    """The mean over an interval. weights: how many puzzles each value is the mean of."""
    if weights is None:
        return float(values.mean())
    total = float(weights.sum())
    return float((values * weights).sum() / total) if total else np.nan


def _steps_per_second(rows: pd.DataFrame) -> float:
    """From the seconds between the first and the last row of an interval."""
    steps, seconds = (float(rows[key].max() - rows[key].min()) for key in (STEP, SECONDS))
    return steps / seconds if seconds > 0 else np.nan


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------
def summary(table: pd.DataFrame) -> list[str]:
    """A line for each quantity: its median in both logs, and the ratio ours / original."""
    lines = []
    for title, rows in table.groupby("quantity", sort=False):
        ratios = (rows.ours / rows.original).replace([np.inf, -np.inf], np.nan).dropna()
        low, middle, high = ratios.quantile([0.05, 0.5, 0.95]) if len(ratios) else [np.nan] * 3
        steps = f"{rows.step.min():,}-{rows.step.max():,}"
        lines.append(
            f"{title:<22}{steps:>16}{rows.original.median():>12.4g}{rows.ours.median():>12.4g}"
            f"{middle:>8.3f}   {low:.3f} to {high:.3f} ({len(rows)})"
        )
    return lines


def figure(table: pd.DataFrame) -> Figure:
    """The curves of DRAWN, and the test accuracy, of both."""
    kinds = [q for q in (*QUANTITIES, TEST) if q.title in (*DRAWN, TEST.title)]
    drawn = [q for q in kinds if (table.quantity == q.title).any()]
    fig, axes = panels(len(drawn), 1.3, sharex=True)
    for ax, quantity in zip(axes, drawn):
        rows = table[table.quantity == quantity.title]
        for k, column in enumerate(("original", "ours")):
            marker = {} if quantity is TEST else {"marker": ""}
            ax.plot(rows.step, rows[column], **line_style(k) | marker)
        if quantity.log:
            ax.set_yscale("log")
            plain_log(ax.yaxis)
        ax.set_ylabel(quantity.title)
    axes[-1].set_xlabel("training step")
    plain_numbers(axes[-1].xaxis)
    fig.align_ylabels(axes)
    styles = [line_style(k) | {"marker": ""} for k in range(2)]
    legend_below(fig, [matplotlib.lines.Line2D([], [], **style) for style in styles], NAMES)
    caption = "Training of the original code and of this kit; means over the same steps."
    name = "with_original"
    return Figure(fig, caption, table, name, name, "Against the original")


if __name__ == "__main__":
    run_cli(main)
