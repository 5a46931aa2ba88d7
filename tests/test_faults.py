"""Workers, hosts, disks and clocks that fail in the midst of a run: it ends clearly, and goes on to
the same end."""

import json
import os
import resource
import signal
import socket
import unittest
from unittest import mock

from checkpoint_manager import load_checkpoint
from tests.processes import begin, descendants, pause, run
from tests.test_preemption import PreemptionTest

TWO = ("training.num_workers=2", "training.epochs=12")  # 120 steps


class FaultTest(PreemptionTest):
    def ends(self, process, status=143, seconds=60):
        """What it and its workers print to their end, which comes in time."""
        return process.all_end(status, seconds)

    def errors(self, output):
        self.assertNotIn("Traceback", output)
        return [line for line in output.splitlines() if line.startswith("error: ")]

    def lock_owner(self, run_name):
        """pid of the process that holds the run, or None."""
        try:
            return json.loads((self.folder / "runs" / run_name / "run.lock").read_text())["pid"]
        except FileNotFoundError:
            return None

    def files(self, run_name):
        """What would tell that a run's folder was written to, but for the lock."""
        found = [
            path
            for path in (self.folder / "runs" / run_name).rglob("*")
            if path.is_file() and "run.lock" not in path.name
        ]
        return {
            path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
            for path in found
        }

    def same_as(self, run_name, unbroken, step):
        contents = [load_checkpoint(self.checkpoint(name, step)) for name in (run_name, unbroken)]
        for content in contents:
            content["config"].pop("checkpoint")
        self.same_content(*contents)
        self.assertEqual(self.records(run_name), self.records(unbroken))
        metrics = [
            json.loads(self.checkpoint(name, step).with_suffix(".json").read_text())["metrics"]
            for name in (run_name, unbroken)
        ]
        self.assertEqual(*metrics)
        self.assertEqual(list((self.folder / "runs" / run_name).rglob("*.tmp")), [])
        self.assertIsNone(self.lock_owner(run_name))


class EightWorkers(FaultTest):
    def test_one_is_killed(self):
        flags = ("training.num_workers=8", "training.epochs=2")
        self.train("--run_name", "unbroken", *flags)
        process = self.begin("killed", {"train_step": 0}, *flags)
        os.kill(self.arrived(process, "train_step", 16, rank=5), signal.SIGKILL)
        output = self.ends(process, status=1, seconds=30)
        self.assertNotIn("did not end by itself", output)
        errors = self.errors(output)
        self.assertEqual(errors.count("error: worker 5 was killed by signal 9"), 1, errors)
        self.assertLessEqual(len(errors), 2, errors)
        self.assertTrue(
            any(
                "run the same command again, it goes on from the last checkpoint" in line
                for line in errors
            ),
            errors,
        )
        saved = self.newest("killed")
        self.assertGreaterEqual(saved, 14)
        self.assertIn(f"goes on after step {saved}:", self.train("--run_name", "killed", *flags))
        self.same_as("killed", "unbroken", 20)


