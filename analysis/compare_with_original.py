"""Does a run match a run of the original code? Its log beside our records.

    python analysis/compare_with_original.py --log original.csv --run runs/e1_1 --out comparison

The log is the history of the original's wandb run as CSV; docs/original_log.md says how to export
it, and which columns count. The run is a folder of this kit, local or gs://. Both should have the
same batch, learning rate and data.

The original logs each step, and this kit means over an interval of steps. So the original's rows
are averaged over the same intervals. The command prints a line for each quantity that both have,
and writes with_original.png and .pdf, with_original.csv (every interval) and
with_original_summary.csv (what is printed) into the folder.
"""

import argparse
from collections.abc import Sequence
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

STEP, SECONDS, LM_LOSS = "_step", "_runtime", "train/lm_loss"
COUNT, MEAN_STEPS = "train/count", "train/steps"
NAMES = ("original", "this kit")


class Quantity(NamedTuple):
    """Something that both logs have.

    title: for people. column: of the original's log. key: of our training records.
    over: what a row of the original's log is: "batch", a mean over the batch; "finished", a mean
        over the puzzles that the step has finished; "time"; or "peak", the highest value so far.
    log: whether it is drawn on a logarithmic axis.
    """

    title: str
    column: str
    key: str
    over: str = "batch"
    log: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1, so that its difference says more than its ratio."""
        return self.title.endswith("accuracy")


QUANTITIES = (
    Quantity("cell loss", LM_LOSS, "lm_loss", log=True),
    Quantity("halting loss", "train/q_halt_loss", "q_halt_loss", log=True),
    Quantity("gradient norm", "train/grad_norm", "grad_norm", log=True),
    Quantity("cell accuracy", "train/accuracy", "cell_accuracy", "finished"),
    Quantity("exact accuracy", "train/exact_accuracy", "exact_accuracy", "finished"),
    Quantity("halting accuracy", "train/q_halt_accuracy", "q_halt_accuracy", "finished"),
    Quantity("supervision steps", MEAN_STEPS, "mean_steps", "finished"),
    Quantity("learning rate", "train/lr", "lr"),
    Quantity("steps per second", SECONDS, "steps_per_second", "time"),
    Quantity("peak memory (bytes)", "train/peak_memory_bytes", "peak_memory_bytes", "peak"),
)
TEST = Quantity("test exact accuracy", "all.exact_accuracy", "exact_accuracy")
ALL = (*QUANTITIES, TEST)
DRAWN = ("cell loss", "halting loss", "gradient norm", "exact accuracy", TEST.title)


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
    summary = summarised(table)
    summary.to_csv(out / "with_original_summary.csv", index=False)
    print("\n".join([*lines(summary), *not_compared(table)]))
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
    if not table[LM_LOSS].notna().any():
        raise UserError(
            f"--log {path}: no row has numbers in both {STEP} and {LM_LOSS}: export it as "
            "docs/original_log.md says"
        )
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
    """One row for each quantity and step that both have: quantity, step, original, ours, ratio
    (ours / original), difference (ours - original).

    step: the last of an interval of our records, over which the original's rows are averaged; or
    the step of an evaluation.
    """
    ours = pd.DataFrame([record for record in run.records if record.get("split") == "train"])
    ours = ours.drop_duplicates("step", keep="last").sort_values("step")
    training = _with_gaps(theirs)
    interval = np.searchsorted(ours.step, training[STEP])  # the record whose interval has the step
    training, interval = training[interval < len(ours)], interval[interval < len(ours)]
    intervals = list(training.groupby(ours.step.to_numpy()[interval]))
    parts = []
    for quantity in QUANTITIES:
        if quantity.column in theirs and quantity.key in ours:
            ours_at = ours.set_index("step")[quantity.key]
            values = [(step, _mean(quantity, rows), ours_at[step]) for step, rows in intervals]
            parts.append(_rows(quantity, values))
    parts.append(_rows(TEST, _tests(theirs, run)))
    return pd.concat(parts, ignore_index=True)


def _with_gaps(theirs: pd.DataFrame) -> pd.DataFrame:
    """The rows of training steps, with the steps and seconds since the row before as gap_steps and
    gap_seconds. Both are NaN where an evaluation lies between, whose time is no training."""
    training = theirs[theirs[LM_LOSS].notna()]
    evaluated = _column(theirs, TEST.column).notna()
    evaluations = np.sort(theirs[STEP][evaluated])
    # how many there are before the row before, and up to this one
    before = np.searchsorted(evaluations, training[STEP].shift().fillna(-np.inf))
    between = np.searchsorted(evaluations, training[STEP], "right") > before
    gaps = (_column(training, name).diff().where(~between) for name in (STEP, SECONDS))
    return training.assign(**dict(zip(("gap_steps", "gap_seconds"), gaps)))


def _mean(quantity: Quantity, rows: pd.DataFrame) -> float:
    """The value of the original's rows of an interval, as a record of ours has it; NaN if none."""
    if quantity.over == "time":
        seconds = rows.gap_seconds.sum()
        return rows.gap_steps.sum() / seconds if seconds > 0 else np.nan
    values = rows[quantity.column]
    if quantity.over == "peak":
        return values.max()
    if quantity.over == "batch":
        return values.mean()
    # 0 in every column stands for a step that has finished no puzzle
    weights = rows[COUNT] if COUNT in rows else 1.0 * (_column(rows, MEAN_STEPS) > 0)
    return (values * weights).sum() / weights.sum() if weights.sum() else np.nan


