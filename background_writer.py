"""One thread that brings checkpoints and records to a run's folder while training goes on."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from storage import StorageError
from utils import warn


class BackgroundWriter:
    """Runs jobs in one thread, in the order in which they were submitted.

    A job is a callable without arguments. If it raises StorageError, it is called again every
    `retry_seconds`, and the jobs after it wait. Any other exception drops all jobs and is raised by
    the next `submit` or `finish`.

    The thread is a daemon, so a process that ends without `finish` drops the jobs that are left.
    That is safe, because the methods of a storage folder write a file completely or not at all.
    """

    def __init__(self, retry_seconds: float = 30.0):
        self.retry_seconds = retry_seconds
        self.changed = threading.Condition()
        self.jobs: deque[Callable[[], None]] = deque()  # the first one is running, or waits
        self.storage_error: StorageError | None = None  # why the first job waits for its retry
        self.error: BaseException | None = None  # to be raised in the caller's thread
        self.retry_now = False
        self.submit_deadline: float | None = None  # time.monotonic()

    def submit(self, job: Callable[[], None]) -> None:
        """Append a job that needs the jobs before it. Raises what an earlier job raised."""
        with self.changed:
            self._raise_error()
            self.jobs.append(job)
            self._start_if_first()

    def submit_newest(self, job: Callable[[], None]) -> list[Callable[[], None]]:
        """Wait until the earlier jobs have ended, then append this one.

        If the first of the earlier jobs has failed and waits for its retry, this method does not
        wait. The new job replaces all of them, and they are returned. Raises what an earlier job
        raised, and StorageError if an earlier job is still running at the deadline of `hurry`. Then
        `job` is not appended.
        """
        with self.changed:
            while self.jobs and self.storage_error is None and self.error is None:
                left = (
                    None
                    if self.submit_deadline is None
                    else self.submit_deadline - time.monotonic()
                )
                if left is not None and left <= 0:
                    raise StorageError("the save before is still under way")
                self.changed.wait(left)
            self._raise_error()
            dropped = list(self.jobs)
            if dropped:
                warn("a newer save takes the place of the one that failed")
            self.jobs.clear()
            self.jobs.append(job)
            if dropped:  # the thread is there, and waits for the retry
                self.storage_error, self.retry_now = None, True
                self.changed.notify_all()
            else:
                self._start_if_first()
            return dropped

    def hurry(self, seconds: float) -> None:
        """Set a deadline `seconds` from now for every call of `submit_newest`, and for one that is
        already waiting."""
        with self.changed:
            self.submit_deadline = time.monotonic() + seconds
            self.changed.notify_all()

    def finish(self, timeout: float | None = None) -> None:
        """Wait until no job is left. A job that waits for its retry is called once more, at once.

        Raises StorageError if the retry fails, or if a job is still running after `timeout` seconds
        (it is not stopped). Raises any other exception that a job raised.
        """
        with self.changed:
            if self.storage_error is not None:
                self.storage_error, self.retry_now = None, True
                self.changed.notify_all()
            ended = self.changed.wait_for(
                lambda: not self.jobs or self.storage_error is not None, timeout
            )
            self._raise_error()
            if not ended:
                raise StorageError(f"the last save is still under way after {timeout:g} s")
            if self.storage_error is not None:
                raise self.storage_error

    def _raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _start_if_first(self) -> None:
        if len(self.jobs) == 1:
            threading.Thread(target=self._work, name="writer", daemon=True).start()

    def _work(self) -> None:
        failed = None  # the job whose failure has been printed as a warning
        while True:
            with self.changed:
                if not self.jobs:
                    return
                job = self.jobs[0]
            error: BaseException | None = None
            try:
                job()
            except BaseException as raised:  # raised again in the caller's thread
                error = raised
            with self.changed:
                if isinstance(error, StorageError):
                    if failed is not job:
                        warn(
                            f"{error}; training goes on, and the save is tried again every "
                            f"{self.retry_seconds:g} s"
                        )
                    failed, self.storage_error = job, error
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.retry_now, self.retry_seconds)
                    self.storage_error, self.retry_now = None, False
                    continue
                if failed is job and error is None:
                    print("the save that had failed has succeeded", file=sys.stderr)
                if error is None:
                    self.jobs.popleft()
                else:
                    self.jobs.clear()
                    self.error = error
                self.changed.notify_all()
                if not self.jobs:
                    return
