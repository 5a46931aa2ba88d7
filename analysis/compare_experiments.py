"""Compare runs with a baseline: what differs, and what it did to accuracy and cost.

    python analysis/compare_experiments.py runs/e1_1 runs/e2_1 runs/e2_3
    python analysis/compare_experiments.py e1_1 --results_dir gs://my-bucket/runs --format markdown
    python analysis/compare_experiments.py mini_e1_1 --results_dir analysis/sample_results \
        --target 0.9 --format csv

The seeds of one configuration make one row. The paper's number stands beside ours.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import analysis_startup

analysis_startup.require("pandas", "scipy", "tabulate")
import numpy as np
import pandas as pd
from paper import paper_result
from results import load_runs
from run_groups import Group, differences, find_group, group_runs, paired_test
from study_statistics import Interval, accuracy_interval

from utils import UserError, run_cli

NOTES = """\
Accuracies are exact accuracies in %. EMA and raw: over all test puzzles at the end of the \
training, with averaged (EMA) and with raw weights. best: the highest evaluation during training. \
[low, high]: for one run Wilson's 95% interval over the puzzles; for several seeds (their number \
in brackets) the range over them about their mean, and, for three seeds or more, t the 95% t \
interval of that mean.
Only finished seeds are averaged. A row without a finished seed shows the run that has come \
furthest.
The best evaluation is chosen by the split it is measured on: where that is the test split, it \
flatters.
McNemar: puzzles that only this run solves (+) and only the baseline solves (-) among the same \
test puzzles, and the exact two-sided p; runs of the same seed are paired. p is not corrected for \
the number of comparisons.
The target counts as reached at the first evaluation during training with that accuracy, so costs \
are known to within evaluation.interval_epochs; they are means over the seeds that reached it.
Chip-hours are hours times TPU chips or GPUs; a run on a CPU has none."""


def parse_args() -> argparse.Namespace:
    """The command line. Raises UserError for a value that makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "baseline",
        help="folder of the baseline's run (or of its seeds); with --results_dir its name there",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="folders of runs to compare; with --results_dir their names (default: all)",
    )
    parser.add_argument(
        "--results_dir", metavar="DIR", help="folder with runs at any depth, local or gs://"
    )
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument(
        "--target",
        type=float,
        default=0.85,
        metavar="A",
        help="exact accuracy (0 to 1) to which steps and hours are counted (default: 0.85)",
    )
    args = parser.parse_args()
    if not 0 < args.target <= 1:
        raise UserError(
            f"--target {args.target:g}: must be an accuracy above 0 and at most 1, such as 0.85"
        )
    if not args.runs and not args.results_dir:
        raise UserError(
            "no runs to compare with the baseline: name their folders after it, or give "
            "--results_dir"
        )
    return args


def main() -> None:
    args = parse_args()
    baseline, groups = chosen_groups(args)
    table = comparison(groups, baseline, args.target)
    if args.format == "csv":
        print(table.to_csv(index=False), end="")
        return
    markdown = args.format == "markdown"
    for part in readable_parts(table, args.target):
        text = part.to_markdown(index=False) if markdown else part.to_string(index=False)
        print(f"{text}\n")
    print(NOTES.replace("\n", "\n\n" if markdown else "\n"))


def chosen_groups(args: argparse.Namespace) -> tuple[Group, list[Group]]:
    """(the baseline's group, all groups to compare, of which the baseline's is the first)."""
    if args.results_dir:
        found = group_runs(load_runs(args.results_dir))
        baseline = find_group(found, args.baseline)
        others = [find_group(found, name) for name in args.runs] or found
    else:
        runs = {run.url: run for run in load_runs(args.baseline)}
        found = group_runs(runs.values())
        if len(found) > 1:
            raise UserError(
                f"{args.baseline}: it holds runs of several configurations "
                f"({', '.join(group.label for group in found)}): the baseline is one: name its "
                "folder, or use --results_dir and its name there"
            )
        for place in args.runs:
            runs |= {run.url: run for run in load_runs(place)}
        others = group_runs(runs.values())
        baseline = others[0]
    return baseline, [baseline, *(group for group in others if group is not baseline)]


# ------------------------------------------------------------------------------
# In numbers
# ------------------------------------------------------------------------------
def comparison(groups: Sequence[Group], baseline: Group, target: float = 0.85) -> pd.DataFrame:
    """One row for each group, in numbers (accuracies 0 to 1): what --format csv prints.

    Every number is of the group's averaged runs (results.Group.averaged), whose seeds are in the
    column `averaged`.
    """
    return pd.DataFrame([_row(group, baseline, target) for group in groups])


def _row(group: Group, baseline: Group, target: float) -> dict[str, Any]:
    is_baseline = group is baseline
    best = [run.best for run in group.averaged if run.best is not None]
    return {
        "run": group.label,
        "config": group.first.config_name,
        "seeds": _seeds(group.runs),
        "averaged": _seeds(group.averaged),
        "state": group.state,
        "changes": "baseline" if is_baseline else changes(group, baseline),
        **_interval_columns("ema", group.accuracy("ema")),
        **_interval_columns("raw", group.accuracy("raw")),
        **_interval_columns("best", accuracy_interval(best)),
        "difference": difference(group, baseline),
        "mcnemar": "" if is_baseline else paired(group, baseline),
        **costs(group, target),
        **paper_columns(group),
    }


def _seeds(runs: Iterable) -> str:
    return " ".join(str(run.seed) for run in runs)


