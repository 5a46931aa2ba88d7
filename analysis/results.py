"""Run folders, local or gs://, read into objects and tables. Every number comes from config.yaml, metrics.jsonl, eval.json and
starts.jsonl of a run, or is computed from them; the paper's numbers come from paper_results.yaml.

    groups = group_runs(load_runs("runs"))              # or gs://my-bucket/runs
    evaluations_table(groups), curves_table(groups)     # pandas
"""

import dataclasses
import functools
import json
import posixpath
import re
import sys
from dataclasses import dataclass
from pathlib import Path

try:  # what the scripts need is missed here, and said once
    import markdown  # noqa: F401
    import matplotlib  # noqa: F401
    import numpy as np
    import pandas as pd
    import scipy.stats
    import tabulate  # noqa: F401
    import yaml
except ImportError as error:
    print(
        f"error: {error.name} is not installed: pip install -r requirements-analysis.txt (and requirements.txt)",
        file=sys.stderr,
    )
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import SAME_NUMBERS, Config, config_from_dict, load_config, total_steps
from evaluation import unpack_solved
from metrics_logger import read_records
from storage import join, open_folder
from utils import UserError

CONFIG_FILE, METRICS_FILE, EVAL_FILE, STARTS_FILE = FILES = (
    "config.yaml",
    "metrics.jsonl",
    "eval.json",
    "starts.jsonl",
)
SEED_SUFFIX = re.compile(r"[_-]?seed[_-]?\d+$")
# of the sections model and training: what two seeds of one experiment may differ in
FREE_KEYS = SAME_NUMBERS | {"training.seed"}
TRAIN_KEYS = (
    "loss",
    "lm_loss",
    "q_halt_loss",
    "grad_norm",
    "exact_accuracy",
    "cell_accuracy",
    "mean_steps",
    "lr",
    "steps_per_second",
    "examples_per_second",
    "model_flops_per_second",
    "mfu",
)
LOOK_KEYS = ("exact_accuracy", "cell_accuracy", "count")


