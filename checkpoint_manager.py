"""Checkpoints that are whole or are not there: payload first, then the marker that makes it count.

checkpoints/checkpoint_step_{step}.pt     torch.save of plain tensors, numbers and text
(weights_only=True loads it) checkpoints/checkpoint_step_{step}.json   marker: step, bytes, sha256,
evaluation metrics
"""

import hashlib
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from background_writer import BackgroundWriter
from storage import StorageError, digest, is_remote, join, open_folder
from utils import UserError

BEST_BY = "exact_accuracy"


class _Save:
    """The job that brings one checkpoint from the local disk to the folder. It may be called again
    after a StorageError."""

    def __init__(self, manager: "CheckpointManager", step: int, staged: Path):
        self.manager, self.step, self.staged = manager, step, staged
        self.marker = {
            "step": step,
            "bytes": staged.stat().st_size,
            "sha256": _sha256(staged),
            "metrics": None,
        }
        self.payload_is_there = False

    def __call__(self) -> None:
        manager, step = self.manager, self.step
        try:
            if not self.payload_is_there:
                manager.before_payload()
                # the marker of a damaged predecessor must not vouch for the new payload
                manager.folder.delete(marker_name(step))
                manager.folder.take(self.staged, payload_name(step))
                self.payload_is_there = True
            manager.before_marker()
            manager._mark(self.marker)
        except StorageError:
            raise
        except BaseException as error:
            self.abandon()
            if not isinstance(error, OSError):
                raise
            if marker_name(step) not in manager.folder.list():
                # nobody would use the payload, and the disk may be full
                manager.folder.delete(payload_name(step))
            raise manager._not_written(step, error) from None

    def abandon(self) -> None:
        self.staged.unlink(missing_ok=True)


