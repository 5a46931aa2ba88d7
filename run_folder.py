"""The folder of a run, local or gs://. Only rank 0 of one training writes to it.

A gs:// run also has a local working folder, from which its files are uploaded.
"""

import contextlib
import errno
import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import storage
from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager, load_checkpoint
from collectives import Workers
from config import Config, config_yaml
from metrics_logger import MetricsLogger, SilentLogger
from run_lock import RunLock
from utils import RunFailure, UserError, replace_file, warn

METRICS_FILE, STARTS_FILE, EVAL_FILE = "metrics.jsonl", "starts.jsonl", "eval.json"
# The longest that one attempt at a storage operation may take. The next save waits for it, and so
# does the answer to SIGTERM.
SAVE_SECONDS = 20.0
# The same for the lock. It is shorter, because a preempted process has to release the lock.
LOCK_SECONDS = 5.0
# A preempted VM is gone after about 30 s. HURRY_SECONDS: how long after SIGTERM the last save waits
# for one that is still running. LEAVE_SECONDS: how long the last save itself may take.
HURRY_SECONDS, LEAVE_SECONDS = 8.0, 10.0
# How long the end of a training retries if the storage does not accept the last files.
FINISH_SECONDS = 600.0


def run_url(config: Config, run_name: str) -> str:
    """logging.output_dir/run_name, a local path or gs://."""
    return storage.join(config.logging.output_dir, run_name)


def working_folder(url: str) -> Path:
    """The local folder of a run: its own, or for a gs:// run one in $TRM_CACHE (~/.cache/trm)."""
    if not storage.is_remote(url):
        return Path(url)
    return storage.cache_folder() / "runs" / storage.digest(url.encode())[:16]


def open_checkpoints(config: Config, run_name: str) -> CheckpointManager:
    """The checkpoints of a run, to look at and to load."""
    url = run_url(config, run_name)
    folder = storage.open_folder(storage.join(url, "checkpoints"))
    return CheckpointManager(
        folder, config.checkpoint.keep_last_n, working_folder(url) / "checkpoints"
    )


@contextlib.contextmanager
def writing_to(config: Config) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names logging.output_dir.

    A full disk and a StorageError pass through. utils.run_cli reports them.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, storage.StorageError):
            raise
        raise UserError(
            f"logging.output_dir = {config.logging.output_dir!r}: no run can be written there "
            f"({error.strerror}: {error.filename}): name another folder"
        ) from None


def on_rank_0(method: Callable) -> Callable:
    """Decorator: run a method on rank 0 only. On the other workers it returns None."""

    @functools.wraps(method)
    def on_this_worker(self, *args):
        return method(self, *args) if self.workers.rank == 0 else None

    return on_this_worker