# ---------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a run's folder holds, however far it came.

    name: its place below the folder that was searched. config: Config. records: metrics.jsonl. results: eval.json's.
    starts: starts.jsonl.
    """

    name: str
    url: str
    config: Config
    records: list
    results: list
    starts: list

    @property
    def label(self):
        """The run's own name without the seed at its end (e1_1_seed2: e1_1)."""
        base = posixpath.basename(self.name)
        return SEED_SUFFIX.sub("", base) or base

    @property
    def config_name(self):
        """Name of the configuration file that it was started with; the label where starts.jsonl does not tell."""
        return (
            Path(self.starts[-1]["config_file"]).stem
            if self.starts and self.starts[-1].get("config_file")
            else self.label
        )

    @property
    def seed(self):
        return self.config.training.seed

    @property
    def weights(self):
        """Which weights its accuracy is of: the averaged ones where there are any."""
        return "ema" if self.config.training.ema else "raw"

    @functools.cached_property
    def train(self):
        """One row for each training record: step, examples, hours, chip_hours (NaN where unknown), TRAIN_KEYS."""
        return self._with_costs(self._table("train", TRAIN_KEYS))

    @functools.cached_property
    def looks(self):
        """One row for each evaluation during training, of the split and weights that choose the best checkpoint."""
        table = self._table(self.config.evaluation.split, (*LOOK_KEYS, "weights"))
        table = table[(table.weights == self.weights) & table.exact_accuracy.notna()]
        return self._with_costs(
            table.drop_duplicates("step").reset_index(drop=True)
        )  # at the end all of test comes second

    def _table(self, split, keys):
        rows = [
            r for r in self.records if r.get("split") == split and isinstance(r.get("step"), int)
        ]
        return pd.DataFrame(rows, columns=["step", "train_seconds", *keys]).sort_values(
            "step", kind="stable"
        )

    def _with_costs(self, table):
        batch = self.config.training.global_batch_size
        seconds = table.train_seconds.astype(float)
        return table.assign(
            examples=table.step * batch,
            hours=seconds / 3600,
            chip_hours=self.chip_seconds(seconds) / 3600,
        )

    def chip_seconds(self, seconds):
        """Chip-seconds (workers x seconds) of the training's first `seconds` [N]; NaN where starts.jsonl does not tell.
        What was trained and lost with a crash is in neither."""
        valid = []  # a start from an earlier step than the one before has made that one's training void
        for start in self.starts:
            valid = [s for s in valid if s["train_seconds"] < start["train_seconds"]] + [start]
        if not valid or valid[0]["train_seconds"] > 0:
            return np.full(len(seconds), np.nan)
        ends = [start["train_seconds"] for start in valid[1:]] + [np.inf]
        return sum(
            start["world_size"]
            * np.clip(np.minimum(seconds, end) - start["train_seconds"], 0, None)
            for start, end in zip(valid, ends)
        )

    @property
    def step(self):
        return max(
            [
                r["step"]
                for r in self.records
                if r.get("split") == "train" and isinstance(r.get("step"), int)
            ],
            default=0,
        )

    @property
    def datasets(self):
        """{split: {puzzles, sha256}}; empty for a run without starts.jsonl."""
        return (self.starts[-1].get("datasets") or {}) if self.starts else {}

    @property
    def train_puzzles(self):
        """Training puzzles, from starts.jsonl or the ratio of step and epoch; None if neither is there."""
        if self.datasets:
            return self.datasets["train"]["puzzles"]
        epochs = [(r["epoch"], r["step"]) for r in self.records if r.get("epoch") and r.get("step")]
        return (
            round(epochs[-1][1] * self.config.training.global_batch_size / epochs[-1][0])
            if epochs
            else None
        )

    @property
    def total_steps(self):
        return total_steps(self.config, self.train_puzzles) if self.train_puzzles else None

    @property
    def finished(self):
        return bool(self.total_steps and self.step >= self.total_steps and self.final(self.weights))

    @property
    def state(self):
        if self.finished:
            return "finished"
        if not self.records and self.results:
            return "evaluated only"
        if self.total_steps and self.step >= self.total_steps:
            return "trained to the end, no final evaluation (eval.json)"
        return (
            f"unfinished: step {self.step:,} of {self.total_steps:,}"
            if self.total_steps
            else "no records yet"
        )

    def final(self, weights):
        """The evaluation of the whole test split at the run's last step, as in eval.json, or None. Where eval.json tells of an
        earlier checkpoint (--eval_only --checkpoint best) it is the record of metrics.jsonl, without the keys `solved` and `dataset_sha256`."""
        whole = {
            r["count"] for r in self.results
        }  # of eval.json, which is written when all of test has been evaluated
        found = [
            r
            for r in (*self.results, *self.records)
            if r.get("weights") == weights
            and r.get("split") == "test"
            and r.get("count") in whole
            and (r.get("step") == self.step or not self.records)
        ]
        return found[0] if found else None

    @property
    def best(self):
        """The best row of `looks` (the earliest, if several), or None."""
        return self.looks.loc[self.looks.exact_accuracy.idxmax()] if len(self.looks) else None

    def reached(self, target):
        """The first row of `looks` with at least this exact accuracy (0 to 1), or None."""
        there = self.looks[self.looks.exact_accuracy >= target]
        return there.iloc[0] if len(there) else None

    @property
    def flops_per_step(self):
        """Model FLOP of a training step; NaN without records."""
        rates = (self.train.model_flops_per_second / self.train.steps_per_second).dropna()
        return float(rates.median()) if len(rates) else np.nan

    @property
    def hours(self):
        return float(self.train.hours.max()) if len(self.train) else np.nan

    @property
    def chip_hours(self):
        return float(self.train.chip_hours.max()) if len(self.train) else np.nan

    @property
    def device(self):
        """For people: "tpu v4-64, 32 workers"; "unknown" without starts.jsonl."""
        if not self.starts:
            return "unknown"
        start = self.starts[-1]
        name = (
            f"TPU {start['accelerator_type']}"
            if start.get("accelerator_type")
            else f"{start['device']}, {start['device_model']}"
        )
        return f"{name}, {start['world_size']} worker{'s' if start['world_size'] > 1 else ''}"


def load_runs(results_dir):
    """[Run] of every run in or below a local or gs:// folder, in the order of their names (e2 before e10). What cannot be read is
    named on stderr and left out. Raises UserError where there is no run, and what storage.py raises."""
    folder = open_folder(results_dir)
    files = {}
    for path in folder.list():
        place, name = posixpath.split(path)
        if name in FILES:
            files.setdefault(place, set()).add(name)
    runs = []
    for place in sorted(
        files,
        key=lambda text: [
            (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)
        ],
    ):
        if files[place] == {STARTS_FILE}:
            continue
        try:
            runs.append(_load_run(folder, place, files[place]))
        except (
            UserError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            FileNotFoundError,
            yaml.YAMLError,
        ) as error:
            reason = " ".join(
                f"{'' if isinstance(error, (UserError, ValueError)) else f'{type(error).__name__}: '}{error}".split()
            )
            print(
                f"warning: {join(folder.url, place) if place else folder.url} is left out: {reason}",
                file=sys.stderr,
            )
    if not runs:
        raise UserError(
            f"{results_dir}: there is no run here or below: a run is a folder that train_tpu.py wrote, with config.yaml and metrics.jsonl; "
            "name the folder that holds them (logging.output_dir)"
        )
    return runs