def _tests(theirs: pd.DataFrame, run: Run) -> list[tuple[int, float, float]]:
    """(step, original, ours) at the steps at which both have an evaluation of the test split."""
    ours: dict[int, float] = {}
    if run.config.evaluation.split == "test":
        ours = dict(zip(run.evaluations.step, run.evaluations.exact_accuracy))
    if final := run.final():  # of all puzzles, as theirs
        ours[run.step] = final["exact_accuracy"]
    original = dict(zip(theirs[STEP], _column(theirs, TEST.column)))
    return [(step, original[step], ours[step]) for step in sorted(ours) if step in original]


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    """A column; NaN in every row where there is none."""
    return table[name] if name in table else pd.Series(np.nan, table.index)


def _rows(quantity: Quantity, values: Sequence[tuple[int, float, float]]) -> pd.DataFrame:
    """The rows of side_by_side of (step, original, ours)."""
    table = pd.DataFrame(values, columns=["step", "original", "ours"]).astype(float).dropna()
    ratio = (table.ours / table.original).replace([np.inf, -np.inf], np.nan)
    table = table.assign(ratio=ratio, difference=table.ours - table.original)
    table.insert(0, "quantity", quantity.title)
    return table.astype({"step": np.int64})


# --------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------
def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each quantity of `side_by_side`.

    Its columns are quantity, first_step, last_step, intervals, original and ours (medians),
    compared ("ratio", or "difference" for shares), median, low and high (5% and 95% of intervals).
    """
    rows = []
    for quantity in ALL:
        part = table[table.quantity == quantity.title]
        if len(part):
            compared = "difference" if quantity.is_share else "ratio"
            low, median, high = part[compared].quantile([0.05, 0.5, 0.95])
            row = {"quantity": quantity.title, "first_step": part.step.min()}
            row |= {"last_step": part.step.max(), "intervals": len(part)}
            row |= {"original": part.original.median(), "ours": part.ours.median()}
            rows.append(row | dict(compared=compared, median=median, low=low, high=high))
    return pd.DataFrame(rows)


def lines(summary: pd.DataFrame) -> list[str]:
    """`summarised` for people, with a heading."""
    heading = f"{'':<20}{'steps':>16}{NAMES[0]:>12}{NAMES[1]:>12}  ours against the original"
    texts = [f"{heading} (5% to 95% of intervals)"]
    for row in summary.itertuples():
        steps, form = f"{row.first_step:,}-{row.last_step:,}", ".3f"
        if row.compared == "difference":
            form = "+.3f"
        texts.append(
            f"{row.quantity:<20}{steps:>16}{row.original:>12.4g}{row.ours:>12.4g}  "
            f"{row.compared:<10} {row.median:{form}} ({row.low:{form}} to {row.high:{form}}, "
            f"{row.intervals})"
        )
    return texts


def not_compared(table: pd.DataFrame) -> list[str]:
    """A line that names the quantities that not both logs have, with the column they need."""
    compared = set(table.quantity)
    missing = [f"{q.title} ({q.column}, {q.key})" for q in ALL if q.title not in compared]
    if not missing:
        return []
    return [f"not in both (column of the original, key of ours): {', '.join(missing)}"]


def figure(table: pd.DataFrame) -> Figure:
    """The curves of DRAWN of both."""
    drawn = [q for q in ALL if q.title in DRAWN and (table.quantity == q.title).any()]
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