class RunFolder:
    """The folder of a run in training, the same object on every worker.

    Rank 0 holds the run's lock, reads and writes. On the other workers the same methods only take
    part in the collectives. All workers call them in the same order. The records of a gs:// run are
    uploaded before the marker of each checkpoint, and at the end.

    The constructor raises UserError if another process trains this run (unless take_over) or if
    the folder cannot be written. `with` raises it if a host does not see the folder.
    """

    def __init__(self, config: Config, run_name: str, workers: Workers, take_over: bool = False):
        self.config, self.workers = config, workers
        self.url = run_url(config, run_name)
        self.path = working_folder(self.url)  # for records, TensorBoard, eval.json
        self.logger: MetricsLogger | SilentLogger = SilentLogger()
        self.saved_at = time.monotonic()
        self.newest: str | None = None  # URL of the checkpoint that was submitted last
        self.save_error: Exception | None = None  # why it will not be saved
        self.leave_result: bool | None = None  # what leave() has returned
        self.leave_lock = threading.Lock()
        with workers.together():
            self._open(take_over)

    @on_rank_0
    def _open(self, take_over: bool) -> None:
        with writing_to(self.config):
            self.lock = RunLock(storage.open_folder(self.url, deadline=LOCK_SECONDS), take_over)
        self.home = storage.open_folder(self.url, SAVE_SECONDS)
        self.uploaded: dict[str, tuple[int, int]] = {}
        self.writer = BackgroundWriter()
        self.checkpoints = CheckpointManager(
            storage.open_folder(storage.join(self.url, "checkpoints"), SAVE_SECONDS),
            self.config.checkpoint.keep_last_n,
            self.path / "checkpoints",
            self.writer,
            self._verify_lock,
            self._upload_records,
        )

    def __enter__(self) -> "RunFolder":
        try:
            with self.workers.together():
                self._check_seen_by_all()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.leave()

    def _check_seen_by_all(self) -> None:
        """Raises UserError if this host does not see the folder that rank 0 has made.

        After a restart another host may be rank 0. Without the folder it would begin the run anew.
        """
        if not storage.is_remote(self.url) and not Path(self.url).is_dir():
            raise UserError(
                f"logging.output_dir: {self.url} is a folder of one host, and the run has several: "
                "give a gs:// path or a folder that all hosts share"
            )

    # ----- what an earlier start has left -----
    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None."""
        data = None
        with self.workers.together():
            if self.workers.rank == 0:
                data = self.checkpoints.load_latest()
        data = self.workers.broadcast_bytes(data)
        return None if data is None else load_checkpoint(data)

    def is_evaluated(self, step: int) -> bool:
        """Whether the checkpoint of `step` has its evaluation."""
        noted = self.workers.rank == 0 and self.checkpoints.metrics(step) is not None
        return self.workers.any(noted)

    @on_rank_0
    def say_done(self, step: int, total_steps: int) -> None:
        """For a training that has nothing left to do."""
        newest = self.checkpoints.newest_text()
        print(f"{self.url} has done step {step} of {total_steps} already: {newest}")

    def begin(
        self, config: Config, start: dict[str, Any], last_step: int, evaluated: bool
    ) -> MetricsLogger | SilentLogger:
        """Prepare the folder for this start, and note it. Returns the logger of this worker.

        config: with the forward_dtype that is used. start: provenance.start_record. evaluated:
        whether the checkpoint that the run goes on from has its evaluation.
        """
        with self.workers.together():
            self._prepare(config, start, last_step, evaluated)
        return self.logger

    @on_rank_0
    def _prepare(
        self, config: Config, start: dict[str, Any], last_step: int, evaluated: bool
    ) -> None:
        if storage.is_remote(self.url):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            for name in (METRICS_FILE, STARTS_FILE):
                if name in self.home.list(name):
                    self.home.get(name, self.path / name)
        for leftover in (self.path / "checkpoints").glob(".*.tmp"):  # of a start that was killed
            leftover.unlink()
        replace_file(self.path / "config.yaml", config_yaml(config))
        path = self.path / STARTS_FILE
        earlier = path.read_text() if path.exists() else ""
        replace_file(path, earlier + json.dumps(start) + "\n")
        self.logger = MetricsLogger(
            self.path, start["step"], evaluated, last_step, config.logging.tensorboard
        )

    # ----- while the training goes on -----
    def save_due(self) -> bool:
        """Whether checkpoint.interval_minutes have passed since the last save. False off rank 0."""
        minutes = self.config.checkpoint.interval_minutes
        waited = time.monotonic() - self.saved_at
        return self.workers.rank == 0 and minutes is not None and waited > 60 * minutes

    def check(self, totals: dict[str, float]) -> None:
        """End the training if a number is not finite, or if another process has taken over the run.

        Raises UserError on rank 0 and ends the other workers. totals: of TrainState.wait(), the
        same on every worker.
        """
        if totals["first_not_finite"]:
            self._stop_not_finite(int(totals["first_not_finite"]))
        self._check_lock()

    @on_rank_0
    def _check_lock(self) -> None:
        self.lock.check()

    def save(self, step: int, state: dict[str, Any] | None) -> None:
        """Save a checkpoint in the background, after the records up to it.

        state: of TrainState.state_dict(). After `hurry` the save may fail; `leave` returns whether
        it did. Raises UserError if the checkpoint cannot be written.
        """
        self.logger.flush()
        self._save(step, state)
        self.saved_at = time.monotonic()

    @on_rank_0
    def _save(self, step: int, state: dict[str, Any]) -> None:
        self.newest = self.checkpoints.url(step)
        try:
            self.checkpoints.save(step, state)
        except storage.StorageError as error:
            self.save_error = error
        except UserError:
            # A new owner of the run deletes half-written files: then the disk is not what failed.
            with contextlib.suppress(storage.StorageError):
                self._verify_lock()
            raise

    @on_rank_0
    def add_evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Note an evaluation in the marker of its checkpoint, in the background."""
        self.logger.flush()
        self.checkpoints.add_metrics(step, metrics)

    def _stop_not_finite(self, step: int) -> NoReturn:
        """Ends all workers: the loss or a gradient of `step` is not finite."""
        newest = ""
        if self.workers.rank == 0:
            # the error to report is the loss, and not the storage
            with contextlib.suppress(storage.StorageError):
                self.writer.finish()
            newest = self.checkpoints.newest_text()
        self.workers.end_together(
            UserError(
                f"step {step}: the loss or a gradient is not finite; {newest}. Lower training.lr, "
                "set training.grad_clip_norm, or use model.forward_dtype=float32"
            )
        )

    def _verify_lock(self) -> None:
        # reads the lock again, so that nothing overwrites the files of a new owner
        self.lock.check(verify=True)

    def _upload_records(self) -> None:
        """Upload the files of a gs:// run that have changed, except checkpoints.

        CheckpointManager uploads those.
        """
        self._verify_lock()
        if not storage.is_remote(self.url):
            return
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not name.startswith("checkpoints/") and path.suffix != ".tmp":
                version = path.stat().st_mtime_ns, path.stat().st_size
                if self.uploaded.get(name) != version:
                    self.home.put(path, name)
                    self.uploaded[name] = version
        self._verify_lock()

    # ----- the end -----
    @on_rank_0
    def hurry(self) -> None:
        """Call it after SIGTERM: `save` then waits at most HURRY_SECONDS for an earlier save."""
        self.writer.hurry(HURRY_SECONDS)
        self.lock.stop()

    @on_rank_0
    def close(self) -> None:
        """Wait until the last checkpoint and all records are in the folder, and give the lock back.

        Raises StorageError if the storage does not take them within FINISH_SECONDS.
        """
        give_up = time.monotonic() + FINISH_SECONDS
        while True:
            try:
                self.writer.finish()
                self._upload_records()
                break
            except storage.StorageError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(1)
        self.lock.release()

    def leave(self) -> bool:
        """Like `close`, but take at most LEAVE_SECONDS. Returns whether everything is saved.

        If the last save is not complete by then, a warning is printed. Any thread may call this,
        and a second call returns the same.
        """
        return self.workers.rank != 0 or self._leave()

    def _leave(self) -> bool:
        with self.leave_lock:
            if self.leave_result is None:
                error = self.save_error
                if error is None and self.lock.failure is None:
                    try:
                        self.writer.finish(LEAVE_SECONDS)
                    except (RunFailure, UserError) as failure:
                        error = failure
                if error is not None:
                    warn(
                        f"{self.newest} (or its evaluation) is not saved: {error}; the run will go "
                        "on from the checkpoint before"
                    )
                self.lock.release()
                self.leave_result = error is None
            return self.leave_result

    @on_rank_0
    def say_end(self, step: int, total_steps: int, how: str, saved: bool = True) -> None:
        """The last line of a training. saved: whether the last checkpoint is in the folder."""
        text = f"step {step} of {total_steps}: {how}"
        if saved:
            newest = self.newest_text()
            text += f"; {newest}; records: {storage.join(self.url, METRICS_FILE)}"
        if step < total_steps:
            text += "; the same command goes on from the last checkpoint"
        self.logger.say(text)

    def newest_text(self) -> str:
        """For messages on rank 0: the last checkpoint, once all saves have succeeded."""
        if self.newest:
            return f"the last good checkpoint is {self.newest}"
        return self.checkpoints.newest_text()
