#!/usr/bin/env python3
"""Run the cells of a study, configuration x grid x seed, one after another or several at once.

    bash scripts/launch_sweep.sh configs/e2_2_*.yaml --local --seeds 0 1 2
    bash scripts/launch_sweep.sh configs/e2_4.yaml --local --grid training.lr=1e-4,2e-4
    bash scripts/launch_sweep.sh configs/e2_2_*.yaml --slices trm-a:v4-64 trm-b:v6e-16:spot

The same command goes on where it was stopped: the folders of the runs tell how far they are
(sweep_state.py).
"""

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sweep_cells
import sweep_grid
from sweep_arguments import parse_args
from sweep_cells import make_cells
from sweep_launcher import Launcher, is_at_step, say
from sweep_slices import delete_command
from sweep_state import SweepFolder, changes, is_given_up
from sweep_status import folders_to_look_at, show_status, table

from utils import RunFailure, UserError, run_cli


def main():
    args = parse_args()
    cells = make_cells(
        args.configs, args.seeds, args.overrides, args.slices, args.dry_run, args.grid
    )
    if args.status:
        names = [cell.name for cell in cells]
        places = folders_to_look_at(cells, args.output_dir, args.slices, args.local)
        show_status(names, places, args.local)
        return 0
    folder, standings, unknown = look(cells, args.dry_run)
    if not unknown:
        check_same(cells, standings, args.retry_failed)
    if args.local:
        sweep_cells.check_datasets(cells)
    else:
        sweep_cells.check_slices(cells, args.slices, args.flags, environment(cells, args))
    flags = args.flags or (["--max_steps", str(args.max_steps)] if args.max_steps else [])
    if args.dry_run:
        if len(args.grid.points) > 1:
            print(sweep_grid.plan(cells, args.grid.same), end="\n\n")
        print_commands(cells, standings, unknown, args.slices, flags)
        return 0
    for cell in cells:
        folder.enter(cell.name)
    return launch(cells, folder, flags, args)


def look(cells, dry_run):
    """(SweepFolder, {name of a cell: its state}, None).

    If the states cannot be read, a dry run gets (None, {}, the error); otherwise the error is
    raised.
    """
    url = sweep_cells.sweep_url(cells)
    try:
        if url.startswith(sweep_cells.NO_BUCKET):
            raise UserError("tpu.bucket is not given: export TPU_BUCKET=gs://...")
        folder = SweepFolder(url)
        return folder, {cell.name: folder.standing(cell.name, cell.url) for cell in cells}, None
    except (UserError, RunFailure) as error:
        if not dry_run:
            raise
        return None, {}, error  # the commands are the same


def check_same(cells, standings, retry_failed):
    """Raises UserError if a cell was begun with another configuration: its result would be taken
    for one of this configuration."""
    wrong = []
    for cell in cells:
        standing = standings[cell.name]
        changed = changes(cell.config, standing.progress)
        if changed and not (retry_failed and is_given_up(standing.attempts)):
            wrong.append(
                f"{cell.url} was begun with another configuration ({changed}): set another "
                "logging.output_dir, or restore the old values to go on"
            )
    if wrong:
        raise UserError("\nerror: ".join(wrong))


def environment(cells, args):
    """The environment variables for scripts/keep_alive.sh.

    In a dry run no bucket need be given. Then a placeholder stands for it, which nobody reads.
    """
    stands_in = sweep_cells.sweep_url(cells).startswith(sweep_cells.NO_BUCKET)
    return {**os.environ, **({"TPU_BUCKET": sweep_cells.NO_BUCKET} if stands_in else {})}


def launch(cells, folder, flags, args):
    """Run the cells, print the table, and return the exit status."""
    launcher = Launcher(
        cells,
        folder,
        args.slices or [None] * args.jobs,
        args.max_attempts,
        flags,
        args.max_steps,
        args.retry_failed,
        args.delete_when_done,
    )
    try:
        number = launcher.run()
        standings = {cell.name: folder.standing(cell.name, cell.url) for cell in cells}
        say(table(standings))
    finally:
        say_what_is_left(cells, args.slices, launcher)
    if number:
        say("stopped: the same command goes on")
        return 128 + number
    for name, why in launcher.refused.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    if args.slices and len(launcher.refused) == len(args.slices):
        return 2
    if all(standing.state == "finished" for standing in standings.values()):
        return 0
    at_steps = args.max_steps and all(is_at_step(folder, cell, args.max_steps) for cell in cells)
    return 0 if at_steps else 1


def say_what_is_left(cells, slices, launcher):
    """The command that deletes each slice which is not deleted."""
    left = [one for one in slices if one.name not in launcher.deleted]
    if left:
        runs = "; runs on them go on:" if launcher.stopped else ":"
        say(
            "these slices, where they exist, use up the grant or cost money until they are deleted"
            + runs
        )
    for one in left:
        say(f"  {shlex.join(delete_command(one.name, cells[0].places[one.name]))}")


def print_commands(cells, standings, unknown, slices, flags):
    """What --dry_run prints."""
    if unknown:
        print(f"how the cells stand is not known: {unknown}")
    for cell in cells:
        stands = "unknown" if unknown else standings[cell.name].state
        words = sweep_cells.command(cell, slices[0] if slices else None, flags)
        print(f"{cell.name}  {stands}  {shlex.join(words)}")
    own = [shlex.join([*one.overrides, *one.flags]) for one in slices]
    for one, words in list(zip(slices, own))[1:]:
        print(f"on {one.name}: {words} in place of {own[0]}")


if __name__ == "__main__":
    run_cli(main)
