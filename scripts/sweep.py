#!/usr/bin/env python3
"""Run the cells of a study, configuration x seed, one after another or several at once.

    bash scripts/launch_sweep.sh configs/e2_2_*.yaml --local --seeds 0 1 2
    bash scripts/launch_sweep.sh configs/e2_2_*.yaml --slices trm-a:v4-64 trm-b:v6e-16:europe-west4-a:spot

The same command goes on where it was stopped: sweep_ledger.py remembers.
"""

import dataclasses
import glob
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tpu_settings
from sweep_arguments import parse_args
from sweep_slices import check_one_kind, configs_on, delete_command, delete_if_idle

import storage
from config import Config, LoggingConfig
from storage import join
from sweep_ledger import RESUMABLE, Ledger, after, is_finished, results
from utils import RunFailure, UserError, run_cli

REFUSED = "Google Cloud: "  # so begins what the scripts say where Google does not give a slice and waiting does not help
LOOK_SECONDS = 10.0  # between two looks at what somebody else holds


@dataclasses.dataclass
class Cell:
    """One training of a sweep: the run `name` of the configuration file `path` with `overrides`, in the folder `url`.
    places: {name of a slice: (project, accelerator type, zone)} of those that it may run on."""

    name: str
    path: str
    overrides: list
    config: Config
    url: str
    places: dict


def make_cells(patterns, seeds, overrides, slices):
    """The cells of configuration files (or glob patterns) x seeds, seeds None: each configuration's own. Raises UserError, one
    line for every configuration that is not valid, on one of the slices if there are any. On slices a relative
    logging.output_dir lies in tpu.bucket."""
    cells, wrong = [], []
    for path in [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]:
        for seed in [None] if seeds is None else seeds:
            name = Path(path).stem + ("" if seed is None else f"_seed{seed}")
            changes = [*overrides, *([] if seed is None else [f"training.seed={seed}"])]
            try:
                config, places, bucket = configs_on(path, changes, slices)
                output_dir = config.logging.output_dir
                if slices:
                    output_dir = tpu_settings.on_slice("logging.output_dir", output_dir, bucket)
                    if not storage.is_remote(output_dir):
                        raise UserError(
                            f"{path}: logging.output_dir = {output_dir!r}: this host reads there what a slice has done: give a gs:// "
                            "path, or a relative one and tpu.bucket"
                        )
            except UserError as error:
                wrong.append(str(error))
                break
            if any(cell.name == name for cell in cells):
                wrong.append(
                    f"{path}: there are two cells named {name}: give each configuration, and each seed, once and a name of its own"
                )
                break
            cells.append(Cell(name, path, changes, config, join(output_dir, name), places))
    if wrong:
        # a wrong variable of the environment is one mistake, not one of each configuration
        lines = [line for text in wrong for line in text.split("\nerror: ")]
        raise UserError(
            "\nerror: ".join({re.sub(r".*?: (?=TPU_)", "", line): None for line in lines})
        )
    check_one_kind(cells)
    return cells


def check_datasets(cells):
    """Raises UserError, one line for every configuration whose dataset is missing, damaged or not the one it is planned for."""
    from train_state import load_datasets  # PyTorch takes seconds to import

    wrong = []
    for path, cell in {cell.path: cell for cell in cells}.items():
        try:
            load_datasets(cell.config)
        except UserError as error:
            wrong.append(f"{path}: {error}")
    if wrong:
        raise UserError("\nerror: ".join(wrong))


def check_slices(cells, slices, flags):
    """Raises UserError, one line for every configuration and every slice with which scripts/keep_alive.sh could not start."""
    wrong = []
    one_each = list({cell.path: cell for cell in cells}.values())
    # each takes a second; what depends on both, make_cells has looked at
    for cell, one in [(cell, slices[0]) for cell in one_each] + [
        (one_each[0], one) for one in slices[1:]
    ]:
        words = command(cell, one, ["--dry_run", *flags])
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            wrong.append(f"{cell.path} on {one.name}: {last_error(done.stderr, done.returncode)}")
    if wrong:
        raise UserError("\nerror: ".join(wrong))


