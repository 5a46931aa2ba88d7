"""Read run folders, local or gs://.

    runs = load_runs("runs")                            # or gs://my-bucket/runs
    runs[0].state, runs[0].hours, runs[0].train         # the last one is a pandas table

Every number comes from config.yaml, metrics.jsonl, eval.json and starts.jsonl of a run, or is
computed from them. `run_groups.py` makes groups of the seeds of one experiment.
"""

import dataclasses
import functools
import json
import posixpath
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import Config, config_from_dict
from metrics_logger import read_records
from schedule import total_steps
from storage import join, open_folder
from utils import UserError

CONFIG_FILE, METRICS_FILE, EVAL_FILE, STARTS_FILE = FILES = (
    "config.yaml",
    "metrics.jsonl",
    "eval.json",
    "starts.jsonl",
)
SEED_SUFFIX = re.compile(r"[_-]?seed[_-]?\d+$")
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
    "train_flops",
    "model_flops_per_second",
    "mfu",
)
# of a training record: means over the slots that halted, so without meaning where none did
HALTED_KEYS = ("exact_accuracy", "cell_accuracy", "mean_steps")
EVALUATION_KEYS = ("exact_accuracy", "cell_accuracy", "count")
CPU_DEVICES = ("cpu", "xla_cpu")  # a CPU is no chip that a grant counts in chip-hours


