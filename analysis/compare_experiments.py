"""Runs against a baseline: what differs, what it did to accuracy and cost, and the paper's number beside ours.

    python analysis/compare_experiments.py runs/e1_1 runs/e2_1 runs/e2_3
    python analysis/compare_experiments.py e1_1 --results_dir gs://my-bucket/runs --format markdown
    python analysis/compare_experiments.py mini_e1_1 --results_dir analysis/sample_results --target 0.9 --format csv

Seeds of one configuration make one row.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
import pandas as pd
import results  # first: it says which package is missing, and puts the top level on the path

from utils import UserError, run_cli

NOTES = """\
Accuracies are exact accuracies in %: final over all test puzzles at the end of the training, of averaged (EMA) and raw weights; best the highest \
evaluation during training. [low, high]: for one run Wilson's 95% interval over the puzzles; for several seeds (their number in brackets) the range over them \
about their mean, and, of three seeds or more, t the 95% t interval of that mean.
The best evaluation is chosen by the split it is measured on: where that is the test split, it flatters.
McNemar: puzzles that only this run solves (+) and only the baseline solves (-) among the same test puzzles, and the exact two-sided p; runs of the same seed \
are paired. p is not corrected for the number of comparisons.
The target counts as reached at the first evaluation during training with that accuracy, so costs are known to within evaluation.interval_epochs; \
they are means over the seeds that reached it."""


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
            "no runs to compare with the baseline: name their folders after it, or give --results_dir"
        )
    return args


def main():
    args = parse_args()
    baseline, groups = chosen_groups(args)
    table = comparison(groups, baseline, args.target)
    if args.format == "csv":
        print(table.to_csv(index=False), end="")
        return
    for part in readable_parts(table, args.target):
        print(
            (
                part.to_markdown(index=False)
                if args.format == "markdown"
                else part.to_string(index=False)
            )
            + "\n"
        )
    print(NOTES.replace("\n", "\n\n" if args.format == "markdown" else "\n"))


def chosen_groups(args):
    """(the baseline's group, [groups, the baseline's first])."""
    if args.results_dir:
        found = results.group_runs(results.load_runs(args.results_dir))
        baseline = results.find_group(found, args.baseline)
        others = [results.find_group(found, name) for name in args.runs] or found
    else:
        runs = {run.url: run for run in results.load_runs(args.baseline)}
        if len(found := results.group_runs(runs.values())) > 1:
            raise UserError(
                f"{args.baseline}: it holds runs of several configurations ({', '.join(group.label for group in found)}): "
                "the baseline is one: name its folder, or use --results_dir and its name there"
            )
        for place in args.runs:
            runs |= {run.url: run for run in results.load_runs(place)}
        others = results.group_runs(runs.values())
        baseline = others[0]
    return baseline, [baseline, *(group for group in others if group is not baseline)]


def comparison(groups, baseline, target=0.85):
    """One row for each group, in numbers (accuracies 0 to 1): what --format csv prints."""
    return pd.DataFrame(
        [
            {
                "run": group.label,
                "config": group.first.config_name,
                "seeds": " ".join(str(run.seed) for run in group.runs),
                "state": state(group),
                "changes": "baseline" if group is baseline else changes(group, baseline),
                **accuracy_columns("ema", [run.final("ema") for run in group.runs]),
                **accuracy_columns("raw", [run.final("raw") for run in group.runs]),
                **accuracy_columns("best", [run.best for run in group.runs]),
                "difference": difference(group, baseline),
                "mcnemar": "" if group is baseline else paired(group, baseline),
                **costs(group, target),
                **paper_columns(group),
            }
            for group in groups
        ]
    )


def state(group):
    unfinished = [run for run in group.runs if not run.finished]
    if not unfinished:
        return "finished"
    return (
        unfinished[0].state
        if len(group.runs) == 1
        else f"{len(unfinished)} of {len(group.runs)} seeds unfinished"
    )


def changes(group, baseline):
    return (
        ", ".join(
            f"{key.split('.', 1)[-1] if not key.startswith('dataset') else key} {_short(old)} -> {_short(new)}"
            for key, (old, new) in results.differences(group, baseline).items()
        )
        or "none"
    )


def _short(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def accuracy_columns(name, evaluations):
    """The columns NAME, NAME_low, NAME_high, NAME_t_low, NAME_t_high, NAME_runs, NAME_count of evaluations with exact_accuracy and count, or None."""
    found = [one for one in evaluations if one is not None]
    if not found:
        values, count = (np.nan,) * 5, None
    elif len(found) == 1:
        values, count = (
            (
                found[0]["exact_accuracy"],
                *results.wilson(found[0]["exact_accuracy"], int(found[0]["count"])),
                np.nan,
                np.nan,
            ),
            int(found[0]["count"]),
        )
    else:
        values, count = (
            results.spread([one["exact_accuracy"] for one in found]),
            int(min(one["count"] for one in found)),
        )
    return dict(
        zip((name, f"{name}_low", f"{name}_high", f"{name}_t_low", f"{name}_t_high"), values)
    ) | {f"{name}_runs": len(found), f"{name}_count": count}


def difference(group, baseline):
    """Mean final exact accuracy less the baseline's; NaN where one is missing."""
    ours, theirs = group.accuracies(), baseline.accuracies()
    return ours.mean() - theirs.mean() if len(ours) and len(theirs) else np.nan