def _load_run(folder, place, names):
    url = join(folder.url, place) if place else folder.url

    def read(name):
        return folder.read(posixpath.join(place, name)) if name in names else b""

    evaluation = json.loads(read(EVAL_FILE) or b"{}")
    values = yaml.safe_load(read(CONFIG_FILE)) or evaluation.get("config")
    if not isinstance(values, dict):
        raise UserError("it has no configuration (config.yaml)")
    evaluated = [
        result
        for result in evaluation.get("results", [])
        if "count" in result and "exact_accuracy" in result
    ]
    records, starts = (
        read_records(read(name), join(url, name)) for name in (METRICS_FILE, STARTS_FILE)
    )
    starts = [start for start in starts if "train_seconds" in start and "world_size" in start]
    return Run(
        place or posixpath.basename(folder.url.rstrip("/")),
        url,
        config_from_dict(_known(values), url),
        records,
        evaluated,
        starts,
    )


def _known(values):
    """A run of another version of the kit: knobs that this one lacks are left out, and missing ones have their default."""
    sections = {
        f.name: {knob.name for knob in dataclasses.fields(f.type)}
        for f in dataclasses.fields(Config)
        if dataclasses.is_dataclass(f.type)
    }
    return {
        key: {k: v for k, v in value.items() if k in sections[key]}
        if isinstance(value, dict)
        else value
        for key, value in values.items()
        if key in sections or key == "device"
    }


# ---------------------------------------------------------------------------------------------------------
# Seeds of one experiment
# ---------------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """Runs that differ in their seed alone. settings: {dotted key: value} of all that makes the result, FREE_KEYS left out."""

    label: str
    runs: list
    settings: dict

    @property
    def finished(self):
        return [run for run in self.runs if run.finished]

    @property
    def first(self):
        """The run that stands for the group where one has to: the first that is finished, if any is."""
        return (self.finished or self.runs)[0]

    def accuracies(self, weights=None, key="exact_accuracy"):
        """Of every run's final evaluation (of its own `weights`, if not said which), as an array; without those that have none."""
        finals = [run.final(weights or run.weights) for run in self.runs]
        return np.array([final[key] for final in finals if final])


def settings(run):
    """{dotted key: value} of what makes a run's result: model, data and training, which puzzles, and which weights it began from."""
    flat = {**model_and_training(run.config), "data.augment": run.config.data.augment}
    for split in ("train", "test"):
        name = posixpath.basename(run.config.data.dataset_path.rstrip("/"))
        flat[f"dataset.{split}"] = (
            run.datasets[split]["sha256"][:12] if split in run.datasets else name
        )
    return {**flat, "init_from": run.starts[0].get("init_from") if run.starts else None}


def group_runs(runs):
    """[Group], in the order of their first runs. Two that would have the same label get their whole names. Of runs with the same
    settings and seed, which are no independent ones, the one that came furthest counts; the others are named on stderr."""
    found = {}
    for run in runs:
        seeds = found.setdefault(json.dumps(settings(run)), {})
        other = seeds.setdefault(run.seed, run)
        if other is not run:
            seeds[run.seed], left = sorted(
                (other, run), key=lambda one: (not one.finished, -one.step)
            )
            print(
                f"warning: {left.url} is left out: {seeds[run.seed].url} has the same settings and seed, and came further or as far",
                file=sys.stderr,
            )
    members = [[seeds[seed] for seed in sorted(seeds)] for seeds in found.values()]
    groups = [Group(runs[0].label, runs, settings(runs[0])) for runs in members]
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:
            group.label = group.runs[0].name
    return groups


def find_group(groups, name):
    """The group with this label, or with a run of this name; raises UserError naming those that are there."""
    for group in groups:
        if name == group.label or any(name in (run.name, run.url) for run in group.runs):
            return group
    raise UserError(
        f"{name!r}: there is no such run: the runs are {', '.join(group.label for group in groups)}"
    )


def differences(group, other):
    """{dotted key: (other's value, group's)} of the settings that differ."""
    return {
        key: (other.settings[key], value)
        for key, value in group.settings.items()
        if other.settings[key] != value
    }


