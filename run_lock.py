"""One training at a time writes to a run's folder: a lock in it, which its owner renews, and which no dead owner keeps.

Clocks of two hosts are never compared: an owner that cannot be looked at from here is watched, by this host's monotonic
clock, for whether it renews the lock. What is held is one version of the lock: whoever replaces it has taken it.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from storage import digest, join
from utils import RunFailure, UserError

NAME = "run.lock"
GRACE_SECONDS = (
    5.0  # for an owner on this host to end: workers end a moment after a parent that was killed
)
WATCHED_BEATS = 3  # an owner elsewhere that renews nothing for so long is dead


class RunLock:
    """The right to write to `folder`, one of storage.py, from here to release(). A thread renews it.

    folder: its deadline bounds how long a renewal, check(verify=True) or release may hang: about `beat_seconds` is a good one.
    take_over: take the lock at once from whoever holds it when this looks first.
    beat_seconds: between two renewals; to be the same in all that may open the folder.
    Raises UserError where another training holds it, and what the folder's methods raise. An owner that has died, on this
    host or before its reboot, costs no time, one that is alive here GRACE_SECONDS, any other WATCHED_BEATS * beat_seconds.
    """

    def __init__(self, folder, take_over=False, beat_seconds=10.0):
        self.folder, self.url, self.beat_seconds = folder, join(folder.url, NAME), beat_seconds
        self.owner = {
            "token": secrets.token_hex(16),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            **_this_process(),
        }
        self.beats, self.failure, self.ended, self.released = 0, None, threading.Event(), False
        self.version = self._acquire(take_over)
        self.thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.thread.start()

    def check(self, verify=False):
        """Raises RunFailure once the lock is lost: this process may no longer write to the folder.

        It costs nothing, and knows what the last renewal found. verify: ask the folder itself, which may raise what its
        read_version raises: a StorageError is no loss of the lock, but no right to write either.
        """
        if verify and self.failure is None:
            self._still_ours()
        if self.failure is not None:
            raise self.failure

    def stop(self):
        """Renew no more; for a release() that follows within WATCHED_BEATS, and then need not wait for a renewal under way."""
        self.ended.set()

    def release(self):
        """Stop renewing, and delete the lock if it is still this one. Where the folder cannot be reached, that costs up to
        three of its deadlines and a warning: what stays there is a dead owner's lock once this process has ended."""
        self.stop()
        self.thread.join()  # a renewal between the look and the deletion would keep the lock
        if self.released:
            return
        self.released = True
        try:
            owner, version = self._read()
            if owner["token"] == self.owner["token"]:
                self.folder.delete(NAME, version)
        except (OSError, UserError) as error:
            print(
                f"warning: {self.url} could not be released ({error}); the run can be taken up again when this process has ended",
                file=sys.stderr,
            )

    def _acquire(self, take_over):
        seen, watch = None, WATCHED_BEATS * self.beat_seconds
        while True:
            owner, version = self._read()
            alive = self._alive(owner)
            if seen is None or owner["token"] != seen["token"]:
                # somebody else than a moment ago, to be judged anew: not to be taken over if it was faster in that
                forced = take_over and seen is None and version is not None
                seen, seen_version, began = owner, version, time.monotonic()
                if alive is None and not forced:
                    print(
                        f"{self.url}: held by {_who(owner)}: watching for {watch:g} s whether it is alive",
                        file=sys.stderr,
                    )
            waited = time.monotonic() - began
            if alive is None:
                alive = True if version != seen_version else None if waited < watch else False
            elif alive and waited < GRACE_SECONDS:
                alive = None  # it may be about to end
            if alive is False or forced:
                taken = self.folder.replace_if(NAME, self._content(), version)
                if taken is not None and forced:
                    print(f"{self.url}: taken over from {_who(owner)}", file=sys.stderr)
                if taken is not None:
                    return taken  # otherwise somebody was faster: look again
            elif alive:
                raise UserError(
                    f"{self.folder.url}: another training, {_who(owner)}, holds this run ({NAME}), and one at a time may write to it: "
                    "wait until it has ended, give another --run_name, or take the run from it by --take_over"
                )
            else:
                time.sleep(min(self.beat_seconds / 4, 0.5))

    def _read(self):
        """(owner, version); the owner's token is "" of a damaged lock, and None, as the version, where there is no lock."""
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

    def _alive(self, owner):
        """Whether the owner runs; None: this process cannot tell."""
        mine = self.owner
        if not owner["token"]:
            return None if owner["token"] == "" else False
        if owner["host"] != mine["host"] or None in (owner["boot"], mine["boot"]):
            return None
        if (
            owner["boot"] != mine["boot"]
        ):  # a reboot, unless another machine has that name: "localhost" is a frequent one
            return False if owner["machine"] == mine["machine"] is not None else None
        if (
            owner["namespace"] != mine["namespace"]
        ):  # a container of this host: its pids mean nothing here
            return None
        started = _started(owner["pid"])
        if started is not None:
            return started == owner["start"]
        try:
            os.kill(owner["pid"], 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return None  # hidden: it may be another process with that pid

    def _content(self):
        self.beats += 1  # every renewal is to be seen
        return json.dumps({**self.owner, "beat": self.beats}).encode()

    def _still_ours(self):
        """The lock's version if it is still this one; otherwise it is lost, for good."""
        owner, version = self._read()
        if owner["token"] == self.owner["token"]:
            return version
        how = "deleted" if version is None else f"taken over by {_who(owner)}"
        self.failure = RunFailure(
            f"{self.url} was {how}: this training no longer holds the run, and writes nothing more to it"
        )

    def _beat(self):
        told = False
        while self.failure is None and not self.ended.wait(self.beat_seconds):
            try:
                # None alone is no loss: a renewal whose answer was lost has made our version an old one
                self.version = (
                    self.folder.replace_if(NAME, self._content(), self.version)
                    or self._still_ours()
                )
                told = False
            except (OSError, UserError) as error:
                if not told:
                    print(
                        f"warning: {self.url} could not be renewed ({error}); tried again every {self.beat_seconds:g} s",
                        file=sys.stderr,
                    )
                told = True
            except Exception as error:  # raised by check
                self.failure = error


def _this_process():
    """What tells this process from all others. boot is None where pids could not be judged (no /proc)."""
    boot, started, machine = (
        _text("/proc/sys/kernel/random/boot_id"),
        _started(os.getpid()),
        _text("/etc/machine-id"),
    )
    namespace = os.readlink("/proc/self/ns/pid") if started else None
    return {
        "host": socket.gethostname(),
        "machine": machine
        and digest(machine.encode())[:16],  # the id itself is not for others' eyes
        "boot": started and boot,
        "namespace": namespace,
        "pid": os.getpid(),
        "start": started,
    }


def _started(pid):
    """When a process began, in ticks since the boot; 0 of one that has ended and was not waited for; None: not to be seen."""
    if text := _text(f"/proc/{pid}/stat"):
        fields = text.rpartition(")")[
            2
        ].split()  # before it the command, in which anything may stand
        return 0 if fields[0] in "ZX" else int(fields[19])


def _text(path):
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None  # not Linux, or hidden: such an owner is watched


def _who(owner):
    return (
        "process {pid} on {host} since {since}".format(**owner)
        if owner["token"]
        else "one that its damaged file does not name"
    )
