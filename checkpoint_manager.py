"""Checkpoints that are whole or are not there: payload first, then the marker that makes it count.

    checkpoints/checkpoint_step_{step}.pt     torch.save of plain tensors, numbers and text (weights_only=True loads it)
    checkpoints/checkpoint_step_{step}.json   marker: step, bytes, sha256, evaluation metrics
"""
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch

from utils import UserError, replace_file

BEST_BY = "exact_accuracy"


class CheckpointManager:
    """Saves, finds, loads and retires the checkpoints of one run.

    folder: made when the first one is saved. keep_last_n: newest ones kept; the best by exact accuracy is kept besides.
    """

    def __init__(self, folder, keep_last_n):
        self.folder, self.keep_last_n = Path(folder), keep_last_n

    def path(self, step):
        return self.folder / f"checkpoint_step_{step}.pt"

    def save(self, step, state):
        """Write `state` as the checkpoint of `step`, then retire old ones.

        A kill at any moment leaves the earlier checkpoints offered, and this one only if it is whole.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        temporary, marker_path = path.with_suffix(".pt.tmp"), path.with_suffix(".json")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            marker_path.unlink(missing_ok=True)     # the marker of a damaged predecessor must not vouch for it
            os.replace(temporary, path)
            self._mark({"step": step, "bytes": path.stat().st_size, "sha256": _sha256(path), "metrics": None})
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as RuntimeError; the cause, where it has one, is the OSError in its context
            temporary.unlink(missing_ok=True)
            if not marker_path.exists():
                path.unlink(missing_ok=True)        # nobody would use it, and the disk may be full
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(f"{path}: the checkpoint could not be written ({cause}): free some space or set logging.output_dir; "
                            f"{self.newest_text()}") from None

    def add_metrics(self, step, metrics):
        """Note the evaluation of the checkpoint of `step` (a dict with exact_accuracy) in its marker."""
        marker = next(m for m in self.markers() if m["step"] == step)
        self._mark({**marker, "metrics": metrics})

    def metrics(self, step):
        """The evaluation noted for the checkpoint of `step`, or None."""
        return next((m["metrics"] for m in self.markers() if m["step"] == step), None)

    def _mark(self, marker):
        replace_file(self.path(marker["step"]).with_suffix(".json"), json.dumps(marker))
        _sync_folder(self.folder)
        self._retire()

    def markers(self):
        """Markers of the complete checkpoints, oldest first. One whose size is not the marker's is passed over."""
        found = []
        for path in self.folder.glob("checkpoint_step_*.json"):
            if not re.fullmatch(r"checkpoint_step_\d+", path.stem):
                continue
            try:
                marker = json.loads(path.read_text())
                payload = self.path(marker["step"])
                size, written = payload.stat().st_size, marker["bytes"]
                marker["sha256"], marker["metrics"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"warning: {path} is passed over: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            if size != written:
                print(f"warning: {payload} is passed over: it has {size} bytes, its marker says {written}", file=sys.stderr)
                continue
            found.append(marker)
        return sorted(found, key=lambda marker: marker["step"])

    def newest_text(self):
        """For messages: where the last good checkpoint is."""
        markers = self.markers()
        return f"the last good checkpoint is {self.path(markers[-1]['step'])}" if markers else "there is no checkpoint yet"

    def best_marker(self):
        """The marker with the highest exact accuracy (the later one of equals), or None."""
        return next(iter(self._best_first()), None)

    def _best_first(self):
        scored = [m for m in self.markers() if m["metrics"]]
        return sorted(scored, key=lambda m: (m["metrics"][BEST_BY], m["step"]), reverse=True)

    def _first_whole(self, markers):
        """Path of the first of these checkpoints whose checksum holds, or None; the others get a warning."""
        for marker in markers:
            path = self.path(marker["step"])
            if _sha256(path) == marker["sha256"]:
                return path
            print(f"warning: {path} is passed over: its content is not what was written (checksum)", file=sys.stderr)
        return None

    def load_latest(self):
        """The newest checkpoint that is whole, or None; damaged ones are passed over with a warning."""
        path = self._first_whole(reversed(self.markers()))
        return path and load_checkpoint(path)

    def resolve(self, name):
        """Path of "latest", "best" (each the first that is whole) or of a file. Raises UserError where there is none."""
        if name not in ("latest", "best"):
            return Path(name)
        path = self._first_whole(self._best_first() if name == "best" else reversed(self.markers()))
        if path is None:
            raise UserError(f"--checkpoint {name}: there is no such checkpoint in {self.folder}: give a file, or train first")
        return path

    def _retire(self):
        markers = self.markers()
        keep = {m["step"] for m in markers[-self.keep_last_n:]}
        best = self.best_marker()
        keep.add(best["step"] if best else None)
        for marker in markers:
            if marker["step"] not in keep:
                path = self.path(marker["step"])
                for file in (path.with_suffix(".json"), path):      # marker first: no moment offers a missing payload
                    try:
                        file.unlink(missing_ok=True)
                    except OSError as error:
                        print(f"warning: {file} could not be deleted: {error}", file=sys.stderr)
                        break


def load_checkpoint(path):
    """The content of one checkpoint file (this kit's, or weights of the original), on the CPU, weights_only=True.

    Raises UserError where it is missing, damaged, or holds anything but tensors and plain data.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except Exception as error:      # bytes that are no checkpoint make the unpickler raise anything, KeyError and struct.error too
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason}): "
                        "it may be cut off, or hold more than tensors; take another one") from None


def _sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
