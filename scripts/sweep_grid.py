"""The grid of a sweep: one run for each combination of the values of some knobs, and how long each
of these runs is.

    bash scripts/launch_sweep.sh configs/e3_4.yaml --local --same examples \
        --grid training.lr=1e-4,2e-4 training.global_batch_size=512,768
"""

import contextlib
import dataclasses
import decimal
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from config import Config, knob_value, load_config
from schedule import Schedule, evaluation_interval_steps, stages, total_steps
from utils import UserError

BATCH = "training.global_batch_size"
# what a sweep knows in another way: {key, or the beginning of keys: the rule}
ELSEWHERE = {
    "training.seed": "give the seeds by --seeds",
    "logging.output_dir": "all runs of a sweep lie in one folder",
    "tpu.": "name the slices by --slices; it changes nothing of a training",
}
# what --same sets, or counts by; the datasets may have different numbers of puzzles
SAME_NEEDS = {
    "examples": ("training.epochs", "data.dataset_path", "data.expected_puzzles"),
    "steps": (
        "training.epochs",
        "evaluation.interval_epochs",
        "data.dataset_path",
        "data.expected_puzzles",
    ),
}
# With these any batch can be shared, so that a configuration's own can be read even if the slices
# of the sweep have another number of chips.
ONE_WORKER = ("device=cpu", "training.num_workers=1", "training.grad_accumulation_steps=1")


@dataclasses.dataclass(frozen=True)
class Point:
    """A combination of values. name: what it adds to the name of a run. values: {key: value as
    text}. overrides: the same for load_config."""

    name: str = ""
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grid:
    """The points of a grid; without one, a point that changes nothing. same: what runs with
    different batches have in common, "examples" or "steps"; None where the grid has one batch or
    itself says how long each run is."""

    points: tuple[Point, ...] = (Point(),)
    same: str | None = None

    def overrides(self, path: str, overrides: list[str], point: Point) -> list[str]:
        """What the point changes of the configuration file `path`, after `overrides`.

        As many examples are as many epochs, so that nothing else need change for them. Raises
        UserError if --same steps asks for what cannot be known.
        """
        own = []
        if self.same == "steps":
            config = load_config(path, [*overrides, *ONE_WORKER])
            own = _same_steps(config, int(point.values[BATCH]), path)
        return [*point.overrides, *own]


class Planned(Protocol):
    """What `plan` reads of a cell (sweep_cells.Cell)."""

    name: str
    config: Config
    values: dict[str, str]


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------
def parse_grid(words: list[str], same: str | None, overrides: list[str]) -> Grid:
    """The grid that the words of --grid name, each section.key=value,value; the last knob changes
    first. same: the value of --same, or None. overrides: those of the whole sweep.

    Raises UserError with one line for every mistake.
    """
    if not words:
        if same:
            raise UserError(f"--same {same}: only with --grid and {BATCH} in it")
        return Grid()
    overridden = {text.partition("=")[0].strip() for text in overrides}
    knobs: dict[str, list[Any]] = {}
    wrong = []
    for word in words:
        key, pieces, faults = _split(word)
        if key in knobs:
            faults = [f"--grid: {key} is given twice: write all its values in one list"]
        elif key in overridden:
            faults = [f"--grid: {key} is also an override: leave one of the two out"]
        wrong += faults
        knobs[key] = [] if faults else _values(key, pieces, wrong)
    if not wrong:
        wrong = _faults_together(knobs, same)
    if wrong:
        raise UserError("\nerror: ".join(wrong))
    if BATCH in knobs and not same and not any(key in knobs for key in SAME_NEEDS["examples"]):
        same = "examples"
    return Grid(_points(knobs), same)


def _split(word: str) -> tuple[str, list[str], list[str]]:
    """(key, its values, what is wrong with the word as a whole)."""
    key, equals, text = word.partition("=")
    key, pieces, rule = key.strip(), [piece.strip() for piece in text.split(",")], None
    written = "write section.key=value,value without spaces, as training.lr=1e-4,2e-4"
    if not equals:
        rule = f"{written}, and the configurations before --grid"
    elif "[" in text or "{" in text:
        rule = "a list is no value of a grid: write a configuration for each, and no --grid"
    elif not all(pieces):
        rule = f"a value is missing: {written}"
    for start, why in ELSEWHERE.items():
        if key.startswith(start):
            rule = f"{key} cannot be in a grid: {why}"
    return key, pieces, [f"--grid {word}: {rule}"] if rule else []


def _values(key: str, pieces: list[str], wrong: list[str]) -> list[tuple[str, str]]:
    """[(value as text, override)] of one knob; adds to `wrong` what is."""
    found: dict[Any, tuple[str, str]] = {}
    for piece in pieces:
        try:
            value = knob_value(key, piece, "--grid")
        except UserError as error:
            if str(error) not in wrong:  # a key is unknown once
                wrong.append(str(error))
            continue
        text = _text(value)
        if value in found:
            wrong.append(f"--grid: {key} = {text} is given twice: give each value once")
        # text as it was written: its quotes tell it from a number
        found[value] = text, f"{key}={piece if isinstance(value, str) else text}"
    return list(found.values())


