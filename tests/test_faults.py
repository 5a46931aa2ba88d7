"""Workers, hosts, disks and clocks that fail in the midst of a run: it ends clearly, and goes on to the same end."""
import json
import os
import random
import resource
import signal
import subprocess
import time
import unittest
from unittest import mock

from checkpoint_manager import load_checkpoint
from tests.helpers import CommandTest
from tests.test_preemption import PreemptionTest

TWO = ("training.num_workers=2", "training.epochs=12")      # 120 steps


class FaultTest(PreemptionTest):
    def ends(self, process, status=143, seconds=60):
        """What it and its workers print to their end, which comes in time."""
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            self.fail(f"it or a worker is still there after {seconds} s: {process.communicate()[0]}")
        self.assertEqual(process.returncode, status, output)
        return output

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
        found = [path for path in (self.folder / "runs" / run_name).rglob("*") if path.is_file() and "run.lock" not in path.name]
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in found}

    def same_as(self, run_name, unbroken, step):
        contents = [load_checkpoint(self.checkpoint(name, step)) for name in (run_name, unbroken)]
        for content in contents:
            content["config"].pop("checkpoint")
        self.same_content(*contents)
        self.assertEqual(self.records(run_name), self.records(unbroken))
        metrics = [json.loads(self.checkpoint(name, step).with_suffix(".json").read_text())["metrics"] for name in (run_name, unbroken)]
        self.assertEqual(*metrics)
        self.assertEqual([path for path in (self.folder / "runs" / run_name).rglob("*.tmp")], [])
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
        self.assertTrue(any("run the same command again, it goes on from the last checkpoint" in line for line in errors), errors)
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
        """Wait until the command has started `count` processes: multiprocessing's two, then its workers."""
        while process.poll() is None:
            if self.descendants(process.pid) >= count:
                return
            time.sleep(0.005)
        self.fail(process.stdout.read())

    def locked(self, process, run_name):
        """Wait until rank 0 of this start holds the run."""
        while process.poll() is None:
            if (pid := self.lock_owner(run_name)) and pid != self.owner:
                return
            time.sleep(0.005)
        self.fail(process.stdout.read())

    def test_all_killed_twenty_times(self):
        """By SIGKILL to all, or to the parent alone, whose workers must follow it; the next start does not wait for that."""
        draw, before = random.Random(1), None
        for kill in range(20):
            place = draw.choice(["started", "locked", "train_step", "train_step", "train_step", "save", "upload", "evaluate"])
            count = draw.randint(1, {"started": 4, "train_step": 15, "save": 2, "upload": 2}.get(place, 1))
            rank = 0 if place in ("save", "upload") else draw.randrange(2)
            self.owner = self.lock_owner("killed")
            process = self.begin("killed", {"train_step": 0.01, "evaluate": 0.05, "save": 0.02, "upload": 0.02}, *TWO)
            with self.subTest(kill=kill, place=place, count=count, rank=rank):
                if place == "started":
                    self.started(process, count)
                elif place == "locked":
                    self.locked(process, "killed")
                else:
                    self.arrived(process, place, count, rank)
                (os.killpg if kill % 2 else os.kill)(process.pid, signal.SIGKILL)
                self.assertEqual(process.wait(10), -signal.SIGKILL)
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
        while self.newest(name) != 14:
            time.sleep(0.005)
        files = self.files(name)
        self.user_mistake("--run_name", name, *TWO, says=[f"another training, process {pid} on ", "--take_over"])
        self.assertEqual((self.files(name), self.lock_owner(name)), (files, pid))

        arrivals = self.arrivals
        second = self.begin(name, {"train_step": str(wait.with_suffix(""))}, *TWO, "--take_over")
        new_pid = self.arrived(second, "train_step", 1)
        self.assertEqual(self.lock_owner(name), new_pid)
        files = self.files(name)
        hold.unlink()       # the first now saves: a step that it has done, of a run that is not its any more
        errors = self.errors(self.ends(first, status=1))
        self.assertEqual(len(errors), 1, errors)
        self.assertIn(f"was taken over by process {new_pid} on ", errors[0])
        self.assertEqual(arrivals.read_text().count("save 0"), 3)
        self.assertEqual(self.files(name), files)
        wait.unlink()
        self.assertIn("goes on after step 14:", self.ends(second, status=0))
        self.same_as(name, "unbroken", 120)

    def test_disk_full_in_the_middle(self):
        """A limit on the size of files stands in for a full disk; it comes when step 14 has been saved. The other worker, in the midst of
        an evaluation by then, waits for nobody that could be seen to be gone."""
        hold = self.folder / "step.16"
        hold.touch()
        process = self.begin("full", {"train_step": str(hold.with_suffix("")), "evaluate": 3600}, *TWO)
        pid = self.arrived(process, "train_step", 16)
        while self.newest("full") != 14:
            time.sleep(0.005)
        saved = {name: version for name, version in self.files("full").items() if name.startswith("checkpoint_")}
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        hold.unlink()
        output = self.ends(process, status=2, seconds=30)
        self.assertNotIn("did not end by itself", output)
        errors = self.errors(output)
        self.assertEqual(len(errors), 1, output)
        for text in ("checkpoint_step_20.pt: the checkpoint could not be written", "free some space", "the last good checkpoint is", "checkpoint_step_14.pt"):
            self.assertIn(text, errors[0])
        self.assertEqual({name: version for name, version in self.files("full").items() if "checkpoint_" in name}, saved)
        self.assertIn("goes on after step 14:", self.train("--run_name", "full", *TWO))
        self.same_as("full", "unbroken", 120)

    def test_clocks_that_differ(self):
        """Wall clocks days apart, of the workers and of the run's owners one after the other; each jumps at every look."""
        flags = (*TWO, "checkpoint.interval_steps=1000", f"checkpoint.interval_minutes={0.4 / 60}", "checkpoint.keep_last_n=99")
        with mock.patch.dict(os.environ, TRM_TEST_DAYS="[400, -30]"):
            process = self.begin("clocks", {"train_step": 0.04}, *flags)
            self.arrived(process, "train_step", 95)
            os.killpg(process.pid, signal.SIGKILL)
            self.ends(process, -signal.SIGKILL)
        with mock.patch.dict(os.environ, TRM_TEST_DAYS="[-900, 900]"):
            output = self.ends(self.begin("clocks", {"train_step": 0.02}, *flags), status=0)
        self.assertRegex(output, "goes on after step [1-9]")
        self.assertNotIn("watching", output)
        self.same_as("clocks", "unbroken", 120)
        contents = [load_checkpoint(path) for path in self.checkpoint("clocks", 120).parent.glob("*.pt")]
        seconds = dict(sorted((content["step"], content["train_seconds"]) for content in contents))
        between = [after - before for (_, before), (step, after) in zip(seconds.items(), list(seconds.items())[1:]) if step % 20]
        self.assertGreaterEqual(len(between), 3, seconds)
        # 0.4 s, less what an evaluation took of it
        self.assertGreater(min(between), 0.25, seconds)


if __name__ == "__main__":
    unittest.main()
