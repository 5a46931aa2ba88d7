"""Sweeps: real launchers, killed and stopped and two at once; every cell is run once, to the end of
an unbroken one."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import unittest
from pathlib import Path
from unittest import mock

import sweep_arguments
from sweep_state import Progress, SweepFolder, changes, failures

from checkpoint_manager import load_checkpoint
from config import load_config
from run_lock import RunLock
from storage import join, open_folder
from tests.gcs_server import GCSTest
from tests.helpers import ROOT, TINY, CommandTest, write_config
from tests.processes import run, stays
from tests.sweeps import SweepTest
from utils import RunFailure


class Cells:
    """What holds in both kinds of folder."""

    def test_every_cell_once_and_the_summary(self):
        output = self.sweep(*self.configs(), "--local", "--seeds", "0", "1")
        self.assertEqual(self.starts(), {"a_seed0": 1, "a_seed1": 1, "b_seed0": 1, "b_seed1": 1})
        self.assertEqual(
            self.row(output, "b_seed1"),
            ["b_seed1", "finished", "1", "60", "87.50%", "50.00%", "1.50"],
        )
        (attempt,) = self.attempts("a_seed1")
        self.assertEqual((attempt["exit_status"], attempt["given_up"]), (0, False))
        again = self.sweep(*self.configs(), "--local", "--seeds", "0", "1")
        self.assertEqual(self.starts(), {"a_seed0": 1, "a_seed1": 1, "b_seed0": 1, "b_seed1": 1})
        self.assertEqual(self.row(again, "a_seed0")[1], "finished")
        # one whose run is gone is none that is finished
        open_folder(self.out).delete("a_seed0/eval.json")
        self.assertEqual(
            self.row(
                self.sweep(*self.configs(), "--local", "--seeds", "0", "1", "--status"), "a_seed0"
            )[1],
            "waiting",
        )
        self.sweep(*self.configs(), "--local", "--seeds", "0", "1")
        self.assertEqual(self.starts(), {"a_seed0": 2, "a_seed1": 1, "b_seed0": 1, "b_seed1": 1})

    def test_two_launchers_at_once(self):
        arguments = (*self.configs("abcd"), "--local", "--jobs", "2")
        launchers = [self.begin(*arguments) for _ in range(2)]
        for output in [self.ends(launcher) for launcher in launchers]:
            self.assertEqual([self.row(output, name)[1] for name in "abcd"], ["finished"] * 4)
        self.assertEqual(self.starts(), {"a": 1, "b": 1, "c": 1, "d": 1})
        pids = {attempt["pid"] for name in "abcd" for attempt in self.attempts(name)}
        self.assertLessEqual(pids, {launcher.pid for launcher in launchers})

    def test_a_launcher_of_another_host_that_is_killed(self):
        """By its lock alone, whatever the clocks say; and not before it is dead."""
        self.plan = {"a": ["wait"]}
        first = self.begin(*self.configs(), "--local", host="elsewhere")
        first.until(lambda: self.pids("a"))
        second = self.begin(*self.configs(), "--local")
        second.until(lambda: self.states("b") == ["finished"])
        # longer than a dead one is watched
        stays(lambda: (self.starts(), self.states("a")) == ({"a": 1, "b": 1}, ["running"]), 2.5)
        status = self.sweep("--status", f"logging.output_dir={self.out}")
        self.assertRegex(status, rf"(?m)^a +running +1 .*process {first.pid} on \S+$")
        first.kill()
        os.kill(self.pids("a")[0], signal.SIGKILL)
        # once when it was found, once when it had died: not at every look
        self.assertEqual(self.ends(second).count("watching for"), 2)
        self.assertEqual(self.starts(), {"a": 2, "b": 1})
        self.assertEqual([attempt["exit_status"] for attempt in self.attempts("a")], [None, 0])


class LocalSweep(Cells, SweepTest):
    pass


class GCSSweep(Cells, GCSTest, SweepTest):
    def setUp(self):
        super().setUp()
        self.out = join(self.url, "runs")
        patch = mock.patch.dict(os.environ, {"TRM_CACHE": str(self.folder / "cache")})
        patch.start()
        self.addCleanup(patch.stop)

    def test_a_folder_out_of_reach(self):
        """When a cell has ended: its run folder tells so later, and it is not started again."""
        self.plan = {"a": ["wait"]}
        launcher = self.begin(*self.configs("a"), "--local", TRM_TEST_DEADLINE="2")
        launcher.until(lambda: self.pids("a"))
        # of the launcher alone
        fault = self.proxy.fail("status", 503, times=99, method="POST", path="ifGenerationMatch")
        self.wait_file.unlink()
        launcher.until(
            lambda: re.search("warning: .*attempts.json: no success within", launcher.output())
        )
        fault.times = 0
        self.ends(launcher)
        self.assertEqual((self.states("a"), self.starts()), (["finished"], {"a": 1}))


class Launcher(SweepTest):
    def test_a_launcher_that_was_suspended(self):
        """It learns that its cell is another's, ends its training and writes nothing about it."""
        self.plan = {"a": ["wait", "wait"]}
        first = self.begin(*self.configs("a"), "--local", host="elsewhere")
        first.until(lambda: self.pids("a"))
        first.send_signal(signal.SIGSTOP)
        second = self.begin(*self.configs("a"), "--local")
        second.until(lambda: len(self.pids("a")) == 2)
        before = self.attempts("a")
        first.send_signal(signal.SIGCONT)
        first.until(lambda: "SIGTERM" in self.log("a"))
        self.assertEqual((self.attempts("a"), before[-1]["pid"]), (before, second.pid))
        self.wait_file.unlink()
        self.ends(second)
        self.assertIn(f"was taken over by process {second.pid}", self.ends(first))
        self.assertEqual((self.starts(), self.log("a").count("SIGTERM")), ({"a": 2}, 1))

    def test_failures(self):
        self.plan = {"a": ["mumble", "kill"] * 2, "b": ["mistake"] * 9, "c": ["kill", "finish"]}
        arguments = (*self.configs("abcd"), "--local", "--max_attempts", "2")
        output = self.sweep(*arguments, status=1)
        self.assertEqual(self.starts(), {"a": 2, "b": 1, "c": 2, "d": 1})
        self.assertEqual(self.states(*"abcd"), ["failed", "failed", "finished", "finished"])
        last = [self.attempts(name)[-1] for name in "abcd"]
        self.assertEqual([attempt["exit_status"] for attempt in last], [137, 2, 0, 0])
        self.assertEqual(self.row(output, "b")[:3], ["b", "failed", "1"])
        self.assertEqual(
            [attempt["error"] for attempt in last],
            ["killed by signal 9", "the loss is not finite", None, None],
        )
        # the others are not kept waiting by one that fails
        self.assertEqual(
            [line.split()[0] for line in self.starts_file.read_text().splitlines()],
            ["a", "b", "c", "d", "a", "c"],
        )
        self.sweep(*arguments, status=1)
        self.assertEqual(self.starts(), {"a": 2, "b": 1, "c": 2, "d": 1})
        self.sweep(*arguments, "--retry_failed", status=1)
        self.assertEqual(self.starts(), {"a": 4, "b": 2, "c": 2, "d": 1})
        self.assertEqual(len(self.attempts("a")), 4)

    def test_an_end_without_an_evaluation_is_none(self):
        self.plan = {"a": ["nothing"]}
        self.assertIn("it ended well, but", self.sweep(*self.configs("a"), "--local", status=1))
        self.assertEqual((self.states("a"), self.starts()), (["failed"], {"a": 1}))

    def test_a_cell_that_somebody_stops(self):
        self.plan = {"a": ["wait"]}
        launcher = self.begin(*self.configs(), "--local")
        launcher.until(lambda: self.pids("a"))
        os.kill(self.pids("a")[0], signal.SIGTERM)
        self.ends(launcher, 1)
        self.assertEqual(
            (self.states("a", "b"), self.starts()), (["waiting", "finished"], {"a": 1, "b": 1})
        )
        self.sweep(*self.configs(), "--local")
        self.assertEqual(self.starts(), {"a": 2, "b": 1})

    def test_told_to_stop(self):
        for number, name in ((signal.SIGTERM, "a"), (signal.SIGINT, "b")):
            with self.subTest(number):
                self.plan = {f"{name}_seed0": ["wait"], f"{name}_seed1": ["wait"]}
                arguments = (
                    *self.configs(name),
                    "--local",
                    "--seeds",
                    "0",
                    "1",
                    "2",
                    "--jobs",
                    "2",
                )
                launcher = self.begin(*arguments)
                launcher.until(lambda: len(self.pids(name)) == 2)
                launcher.send_signal(number)
                self.ends(launcher, 128 + number)
                self.assertEqual(
                    self.states(*(f"{name}_seed{k}" for k in range(3))), ["waiting"] * 3
                )
                for cell in (f"{name}_seed{k}" for k in range(2)):
                    (attempt,) = self.attempts(cell)
                    self.assertEqual((attempt["exit_status"], attempt["error"]), (143, None))
                    self.assertEqual(self.log(cell).split()[-1], "SIGTERM")
                self.sweep(*arguments)
                self.assertEqual([self.starts()[f"{name}_seed{k}"] for k in range(3)], [2, 2, 1])

    def test_a_terminal_that_closes(self):
        """The trainings are told to end, as by SIGTERM; under nohup nothing happens."""
        self.plan = {"a": ["wait"]}
        launcher = self.begin(*self.configs("a"), "--local", terminal=True)
        launcher.until(lambda: self.pids("a"))
        launcher.hang_up()
        launcher.ends(128 + signal.SIGHUP)
        self.assertEqual(self.log("a").split()[-1], "SIGTERM")
        self.assertEqual(
            (self.states("a"), self.attempts("a")[-1]["exit_status"]), (["waiting"], 143)
        )
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as by nohup
        self.addCleanup(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        self.plan = {"a": ["", "wait"]}
        launcher = self.begin(*self.configs("a"), "--local")
        launcher.until(lambda: len(self.pids("a")) == 2)
        launcher.send_signal(signal.SIGHUP)
        self.wait_file.unlink()
        self.ends(launcher)

    def test_a_training_that_outlives_its_launcher(self):
        """It is waited for: two would write to one run."""
        self.plan = {"a": ["locked"]}
        launcher = self.begin(*self.configs("a"), "--local")
        run = open_folder(join(self.out, "a"))
        launcher.until(lambda: self.pids("a") and self.lock_owner(run) in self.pids("a"))
        launcher.kill()
        launcher.ends(-signal.SIGKILL)
        self.assertRegex(
            self.sweep("--status", f"logging.output_dir={self.out}"),
            r"(?m)^a +running .*, no heartbeat$",
        )
        launcher = self.begin(*self.configs("a"), "--local")
        self.assertIn("another training holds", launcher.line())
        self.assertEqual(self.starts(), {"a": 1})
        self.wait_file.unlink()
        self.ends(launcher)
        # what it has finished is not started again
        self.assertEqual((self.starts(), self.states("a")), ({"a": 1}, ["finished"]))

    def test_a_run_that_somebody_else_trains_is_no_mistake(self):
        self.plan = {"a": ["refused"]}
        launcher = self.begin(*self.configs("a"), "--local")
        launcher.until(lambda: self.pids("a"))
        lock = RunLock(open_folder(join(self.out, "a")))
        self.addCleanup(lock.release)
        for says in ("a: attempt 1", "a: waiting", "a: another training holds"):
            self.assertIn(says, launcher.line())
        lock.release()
        self.ends(launcher)
        self.assertEqual((self.starts(), failures(self.attempts("a"))), ({"a": 2}, 0))

    def test_cells_at_once_share_the_cores(self):
        with mock.patch.dict(os.environ):
            del os.environ["OMP_NUM_THREADS"]
            self.sweep(*self.configs("ab"), "--local", "--jobs", "2")
            self.sweep(*self.configs("c"), "--local")
        self.assertEqual(
            [self.log(name) for name in "abc"],
            [f"threads {max(1, os.cpu_count() // 2)}\n"] * 2 + ["threads None\n"],
        )

    def test_attempts_that_another_has_replaced(self):
        folders = [SweepFolder(self.out) for _ in range(2)]
        first = folders[0].write("a", [{"pid": 1}], None)
        second = folders[1].write("a", [{"pid": 2}], first)
        with self.assertRaisesRegex(RunFailure, "another launcher has taken over a"):
            folders[0].write("a", [{"pid": 3}], first)
        self.assertEqual(folders[0].attempts("a"), ([{"pid": 2}], second))

    def test_failures_are_counted_since_the_cell_was_given_up(self):
        keys = ("exit_status", "given_up")
        ends = [(1, False), (2, True), (None, False), (137, False), (143, False), (0, False)]
        self.assertEqual(failures([dict(zip(keys, end)) for end in ends]), 1)
        self.assertEqual(failures([dict(zip(keys, end)) for end in ends[:1] * 2]), 2)

    def test_a_configuration_that_every_machine_settles_for_itself(self):
        """A sweep that one machine has begun in bfloat16 goes on on one that would take float32."""
        (path,) = self.configs("a")
        text = Path(path).read_text().replace("forward_dtype: float32", "forward_dtype: auto")
        Path(path).write_text(text)
        ours = load_config(path)
        for theirs in ("bfloat16", "float32", "auto"):
            stored = dataclasses.asdict(ours)
            stored["model"]["forward_dtype"] = theirs
            self.assertEqual(changes(ours, Progress(config=stored)), "")
        stored["model"]["hidden_size"] = 64
        self.assertEqual(changes(ours, Progress(config=stored)), "model.hidden_size 64 -> 32")

    def test_dry_run_starts_nothing(self):
        self.sweep(*self.configs("a"), "--local")
        output = self.sweep(*self.configs(), "--local", "training.lr_warmup_steps=10", "--dry_run")
        self.assertRegex(output, r"(?m)^a  finished  .*\n^b  waiting  ")
        self.assertEqual(
            (self.starts(), sorted(os.listdir(self.out + "/sweep"))), ({"a": 1}, ["a"])
        )

    def test_mistakes_in_flags(self):
        """Each ends with one line that says the way out."""
        good = self.configs("a")
        keep_alive = "a flag of scripts/keep_alive.sh: give it after --, as --"
        for words, says in [
            (
                "--local --spot",
                f"--spot: {keep_alive} --spot, or with one slice, as --slices trm-a:spot",
            ),
            ("--local --poll 3", f"--poll: {keep_alive} --poll; see"),
            ("--local --polls", "--polls: unknown argument"),
            (
                "--local --seeds 0,1",
                "--seeds: '0,1' is no whole number (several have spaces between them",
            ),
            ("--local --jobs two", "--jobs: 'two' is no whole number"),
            ("--local --max_attempt 2", "--max_attempt: unknown argument"),
            ("--loc", "--loc: unknown argument"),
            ("--seeds --local", "--seeds: expected at least one argument"),
            ("--slices", "--slices: expected at least one argument"),
            ("--local --max_steps", "--max_steps: expected one argument"),
            ("--local --max_steps 0", "--max_steps 0: must be >= 1"),
        ]:
            with self.subTest(words):
                output = self.sweep(*good, *words.split(), status=2)
                self.assertRegex(output, r"\Aerror: .*\n\Z")
                self.assertIn(says, output)
        known = (ROOT / "scripts" / "keep_alive.sh").read_text()
        for flag in sweep_arguments.KEEP_ALIVE_FLAGS:
            self.assertIn(flag, known)

    def test_status_of_nothing(self):
        """It is said where was looked, and an override is not dropped."""
        good, here = self.configs("a"), f"{self.out}/sweep"
        output = self.sweep(*good, "--status", "--local", status=2)
        self.assertRegex(output, rf"\Aerror: no cell of this sweep is in {here}: .*\n\Z")
        for words in (["training.lr=1"], ["--seeds", "1"]):
            self.assertIn(
                f"error: {words[0]}: of which configuration?",
                self.sweep("--status", *words, status=2),
            )
        self.sweep(*good, "--local")
        self.assertEqual(
            self.row(self.sweep("--status", f"logging.output_dir={self.out}"), "a")[1], "finished"
        )
        self.assertEqual(
            self.row(self.sweep(*self.configs("ab"), "--status"), "b")[1:3], ["waiting", "0"]
        )
        self.assertIn("no cell of this sweep", self.sweep(*self.configs("b"), "--status", status=2))

    def test_a_run_that_was_trained_by_hand(self):
        """It is a cell that is finished."""
        self.sweep(*self.configs("a"), "--local")
        shutil.rmtree(f"{self.out}/sweep")
        self.assertEqual(
            self.row(self.sweep(*self.configs("a"), "--local"), "a")[1:3], ["finished", "0"]
        )
        self.assertEqual(self.starts(), {"a": 1})

    def test_mistakes(self):
        good, bad = (
            self.configs("a"),
            [
                str(
                    write_config(
                        self.folder / f"bad{k}.yaml",
                        f"data: {{dataset_path: x}}\ntraining: {{lr: {k}}}",
                    )
                )
                for k in (-1, -2)
            ],
        )
        twin = str(write_config(self.folder / "other" / "a.yaml"))
        for arguments, says in [
            ((*good, *bad), ["bad-1.yaml: training.lr = -1", "bad-2.yaml: training.lr = -2"]),
            ((*good, str(self.folder / "none*.yaml")), ["none*.yaml: cannot read"]),
            ((*good, "training.lr=fast"), ["training.lr = 'fast'"]),
            ((*good, twin), ["two cells named a"]),
            ((*good, "--seeds", "1", "1"), ["two cells named a_seed1"]),
            ((), ["no configuration"]),
            ((*good, "--jobs", "0"), ["--jobs 0"]),
            ((*good, "--max_attempts", "0"), ["--max_attempts 0"]),
            ((*good, "--slices", "x"), ["--local", "--slices"]),
            ((*good, "training.seed=1", "--seeds", "1"), ["--seeds"]),
            (
                (*good, str(write_config(self.folder / "e.yaml"))),
                ["logging.output_dir: the configurations have several, ", "/runs and runs, "],
            ),
        ]:
            with self.subTest(arguments):
                output = self.sweep("--local", *arguments, status=2)
                errors = [line for line in output.splitlines() if line.startswith("error: ")]
                self.assertEqual(len(errors), 2 if "bad-1" in says[0] else 1, output)
                for text in says:
                    self.assertIn(text, " ".join(errors))
        self.assertIn("either --local", self.sweep(*good, status=2))
        self.assertFalse((self.folder / "runs").exists())
        self.sweep(*good, "--local")
        self.assertIn(
            "training.lr 0.01 -> 0.02", self.sweep(*good, "--local", "training.lr=2e-2", status=2)
        )
        self.assertEqual(self.starts(), {"a": 1})


class RealTraining(CommandTest, SweepTest):
    def setUp(self):
        SweepTest.setUp(self)
        self.arrivals, self.hold = self.folder / "arrivals", self.folder / "hold"
        self.arrivals.touch()
        self.folder = type(self).folder  # the runs of a class lie in one
        self.out = str(self.folder / "runs")

    def test_killed_with_its_training_then_gone_on_with(self):
        """By SIGKILL; the same command then runs both cells to the end of unbroken ones."""
        self.train("--run_name", "unbroken", "training.seed=1", "training.epochs=3")
        self.hold.with_suffix(".17").touch()
        slow = {
            "TRM_TEST_PAUSES": json.dumps({"train_step": str(self.hold)}),
            "TRM_TEST_ARRIVALS": str(self.arrivals),
        }
        arguments = (str(self.config), "--local", "--seeds", "1", "2", "training.epochs=3")
        launcher = self.begin(*arguments, training="slow", **slow)
        launcher.until(lambda: self.arrivals.read_text().count("train_step") == 17)
        launcher.kill()
        launcher.ends(-signal.SIGKILL)
        os.kill(int(self.arrivals.read_text().split()[-1]), signal.SIGKILL)
        output = run(self, ["bash", "scripts/launch_sweep.sh", *arguments])
        self.assertIn("goes on after step 14:", self.log("tiny_seed1"))
        self.same_content(
            load_checkpoint(self.checkpoint("tiny_seed1", 30)),
            load_checkpoint(self.checkpoint("unbroken", 30)),
        )
        self.assertEqual(self.records("tiny_seed1"), self.records("unbroken"))
        self.assertNotEqual(self.records("tiny_seed2"), self.records("unbroken"))
        for name, attempts in (("tiny_seed1", "2"), ("tiny_seed2", "1")):
            exact = {
                r["weights"]: r["exact_accuracy"]
                for r in json.loads((self.folder / "runs" / name / "eval.json").read_text())[
                    "results"
                ]
            }
            self.assertEqual(
                self.row(output, name)[:6],
                [name, "finished", attempts, "30", f"{exact['ema']:.2%}", f"{exact['raw']:.2%}"],
            )

    def test_max_steps(self):
        """A first look at every cell, from which the same command without it goes on."""
        arguments = (str(self.config), "--local", "--seeds", "3", "training.epochs=2")  # 20 steps
        for _ in range(2):
            output = self.sweep(
                *arguments, "--max_steps", "8", training="slow", TRM_TEST_PAUSES="{}"
            )
            # the second time nothing is left to do
            self.assertEqual(
                self.row(output, "tiny_seed3")[:4], ["tiny_seed3", "waiting", "1", "8"]
            )
        self.assertFalse((self.folder / "runs" / "tiny_seed3" / "eval.json").exists())
        output = self.sweep(*arguments, "--max_steps", "100", training="slow", TRM_TEST_PAUSES="{}")
        self.assertEqual(self.row(output, "tiny_seed3")[:4], ["tiny_seed3", "finished", "2", "20"])
        self.assertIn("goes on after step 8:", self.log("tiny_seed3"))

    def test_stopped_while_it_trains(self):
        """The cell has a checkpoint of the step that it was at."""
        slow = {
            "TRM_TEST_PAUSES": json.dumps({"train_step": 0.05}),
            "TRM_TEST_ARRIVALS": str(self.arrivals),
        }
        launcher = self.begin(str(self.config), "--local", training="slow", **slow)
        launcher.until(lambda: self.arrivals.read_text().count("train_step") == 17)
        launcher.terminate()
        self.ends(launcher, 143)
        steps = [
            json.loads(path.read_text())["step"]
            for path in (self.folder / "runs" / "tiny" / "checkpoints").glob("*.json")
        ]
        self.assertGreaterEqual(max(steps), 17)
        self.assertEqual(self.states("tiny"), ["waiting"])
        self.assertEqual(self.attempts("tiny")[-1]["exit_status"], 143)

    def test_datasets_are_looked_at_before_anything_starts(self):
        broken = write_config(
            self.folder / "broken.yaml",
            TINY.format(data=self.folder / "nowhere", out=self.folder / "none"),
        )
        command = [
            sys.executable,
            "scripts/sweep.py",
            str(self.config),
            str(broken),
            f"logging.output_dir={self.folder}/none",
            "--local",
        ]
        self.assertRegex(
            run(self, command, 2), r"\Aerror: \S+broken.yaml: .*there is no train split.*\n\Z"
        )
        self.assertFalse((self.folder / "none").exists())


if __name__ == "__main__":
    unittest.main()
