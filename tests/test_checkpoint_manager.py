"""Checkpoints: whole or not there, found again, retired, and never a way to run code."""
import contextlib
import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

import torch

from checkpoint_manager import CheckpointManager, load_checkpoint
from tests.helpers import ROOT, FolderTest


def some_state(step):
    return {"step": step, "model": {"a.weight": torch.full((3, 2), float(step)), "b": torch.tensor([True, False])}, "ema": None,
            "loader": {"step": step, "fingerprint": "abc"}, "list": [1, 2.5, (torch.arange(3, dtype=torch.int32),)],
            "half": torch.ones(2, dtype=torch.bfloat16)}


class CheckpointTest(FolderTest):
    def setUp(self):
        super().setUp()
        self.manager = CheckpointManager(self.folder / "checkpoints", 3)

    def saved(self, *steps):
        for step in steps:
            self.manager.save(step, some_state(step))

    def files(self):
        return sorted(path.name for path in self.manager.folder.iterdir())

    def names(self, *steps):
        return sorted(f"checkpoint_step_{step}.{end}" for step in steps for end in ("json", "pt"))

    def warned(self, function):
        """(result, what was printed to stderr)."""
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            result = function()
        return result, stderr.getvalue()

    def silent(self, function):
        result, warnings = self.warned(function)
        self.assertEqual(warnings, "")
        return result

    def same(self, one, other):
        self.assertIs(type(one), type(other))
        if isinstance(one, torch.Tensor):
            self.assertEqual(one.dtype, other.dtype)
            self.assertTrue(torch.equal(one, other))
        elif isinstance(one, dict):
            self.assertEqual(list(one), list(other))
            for key in one:
                self.same(one[key], other[key])
        elif isinstance(one, (list, tuple)):
            self.assertEqual(len(one), len(other))
            for a, b in zip(one, other):
                self.same(a, b)
        else:
            self.assertEqual(one, other)


class SavingAndFinding(CheckpointTest):
    def test_round_trip(self):
        self.assertIsNone(self.silent(self.manager.load_latest))
        self.assertEqual(self.manager.newest_text(), "there is no checkpoint yet")
        self.saved(10)
        self.same(self.silent(self.manager.load_latest), some_state(10))
        self.assertEqual(self.files(), self.names(10))
        self.same(torch.load(self.manager.path(10), weights_only=True), some_state(10))
        self.assertIn(str(self.manager.path(10)), self.manager.newest_text())

    def test_latest_is_by_step_and_saving_again_replaces(self):
        self.saved(9, 10, 100)
        self.assertEqual(self.manager.load_latest()["step"], 100)
        self.manager.save(100, {"step": 100, "second": True})
        self.assertEqual(self.manager.load_latest(), {"step": 100, "second": True})
        # a manager made later, as after a restart, sees the same
        self.assertEqual(CheckpointManager(self.manager.folder, 1).load_latest(), {"step": 100, "second": True})

    def test_metrics(self):
        self.saved(1, 2)
        self.assertIsNone(self.manager.metrics(1))
        self.assertIsNone(self.manager.best_marker())
        self.manager.add_metrics(1, {"exact_accuracy": 0.5, "count": 7})
        self.assertEqual(self.manager.metrics(1), {"exact_accuracy": 0.5, "count": 7})
        self.assertIsNone(self.manager.metrics(2))
        self.assertIsNone(self.manager.metrics(3))
        self.assertEqual(self.manager.load_latest()["step"], 2)

    def test_resolve(self):
        self.user_error(lambda: self.manager.resolve("latest"), "--checkpoint latest", str(self.manager.folder), "train first")
        self.saved(1, 2, 3)
        self.user_error(lambda: self.manager.resolve("best"), "--checkpoint best", str(self.manager.folder))
        self.assertEqual(self.manager.resolve("latest"), self.manager.path(3))
        for step, accuracy in ((1, 0.7), (2, 0.7), (3, 0.6)):
            self.manager.add_metrics(step, {"exact_accuracy": accuracy})
        self.assertEqual(self.manager.resolve("best"), self.manager.path(2))       # of equals the later
        self.assertEqual(self.manager.resolve("some/file.pt"), Path("some/file.pt"))

    def test_retention_keeps_the_last_and_the_best(self):
        for step, accuracy in ((1, 0.2), (2, 0.9), (3, 0.3), (4, None), (5, 0.9), (6, 0.1), (7, 0.2), (8, 0.3), (9, None)):
            self.saved(step)
            if accuracy:
                self.manager.add_metrics(step, {"exact_accuracy": accuracy})
            if step == 4:
                self.assertEqual(self.files(), self.names(2, 3, 4))
            if step == 6:
                self.assertEqual(self.files(), self.names(4, 5, 6))
        self.assertEqual(self.files(), self.names(5, 7, 8, 9))
        self.assertEqual(self.manager.resolve("best"), self.manager.path(5))
        self.manager.add_metrics(9, {"exact_accuracy": 1.0})
        self.assertEqual(self.files(), self.names(7, 8, 9))

    def test_a_failed_delete_does_not_end_retention(self):
        self.saved(1, 2, 3)
        unlink = Path.unlink

        def stubborn(path, missing_ok=False):
            if path.name == "checkpoint_step_1.json":
                raise PermissionError(13, "Permission denied")
            unlink(path, missing_ok=missing_ok)
        with mock.patch.object(Path, "unlink", stubborn):
            _, warnings = self.warned(lambda: self.saved(4, 5))
        self.assertIn("checkpoint_step_1.json could not be deleted", warnings)
        # 2 went although 1 would not; 1 is still whole, marker and payload
        self.assertEqual(self.files(), self.names(1, 3, 4, 5))
        self.assertEqual([m["step"] for m in self.silent(self.manager.markers)], [1, 3, 4, 5])
        self.saved(6)
        self.assertEqual(self.files(), self.names(4, 5, 6))


