"""The cells of a sweep: which runs there are, and whether they could start."""

import dataclasses
import glob
import re
import subprocess
import sys
from pathlib import Path

import sweep_grid
import tpu_settings
from sweep_grid import Grid
from sweep_slices import Place, Slice, check_one_kind, configs_on

import storage
from config import Config
from storage import join
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
NO_BUCKET = "gs://bucket-that-is-not-given"  # stands for it in a dry run


@dataclasses.dataclass
class Cell:
    """One training of a sweep: the run `name` of the configuration file `path` with `overrides`, in
    the folder `url`.
    places: {name of a slice: (project, accelerator type, zone)} of those that it may run on.
    values: {key of the grid: value as text}."""

    name: str
    path: str
    overrides: list[str]
    config: Config
    url: str
    places: dict[str, Place]
    values: dict[str, str]


def make_cells(
    patterns: list[str],
    seeds: list[int] | None,
    overrides: list[str],
    slices: list[Slice],
    dry_run: bool = False,
    grid: Grid | None = None,
) -> list[Cell]:
    """The cells of configuration files (or glob patterns) x points of the grid x seeds, None for
    each configuration's own seed.

    On slices a relative logging.output_dir lies in tpu.bucket; dry_run: which need not be given.
    Raises UserError with one line for every configuration or value that is not valid, on one of the
    slices if there are any.
    """
    cells: list[Cell] = []
    wrong = []
    grid = grid or Grid()
    for path in [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]:
        for point in grid.points:
            for seed in [None] if seeds is None else seeds:
                try:
                    changes = [*overrides, *grid.overrides(path, overrides, point)]
                    cells.append(_make_cell(path, point, seed, changes, slices, dry_run))
                except UserError as error:
                    wrong.append(str(error))
                    break
    wrong += _names_taken(cells)
    if wrong:
        # a wrong environment variable or value of the grid is one mistake, not one for each cell
        lines = [line for text in wrong for line in text.split("\nerror: ")]
        once = {re.sub(r".*?: (?=TPU_)", "", line): None for line in lines}
        raise UserError("\nerror: ".join(once))
    check_one_kind(cells)
    return cells


def _names_taken(cells):
    """What is wrong with the names, a line for each configuration."""
    names, wrong = set(), {}
    for cell in cells:
        if cell.name in names:
            wrong.setdefault(
                cell.path,
                f"{cell.path}: there are two cells named {cell.name}: give each configuration, and "
                "each seed, once and a name of its own",
            )
        names.add(cell.name)
    return list(wrong.values())


def _make_cell(path, point, seed, changes, slices, dry_run):
    changes = [*changes, *([] if seed is None else [f"training.seed={seed}"])]
    config, places, bucket = configs_on(path, changes, slices)
    output_dir = config.logging.output_dir
    if slices:
        if dry_run and not bucket:
            bucket = NO_BUCKET
        output_dir = tpu_settings.on_slice("logging.output_dir", output_dir, bucket)
        if not storage.is_remote(output_dir):
            raise UserError(
                f"{path}: logging.output_dir = {output_dir!r}: this host must be able to read what "
                "a slice writes: give a gs:// path, or a relative path and tpu.bucket"
            )
    name = Path(path).stem + point.name + ("" if seed is None else f"_seed{seed}")
    if point.values:
        try:
            sweep_grid.check_length(config)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return Cell(name, path, changes, config, join(output_dir, name), places, point.values)


def sweep_url(cells: list[Cell]) -> str:
    """The folder of the sweep, beside the runs. Raises UserError where the cells have several
    logging.output_dir."""
    urls = sorted({cell.url[: -len(cell.name)] + "sweep" for cell in cells})
    if len(urls) > 1:
        folders = " and ".join(url.removesuffix("/sweep") for url in urls)
        raise UserError(
            f"logging.output_dir: the configurations have several, {folders}, and a sweep has one: "
            "add logging.output_dir=... to the command"
        )
    return urls[0]


def command(cell: Cell, slot: Slice | None, flags: list[str]) -> list[str]:
    """The words that train the cell, on this host or, by scripts/keep_alive.sh, on the slice
    `slot`."""
    if slot:  # brings a run to its end over preemptions, or finds it running
        own = [*slot.overrides, *(flag for flag in slot.flags if flag not in flags)]
        program = ["bash", str(ROOT / "scripts" / "keep_alive.sh"), cell.path]
    else:
        own, program = [], [sys.executable, str(ROOT / "train_tpu.py"), "--config", cell.path]
    return [*program, "--run_name", cell.name, *cell.overrides, *own, *flags]


def check_datasets(cells: list[Cell]) -> None:
    """Raises UserError, one line for every configuration whose dataset is missing, damaged or not
    the planned one."""
    from train_state import load_datasets  # takes seconds, as it imports PyTorch

    wrong = []
    for cell in _one_each(cells):
        try:
            load_datasets(cell.config)
        except UserError as error:
            wrong.append(f"{cell.path}: {error}")
    if wrong:
        raise UserError("\nerror: ".join(dict.fromkeys(wrong)))


def _one_each(cells):
    """One cell for each configuration, and each dataset and device that the grid gives it: that
    takes seconds, and the other knobs make no difference."""
    kinds = {
        (cell.path, cell.config.device, repr(cell.config.data), cell.config.evaluation.split): cell
        for cell in cells
    }
    return list(kinds.values())


def check_slices(
    cells: list[Cell], slices: list[Slice], flags: list[str], environment: dict[str, str]
) -> None:
    """Raises UserError, one line for every configuration and every slice with which
    scripts/keep_alive.sh could not start. environment: that of keep_alive.sh."""
    wrong = []
    one_each = _one_each(cells)
    # Not all pairs, as each takes a second: make_cells has checked what depends on both.
    pairs = [(cell, slices[0]) for cell in one_each] + [(one_each[0], one) for one in slices[1:]]
    for cell, one in pairs:
        done = subprocess.run(
            command(cell, one, ["--dry_run", *flags]),
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            wrong.append(f"{cell.path} on {one.name}: {last_error(done.stderr, done.returncode)}")
    if wrong:
        raise UserError("\nerror: ".join(wrong))


def last_error(output: str, status: int) -> str:
    """Why a program failed, in one line, from what it printed and its exit status (128 + N for
    signal N)."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    killed = [f"killed by signal {status - 128}"] if status > 128 else []
    return (errors or killed or lines or ["it printed nothing"])[-1][:300]
