"""The checkpoints of a run. Each one is complete, or it does not count.

    checkpoints/checkpoint_step_{step}.pt     the payload: torch.save of tensors and plain data,
                                              which weights_only=True loads
    checkpoints/checkpoint_step_{step}.json   the marker: step, bytes, sha256, metrics

The marker is written after the payload, and a payload without a marker does not count.
"""

import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from background_writer import BackgroundWriter
from storage import StorageError, digest, is_remote, join, open_folder
from utils import UserError, sha256_of, warn

BEST_BY = "exact_accuracy"


class CheckpointManager:
    """Saves, finds, loads and deletes the checkpoints of one run.

    folder: a folder of storage.py, local or gs://. keep_last_n: how many of the newest checkpoints
    are kept; the best by exact accuracy is kept as well. staging: a local folder for files that are
    not in `folder` yet, on the same file system if `folder` is local. writer: runs the saves in its
    thread; None if checkpoints are only read.
    before_payload: called before the payload is written. before_marker: called before a marker is
    written, to write what must be in the run's folder when the checkpoint counts. If one of them
    raises, the checkpoint does not count.
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
        """Where the payload of a step is."""
        return join(self.folder.url, payload_name(step))

    # ----- write -----
    def save(self, step: int, state: dict[str, Any] | None) -> None:
        """Write `state` to the local disk, and from there to the folder in the background.

        state: of tensors and plain data, what TrainState.state_dict returns on rank 0. Waits until
        the save before this one has ended. Checkpoints that are not to be kept are deleted in the
        background, once this one is complete.

        If the process is killed at any moment, the earlier checkpoints stay as they were, and this
        one counts only if it is complete. Raises UserError if this checkpoint, or the one before,
        cannot be written, and what BackgroundWriter.submit_newest raises.
        """
        assert self.writer
        # A unique name: the save before may be of the same step, and still running.
        staged = self.staging / f".{payload_name(step)}.{secrets.token_hex(6)}.tmp"
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            with open(staged, "wb") as file:
                torch.save(state, file)
            job = _Save(self, step, staged)
        except (OSError, RuntimeError) as error:
            staged.unlink(missing_ok=True)
            raise self.not_written(step, error) from None
        try:
            dropped = self.writer.submit_newest(job)
        except BaseException:
            job.abandon()
            raise
        for old in dropped:
            if isinstance(old, _Save):
                old.abandon()

    def not_written(self, step: int, error: BaseException) -> UserError:
        """The error to raise if the checkpoint of `step` cannot be written."""
        # torch reports a failed write as RuntimeError. Its __context__ may be the OSError.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        return UserError(
            f"{self.url(step)}: the checkpoint could not be written ({cause}): free some space or "
            f"set logging.output_dir; {self.newest_text()}"
        )

    def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the evaluation of a checkpoint into its marker, in the background.

        metrics: at least exact_accuracy.
        """
        assert self.writer

        def job():
            self.before_marker()
            # There is no marker if the save was dropped for a newer one.
            for marker in self.markers():
                if marker["step"] == step:
                    self.mark({**marker, "metrics": metrics})

        self.writer.submit(job)

    def mark(self, marker: dict[str, Any]) -> None:
        """Write the marker of a checkpoint, so that it counts, and delete what is not to be kept.

        Also deletes older payloads without a marker, which an interrupted save or deletion has
        left.
        """
        self.folder.write(marker_name(marker["step"]), json.dumps(marker).encode())
        markers, files = self.markers(), self.folder.list()
        keep = {m["step"] for m in markers[-self.keep_last_n :]}
        if best := self.best_marker():
            keep.add(best["step"])
        steps = [m["step"] for m in markers if m["step"] not in keep]
        for name in files:
            found = re.fullmatch(r"checkpoint_step_(\d+)\.pt", name)
            if found and markers and marker_name(int(found[1])) not in files:
                # a later payload may belong to a save that is about to write its marker
                steps += [int(found[1])] if int(found[1]) < markers[-1]["step"] else []
        for step in steps:
            # The marker first: at no moment does a marker lack its payload.
            for name in (marker_name(step), payload_name(step)):
                try:
                    self.folder.delete(name)
                except OSError as error:
                    warn(f"{join(self.folder.url, name)} could not be deleted: {error}")
                    break

    # ----- find -----
    def markers(self) -> list[dict[str, Any]]:
        """The markers of the complete checkpoints, oldest first.

        A marker is {"step": int, "bytes": int, "sha256": str, "metrics": dict or None}. bytes and
        sha256 are of the payload. metrics is the evaluation, with at least exact_accuracy.

        Markers that are damaged or do not fit their payload are left out with a warning.
        """
        found, sizes = [], self.folder.list()
        for name in sizes:
            if not re.fullmatch(r"checkpoint_step_\d+\.json", name):
                continue
            try:
                marker = json.loads(self.folder.read(name))
                _check_marker(marker, name, sizes)
            except StorageError:
                raise
            except FileNotFoundError:  # deleted since it was listed
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                url = join(self.folder.url, name)
                warn(f"{url} is ignored: {type(error).__name__}: {error}")
                continue
            found.append(marker)
        return sorted(found, key=lambda marker: marker["step"])

    def metrics(self, step: int) -> dict[str, Any] | None:
        """The evaluation of the checkpoint of `step`, or None."""
        return next((m["metrics"] for m in self.markers() if m["step"] == step), None)

    def newest_text(self) -> str:
        """The part of a message that says where the last good checkpoint is."""
        try:
            markers = self.markers()
        except StorageError as error:  # the message that this is a part of matters more
            return f"the last good checkpoint could not be looked up ({error})"
        if not markers:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.url(markers[-1]['step'])}"

    def best_marker(self) -> dict[str, Any] | None:
        """The marker with the highest exact accuracy, or None. Among equals it is the latest."""
        return next(iter(self._best_first()), None)

    def _best_first(self):
        scored = [m for m in self.markers() if m["metrics"]]
        return sorted(scored, key=lambda m: (m["metrics"][BEST_BY], m["step"]), reverse=True)

    # ----- read -----
    def load_latest(self) -> bytes | None:
        """The payload of the newest complete checkpoint, for load_checkpoint, or None.

        Prints a warning for each damaged one. Raises StorageError if the storage does not answer.
        """
        path = self._first_complete(reversed(self.markers()))
        return path.read_bytes() if path else None

    def resolve(self, name: str) -> Path:
        """The local path of a checkpoint.

        name: "latest", "best", a step of this run, or a file, local or gs://. If the latest or the
        best one is damaged, the next one is taken, with a warning. Raises UserError if there is
        none.
        """
        if not is_of_run(name):
            return fetch_file(name, self.staging)
        if name in ("latest", "best"):
            wanted = self._best_first() if name == "best" else self.markers()[::-1]
        else:
            wanted = [marker for marker in self.markers() if marker["step"] == int(name)]
        path = self._first_complete(wanted)
        if path is None:
            steps = ", ".join(str(marker["step"]) for marker in self.markers())
            there = f"the steps there are: {steps}" if steps else "there is none yet: train first"
            raise UserError(
                f"--checkpoint {name}: there is no such checkpoint in {self.folder.url}: {there}; "
                "or give a file"
            )
        return path

    def _first_complete(self, markers: Iterable[dict[str, Any]]) -> Path | None:
        """The local path of the first checkpoint whose checksum is right, or None.

        Prints a warning for each one before it.
        """
        for marker in markers:
            reason = "its content is not what was written (checksum)"
            try:
                path = local_copy(self.folder, payload_name(marker["step"]), self.staging)
                if sha256_of(path) == marker["sha256"]:
                    return path
            except FileNotFoundError:
                reason = "it was deleted a moment ago"
            warn(f"{self.url(marker['step'])} is ignored: {reason}")
        return None


