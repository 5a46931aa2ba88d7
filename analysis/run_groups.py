"""Group runs that differ in their seed alone, and compare the groups.

    groups = group_runs(results.load_runs("runs"))
    groups[0].accuracy().mean, groups[0].mean("hours")

`tables.py` makes pandas tables of the groups.
"""

import dataclasses
import json
import posixpath
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from results import Run
from study_statistics import Interval, accuracy_interval, mcnemar

from config import SAME_NUMBERS, Config
from evaluation import unpack_solved
from utils import UserError

# of the sections model and training: what two seeds of one experiment may differ in
FREE_KEYS = SAME_NUMBERS | {"training.seed"}
AUGMENTATION = ("data.augment", "data.augmentations")


@dataclass
class Group:
    """Runs that differ in their seed alone.

    settings: {dotted key: value} of everything that makes the result, without FREE_KEYS.
    left_out: runs with the settings and the seed of one of `runs`, each with the reason.
    """

    label: str
    runs: list[Run]
    settings: dict[str, Any]
    left_out: list[tuple[Run, str]] = field(default_factory=list)

    @property
    def finished(self) -> list[Run]:
        """The finished runs."""
        return [run for run in self.runs if run.finished]

    @property
    def averaged(self) -> list[Run]:
        """The runs that every mean, interval and test of this group is over; never empty.

        These are the finished ones, and weights that were only evaluated. Where there is none, the
        run that has come furthest stands for the group: unfinished seeds are never averaged.
        """
        complete = [run for run in self.runs if run.finished or run.only_evaluated]
        return complete or [max(self.runs, key=lambda run: run.step)]

    @property
    def first(self) -> Run:
        """The run that stands for the group where there has to be one."""
        return self.averaged[0]

    @property
    def state(self) -> str:
        """How far its runs came, which of them are not averaged, and which are left out."""
        unfinished = [run for run in self.runs if not run.finished]
        if not unfinished:
            text = "finished"
        elif len(self.runs) == 1:
            text = unfinished[0].state
        else:
            text = f"{len(unfinished)} of {len(self.runs)} seeds unfinished"
            if self.finished:
                text += " and not averaged"
            else:
                text += f", seed {self.first.seed} is shown ({self.first.state})"
        return "; ".join([text, *(f"{run.name} left out: {why}" for run, why in self.left_out)])

    def finals(self, weights: str | None = None) -> list[dict[str, Any]]:
        """The final evaluations of the averaged runs that have one (see Run.final)."""
        found = [run.final(weights) for run in self.averaged]
        return [final for final in found if final]

    def accuracy(self, weights: str | None = None) -> Interval | None:
        """The final exact accuracy over the averaged runs; None without a final evaluation."""
        return accuracy_interval(self.finals(weights))

    def mean(self, cost: str) -> float:
        """The mean of `hours`, `chip_hours` or `flops` over the averaged runs where it is known."""
        return float(pd.Series([getattr(run, cost) for run in self.averaged], dtype=float).mean())


def settings(run: Run) -> dict[str, Any]:
    """{dotted key: value} of what makes a run's result.

    These are model, training and augmentation, which puzzles, and the weights that it began from.
    """
    flat = config_settings(run.config)
    name = posixpath.basename(run.config.data.dataset_path.rstrip("/"))
    for split in ("train", "test"):
        known = run.datasets.get(split)
        flat[f"dataset.{split}"] = known["sha256"][:12] if known else name
    return {**flat, "init_from": run.starts[0].get("init_from") if run.starts else None}


def config_settings(config: Config) -> dict[str, Any]:
    """{dotted key: value} of what makes the result in a configuration: its sections model and
    training without FREE_KEYS, and AUGMENTATION."""
    flat = {
        f"{section}.{key}": value
        for section in ("model", "training", "data")
        for key, value in dataclasses.asdict(getattr(config, section)).items()
    }
    return {
        key: value
        for key, value in flat.items()
        if key in AUGMENTATION or not (key in FREE_KEYS or key.startswith("data."))
    }


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """The runs in groups, in the order of their first runs.

    Two runs with the same settings and seed are not independent: often one is a copy of the other.
    One of them counts: the one that is finished or else further; of two equal ones the one with
    more averages of checkpoints, and then the folder that still has the name it was started with.
    The other one is named on stderr and in the group's `left_out`. Groups that would have the same
    label are called by their first run's name.
    """
    found: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        seeds = found.setdefault(json.dumps(settings(run)), {})
        seeds.setdefault(run.seed, []).append(run)
    groups = [_group(seeds) for seeds in found.values()]
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:
            group.label = group.runs[0].name
    return groups


