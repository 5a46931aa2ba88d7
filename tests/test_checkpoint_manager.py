"""Checkpoints: whole or not there, found again, retired, and never a way to run code; in a local
folder and in a bucket."""

import contextlib
import errno
import io
import json
import os
import pickle
import random
import re
import signal
import sys
import threading
import unittest
from pathlib import Path
from unittest import mock

import torch

import storage
from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager, fetch_file, load_checkpoint
from storage import StorageError, join, open_folder
from tests.gcs_server import BUCKET, Fault, GCSTest, Handler
from tests.helpers import WITH_KIT, FolderTest
from tests.processes import begin, run
from utils import RunFailure


def some_state(step):
    weight = torch.nn.Parameter(torch.full((3, 2), float(step)))
    return {
        "step": step,
        "model": {"a.weight": weight.detach(), "b": torch.tensor([True, False])},
        "ema": None,
        "loader": {"step": step, "fingerprint": "abc"},
        "list": [1, 2.5, (torch.arange(3, dtype=torch.int32),)],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(step),
        "empty": torch.empty(0, 4),
        "view": torch.arange(12.0).view(3, 4).T[1:],
        "bytes": torch.arange(256).to(torch.uint8),
    }


class Local(FolderTest):
    """A run in a local folder."""

    deadly = (
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (Path, "unlink"),
    )  # what brings a save a step on
    limits = (
        0,
        1,
        5_000,
        399_000,
    )  # of a file's size: the first byte, the header, the middle of the tensor, its end

    def setUp(self):
        super().setUp()
        self.url = str(self.folder / "run")

    def staging(self, url):
        return Path(url)

    def files(self):
        return sorted(os.listdir(self.manager.folder.url))  # what is hidden, too

    @contextlib.contextmanager
    def undeletable(self, name):
        unlink = Path.unlink

        def stubborn(path, missing_ok=False):
            if path.name == name:
                raise PermissionError(13, "Permission denied")
            unlink(path, missing_ok=missing_ok)

        with mock.patch.object(Path, "unlink", stubborn):
            yield


class GCS(GCSTest):
    """A run in a bucket."""

    deadly = ((storage.GCSFolder, "_call"), (os, "unlink"), (Path, "unlink"))
    limits = (0, 5_000)

    def setUp(self):
        super().setUp()
        # the waits between attempts are the library's; here they are short
        patch = mock.patch(
            "google.api_core.retry.retry_base.random.uniform", lambda low, high: 0.02
        )
        patch.start()
        self.addCleanup(patch.stop)

    def staging(self, url):
        return self.folder / "staging" / url.rpartition("/")[2]

    def files(self):
        return sorted(self.manager.folder.list())

    @contextlib.contextmanager
    def undeletable(self, name):
        self.manager.folder.deadline = 0.2
        fault = self.proxy.fail("status", 503, times=9999, method="DELETE", path=re.escape(name))
        yield
        self.assertLess(fault.times, 9999)
        fault.times = 0


class CheckpointTest:
    def setUp(self):
        super().setUp()
        self.manager = self.open()

    def open(self, keep_last_n=3, name="checkpoints"):
        """A manager of its own, as another process would have it."""
        url = join(self.url, name)
        # a save that failed is tried again when a test says so
        return CheckpointManager(
            open_folder(url, deadline=10),
            keep_last_n,
            self.staging(url),
            BackgroundWriter(retry_seconds=9999),
        )

    def saved(self, *steps):
        for step in steps:
            self.manager.save(step, some_state(step))
            self.manager.writer.finish()
            self.assertEqual(self.staged(), [])

    def noted(self, step, accuracy):
        self.manager.add_metrics(step, {"exact_accuracy": accuracy})
        self.manager.writer.finish()

    def attempted(self):
        """Wait until the saver has nothing under way."""
        with self.manager.writer.changed:
            self.assertTrue(
                self.manager.writer.changed.wait_for(
                    lambda: self.manager.writer.storage_error or not self.manager.writer.jobs, 30
                )
            )

    @contextlib.contextmanager
    def held(self):
        """A save begun in the block gets no further than its first look at the folder until the
        block ends, or the event is set."""
        go_on, delete = threading.Event(), self.manager.folder.delete

        def wait(*args):
            assert go_on.wait(30)
            delete(*args)

        with mock.patch.object(self.manager.folder, "delete", wait):
            try:
                yield go_on
            finally:
                go_on.set()
                self.attempted()

    def staged(self):
        return sorted(path.name for path in self.manager.staging.glob(".*"))

    def names(self, *steps):
        return sorted(f"checkpoint_step_{step}.{end}" for step in steps for end in ("json", "pt"))

    def local(self, step):
        """Where resolve says that the checkpoint of `step` is."""
        return self.manager.staging / f"checkpoint_step_{step}.pt"

    def load(self, manager=None):
        """The newest checkpoint that another process would find."""
        content = (manager or self.open()).load_latest()
        return None if content is None else load_checkpoint(content)

    def warned(self, function):
        """(result, what was printed to stderr)."""
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            result = function()
        return result, stderr.getvalue()

    def silent(self, function):
        result, warnings = self.warned(function)
        self.assertEqual(warnings, "")
        return result

    def newest(self, step):
        """The checkpoint of `step` is the newest that is offered, it is whole, and nothing damaged
        is offered."""
        self.same(self.silent(self.load), some_state(step))

    def same(self, one, other):
        self.assertIs(type(one), type(other))
        if isinstance(one, torch.Tensor):
            self.assertEqual((one.dtype, one.requires_grad), (other.dtype, other.requires_grad))
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

    def saving(self):
        """The command that saves the checkpoint of step 2 where this test's manager would."""
        program = "tests/programs/save_checkpoint.py"
        return [sys.executable, program, self.manager.folder.url, self.manager.staging]