def families(groups, keys, also=()):
    """[[Group, ...], ...]: sets of groups that are alike but for `keys` (and `also`, which may follow them), with at least two
    combinations of values of `keys`; the largest first."""
    found = {}
    for group in groups:
        rest = {key: value for key, value in group.settings.items() if key not in (*keys, *also)}
        found.setdefault(json.dumps(rest), []).append(group)
    found = [
        family
        for family in found.values()
        if len({tuple(group.settings[key] for key in keys) for group in family}) > 1
    ]
    return sorted(found, key=len, reverse=True)


# ---------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------
def wilson(accuracy, count):
    """95% interval (Wilson 1927) of an accuracy (0 to 1) over `count` puzzles, as (low, high)."""
    interval = scipy.stats.binomtest(round(accuracy * count), count).proportion_ci(
        0.95, method="wilson"
    )
    return float(interval.low), float(interval.high)


def spread(values):
    """(mean, low, high, t_low, t_high) over seeds: the smallest and largest value, and the 95% t interval of the mean
    (NaN for fewer than three seeds: of two it says nothing)."""
    values = np.asarray(values, float)
    mean, half = values.mean(), np.nan
    if len(values) > 2:
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return mean, values.min(), values.max(), mean - half, mean + half


def accuracy_interval(group, weights=None):
    """(accuracy, low, high, kind) of a group's final exact accuracy: Wilson's interval for one run, and of several the mean with the
    smallest and largest; None without a final evaluation."""
    finals = [final for run in group.runs if (final := run.final(weights or run.weights))]
    if not finals:
        return None
    if len(finals) == 1:
        accuracy = finals[0]["exact_accuracy"]
        return (accuracy, *wilson(accuracy, finals[0]["count"]), "95% Wilson interval")
    return (
        *spread([final["exact_accuracy"] for final in finals])[:3],
        f"range of {len(finals)} seeds",
    )


def mcnemar(solved, baseline):
    """McNemar's exact test of two [N] bool arrays of the same puzzles: (only `solved` has, only `baseline` has, two-sided p)."""
    gained, lost = int((solved & ~baseline).sum()), int((~solved & baseline).sum())
    return (
        gained,
        lost,
        float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0,
    )


def paired_test(run, baseline):
    """mcnemar of two runs' final evaluations. Raises ValueError, with the reason, where they cannot be paired."""
    outcomes, digests = [], []
    for one in (run, baseline):
        final = one.final(one.weights)
        if final is None:
            raise ValueError(f"{one.name} has no final evaluation")
        if "solved" not in final or "dataset_sha256" not in final:
            raise ValueError(
                f"eval.json of {one.name} has no outcomes puzzle by puzzle for its last step: run train_tpu.py --eval_only"
            )
        outcomes.append(unpack_solved(final["solved"], final["count"]))
        digests.append((final["dataset_sha256"], final["count"]))
    if digests[0] != digests[1]:
        raise ValueError("they were tested on other puzzles (dataset_sha256 differs)")
    return mcnemar(*outcomes)


# ---------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------
def evaluations_table(groups):
    """One row for each run and weights with a final evaluation: group, run, seed, state, weights, step, count, exact_accuracy,
    low, high (Wilson), cell_accuracy, q_halt_accuracy, lm_loss, hours, chip_hours, flops, parameters, supervision_steps."""
    rows = []
    for group in groups:
        for run in group.runs:
            for weights in ("ema", "raw"):
                if final := run.final(weights):
                    low, high = wilson(final["exact_accuracy"], final["count"])
                    rows.append(
                        {
                            "group": group.label,
                            "run": run.name,
                            "seed": run.seed,
                            "state": run.state,
                            "weights": weights,
                            "step": final.get("step"),
                            "count": final["count"],
                            "exact_accuracy": final["exact_accuracy"],
                            "low": low,
                            "high": high,
                            **{
                                key: final.get(key)
                                for key in ("cell_accuracy", "q_halt_accuracy", "lm_loss")
                            },
                            "hours": run.hours,
                            "chip_hours": run.chip_hours,
                            "flops": run.flops_per_step * run.step,
                            "parameters": run.starts[-1].get("parameters") if run.starts else None,
                            "supervision_steps": run.config.model.halt_max_steps,
                        }
                    )
    return pd.DataFrame(
        rows,
        columns=[
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
        ],
    )