def _text(value: Any) -> str:
    """A value as the kit's YAML has it, however it was written: a number always looks the same."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1e16:
        return repr(value).removesuffix(".0")
    return f"{decimal.Decimal(repr(value)):e}".replace("+", "")


def _faults_together(knobs: dict[str, list[tuple[str, str]]], same: str | None) -> list[str]:
    """What is wrong with the grid as a whole, a line each."""
    points = _points(knobs)
    if len(points) == 1:
        given = " ".join(override for ((_, override),) in knobs.values())
        return [f"--grid {given}: this is one cell: give it as an override, without --grid"]
    by_name: dict[str, Point] = {}
    for point in points:
        other = by_name.setdefault(point.name, point)
        if other is not point:
            both = " and ".join(" ".join(one.overrides) for one in (other, point))
            return [
                f"--grid: {both} would be two runs named CONFIG{point.name}: give values that "
                "differ in their letters and digits"
            ]
    if same and BATCH not in knobs:
        return [f"--same {same}: only with {BATCH} in --grid: leave it out"]
    if same and (keys := [key for key in SAME_NEEDS[same] if key in knobs]):
        return [
            f"--same {same}: {', '.join(keys)} in --grid changes how many {same} a run has: leave "
            "one of the two out"
        ]
    return []


def _points(knobs: dict[str, list[tuple[str, str]]]) -> tuple[Point, ...]:
    last = [key.rpartition(".")[2] for key in knobs]
    labels = {
        key: name if last.count(name) == 1 else key.replace(".", "_")
        for key, name in zip(knobs, last)
    }
    points = []
    for chosen in itertools.product(*knobs.values()):
        values = {key: text for key, (text, _) in zip(knobs, chosen)}
        name = "".join(f"_{labels[key]}{text}" for key, text in values.items())
        overrides = tuple(override for _, override in chosen)
        points.append(Point(re.sub(r"[^A-Za-z0-9._-]", "-", name), values, overrides))
    return tuple(points)


# --------------------------------------------------------------------------------------------------
# How long the runs are
# --------------------------------------------------------------------------------------------------
def num_puzzles(config: Config) -> int | None:
    """Training puzzles of the configuration: those that it expects, or those of the dataset if that
    lies on this host; None where neither is known."""
    if config.data.expected_puzzles:
        return config.data.expected_puzzles
    file = Path(config.data.dataset_path) / "train" / "all__group_indices.npy"
    with contextlib.suppress(OSError, ValueError):
        return len(np.load(file, allow_pickle=False)) - 1
    return None


def _same_steps(config: Config, batch: int, path: str) -> list[str]:
    """Overrides with which a run of another batch makes as many steps as `config`, and is evaluated
    at the same steps."""
    puzzles = num_puzzles(config)
    if puzzles is None:
        raise UserError(
            f"{path}: data.expected_puzzles = None: --same steps needs the number of training "
            f"puzzles, and {config.data.dataset_path} has no training set here: set it, or build "
            "the dataset"
        )
    if batch == config.training.global_batch_size:
        return []

    def steps(epochs):
        training = dataclasses.replace(config.training, epochs=epochs, global_batch_size=batch)
        return total_steps(dataclasses.replace(config, training=training), puzzles)

    epochs, wanted = config.training.epochs, total_steps(config, puzzles)
    epochs *= batch / config.training.global_batch_size
    # Rounding can cost the last step where the epochs are a whole number of steps.
    while steps(epochs) < wanted:
        epochs = math.nextafter(epochs, math.inf)
    while steps(epochs) > wanted:
        epochs = math.nextafter(epochs, 0)
    interval = evaluation_interval_steps(config, puzzles) * batch / puzzles
    return [f"training.epochs={_text(epochs)}", f"evaluation.interval_epochs={_text(interval)}"]


def check_length(config: Config) -> None:
    """Raises UserError if a run would have no step, or a stage of its curriculum none. Where the
    number of puzzles is not known, the run itself tells it."""
    if puzzles := num_puzzles(config):
        stages(config, Schedule.of(config, puzzles).total_steps)


def plan(cells: Iterable[Planned], same: str | None) -> str:
    """The cells of a grid as a table: values, optimizer steps, examples (steps times the global
    batch), and the warm-up in steps and as a share of the run."""
    cells = list(cells)
    keys = list(cells[0].values)
    rows = [("cell", *keys, "steps", "examples", "warm-up")]
    rows += [(cell.name, *cell.values.values(), *_length(cell.config)) for cell in cells]
    widths = [max(map(len, column)) for column in zip(*rows)]
    head = (
        f"{len(cells)} cells"
        + {
            None: "",
            "examples": ": as many examples each as the configuration has, up to part of a batch",
            "steps": ": as many steps each as the configuration has",
        }[same]
    )
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    return "\n".join([head, *lines])


def _length(config: Config) -> tuple[str, str, str]:
    """(steps, examples, warm-up) as text."""
    puzzles, warmup = num_puzzles(config), config.training.lr_warmup_steps
    if not puzzles:
        return "unknown", "unknown", f"{warmup:,}"
    steps = total_steps(config, puzzles)
    examples = steps * config.training.global_batch_size
    return f"{steps:,}", f"{examples:,}", f"{warmup:,} ({warmup / steps:.1%})"