class Damage(CheckpointTest):
    """The newest of two checkpoints is damaged: the one before is taken, and a warning names the damaged file."""

    def setUp(self):
        super().setUp()
        self.saved(1, 2)
        self.payload = self.manager.path(2)
        self.marker = self.payload.with_suffix(".json")

    def passed_over(self, *says):
        for function in (lambda: self.manager.load_latest()["step"], lambda: int(self.manager.resolve("latest").stem.split("_")[-1])):
            step, warnings = self.warned(function)
            self.assertEqual(step, 1)
            for text in says:
                self.assertIn(text, warnings)
            self.assertEqual(warnings.count("\n"), 1 if says else 0, warnings)

    def test_marker_missing(self):
        self.marker.unlink()
        self.passed_over()      # killed between payload and marker: never was a checkpoint

    def test_marker_broken(self):
        good = json.loads(self.marker.read_text())
        without = [json.dumps({k: v for k, v in good.items() if k != key}) for key in good]
        for text in ("", "{", "[]", "5", "null", json.dumps({**good, "step": None}), *without):
            with self.subTest(text):
                self.marker.write_text(text)
                self.passed_over(f"warning: {self.marker} is passed over: ")

    def test_payload_missing(self):
        self.payload.unlink()
        self.passed_over(f"warning: {self.marker} is passed over: ", "No such file")

    def test_size_mismatch(self):
        size = self.payload.stat().st_size
        os.truncate(self.payload, size - 1)
        self.passed_over(f"warning: {self.payload} is passed over: it has {size - 1} bytes, its marker says {size}")
        self.assertIn(str(self.manager.path(1)), self.warned(self.manager.newest_text)[0])

    def test_checksum_mismatch(self):
        content = bytearray(self.payload.read_bytes())
        content[len(content) // 2] ^= 1
        self.payload.write_bytes(content)
        self.passed_over(f"warning: {self.payload} is passed over: ", "checksum")

    def test_a_damaged_best_gives_the_next_best(self):
        for step, accuracy in ((1, 0.5), (2, 0.9)):
            self.manager.add_metrics(step, {"exact_accuracy": accuracy})
        self.assertEqual(self.silent(lambda: self.manager.resolve("best")), self.payload)
        content = self.payload.read_bytes()
        self.payload.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found, warnings = self.warned(lambda: self.manager.resolve("best"))
        self.assertEqual(found, self.manager.path(1))
        self.assertIn("checksum", warnings)

    def test_leftovers_of_a_kill(self):
        (self.manager.folder / "checkpoint_step_3.pt.tmp").write_bytes(b"half")
        (self.manager.folder / ".checkpoint_step_3.json.tmp").write_text("{")
        (self.manager.folder / "checkpoint_step_3.pt").write_bytes(b"no marker")
        (self.manager.folder / "checkpoint_step_best.json").write_text("{}")
        self.assertEqual(self.silent(self.manager.load_latest)["step"], 2)
        self.saved(3)
        self.assertEqual(self.silent(self.manager.load_latest)["step"], 3)
        self.assertFalse(list(self.manager.folder.glob("*.tmp")) + list(self.manager.folder.glob(".*.tmp")))

    def test_killed_at_every_step_of_saving(self):
        """A kill, here an exception nobody catches, before the k-th rename, sync or deletion: 2 or 3 is there, whole."""
        class Killed(BaseException):
            pass
        seen = set()
        for kill_at in range(1, 20):
            calls = []

            def deadly(function):
                def call(*args, **kwargs):
                    calls.append(function)
                    if len(calls) == kill_at:
                        raise Killed
                    return function(*args, **kwargs)
                return call
            manager = CheckpointManager(self.folder / f"run{kill_at}", 1)
            manager.save(2, some_state(2))
            with mock.patch.object(os, "fsync", deadly(os.fsync)), mock.patch.object(os, "replace", deadly(os.replace)), \
                    mock.patch.object(Path, "unlink", deadly(Path.unlink)):
                try:
                    manager.save(3, some_state(3))
                    done = True
                except Killed:
                    done = False
            found = self.silent(manager.load_latest)["step"]
            seen.add(found)
            self.same(manager.load_latest(), some_state(found))
            manager.save(3, some_state(3))          # the resumed run gets there again
            self.assertEqual(self.silent(manager.load_latest)["step"], 3)
            if done:
                break
        self.assertTrue(done)
        self.assertGreater(kill_at, 5)
        self.assertEqual(seen, {2, 3})


class Malice(CheckpointTest):
    def test_a_pickle_that_runs_code_is_refused(self):
        evil = self.folder / "evil.pt"
        target = self.folder / "owned"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(target),)
        for write in (lambda: torch.save({"model": Evil()}, evil), lambda: evil.write_bytes(pickle.dumps({"model": Evil()}, protocol=2)),
                      lambda: torch.save({"model": Evil()}, evil, _use_new_zipfile_serialization=False)):
            write()
            self.user_error(lambda: load_checkpoint(evil), f"{evil}: not a readable checkpoint", "more than tensors", "take another one")
            self.assertFalse(target.exists())
        torch.load(evil, weights_only=False)        # the file would have done it
        self.assertTrue(target.exists())

    def test_files_that_are_no_checkpoint(self):
        path = self.folder / "file.pt"
        self.user_error(lambda: load_checkpoint(path), f"{path}: there is no such checkpoint")
        self.user_error(lambda: load_checkpoint(self.folder), f"{self.folder}: not a readable checkpoint")
        stream = random.Random(0)
        for legacy in (False, True):
            torch.save(some_state(1), path, _use_new_zipfile_serialization=not legacy)
            whole = path.read_bytes()
            for _ in range(40):
                path.write_bytes(whole[:stream.randrange(len(whole) - 100)])
                message = self.user_error(lambda: load_checkpoint(path), f"{path}: not a readable checkpoint (")
                self.assertNotIn("\n", message)
        for content in (b"", b"hello", b"\x80\x02}q\x00."):
            path.write_bytes(content)
            self.user_error(lambda: load_checkpoint(path), f"{path}: not a readable checkpoint (")


