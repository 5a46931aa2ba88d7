"""pandas tables of the groups of a study (run_groups.group_runs).

evaluations_table(groups)           # final evaluations, one row for each run and weights
curves_table(groups, "train")       # training records of all runs; "evaluations": on the way
rating_table(groups), steps_table(groups)
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from results import TRAIN_KEYS
from run_groups import Group
from study_statistics import accuracy_interval, wilson

EVALUATIONS_COLUMNS = (
    "group",
    "run",
    "seed",
    "state",
    "weights",
    "step",
    "count",
    "exact_accuracy",
    "low",
    "high",
    "cell_accuracy",
    "q_halt_accuracy",
    "lm_loss",
    "hours",
    "chip_hours",
    "flops",
    "parameters",
    "supervision_steps",
)
INTERVAL_COLUMNS = ("exact_accuracy", "low", "high")
RATING_COLUMNS = ("group", "rating_min", "rating_max", "seeds", "count", *INTERVAL_COLUMNS)
STEPS_COLUMNS = ("group", "supervision_steps", "seeds", *INTERVAL_COLUMNS)


def evaluations_table(groups: Sequence[Group]) -> pd.DataFrame:
    """One row for each run and weights with a final evaluation: EVALUATIONS_COLUMNS.

    low and high bound Wilson's 95% interval over the puzzles. Every run is in it, also those that
    no mean is over: `state` says which are finished.
    """
    rows = []
    for group in groups:
        for run in group.runs:
            for weights in ("ema", "raw"):
                final = run.final(weights)
                if not final:
                    continue
                low, high = wilson(final["exact_accuracy"], final["count"])
                row = {key: final.get(key) for key in EVALUATIONS_COLUMNS}
                row |= {"group": group.label, "run": run.name, "seed": run.seed, "state": run.state}
                row |= {"low": low, "high": high, "hours": run.hours, "chip_hours": run.chip_hours}
                row |= {"flops": run.flops, "parameters": run.parameters}
                row |= {"supervision_steps": run.config.model.halt_max_steps}
                rows.append(row)
    return pd.DataFrame(rows, columns=list(EVALUATIONS_COLUMNS))


def curves_table(groups: Sequence[Group], which: str) -> pd.DataFrame:
    """Run.train (which="train") or Run.evaluations ("evaluations") of all runs in one table.

    It has also the columns group, run and seed. Unfinished runs are in it.
    """
    parts = [
        getattr(run, which).assign(group=group.label, run=run.name, seed=run.seed)
        for group in groups
        for run in group.runs
        if len(getattr(run, which))
    ]
    if parts:
        return pd.concat(parts, ignore_index=True)
    columns = ["group", "run", "seed", "step", "examples", "hours", "chip_hours", *TRAIN_KEYS]
    return pd.DataFrame(columns=columns)


def rating_table(groups: Sequence[Group]) -> pd.DataFrame:
    """One row for each group and bucket of ratings in its final evaluations: RATING_COLUMNS.

    count is of one run; exact_accuracy is the mean over the averaged runs, and low and high are
    those of study_statistics.Interval.
    """
    rows = []
    for group in groups:
        buckets: dict[tuple, list] = {}
        for final in group.finals():
            for bucket in final.get("by_rating", []):
                buckets.setdefault((bucket["rating_min"], bucket["rating_max"]), []).append(bucket)
        for (lowest, highest), found in buckets.items():
            row = {"group": group.label, "rating_min": lowest, "rating_max": highest}
            rows.append(row | {"count": found[0]["count"]} | _interval_columns(found))
    return pd.DataFrame(rows, columns=list(RATING_COLUMNS))


def steps_table(groups: Sequence[Group]) -> pd.DataFrame:
    """One row for each group and number of supervision steps at test time: STEPS_COLUMNS.

    exact_accuracy is the mean over the averaged runs after so many steps, and low and high are
    those of study_statistics.Interval.
    """
    rows = []
    for group in groups:
        finals = [final for final in group.finals() if final.get("exact_accuracy_by_step")]
        by_step = zip(*(final["exact_accuracy_by_step"] for final in finals))
        for step, values in enumerate(by_step, 1):
            after_step = [
                {"exact_accuracy": value, "count": final["count"]}
                for value, final in zip(values, finals)
            ]
            row = {"group": group.label, "supervision_steps": step}
            rows.append(row | _interval_columns(after_step))
    return pd.DataFrame(rows, columns=list(STEPS_COLUMNS))


def _interval_columns(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    interval = accuracy_interval(evaluations)
    assert interval is not None  # there is at least one evaluation
    return {
        "seeds": interval.runs,
        "exact_accuracy": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }
