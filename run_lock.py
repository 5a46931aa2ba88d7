"""A lock in the folder of a run, so that one training at a time writes to it.

The lock is a file that its owner renews, that is, writes again every few seconds. The lock of a
dead owner can be taken. If the owner cannot be seen from here, this process watches on its own
monotonic clock whether the lock is renewed; clocks of two hosts are never compared. Taking and
renewing replace exactly the version of the file that was read before, so that of several processes
only one succeeds.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from storage import Folder, digest, join
from utils import RunFailure, UserError, warn

NAME = "run.lock"
# How long to wait for an owner on this host to end: workers end a moment after a parent that was
# killed.
GRACE_SECONDS = 5.0
WATCHED_BEATS = 3  # an owner elsewhere that has not renewed the lock for so many beats is dead

Owner = dict[str, Any]  # content of the lock; its token is "" if damaged, None if there is no lock


class RunLock:
    """The right to write to `folder`, one of storage.py, until release(). A thread renews it.

    folder: open it with a deadline of about `beat_seconds`, since a renewal, check(verify=True) and
    release may take as long as its deadline. take_over: take the lock at once from the owner that
    has it when the constructor begins. beat_seconds: the time between two renewals. It has to be
    the same in all processes that may open the folder.

    Raises UserError if another training holds the lock, and what the folder's methods raise. The
    constructor does not wait if the owner was on this host and has died, also before a reboot. It
    waits GRACE_SECONDS for an owner that is alive on this host, and up to
    WATCHED_BEATS * beat_seconds for any other.
    """

    def __init__(self, folder: Folder, take_over: bool = False, beat_seconds: float = 10.0):
        self.folder, self.url, self.beat_seconds = folder, join(folder.url, NAME), beat_seconds
        self.owner: Owner = {
            "token": secrets.token_hex(16),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            **_this_process(),
        }
        self.beats, self.ended, self.released = 0, threading.Event(), False
        self.failure: Exception | None = None  # why the lock is lost; raised by check
        self.version: str | None = self._acquire(take_over)
        self.thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.thread.start()

    def check(self, verify: bool = False) -> None:
        """Raises RunFailure once the lock is lost: this process may no longer write to the folder.

        It costs nothing, because it only looks at what the last renewal found. verify: read the
        lock from the folder, too, and raise what read_version raises. After a StorageError the lock
        may still be this one's, but do not write.
        """
        if verify and self.failure is None:
            self._still_ours()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Renew the lock no more, and return at once.

        Called some time before release(), it lets a running renewal end meanwhile. Others still
        respect the lock for WATCHED_BEATS.
        """
        self.ended.set()

    def release(self) -> None:
        """Stop renewing, and delete the lock if it is still this one.

        If the folder cannot be reached, this takes up to three of its deadlines and prints a
        warning. The lock then stays there, and counts as that of a dead owner once this process has
        ended.
        """
        self.stop()
        self.thread.join()  # a renewal between _read and delete would leave the lock there
        if self.released:
            return
        self.released = True
        try:
            owner, version = self._read()
            if owner["token"] == self.owner["token"]:
                self.folder.delete(NAME, version)
        except (OSError, UserError) as error:
            warn(
                f"{self.url} could not be released ({error}); the run can be continued when this "
                "process has ended"
            )

    def _acquire(self, take_over: bool) -> str:
        """Wait until the lock is free, and take it; returns its version."""
        seen: Owner | None = None
        seen_version, began, forced = None, 0.0, False
        while True:
            owner, version = self._read()
            alive = self._alive(owner)
            if seen is None or owner["token"] != seen["token"]:
                # The first look, or a new owner that has taken the lock since the last look: watch
                # it from the beginning. take_over is only for the owner of the first look.
                forced = take_over and seen is None and version is not None
                seen, seen_version, began = owner, version, time.monotonic()
                if alive is None and not forced:
                    self._say_watching(owner)
            waited = time.monotonic() - began
            alive = self._alive_after(waited, alive, version != seen_version)
            if alive is False or forced:
                taken = self.folder.replace_if(NAME, self._content(), version)
                if taken is not None:
                    if forced:
                        print(f"{self.url}: taken over from {_who(owner)}", file=sys.stderr)
                    return taken
                # otherwise somebody was faster: look again
            elif alive:
                raise UserError(
                    f"{self.folder.url}: another training, {_who(owner)}, holds this run ({NAME}), "
                    "and one at a time may write to it: wait until it has ended, give another "
                    "--run_name, or take the run from it by --take_over"
                )
            else:
                time.sleep(min(self.beat_seconds / 4, 0.5))

    def _alive_after(self, waited: float, alive: bool | None, renewed: bool) -> bool | None:
        """Whether the owner is alive, after it was watched for `waited` seconds; None: go on
        watching. alive: what `_alive` says now. renewed: whether the lock was renewed meanwhile."""
        if alive is None:
            if renewed:
                return True
            return None if waited < WATCHED_BEATS * self.beat_seconds else False
        if alive and waited < GRACE_SECONDS:
            return None  # it may be about to end
        return alive

    def _say_watching(self, owner: Owner) -> None:
        seconds = WATCHED_BEATS * self.beat_seconds
        print(
            f"{self.url}: held by {_who(owner)}: watching for {seconds:g} s whether it is alive",
            file=sys.stderr,
        )

    def _read(self) -> tuple[Owner, str | None]:
        """(owner, version) of the lock that is there; for its token see Owner."""
        try:
            data, version = self.folder.read_version(NAME)
        except FileNotFoundError:
            return {"token": None}, None
        try:
            owner = json.loads(data)
        except ValueError:
            owner = None
        whole = (
            isinstance(owner, dict)
            and owner.keys() >= self.owner.keys()
            and type(owner["token"]) is str
            and type(owner["pid"]) is int
        )
        return owner if whole else {"token": ""}, version

    def _alive(self, owner: Owner) -> bool | None:
        """Whether the owner runs; None: this process cannot tell."""
        mine = self.owner
        if not owner["token"]:
            return None if owner["token"] == "" else False
        if owner["host"] != mine["host"] or None in (owner["boot"], mine["boot"]):
            return None
        if owner["boot"] != mine["boot"]:
            # a reboot, unless another machine has the same name, such as "localhost"
            return False if owner["machine"] == mine["machine"] is not None else None
        if owner["namespace"] != mine["namespace"]:
            return None  # a container of this host: its process ids mean nothing here
        started = _started(owner["pid"])
        if started is not None:
            return started == owner["start"]
        try:
            os.kill(owner["pid"], 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return None  # hidden: another process may have that process id now

    def _content(self) -> bytes:
        self.beats += 1  # every renewal must be visible
        return json.dumps({**self.owner, "beat": self.beats}).encode()

    def _still_ours(self) -> str | None:
        """The lock's version if it is still this one; otherwise it is lost for good."""
        owner, version = self._read()
        if owner["token"] == self.owner["token"]:
            return version
        how = "deleted" if version is None else f"taken over by {_who(owner)}"
        self.failure = RunFailure(
            f"{self.url} was {how}: this training no longer holds the run, and writes nothing more "
            "to it"
        )
        return None

    def _beat(self) -> None:
        warned = False
        while self.failure is None and not self.ended.wait(self.beat_seconds):
            try:
                # If it returns None, the lock need not be lost: perhaps only the answer to the
                # renewal before was, and self.version is out of date.
                renewed = self.folder.replace_if(NAME, self._content(), self.version)
                self.version = renewed or self._still_ours()
                warned = False
            except (OSError, UserError) as error:
                if not warned:
                    warn(
                        f"{self.url} could not be renewed ({error}); tried again every "
                        f"{self.beat_seconds:g} s"
                    )
                warned = True
            except Exception as error:  # raised by check
                self.failure = error


def _this_process() -> dict[str, Any]:
    """What distinguishes this process from all others. boot is None if this system cannot tell
    which processes run (no /proc)."""
    started, machine = _started(os.getpid()), _text("/etc/machine-id")
    return {
        "host": socket.gethostname(),
        # the id itself is confidential
        "machine": machine and digest(machine.encode())[:16],
        "boot": started and _text("/proc/sys/kernel/random/boot_id"),
        "namespace": os.readlink("/proc/self/ns/pid") if started else None,
        "pid": os.getpid(),
        "start": started,
    }


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot.

    0 if it has ended and nobody has waited for it; None if it cannot be seen.
    """
    text = _text(f"/proc/{pid}/stat")
    if not text:
        return None
    # the command, which may hold anything, stands before the last parenthesis
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def _text(path: str) -> str | None:
    """Content of a small file; None if it cannot be read (not Linux, or hidden) or is empty."""
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None


def _who(owner: Owner) -> str:
    """The owner, for messages."""
    if owner["token"]:
        return "process {pid} on {host} since {since}".format(**owner)
    return "one that its damaged file does not name"
