"""The lock of a run's folder: it has one owner, a dead one does not stay in the way, and an owner
that loses it learns so."""

import contextlib
import functools
import io
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import run_folder
import run_lock
from collectives import Workers
from config import load_config
from run_folder import RunFolder
from run_lock import NAME, RunLock
from storage import StorageError, open_folder
from tests.gcs_server import GCSTest, Proxy
from tests.helpers import WITH_KIT, FolderTest, write_config
from tests.processes import Process, begin, wait_until
from utils import RunFailure, UserError

NEVER = 9999  # seconds between two renewals in tests that want none


class Owner(Process):
    """A process that takes the lock, and then does what it is asked.

    pause: when it has read the lock, and before it does anything about it, it says so and waits for
    a line.
    """

    def __init__(self, url, take_over=False, beat_seconds=NEVER, pause=False):
        command = [sys.executable, "tests/programs/lock_owner.py"]
        super().__init__([*command, url, take_over, beat_seconds, pause], WITH_KIT, feed=True)

    def ask(self, command):
        self.feed(command)
        return self.line()


class Clock:
    """In place of the time module in run_lock: nothing sleeps; the n-th sleep calls during[n]."""

    def __init__(self, during=None):
        self.waited, self.sleeps, self.during = 0.0, 0, during or {}
        self.monotonic, self.strftime, self.gmtime = (
            lambda: 1e6 + self.waited,
            time.strftime,
            time.gmtime,
        )

    def sleep(self, seconds):
        self.waited += seconds
        self.sleeps += 1
        self.during.get(self.sleeps, lambda: None)()