class SavingAndFinding(CheckpointTest):
    def test_round_trip(self):
        self.assertIsNone(self.silent(self.manager.load_latest))
        self.assertEqual(self.manager.newest_text(), "there is no checkpoint yet")
        self.saved(10)
        self.same(self.silent(lambda: self.load(self.manager)), some_state(10))
        self.assertEqual(self.files(), self.names(10))
        self.same(
            torch.load(
                io.BytesIO(self.manager.folder.read("checkpoint_step_10.pt")), weights_only=True
            ),
            some_state(10),
        )
        self.assertEqual(
            self.manager.url(10), join(self.manager.folder.url, "checkpoint_step_10.pt")
        )
        self.assertIn(self.manager.url(10), self.manager.newest_text())

    def test_latest_is_by_step_and_saving_again_replaces(self):
        self.saved(9, 10, 100)
        self.assertEqual(self.load()["step"], 100)
        self.manager.save(100, {"step": 100, "second": True})
        self.manager.writer.finish()
        self.assertEqual(self.silent(self.load), {"step": 100, "second": True})
        self.assertEqual(
            self.silent(lambda: self.load(self.open(keep_last_n=1))), {"step": 100, "second": True}
        )

    def test_saving_the_same_step_while_its_save_is_under_way(self):
        with self.held() as go_on:
            self.manager.save(1, some_state(1))
            submit = self.manager.writer.submit_newest
            with mock.patch.object(
                self.manager.writer, "submit_newest", lambda job: (go_on.set(), submit(job))
            ):  # staged, and not submitted yet
                self.manager.save(1, {"step": 1, "second": True})
        self.assertEqual(self.silent(self.load), {"step": 1, "second": True})
        with self.held():  # the first one's file is gone long since: not to be tidied up now
            self.manager.save(1, {"step": 1, "third": True})
        self.manager.writer.finish()
        self.assertEqual(self.silent(self.load), {"step": 1, "third": True})
        self.assertEqual((self.files(), self.staged()), (self.names(1), []))

    def test_training_goes_on_while_it_is_saved(self):
        self.saved(1)
        state = some_state(2)
        with self.held():
            self.manager.save(2, state)
            state["model"]["a.weight"].fill_(99)
            state["loader"]["step"] = 99
            self.newest(1)
        self.newest(2)

    def test_metrics(self):
        self.saved(1, 2)
        self.assertIsNone(self.manager.metrics(1))
        self.assertIsNone(self.manager.best_marker())
        self.manager.add_metrics(1, {"exact_accuracy": 0.5, "count": 7})
        self.manager.writer.finish()
        self.assertEqual(self.open().metrics(1), {"exact_accuracy": 0.5, "count": 7})
        self.assertIsNone(self.manager.metrics(2))
        self.assertIsNone(self.manager.metrics(3))
        self.noted(3, 0.9)  # there is no such checkpoint: nothing to note it in
        self.assertEqual(self.files(), self.names(1, 2))
        self.newest(2)

    def test_resolve(self):
        self.user_error(
            lambda: self.manager.resolve("latest"),
            "--checkpoint latest",
            self.manager.folder.url,
            "train first",
        )
        self.saved(1, 2, 3)
        self.user_error(
            lambda: self.manager.resolve("best"), "--checkpoint best", self.manager.folder.url
        )
        self.assertEqual(self.manager.resolve("latest"), self.local(3))
        for step, accuracy in ((1, 0.7), (2, 0.7), (3, 0.6)):
            self.noted(step, accuracy)
        self.assertEqual(self.manager.resolve("best"), self.local(2))  # of equals the later
        self.same(load_checkpoint(self.local(2)), some_state(2))
        file = self.folder / "some file.pt"
        self.user_error(
            lambda: self.manager.resolve(str(file)), f"{file}: there is no such checkpoint"
        )
        file.write_bytes(b"")
        self.assertEqual(self.manager.resolve(str(file)), file)
        self.same(load_checkpoint(self.manager.resolve(self.manager.url(1))), some_state(1))
        self.user_error(
            lambda: self.manager.resolve(self.manager.url(7)),
            f"{self.manager.url(7)}: there is no such checkpoint",
        )

    def test_retention_keeps_the_last_and_the_best(self):
        for step, accuracy in (
            (1, 0.2),
            (2, 0.9),
            (3, 0.3),
            (4, None),
            (5, 0.9),
            (6, 0.1),
            (7, 0.2),
            (8, 0.3),
            (9, None),
        ):
            self.saved(step)
            if accuracy:
                self.noted(step, accuracy)
            if step == 4:
                self.assertEqual(self.files(), self.names(2, 3, 4))
            if step == 6:
                self.assertEqual(self.files(), self.names(4, 5, 6))
        self.assertEqual(self.files(), self.names(5, 7, 8, 9))
        self.assertEqual(self.manager.resolve("best"), self.local(5))
        self.noted(9, 1.0)
        self.assertEqual(self.files(), self.names(7, 8, 9))

    def test_a_failed_delete_does_not_end_retention(self):
        self.saved(1, 2, 3)
        with self.undeletable("checkpoint_step_1.json"):
            _, warnings = self.warned(lambda: self.saved(4, 5))
        self.assertIn("checkpoint_step_1.json could not be deleted", warnings)
        # 2 went although 1 would not; 1 is still whole, marker and payload
        self.assertEqual(self.files(), self.names(1, 3, 4, 5))
        self.assertEqual([m["step"] for m in self.silent(self.manager.markers)], [1, 3, 4, 5])
        self.saved(6)
        self.assertEqual(self.files(), self.names(4, 5, 6))

    def test_retired_while_another_process_looks(self):
        self.saved(1, 2)
        reader = self.open()
        read, listed = reader.folder.read, reader.folder.list()

        def late(name):
            for gone in self.names(1):
                self.manager.folder.delete(gone)
            return read(name)

        with (
            mock.patch.object(reader.folder, "read", late),
            mock.patch.object(reader.folder, "list", lambda: listed),
        ):
            self.assertEqual([m["step"] for m in self.silent(reader.markers)], [2])
        markers = reader.markers()
        self.saved(3)
        for gone in self.names(2):
            self.manager.folder.delete(gone)
        with mock.patch.object(reader, "markers", lambda: markers):
            self.assertIn(
                "checkpoint_step_2.pt is ignored: it was deleted",
                self.warned(lambda: self.assertIsNone(reader.load_latest()))[1],
            )

    def test_a_write_that_fails(self):
        """A limit on file size fails in write() as a full disk does; the checkpoint before stays,
        nothing half is left."""
        self.saved(1)
        for limit in self.limits:
            # its words go through a pipe: the limit is one of every file, a log's too
            command = ["bash", "-o", "pipefail", "-c", '"$@" 2>&1 | cat', "", *self.saving(), limit]
            output = run(self, command, 2, environment=WITH_KIT)
            error = output.strip().splitlines()[-1]
            for text in (
                "error: ",
                f"{self.manager.url(2)}: the checkpoint could not be written",
                "File too large",
                "free some space",
                "logging.output_dir",
                f"the last good checkpoint is {self.manager.url(1)}",
            ):
                self.assertIn(text, error)
            self.assertNotIn("Traceback", output)
            self.assertEqual((self.files(), self.staged()), (self.names(1), []))
        self.newest(1)