class FullDisk(CheckpointTest):
    def test_a_write_that_fails(self):
        """A limit on file size fails in write() as a full disk does; the checkpoint before stays, nothing half is left."""
        self.saved(1)
        code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from checkpoint_manager import CheckpointManager
from utils import run_cli
def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
    CheckpointManager({str(self.manager.folder)!r}, 3).save(2, {{"model": torch.ones(100_000)}})
run_cli(main)
"""
        for limit in (0, 1, 5_000, 399_000):        # the first byte, the header, the middle of the tensor, its end
            run = subprocess.run([sys.executable, "-c", code, str(limit)], capture_output=True, text=True)
            self.assertEqual(run.returncode, 2, run.stderr)
            error = run.stderr.strip().splitlines()[-1]
            for text in ("error: ", f"{self.manager.path(2)}: the checkpoint could not be written", "File too large", "free some space",
                         "logging.output_dir", f"the last good checkpoint is {self.manager.path(1)}"):
                self.assertIn(text, error)
            self.assertNotIn("Traceback", run.stderr)
            self.assertEqual(self.files(), self.names(1))
        self.assertEqual(self.silent(self.manager.load_latest)["step"], 1)

    def test_no_space_at_any_write(self):
        """Payload, marker and folder are each brought to the disk once; the disk may be full at any of them."""
        self.saved(1)
        for at, kept in ((1, []), (2, []), (3, [2])):
            calls = []

            def full(handle):
                calls.append(handle)
                if len(calls) == at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self.subTest(at), mock.patch.object(os, "fsync", full):
                self.user_error(lambda: self.manager.save(2, some_state(2)), f"{self.manager.path(2)}: the checkpoint could not be written",
                                "No space left", "the last good checkpoint is")
                self.assertEqual(self.files(), self.names(1, *kept))
        self.same(self.silent(self.manager.load_latest), some_state(2))


if __name__ == "__main__":
    unittest.main()
