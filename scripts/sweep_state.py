"""How the cells of a sweep stand. A cell is one run, and the folder of the run tells its state:

    finished   eval.json is the evaluation of the run's last step
    running    a launcher holds the cell, or a training holds the run, by a file run.lock
    failed     neither of these, and the last attempt at the cell was given up
    waiting    none of these

config.yaml in the same folder is the configuration that the cell was begun with, and metrics.jsonl
tells its step. What no run folder can tell is in <sweep>/<cell>/attempts.json, a JSON list with one
entry for each attempt: when, on which host and slice, its exit status and error, and whether the
cell was given up after it.

Several launchers may work on one sweep. Before it starts a cell, a launcher takes the lock
<sweep>/<cell>/run.lock (run_lock.py), and then reads the state again: what another launcher has
finished in the meantime is not repeated. The run's own lock would come too late: on a slice a run
takes it only once the slice is there, which may take hours.

The lock of a launcher that has died is taken over. Its training may live on, and then it holds the
run's own lock: the new launcher waits until that is released, and reads the state again.

A launcher that was suspended, so that another has taken its cell over, ends its training. It cannot
overwrite what the new owner wrote: attempts.json is replaced only in the version that was read.
"""

import contextlib
import dataclasses
import json
import time
from typing import Any

import tpu_settings
import yaml

import run_lock
from config import Config, differences
from metrics_logger import read_records
from run_lock import RunLock
from storage import join, open_folder
from utils import RunFailure, UserError

ATTEMPTS = "attempts.json"
RESUMABLE = (143, 130)  # preempted, interrupted: there is a checkpoint to go on from
BEAT_SECONDS = 10.0  # between two renewals of a lock; train_tpu.py renews that of a run as often
DEADLINE_SECONDS = 10.0  # for one operation on a folder: renewing a lock must not hang for long