# ------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------
@dataclass
class Run:
    """The content of a run's folder, whether or not the run is finished.

    name: the folder's place below the folder that was searched. url: the folder itself.
    records: the lines of metrics.jsonl. results: those of eval.json. starts: the lines of
    starts.jsonl, one for each start of the training.
    """

    name: str
    url: str
    config: Config
    records: list[dict[str, Any]]
    results: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    # ----- what it is -----
    @property
    def base_name(self) -> str:
        """The name of the run's folder."""
        return posixpath.basename(self.name)

    @property
    def label(self) -> str:
        """The folder's name without the seed at its end (e1_1_seed2: e1_1)."""
        return SEED_SUFFIX.sub("", self.base_name) or self.base_name

    @property
    def config_name(self) -> str:
        """The name of the configuration file that the run was started with.

        Where starts.jsonl does not have it, the label stands for it.
        """
        file = self.starts[-1].get("config_file") if self.starts else None
        return Path(file).stem if file else self.label

    @property
    def started_name(self) -> str | None:
        """The folder name that the command of the first start gave the run, None if not recorded.

        A folder of another name has been copied or renamed since.
        """
        words = shlex.split(self.starts[0].get("command") or "") if self.starts else []
        for word, following in zip(words, [*words[1:], None]):
            if word == "--run_name":
                return following
            if word.startswith("--run_name="):
                return word.partition("=")[2]
        file = self.starts[0].get("config_file") if self.starts else None
        return Path(file).stem if file else None

    @property
    def seed(self) -> int:
        """training.seed"""
        return self.config.training.seed

    @property
    def weights(self) -> str:
        """The weights that the run is judged by: "ema" if it averages them, otherwise "raw"."""
        return "ema" if self.config.training.ema else "raw"

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """{split: {puzzles, sha256}}; empty for a run without starts.jsonl."""
        return (self.starts[-1].get("datasets") or {}) if self.starts else {}

    @property
    def parameters(self) -> int | None:
        """The number of the model's parameters; None for a run without starts.jsonl."""
        return self.starts[-1].get("parameters") if self.starts else None

    @property
    def device(self) -> str:
        """For people, such as "TPU v4-64, 32 workers"; "unknown" without starts.jsonl."""
        if not self.starts:
            return "unknown"
        start = self.starts[-1]
        name = f"{start['device']}, {start['device_model']}"
        if start.get("accelerator_type"):
            name = f"TPU {start['accelerator_type']}"
        return f"{name}, {start['world_size']} worker{'s' if start['world_size'] > 1 else ''}"

    # ----- how far it came -----
    @functools.cached_property
    def step(self) -> int:
        """The last step with a training record; 0 without any."""
        return max((record["step"] for record in self._records_of("train")), default=0)

    @functools.cached_property
    def train_puzzles(self) -> int | None:
        """Training puzzles, from starts.jsonl or from the ratio of step and epoch, or None."""
        if self.datasets:
            return self.datasets["train"]["puzzles"]
        epochs = [(r["epoch"], r["step"]) for r in self.records if r.get("epoch") and r.get("step")]
        if not epochs:
            return None
        epoch, step = epochs[-1]
        return round(step * self.config.training.global_batch_size / epoch)

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole training; None if the number of puzzles is unknown."""
        return total_steps(self.config, self.train_puzzles) if self.train_puzzles else None

    @property
    def only_evaluated(self) -> bool:
        """Whether the folder holds an evaluation of weights that were not trained here."""
        return bool(self.results) and not self.records

    @functools.cached_property
    def finished(self) -> bool:
        """Whether it was trained to its last step and evaluated there on the whole test split."""
        return bool(self.total_steps and self.step >= self.total_steps and self.final(self.weights))

    @property
    def state(self) -> str:
        """How far it came, in words."""
        if self.finished:
            return "finished"
        if self.only_evaluated:
            return "evaluated only"
        if not self.total_steps:
            return "no records yet"
        if self.step >= self.total_steps:
            return "trained to the end, no final evaluation (eval.json)"
        return f"unfinished: step {self.step:,} of {self.total_steps:,}"

    # ----- curves -----
    @functools.cached_property
    def train(self) -> pd.DataFrame:
        """One row for each training record: step, examples, hours, chip_hours and TRAIN_KEYS.

        What is unknown is NaN, so are HALTED_KEYS where no slot halted: there a record has null,
        or 0 if an earlier version of the kit wrote it.
        """
        nothing = dict.fromkeys(HALTED_KEYS)
        records = [
            {**record, **nothing} if record.get("count") == 0 else record
            for record in self._records_of("train")
        ]
        return self._table(records, TRAIN_KEYS)

    @functools.cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row for each evaluation during training: step, examples, hours, chip_hours,
        EVALUATION_KEYS. Only of the split and the weights that choose the best checkpoint.
        """
        records = [
            record
            for record in self._records_of(self.config.evaluation.split)
            if record.get("weights") == self.weights and record.get("exact_accuracy") is not None
        ]
        # at the last step the evaluation of the whole test split comes second
        return self._table(records, EVALUATION_KEYS).drop_duplicates("step").reset_index(drop=True)

    def _records_of(self, split: str) -> list[dict[str, Any]]:
        return [
            record
            for record in self.records
            if record.get("split") == split and isinstance(record.get("step"), int)
        ]

    def _table(self, records: list[dict[str, Any]], keys: Sequence[str]) -> pd.DataFrame:
        table = pd.DataFrame(records, columns=["step", "train_seconds", *keys])
        # null makes a column of objects, and so does a key that no record has
        floats = [key for key in ("train_seconds", *keys) if key != "count"]
        table = table.astype(dict.fromkeys(floats, float)).sort_values("step", kind="stable")
        return table.assign(
            examples=table.step * self.config.training.global_batch_size,
            hours=table.train_seconds / 3600,
            chip_hours=self.chip_seconds(table.train_seconds) / 3600,
        )

    # ----- costs -----
    def chip_seconds(self, seconds: pd.Series) -> np.ndarray | pd.Series:
        """Chips times seconds of the training's first `seconds` [N], as [N].

        NaN for a training on a CPU, and where starts.jsonl does not have the number of chips.
        Training that was lost with a crash is in neither number.
        """
        valid: list[dict[str, Any]] = []
        for start in self.starts:
            # one that goes on from an earlier step has made the training of those after it void
            valid = [s for s in valid if s["train_seconds"] < start["train_seconds"]] + [start]
        on_cpu = any(start.get("device") in CPU_DEVICES for start in valid)
        if not valid or valid[0]["train_seconds"] > 0 or on_cpu:
            return np.full(len(seconds), np.nan)
        ends = [start["train_seconds"] for start in valid[1:]] + [np.inf]
        return sum(
            start["world_size"]
            * np.clip(np.minimum(seconds, end) - start["train_seconds"], 0, None)
            for start, end in zip(valid, ends)
        )

    @property
    def hours(self) -> float:
        """Hours of training; NaN if unknown."""
        return float(self.train.hours.max()) if len(self.train) else np.nan

    @property
    def chip_hours(self) -> float:
        """Chip-hours of training; NaN if unknown, and on a CPU."""
        return float(self.train.chip_hours.max()) if len(self.train) else np.nan

    @property
    def flops_per_step(self) -> float:
        """Model FLOP of a training step; NaN without records of its speed."""
        rates = (self.train.model_flops_per_second / self.train.steps_per_second).dropna()
        return float(rates.median()) if len(rates) else np.nan

    def flops_at(self, steps: Any) -> np.ndarray:
        """Model FLOP of the training's first `steps` [N], as [N]; NaN if unknown.

        They are those of the records (train_flops), in which a curriculum's cheaper steps count as
        such. Records of earlier versions of the kit have none: there all steps cost the same.
        """
        known = self.train.dropna(subset="train_flops")
        if not len(known):
            return self.flops_per_step * np.asarray(steps, float)
        return np.interp(steps, [0, *known.step], [0, *known.train_flops])

    @property
    def flops(self) -> float:
        """Model FLOP of the training so far; NaN if unknown."""
        return float(self.flops_at(self.step))

    # ----- accuracy -----
    def final(self, weights: str | None = None) -> dict[str, Any] | None:
        """The evaluation of the whole test split at the run's last step, or None.

        weights: "ema" or "raw"; None takes those that the run is judged by. It is the entry of
        eval.json. Where eval.json is of an earlier checkpoint (--eval_only --checkpoint best) it is
        the record of metrics.jsonl, which lacks the keys `solved` and `dataset_sha256`.
        """
        whole = {result["count"] for result in self.results}  # eval.json is of the whole split
        for entry in (*self.results, *self.records):
            if (
                entry.get("weights") == (weights or self.weights)
                and entry.get("split") == "test"
                and entry.get("count") in whole
                and (self.only_evaluated or entry.get("step") == self.step)
            ):
                return entry
        return None

    @property
    def best(self) -> pd.Series | None:
        """The row of `evaluations` with the highest exact accuracy (the earliest), or None."""
        if not len(self.evaluations):
            return None
        return self.evaluations.loc[self.evaluations.exact_accuracy.idxmax()]

    @property
    def averages(self) -> list[dict[str, Any]]:
        """The evaluations of averages of the run's checkpoints (--eval_only --average)."""
        return [result for result in self.results if result.get("weights") == "average"]

    def reached(self, target: float) -> pd.Series | None:
        """The first row of `evaluations` with at least this exact accuracy (0 to 1), or None."""
        enough = self.evaluations[self.evaluations.exact_accuracy >= target]
        return enough.iloc[0] if len(enough) else None