def changes(group: Group, baseline: Group) -> str:
    """The settings that differ from the baseline's, as "key old -> new, ..." or "none"."""
    texts = []
    for key, (old, new) in differences(group, baseline).items():
        short_key = key if key.startswith("dataset") else key.split(".", 1)[-1]
        texts.append(f"{short_key} {_short(old)} -> {_short(new)}")
    return ", ".join(texts) or "none"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _interval_columns(name: str, interval: Interval | None) -> dict[str, Any]:
    """The columns NAME, NAME_low, NAME_high, NAME_t_low, NAME_t_high, NAME_runs, NAME_count."""
    if interval is None:
        keys = ("low", "high", "t_low", "t_high")
        missing = dict.fromkeys((name, *(f"{name}_{key}" for key in keys)), np.nan)
        return {**missing, f"{name}_runs": 0, f"{name}_count": None}
    return {
        name: interval.mean,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        f"{name}_t_low": interval.t_low,
        f"{name}_t_high": interval.t_high,
        f"{name}_runs": interval.runs,
        f"{name}_count": interval.count,
    }


def difference(group: Group, baseline: Group) -> float:
    """Mean final exact accuracy less the baseline's; NaN where one is missing."""
    ours, theirs = group.accuracy(), baseline.accuracy()
    return ours.mean - theirs.mean if ours and theirs else np.nan


def paired(group: Group, baseline: Group) -> str:
    """McNemar's test of each averaged run with the baseline's of the same seed, as text.

    Without a common seed it is the test of their first runs; without any test, the reason.
    """
    ours, theirs = (
        {run.seed: run for run in one.averaged if run.final()} for one in (group, baseline)
    )
    pairs = [(run, theirs[seed]) for seed, run in ours.items() if seed in theirs]
    texts, reasons = [], []
    for run, other in pairs or [(group.first, baseline.first)]:
        try:
            gained, lost, p = paired_test(run, other)
        except ValueError as reason:
            reasons.append(str(reason))
            continue
        which = f"seeds {run.seed} and {other.seed}"
        if run.seed == other.seed:
            which = f"seed {run.seed}"
        texts.append(f"+{gained} -{lost} p={p:.2g} ({which})")
    return "; ".join(texts) or f"no test: {reasons[0]}"


def costs(group: Group, target: float) -> dict[str, Any]:
    """What the training of the averaged runs cost, as means: to the target and as a whole.

    The costs to the target are of those that reached it: `reached` of `runs`.
    """
    rows = [row for run in group.averaged if (row := run.reached(target)) is not None]
    there = pd.DataFrame(rows, columns=["step", "hours", "chip_hours"]).astype(float)
    return {
        "reached": len(there),
        "runs": len(group.averaged),
        "steps_to_target": there.step.mean(),
        "hours_to_target": there.hours.mean(),
        "chip_hours_to_target": there.chip_hours.mean(),
        "hours": group.mean("hours"),
        "chip_hours": group.mean("chip_hours"),
    }


def paper_columns(group: Group) -> dict[str, Any]:
    """The paper's number for this configuration, its table, and why it cannot be compared."""
    entry, reason = paper_result(group.first)
    return {
        "paper": entry["exact_accuracy"] / 100 if entry else np.nan,
        "paper_table": entry["table"] if entry else None,
        "paper_not_comparable": reason or "",
    }


# ------------------------------------------------------------------------------
# For people
# ------------------------------------------------------------------------------
def readable_parts(table: pd.DataFrame, target: float) -> list[pd.DataFrame]:
    """The comparison as three narrow tables of text: what differs; accuracy; cost and the paper."""
    rows = [row for _, row in table.iterrows()]
    goal = f"to {100 * target:g}%"
    accuracy = [
        {
            "run": row.run,
            "EMA": _accuracy(row, "ema"),
            "raw": _accuracy(row, "raw"),
            "best": _accuracy(row, "best"),
            "difference": _difference(row),
            "McNemar": row.mcnemar or "-",
        }
        for row in rows
    ]
    cost = [
        {
            "run": row.run,
            f"steps {goal}": _reached(row, "steps_to_target", ",.0f"),
            f"hours {goal}": _reached(row, "hours_to_target", ".3g"),
            f"chip-hours {goal}": _reached(row, "chip_hours_to_target", ".3g"),
            "hours": _number(row.hours),
            "chip-hours": _number(row.chip_hours),
            "paper": _paper(row),
        }
        for row in rows
    ]
    setup = table[["run", "config", "seeds", "state", "changes"]]
    return [setup, pd.DataFrame(accuracy), pd.DataFrame(cost)]


def _number(value: float, form: str = ".3g") -> str:
    return "-" if pd.isna(value) else format(value, form)


def _difference(row: Any) -> str:
    if pd.isna(row.difference) or row.changes == "baseline":
        return "-"
    return f"{100 * row.difference:+.1f}"


def _accuracy(row: Mapping[str, Any], name: str) -> str:
    """Such as "85.0 [80.0, 90.0] (3) t [72.6, 97.4]"."""
    if pd.isna(row[name]):
        return "-"
    mean, low, high, t_low, t_high = (
        f"{100 * row[name + suffix]:.1f}" for suffix in ("", "_low", "_high", "_t_low", "_t_high")
    )
    text = f"{mean} [{low}, {high}]"
    if row[f"{name}_runs"] > 1:
        text += f" ({row[f'{name}_runs']})"
    if not pd.isna(row[f"{name}_t_low"]):
        text += f" t [{t_low}, {t_high}]"
    return text


def _reached(row: Any, name: str, form: str) -> str:
    text = _number(row[name], form)
    if 0 < row.reached < row.runs and not pd.isna(row[name]):
        text += f" ({row.reached} of {row.runs})"
    return text


def _paper(row: Any) -> str:
    if pd.isna(row.paper):
        return "-"
    text = f"{100 * row.paper:.1f} (Table {row.paper_table:g})"
    if row.paper_not_comparable:
        text += f"; not comparable: {row.paper_not_comparable}"
    return text


if __name__ == "__main__":
    run_cli(main)