class _Save:
    """The job that brings one checkpoint from the local disk to the folder.

    It may be called again after a StorageError.
    """

    def __init__(self, manager: CheckpointManager, step: int, staged: Path):
        self.manager, self.step, self.staged = manager, step, staged
        self.marker = {
            "step": step,
            "bytes": staged.stat().st_size,
            "sha256": sha256_of(staged),
            "metrics": None,
        }
        self.payload_is_there = False  # a second call does not write it again

    def __call__(self) -> None:
        manager, step = self.manager, self.step
        try:
            if not self.payload_is_there:
                manager.before_payload()
                # The marker of a damaged payload of this step must not count for the new one.
                manager.folder.delete(marker_name(step))
                manager.folder.take(self.staged, payload_name(step))
                self.payload_is_there = True
            manager.before_marker()
            manager.mark(self.marker)
        except StorageError:
            raise
        except BaseException as error:
            self.abandon()
            if not isinstance(error, OSError):
                raise
            if marker_name(step) not in manager.folder.list():
                # Nobody would use the payload, and the disk may be full.
                manager.folder.delete(payload_name(step))
            raise manager.not_written(step, error) from None

    def abandon(self) -> None:
        self.staged.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Names and files
# --------------------------------------------------------------------------------------------------
def is_of_run(name: str) -> bool:
    """Whether CheckpointManager.resolve takes `name` for a checkpoint of the run, not a file."""
    return name in ("latest", "best") or name.isdecimal()