# ------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------
def load_runs(results_dir: str | Path) -> list[Run]:
    """Every run in or below a local or gs:// folder, in the order of their names (e2 before e10).

    A run that cannot be read is named on stderr and left out. Raises UserError if there is no run,
    and the errors of storage.py.
    """
    folder = open_folder(results_dir)
    files: dict[str, set[str]] = {}
    for path in folder.list():
        place, name = posixpath.split(path)
        if name in FILES:
            files.setdefault(place, set()).add(name)
    runs = []
    for place in sorted(files, key=_natural_order):
        if files[place] == {STARTS_FILE}:
            continue  # a run that has only just been started
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
            kind = "" if isinstance(error, (UserError, ValueError)) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
            where = join(folder.url, place) if place else folder.url
            print(f"warning: {where} is left out: {reason}", file=sys.stderr)
    if not runs:
        raise UserError(
            f"{results_dir}: there is no run here or below: a run is a folder that train_tpu.py "
            "wrote, with config.yaml and metrics.jsonl; name the folder that holds them "
            "(logging.output_dir)"
        )
    return runs


def _natural_order(text: str) -> list[tuple[int, str]]:
    """A sort key by which numbers in a name count as numbers."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _load_run(folder, place: str, names: set[str]) -> Run:
    url = join(folder.url, place) if place else folder.url

    def read(name):
        return folder.read(posixpath.join(place, name)) if name in names else b""

    evaluation = json.loads(read(EVAL_FILE) or b"{}")
    values = yaml.safe_load(read(CONFIG_FILE)) or evaluation.get("config")
    if not isinstance(values, dict):
        raise UserError("it has no configuration (config.yaml)")
    results = [
        result
        for result in evaluation.get("results", [])
        if "count" in result and "exact_accuracy" in result
    ]
    records, starts = (
        read_records(read(name), join(url, name)) for name in (METRICS_FILE, STARTS_FILE)
    )
    starts = [start for start in starts if "train_seconds" in start and "world_size" in start]
    name = place or posixpath.basename(folder.url.rstrip("/"))
    return Run(name, url, config_from_dict(_known(values), url), records, results, starts)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that this version of the kit has; those it lacks are dropped."""
    sections = {
        section.name: {knob.name for knob in dataclasses.fields(section.type)}
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
    }
    known = {}
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            known[key] = {name: leaf for name, leaf in value.items() if name in sections[key]}
        elif key in sections or key == "device":
            known[key] = value
    return known
