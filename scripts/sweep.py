#!/usr/bin/env python3
"""Run the cells of a study, configuration x seed, one after another or several at once.

    bash scripts/launch_sweep.sh configs/e2_2_*.yaml --local --seeds 0 1 2

The same command goes on where it was stopped: sweep_ledger.py remembers.
"""
import argparse
import dataclasses
import glob
import os
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
import storage
import tpu_settings
import utils
from storage import join
from sweep_ledger import RESUMABLE, Ledger, after, is_finished
from utils import RunFailure, UserError

LOOK_SECONDS = 10.0         # between two looks at what somebody else holds


@dataclasses.dataclass
class Cell:
    """One training of a sweep: the run `name` of the configuration file `path` with `overrides`, in the folder `url`."""
    name: str
    path: str
    overrides: list
    config: utils.Config
    url: str


def make_cells(patterns, seeds, overrides, on_slices):
    """The cells of configuration files (or glob patterns) x seeds, seeds None: each configuration's own. Raises UserError, one
    line for every configuration that is not valid. on_slices: a relative logging.output_dir lies in tpu.bucket."""
    cells, wrong = [], []
    for path in [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]:
        for seed in [None] if seeds is None else seeds:
            name = Path(path).stem + ("" if seed is None else f"_seed{seed}")
            changes = [*overrides, *([] if seed is None else [f"training.seed={seed}"])]
            try:
                config = utils.load_config(path, changes)
                output_dir = config.logging.output_dir
                if on_slices:
                    bucket = tpu_settings.slice_settings(config, changes, ["project"])["TPU_BUCKET"]
                    output_dir = tpu_settings.on_slice("logging.output_dir", output_dir, bucket)
                    if not storage.is_remote(output_dir):
                        raise UserError(f"{path}: logging.output_dir = {output_dir!r}: this host reads there what a slice has done: give a gs:// "
                                        "path, or a relative one and tpu.bucket")
            except UserError as error:
                wrong.append(str(error))
                break
            if any(cell.name == name for cell in cells):
                wrong.append(f"{path}: there are two cells named {name}: give each configuration, and each seed, once and a name of its own")
                break
            cells.append(Cell(name, path, changes, config, join(output_dir, name)))
    if wrong:
        raise UserError("\nerror: ".join(dict.fromkeys(wrong)))      # a wrong variable of the environment is one mistake, not one of each
    return cells