# ---------------------------------------------------------------------------------------------------------
# The launcher
# ---------------------------------------------------------------------------------------------------------
class Sweep:
    """Runs cells in as many threads as there are `slots`: None for one on this host, or a Slice.

    flags: for train_tpu.py on this host, for scripts/keep_alive.sh on a slice. max_steps: None, or what they tell train_tpu.py.
    delete_when_done: delete a slice once no cell is to be had for it; `deleted` has the names of those that are. refused: {name
    of a slice: why Google does not give it}; the cells go on on the others.
    """

    def __init__(
        self, cells, ledger, slots, max_attempts, flags, max_steps=None, delete_when_done=False
    ):
        self.cells, self.ledger, self.slots, self.max_attempts, self.flags = (
            cells,
            ledger,
            slots,
            max_attempts,
            flags,
        )
        self.max_steps, self.delete_when_done, self.deleted, self.looked = (
            max_steps,
            delete_when_done,
            set(),
            {},
        )
        self.mutex, self.in_hand, self.done, self.refused = threading.Lock(), set(), set(), {}
        self.stop, self.signal, self.failure = threading.Event(), None, None

    def run(self):
        """Until every cell is finished or failed, here or with another launcher, or a signal has come: its number, or None."""
        for number in (signal.SIGINT, signal.SIGTERM):
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
        self.signal = number
        self.stop.set()

    def _work(self, slot):
        try:
            while not self.stop.is_set() and not (slot and slot.name in self.refused):
                try:
                    if len(self.done) == len(self.cells) and not (slot and self.delete_when_done):
                        return
                    if not self._next(slot):
                        if len(self.done) == len(self.cells):
                            return
                        self.stop.wait(LOOK_SECONDS)
                except (
                    RunFailure
                ) as error:  # the storage is out of reach, or a cell was lost to another launcher
                    say(f"warning: {error}")
                    self.stop.wait(LOOK_SECONDS)
        except BaseException as error:
            self.failure = error
            self.stop.set()

    def _next(self, slot):
        """Run one cell that is to be had: whether there was one."""
        if not slot:
            return self._next_cell(slot)
        lease = self.ledger.lock(join(self.ledger.url, "slices", slot.name))
        if not lease:
            return False  # another launcher uses it
        try:
            if self._next_cell(slot):
                return True
            if self.delete_when_done and not self.stop.is_set():
                self._delete(slot)
            return False
        finally:
            lease.release()

    def _delete(self, slot):
        """Delete the slice, for which no cell is to be had: each is done, or in other hands and stays on its slice. Should one
        come back to this slice after all, scripts/keep_alive.sh makes it anew."""
        if slot.name in self.deleted or self.looked.get(slot.name) == len(self.done):
            return  # or it was in use, and nothing has changed since
        self.looked[slot.name] = len(self.done)
        status, output = delete_if_idle(slot.name, self.cells[0].places[slot.name])
        if status == 0:
            self.deleted.add(slot.name)
        how = (
            last_error(output, status)
            if status
            else "it is deleted"
            if "is deleted" in output
            else "it is not there"
        )
        say(f"{slot.name}: no cell is left for it: {how}")

    def _next_cell(self, slot):
        standing = {
            cell.name: self.ledger.read(cell.name)[0]
            for cell in self.cells
            if cell.name not in self.done
        }

        def order(cell):
            # first what may still run on this slice; last what others run, or what may still run on another slice
            state = standing[cell.name]
            place = state["owner"] and state["owner"]["slice"]
            return (
                not is_on(state, cell, slot),
                state["state"] == "running" or bool(place),
                state["failures"],
            )

        for cell in sorted((cell for cell in self.cells if cell.name in standing), key=order):
            with self.mutex:
                if cell.name in self.in_hand | self.done or self.stop.is_set():
                    continue
                self.in_hand.add(cell.name)
            try:
                lease = self.ledger.lock(join(self.ledger.url, cell.name))
                if lease:
                    try:
                        self._run_cell(cell, slot, lease)
                    finally:
                        lease.release()
                    return True
            finally:
                self.in_hand.discard(cell.name)
        return False

    def _run_cell(self, cell, slot, lease):
        state, version = self.ledger.read(cell.name)
        if state["state"] == "failed" or is_finished(state) or at_step(cell, self.max_steps):
            self.done.add(cell.name)
            return
        told, attach = False, is_on(state, cell, slot)  # keep_alive.sh finds what runs there
        while not attach and self._held_elsewhere(cell) and not self.stop.is_set():
            if not told:
                say(f"{cell.name}: another training holds {cell.url}; waiting for it to end")
            told = True
            self.stop.wait(LOOK_SECONDS)
            lease.check()
        if self.stop.is_set():
            return
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "slice": None}
        if slot:
            self.deleted.discard(slot.name)
            self.looked.pop(slot.name, None)
            _, accelerator_type, zone = cell.places[slot.name]
            owner |= {
                "slice": slot.name,
                "accelerator_type": accelerator_type,
                "zone": zone,
                "spot": slot.spot or "--spot" in self.flags,
            }
        state |= {
            "state": "running",
            "attempts": state["attempts"] + 1,
            "began": now(),
            "ended": None,
            "exit_status": None,
            "error": None,
            "owner": owner,
        }
        attempt = {**owner, **{key: state[key] for key in ("began", "ended", "exit_status")}}
        state["history"] = [*state.get("history", []), attempt]
        version = self.ledger.write(cell.name, state, version)
        status, error = self._train(cell, slot, lease, state["attempts"])
        lease.check(verify=True)
        if slot and status == 2 and error.startswith(REFUSED):
            self.refused[slot.name] = error
            say(f"{slot.name}: no cell is tried on it any more: {error}")
        if refused := status == 2 and (
            slot and slot.name in self.refused or self._held_elsewhere(cell)
        ):
            status, error = RESUMABLE[0], None  # no mistake of the configuration's
        state |= {
            **after(state, status, self.max_attempts),
            "exit_status": status,
            "ended": now(),
            "error": error,
        }
        state["history"][-1] |= {"ended": state["ended"], "exit_status": status}
        if (
            state["state"] == "finished"
            and not is_finished(state)
            and at_step(cell, self.max_steps)
        ):
            state |= {"state": "waiting"}
            self.done.add(cell.name)
            say(f"{cell.name}: stopped by --max_steps; the same command without it goes on")
        elif state["state"] == "finished" and not is_finished(state):
            state |= {
                "state": "failed",
                "error": f"it ended well, but {join(cell.url, 'eval.json')} is missing: train_tpu.py --eval_only makes it",
            }
        self.ledger.write(cell.name, state, version)
        if state["state"] != "waiting" or status in RESUMABLE and not refused:
            self.done.add(
                cell.name
            )  # one that somebody has stopped is not begun again either, by this launcher
        say(
            f"{cell.name}: {state['state']}, exit status {status}"
            + (f": {state['error']}" if state["error"] else "")
        )

    def _held_elsewhere(self, cell):
        """Whether a training of this run is alive, as one that outlived its launcher."""
        try:
            lock = self.ledger.lock(cell.url)
        except UserError:
            return False  # of the run's folder: its training will say it
        if lock:
            lock.release()
        return lock is None

    def _train(self, cell, slot, lease, attempt):
        """(exit status, error or None) of the cell's training, which is told to end when this launcher is, or has lost the cell."""
        log = self.log(cell)
        say(
            f"{cell.name}: attempt {attempt}"
            + (f" on {slot.name}" if slot else "")
            + f", {len(self.done)} of {len(self.cells)} cells done; log: {log}"
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(
            log, "ab"
        ) as file:  # a file, not a pipe: a training that outlives its launcher can go on writing
            before = file.tell()
            process = subprocess.Popen(
                command(cell, slot, self.flags),
                env=self.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        told = False
        while process.poll() is None:
            if not told and (self.stop.is_set() or lease.failure):
                os.killpg(process.pid, signal.SIGTERM)
                told = True
            time.sleep(0.1)
        status = 128 - process.returncode if process.returncode < 0 else process.returncode
        return status, None if status in (0, *RESUMABLE) else last_error(
            log.read_bytes()[before:].decode(errors="replace"), status
        )

    def environment(self, slot):
        threads = max(1, (os.cpu_count() or 1) // len(self.slots))
        return {
            **({"OMP_NUM_THREADS": str(threads)} if not slot and len(self.slots) > 1 else {}),
            **os.environ,
        }

    def log(self, cell):
        """What the cell's training prints."""
        url = join(self.ledger.url, cell.name)
        return (
            Path(
                storage.cache_folder() / "sweep" / storage.digest(url.encode())[:16]
                if storage.is_remote(url)
                else url
            )
            / "output.log"
        )


def command(cell, slot, flags):
    if slot:  # brings a run to its end over preemptions, or finds it running
        own = [*slot.overrides, *(flag for flag in slot.flags if flag not in flags)]
        program = ["bash", str(ROOT / "scripts" / "keep_alive.sh"), cell.path]
    else:
        own, program = [], [sys.executable, str(ROOT / "train_tpu.py"), "--config", cell.path]
    return [*program, "--run_name", cell.name, *cell.overrides, *own, *flags]


def is_on(state, cell, slot):
    """Whether the cell was last tried on this slice: slices are told apart by name and zone."""
    owner = state["owner"]
    return bool(
        slot
        and owner
        and owner["slice"] == slot.name
        and owner.get("zone") == cell.places[slot.name][2]
    )


def at_step(cell, max_steps):
    """Whether its run has come as far as --max_steps, None without it, asks for."""
    return max_steps is not None and (results(cell.url)["steps"] or 0) >= max_steps


def last_error(output, status):
    """Why a training failed, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    killed = [f"killed by signal {status - 128}"] if status > 128 else []
    return (errors or killed or lines or ["it printed nothing"])[-1][:300]


def now():
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def say(text):
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------
def ledgers_to_look_at(args, cells):
    """Where the ledger may lie of a sweep of which --status is asked: a relative logging.output_dir is a folder of this host,
    but for a sweep on slices one in the bucket."""
    if args.ledger:
        return [args.ledger]
    if args.slices and cells:
        return sorted({ledger_beside(cell) for cell in cells})
    folders = [cell.config.logging.output_dir for cell in cells] or [LoggingConfig().output_dir]
    buckets = [
        tpu_settings.slice_settings(cell.config, cell.overrides, [])["TPU_BUCKET"] for cell in cells
    ]
    buckets = buckets or [os.environ.get("TPU_BUCKET", "")]
    places = [] if args.slices else [join(folder, "sweep") for folder in folders]
    if not args.local:
        places += [
            join(bucket, folder.rstrip("/"), "sweep")
            for folder in folders
            for bucket in buckets
            if bucket and not storage.is_remote(folder) and not os.path.isabs(folder)
        ]
    return list(dict.fromkeys(places))


def ledger_beside(cell):
    return cell.url[: -len(cell.name)] + "sweep"


def show_status(names, places, local):
    """Print the table of every ledger among the places that has one of the cells, names [] for all. Raises UserError where none
    has, or RunFailure where that cannot be known. local: the user said that it is a sweep on this host."""
    found, failures = False, []
    for place in places:
        try:
            ledger = Ledger(place)
            known = ledger.names()
            if not known or names and not set(names) & set(known):
                continue
            shown = names or known
            running = [
                name
                for name in shown
                if (state := ledger.read(name)[0]) and state["state"] == "running"
            ]
            text, _ = ledger.table(shown, ledger.silent(running))
        except (UserError, RunFailure) as error:
            failures.append(error)
            continue
        found = True
        say(f"{ledger.url}: {len(shown)} cell(s)\n{text}")
    for error in failures if found else ():
        print(f"warning: {error}", file=sys.stderr)
    if not found:
        text, elsewhere = f"no cell of this sweep is in {' or '.join(places)}", ""
        if failures:
            raise type(failures[0])(f"{text}: {failures[0]}")
        if not local and not any(map(storage.is_remote, places)):
            elsewhere = "; that of a sweep on slices lies in tpu.bucket: export TPU_BUCKET=gs://..."
        raise UserError(
            f"{text}: name the configurations and overrides that it was begun with, or the ledger's folder by "
            f"--ledger{elsewhere}"
        )


def main():
    args = parse_args()
    cells = make_cells(args.configs, args.seeds, args.overrides, args.slices)
    names = [cell.name for cell in cells]
    if args.status:
        show_status(names, ledgers_to_look_at(args, cells), args.local)
        return 0
    places = sorted({ledger_beside(cell) for cell in cells})
    if len(places) > 1 and not args.ledger:
        raise UserError(
            f"--ledger: the configurations have several logging.output_dir: say where the ledger is to be, {places[0]} or another place"
        )
    place = args.ledger or places[0]
    if storage.is_remote(place) and (
        here := [cell.url for cell in cells if not storage.is_remote(cell.url)]
    ):
        raise UserError(
            f"--ledger {place}: it is for all hosts, and {here[0]} is a folder of this one: set logging.output_dir to a gs:// path"
        )
    states, unknown = {}, None
    try:
        ledger = Ledger(place)
        states = {name: ledger.read(name)[0] for name in names}
    except (UserError, RunFailure) as error:
        if not args.dry_run:
            raise
        unknown = error  # the commands are the same
    if not unknown:
        ledger.check_same(cells, states, args.retry_failed)
    if args.local:
        check_datasets(cells)
    else:
        check_slices(cells, args.slices, args.flags)
    flags = (
        args.flags
        if args.slices
        else ["--max_steps", str(args.max_steps)]
        if args.max_steps
        else []
    )
    if args.dry_run:
        print_commands(cells, states, unknown, args.slices, flags)
        return 0
    for cell in cells:
        ledger.enter(cell, args.retry_failed)
    slots = args.slices or [None] * args.jobs
    sweep = Sweep(
        cells, ledger, slots, args.max_attempts, flags, args.max_steps, args.delete_when_done
    )
    try:
        number = sweep.run()
        text, finished = ledger.table(names)
        print(text)
    finally:
        if kept := [one for one in args.slices if one.name not in sweep.deleted]:
            say(
                "these slices, if they are there, count against the grant or cost until they are deleted"
                + ("; runs on them go on:" if sweep.stop.is_set() else ":")
            )
        for one in kept:
            say(f"  {shlex.join(delete_command(one.name, cells[0].places[one.name]))}")
    if number:
        say("stopped: the same command goes on")
        return 128 + number
    for name, why in sweep.refused.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    if slots and len(sweep.refused) == len(slots):
        return 2
    return (
        0
        if finished or args.max_steps and all(at_step(cell, args.max_steps) for cell in cells)
        else 1
    )


def print_commands(cells, states, unknown, slices, flags):
    if unknown:
        print(f"how the cells stand is not known: {unknown}")
    for cell in cells:
        state = states.get(cell.name)
        stands = "unknown" if unknown else state["state"] if state else "waiting"
        print(
            f"{cell.name}  {stands}  {shlex.join(command(cell, slices[0] if slices else None, flags))}"
        )
    own = [shlex.join([*one.overrides, *one.flags]) for one in slices]
    for one, words in list(zip(slices, own))[1:]:
        print(f"on {one.name}: {words} in place of {own[0]}")


if __name__ == "__main__":
    run_cli(main)
