"""Local folders and Cloud Storage behind one interface: nothing is partial, one of several wins,
and faults pass or are reported."""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import signal
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import storage
from background_writer import BackgroundWriter
from dataset_cache import local_dataset
from storage import GCSFolder, StorageError, join, open_folder
from tests.gcs_server import GCSTest
from tests.helpers import WITH_KIT, FolderTest
from tests.processes import begin, run

BIG = random.Random(0).randbytes(
    9 << 20
)  # past 8 MiB the library uploads in another way (resumable)
OBJECTS = "/o(/|[?]|$)"  # requests about objects


def printed(function):
    """(result, stdout, stderr) of a call."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        result = function()
    return result, out.getvalue(), err.getvalue()


class FolderContract:
    """What holds for both kinds of folder; `self.url` is one that does not exist yet."""

    def open(self):
        return open_folder(self.url, deadline=5)

    def test_round_trips(self):
        folder, file = self.open(), self.folder / "elsewhere" / "file"
        self.assertEqual(folder.list(), {})
        contents = {
            "a": b"",
            "b/c.json": b"{}\r\n",
            "b/d/e": bytes(range(256)) * 999,
            "b/d/é ü?#%2F": b"x",
        }
        for name, data in contents.items():
            folder.write(name, data)
            self.assertEqual(folder.read(name), data)
        self.assertEqual(folder.list(), {name: len(data) for name, data in contents.items()})
        self.assertEqual(set(folder.list("b/d")), {"b/d/e", "b/d/é ü?#%2F"})
        self.assertEqual(folder.list("c"), {})
        self.assertEqual(open_folder(join(self.url, "b", "d")).read("e"), contents["b/d/e"])
        folder.write("a", b"again")
        self.assertEqual(folder.read("a"), b"again")
        folder.get("b/d/e", file)
        self.assertEqual(file.read_bytes(), contents["b/d/e"])
        file.write_bytes(BIG)
        folder.put(file, "b/big")
        folder.get("b/big", self.folder / "big")
        self.assertEqual((self.folder / "big").read_bytes(), BIG)
        self.assertEqual(os.listdir(file.parent), ["file"])
        for name in ("a", "a", "never"):
            folder.delete(name)
        folder.take(file, "b/taken")
        self.assertEqual((folder.read("b/taken"), file.exists()), (BIG, False))
        self.assertEqual(set(folder.list()), {*contents, "b/big", "b/taken"} - {"a"})

    def test_what_is_not_there(self):
        folder = self.open()
        folder.write("here", b"")
        for call in (
            lambda: folder.read("not"),
            lambda: folder.read_version("not"),
            lambda: folder.get("not", self.folder / "file"),
        ):
            with self.assertRaises(FileNotFoundError) as caught:
                call()
            self.assertIn(join(self.url, "not"), str(caught.exception))
        self.assertFalse((self.folder / "file").exists())

    def test_names_stay_inside(self):
        folder = self.open()
        for name in (
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "./x",
            "a//b",
            "a\\b",
            "a/",
            "a\0",
        ):
            for call in (
                lambda: folder.read(name),
                lambda: folder.write(name, b""),
                lambda: folder.replace_if(name, b"", None),
                lambda: folder.delete(name),
                lambda: folder.put(__file__, name),
                lambda: folder.get(name, self.folder / "file"),
            ):
                self.user_error(call, repr(name), "lead out of the folder")

    def test_versions(self):
        folder = self.open()
        first = folder.replace_if("lock", b"one", None)
        self.assertTrue(first)
        self.assertIsNone(folder.replace_if("lock", b"two", None))
        self.assertEqual(folder.read_version("lock"), (b"one", first))
        second = folder.replace_if("lock", b"two", first)
        self.assertEqual(folder.read_version("lock"), (b"two", second))
        self.assertIsNone(folder.replace_if("lock", b"three", first))
        folder.delete("lock", first)  # the lock of another: stays
        self.assertEqual(folder.read("lock"), b"two")
        self.assertEqual(folder.list(), {"lock": 3})
        folder.delete("lock", second)
        folder.delete("lock", second)
        self.assertEqual(folder.list(), {})
        self.assertIsNone(folder.replace_if("lock", b"three", second))
        self.assertEqual(folder.list(), {})

    def test_one_of_many_wins(self):
        folders = [self.open() for _ in range(6)]
        start = threading.Barrier(len(folders))

        def compete(k, call):
            start.wait(30)
            return k if call(folders[k], f"by {k}".encode()) else None

        with ThreadPoolExecutor(len(folders)) as threads:
            for call in (
                lambda folder, data: folder.replace_if("lock", data, None),
                lambda folder, data: folder.replace_if("lock", data, token),
            ):
                winners = [
                    k
                    for k in threads.map(compete, range(len(folders)), [call] * len(folders))
                    if k is not None
                ]
                self.assertEqual(len(winners), 1)
                data, token = folders[0].read_version("lock")
                self.assertEqual(data, f"by {winners[0]}".encode())


class LocalFolders(FolderContract, FolderTest):
    def setUp(self):
        super().setUp()
        self.url = str(self.folder / "local")

    def test_a_failed_write_keeps_the_old_version(self):
        folder = self.open()
        folder.write("a/b", b"old")
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
            self.assertRaisesRegex(OSError, "No space", lambda: folder.write("a/b", b"new"))
            self.assertRaisesRegex(OSError, "No space", lambda: folder.put(__file__, "a/b"))
        self.assertEqual(folder.read("a/b"), b"old")
        self.assertEqual(os.listdir(folder.path / "a"), ["b"])

    def test_an_unfinished_write_is_not_listed(self):
        folder = self.open()
        with storage._whole(folder.path / "a") as file:
            file.write(b"half")
            self.assertEqual(folder.list(), {})
        self.assertEqual(folder.list(), {"a": 4})

    def test_putting_a_file_on_itself(self):
        folder = self.open()
        folder.write("a", b"content")
        folder.put(folder.path / "a", "a")
        self.assertEqual(folder.read("a"), b"content")

    def test_processes_compete(self):
        self.open().write("counter", b"0")
        command = [sys.executable, "tests/programs/counts_up.py", self.url]
        for process in [begin(self, command, WITH_KIT) for _ in range(3)]:
            process.ends()
        self.assertEqual(self.open().read("counter"), b"60")

    def test_google_is_not_imported(self):
        code = (
            "import sys, storage\nstorage.open_folder('here').list()\n"
            "assert not any(name.startswith('google') for name in sys.modules)"
        )
        run(self, [sys.executable, "-c", code])


class Paths(FolderTest):
    def test_join(self):
        self.assertEqual(join("gs://b/c/", "d", "e.pt"), "gs://b/c/d/e.pt")
        self.assertEqual(join("gs://b", "d"), "gs://b/d")
        self.assertEqual(join(Path("runs"), "d", "e.pt"), "runs/d/e.pt")

    def test_malformed(self):
        self.assertTrue(storage.is_remote("gs://bucket/x"))
        self.assertFalse(storage.is_remote(Path("/gs/x")))
        for url in (
            "gs://",
            "gs:/bucket/x",
            Path("gs://bucket/x"),
            "gs://Bucket/x",
            "gs://b",
            "gs:bucket",
            "gs://bucket_/x",
            "gs:// bucket/x",
        ):
            self.user_error(lambda: open_folder(url), repr(str(url)), "write gs://bucket/folder")
        self.user_error(lambda: open_folder("gs://bucket/a/../b"), "'a/../b'")

    def test_without_the_package(self):
        with mock.patch.dict(sys.modules, {"google.cloud.storage": None}):
            self.user_error(
                lambda: open_folder("gs://bucket/x"),
                "gs://bucket/x",
                "pip install google-cloud-storage",
            )


class GCSFolders(FolderContract, GCSTest):
    pass


class Faults(GCSTest):
    def setUp(self):
        super().setUp()
        self.remote = open_folder(self.url, deadline=20)
        # the waits between attempts are the library's; here they are short
        patch = mock.patch(
            "google.api_core.retry.retry_base.random.uniform", lambda low, high: 0.02
        )
        patch.start()
        self.addCleanup(patch.stop)

    def file(self, data=BIG):
        path = self.folder / "file"
        path.write_bytes(data)
        return path

    def calls(self):
        """Every method, on an object that is there."""
        self.remote.write("a", b"content")
        token = self.remote.read_version("a")[1]
        return {
            "list": lambda: self.assertEqual(self.remote.list(), {"a": 7}),
            "read": lambda: self.assertEqual(self.remote.read("a"), b"content"),
            "get": lambda: self.remote.get("a", self.folder / "got"),
            "write": lambda: self.remote.write("b", b"1"),
            "put": lambda: self.remote.put(self.file(), "c"),
            "create": lambda: self.assertTrue(self.remote.replace_if("d", b"1", None)),
            "replace_if": lambda: self.assertTrue(self.remote.replace_if("a", b"1", token)),
            "delete": lambda: self.remote.delete("b"),
        }

    def test_passing_faults_are_outlived(self):
        for name, call in self.calls().items():
            with self.subTest(name):
                faults = [
                    self.proxy.fail("status", status, path=OBJECTS)
                    for status in (503, 429, 500, 502, 504, 408)
                ]
                call()
                self.assertEqual([fault.times for fault in faults], [0] * 6)
        self.assertEqual(self.remote.list(), {"a": 1, "c": len(BIG), "d": 1})

    def test_a_refused_period_is_outlived(self):
        self.proxy.refuse()
        refused = threading.Event()

        def sleep(seconds):
            refused.set()  # between two attempts
            threading.Event().wait(seconds)

        with (
            mock.patch("google.api_core.retry.retry_unary.time.sleep", sleep),
            ThreadPoolExecutor(1) as thread,
        ):
            written = thread.submit(self.remote.write, "a", b"1")
            self.assertTrue(refused.wait(30))
            self.proxy.accept()
            written.result(30)
        self.assertEqual(self.remote.read("a"), b"1")

    def test_the_deadline_is_kept(self):
        calls = self.calls()
        self.remote.deadline = 0.3
        self.proxy.refuse()
        for name, call in calls.items():
            with self.subTest(name):
                began = time.monotonic()
                with self.assertRaises(StorageError) as caught:
                    call()
                self.assertLess(time.monotonic() - began, 5)
                self.assertIn(
                    "no success within 0.3 s, last: Connection refused", str(caught.exception)
                )
                self.assertTrue(str(caught.exception).startswith(self.url), caught.exception)

    def test_a_silent_server_does_not_hold_us(self):
        remote, release = open_folder(self.url, deadline=0.4), threading.Event()
        self.addCleanup(release.set)
        self.proxy.fail("hold", release, times=99, path=OBJECTS)
        began = time.monotonic()
        self.assertRaisesRegex(StorageError, "last: ReadTimeout", remote.list)
        self.assertLess(time.monotonic() - began, 5)

    def test_a_cut_upload_leaves_the_old_version_or_nothing(self):
        self.remote.deadline = 0.3
        for name, there in (("new", {}), ("old", {"old": 3})):
            for content in (BIG[:100_000], BIG):
                if there:
                    self.remote.write(name, b"old")
                fault = self.proxy.fail(
                    "cut_upload",
                    50_000,
                    times=999,
                    method="PUT" if content is BIG else "POST",
                    path="/upload/",
                )
                with self.assertRaises(StorageError):
                    self.remote.put(self.file(content), name)
                self.assertLess(fault.times, 999)
                fault.times = 0
                self.assertEqual(self.remote.list(), there)
        self.assertEqual(self.remote.read("old"), b"old")
        self.remote.deadline = 20
        fault = self.proxy.fail("cut_upload", 5_000_000, times=2, method="PUT")
        self.remote.put(self.file(), "new")
        self.assertEqual((fault.times, self.remote.read("new")), (0, BIG))

    def test_an_upload_damaged_on_its_way_is_refused(self):
        for content in (b"content", BIG):
            with mock.patch.object(
                storage.GCSFolder, "_measured", lambda *_: (len(content), "AAAAAA==")
            ):
                self.assertRaisesRegex(
                    StorageError,
                    "damaged: Cloud Storage refused the request: HTTP 400",
                    lambda: self.remote.put(self.file(content), "damaged"),
                )
        self.assertEqual(self.remote.list(), {})

    def test_an_upload_whose_session_ended_begins_again(self):
        for status in (404, 410):
            fault = self.proxy.fail("status", status, method="PUT")
            self.remote.put(self.file(), "a")
            self.assertEqual((fault.times, self.remote.read("a")), (0, BIG))

    def test_a_lost_answer_does_not_make_a_loser(self):
        fault = self.proxy.fail("cut_answer", 0, method="POST")
        token = self.remote.replace_if("lock", b"mine", None)
        self.assertEqual((fault.times, self.remote.read_version("lock")), (0, (b"mine", token)))
        fault = self.proxy.fail("cut_answer", 0, method="POST")
        token = self.remote.replace_if("lock", b"mine", token)
        self.assertEqual((fault.times, self.remote.read_version("lock")), (0, (b"mine", token)))
        fault = self.proxy.fail("cut_answer", 0, method="DELETE")
        self.remote.delete("lock", token)
        self.assertEqual((fault.times, self.remote.list()), (0, {}))

    def test_a_cut_download_is_fetched_again(self):
        self.remote.put(self.file(), "a")
        fault = self.proxy.fail("cut_answer", 1_000_000, times=2, path="alt=media")
        self.remote.get("a", self.folder / "got")
        self.assertEqual((fault.times, (self.folder / "got").read_bytes()), (0, BIG))

    def test_a_damaged_download_is_never_used(self):
        self.remote.write("a", b"content")
        fault = self.proxy.fail("corrupt", times=3, path="alt=media")
        self.assertEqual((self.remote.read("a"), fault.times), (b"content", 0))
        self.remote.deadline = 0.3
        self.proxy.fail("corrupt", times=9999, path="alt=media")
        got = self.file(b"old")
        for call in (lambda: self.remote.get("a", got), lambda: self.remote.read("a")):
            self.assertRaisesRegex(StorageError, "what arrived is not what is stored", call)
        self.assertEqual((got.read_bytes(), os.listdir(self.folder)), (b"old", ["file"]))

    def test_an_object_replaced_while_it_is_read(self):
        self.remote.write("a", b"old")
        go_on = threading.Event()
        held = self.proxy.fail("hold", go_on, path="alt=media")
        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(self.remote.read, "a")
            self.assertTrue(held.met.wait(30))
            self.remote.write("a", b"new")
            go_on.set()
            self.assertEqual(reading.result(30), b"new")
        gone = self.proxy.fail(
            "status", 404, path="alt=media.*generation="
        )  # what the real server says of a replaced version
        self.assertEqual((self.remote.read("a"), gone.times), (b"new", 0))

    def test_mistakes_are_told_at_once(self):
        calls = self.calls()
        for status, says in (
            (403, "permission denied (storage.objects.foo)"),
            (401, "no valid Google credentials"),
        ):
            for name, call in calls.items():
                with self.subTest(name, status=status):
                    fault = self.proxy.fail(
                        "status",
                        status,
                        times=999,
                        path=OBJECTS,
                        message="x@y.z does not have storage.objects.foo access",
                    )
                    message = self.user_error(call, self.url, says)
                    self.assertEqual(fault.times, 998)
                    self.assertNotIn("x@y.z", message)
                self.proxy.faults.clear()

    def test_no_such_bucket(self):
        calls = self.calls()
        self.remote.bucket = self.remote.client.bucket("no-such-bucket")
        for name, call in calls.items():
            with self.subTest(name):
                before = self.proxy.count()
                self.user_error(call, "there is no bucket 'no-such-bucket'")
                self.assertLessEqual(self.proxy.count() - before, 2)

    def test_no_credentials(self):
        from google.auth import exceptions

        error = exceptions.DefaultCredentialsError("File /secret/key.json was not found.")
        with mock.patch("google.auth.default", side_effect=error), mock.patch.dict(os.environ):
            del os.environ["STORAGE_EMULATOR_HOST"]
            self.assertNotIn(
                "secret",
                self.user_error(
                    lambda: open_folder("gs://bucket/x"),
                    "gs://bucket/x",
                    "gcloud auth application-default login",
                ),
            )

    def test_credentials_without_a_project_will_do(self):
        from google.auth.credentials import AnonymousCredentials

        with (
            mock.patch("google.auth.default", return_value=(AnonymousCredentials(), None)),
            mock.patch.dict(os.environ),
        ):
            del os.environ["STORAGE_EMULATOR_HOST"]
            self.assertEqual(open_folder("gs://bucket/x").url, "gs://bucket/x")

    def test_no_message_holds_an_upload_session(self):
        self.remote.deadline = 0.3
        self.proxy.fail("status", 503, times=999, method="PUT", message="secret")
        self.proxy.requests.clear()
        with self.assertRaises(StorageError) as caught:
            self.remote.put(self.file(), "a")
        self.assertTrue(self.proxy.count(path="upload_id="))
        self.assertEqual(
            str(caught.exception),
            f"{self.url}/a: no success within 0.3 s, last: HTTP 503 Service Unavailable",
        )
        self.assertTrue(caught.exception.__suppress_context__)


class Job:
    """A job that waits for `go_on` and then fails as told, once for each of `failures`."""

    def __init__(self, *failures, held=False):
        self.failures, self.calls, self.begun, self.go_on, self.done = (
            [*failures],
            0,
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        if not held:
            self.go_on.set()

    def __call__(self):
        self.calls += 1
        self.begun.set()
        assert self.go_on.wait(30)
        if self.failures:
            raise self.failures.pop(0)
        self.done.set()


class Background(unittest.TestCase):
    def setUp(self):
        self.saver = BackgroundWriter(retry_seconds=9999)

    def test_training_waits_only_for_the_job_before(self):
        first, second = Job(held=True), Job()
        self.saver.submit_newest(first)  # comes back although the job has not ended
        self.assertTrue(first.begun.wait(30))
        with ThreadPoolExecutor(1) as thread:
            submitted = thread.submit(self.saver.submit_newest, second)
            self.assertFalse(submitted.done() or second.begun.wait(0.05))
            first.go_on.set()
            submitted.result(30)
        self.saver.finish()
        self.assertEqual((first.calls, second.calls, second.done.is_set()), (1, 1, True))
        self.saver.finish()
        self.assertNotIn(
            "saver",
            [
                thread.name
                for thread in threading.enumerate()
                if thread.is_alive() and not thread.daemon
            ],
        )

    def failed_once(self, job):
        self.saver.submit_newest(job)
        with self.saver.changed:
            self.assertTrue(
                self.saver.changed.wait_for(
                    lambda: self.saver.storage_error or not self.saver.jobs, 30
                )
            )

    def test_a_failed_save_is_tried_again_by_itself(self):
        self.saver.retry_seconds = 0.01
        job = Job(*[StorageError("gs://b/a: out of reach")] * 3)

        def save():
            self.saver.submit_newest(job)
            self.assertTrue(job.done.wait(30))
            self.saver.finish()

        _, _, err = printed(save)
        self.assertEqual(job.calls, 4)
        self.assertEqual(
            err,
            "warning: gs://b/a: out of reach; training goes on, and the save is tried again every "
            "0.01 s\n"
            "the save that had failed has succeeded\n",
        )

    def test_finish_tries_once_more(self):
        job = Job(StorageError("first"), StorageError("second"))
        _, _, err = printed(lambda: self.failed_once(job))
        self.assertIn("warning: first; training goes on", err)
        self.assertRaisesRegex(StorageError, "second", self.saver.finish)
        printed(self.saver.finish)
        self.assertEqual((job.calls, job.done.is_set()), (3, True))

    def test_a_newer_save_takes_the_place_of_a_failed_one(self):
        old, new = Job(StorageError("out of reach")), Job()
        _, _, err = printed(
            lambda: (self.failed_once(old), self.saver.submit_newest(new), self.saver.finish())
        )
        self.assertIn("a newer save takes the place of the one that failed", err)
        self.assertEqual((old.calls, new.calls), (1, 1))

    def test_mistakes_and_bugs_are_raised_in_the_caller(self):
        for error in (
            storage.UserError("permission denied"),
            ZeroDivisionError("a bug"),
            SystemExit(3),
        ):
            never = Job()
            self.failed_once(Job(error))
            self.assertRaises(type(error), self.saver.submit_newest, never)
            self.assertEqual(never.calls, 0)
            self.saver.submit_newest(Job(error))
            self.assertRaises(type(error), self.saver.finish)
            self.saver.finish()  # told once

    def test_finish_waits_no_longer_than_its_timeout(self):
        job = Job(held=True)
        self.saver.submit_newest(job)
        self.assertRaisesRegex(
            StorageError, "still under way after 0.05 s", lambda: self.saver.finish(0.05)
        )
        job.go_on.set()
        self.saver.finish()
        self.assertTrue(job.done.is_set())

    def test_the_process_can_end(self):
        code = (
            "import background_writer, threading\nsaver = background_writer.BackgroundWriter()\n"
            "saver.submit(print)\nsaver.finish()\n"
            "saver.submit(threading.Event().wait)\n"
        )
        run(self, [sys.executable, "-c", code])


class Datasets(GCSTest):
    def setUp(self):
        super().setUp()
        self.cache, self.remote = self.folder / "cache", open_folder(self.url)
        self.files = {
            f"{split}/{name}": f"{split} {name}".encode() * 1000
            for split in ("train", "test")
            for name in ("dataset.json", "all__inputs.npy", "all__labels.npy")
        }
        self.files["identifiers.json"] = b'["<blank>"]'
        self.upload(**{"build_info.json": self.build_info()})

    def build_info(self, **wrong):
        digests = {
            name: hashlib.sha256(data).hexdigest()
            for name, data in self.files.items()
            if name.endswith(".npy")
        }
        return json.dumps({"sha256": digests | wrong}).encode()

    def upload(self, **files):
        self.files |= files
        for name, data in self.files.items():
            self.remote.write(name, data)

    def dataset(self):
        return local_dataset(self.url, self.cache)

    def downloads(self):
        return self.proxy.count("GET", "alt=media")

    def same(self, folder):
        self.assertEqual(
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*")
                if path.is_file()
            },
            self.files,
        )

    def nothing_kept(self):
        """No folder of a whole dataset in the cache."""
        self.assertEqual(
            [path for path in self.cache.glob("*/*/*") if path.is_dir() and path.suffix != ".tmp"],
            [],
        )

    def process(self):
        code = f"import dataset_cache\nprint(dataset_cache.local_dataset({self.url!r}))"
        return begin(self, [sys.executable, "-c", code], {"TRM_CACHE": self.cache})

    def test_a_local_path_is_left_alone(self):
        self.assertEqual(local_dataset("no/such/folder", self.cache), Path("no/such/folder"))
        self.assertFalse(self.cache.exists())

    def test_downloaded_once_and_again_when_it_changes(self):
        self.remote.write("notes/other.txt", b"not of the dataset")
        first, out, _ = printed(self.dataset)
        self.same(first)
        self.assertIn(f"{self.url}: downloading 8 files, ", out)
        self.assertEqual(printed(self.dataset)[:2], (first, ""))
        self.assertEqual(self.downloads(), 8)
        self.files["test/all__inputs.npy"] = b"changed"
        self.upload(**{"build_info.json": self.build_info()})
        second, out, _ = printed(self.dataset)
        self.assertEqual(out.count("\n"), 1)
        self.assertIn(f"{self.url} has changed: downloading", out)
        self.assertNotEqual(first, second)
        self.same(second)
        self.assertEqual(
            (first / "test/all__inputs.npy").read_bytes(), b"test all__inputs.npy" * 1000
        )  # a run may be reading it

    def test_a_cache_that_lost_a_file_is_mended(self):
        folder, _, _ = printed(self.dataset)
        (folder / "train/all__inputs.npy").unlink()
        (folder / "test/all__inputs.npy").write_bytes(b"cut")
        self.assertEqual(printed(self.dataset)[0], folder)
        self.same(folder)

    def test_processes_of_a_host_download_once(self):
        processes = [self.process() for _ in range(4)]
        outputs = [process.ends() for process in processes]
        folders = {output.splitlines()[-1] for output in outputs}
        self.assertEqual(len(folders), 1, outputs)
        self.same(Path(folders.pop()))
        self.assertEqual(self.downloads(), len(self.files))
        self.assertEqual(sum("downloading" in output for output in outputs), 1)

    def test_a_killed_download_is_never_used(self):
        release = threading.Event()
        self.addCleanup(release.set)
        held = self.proxy.fail("hold", release, path="test%2Fall__labels.npy.*alt=media")
        first = self.process()
        self.assertTrue(held.met.wait(60))
        second = self.process()  # finds the lock taken, and waits
        first.send_signal(signal.SIGKILL)
        first.ends(-signal.SIGKILL)
        self.same(Path(second.ends().splitlines()[-1]))
        self.assertEqual(list(self.cache.rglob("*.tmp")), [])

    def test_a_failing_download_is_never_used(self):
        self.proxy.fail("corrupt", times=999, path="all__labels.npy.*alt=media")
        with mock.patch("dataset_cache.GCSFolder", functools.partial(GCSFolder, deadline=0.3)):
            self.assertRaisesRegex(
                StorageError, "all__labels.npy.*not what is stored", lambda: printed(self.dataset)
            )
        self.nothing_kept()

    def test_wrong_build_info(self):
        for wrong, says in (
            ({"train/all__inputs.npy": "0" * 64}, ("train/all__inputs.npy", "sha256")),
            ({"train/all__ratings.npy": "0" * 64}, ("train/all__ratings.npy", "missing")),
            ({"../../../evil.npy": "0" * 64}, ("'../../../evil.npy'", "lead out of the folder")),
        ):
            self.remote.write("build_info.json", self.build_info(**wrong))
            self.user_error(lambda: printed(self.dataset), *says)
            self.nothing_kept()
        self.remote.write("build_info.json", b"[]")
        self.user_error(lambda: printed(self.dataset), "build_info.json is damaged")
        self.nothing_kept()
        self.remote.delete("build_info.json")  # datasets of the original have none
        self.files.pop("build_info.json")
        self.same(printed(self.dataset)[0])

    def test_names_that_lead_out(self):
        # the emulator takes no such names: its listing is changed on the way
        self.remote.write("train/all__evil.npy", b"evil")
        for name in (
            "../all__evil.npy",
            "x/../../all__evil.npy",
            "/etc/all__evil.npy",
            "..\\x/all__evil.npy",
        ):
            self.proxy.fail(
                "replace",
                (b"/train/all__evil.npy", b"/" + json.dumps(name)[1:-1].encode()),
                path="prefix=",
            )
            self.user_error(lambda: printed(self.dataset), repr(name), "lead out of the folder")
        self.assertEqual((self.downloads(), list(self.folder.rglob("*evil*"))), (0, []))

    def test_no_dataset(self):
        self.user_error(
            lambda: local_dataset(join(self.url, "train"), self.cache),
            f"{self.url}/train",
            "no dataset",
        )
        blocked = self.folder / "file"
        blocked.write_text("")
        self.user_error(lambda: local_dataset(self.url, blocked), str(blocked), "set TRM_CACHE")


if __name__ == "__main__":
    unittest.main()