def check_datasets(cells):
    """Raises UserError, one line for every configuration whose dataset is missing, damaged or not the one it is planned for."""
    from train_tpu import load_datasets     # PyTorch takes seconds to import
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
    for cell, name in [(cell, slices[0]) for cell in one_each] + [(one_each[0], name) for name in slices[1:]]:
        done = subprocess.run(command(cell, name, ["--dry_run", *flags]), stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            wrong.append(f"{cell.path} on {name}: {last_error(done.stderr, done.returncode)}")
    if wrong:
        raise UserError("\nerror: ".join(wrong))


# ---------------------------------------------------------------------------------------------------------
# The launcher
# ---------------------------------------------------------------------------------------------------------
class Sweep:
    """Runs cells in as many threads as there are `slots`: None for one on this host, or the name of a TPU slice."""

    def __init__(self, cells, ledger, slots, max_attempts, flags):
        self.cells, self.ledger, self.slots, self.max_attempts, self.flags = cells, ledger, slots, max_attempts, flags
        self.mutex, self.in_hand, self.done = threading.Lock(), set(), set()
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
            while not self.stop.is_set() and len(self.done) < len(self.cells):
                try:
                    if not self._next(slot):
                        self.stop.wait(LOOK_SECONDS)
                except RunFailure as error:     # the storage is out of reach, or a cell was lost to another launcher
                    say(f"warning: {error}")
                    self.stop.wait(LOOK_SECONDS)
        except BaseException as error:
            self.failure = error
            self.stop.set()

    def _next(self, slot):
        """Run one cell that is to be had: whether there was one."""
        lease = self.ledger.lock(join(self.ledger.url, "slices", slot)) if slot else None
        if slot and not lease:
            return False        # another launcher uses it
        try:
            return self._next_cell(slot)
        finally:
            if lease:
                lease.release()

    def _next_cell(self, slot):
        standing = {cell.name: self.ledger.read(cell.name)[0] for cell in self.cells if cell.name not in self.done}

        def order(cell):
            # first what may still run on this slice; last what others run, or what may still run on another slice
            state = standing[cell.name]
            place = state["owner"] and state["owner"]["slice"]
            return not (slot and place == slot), state["state"] == "running" or bool(place), state["failures"]
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
        if state["state"] == "failed" or is_finished(state):
            self.done.add(cell.name)
            return
        told, attach = False, slot and state["owner"] and state["owner"]["slice"] == slot      # keep_alive.sh finds what runs there
        while not attach and self._held_elsewhere(cell) and not self.stop.is_set():
            if not told:
                say(f"{cell.name}: another training holds {cell.url}; waiting for it to end")
            told = True
            self.stop.wait(LOOK_SECONDS)
            lease.check()
        if self.stop.is_set():
            return
        state |= {"state": "running", "attempts": state["attempts"] + 1, "began": now(), "ended": None, "exit_status": None, "error": None,
                  "owner": {"host": socket.gethostname(), "pid": os.getpid(), "slice": slot}}
        version = self.ledger.write(cell.name, state, version)
        status, error = self._train(cell, slot, lease, state["attempts"])
        lease.check(verify=True)
        if refused := status == 2 and self._held_elsewhere(cell):
            status, error = RESUMABLE[0], None      # no mistake of the configuration's
        state |= {**after(state, status, self.max_attempts), "exit_status": status, "ended": now(), "error": error}
        if state["state"] == "finished" and not is_finished(state):
            state |= {"state": "failed", "error": f"it ended well, but {join(cell.url, 'eval.json')} is missing: train_tpu.py --eval_only makes it"}
        self.ledger.write(cell.name, state, version)
        if state["state"] != "waiting" or status in RESUMABLE and not refused:
            self.done.add(cell.name)        # one that somebody has stopped is not begun again either, by this launcher
        say(f"{cell.name}: {state['state']}, exit status {status}" + (f": {state['error']}" if state["error"] else ""))

    def _held_elsewhere(self, cell):
        """Whether a training of this run is alive, as one that outlived its launcher."""
        try:
            lock = self.ledger.lock(cell.url)
        except UserError:
            return False        # of the run's folder: its training will say it
        if lock:
            lock.release()
        return lock is None

    def _train(self, cell, slot, lease, attempt):
        """(exit status, error or None) of the cell's training, which is told to end when this launcher is, or has lost the cell."""
        log = self.log(cell)
        say(f"{cell.name}: attempt {attempt}" + (f" on {slot}" if slot else "") + f", {len(self.done)} of {len(self.cells)} cells done; log: {log}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:       # a file, not a pipe: a training that outlives its launcher can go on writing
            before = file.tell()
            process = subprocess.Popen(command(cell, slot, self.flags), env=self.environment(slot), stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        told = False
        while process.poll() is None:
            if not told and (self.stop.is_set() or lease.failure):
                os.killpg(process.pid, signal.SIGTERM)
                told = True
            time.sleep(0.1)
        status = 128 - process.returncode if process.returncode < 0 else process.returncode
        return status, None if status in (0, *RESUMABLE) else last_error(log.read_bytes()[before:].decode(errors="replace"), status)

    def environment(self, slot):
        threads = max(1, (os.cpu_count() or 1) // len(self.slots))
        return {**({"OMP_NUM_THREADS": str(threads)} if not slot and len(self.slots) > 1 else {}), **os.environ}

    def log(self, cell):
        """What the cell's training prints."""
        url = join(self.ledger.url, cell.name)
        return Path(storage.cache_folder() / "sweep" / storage.digest(url.encode())[:16] if storage.is_remote(url) else url) / "output.log"


def command(cell, slot, flags):
    if slot:        # brings a run to its end over preemptions, or finds it running
        return ["bash", str(ROOT / "scripts" / "keep_alive.sh"), cell.path, "--run_name", cell.name, *cell.overrides, f"tpu.name={slot}", *flags]
    return [sys.executable, str(ROOT / "train_tpu.py"), "--config", cell.path, "--run_name", cell.name, *cell.overrides]


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
def parse_args():
    parser = argparse.ArgumentParser(prog="launch_sweep.sh", add_help=False)    # scripts/launch_sweep.sh has the help
    parser.add_argument("configs", nargs="*", metavar="CONFIG")
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--slices", nargs="+", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="K")
    parser.add_argument("--max_attempts", type=int, default=3, metavar="N")
    parser.add_argument("--ledger", metavar="URL")
    for flag in ("--retry_failed", "--dry_run", "--status"):
        parser.add_argument(flag, action="store_true")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, flags = sys.argv[1:end], sys.argv[end + 1:]
    overrides = [text for text in given if "=" in text and not text.startswith("-") and not os.path.exists(text)]
    args = parser.parse_intermixed_args([text for text in given if text not in overrides])
    args.overrides, args.flags = overrides, flags
    for name, value in (("--jobs", args.jobs), ("--max_attempts", args.max_attempts)):
        if value < 1:
            raise UserError(f"{name} {value}: must be >= 1")
    if not args.status and not args.configs:
        raise UserError("no configuration is given: bash scripts/launch_sweep.sh configs/e1_*.yaml --local")
    if not args.status and args.local == bool(args.slices):
        raise UserError("give either --local, to train on this host, or --slices NAME ..., the TPU slices to train on")
    if args.slices and args.jobs > 1:
        raise UserError(f"--jobs {args.jobs}: only with --local; on each of --slices there is one cell at a time")
    if args.flags and not args.slices:
        raise UserError(f"-- {shlex.join(args.flags)}: these are for scripts/keep_alive.sh, so only with --slices")
    if args.slices and any(text.startswith("tpu.name=") for text in overrides):
        raise UserError("tpu.name: name the slices by --slices alone")
    if args.seeds and any(text.startswith("training.seed=") for text in overrides):
        raise UserError("training.seed: give the seeds by --seeds, or by training.seed= alone")
    return args


def main():
    args = parse_args()
    cells = make_cells(args.configs, args.seeds, args.overrides, bool(args.slices))
    places = sorted({cell.url[:-len(cell.name)] + "sweep" for cell in cells}) or [join("runs", "sweep")]
    if len(places) > 1 and not args.ledger:
        raise UserError(f"--ledger: the configurations have several logging.output_dir: say where the ledger is to be, {places[0]} or another place")
    place = args.ledger or places[0]
    if storage.is_remote(place) and (here := [cell.url for cell in cells if not storage.is_remote(cell.url)]):
        raise UserError(f"--ledger {place}: it is for all hosts, and {here[0]} is a folder of this one: set logging.output_dir to a gs:// path")
    ledger, names = Ledger(place), [cell.name for cell in cells]
    if args.status:
        names = names or ledger.names()
        say(f"{ledger.url}: {len(names)} cell(s)")
        running = [name for name in names if (state := ledger.read(name)[0]) and state["state"] == "running"]
        text, _ = ledger.table(names, ledger.silent(running))
        print(text)
        return 0
    ledger.check_same(cells, args.retry_failed)
    if args.local:
        check_datasets(cells)
    else:
        check_slices(cells, args.slices, args.flags)
    if args.dry_run:
        for cell in cells:
            state, _ = ledger.read(cell.name)
            print(f"{cell.name}  {state['state'] if state else 'waiting'}  {shlex.join(command(cell, args.slices and 'SLICE', args.flags))}")
        return 0
    for cell in cells:
        ledger.enter(cell, args.retry_failed)
    number = Sweep(cells, ledger, args.slices or [None] * args.jobs, args.max_attempts, args.flags).run()
    text, finished = ledger.table(names)
    print(text)
    if number:
        say("stopped: the same command goes on")
        return 128 + number
    return 0 if finished else 1


if __name__ == "__main__":
    utils.run_cli(main)