Attempts = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run folder tells. steps, train_seconds: of the last record, or None. exact: the exact
    accuracy in eval.json, {"ema": ..., "raw": ...}. config: the content of config.yaml, or None.
    finished: whether the run is at its end."""

    steps: int | None = None
    train_seconds: float | None = None
    exact: dict[str, float] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] | None = None
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class Standing:
    """The state of a cell. holder: (URL of the lock, owner as run_lock.py writes it) of a running
    one."""

    state: str
    attempts: Attempts
    progress: Progress
    holder: tuple[str, dict[str, Any]] | None = None


class SweepFolder:
    """The folder `url` of a sweep, local or gs://, and the run folders of its cells. Methods raise
    what storage.py raises."""

    def __init__(self, url: str):
        self.url = url
        self.folders: dict[str, Any] = {}  # {url: folder}: one of gs:// has a client of its own
        # {url: (version of its lock, when this version was first seen)} of locks that somebody else
        # holds
        self.held: dict[str, tuple[str, float]] = {}
        self.folder = self._folder(url)

    def _folder(self, url):
        if url not in self.folders:
            self.folders[url] = open_folder(url, deadline=DEADLINE_SECONDS)
        return self.folders[url]

    def cell_url(self, name: str) -> str:
        """The folder of the cell's lock, attempts and log."""
        return join(self.url, name)

    # ----- attempts -----
    def names(self) -> list[str]:
        """The cells of the sweep."""
        end = f"/{ATTEMPTS}"
        return [name.removesuffix(end) for name in self.folder.list() if name.endswith(end)]

    def attempts(self, name: str) -> tuple[Attempts, str | None]:
        """(attempts at the cell, version of the file); ([], None) of a cell that the sweep does not
        know."""
        try:
            data, version = self.folder.read_version(f"{name}/{ATTEMPTS}")
        except FileNotFoundError:
            return [], None
        return json.loads(data), version

    def enter(self, name: str) -> None:
        """Note that the cell belongs to the sweep."""
        self.folder.replace_if(f"{name}/{ATTEMPTS}", b"[]\n", None)  # not where it is known

    def write(self, name: str, attempts: Attempts, version: str | None) -> str:
        """Returns the new version. Raises RunFailure where the file is no longer that of
        `version`."""
        data = (json.dumps(attempts, indent=1) + "\n").encode()
        written = self.folder.replace_if(f"{name}/{ATTEMPTS}", data, version)
        if written is None:
            raise RunFailure(f"{self.url}: another launcher has taken over {name}")
        return written

    # ----- locks -----
    def lock(self, url: str) -> RunLock | None:
        """The RunLock of the folder `url`, or None where somebody else holds it."""
        # While its owner is seen to renew it, a look at the file is enough: RunLock takes seconds
        # to judge, and prints a message.
        folder, version, now = self._folder(url), self._lock_version(url), time.monotonic()
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
                # It was released just now, or the folder cannot be used: then this raises again,
                # and tells why.
                return RunLock(folder, beat_seconds=BEAT_SECONDS)
            self.held[url] = version, time.monotonic()
            return None

    def _lock_version(self, url):
        try:
            return self._folder(url).read_version(run_lock.NAME)[1]
        except FileNotFoundError:
            return None

    def silent(self, urls: list[str]) -> set[str]:
        """Those of the folders `urls` whose lock nobody renews. Takes WATCHED_BEATS beats, less if
        all are renewed before."""
        first = {url: self._lock_version(url) for url in urls}
        waiting = {url for url in urls if first[url]}
        give_up = time.monotonic() + run_lock.WATCHED_BEATS * BEAT_SECONDS
        while waiting and time.monotonic() < give_up:
            time.sleep(BEAT_SECONDS / 10)
            waiting = {url for url in waiting if self._lock_version(url) == first[url]}
        return waiting | {url for url in urls if not first[url]}

    # ----- states -----
    def progress(self, url: str) -> Progress:
        """What the run folder `url` tells."""
        folder, found = self._folder(url), {}
        for name in ("config.yaml", "metrics.jsonl", "eval.json"):
            with contextlib.suppress(FileNotFoundError):
                found[name] = folder.read(name)
        records = found.get("metrics.jsonl", b"")
        last = (read_records(records, join(url, "metrics.jsonl")) or [{}])[-1]
        # written by PyYAML, so that YAML's own rules read it
        config = yaml.safe_load(found["config.yaml"]) if "config.yaml" in found else None
        exact, finished = {}, False
        if evaluation := found.get("eval.json"):
            results = json.loads(evaluation)["results"]
            exact = {result["weights"]: result["exact_accuracy"] for result in results}
            epochs = config["training"]["epochs"] if config else float("inf")
            finished = tpu_settings.is_finished(epochs, evaluation, records)
        return Progress(last.get("step"), last.get("train_seconds"), exact, config, finished)

    def standing(self, name: str, url: str) -> Standing:
        """How the cell `name` stands, whose run is in the folder `url`."""
        attempts, _ = self.attempts(name)
        progress = self.progress(url)
        if progress.finished:
            return Standing("finished", attempts, progress)
        for place in (self.cell_url(name), url):
            with contextlib.suppress(FileNotFoundError):
                owner = _owner(self._folder(place).read(run_lock.NAME))
                return Standing("running", attempts, progress, (place, owner))
        return Standing("failed" if is_given_up(attempts) else "waiting", attempts, progress)


def _owner(lock: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(owner := json.loads(lock), dict):
            return owner
    return {}  # damaged


def is_given_up(attempts: Attempts) -> bool:
    """Whether nothing is tried any more after the last of these attempts."""
    return bool(attempts and attempts[-1]["given_up"])


def failures(attempts: Attempts) -> int:
    """How many of the attempts have failed since the cell was last given up."""
    ended = [
        attempt["exit_status"]
        for k, attempt in enumerate(attempts)
        if not any(later["given_up"] for later in attempts[k:])
    ]
    return sum(status not in (None, 0, *RESUMABLE) for status in ended)


def changes(config: Config, progress: Progress) -> str:
    """What differs between a configuration and the one that a run was begun with, as one text; ""
    if nothing does."""
    if progress.config is None:
        return ""
    saved = {name: progress.config[name] for name in ("model", "data", "training")}
    if (
        config.model.forward_dtype == "auto"
    ):  # what it became is up to the machine that the run began on
        saved["model"] = {**saved["model"], "forward_dtype": "auto"}
    return differences(config, saved, tuple(saved))
