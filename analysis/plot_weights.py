"""The figure of which weights to keep: raw, their exponential average, or a mean of checkpoints."""

from collections.abc import Sequence

import pandas as pd
from plot_style import (
    EXACT,
    SEEDS,
    Drawing,
    NoData,
    draw_seeds,
    in_words,
    legend_below,
    line_style,
    means,
    pages,
    panels,
    points_of,
)
from results import Run
from run_groups import Group
from study_statistics import wilson

NAMES = {"raw": "raw", "ema": "EMA"}


def weight_averages(groups: Sequence[Group]) -> list[Drawing]:
    """Accuracy of the raw weights, of their EMA and of means of the last checkpoints."""
    tables = {group.label: _table(group) for group in groups}
    drawn = [group for group in groups if (tables[group.label].weights == "average").any()]
    if not drawn:
        raise NoData(
            "no run has an average of checkpoints in eval.json: train_tpu.py --eval_only "
            "--average 2 makes one"
        )
    return [
        _figure(pd.concat([tables[group.label] for group in page], ignore_index=True))
        for page in pages(drawn)
    ]


def _table(group: Group) -> pd.DataFrame:
    """One row for each averaged run of a group and each of its weights."""
    rows = []
    for run in group.averaged:
        for result in _results(run):
            low, high = wilson(result["exact_accuracy"], result["count"])
            steps = result.get("averaged_steps") or []
            row = {"group": group.label, "run": run.name, "seed": run.seed}
            row |= {"weights": result["weights"], "checkpoints": len(steps)}
            row |= {"steps": " ".join(map(str, steps)), "count": result["count"]}
            rows.append(
                row | {"exact_accuracy": result["exact_accuracy"], "low": low, "high": high}
            )
    columns = ["group", "run", "seed", "weights", "checkpoints", "steps", "count"]
    return pd.DataFrame(rows, columns=[*columns, "exact_accuracy", "low", "high"])


def _results(run: Run) -> list[dict]:
    """The final evaluations of a run: raw, EMA, and one average for each number of checkpoints.

    Of several averages of as many checkpoints the one that ends last.
    """
    by_number: dict[int, dict] = {}
    for result in sorted(run.averages, key=lambda result: result["averaged_steps"]):
        by_number[len(result["averaged_steps"])] = result
    single = [run.final(weights) for weights in NAMES]
    return [result for result in single if result] + [by_number[k] for k in sorted(by_number)]


def _figure(table: pd.DataFrame) -> Drawing:
    numbers = sorted(set(table.checkpoints) - {0})
    kinds = [kind for kind in NAMES if (table.weights == kind).any()]
    places = {**{kind: k for k, kind in enumerate(kinds)}}
    places |= {str(number): len(kinds) + k for k, number in enumerate(numbers)}
    key = table.weights.where(table.weights != "average", table.checkpoints.astype(str))
    fig, (ax,) = panels(1, 2.2)
    labels, handles = list(dict.fromkeys(table.group)), []
    for k, label in enumerate(labels):
        shift = 0.6 * ((k + 0.5) / len(labels) - 0.5)
        rows = table.assign(place=key.map(places) + shift)[table.group == label]
        style = line_style(k) | {"linestyle": ""}
        handles.append(draw_seeds(ax, rows, "place", style))
    names = [NAMES[kind] for kind in kinds] + [f"mean of {number}" for number in numbers]
    ax.set_xticks(range(len(names)), [name.replace(" of ", "\nof ") for name in names])
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylabel(EXACT)
    ax.set_xlabel("weights (mean: of so many checkpoints)")
    if len(labels) > 1:
        legend_below(fig, handles, labels)
    caption = (
        "Exact accuracy on all test puzzles at the end of the training: raw weights, their "
        "exponential average (EMA), and means of the raw weights of several checkpoints "
        f"({_steps_of(table)}). {SEEDS}"
    )
    table_of_key = table.assign(key=key)
    found = " ".join(_found(table_of_key[table_of_key.group == label]) for label in labels)
    return Drawing(fig, caption, table, finding=found)


def _found(rows: pd.DataFrame) -> str:
    """The accuracies of one group, and how far its best mean of checkpoints is from its EMA."""
    label = rows.group.iloc[0]
    text = in_words(rows, "key", lambda key: NAMES.get(key, f"mean of {key}"))
    by_key = means(rows, "key").set_index("key").exact_accuracy
    averages = by_key.drop([kind for kind in NAMES if kind in by_key.index])
    other = next((kind for kind in ("ema", "raw") if kind in by_key.index), None)
    text = f"Exact accuracy of {label} is {text}."
    if other is None or not len(averages):
        return text
    change = points_of(averages.max() - by_key[other])
    name = {"ema": "the EMA", "raw": "the raw weights"}[other]
    best = f"The best mean on these puzzles, of {averages.idxmax()} checkpoints"
    return f"{text} {best}, is {change} from {name}."


def _steps_of(table: pd.DataFrame) -> str:
    """From which steps the checkpoints of each mean are, of the first run that has it."""
    texts = []
    for number, rows in table[table.checkpoints > 0].groupby("checkpoints"):
        steps = [int(step) for step in rows.steps.iloc[0].split()]
        texts.append(f"{number}: steps {steps[0]:,} to {steps[-1]:,}")
    return "; ".join(texts)