class LockTest(FolderTest):
    def setUp(self):
        super().setUp()
        self.url = str(self.folder / "run")

    def open(self):
        return open_folder(self.url, deadline=5)

    def owner(self, **options):
        owner = Owner(self.url, **options)
        self.addCleanup(owner.end)
        return owner

    def take(self, beat_seconds=10.0, folder=None, **options):
        lock = RunLock(folder or self.open(), beat_seconds=beat_seconds, **options)
        self.addCleanup(lambda: (lock.ended.set(), lock.thread.join()))
        return lock

    def timed(self, during=None, **options):
        """(the lock or the message of the refusal, the Clock, stderr)"""
        clock = Clock(during)
        with (
            mock.patch.object(run_lock, "time", clock),
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            try:
                result = self.take(**options)
            except UserError as error:
                result = str(error)
        return result, clock, err.getvalue()

    def leave(self, **changes):
        """Write the lock of a process, by default one with the pid and the start of this one."""
        owner = {
            "token": "another",
            **run_lock._this_process(),
            "since": "2222-02-22 22:22:22 UTC",
            "beat": 1,
            **changes,
        }
        self.open().write(
            NAME, json.dumps({k: v for k, v in owner.items() if v != "left out"}).encode()
        )

    def stored(self):
        return json.loads(self.open().read(NAME))


class Processes:
    """What holds over both kinds of folder."""

    def test_a_killed_owner_does_not_block_its_restart(self):
        owner = self.owner(beat_seconds=0.05)
        self.assertEqual(owner.line(), "held")
        self.assertEqual(self.stored()["pid"], owner.pid)
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # a zombie until end() waits for it
        lock, clock, err = self.timed()
        lock.check(verify=True)
        self.assertEqual((clock.sleeps, err), (0, ""))
        self.assertEqual(self.stored()["pid"], os.getpid())

    def test_a_live_owner_refuses(self):
        owner = self.owner(beat_seconds=0.05)
        self.assertEqual(owner.line(), "held")
        message, clock, err = self.timed()
        for text in (
            self.url + ": another training, ",
            f"process {owner.pid} on {os.uname().nodename} since {self.stored()['since']}",
            "one at a time",
            "wait until it has ended",
            "another --run_name",
            "--take_over",
        ):
            self.assertIn(text, message)
        self.assertTrue(
            run_lock.GRACE_SECONDS <= clock.waited < run_lock.GRACE_SECONDS + 1, clock.waited
        )
        self.assertEqual((err, owner.ask("lock.check(verify=True)")), ("", "fine"))
        self.assertEqual(owner.ask("lock.release()"), "fine")
        self.assertEqual(self.timed()[1].sleeps, 0)

    def test_an_owner_that_ends_or_releases_while_it_is_given_time(self):
        for command in ("kill", "release"):
            with self.subTest(command):
                owner = self.owner()
                self.assertEqual(owner.line(), "held")
                lock, clock, err = self.timed(
                    {2: owner.end if command == "kill" else lambda: owner.ask("lock.release()")}
                )
                lock.check(verify=True)
                self.assertEqual((clock.sleeps, err), (2, ""))
                lock.release()

    def test_taken_over(self):
        for beat_seconds in (0.02, NEVER):
            with self.subTest(beat_seconds=beat_seconds):
                owner = self.owner(beat_seconds=beat_seconds)
                self.assertEqual(owner.line(), "held")
                lock, clock, err = self.timed(take_over=True, beat_seconds=NEVER)
                self.assertEqual(clock.sleeps, 0)
                self.assertRegex(
                    err, rf"\A\S+/run.lock: taken over from process {owner.pid} on .*\n\Z"
                )
                if beat_seconds == NEVER:
                    self.assertEqual(owner.ask("lock.check()"), "fine")  # it has not looked since
                    self.assertIn("lost: ", owner.ask("lock.check(verify=True)"))
                wait_until(lambda: owner.ask("lock.check()") != "fine")
                for command in ("lock.check()", "lock.check(verify=True)"):
                    self.assertIn(
                        f"run.lock was taken over by process {os.getpid()} on ", owner.ask(command)
                    )
                self.assertEqual(owner.ask("lock.release()"), "fine")
                self.assertEqual(
                    self.open().read_version(NAME)[1], lock.version
                )  # nothing of the loser's came after
                lock.check(verify=True)
                lock.release()

    def test_of_several_one_wins(self):
        live = self.owner()
        self.assertEqual(live.line(), "held")
        with_owner, dead = self.open().read(NAME), self.owner()
        dead.end()
        for case, content in (
            ("nothing", None),
            ("dead", json.dumps({**json.loads(with_owner), "pid": dead.pid}).encode()),
            ("take over", with_owner),
        ):
            with self.subTest(case):
                self.open().delete(NAME)
                if content:
                    self.open().write(NAME, content)
                takers = [self.owner(pause=True, take_over=case == "take over") for _ in range(3)]
                self.assertEqual([taker.line() for taker in takers], ["looked"] * 3)
                for taker in takers:
                    taker.feed()
                said = [taker.line() for taker in takers]
                winners = [taker for taker, text in zip(takers, said) if text == "held"]
                self.assertEqual(len(winners), 1, said)
                self.assertEqual(
                    sum(
                        f"process {winners[0].pid} on " in text
                        for text in said
                        if text.startswith("refused: ")
                    ),
                    2,
                    said,
                )
                self.assertEqual(winners[0].ask("lock.check(verify=True)"), "fine")
                winners[0].end()

    def test_renewed_until_released(self):
        lock = self.take(beat_seconds=0.01)
        first = self.stored()
        wait_until(lambda: self.stored()["beat"] > first["beat"] + 2)
        self.assertEqual({**self.stored(), "beat": 0}, {**first, "beat": 0})
        lock.check(verify=True)
        lock.release()
        self.assertEqual((self.open().list(), lock.thread.is_alive()), ({}, False))
        lock.release()
        self.assertRaisesRegex(RunFailure, "run.lock was deleted", lock.check, verify=True)

    def test_deleted_by_hand(self):
        lock = self.take(beat_seconds=0.01)
        self.open().delete(NAME)
        lock.thread.join(30)
        with mock.patch.object(lock, "folder", None):  # nothing more is asked of it
            for verify in (False, True):
                self.assertRaisesRegex(RunFailure, "run.lock was deleted", lock.check, verify)
        self.assertEqual(self.open().list(), {})


class LocalLocks(Processes, LockTest):
    pass


class GCSLocks(Processes, GCSTest, LockTest):
    def setUp(self):
        super().setUp()
        self.remote = open_folder(self.url, deadline=20)

    @contextlib.contextmanager
    def out_of_reach(self):
        """In the block, the folder's methods fail after 0.2 s. Outside they may take longer: the
        machine may be busy."""
        self.remote.deadline = 0.2
        self.proxy.refuse()
        yield
        self.remote.deadline = 20
        self.proxy.accept()

    def test_out_of_reach_for_a_while(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            lock = self.take(beat_seconds=0.02, folder=self.remote)
            with self.out_of_reach():
                wait_until(lambda: "warning" in err.getvalue())
                self.assertRaisesRegex(StorageError, "Connection refused", lock.check, verify=True)
                before = lock.beats
                wait_until(lambda: lock.beats > before + 1)
                lock.check()
            before = self.stored()["beat"]
            wait_until(lambda: self.stored()["beat"] > before)
            lock.check(verify=True)
        self.assertRegex(
            err.getvalue(),
            r"\Awarning: gs://\S+/run.lock could not be renewed \(.*Connection refused\); "
            r"tried again every 0.02 s\n\Z",
        )

    def test_taken_over_while_out_of_reach(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            lock = self.take(beat_seconds=0.02, folder=self.remote)
            with self.out_of_reach():
                wait_until(lambda: "warning" in err.getvalue())
                other_way = Proxy()
                self.addCleanup(other_way.close)
                with mock.patch.dict(
                    os.environ, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{other_way.port}"}
                ):
                    new = self.take(take_over=True, beat_seconds=NEVER)
                lock.check()  # it cannot know
            lock.thread.join(30)
            self.assertRaisesRegex(RunFailure, "taken over by process", lock.check)
            lock.release()
        new.check(verify=True)
        self.assertEqual(self.open().read_version(NAME)[1], new.version)

    def test_a_renewal_that_failed_and_had_arrived(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            lock = self.take(beat_seconds=0.02, folder=self.remote)
            self.remote.deadline = 0.2
            with self.proxy.lock:
                cut = self.proxy.fail("cut_answer", 0, method="POST")
                unwell = self.proxy.fail("status", 503, times=9999)
            wait_until(lambda: "warning" in err.getvalue())
            self.assertEqual(cut.times, 0)
            self.remote.deadline, unwell.times = 20, 0
            before = self.stored()["beat"]
            wait_until(lambda: self.stored()["beat"] > before)
            lock.check()
            lock.release()
        self.assertEqual(self.open().list(), {})

    def test_released_while_out_of_reach(self):
        lock = self.take(beat_seconds=NEVER, folder=self.remote)
        with self.out_of_reach(), contextlib.redirect_stderr(io.StringIO()) as err:
            lock.release()
        self.assertRegex(
            err.getvalue(),
            r"\Awarning: gs://\S+/run.lock could not be released \(.*Connection refused\); .*\n\Z",
        )
        self.assertEqual(self.stored()["token"], lock.owner["token"])

    def test_out_of_reach_at_the_start(self):
        with self.out_of_reach():
            self.assertRaisesRegex(
                StorageError, "Connection refused", self.take, folder=self.remote
            )


class Judgements(LockTest):
    """Owners of other hosts, of other boots, and unknown ones, by the content of the lock."""

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(
            run_lock,
            "_text",
            lambda path, text=run_lock._text: (
                "this machine" if path == "/etc/machine-id" else text(path)
            ),
        )
        patch.start()  # containers often have no machine-id
        self.addCleanup(patch.stop)
        self.ended = begin(self, ["true"])
        self.ended.ends()

    ELSEWHERE = {
        "another host": {"host": "elsewhere"},
        "its clock is behind": {"host": "elsewhere", "since": "1970-01-01 00:00:00 UTC"},
        "another machine of this name": {"boot": "another", "machine": "another"},
        "another container": {"namespace": "another"},
        "without /proc": {"boot": None, "namespace": None, "start": None},
    }
    DAMAGED = (b"", b"not JSON", b"\xff\xfe", b"[]", b"3", b"{}", b'{"token": "another"}')

    def test_dead_here(self):
        for case in (
            {"pid": self.ended.pid},
            {"start": run_lock._this_process()["start"] - 1},
            {"boot": "another"},
            {"pid": 10**30},
        ):
            with self.subTest(case):
                self.leave(**case)
                lock, clock, err = self.timed()
                lock.check(verify=True)
                self.assertEqual((clock.sleeps, err), (0, ""))

    def test_alive_here(self):
        self.leave()
        message, clock, err = self.timed()
        self.assertIn(f"process {os.getpid()} on", message)
        self.assertTrue(5 <= clock.waited < 6, clock.waited)
        self.assertEqual((err, self.stored()["token"]), ("", "another"))

    def cases_to_watch(self):
        """Puts one lock after another there, with what renews it."""
        for case, changes in self.ELSEWHERE.items():
            with self.subTest(case):
                self.leave(**changes)
                yield lambda: self.leave(**changes, beat=2)
        for content in self.DAMAGED:
            with self.subTest(content=content):
                self.open().write(NAME, content)
                yield lambda: self.open().write(NAME, content + b" ")
        for changes in (
            {"pid": "left out"},
            {"since": "left out"},
            {"pid": "12"},
            {"token": ""},
            {"token": 5},
        ):
            with self.subTest(changes):
                self.leave(**changes)
                yield lambda: self.leave(**changes, beat=2)

    def test_watched_in_vain(self):
        cases = 0
        for _ in self.cases_to_watch():
            lock, clock, err = self.timed()
            lock.check(verify=True)
            self.assertTrue(30 <= clock.waited < 31, clock.waited)
            self.assertRegex(
                err, r"\A\S+/run.lock: held by .+: watching for 30 s whether it is alive\n\Z"
            )
            cases += 1
        self.assertEqual(cases, 17)
        self.leave(host="elsewhere")
        self.assertTrue(3 <= self.timed(beat_seconds=1)[1].waited < 4)

    def test_watched_and_alive(self):
        for renew in self.cases_to_watch():
            message, clock, err = self.timed({55: renew})
            self.assertIn("holds this run", message)
            self.assertEqual((clock.sleeps, err.count("\n")), (55, 1))
            self.assertNotEqual(self.open().read(NAME), b"")

    def test_what_this_host_does_not_show(self):
        started, text = run_lock._started, run_lock._text

        def without(name):
            return mock.patch.object(
                run_lock, "_text", lambda path: None if name in path else text(path)
            )

        hidden = mock.patch.object(
            run_lock, "_started", lambda pid: started(pid) if pid == os.getpid() else None
        )
        for case, patch, changes in (
            ("hidden", hidden, {"pid": os.getppid()}),
            ("no /proc", without("/"), {"pid": self.ended.pid}),
            ("no boot id", without("boot_id"), {}),
            ("no machine-id", without("machine-id"), {"boot": "another", "machine": None}),
        ):
            for another_users in (False, True):
                self.leave(**changes)
                forbidden = (
                    mock.patch("os.kill", side_effect=PermissionError)
                    if another_users
                    else contextlib.nullcontext()
                )
                with self.subTest(case, another_users=another_users), patch, forbidden:
                    lock, clock, _ = self.timed()
                    lock.check(verify=True)
                    self.assertTrue(30 <= clock.waited < 31, clock.waited)

    def test_a_command_with_brackets_and_blanks(self):
        name = os.path.join(self.folder, "a) Z 1")
        os.symlink("/bin/sleep", name)
        process = begin(self, [name, "60"])
        wait_until(lambda: "a) Z 1" in (run_lock._text(f"/proc/{process.pid}/stat") or ""))
        self.assertGreaterEqual(run_lock._started(process.pid), run_lock._started(os.getpid()))
        self.leave(pid=process.pid, start=run_lock._started(process.pid))
        self.assertIn(f"process {process.pid} on", self.timed()[0])
        self.leave(pid=process.pid, start=run_lock._started(process.pid) - 1)
        self.assertEqual(self.timed()[1].sleeps, 0)
        process.kill()

    def test_released_while_watched(self):
        self.leave(host="elsewhere")
        lock, clock, _ = self.timed({3: lambda: self.open().delete(NAME)})
        lock.check(verify=True)
        self.assertEqual(clock.sleeps, 3)

    def test_another_owner_while_watched(self):
        self.leave(host="elsewhere")
        message, clock, _ = self.timed({55: lambda: self.leave(token="third")})
        self.assertIn(f"process {os.getpid()} on", message)
        self.assertTrue(27.5 + 5 <= clock.waited < 27.5 + 6, clock.waited)
        self.leave(host="elsewhere")
        lock, clock, _ = self.timed({55: lambda: self.leave(token="third", host="elsewhere")})
        lock.check(verify=True)
        self.assertTrue(
            27.5 + 30 <= clock.waited < 27.5 + 31, clock.waited
        )  # it is watched from its beginning

    def test_taken_over_wherever_it_is(self):
        for changes in ({}, *self.ELSEWHERE.values(), {"pid": "left out"}):
            with self.subTest(changes):
                self.leave(**changes)
                lock, clock, err = self.timed(take_over=True)
                lock.check(verify=True)
                self.assertEqual(clock.sleeps, 0)
                self.assertRegex(err, r"\A\S+/run.lock: taken over from .*\n\Z")
        lock.release()
        self.assertEqual(self.timed(take_over=True)[2], "")  # from nobody

    def changed_before_it_is_taken(self, **changes):
        """What comes of a takeover between whose look and replace_if the lock is changed."""
        folder = self.open()
        replace_if = folder.replace_if

        def late(*args):
            folder.replace_if = replace_if
            self.leave(**changes)
            return replace_if(*args)

        folder.replace_if = late
        self.leave()
        return self.timed(folder=folder, take_over=True)

    def test_taken_over_from_the_one_that_was_seen(self):
        lock, clock, err = self.changed_before_it_is_taken(beat=2)
        lock.check(verify=True)
        self.assertEqual((clock.sleeps, err.count("\n")), (0, 1))
        message, _, err = self.changed_before_it_is_taken(token="third")
        self.assertIn("holds this run", message)
        self.assertEqual((err, self.stored()["token"]), ("", "third"))


class Renewals(LockTest):
    def failing(self, *failures):
        """(folder, done): each call of replace_if raises the next of what is listed, or works if it
        is None; then `done` is set."""
        folder, left, done = (
            self.open(),
            [None, *failures],
            threading.Event(),
        )  # None: of the first, that takes the lock
        replace_if = folder.replace_if

        def scripted(*args):
            if not left:
                done.set()
            elif failure := left.pop(0):
                raise failure
            return replace_if(*args)

        folder.replace_if = scripted
        return folder, done

    def test_one_warning_an_outage(self):
        folder, done = self.failing(
            StorageError("out of reach"),
            OSError(28, "No space left"),
            StorageError("out of reach"),
            None,
            UserError("permission denied"),
            OSError("other"),
        )
        with contextlib.redirect_stderr(io.StringIO()) as err:
            lock = self.take(folder=folder, beat_seconds=0.005)
            self.assertTrue(done.wait(30))
        lock.check(verify=True)
        self.assertEqual(
            err.getvalue(),
            "".join(
                f"warning: {self.url}/run.lock could not be renewed ({text}); "
                "tried again every 0.005 s\n"
                for text in ("out of reach", "permission denied")
            ),
        )

    def test_a_mistake_in_the_thread_is_raised(self):
        lock = self.take(folder=self.failing(ZeroDivisionError("a mistake"))[0], beat_seconds=0.005)
        lock.thread.join(30)
        for verify in (False, True):
            self.assertRaisesRegex(ZeroDivisionError, "a mistake", lock.check, verify)

    def test_check_asks_nothing(self):
        lock = self.take(beat_seconds=NEVER)
        lock.folder = None  # any use of it would raise
        lock.check()

    def test_a_training_that_has_lost_it_ends_at_its_next_record(self):
        config = load_config(
            write_config(self.folder / "run.yaml"), [f"logging.output_dir={self.folder}"]
        )
        often = functools.partial(RunLock, beat_seconds=0.02)
        finite = {"first_not_finite": 0.0}
        with (
            mock.patch.object(run_folder, "RunLock", often),
            contextlib.redirect_stderr(io.StringIO()),
            RunFolder(config, "lost", Workers(0, 1)) as first,
        ):
            first.check(finite)
            with RunFolder(config, "lost", Workers(0, 1), True) as second:
                with self.assertRaisesRegex(RunFailure, "was taken over by process"):
                    wait_until(lambda: first.check(finite), 30)
                second.check(finite)

    def test_release_waits_for_a_renewal_under_way(self):
        folder, begun, looked, go_on = (
            self.open(),
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        lock = self.take(folder=folder, beat_seconds=0.005)
        replace_if, read_version = folder.replace_if, folder.read_version
        folder.replace_if = lambda *args: (begun.set(), go_on.wait(30), replace_if(*args))[-1]
        self.assertTrue(begun.wait(30))
        folder.read_version = lambda name: (looked.set(), read_version(name))[-1]
        with ThreadPoolExecutor(1) as thread:
            released = thread.submit(lock.release)
            self.assertTrue(lock.ended.wait(30))
            self.assertFalse(looked.wait(0.05))
            go_on.set()
            released.result(30)
        self.assertEqual((folder.list(), lock.failure), ({}, None))
