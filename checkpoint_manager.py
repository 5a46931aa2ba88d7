"""Checkpoints that are whole or are not there: payload first, then the marker that makes it count.

checkpoints/checkpoint_step_{step}.pt     torch.save of plain tensors, numbers and text (weights_only=True loads it)
checkpoints/checkpoint_step_{step}.json   marker: step, bytes, sha256, evaluation metrics
"""

import hashlib
import io
import json
import os
import re
import secrets
import sys
from pathlib import Path

import torch

from storage import StorageError, digest, is_remote, join, open_folder
from utils import UserError

BEST_BY = "exact_accuracy"


class CheckpointManager:
    """Saves, finds, loads and retires the checkpoints of one run.

    folder: a folder of storage.py, local or gs://. keep_last_n: newest ones kept; the best by exact accuracy is kept
    besides. staging: local folder for files that are not in `folder` yet, on its disk if that is local.
    saver: storage.BackgroundSaver; where none is given, only looking and loading is possible.
    before_payload() and before_marker() are called before each is written; before_marker for what has to be in place when
    the checkpoint counts. Both may raise to prevent it.
    """

    def __init__(
        self,
        folder,
        keep_last_n,
        staging,
        saver=None,
        before_payload=lambda: None,
        before_marker=lambda: None,
    ):
        self.folder, self.keep_last_n, self.staging = folder, keep_last_n, Path(staging)
        self.saver, self.before_payload, self.before_marker = saver, before_payload, before_marker
        self.staged, self.unsaved = (
            None,
            None,
        )  # unsaved: the job of the last save, while the storage has not taken it

    def url(self, step):
        return join(self.folder.url, payload_name(step))

    def save(self, step, state):
        """Write `state` to the local disk, and from there to the folder as the checkpoint of `step`, while the caller goes
        on; waits for the save before to end. Old checkpoints are retired.

        A kill at any moment leaves the earlier checkpoints offered, and this one only if it is whole. Raises UserError
        where it cannot be written, or the save before could not.
        """
        # a name of its own: the save before may be of the same step, and under way
        staged, taken = self.staging / f".{payload_name(step)}.{secrets.token_hex(6)}.tmp", False
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            with open(staged, "wb") as file:
                torch.save(state, file)
            marker = {
                "step": step,
                "bytes": staged.stat().st_size,
                "sha256": _sha256(staged),
                "metrics": None,
            }
        except (OSError, RuntimeError) as error:
            staged.unlink(missing_ok=True)
            raise self._not_written(step, error) from None

        def job():
            nonlocal taken
            self.unsaved = job
            try:
                if not taken:  # otherwise an attempt before this one got as far as the marker
                    self.before_payload()
                    self.folder.delete(
                        marker_name(step)
                    )  # the marker of a damaged predecessor must not vouch for it
                    self.folder.take(staged, payload_name(step))
                    taken = True
                self.before_marker()
                self._mark(marker)
            except StorageError:
                raise
            except BaseException as error:
                self.unsaved = None
                staged.unlink(missing_ok=True)
                if not isinstance(error, OSError):
                    raise
                if marker_name(step) not in self.folder.list():
                    self.folder.delete(
                        payload_name(step)
                    )  # nobody would use it, and the disk may be full
                raise self._not_written(step, error) from None
            self.unsaved = None

        try:
            self.saver.submit(job)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        if self.staged:
            self.staged.unlink(missing_ok=True)  # of a save that was given up for this one
        self.staged = staged

    def _not_written(self, step, error):
        # torch reports a failed write as RuntimeError; the cause, where it has one, is the OSError in its context
        cause = error if isinstance(error, OSError) else error.__context__ or error
        return UserError(
            f"{self.url(step)}: the checkpoint could not be written ({cause}): free some space or set logging.output_dir; "
            f"{self.newest_text()}"
        )

    def add_metrics(self, step, metrics):
        """Note the evaluation of the checkpoint of `step` (a dict with exact_accuracy) in its marker, in the background."""

        def job():
            if self.unsaved:  # this job has taken its place in the saver
                self.unsaved()
            self.before_marker()
            marker = next((m for m in self.markers() if m["step"] == step), None)
            if (
                marker
            ):  # else its save was given up for a newer one while the storage was out of reach
                self._mark({**marker, "metrics": metrics})

        self.saver.submit(job)

    def metrics(self, step):
        """The evaluation noted for the checkpoint of `step`, or None."""
        return next((m["metrics"] for m in self.markers() if m["step"] == step), None)

    def _mark(self, marker):
        self.folder.write(marker_name(marker["step"]), json.dumps(marker).encode())
        self._retire()

    def markers(self):
        """Markers of the complete checkpoints, oldest first. One whose size is not the marker's is passed over."""
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
        """Local path of the first of these checkpoints whose checksum holds, or None; the others get a warning."""
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
        """The bytes of the newest checkpoint that is whole, or None; damaged ones are passed over with a warning."""
        path = self._first_whole(reversed(self.markers()))
        return path and path.read_bytes()

    def resolve(self, name):
        """Local path of "latest", "best" (each the first that is whole) or of a file, local or gs://. Raises UserError
        where there is none."""
        if name not in ("latest", "best"):
            return fetch_file(name, self.staging)
        path = self._first_whole(self._best_first() if name == "best" else reversed(self.markers()))
        if path is None:
            raise UserError(
                f"--checkpoint {name}: there is no such checkpoint in {self.folder.url}: give a file, or train first"
            )
        return path

    def _retire(self):
        """Delete what is not to be kept, and older payloads without a marker, which a save or a deletion that broke off has left."""
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


def payload_name(step):
    return f"checkpoint_step_{step}.pt"


def marker_name(step):
    return f"checkpoint_step_{step}.json"


def local_copy(folder, name, staging):
    """Local path of a file of `folder`: itself, or downloaded into `staging`."""
    if not is_remote(folder.url):
        return Path(folder.url) / name
    path = Path(staging) / name
    folder.get(name, path)
    return path


def fetch_file(url, staging):
    """Local path of the file at `url`: a local path as it is, a gs:// one downloaded into `staging`. UserError if there is none."""
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
    """The content of one checkpoint (path or bytes; this kit's, or weights of the original), on the CPU, weights_only=True.

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
