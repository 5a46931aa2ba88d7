"""The launcher of a sweep: runs the cells that are still to be done, several at once, on this host
or on slices."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import sweep_cells
from sweep_cells import Cell, last_error
from sweep_slices import Slice, delete_if_idle
from sweep_state import RESUMABLE, Attempts, SweepFolder, failures, is_given_up

import storage
from run_lock import RunLock
from storage import join
from utils import RunFailure, UserError

# The scripts begin their message with this where Google does not give a slice and waiting does not
# help.
REFUSED = "Google Cloud: "
LOOK_SECONDS = 10.0  # between two looks at what somebody else holds


class Launcher:
    """Runs cells in as many threads as there are `slots`: None for one on this host, or a Slice.

    flags: for train_tpu.py on this host, for scripts/keep_alive.sh on a slice. max_steps: None, or
    what the flags tell train_tpu.py. retry_failed: try again what was given up before.
    delete_when_done: delete a slice once no cell is left that could run on it. After run():
    `stopped` tells whether a signal has come, `deleted` has the names of the deleted slices, and
    refused is {name of a slice: why Google does not give it}; its cells are run on the others.
    """

    def __init__(
        self,
        cells: list[Cell],
        folder: SweepFolder,
        slots: list[Slice | None],
        max_attempts: int,
        flags: list[str],
        max_steps: int | None = None,
        retry_failed: bool = False,
        delete_when_done: bool = False,
    ):
        self.cells, self.folder, self.slots, self.flags = cells, folder, slots, flags
        self.max_attempts, self.max_steps, self.delete_when_done = (
            max_attempts,
            max_steps,
            delete_when_done,
        )
        # {cell: attempts that it had when this launcher began}: being given up by one of these does
        # not count
        self.forgiven = {
            cell.name: len(folder.attempts(cell.name)[0]) for cell in cells if retry_failed
        }
        self.mutex = threading.Lock()  # of `at_work`
        self.at_work: set[str] = set()  # cells that a thread of this launcher has
        self.done: set[str] = set()  # cells that this launcher does not try any more
        self.refused: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.done_at_look: dict[str, int] = {}  # {slice: len(done) when it was found in use}
        self.stop = threading.Event()
        self.signal: int | None = None
        self.failure: BaseException | None = None

    @property
    def stopped(self) -> bool:
        return self.stop.is_set()

    def run(self) -> int | None:
        """Until every cell is finished or given up, here or by another launcher: None. Or until a
        signal: its number."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._on_signal)
        threads = [threading.Thread(target=self._work, args=(slot,)) for slot in self.slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure
        return self.signal

    def _on_signal(self, number, _):
        if (
            number == signal.SIGHUP
        ):  # there is no terminal any more: writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        self.signal = number
        self.stop.set()

    def _work(self, slot):
        """Run cells in `slot` until none is left for it."""
        try:
            while not self.stopped and not (slot and slot.name in self.refused):
                try:
                    if self._all_done() and not (slot and self.delete_when_done):
                        return
                    if not self._next(slot):
                        if self._all_done():
                            return
                        self.stop.wait(LOOK_SECONDS)
                except RunFailure as error:
                    # the storage is out of reach, or another launcher has taken the cell over
                    say(f"warning: {error}")
                    self.stop.wait(LOOK_SECONDS)
        except BaseException as error:
            self.failure = error
            self.stop.set()

    def _all_done(self):
        return len(self.done) == len(self.cells)

    # ----- choosing -----
    def _next(self, slot):
        """Run one cell in `slot`. Returns False where no cell is free for it."""
        if not slot:
            return self._next_cell(slot)
        lease = self.folder.lock(join(self.folder.url, "slices", slot.name))
        if not lease:
            return False  # another launcher uses it
        try:
            if self._next_cell(slot):
                return True
            if self.delete_when_done and not self.stopped:
                self._delete(slot)
            return False
        finally:
            lease.release()

    def _delete(self, slot):
        """Delete the slice, for which no cell is free: each is done, or runs on another slice and
        stays there. Should one come back to this slice after all, scripts/keep_alive.sh makes it
        again."""
        if slot.name in self.deleted or self.done_at_look.get(slot.name) == len(self.done):
            return  # or it was in use, and nothing has changed since
        self.done_at_look[slot.name] = len(self.done)
        status, output = delete_if_idle(slot.name, self.cells[0].places[slot.name])
        if status == 0:
            self.deleted.add(slot.name)
            how = "it is deleted" if "is deleted" in output else "it is not there"
        else:
            how = last_error(output, status)
        say(f"{slot.name}: no cell is left for it: {how}")

    def _next_cell(self, slot):
        left = [cell for cell in self.cells if cell.name not in self.done]
        attempts = {cell.name: self.folder.attempts(cell.name)[0] for cell in left}

        def order(cell):
            """First what may still run on this slice; last what others run, or what may still run
            on another slice."""
            before = attempts[cell.name]
            elsewhere = bool(before) and (before[-1]["ended"] is None or bool(before[-1]["slice"]))
            return not is_on(before, cell, slot), elsewhere, failures(before)

        for cell in sorted(left, key=order):
            with self.mutex:
                if cell.name in self.at_work | self.done or self.stopped:
                    continue
                self.at_work.add(cell.name)
            try:
                lease = self.folder.lock(self.folder.cell_url(cell.name))
                if lease:
                    try:
                        self._run_cell(cell, slot, lease)
                    finally:
                        lease.release()
                    return True
            finally:
                self.at_work.discard(cell.name)
        return False

    # ----- one cell -----
    def _run_cell(self, cell, slot, lease):
        attempts, version = self.folder.attempts(cell.name)
        if self._is_over(cell, attempts):
            self.done.add(cell.name)
            return
        if not is_on(attempts, cell, slot):  # there, keep_alive.sh goes on with what runs
            if self._wait_for_its_training(cell, lease) and self._is_over(cell, attempts):
                self.done.add(cell.name)
                say(f"{cell.name}: finished")
                return
        if self.stopped:
            return
        attempts = [*attempts, self._new_attempt(cell, slot)]
        version = self.folder.write(cell.name, attempts, version)
        status, error = self._train(cell, slot, lease, len(attempts))
        lease.check(verify=True)
        if slot and status == 2 and error.startswith(REFUSED):
            self.refused[slot.name] = error
            say(f"{slot.name}: no cell is tried on it any more: {error}")
        is_refused = slot and slot.name in self.refused
        try_again = status == 2 and (is_refused or self._is_held(cell))
        if try_again:
            status, error = RESUMABLE[0], None  # not a mistake in the configuration
        self._note_end(cell, attempts, version, status, error)
        if status in RESUMABLE and not try_again:
            self.done.add(
                cell.name
            )  # somebody has stopped it: this launcher does not start it again

    def _note_end(self, cell, attempts, version, status, error):
        """Write down how the last attempt has ended, and what follows from it."""
        stands = "waiting"
        attempts[-1] |= {"ended": now(), "exit_status": status, "error": error}
        if status == 0:
            if self.folder.progress(cell.url).finished:
                stands = "finished"
            elif self._at_max_steps(cell):
                self.done.add(cell.name)
                say(f"{cell.name}: stopped by --max_steps; the same command without it goes on")
            else:
                missing = join(cell.url, "eval.json")
                stands, error = (
                    "failed",
                    f"it ended well, but {missing} is missing: train_tpu.py --eval_only makes it",
                )
        elif status not in RESUMABLE and (status == 2 or failures(attempts) >= self.max_attempts):
            stands = "failed"  # 2: a mistake of the user, which another attempt would repeat
        attempts[-1] |= {"error": error, "given_up": stands == "failed"}
        self.folder.write(cell.name, attempts, version)
        if stands != "waiting":
            self.done.add(cell.name)
        say(f"{cell.name}: {stands}, exit status {status}" + (f": {error}" if error else ""))

    def _is_over(self, cell, attempts):
        """Whether nothing is left to do for the cell, now that no other launcher has it."""
        given_up = is_given_up(attempts) and len(attempts) > self.forgiven.get(cell.name, 0)
        return given_up or self.folder.progress(cell.url).finished or self._at_max_steps(cell)

    def _at_max_steps(self, cell):
        return is_at_step(self.folder, cell, self.max_steps)

    def _wait_for_its_training(self, cell, lease):
        """Wait while a training of this run lives, such as one that has outlived its launcher.
        Returns whether it had to."""
        waited = False
        while not self.stopped and self._is_held(cell):
            if not waited:
                say(f"{cell.name}: another training holds {cell.url}; waiting for it to end")
            waited = True
            self.stop.wait(LOOK_SECONDS)
            lease.check()
        return waited

    def _is_held(self, cell):
        """Whether a training of this run is alive."""
        try:
            lock = self.folder.lock(cell.url)
        except UserError:
            return False  # the folder cannot be used: its training says why
        if lock:
            lock.release()
        return lock is None

    def _new_attempt(self, cell, slot):
        attempt = {"host": socket.gethostname(), "pid": os.getpid(), "slice": None}
        if slot:
            self.deleted.discard(slot.name)
            self.done_at_look.pop(slot.name, None)
            _, accelerator_type, zone = cell.places[slot.name]
            spot = slot.spot or "--spot" in self.flags
            attempt |= {"slice": slot.name, "accelerator_type": accelerator_type}
            attempt |= {"zone": zone, "spot": spot}
        attempt |= {"began": now(), "ended": None}
        return attempt | {"exit_status": None, "error": None, "given_up": False}

    def _train(self, cell: Cell, slot: Slice | None, lease: RunLock, attempt: int):
        """(exit status, error or None) of the cell's training, which gets SIGTERM when this
        launcher stops or has lost the cell to another one."""
        log = self._log(cell)
        say(
            f"{cell.name}: attempt {attempt}"
            + (f" on {slot.name}" if slot else "")
            + f", {len(self.done)} of {len(self.cells)} cells done; log: {log}"
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        # A file, not a pipe: a training that outlives its launcher can go on writing.
        with open(log, "ab") as file:
            before = file.tell()
            process = subprocess.Popen(
                sweep_cells.command(cell, slot, self.flags),
                env=self._environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        is_told = False
        while process.poll() is None:
            if not is_told and (self.stopped or lease.failure):
                os.killpg(process.pid, signal.SIGTERM)
                is_told = True
            time.sleep(0.1)
        status = 128 - process.returncode if process.returncode < 0 else process.returncode
        if status in (0, *RESUMABLE):
            return status, None
        return status, last_error(log.read_bytes()[before:].decode(errors="replace"), status)

    def _environment(self, slot):
        environment = dict(os.environ)
        if not slot and len(self.slots) > 1:
            threads = max(1, (os.cpu_count() or 1) // len(self.slots))
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment

    def _log(self, cell):
        """The file for what the cell's training prints."""
        url = self.folder.cell_url(cell.name)
        if storage.is_remote(url):
            folder = storage.cache_folder() / "sweep" / storage.digest(url.encode())[:16]
        else:
            folder = Path(url)
        return folder / "output.log"


def is_on(attempts: Attempts, cell: Cell, slot: Slice | None) -> bool:
    """Whether the last attempt was on this slice. Two slices in different zones may have the same
    name."""
    if not slot or not attempts:
        return False
    last = attempts[-1]
    return last["slice"] == slot.name and last["zone"] == cell.places[slot.name][2]


def is_at_step(folder: SweepFolder, cell: Cell, max_steps: int | None) -> bool:
    """Whether the cell's run has come as far as --max_steps asks for. False without --max_steps."""
    return max_steps is not None and (folder.progress(cell.url).steps or 0) >= max_steps


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has closed, before its SIGHUP is here
        print(text, flush=True)
