"""Which cell of a sweep is where: a folder of storage.py with <cell>/state.json, how the cell stands, and <cell>/run.lock
(run_lock.py), who runs it. So two launchers never run one cell, and those of a launcher that died are taken over.
"""

import contextlib
import dataclasses
import itertools
import json
import time

import run_lock
from config import differences
from metrics_logger import read_records
from run_lock import RunLock
from storage import join, open_folder
from utils import RunFailure, UserError

STATE = "state.json"
RESUMABLE = (143, 130)  # preempted, interrupted: there is a checkpoint to go on from
BEAT_SECONDS = 10.0  # of every lock, as train_tpu.py renews a run's
DEADLINE_SECONDS = (
    10.0  # for one operation on the ledger: a renewal of a lock must not hang for long
)


class Ledger:
    """The states of cells. Each is replaced only in the version that was read: a launcher that lost a cell cannot write over
    what its new owner wrote. Methods raise what storage.py raises."""

    def __init__(self, url):
        self.url, self.folder = url, open_folder(url, deadline=DEADLINE_SECONDS)
        self.folders = {}  # {url: the folder that holds a lock}
        self.held = {}  # {url: (version of the lock, when it was first seen)} of locks that somebody else holds

    def names(self):
        return [
            name[: -len(STATE) - 1] for name in self.folder.list() if name.endswith(f"/{STATE}")
        ]

    def read(self, name):
        """(state, version); (None, None) of a cell that the ledger does not know."""
        try:
            data, version = self.folder.read_version(f"{name}/{STATE}")
        except FileNotFoundError:
            return None, None
        return json.loads(data), version

    def write(self, name, state, version):
        """The new version. Raises RunFailure where the state is no longer that of `version`."""
        written = self.folder.replace_if(f"{name}/{STATE}", _content(state), version)
        if written is None:
            raise RunFailure(f"{self.url}: another launcher has taken over {name}")
        return written

    def lock(self, url):
        """The RunLock of the folder `url`, or None where somebody else holds it."""
        # an owner that was seen alive is only looked at, until it renews nothing more: to ask RunLock takes seconds, and a message
        folder, version, now = self._lock_folder(url), self._lock_version(url), time.monotonic()
        seen, since = self.held.get(url, (None, now))
        if seen is not None and version is not None:
            if version != seen:
                self.held[url] = version, now
                return None
            if now - since < run_lock.WATCHED_BEATS * BEAT_SECONDS:
                return None
        self.held.pop(url, None)
        try:
            return RunLock(folder, beat_seconds=BEAT_SECONDS)
        except UserError:
            if (version := self._lock_version(url)) is None:
                return RunLock(
                    folder, beat_seconds=BEAT_SECONDS
                )  # released just now, or a folder that cannot be used: this says so
            self.held[url] = version, time.monotonic()
            return None

    def silent(self, names):
        """Those of the cells whose lock nobody renews. Takes WATCHED_BEATS beats unless all are renewed before."""
        first = {name: self._lock_version(join(self.url, name)) for name in names}
        waiting, give_up = (
            {name for name in names if first[name]},
            time.monotonic() + run_lock.WATCHED_BEATS * BEAT_SECONDS,
        )
        while waiting and time.monotonic() < give_up:
            time.sleep(BEAT_SECONDS / 10)
            waiting = {
                name for name in waiting if self._lock_version(join(self.url, name)) == first[name]
            }
        return waiting | {name for name in names if not first[name]}

    def enter(self, cell, retry_failed):
        """Note a cell that has not been tried yet, or, retry_failed, is to be tried again."""
        state, version = self.read(cell.name)
        new = {
            "cell": cell.name,
            "state": "waiting",
            "attempts": 0,
            "failures": 0,
            "exit_status": None,
            "error": None,
            "owner": None,
            "history": [],
            "began": None,
            "ended": None,
            "url": cell.url,
            "config": dataclasses.asdict(cell.config),
        }
        if state and state["state"] == "failed" and retry_failed:
            new |= {"attempts": state["attempts"], "history": state.get("history", [])}
        elif state and (state["attempts"] or state == new):
            return
        self.folder.replace_if(
            f"{cell.name}/{STATE}", _content(new), version
        )  # None: another launcher has been here

    def _lock_folder(self, url):
        if url not in self.folders:
            self.folders[url] = open_folder(
                url, deadline=DEADLINE_SECONDS
            )  # a gs:// one has a client of its own
        return self.folders[url]

    def _lock_version(self, url):
        try:
            return self._lock_folder(url).read_version(run_lock.NAME)[1]
        except FileNotFoundError:
            return None

    def check_same(self, cells, states, retry_failed):
        """Raises UserError where a cell was begun with another configuration: its results would be taken for those of this one.
        states: {name: state, or None} of the cells."""
        wrong = []
        for cell in cells:
            state = states[cell.name]
            untouched = (
                state is None
                or state["attempts"] == 0
                or (state["state"] == "failed" and retry_failed)
            )
            if untouched:
                continue
            changed = differences(cell.config, state["config"], ("model", "data", "training"))
            if state["url"] != cell.url:
                changed = f"its run {state['url']} -> {cell.url}"
            if changed:
                wrong.append(
                    f"{join(self.url, cell.name)} was begun with another configuration ({changed}): set another logging.output_dir "
                    "(and --ledger), or restore the old values to go on"
                )
        if wrong:
            raise UserError("\nerror: ".join(wrong))

    def table(self, names, silent=()):
        """(lines of text, whether every cell is finished)"""
        rows = [
            (
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
        ]
        kinds = set()
        for name in names:
            state, _ = self.read(name)
            if state is None:
                rows.append((name, "waiting", "0", "-", "-", "-", "-", "", ""))
                continue
            on_slices = [attempt for attempt in state.get("history", []) if attempt["slice"]]
            kinds |= {attempt["accelerator_type"] for attempt in on_slices}
            found, note = results(state["url"]), state["error"] or ""
            if state["state"] == "running":
                owner = state["owner"]
                note = f"process {owner['pid']} on {owner['host']}"
                note += ", no heartbeat" if name in silent else ""
            finished = is_finished(state)
            rows.append(
                (
                    name,
                    "waiting" if state["state"] == "finished" and not finished else state["state"],
                    str(state["attempts"]),
                    "-" if found["steps"] is None else f"{found['steps']:,}",
                    *(
                        f"{found[key]:.2%}" if finished and found[key] is not None else "-"
                        for key in ("ema", "raw")
                    ),
                    "-"
                    if found["train_seconds"] is None
                    else f"{found['train_seconds'] / 3600:.2f}",
                    ran_on(on_slices),
                    note,
                )
            )
        if not kinds:
            rows[0] = (*rows[0][:-2], "", "")  # all on this host
        widths = [max(map(len, column)) for column in zip(*rows)]
        align = [str.ljust, str.ljust, *[str.rjust] * 5, str.ljust, str.ljust]
        lines = [
            "  ".join(side(text, width) for side, text, width in zip(align, row, widths)).rstrip()
            for row in rows
        ]
        if len(kinds) > 1:
            lines.append(
                f"hours on slices of different types ({', '.join(sorted(kinds))}) do not compare"
            )
        return "\n".join(lines), all(row[1] == "finished" for row in rows[1:])


def ran_on(attempts):
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


def _content(state):
    return (json.dumps(state, indent=1) + "\n").encode()


def is_finished(state):
    """Whether the ledger says so and the run's evaluation is there."""
    return state["state"] == "finished" and results(state["url"])["raw"] is not None


def after(state, status, max_attempts):
    """What changes in a cell's state once its training has ended with an exit status."""
    if status == 0 or status in RESUMABLE:
        return {"state": "waiting" if status else "finished"}
    failures = state["failures"] + 1
    # 2: the user's mistake, which another attempt would meet again
    return {
        "state": "failed" if status == 2 or failures >= max_attempts else "waiting",
        "failures": failures,
    }


def results(url):
    """{steps, train_seconds, ema, raw} of a run, exact accuracies of its eval.json; what is not there yet is None."""
    found, folder = dict.fromkeys(("steps", "train_seconds", "ema", "raw")), open_folder(url)
    with contextlib.suppress(FileNotFoundError):
        for record in read_records(folder.read("metrics.jsonl"), join(url, "metrics.jsonl"))[-1:]:
            found |= {"steps": record["step"], "train_seconds": record["train_seconds"]}
    with contextlib.suppress(FileNotFoundError):
        found |= {
            result["weights"]: result["exact_accuracy"]
            for result in json.loads(folder.read("eval.json"))["results"]
        }
    return found
