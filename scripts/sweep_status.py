"""The table of a sweep, and --status, which prints it."""

import itertools
import os
import sys
from collections.abc import Set as AbstractSet

import tpu_settings
from sweep_cells import Cell
from sweep_launcher import say
from sweep_slices import Slice
from sweep_state import Attempts, Standing, SweepFolder

import storage
from config import LoggingConfig
from storage import join
from utils import RunFailure, UserError

COLUMNS = (
    "cell",
    "state",
    "attempts",
    "steps",
    "exact (EMA)",
    "exact (raw)",
    "hours",
    "ran on",
    "",
)
ALIGN = (str.ljust, str.ljust, *[str.rjust] * 5, str.ljust, str.ljust)


def table(standings: dict[str, Standing], silent: AbstractSet[str] = frozenset()) -> str:
    """One line for each cell. standings: {cell: how it stands}; silent: the URLs of locks that
    nobody renews."""
    rows = [COLUMNS]
    types: set[str] = set()
    for name, standing in standings.items():
        on_slices = [attempt for attempt in standing.attempts if attempt["slice"]]
        types |= {attempt["accelerator_type"] for attempt in on_slices}
        rows.append((name, *_fields(standing), ran_on(on_slices), _note(standing, silent)))
    if not types:
        rows[0] = (*COLUMNS[:-2], "", "")  # all on this host
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(side(text, width) for side, text, width in zip(ALIGN, row, widths)).rstrip()
        for row in rows
    ]
    if len(types) > 1:
        lines.append(
            f"hours on slices of different types ({', '.join(sorted(types))}) do not compare"
        )
    return "\n".join(lines)


def _fields(standing):
    """State, attempts, steps, two accuracies, hours."""
    found = standing.progress
    exact = found.exact if standing.state == "finished" else {}
    return (
        standing.state,
        str(len(standing.attempts)),
        "-" if found.steps is None else f"{found.steps:,}",
        *(f"{exact[key]:.2%}" if key in exact else "-" for key in ("ema", "raw")),
        "-" if found.train_seconds is None else f"{found.train_seconds / 3600:.2f}",
    )


def _note(standing, silent):
    if standing.state == "running":
        url, owner = standing.holder
        note = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        return note + (", no heartbeat" if url in silent else "")
    if standing.state == "finished" or not standing.attempts:
        return ""
    return standing.attempts[-1]["error"] or ""


def ran_on(attempts: Attempts) -> str:
    """The slices of these attempts, in their order, each written as --slices has it."""
    words = [
        ":".join(
            [
                attempt["slice"],
                attempt["accelerator_type"],
                attempt["zone"],
                *["spot"] * attempt["spot"],
            ]
        )
        for attempt in attempts
    ]
    counted = [(word, len(list(group))) for word, group in itertools.groupby(words)]
    return ", ".join(word if count == 1 else f"{word} x{count}" for word, count in counted)


# --------------------------------------------------------------------------------------------------
# --status
# --------------------------------------------------------------------------------------------------
def folders_to_look_at(
    cells: list[Cell], output_dir: str | None, slices: list[Slice], local: bool
) -> list[str]:
    """The logging.output_dir where the sweep of which --status is asked may lie. A relative one is
    a folder of this host, but for a sweep on slices it lies in the bucket. output_dir: given
    without a configuration, or None."""
    if slices and cells:
        return sorted({cell.url[: -len(cell.name) - 1] for cell in cells})
    folders = [cell.config.logging.output_dir for cell in cells]
    folders = folders or [output_dir or LoggingConfig().output_dir]
    buckets = [
        tpu_settings.slice_settings(cell.config, cell.overrides, [])["TPU_BUCKET"] for cell in cells
    ]
    buckets = buckets or [os.environ.get("TPU_BUCKET", "")]
    places = [] if slices else list(folders)
    if not local:
        places += [
            join(bucket, folder.rstrip("/"))
            for folder in folders
            for bucket in buckets
            if bucket and not storage.is_remote(folder) and not os.path.isabs(folder)
        ]
    return list(dict.fromkeys(places))


def show_status(names: list[str], places: list[str], local: bool) -> None:
    """Print the table of every sweep among the places that has one of the cells, names [] for all
    of its cells.

    places: values of logging.output_dir. local: the user has given --local. Raises UserError where
    there is no such sweep, or RunFailure where this cannot be known.
    """
    found, failures = False, []
    for place in places:
        try:
            folder = SweepFolder(join(place, "sweep"))
            known = folder.names()
            if not known or names and not set(names) & set(known):
                continue
            shown = names or known
            standings = {name: folder.standing(name, join(place, name)) for name in shown}
            held = [one.holder[0] for one in standings.values() if one.holder]
            text = table(standings, folder.silent(held))
        except (UserError, RunFailure) as error:
            failures.append(error)
            continue
        found = True
        say(f"{folder.url}: {len(shown)} cell(s)\n{text}")
    for failure in failures if found else ():
        print(f"warning: {failure}", file=sys.stderr)
    if found:
        return
    text = f"no cell of this sweep is in {' or '.join(join(place, 'sweep') for place in places)}"
    if failures:
        raise type(failures[0])(f"{text}: {failures[0]}")
    elsewhere = ""
    if not local and not any(map(storage.is_remote, places)):
        elsewhere = "; a sweep on slices lies in tpu.bucket: export TPU_BUCKET=gs://..."
    raise UserError(
        f"{text}: give the configurations, overrides and grid that it was begun with, or "
        f"logging.output_dir=... alone{elsewhere}"
    )
