"""The command line of scripts/launch_sweep.sh, which has its help."""

import argparse
import os
import re
import shlex
import sys

from sweep_grid import parse_grid
from sweep_slices import parse_slices

from utils import UserError

KEEP_ALIVE_FLAGS = {"--spot", "--queued", "--max_hours", "--poll", "--log_dir"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """A mistake in the command, in one line that says the way out."""
        message = message.removeprefix("argument ")
        if unknown := re.fullmatch("unrecognized arguments: (.*)", message):
            flag = unknown[1].split()[0].partition("=")[0]
            own = (
                f", or with one slice, as --slices trm-a:{flag[2:]}"
                if flag in ("--spot", "--queued")
                else ""
            )
            message = f"{flag}: unknown argument"
            if flag in KEEP_ALIVE_FLAGS:
                message = (
                    f"{flag}: a flag of scripts/keep_alive.sh: give it after --, as -- {flag}{own}"
                )
        raise UserError(f"{message}; see --help")


def whole_number(text):
    try:
        return int(text)
    except ValueError:
        rule = "is no whole number (several have spaces between them, as --seeds 0 1)"
        raise argparse.ArgumentTypeError(f"{text!r} {rule}") from None


def split_overrides(words):
    """(overrides, other words). What stands between --grid and the next flag is of the grid."""
    overrides, others, in_grid = [], [], False
    for word in words:
        if word.startswith("-"):
            in_grid = word == "--grid"
        is_override = "=" in word and not word.startswith("-") and not os.path.exists(word)
        (overrides if is_override and not in_grid else others).append(word)
    return overrides, others


def parse_args():
    parser = Parser(prog="launch_sweep.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("configs", nargs="*", metavar="CONFIG")
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--slices", nargs="+", metavar="SLICE")
    parser.add_argument("--jobs", type=whole_number, default=1, metavar="N")
    parser.add_argument("--max_steps", type=whole_number, metavar="N")
    parser.add_argument("--seeds", nargs="+", type=whole_number, metavar="K")
    parser.add_argument("--grid", nargs="+", action="extend", metavar="KEY=VALUE,...", default=[])
    parser.add_argument("--same", choices=("examples", "steps"))
    parser.add_argument("--max_attempts", type=whole_number, default=3, metavar="N")
    for flag in ("--retry_failed", "--delete_when_done", "--dry_run", "--status"):
        parser.add_argument(flag, action="store_true")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, flags = sys.argv[1:end], sys.argv[end + 1 :]
    overrides, others = split_overrides(given)
    args = parser.parse_intermixed_args(others)
    args.overrides, args.flags, args.output_dir = overrides, flags, None
    args.slices = parse_slices(args.slices or [])
    if args.status and not args.configs and len(overrides) == 1:
        key, _, value = overrides[0].partition("=")
        if key == "logging.output_dir":
            args.output_dir, args.overrides = value, []
    check_args(args)
    args.grid = parse_grid(args.grid, args.same, args.overrides)
    return args


def check_args(args):
    """Raises UserError where they do not go together."""
    for name, value in (
        ("--jobs", args.jobs),
        ("--max_attempts", args.max_attempts),
        ("--max_steps", args.max_steps),
    ):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: must be >= 1")
    flags = [flag for flag, given in (("--seeds", args.seeds), ("--grid", args.grid)) if given]
    if not args.configs and (alone := [*args.overrides, *flags]):
        raise UserError(
            f"{alone[0]}: of which configuration? Name the files, as configs/e1_*.yaml; without "
            "any, --status shows all cells of logging.output_dir"
        )
    if not args.status and not args.configs:
        raise UserError(
            "no configuration is given: bash scripts/launch_sweep.sh configs/e1_*.yaml --local"
        )
    if args.local and args.slices or not args.status and not args.local and not args.slices:
        raise UserError(
            "give either --local, to train on this host, or --slices SLICE ..., the TPU slices to "
            "train on"
        )
    if args.slices and args.jobs > 1:
        raise UserError(
            f"--jobs {args.jobs}: only with --local; on each of --slices there is one cell at a "
            "time"
        )
    if args.slices and args.max_steps:
        raise UserError(
            f"--max_steps {args.max_steps}: only with --local; for a first look at a slice: bash "
            f"scripts/launch_experiment.sh CONFIG -- --max_steps {args.max_steps}"
        )
    if args.delete_when_done and not args.slices:
        raise UserError("--delete_when_done: only with --slices, which it deletes")
    if "--delete_when_done" in args.flags:
        raise UserError(
            "-- --delete_when_done: that would delete a slice after each of its cells: give it "
            "before --, for the end of the sweep"
        )
    if args.flags and not args.slices and not args.status:
        raise UserError(
            f"-- {shlex.join(args.flags)}: these are for scripts/keep_alive.sh, so only with "
            "--slices"
        )
    if args.slices and any(text.startswith("tpu.name=") for text in args.overrides):
        raise UserError("tpu.name: name the slices by --slices alone")
    if args.seeds and any(text.startswith("training.seed=") for text in args.overrides):
        raise UserError("training.seed: give the seeds by --seeds, or by training.seed= alone")
