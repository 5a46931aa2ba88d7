"""Where a run lives: one folder, local or gs://, written by one process, with a local folder to work in."""
import contextlib
import shutil
import sys
import threading
import time
from pathlib import Path

import storage
import utils
from checkpoint_manager import CheckpointManager
from run_lock import RunLock

METRICS_FILE = "metrics.jsonl"
SAVE_SECONDS = 20.0             # for one attempt at an operation: the next save waits for it, and so does SIGTERM
# a preempted VM is gone after about 30 s: after SIGTERM so long for a save under way, and so long for the last one
HURRY_SECONDS, LEAVE_SECONDS = 8.0, 10.0


def run_url(config, run_name):
    """logging.output_dir/run_name, a local path or gs://."""
    return storage.join(config.logging.output_dir, run_name)


def working_folder(url):
    """The local folder of a run: the run's own, or one in $TRM_CACHE (default ~/.cache/trm) for a gs:// one."""
    return Path(storage.cache_folder() / "runs" / storage.digest(url.encode())[:16] if storage.is_remote(url) else url)


def open_checkpoints(config, run_name):
    """The checkpoints of a run, to look at and load from."""
    url = run_url(config, run_name)
    return CheckpointManager(storage.open_folder(storage.join(url, "checkpoints")), config.checkpoint.keep_last_n, working_folder(url) / "checkpoints")


def check_seen_by_all(url):
    """Raises UserError on a host that does not see the folder that rank 0 has just opened: after a restart another host may be
    the one with rank 0, and would begin anew."""
    if not storage.is_remote(url) and not Path(url).is_dir():
        raise utils.UserError(f"logging.output_dir: {url} is a folder of one host, and the run has several: give a gs:// path or a folder that all hosts share")


class RunFolder:
    """The folder of a run in training; on rank 0 alone.

    path: the local folder for records, TensorBoard, eval.json. With a gs:// run they are uploaded before each
    checkpoint counts and at the end. checkpoints: a CheckpointManager that saves in the background.
    Raises UserError where another process trains this run (unless take_over).
    """

    def __init__(self, config, run_name, take_over=False):
        self.url = run_url(config, run_name)
        self.path = working_folder(self.url)
        self.saver, self.uploaded = storage.BackgroundSaver(), {}
        # a short deadline: at a preemption there is no time for more
        self.lock = RunLock(storage.open_folder(self.url, deadline=5.0), take_over)
        self.home, checkpoints = (storage.open_folder(url, SAVE_SECONDS) for url in (self.url, storage.join(self.url, "checkpoints")))
        self.checkpoints = CheckpointManager(checkpoints, config.checkpoint.keep_last_n, self.path / "checkpoints", self.saver,
                                             self._still_ours, self._before_marker)
        self.newest, self.lost, self.left, self.leaving = None, None, None, threading.Lock()

    def prepare(self):
        """Clear away what a killed predecessor left half-written; bring a gs:// run's records here."""
        if storage.is_remote(self.url):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            if METRICS_FILE in self.home.list(METRICS_FILE):
                self.home.get(METRICS_FILE, self.path / METRICS_FILE)
        for leftover in (self.path / "checkpoints").glob(".*.tmp"):
            leftover.unlink()

    def _still_ours(self):
        self.lock.check(verify=True)        # what somebody who took the run over has written must stay

    def _before_marker(self):
        self._still_ours()
        self.upload()
        self._still_ours()

    def save(self, step, state):
        """Save a checkpoint in the background. After `hurry` one may be lost: `leave` tells."""
        self.newest = self.checkpoints.url(step)
        try:
            self.checkpoints.save(step, state)
        except storage.StorageError as error:
            self.lost = error
        except utils.UserError:
            with contextlib.suppress(storage.StorageError):
                self._still_ours()      # a new owner clears half-written files away: then the disk is not full
            raise

    def newest_text(self):
        """For messages: where the last good checkpoint is, once all saves have succeeded."""
        return f"the last good checkpoint is {self.newest}" if self.newest else self.checkpoints.newest_text()

    def upload(self):
        """Bring the files of a gs:// run that have changed since the last time into the bucket; the checkpoints go by themselves."""
        if not storage.is_remote(self.url):
            return
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not name.startswith("checkpoints/") and path.suffix != ".tmp":
                version = path.stat().st_mtime_ns, path.stat().st_size
                if self.uploaded.get(name) != version:
                    self.home.put(path, name)
                    self.uploaded[name] = version

    def close(self):
        """Wait until the last save is in the folder, and upload the records. Raises StorageError where the storage does not
        take them within ten minutes."""
        give_up = time.monotonic() + 600
        while True:
            try:
                self.saver.finish()
                self._before_marker()
                break
            except storage.StorageError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(1)
        self.lock.release()

    def hurry(self):
        """SIGTERM has come: from now on nothing waits long for a save under way."""
        self.saver.hurry(HURRY_SECONDS)
        self.lock.stop()

    def leave(self):
        """As `close`, within the seconds that a preemption grants: what is not in the folder by then is given up, with a
        warning. Returns whether everything is there. May be called by several threads, and again."""
        with self.leaving:
            if self.left is None:
                error = self.lost
                if error is None and self.lock.failure is None:
                    try:
                        self.saver.finish(LEAVE_SECONDS)
                    except (utils.RunFailure, utils.UserError) as failure:
                        error = failure
                if error is not None:
                    print(f"warning: {self.newest} (or its evaluation) is not saved: {error}; the run will go on from the checkpoint before",
                          file=sys.stderr, flush=True)
                self.lock.release()
                self.left = error is None
            return self.left