def curves_table(groups, which):
    """The training records (which="train") or the evaluations on the way (which="looks") of all runs in one table, with group, run, seed."""
    parts = [
        getattr(run, which).assign(group=group.label, run=run.name, seed=run.seed)
        for group in groups
        for run in group.runs
    ]
    parts = [part for part in parts if len(part)]
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(
            columns=["group", "run", "seed", "step", "examples", "hours", "chip_hours", *TRAIN_KEYS]
        )
    )


def rating_table(groups):
    """One row for each group and bucket of ratings, over the final evaluations of its runs: rating_min, rating_max, count (of one
    run), exact_accuracy (mean), low, high (as accuracy_interval)."""
    rows = []
    for group in groups:
        buckets = {}
        for run in group.runs:
            for bucket in (run.final(run.weights) or {}).get("by_rating", []):
                buckets.setdefault((bucket["rating_min"], bucket["rating_max"]), []).append(bucket)
        for (low, high), found in buckets.items():
            values = [bucket["exact_accuracy"] for bucket in found]
            interval = (
                wilson(values[0], found[0]["count"])
                if len(values) == 1
                else (min(values), max(values))
            )
            rows.append(
                {
                    "group": group.label,
                    "rating_min": low,
                    "rating_max": high,
                    "seeds": len(values),
                    "count": found[0]["count"],
                    "exact_accuracy": np.mean(values),
                    "low": interval[0],
                    "high": interval[1],
                }
            )
    return pd.DataFrame(
        rows,
        columns=[
            "group",
            "rating_min",
            "rating_max",
            "seeds",
            "count",
            "exact_accuracy",
            "low",
            "high",
        ],
    )


def steps_table(groups):
    """One row for each group and number of supervision steps at test time: supervision_steps, exact_accuracy (mean over runs), low, high."""
    rows = []
    for group in groups:
        finals = [
            final
            for run in group.runs
            if (final := run.final(run.weights)) and final.get("exact_accuracy_by_step")
        ]
        for step, values in enumerate(
            zip(*(final["exact_accuracy_by_step"] for final in finals)), 1
        ):
            interval = (
                wilson(values[0], finals[0]["count"])
                if len(values) == 1
                else (min(values), max(values))
            )
            rows.append(
                {
                    "group": group.label,
                    "supervision_steps": step,
                    "seeds": len(values),
                    "exact_accuracy": np.mean(values),
                    "low": interval[0],
                    "high": interval[1],
                }
            )
    return pd.DataFrame(
        rows, columns=["group", "supervision_steps", "seeds", "exact_accuracy", "low", "high"]
    )


# ---------------------------------------------------------------------------------------------------------
# The paper
# ---------------------------------------------------------------------------------------------------------
@functools.cache
def paper():
    """analysis/paper_results.yaml."""
    return yaml.safe_load((ROOT / "analysis" / "paper_results.yaml").read_text())


def paper_result(run):
    """(the paper's entry for a run's configuration or None, why the two numbers cannot be compared or None)."""
    other = next(
        (
            study
            for study in paper()["other_studies"]
            if run.config_name.startswith(study["prefix"])
        ),
        None,
    )
    name = run.config_name.removeprefix(other["prefix"]) if other else run.config_name
    entry = next((entry for entry in paper()["results"] if name in entry.get("configs", [])), None)
    if entry is None:
        return None, None
    if other:
        return entry, other["reason"]
    dataset, final = paper()["dataset"], run.final(run.weights)
    for key, value in (
        ("train_puzzles", run.train_puzzles),
        ("test_puzzles", final and final["count"]),
    ):
        if value is not None and value != dataset[key]:
            return (
                entry,
                f"{value:,} {key.replace('_', ' ')}, {dataset['name']} has {dataset[key]:,}",
            )
    changed = other_settings(
        run.config, load_config(ROOT / "configs" / f"{name}.yaml", settle=False)
    )
    if changed:
        return entry, f"other settings than configs/{name}.yaml: {', '.join(changed)}"
    return entry, None if final else "no final evaluation"


def other_settings(config, wanted):
    """["key value", ...] of what a run's configuration has otherwise than `wanted`, one of the study's that is not settled."""
    wanted = model_and_training(wanted)
    return [
        f"{key} {value}"
        for key, value in model_and_training(config).items()
        if value != wanted[key] and (key, wanted[key]) != ("model.forward_dtype", "auto")
    ]


def model_and_training(config):
    """{dotted key: value} of a Config's model and training sections, FREE_KEYS left out."""
    return {
        f"{section}.{key}": value
        for section in ("model", "training")
        for key, value in dataclasses.asdict(getattr(config, section)).items()
        if f"{section}.{key}" not in FREE_KEYS
    }