def _group(seeds: dict[int, list[Run]]) -> Group:
    """The group of all runs of the same settings. seeds: {seed: its runs}."""
    members, left_out = [], []
    for seed in sorted(seeds):
        kept, *others = sorted(seeds[seed], key=_precedence)
        members.append(kept)
        for other in others:
            reason = _why_left_out(other, kept)
            left_out.append((other, reason))
            print(f"warning: {other.url} is left out: {reason}", file=sys.stderr)
    return Group(members[0].label, members, settings(members[0]), left_out)


def _precedence(run: Run) -> tuple[bool, int, int, bool]:
    renamed = run.started_name not in (None, run.base_name)
    return not run.finished, -run.step, -len(run.averages), renamed


def _why_left_out(run: Run, kept: Run) -> str:
    how_far = "further" if kept.step > run.step else "as far"
    if _beginning(run) and _beginning(run) == _beginning(kept):
        return f"it and {kept.name} are copies of one training, and {kept.name} came {how_far}"
    return f"{kept.name} has the same settings and seed, and came {how_far}"


def _beginning(run: Run) -> dict[str, Any] | None:
    """A run's first start or record. It holds the time, so that only copies have the same one."""
    return next(iter(run.starts or run.records), None)


def find_group(groups: Sequence[Group], name: str) -> Group:
    """The group with this label, or with a run of this name or URL, left out or not.

    Raises UserError, which lists the groups, if there is none.
    """
    for group in groups:
        members = [*group.runs, *(run for run, _ in group.left_out)]
        if name == group.label or any(name in (run.name, run.url) for run in members):
            return group
    for group in groups:
        if name in {run.label for run, _ in group.left_out}:
            return group
    labels = ", ".join(group.label for group in groups)
    raise UserError(f"{name!r}: there is no such run: the runs are {labels}")


def differences(group: Group, other: Group) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (other's value, group's value)} of the settings that differ."""
    return {
        key: (other.settings[key], value)
        for key, value in group.settings.items()
        if other.settings[key] != value
    }


def families(
    groups: Sequence[Group], keys: Sequence[str], also: Sequence[str] = ()
) -> list[list[Group]]:
    """Sets of groups whose settings differ in `keys` (and perhaps `also`, which follow them) alone.

    Each set has at least two combinations of the values of `keys`; the largest set comes first.
    """
    found: dict[str, list[Group]] = {}
    for group in groups:
        rest = {key: value for key, value in group.settings.items() if key not in (*keys, *also)}
        found.setdefault(json.dumps(rest), []).append(group)

    def combinations(family):
        # a curriculum is a list
        return {json.dumps([group.settings[key] for key in keys]) for group in family}

    several = [family for family in found.values() if len(combinations(family)) > 1]
    return sorted(several, key=len, reverse=True)


def paired_test(run: Run, baseline: Run) -> tuple[int, int, float]:
    """study_statistics.mcnemar of two runs' final evaluations.

    Raises ValueError, which says why, where they cannot be paired.
    """
    outcomes, puzzles = [], []
    for one in (run, baseline):
        final = one.final()
        if final is None:
            raise ValueError(f"{one.name} has no final evaluation")
        if "solved" not in final or "dataset_sha256" not in final:
            raise ValueError(
                f"eval.json of {one.name} has no outcomes puzzle by puzzle for its last step: "
                "run train_tpu.py --eval_only"
            )
        outcomes.append(unpack_solved(final["solved"], final["count"]))
        puzzles.append((final["dataset_sha256"], final["count"]))
    if puzzles[0] != puzzles[1]:
        raise ValueError("they were tested on other puzzles (dataset_sha256 differs)")
    return mcnemar(*outcomes)