def payload_name(step: int) -> str:
    return f"checkpoint_step_{step}.pt"


def marker_name(step: int) -> str:
    return f"checkpoint_step_{step}.json"


def _check_marker(marker: dict[str, Any], name: str, sizes: dict[str, int]) -> None:
    """Raises ValueError, KeyError or TypeError unless a marker fits its name and its payload.

    sizes: {file of the folder: its bytes}.
    """
    step, size, _, metrics = (marker[key] for key in ("step", "bytes", "sha256", "metrics"))
    if type(step) is not int or marker_name(step) != name:
        raise ValueError(f"its step is {step!r}")
    payload = payload_name(step)
    if payload not in sizes:
        raise ValueError(f"there is no {payload}")
    if metrics is not None:
        float(metrics[BEST_BY])
    if sizes[payload] != size:
        raise ValueError(f"{payload} has {sizes[payload]} bytes, the marker says {size}")


def local_copy(folder, name: str, staging: str | Path) -> Path:
    """The local path of a file of `folder`: the file itself, or a download in `staging`."""
    if not is_remote(folder.url):
        return Path(folder.url) / name
    path = Path(staging) / name
    folder.get(name, path)
    return path


def fetch_file(url: str, staging: str | Path) -> Path:
    """The local path of the file at `url`, which is a path or a gs:// URL.

    A gs:// file is downloaded into `staging`. Raises UserError if there is none.
    """
    folder, name = os.path.split(url)
    # A folder for each URL: another process may download a file of the same name from elsewhere.
    downloads = Path(staging) / digest(str(url).encode())[:16]
    try:
        path = local_copy(open_folder(folder or "."), name, downloads)
    except FileNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(f"{url}: there is no such checkpoint")
    return path


def load_checkpoint(source: str | Path | bytes, name: str | None = None) -> dict[str, Any]:
    """The content of one checkpoint, on the CPU, loaded with weights_only=True.

    source: a path or the bytes, of this kit's checkpoint or of the original's weights. name: what
    messages call it. Raises UserError if it is missing or damaged, or holds anything but tensors
    and plain data.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{source!s}: there is no such checkpoint") from None
    except Exception as error:  # on damaged bytes the unpickler may raise any exception
        reason = (str(error).strip().splitlines() or [""])[0]
        what = name or ("the newest checkpoint" if isinstance(source, bytes) else source)
        raise UserError(
            f"{what}: not a readable checkpoint ({type(error).__name__}: {reason}): "
            "it may be cut off, or hold more than tensors; take another one"
        ) from None