class CheckpointManager:
    """Saves, finds, loads and deletes the checkpoints of one run.

    folder: a folder of storage.py, local or gs://. keep_last_n: how many of the newest checkpoints
    are kept; the best by exact accuracy is kept besides. staging: local folder for files that are
    not in `folder` yet, on the same disk if `folder` is local. writer: where saves run; without one
    it is only possible to look and to load. before_payload, before_marker: called before each of
    the two is written; before_marker for what must be in place when the checkpoint counts. Both may
    raise to prevent it.
    """

    def __init__(
        self,
        folder,
        keep_last_n: int,
        staging: str | Path,
        writer: BackgroundWriter | None = None,
        before_payload: Callable[[], None] = lambda: None,
        before_marker: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep_last_n, self.staging = folder, keep_last_n, Path(staging)
        self.writer, self.before_payload, self.before_marker = writer, before_payload, before_marker

    def url(self, step: int) -> str:
        return join(self.folder.url, payload_name(step))

    def save(self, step: int, state: dict) -> None:
        """Write `state` to the local disk, and from there to the folder in the background, as the
        checkpoint of `step`.

        Waits for the save before to end. Deletes the checkpoints that are no longer to be kept. A
        kill at any moment leaves the earlier checkpoints as they were, and this one only if it is
        complete. Raises UserError if it, or the one before, cannot be written, and what
        BackgroundWriter.submit_newest raises.
        """
        # the name is unique: the save before may be of the same step, and still running
        staged = self.staging / f".{payload_name(step)}.{secrets.token_hex(6)}.tmp"
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            with open(staged, "wb") as file:
                torch.save(state, file)
            job = _Save(self, step, staged)
        except (OSError, RuntimeError) as error:
            staged.unlink(missing_ok=True)
            raise self._not_written(step, error) from None
        try:
            dropped = self.writer.submit_newest(job)
        except BaseException:
            job.abandon()
            raise
        for old in dropped:
            if isinstance(old, _Save):
                old.abandon()

    def _not_written(self, step, error):
        # torch reports a failed write as RuntimeError; the cause, where it has one, is the OSError
        # in its context
        cause = error if isinstance(error, OSError) else error.__context__ or error
        return UserError(
            f"{self.url(step)}: the checkpoint could not be written ({cause}): free some space or set logging.output_dir; "
            f"{self.newest_text()}"
        )

    def add_metrics(self, step, metrics):
        """Note the evaluation of the checkpoint of `step` (a dict with exact_accuracy) in its
        marker, in the background."""

        def job():
            self.before_marker()
            marker = next((m for m in self.markers() if m["step"] == step), None)
            if (
                marker
            ):  # else its save was given up for a newer one while the storage was out of reach
                self._mark({**marker, "metrics": metrics})

        self.writer.submit(job)

    def metrics(self, step):
        """The evaluation noted for the checkpoint of `step`, or None."""
        return next((m["metrics"] for m in self.markers() if m["step"] == step), None)

    def _mark(self, marker):
        self.folder.write(marker_name(marker["step"]), json.dumps(marker).encode())
        self._retire()

    def markers(self):
        """Markers of the complete checkpoints, oldest first. One whose size is not the marker's is
        passed over."""
        found, sizes = [], self.folder.list()
        for name in sizes:
            if not re.fullmatch(r"checkpoint_step_\d+\.json", name):
                continue
            try:
                marker = json.loads(self.folder.read(name))
                step, written, _, metrics = (
                    marker[key] for key in ("step", "bytes", "sha256", "metrics")
                )
                payload = payload_name(step)
                if type(step) is not int or marker_name(step) != name:
                    raise ValueError(f"its step is {step!r}")
                if payload not in sizes:
                    raise ValueError(f"there is no {payload}")
                if metrics is not None:
                    float(metrics[BEST_BY])
                size = sizes[payload]
            except StorageError:
                raise
            except FileNotFoundError:  # retired since it was listed
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(
                    f"warning: {join(self.folder.url, name)} is passed over: {type(error).__name__}: {error}",
                    file=sys.stderr,
                )
                continue
            if size != written:
                print(
                    f"warning: {join(self.folder.url, payload)} is passed over: it has {size} bytes, its marker says {written}",
                    file=sys.stderr,
                )
                continue
            found.append(marker)
        return sorted(found, key=lambda marker: marker["step"])

    def newest_text(self):
        """For messages: where the last good checkpoint is."""
        try:
            markers = self.markers()
        except StorageError as error:  # the message it is for matters more
            return f"the last good checkpoint could not be looked up ({error})"
        return (
            f"the last good checkpoint is {self.url(markers[-1]['step'])}"
            if markers
            else "there is no checkpoint yet"
        )

    def best_marker(self):
        """The marker with the highest exact accuracy (the later one of equals), or None."""
        return next(iter(self._best_first()), None)

    def _best_first(self):
        scored = [m for m in self.markers() if m["metrics"]]
        return sorted(scored, key=lambda m: (m["metrics"][BEST_BY], m["step"]), reverse=True)

    def _first_whole(self, markers):
        """Local path of the first of these checkpoints whose checksum holds, or None; the others
        get a warning."""
        for marker in markers:
            reason = "its content is not what was written (checksum)"
            try:
                path = local_copy(self.folder, payload_name(marker["step"]), self.staging)
                if _sha256(path) == marker["sha256"]:
                    return path
            except FileNotFoundError:
                reason = "it was deleted a moment ago"
            print(f"warning: {self.url(marker['step'])} is passed over: {reason}", file=sys.stderr)
        return None

    def load_latest(self):
        """The bytes of the newest checkpoint that is whole, or None; damaged ones are passed over
        with a warning."""
        path = self._first_whole(reversed(self.markers()))
        return path and path.read_bytes()

    def resolve(self, name: str) -> Path:
        """Local path of a checkpoint: "latest", "best", a step of this run, or a file, local or
        gs://.

        Of "latest" and "best" the first that is whole. Raises UserError if there is none.
        """
        if not is_of_run(name):
            return fetch_file(name, self.staging)
        if name in ("latest", "best"):
            wanted = self._best_first() if name == "best" else self.markers()[::-1]
        else:
            wanted = [marker for marker in self.markers() if marker["step"] == int(name)]
        path = self._first_whole(wanted)
        if path is None:
            steps = ", ".join(str(marker["step"]) for marker in self.markers())
            there = f"the steps there are: {steps}" if steps else "there is none yet: train first"
            raise UserError(
                f"--checkpoint {name}: there is no such checkpoint in {self.folder.url}: {there}; "
                "or give a file"
            )
        return path

    def _retire(self):
        """Delete what is not to be kept, and older payloads without a marker, which a save or a
        deletion that broke off has left."""
        markers = self.markers()
        keep = {m["step"] for m in markers[-self.keep_last_n :]}
        best = self.best_marker()
        keep.add(best["step"] if best else None)
        files, newest = self.folder.list(), markers[-1]["step"] if markers else 0
        payloads = [
            int(found[1])
            for name in files
            if (found := re.fullmatch(r"checkpoint_step_(\d+)\.pt", name))
        ]
        unmarked = [step for step in payloads if step < newest and marker_name(step) not in files]
        for step in [marker["step"] for marker in markers if marker["step"] not in keep] + unmarked:
            for name in (
                marker_name(step),
                payload_name(step),
            ):  # marker first: no moment offers a missing payload
                try:
                    self.folder.delete(name)
                except OSError as error:
                    print(
                        f"warning: {join(self.folder.url, name)} could not be deleted: {error}",
                        file=sys.stderr,
                    )
                    break


def is_of_run(name: str) -> bool:
    """Whether `name` stands for a checkpoint of a run, as CheckpointManager.resolve takes it."""
    return name in ("latest", "best") or name.isdecimal()


def payload_name(step: int) -> str:
    return f"checkpoint_step_{step}.pt"


def marker_name(step: int) -> str:
    return f"checkpoint_step_{step}.json"


def local_copy(folder, name, staging):
    """Local path of a file of `folder`: itself, or downloaded into `staging`."""
    if not is_remote(folder.url):
        return Path(folder.url) / name
    path = Path(staging) / name
    folder.get(name, path)
    return path


def fetch_file(url, staging):
    """Local path of the file at `url`: a local path as it is, a gs:// one downloaded into
    `staging`. UserError if there is none."""
    folder, name = os.path.split(url)
    try:
        # a folder for each URL: another process may fetch a file of the same name from elsewhere
        path = local_copy(
            open_folder(folder or "."), name, Path(staging) / digest(str(url).encode())[:16]
        )
    except FileNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(f"{url}: there is no such checkpoint")
    return path


def load_checkpoint(source, name=None):
    """The content of one checkpoint (path or bytes; this kit's, or weights of the original), on the
    CPU, weights_only=True.

    Raises UserError where it is missing, damaged, or holds anything but tensors and plain data.
    """
    try:
        return torch.load(
            io.BytesIO(source) if isinstance(source, bytes) else source,
            map_location="cpu",
            weights_only=True,
        )
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such checkpoint") from None
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything, KeyError and struct.error too
        reason = (str(error).strip().splitlines() or [""])[0]
        what = name or ("the newest checkpoint" if isinstance(source, bytes) else source)
        raise UserError(
            f"{what}: not a readable checkpoint ({type(error).__name__}: {reason}): "
            "it may be cut off, or hold more than tensors; take another one"
        ) from None


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