class TwoWorkers(FaultTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls().train("--run_name", "unbroken", *TWO)

    def started(self, process, count):
        """Wait until the command has started `count` processes: multiprocessing's two, then its
        workers."""
        process.until(lambda: len(descendants(process.pid)) >= count)

    def locked(self, process, run_name):
        """Wait until rank 0 of this start holds the run."""
        process.until(lambda: self.lock_owner(run_name) not in (None, self.owner))

    def test_all_killed_at_every_kind_of_moment(self):
        """By SIGKILL to all; then by one to the parent alone, whose workers must follow it, and the
        next start does not wait for that."""
        moments = (
            ("started", 3, 0),
            ("train_step", 9, 1),
            ("save", 2, 0),
            ("locked", 1, 0),
            ("upload", 2, 0),
            ("evaluate", 1, 1),
        )
        before = None
        for kill, (place, count, rank) in enumerate(2 * moments):
            self.owner = self.lock_owner("killed")
            process = self.begin(
                "killed", {"train_step": 0.01, "evaluate": 0.05, "save": 0.02, "upload": 0.02}, *TWO
            )
            with self.subTest(kill=kill, place=place):
                if place == "started":
                    self.started(process, count)
                elif place == "locked":
                    self.locked(process, "killed")
                else:
                    self.arrived(process, place, count, rank)
                alone = kill >= len(moments)
                (process.send_signal if alone else process.signal_all)(signal.SIGKILL)
                process.ends(-signal.SIGKILL, 10)
                if before:
                    self.ends(before, -signal.SIGKILL, 10)
                before = process
        self.ends(before, -signal.SIGKILL, 10)
        self.train("--run_name", "killed", *TWO)
        self.same_as("killed", "unbroken", 120)

    def test_second_is_refused_then_takes_over(self):
        name, hold, wait = "taken", self.folder / "hold.3", self.folder / "wait.1"
        hold.touch(), wait.touch()
        first = self.begin(name, {"train_step": 0.02, "save": str(hold.with_suffix(""))}, *TWO)
        pid = self.arrived(first, "save", 3)
        first.until(lambda: self.newest(name) == 14)
        files = self.files(name)
        self.user_mistake(
            "--run_name", name, *TWO, says=[f"another training, process {pid} on ", "--take_over"]
        )
        self.assertEqual((self.files(name), self.lock_owner(name)), (files, pid))

        arrivals = self.arrivals
        second = self.begin(name, {"train_step": str(wait.with_suffix(""))}, *TWO, "--take_over")
        new_pid = self.arrived(second, "train_step", 1)
        self.assertEqual(self.lock_owner(name), new_pid)
        files = self.files(name)
        hold.unlink()  # the first now saves its step, but the run is no longer its own
        errors = self.errors(self.ends(first, status=1))
        self.assertEqual(len(errors), 1, errors)
        self.assertIn(f"was taken over by process {new_pid} on ", errors[0])
        self.assertEqual(arrivals.read_text().count("save 0"), 3)
        self.assertEqual(self.files(name), files)
        wait.unlink()
        self.assertIn("goes on after step 14:", self.ends(second, status=0))
        self.same_as(name, "unbroken", 120)

    def test_disk_full_in_the_middle(self):
        """A limit on the size of files stands in for a full disk; it comes when step 14 has been
        saved. The other worker, in the midst of an evaluation by then, waits for nobody that could
        be seen to be gone."""
        hold = self.folder / "step.16"
        hold.touch()
        process = self.begin(
            "full", {"train_step": str(hold.with_suffix("")), "evaluate": 3600}, *TWO
        )
        pid = self.arrived(process, "train_step", 16)
        process.until(lambda: self.newest("full") == 14)
        saved = {
            name: version
            for name, version in self.files("full").items()
            if name.startswith("checkpoint_")
        }
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        hold.unlink()
        output = self.ends(process, status=2, seconds=30)
        self.assertNotIn("did not end by itself", output)
        errors = self.errors(output)
        self.assertEqual(len(errors), 1, output)
        for text in (
            "checkpoint_step_20.pt: the checkpoint could not be written",
            "free some space",
            "the last good checkpoint is",
            "checkpoint_step_14.pt",
        ):
            self.assertIn(text, errors[0])
        self.assertEqual(
            {
                name: version
                for name, version in self.files("full").items()
                if "checkpoint_" in name
            },
            saved,
        )
        self.assertIn("goes on after step 14:", self.train("--run_name", "full", *TWO))
        self.same_as("full", "unbroken", 120)

    def test_clocks_that_differ(self):
        """Wall clocks days apart, of the workers and of the run's owners one after the other; each
        jumps at every look."""
        flags = (
            *TWO,
            "checkpoint.interval_steps=1000",
            f"checkpoint.interval_minutes={0.4 / 60}",
            "checkpoint.keep_last_n=99",
        )
        with mock.patch.dict(os.environ, TRM_TEST_DAYS="[400, -30]"):
            process = self.begin("clocks", {"train_step": 0.04}, *flags)
            self.arrived(process, "train_step", 95)
            process.signal_all(signal.SIGKILL)
            self.ends(process, -signal.SIGKILL)
        with mock.patch.dict(os.environ, TRM_TEST_DAYS="[-900, 900]"):
            output = self.ends(self.begin("clocks", {"train_step": 0.02}, *flags), status=0)
        self.assertRegex(output, "goes on after step [1-9]")
        self.assertNotIn("watching", output)
        self.same_as("clocks", "unbroken", 120)
        contents = [
            load_checkpoint(path) for path in self.checkpoint("clocks", 120).parent.glob("*.pt")
        ]
        seconds = dict(sorted((content["step"], content["train_seconds"]) for content in contents))
        between = [
            after - before
            for (_, before), (step, after) in zip(seconds.items(), list(seconds.items())[1:])
            if step % 20
        ]
        self.assertGreaterEqual(len(between), 3, seconds)
        # 0.4 s, less what an evaluation took of it
        self.assertGreater(min(between), 0.25, seconds)


class Vanished(FaultTest):
    """Workers and hosts that leave their connections open and answer no more; "gone" after 5 s in
    place of 50."""

    def setUp(self):
        super().setUp()
        patch = mock.patch.dict(os.environ, TRM_TEST_BEAT="0.5")
        patch.start()
        self.addCleanup(patch.stop)

    def names(self, output, *ranks):
        """Its one error is of these workers, and says how to go on."""
        errors = self.errors(output)
        self.assertEqual(len(errors), 1, output)
        who = ", ".join(f"worker {rank} on {socket.gethostname()}" for rank in ranks)
        self.assertIn(f"no sign of life for 5 s from {who}: ", errors[0])
        self.assertIn("run the same command again, it goes on from the last checkpoint", errors[0])

    def test_a_worker_is_stopped(self):
        """The others end by themselves, and the command ends it."""
        flags = ("training.num_workers=3", "training.global_batch_size=9", "training.epochs=3")
        process = self.begin("stopped", {"train_step": 0.02}, *flags)
        pids = [self.arrived(process, "train_step", 12, rank) for rank in range(3)]
        os.kill(pids[1], signal.SIGSTOP)
        output = self.ends(process, status=1)
        self.names(output, 1)
        self.assertEqual(
            output.count("warning: worker 1 did not end by itself and is killed"), 1, output
        )
        self.assertEqual(output.count("warning: "), 1, output)
        saved = self.newest("stopped")
        self.assertGreaterEqual(saved, 7)
        self.assertIn(f"goes on after step {saved}:", self.train("--run_name", "stopped", *flags))
        self.assertIsNone(self.lock_owner("stopped"))

    def test_a_host_is_stopped(self):
        """Rank 0's, which holds the store; or another, and in an evaluation nobody waits for it."""
        for rank, place, pauses in (
            (0, "train_step", {"train_step": 0.05}),
            (1, "evaluate", {"evaluate": 3600}),
        ):
            with self.subTest(rank=rank, place=place):
                name = f"host_{rank}_{place}"
                processes = self.begin_hosts(name, pauses, "training.epochs=6")
                for k, process in enumerate(processes):
                    self.arrived(process, place, 10 if place == "train_step" else 1, k)
                processes[rank].send_signal(signal.SIGSTOP)
                self.names(self.ends(processes[1 - rank], status=1), rank)
                processes[rank].kill()

    def test_the_host_of_rank_0_is_killed(self):
        """While the other meets no collective: the store's connection tells it, and nothing else
        would."""
        processes = self.begin_hosts("store", {"evaluate": 3600}, "training.epochs=6")
        for rank, process in enumerate(processes):
            self.arrived(process, "evaluate", 1, rank)
        processes[0].kill()
        self.names(self.ends(processes[1], status=1), 0)

    def test_two_hosts_lose_each_other(self):
        """Each is in a network of its own; the link between them goes down. Each ends, and names
        the other."""
        names = [f"trm{os.getpid()}{end}" for end in "ab"]
        a, b = names
        commands = [
            f"ip netns add {a}",
            f"ip netns add {b}",
            f"ip link add {a} netns {a} type veth peer name {b} netns {b}",
        ]
        for number, name in enumerate(names, 1):
            commands += [
                f"ip -n {name} addr add 10.77.0.{number}/24 dev {name}",
                f"ip -n {name} link set {name} up",
                f"ip -n {name} link set lo up",
            ]
        made = begin(self, ["sh", "-c", " && ".join(commands)])
        self.addCleanup(lambda: begin(self, ["sh", "-c", f"ip netns del {a}; ip netns del {b}"]))
        if made.wait(60):
            self.skipTest(
                "no network namespaces here (test_a_host_is_stopped stands in): "
                + made.output().strip()
            )
        processes = self.begin_hosts(
            "apart",
            {"train_step": 0.05},
            "training.epochs=6",
            address="10.77.0.1",
            inside=[("ip", "netns", "exec", name) for name in names],
            environments=[{"GLOO_SOCKET_IFNAME": name} for name in names],
        )
        for rank, process in enumerate(processes):
            self.arrived(process, "train_step", 10, rank)
        run(self, ["ip", "-n", names[1], "link", "set", names[1], "down"])
        for rank, process in enumerate(processes):
            self.names(self.ends(process, status=1), 1 - rank)
        self.assertIsNone(self.lock_owner("apart"))

    def test_all_are_stopped_for_a_while(self):
        """As when a laptop is closed: longer than a worker may be silent, and nobody is gone. One
        awakes a little before the other."""
        flags = ("training.num_workers=2", "training.epochs=3")
        self.train("--run_name", "unbroken", *flags)
        process = self.begin("lid", {"train_step": 0.05}, *flags)
        pid = self.arrived(process, "train_step", 12, 1)
        process.signal_all(signal.SIGSTOP)
        pause(6)
        for awake in (process.pid, pid):  # the parent holds the store
            os.kill(awake, signal.SIGCONT)
        pause(1.5)
        process.signal_all(signal.SIGCONT)
        self.assertEqual(self.errors(self.ends(process, status=0, seconds=300)), [])
        self.same_as("lid", "unbroken", 30)

    def test_rank_0_takes_long_to_end(self):
        """The others have done what they had to, and give no more signs."""
        process = self.begin(
            "late",
            {"upload": 6},
            "training.num_workers=2",
            "--max_steps",
            "20",
            "checkpoint.interval_steps=1000",
        )
        self.assertEqual(self.errors(self.ends(process, status=0, seconds=300)), [])
        self.assertEqual(self.newest("late"), 20)


if __name__ == "__main__":
    unittest.main()
