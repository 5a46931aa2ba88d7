"""Where a run lives: one folder, local or gs://, written by one process, with a local folder to work in."""

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import storage
import trm_model
from checkpoint_manager import CheckpointManager
from run_lock import RunLock
from utils import RunFailure, UserError, replace_file

METRICS_FILE, STARTS_FILE = "metrics.jsonl", "starts.jsonl"
SAVE_SECONDS = (
    20.0  # for one attempt at an operation: the next save waits for it, and so does SIGTERM
)
# a preempted VM is gone after about 30 s: after SIGTERM so long for a save under way, and so long for the last one
HURRY_SECONDS, LEAVE_SECONDS = 8.0, 10.0


def run_url(config, run_name):
    """logging.output_dir/run_name, a local path or gs://."""
    return storage.join(config.logging.output_dir, run_name)


def working_folder(url):
    """The local folder of a run: the run's own, or one in $TRM_CACHE (default ~/.cache/trm) for a gs:// one."""
    return Path(
        storage.cache_folder() / "runs" / storage.digest(url.encode())[:16]
        if storage.is_remote(url)
        else url
    )


def open_checkpoints(config, run_name):
    """The checkpoints of a run, to look at and load from."""
    url = run_url(config, run_name)
    return CheckpointManager(
        storage.open_folder(storage.join(url, "checkpoints")),
        config.checkpoint.keep_last_n,
        working_folder(url) / "checkpoints",
    )


def check_seen_by_all(url):
    """Raises UserError on a host that does not see the folder that rank 0 has just opened: after a restart another host may be
    the one with rank 0, and would begin anew."""
    if not storage.is_remote(url) and not Path(url).is_dir():
        raise UserError(
            f"logging.output_dir: {url} is a folder of one host, and the run has several: give a gs:// path or a folder that all hosts share"
        )


@contextlib.contextmanager
def writing_to(config):
    """UserError where what is done within may not, or cannot, write to logging.output_dir. A full disk is said elsewhere."""
    try:
        yield
    except OSError as error:
        if isinstance(error, storage.StorageError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"logging.output_dir = {config.logging.output_dir!r}: no run can be written there "
            f"({error.strerror}: {error.filename}): name another folder"
        ) from None


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
        with writing_to(config):
            self.lock = RunLock(storage.open_folder(self.url, deadline=5.0), take_over)
        self.home, checkpoints = (
            storage.open_folder(url, SAVE_SECONDS)
            for url in (self.url, storage.join(self.url, "checkpoints"))
        )
        self.checkpoints = CheckpointManager(
            checkpoints,
            config.checkpoint.keep_last_n,
            self.path / "checkpoints",
            self.saver,
            self._still_ours,
            self._before_marker,
        )
        self.newest, self.lost, self.left, self.leaving = None, None, None, threading.Lock()

    def prepare(self):
        """Clear away what a killed predecessor left half-written; bring a gs:// run's records here."""
        if storage.is_remote(self.url):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            for name in (METRICS_FILE, STARTS_FILE):
                if name in self.home.list(name):
                    self.home.get(name, self.path / name)
        for leftover in (self.path / "checkpoints").glob(".*.tmp"):
            leftover.unlink()

    def note_start(self, record):
        """Add a line to starts.jsonl."""
        path = self.path / STARTS_FILE
        replace_file(path, (path.read_text() if path.exists() else "") + json.dumps(record) + "\n")

    def _still_ours(self):
        self.lock.check(verify=True)  # what somebody who took the run over has written must stay

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
        except UserError:
            with contextlib.suppress(storage.StorageError):
                self._still_ours()  # a new owner clears half-written files away: then the disk is not full
            raise

    def newest_text(self):
        """For messages: where the last good checkpoint is, once all saves have succeeded."""
        return (
            f"the last good checkpoint is {self.newest}"
            if self.newest
            else self.checkpoints.newest_text()
        )

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
                    except (RunFailure, UserError) as failure:
                        error = failure
                if error is not None:
                    print(
                        f"warning: {self.newest} (or its evaluation) is not saved: {error}; the run will go on from the checkpoint before",
                        file=sys.stderr,
                        flush=True,
                    )
                self.lock.release()
                self.left = error is None
            return self.left


# ---------------------------------------------------------------------------------------------------------
# What a training was started with
# ---------------------------------------------------------------------------------------------------------
def start_record(run, datasets, args):
    """One line of starts.jsonl: the step and the seconds of training that this start goes on from, what was typed, the code, the
    device, its workers, the versions, and which puzzles. run: train_tpu.Run; datasets: {split: dataset}."""
    device, (commit, dirty) = run.device, code_version()
    return {
        "wall_time": time.time(),
        "step": run.step,
        "train_seconds": run.train_seconds,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config_file": args.config,
        "init_from": args.init_from,
        "commit": commit,
        "dirty": dirty,
        "device": device.name,
        "device_model": _device_model(device),
        "world_size": device.world_size,
        "accelerator_type": run.config.tpu.accelerator_type if device.name == "tpu" else None,
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torch_xla", "numpy")},
        "parameters": trm_model.num_parameters(run.model),
        "datasets": {
            split: {"puzzles": dataset.num_puzzles, "sha256": dataset.fingerprint}
            for split, dataset in datasets.items()
        },
    }


def code_version(root=Path(__file__).parent):
    """(commit, dirty) of the kit's code: from git; without a repository from $TRM_COMMIT or the file COMMIT, either of them a
    commit as `git describe --always --dirty` writes it. dirty: whether files that git follows differ from it. (None, None) if unknown."""
    text = os.environ.get("TRM_COMMIT") or ""
    if (root / ".git").exists():
        with contextlib.suppress(OSError):  # no git on this machine
            text = (
                subprocess.run(
                    [
                        "git",
                        "-C",
                        root,
                        "describe",
                        "--always",
                        "--dirty",
                        "--abbrev=40",
                        "--exclude=*",
                    ],
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                ).stdout
                or text
            )
    elif not text and (root / "COMMIT").exists():
        text = (root / "COMMIT").read_text()
    text = text.strip()
    return (text.removesuffix("-dirty"), text.endswith("-dirty")) if text else (None, None)


def _device_model(device):
    if device.name == "cuda":
        return torch.cuda.get_device_name()
    if device.name == "tpu":
        return f"TPU {device.generation.name}"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    return platform.processor() or platform.machine()


def _version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