def paired(group, baseline):
    """McNemar's test of every run with the baseline's run of the same seed, as text; without a common seed, of the first runs."""
    ours, theirs = (
        {run.seed: run for run in one.runs if run.final(run.weights)} for one in (group, baseline)
    )
    pairs = [(run, theirs[seed]) for seed, run in ours.items() if seed in theirs]
    texts, reasons = [], []
    for run, other in pairs or [(group.first, baseline.first)]:
        try:
            gained, lost, p = results.paired_test(run, other)
        except ValueError as reason:
            reasons.append(str(reason))
            continue
        which = (
            f"seed {run.seed}" if run.seed == other.seed else f"seeds {run.seed} and {other.seed}"
        )
        texts.append(f"+{gained} -{lost} p={p:.2g} ({which})")
    return "; ".join(texts) or f"no test: {reasons[0]}"


def costs(group, target):
    """Steps and hours to the target (means over the seeds that reached it), and of the whole training (means over all seeds)."""
    there = [row for run in group.runs if (row := run.reached(target)) is not None]

    def mean(values):
        return pd.Series(list(values), dtype=float).mean()

    return {
        "reached": len(there),
        "runs": len(group.runs),
        "steps_to_target": mean(row.step for row in there),
        "hours_to_target": mean(row.hours for row in there),
        "chip_hours_to_target": mean(row.chip_hours for row in there),
        "hours": mean(run.hours for run in group.runs),
        "chip_hours": mean(run.chip_hours for run in group.runs),
    }


def paper_columns(group):
    entry, reason = results.paper_result(group.first)
    return {
        "paper": entry["exact_accuracy"] / 100 if entry else np.nan,
        "paper_table": entry["table"] if entry else None,
        "paper_not_comparable": reason or "",
    }


# ---------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------
def readable_parts(table, target):
    """The comparison as three narrow tables of text: what differs; accuracy; cost and the paper."""
    rows = [row for _, row in table.iterrows()]
    accuracy = pd.DataFrame(
        [
            {
                "run": row.run,
                "EMA": _accuracy(row, "ema"),
                "raw": _accuracy(row, "raw"),
                "best": _accuracy(row, "best"),
                "difference": "-"
                if pd.isna(row.difference) or row.changes == "baseline"
                else f"{100 * row.difference:+.1f}",
                "McNemar": row.mcnemar or "-",
            }
            for row in rows
        ]
    )
    goal = f"to {100 * target:g}%"
    cost = pd.DataFrame(
        [
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
    )
    return [table[["run", "config", "seeds", "state", "changes"]], accuracy, cost]


def _number(value, form=".3g"):
    return "-" if pd.isna(value) else format(value, form)


def _accuracy(row, name):
    if pd.isna(row[name]):
        return "-"
    text = (
        f"{100 * row[name]:.1f} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"
    )
    if row[f"{name}_runs"] > 1:
        text += f" ({row[f'{name}_runs']})"
    return (
        text
        if pd.isna(row[f"{name}_t_low"])
        else f"{text} t [{100 * row[f'{name}_t_low']:.1f}, {100 * row[f'{name}_t_high']:.1f}]"
    )


def _reached(row, name, form):
    return _number(row[name], form) + (
        f" ({row.reached} of {row.runs})"
        if 0 < row.reached < row.runs and not pd.isna(row[name])
        else ""
    )


def _paper(row):
    if pd.isna(row.paper):
        return "-"
    return f"{100 * row.paper:.1f} (Table {row.paper_table:g})" + (
        f"; not comparable: {row.paper_not_comparable}" if row.paper_not_comparable else ""
    )


if __name__ == "__main__":
    run_cli(main)