class Damage(CheckpointTest):
    """The newest of two checkpoints is damaged: the one before is taken, and a warning names the
    damaged file."""

    def setUp(self):
        super().setUp()
        self.saved(1, 2)
        self.payload, self.marker = "checkpoint_step_2.pt", "checkpoint_step_2.json"
        self.change, self.content = (
            self.manager.folder.write,
            self.manager.folder.read(self.payload),
        )

    def where(self, name):
        return join(self.manager.folder.url, name)

    def flipped(self, k):
        return self.content[:k] + bytes([self.content[k] ^ 1]) + self.content[k + 1 :]

    def passed_over(self, *says):
        for function in (
            lambda: self.load(self.manager)["step"],
            lambda: int(self.manager.resolve("latest").stem.split("_")[-1]),
        ):
            step, warnings = self.warned(function)
            self.assertEqual(step, 1)
            for text in says:
                self.assertIn(text, warnings)
            self.assertEqual(warnings.count("\n"), 1 if says else 0, warnings)

    def test_marker_missing(self):
        self.manager.folder.delete(self.marker)
        self.passed_over()  # killed between payload and marker: never was a checkpoint

    def test_marker_broken(self):
        good = json.loads(self.manager.folder.read(self.marker))
        without = [json.dumps({k: v for k, v in good.items() if k != key}) for key in good]
        wrong = [
            json.dumps({**good, **value})
            for value in (
                {"step": None},
                {"step": "2"},
                {"step": 1},
                {"step": "../2"},
                {"metrics": 5},
                {"metrics": {}},
                {"metrics": {"exact_accuracy": "much"}},
            )
        ]
        for text in ("", "{", "[]", "5", "null", "\xff", *wrong, *without):
            with self.subTest(text):
                self.change(self.marker, text.encode("latin-1"))
                self.passed_over(f"warning: {self.where(self.marker)} is ignored: ")

    def test_payload_missing(self):
        self.manager.folder.delete(self.payload)
        self.passed_over(
            f"warning: {self.where(self.marker)} is ignored: ", f"there is no {self.payload}"
        )

    def test_size_mismatch(self):
        size = len(self.content)
        self.change(self.payload, self.content[:-1])
        self.passed_over(
            f"warning: {self.where(self.marker)} is ignored: ",
            f"{self.payload} has {size - 1} bytes, the marker says {size}",
        )
        self.assertIn(self.manager.url(1), self.warned(self.manager.newest_text)[0])

    def test_checksum_mismatch(self):
        self.change(self.payload, self.flipped(len(self.content) // 2))
        self.passed_over(f"warning: {self.where(self.payload)} is ignored: ", "checksum")

    def test_a_damaged_best_gives_the_next_best(self):
        for step, accuracy in ((1, 0.5), (2, 0.9)):
            self.noted(step, accuracy)
        self.assertEqual(self.silent(lambda: self.manager.resolve("best")), self.local(2))
        self.change(self.payload, self.flipped(-1 % len(self.content)))
        found, warnings = self.warned(lambda: self.manager.resolve("best"))
        self.assertEqual(found, self.local(1))
        self.assertIn("checksum", warnings)

    def test_saving_over_a_damaged_one(self):
        """Its marker goes first: it would vouch for a new payload of the same size until the new
        marker comes."""
        self.change(self.payload, self.content[:-1])
        listed = []
        self.manager.before_marker = lambda: listed.append(self.files())
        self.saved(2)
        self.assertEqual(listed, [sorted([*self.names(1), self.payload])])
        self.newest(2)

    def test_leftovers_of_a_kill(self):
        self.change("checkpoint_step_3.pt", b"no marker")
        self.change("checkpoint_step_best.json", b"{}")
        leftovers = [".checkpoint_step_3.json.abc.tmp", ".checkpoint_step_3.pt.abc.tmp"]
        for name in leftovers:
            (self.manager.staging / name).write_bytes(b"{")
        self.newest(2)
        self.manager.save(3, some_state(3))
        self.manager.writer.finish()
        self.newest(3)
        self.assertEqual(self.staged(), leftovers)  # none of its own
        self.assertEqual(
            set(self.files()) - set(leftovers), {*self.names(1, 2, 3), "checkpoint_step_best.json"}
        )

    def test_killed_at_every_step_of_saving(self):
        """A kill, here an exception at this step and whatever follows it: 2 or 3 is there,
        whole."""

        class Killed(BaseException):
            pass

        seen = []
        for kill_at in range(1, 40):
            calls = []

            def deadly(function):
                def call(*args, **kwargs):
                    calls.append(function)
                    if len(calls) >= kill_at:
                        raise Killed
                    return function(*args, **kwargs)

                return call

            manager = self.open(1, name=f"run{kill_at}")
            manager.save(2, some_state(2))
            manager.writer.finish()
            with contextlib.ExitStack() as stack:
                for owner, name in self.deadly:
                    stack.enter_context(
                        mock.patch.object(owner, name, deadly(getattr(owner, name)))
                    )
                done = 0
                for act in (lambda: manager.save(3, some_state(3)), manager.writer.finish):
                    with contextlib.suppress(Killed):
                        act()
                        done += 1
                with contextlib.suppress(Killed):
                    manager.writer.finish()  # whatever came of it, the thread has ended
            again = self.open(1, name=f"run{kill_at}")
            found = self.silent(lambda: self.load(again))
            seen.append(found["step"])
            self.same(found, some_state(found["step"]))
            again.save(3, some_state(3))  # the resumed run gets there again
            again.writer.finish()
            self.assertEqual(self.silent(lambda: self.load(again))["step"], 3)
            self.assertEqual(
                again.folder.list().keys(), {*self.names(3)}
            )  # though 2 may have lost its marker alone
            if done == 2:
                break
        self.assertEqual(done, 2)
        self.assertGreater(kill_at, 5)
        self.assertEqual((set(seen), seen), ({2, 3}, sorted(seen)))


class BeforeTheMarker(CheckpointTest):
    """Payload, before_marker's work, marker, retirement: in this order."""

    def test_order(self):
        self.manager = self.open(keep_last_n=1)
        done, folder = [], self.manager.folder

        def noting(name):
            original = getattr(folder, name)

            def call(*args):
                original(*args)
                done.append((name, args[0] if name in ("write", "delete") else args[1]))

            return call

        self.manager.before_payload, self.manager.before_marker = (
            lambda name=name: done.append(name) for name in ("before_payload", "before_marker")
        )
        with mock.patch.multiple(
            folder, **{name: noting(name) for name in ("take", "put", "write", "delete")}
        ):
            for step, retired in (
                (1, []),
                (2, [("delete", "checkpoint_step_1.json"), ("delete", "checkpoint_step_1.pt")]),
            ):
                done.clear()
                self.saved(step)
                marker = f"checkpoint_step_{step}.json"
                self.assertEqual(
                    [d for d in done if d[0] != "put"],
                    [
                        "before_payload",
                        ("delete", marker),
                        ("take", f"checkpoint_step_{step}.pt"),
                        "before_marker",
                        ("write", marker),
                        *retired,
                    ],
                )
            done.clear()
            self.noted(2, 0.5)
            self.assertEqual(done, ["before_marker", ("write", "checkpoint_step_2.json")])

    def test_what_forbids_the_marker(self):
        """Not a storage out of reach: it is told to the caller at the next save, note or end, and
        the checkpoint never counts."""
        self.saved(1)

        def lost():
            raise RunFailure("another training has taken this run over")

        for tell in (
            self.manager.writer.finish,
            lambda: self.manager.save(3, some_state(3)),
            lambda: self.noted(1, 0.5),
        ):
            self.manager.before_marker = lost
            self.manager.save(2, some_state(2))
            with self.assertRaisesRegex(RunFailure, "taken this run over") as caught:
                tell()
            self.assertIs(type(caught.exception), RunFailure)
            self.newest(1)
            self.assertEqual(
                (self.files(), self.staged()), ([*self.names(1), "checkpoint_step_2.pt"], [])
            )
            self.manager.before_marker = lambda: None
            self.noted(2, 0.5)  # no later job brings it back
            self.assertEqual(self.manager.metrics(2), None)
            self.newest(1)
        self.saved(2)
        self.newest(2)

    def test_what_forbids_the_payload(self):
        """A checkpoint of the same step, by whoever took the run over, stays as it is."""
        self.saved(1)
        self.manager.before_payload = mock.Mock(side_effect=RunFailure("taken over"))
        self.manager.save(1, some_state(5))
        self.assertRaisesRegex(RunFailure, "taken over", self.manager.writer.finish)
        self.newest(1)
        self.assertEqual((self.files(), self.staged()), (self.names(1), []))

    def test_what_forbids_a_note(self):
        self.saved(1)
        self.manager.before_marker = mock.Mock(side_effect=RunFailure("taken over"))
        self.assertRaisesRegex(RunFailure, "taken over", lambda: self.noted(1, 0.5))
        self.assertIsNone(self.manager.metrics(1))

    def test_its_storage_out_of_reach(self):
        self.saved(1)
        self.manager.before_marker = mock.Mock(
            side_effect=[StorageError("the lock could not be read"), None, None]
        )
        _, warnings = self.warned(lambda: (self.manager.save(2, some_state(2)), self.attempted()))
        self.assertIn("the lock could not be read; training goes on", warnings)
        self.newest(1)
        with mock.patch.object(
            self.manager.folder, "take", side_effect=AssertionError("the payload is there already")
        ):
            self.warned(self.manager.writer.finish)
        self.newest(2)


class LocalSavingAndFinding(SavingAndFinding, Local):
    pass


class GCSSavingAndFinding(SavingAndFinding, GCS):
    pass


class LocalDamage(Damage, Local):
    pass


class GCSDamage(Damage, GCS):
    pass


class LocalBeforeTheMarker(BeforeTheMarker, Local):
    pass


class GCSBeforeTheMarker(BeforeTheMarker, GCS):
    pass


class From(Fault):
    """Meets the requests that it matches, from the `first` on."""

    def __init__(self, first, *args, **how):
        super().__init__(*args, times=9999, **how)
        self.first, self.taken = first, 0

    def meets(self, method, path):
        matches = super().meets(method, path)
        self.taken += bool(matches)
        return matches and self.taken >= self.first


class Unreachable(CheckpointTest, GCS):
    """Training goes on without the storage; what it had before is offered, and nothing else until
    it is whole."""

    def setUp(self):
        super().setUp()
        self.saved(1)
        self.manager.folder.deadline = 0.2

    def failed(self, step):
        """Save, and wait until an attempt has failed; returns what was printed."""
        return self.warned(lambda: (self.manager.save(step, some_state(step)), self.attempted()))[1]

    def test_retried(self):
        self.proxy.refuse()
        warnings = self.failed(2)
        self.assertIn("Connection refused; training goes on", warnings)
        self.assertEqual(warnings.count("\n"), 1)
        self.assertRaisesRegex(StorageError, "Connection refused", self.manager.writer.finish)
        self.proxy.accept()
        self.newest(1)
        self.assertEqual(self.files(), self.names(1))
        _, said = self.warned(self.manager.writer.finish)
        self.assertIn("has succeeded", said)
        self.newest(2)
        self.assertEqual((self.files(), self.staged()), (self.names(1, 2), []))

    def test_retried_by_itself(self):
        saver = self.manager.writer
        saver.retry_seconds = 0.01
        self.proxy.refuse()

        def outlive():
            self.manager.save(2, some_state(2))
            with saver.changed:
                self.assertTrue(saver.changed.wait_for(lambda: saver.storage_error, 30))
            self.proxy.accept()
            with saver.changed:
                self.assertTrue(saver.changed.wait_for(lambda: not saver.jobs, 30))

        self.warned(outlive)
        self.newest(2)

    def test_superseded(self):
        self.proxy.refuse()
        self.failed(2)
        self.assertEqual(len(self.staged()), 1)
        self.assertIn("a newer save takes the place of the one that failed", self.failed(3))
        self.assertEqual(len(self.staged()), 1)  # 3's
        self.proxy.accept()
        self.newest(1)
        self.warned(self.manager.writer.finish)
        self.newest(3)
        self.assertEqual((self.files(), self.staged()), (self.names(1, 3), []))

    def test_a_note_does_not_give_up_the_save(self):
        self.proxy.refuse()
        self.failed(2)
        self.warned(
            lambda: (self.manager.add_metrics(2, {"exact_accuracy": 0.5}), self.attempted())
        )
        self.proxy.accept()
        self.newest(1)
        self.warned(self.manager.writer.finish)
        self.newest(2)
        self.assertEqual(self.open().metrics(2), {"exact_accuracy": 0.5})
        self.assertEqual(self.staged(), [])

    def test_from_any_request_on(self):
        seen = set()
        for first in range(1, 60):
            self.manager = self.open(1, name=f"run{first}")
            self.saved(2)
            self.manager.folder.deadline = 0.05
            fault = From(first, "status", 503)
            self.proxy.faults.append(fault)
            self.failed(3)
            whole = fault.taken < first
            fault.times = 0
            with self.subTest(first):
                found = self.silent(lambda: self.load(self.open(1, name=f"run{first}")))
                seen.add(found["step"])
                self.same(found, some_state(found["step"]))
                before = self.proxy.count("POST", "/upload/")
                if first % 2:
                    self.warned(self.manager.writer.finish)
                    self.assertLessEqual(self.proxy.count("POST", "/upload/") - before, 2)
                    self.assertEqual(self.silent(lambda: self.load(self.manager))["step"], 3)
                else:
                    self.warned(lambda: self.saved(4))
                    self.assertEqual(self.silent(lambda: self.load(self.manager))["step"], 4)
                self.assertEqual(self.staged(), [])
            if whole:
                break
        self.assertTrue(whole)
        self.assertGreater(first, 8)
        self.assertEqual(seen, {2, 3})

    def test_the_payload_is_sent_once(self):
        self.manager.before_marker = mock.Mock(
            side_effect=[StorageError("out of reach")] * 3 + [None]
        )
        before = self.proxy.count("POST", "/upload/")
        self.failed(2)
        for _ in range(2):
            self.assertRaises(StorageError, self.manager.writer.finish)
        self.warned(self.manager.writer.finish)
        self.assertEqual(self.proxy.count("POST", "/upload/") - before, 2)  # payload and marker
        self.newest(2)

    def test_training_does_not_wait_for_an_upload(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        self.manager.folder.deadline = 30
        upload = self.proxy.fail("hold", go_on, method="POST", path="/upload/")
        self.manager.save(2, some_state(2))
        self.assertTrue(upload.met.wait(30))
        self.newest(1)
        self.assertEqual(self.files(), self.names(1))
        go_on.set()
        self.manager.writer.finish()
        self.newest(2)

    def test_killed_while_it_uploads(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        for upload, kept, staged in (
            (1, [], 1),
            (2, ["checkpoint_step_2.pt"], 0),
        ):  # of the payload, of the marker
            self.manager = self.open(name=f"killed{upload}")
            self.saved(1)
            held = From(upload, "hold", go_on, method="POST", path="/upload/")
            self.proxy.faults[:] = [held]
            process = begin(self, self.saving(), WITH_KIT)
            process.until(held.met.is_set)
            process.kill()
            process.ends(-signal.SIGKILL)
            self.proxy.faults.clear()
            self.newest(1)
            self.assertEqual((self.files(), len(self.staged())), ([*self.names(1), *kept], staged))

    def test_nothing_to_look_up(self):
        self.proxy.refuse()
        self.assertIn("could not be looked up", self.manager.newest_text())
        with mock.patch.object(
            torch, "save", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ):
            self.user_error(
                lambda: self.manager.save(2, some_state(2)),
                f"{self.manager.url(2)}: the checkpoint could not be written",
                "No space left",
            )
        self.assertEqual(self.staged(), [])
        for call in (
            self.manager.load_latest,
            lambda: self.manager.resolve("latest"),
            lambda: self.manager.metrics(1),
        ):
            self.assertRaisesRegex(StorageError, "Connection refused", call)  # not "there is none"
        self.proxy.accept()
        self.manager.folder.deadline = 0.1
        for path in ("step_1.json.*alt=media", "step_1.pt.*alt=media"):  # nor one to be passed over
            fault = self.proxy.fail("status", 503, times=9999, path=path)
            self.assertRaisesRegex(
                StorageError, "HTTP 503", lambda: self.silent(self.manager.load_latest)
            )
            fault.times = 0
        self.newest(1)

    def test_permission_denied(self):
        for method, path in (("POST", "/upload/"), ("DELETE", "checkpoint_step_2")):
            for tell in (
                lambda: self.manager.save(3, some_state(3)),
                self.manager.writer.finish,
                lambda: self.noted(1, 0.5),
            ):
                fault = self.proxy.fail(
                    "status",
                    403,
                    times=9999,
                    method=method,
                    path=path,
                    message="no storage.objects.create access",
                )
                self.assertEqual(self.failed(2), "")
                requests = self.proxy.count()
                self.user_error(
                    tell, self.manager.folder.url, "permission denied (storage.objects.create)"
                )
                self.assertEqual(self.proxy.count(), requests)
                fault.times = 0
                self.newest(1)
                self.assertEqual((self.files(), self.staged()), (self.names(1), []))
        self.saved(3)
        self.newest(3)

    def test_order_of_requests(self):
        done, forward = [], Handler.forward

        def noting(handler, body):
            answer = forward(handler, body)
            named = re.search(r"/o/([^?]+)", handler.path) or re.search(
                r'"name": ?"([^"]+)"', body[:2000].decode("latin-1")
            )
            if handler.command != "GET":
                done.append(
                    (
                        handler.command,
                        named and named[1].replace("%2F", "/").rpartition("/")[2],
                        answer[0],
                    )
                )
            return answer

        home, record = open_folder(self.url), self.folder / "metrics.jsonl"
        record.write_text("{}\n")
        self.manager.keep_last_n, self.manager.before_marker = (
            1,
            lambda: home.put(record, "metrics.jsonl"),
        )
        with mock.patch.object(Handler, "forward", noting):
            self.manager.save(
                2, {"step": 2, "big": torch.ones(3 << 20)}
            )  # past 8 MiB: begun by POST, sent by PUT
            self.manager.writer.finish()
        self.assertEqual(
            [(method, name) for method, name, _ in done],
            [
                ("DELETE", "checkpoint_step_2.json"),
                ("POST", "checkpoint_step_2.pt"),
                ("PUT", None),
                ("POST", "metrics.jsonl"),
                ("POST", "checkpoint_step_2.json"),
                ("DELETE", "checkpoint_step_1.json"),
                ("DELETE", "checkpoint_step_1.pt"),
            ],
        )
        self.assertLessEqual(
            {status for *_, status in done[1:]}, {200, 204}
        )  # 2 had no marker yet: 404
        self.assertEqual(self.silent(self.load)["big"].sum(), 3 << 20)


class Fetching(CheckpointTest, GCS):
    def fetch(self, url):
        return fetch_file(url, self.folder / "fetched")

    def test_from_a_bucket(self):
        self.saved(1)
        for fetch in (self.fetch, self.manager.resolve, self.open(name="other").resolve):
            self.same(load_checkpoint(fetch(self.manager.url(1))), some_state(1))
        root = open_folder(f"gs://{BUCKET}")
        root.write("file in the root.pt", b"content")
        self.addCleanup(root.delete, "file in the root.pt")
        self.assertEqual(self.fetch(f"gs://{BUCKET}/file in the root.pt").read_bytes(), b"content")
        # fetched again, it is what is there now
        root.write("file in the root.pt", b"changed")
        self.assertEqual(self.fetch(f"gs://{BUCKET}/file in the root.pt").read_bytes(), b"changed")

    def test_files_of_one_name(self):
        urls = [join(self.url, run, "checkpoint_step_1.pt") for run in ("one", "two")]
        for url in urls:
            open_folder(os.path.dirname(url)).write("checkpoint_step_1.pt", url.encode())
        for path, url in zip([self.fetch(url) for url in urls], urls):
            self.assertEqual(path.read_bytes(), url.encode())
        # nor does it come in the place of a run's own
        local = CheckpointManager(
            open_folder(self.folder / "local"), 3, self.folder / "local", BackgroundWriter()
        )
        local.save(1, some_state(1))
        local.writer.finish()
        self.assertEqual(local.resolve(urls[0]).read_bytes(), urls[0].encode())
        self.same(self.silent(lambda: self.load(local)), some_state(1))

    def test_a_local_path_is_itself(self):
        file = self.folder / "file.pt"
        file.write_bytes(b"content")
        self.assertEqual(self.fetch(str(file)), file)
        self.assertEqual(self.fetch(file), file)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.assertEqual(self.fetch("file.pt"), Path("file.pt"))
        self.assertEqual(file.read_bytes(), b"content")
        self.assertFalse((self.folder / "fetched").exists())

    def test_what_is_not_there(self):
        for url in (
            join(self.url, "no.pt"),
            self.folder / "no.pt",
            self.folder / "no" / "no.pt",
            self.folder,
        ):
            self.user_error(lambda: self.fetch(url), f"{url}: there is no such checkpoint")
        for url, says in (
            ("gs://no-such-bucket/x/file.pt", "there is no bucket 'no-such-bucket'"),
            (f"gs://{BUCKET}", "write gs://bucket/folder"),
            ("gs://Bucket/file.pt", "write gs://bucket/folder"),
            (join(self.url, ".."), "could lead out of the folder"),
        ):
            self.user_error(lambda: self.fetch(url), says)
        self.assertEqual(list(self.folder.rglob("*.pt")), [])

    def test_it_is_no_way_to_run_code(self):
        target = self.folder / "owned"
        content = io.BytesIO()
        torch.save({"model": evil(target)}, content)
        self.manager.folder.write("evil.pt", content.getvalue())
        self.user_error(
            lambda: load_checkpoint(self.fetch(join(self.manager.folder.url, "evil.pt"))),
            "evil.pt: not a readable checkpoint",
        )
        self.assertFalse(target.exists())

    def test_unreachable(self):
        with mock.patch(
            "checkpoint_manager.open_folder", lambda url: open_folder(url, deadline=0.2)
        ):
            self.proxy.refuse()
            self.assertRaisesRegex(
                StorageError, "Connection refused", lambda: self.fetch(join(self.url, "file.pt"))
            )


def evil(target):
    """What makes the folder `target` when it is unpickled."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(target),)

    return Evil()


class Malice(CheckpointTest, Local):
    def refused(self, path, *says):
        """Neither the file nor its bytes are loaded."""
        messages = [
            self.user_error(
                lambda: load_checkpoint(path), f"{path}: not a readable checkpoint (", *says
            ),
            self.user_error(
                lambda: load_checkpoint(path.read_bytes()),
                "the newest checkpoint: not a readable checkpoint (",
                *says,
            ),
        ]
        for message in messages:
            self.assertNotIn("\n", message)

    def test_a_pickle_that_runs_code_is_refused(self):
        path, target = self.folder / "evil.pt", self.folder / "owned"
        content = {"model": evil(target)}
        for write in (
            lambda: torch.save(content, path),
            lambda: path.write_bytes(pickle.dumps(content, protocol=2)),
            lambda: torch.save(content, path, _use_new_zipfile_serialization=False),
        ):
            write()
            self.refused(path, "more than tensors", "take another one")
            self.assertFalse(target.exists())
        torch.load(path, weights_only=False)  # the file would have done it
        self.assertTrue(target.exists())

    def test_files_that_are_no_checkpoint(self):
        path = self.folder / "file.pt"
        self.user_error(lambda: load_checkpoint(path), f"{path}: there is no such checkpoint")
        self.user_error(
            lambda: load_checkpoint(self.folder), f"{self.folder}: not a readable checkpoint"
        )
        stream = random.Random(0)
        for legacy in (False, True):
            torch.save(some_state(1), path, _use_new_zipfile_serialization=not legacy)
            whole = path.read_bytes()
            for _ in range(40):
                path.write_bytes(whole[: stream.randrange(len(whole) - 100)])
                self.refused(path)
        for content in (b"", b"hello", b"\x80\x02}q\x00."):
            path.write_bytes(content)
            self.refused(path)


class FullDisk(CheckpointTest, Local):
    def test_no_space_at_any_write(self):
        """Payload, marker, and the folder after each are brought to the disk once; the disk may be
        full at any of them."""
        self.saved(1)
        for at, kept in ((1, []), (2, []), (3, []), (4, [2]), (5, [2])):
            calls = []

            def full(handle):
                calls.append(handle)
                if len(calls) == at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with self.subTest(at), mock.patch.object(os, "fsync", full):
                if at < 5:
                    self.user_error(
                        lambda: self.saved(2),
                        f"{self.manager.url(2)}: the checkpoint could not be written",
                        "No space left",
                        "the last good checkpoint is",
                    )
                else:
                    self.saved(2)
                self.assertEqual(len(calls), min(at, 4))
                self.assertEqual(self.files(), self.names(1, *kept))
        self.newest(2)

    def test_it_is_told_at_the_next_save(self):
        self.saved(1)
        with mock.patch.object(
            os, "fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ):
            self.manager.save(2, some_state(2))
            self.user_error(
                lambda: self.manager.save(3, some_state(3)),
                f"{self.manager.url(2)}: the checkpoint could not be written",
                "No space left",
            )
        self.assertEqual(self.files(), self.names(1))


if __name__ == "__main__":
    unittest.main()
