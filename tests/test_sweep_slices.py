"""Sweeps on TPU slices: what a slice is, which cell runs where, and what becomes of a slice at the
end."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import unittest
from pathlib import Path
from unittest import mock

import sweep_cells
import sweep_launcher
import sweep_slices
from sweep_state import SweepFolder

from storage import join, open_folder
from tests.gcs_server import GCSTest
from tests.helpers import ROOT, TINY, write_config
from tests.processes import begin, stays
from tests.slice import NAME, SliceTest, executable, load_gcloud
from tests.sweeps import SweepTest


class Slices(GCSTest, SweepTest):
    """With the fake training; slices, if there are any, are those of tests/gcloud."""

    def setUp(self):
        super().setUp()
        self.out, self.cloud = join(self.url, "runs"), self.folder / "cloud"
        self.cloud.mkdir()
        (self.cloud / "host_environment.json").write_text("{}")
        executable(
            self.folder / "bin" / "gcloud",
            f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/gcloud "$@"\n',
        )
        executable(
            self.folder / "venv" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        )
        environment = {
            "TPU_PROJECT": "my-project-1",
            "TPU_BUCKET": self.url,
            "TRM_TEST_CLOUD": str(self.cloud),
            "TRM_CACHE": str(self.folder / "cache"),
            "TRM_VENV": str(self.folder / "venv"),
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "HOME": str(self.folder),
        }
        patch = mock.patch.dict(os.environ, environment)
        patch.start()
        self.addCleanup(patch.stop)
        for name in ("SSH_AUTH_SOCK", "TPU_ZONE", "TPU_NAME"):
            os.environ.pop(name, None)

    def configs(self, names="ab"):
        text = TINY.format(data="nowhere", out="runs").replace("device: cpu", "device: tpu")
        return [str(write_config(self.folder / f"{name}.yaml", text)) for name in names]

    def test_two_launchers_at_once(self):
        """With the same slices: one cell at a time on each."""
        launchers = [self.begin(*self.configs("abcde"), "--slices", "s1", "s2") for _ in range(2)]
        for launcher in launchers:
            self.ends(launcher)
        self.assertEqual(self.starts(), dict.fromkeys("abcde", 1))
        self.assertEqual({self.attempts(name)[-1]["slice"] for name in "abcde"}, {"s1", "s2"})

    def test_what_runs_on_a_slice_is_gone_on_with_there(self):
        self.plan = {"a": ["locked", "attach"], "b": ["locked", "attach"]}
        configs = self.configs("abc")
        launcher = self.begin(*configs, "--slices", "s1", "s2")
        runs = [open_folder(join(self.out, name)) for name in "ab"]
        launcher.until(
            lambda: all(
                self.pids(name) and self.lock_owner(run) in self.pids(name)
                for name, run in zip("ab", runs)
            )
        )
        launcher.kill()
        launcher.ends(-signal.SIGKILL)
        on = {name: self.attempts(name)[-1]["slice"] for name in "ab"}
        launcher = self.begin(
            *configs, "--slices", on["b"], on["a"]
        )  # the first cell that is there is not the first slice's
        launcher.until(lambda: len(self.pids("a")) == len(self.pids("b")) == 2)
        self.wait_file.unlink()
        self.assertNotIn("another training", self.ends(launcher))
        self.assertEqual(self.starts(), {"a": 2, "b": 2, "c": 1})
        self.assertEqual({name: self.attempts(name)[-1]["slice"] for name in "ab"}, on)

    def make_slices(self, *names):
        gcloud = load_gcloud()
        for name in names:
            gcloud.make_slice(name, "v4-8")

    def slices(self):
        return sorted(path.name for path in (self.cloud / "slices").iterdir())

    def history(self, name):
        keys = ("slice", "accelerator_type", "zone", "spot", "exit_status")
        return [tuple(attempt[key] for key in keys) for attempt in self.attempts(name)]

    def test_slices_of_several_kinds(self):
        """Each is asked for as its word says, and attempts.json tells what ran where."""
        kinds = ("s1:queued", "s2:spot:v4-16:europe-west4-a")
        output = self.sweep(
            *self.configs("abcd"), "--slices", *kinds, "tpu.zone=us-east1-d", "--", "--queued"
        )
        ran = {name: self.history(name) for name in "abcd"}
        self.assertEqual(
            {one for (one,) in ran.values()},
            {("s1", "v4-8", "us-east1-d", False, 0), ("s2", "v4-16", "europe-west4-a", True, 0)},
        )
        lines = output.splitlines()
        self.assertIn("hours on slices of different types (v4-16, v4-8) do not compare", lines)
        for name, ((one, *_),) in ran.items():
            said = {"s1": "s1:v4-8:us-east1-d", "s2": "s2:v4-16:europe-west4-a:spot"}
            self.assertEqual(self.row(output, name)[-1], said[one])
            (words,) = self.commands(name)
            own = {
                "s1": "tpu.name=s1 --queued",
                "s2": "tpu.name=s2 tpu.accelerator_type=v4-16 tpu.zone=europe-west4-a --spot"
                " --queued",
            }
            self.assertTrue(words.endswith(f" tpu.zone=us-east1-d {own[one]}"), words)
        for one in (
            "tpu.name=s1 tpu.project=my-project-1 tpu.accelerator_type=v4-8 tpu.zone=us-east1-d",
            "tpu.name=s2 tpu.project=my-project-1 tpu.accelerator_type=v4-16 "
            "tpu.zone=europe-west4-a",
        ):
            self.assertIn(f"  bash scripts/delete_tpu.sh {one}", lines)

    def test_a_grid_on_slices_of_two_kinds(self):
        """Each batch must divide by the workers of each slice, whatever the configuration's own."""
        kinds = ("--slices", "s1", "s2:v4-64", "data.expected_puzzles=80", "training.epochs=0.5")
        grid = ("--same", "steps", "--grid", "training.lr=1,2")
        output = self.sweep(
            *self.configs("a"), *kinds, *grid, "training.global_batch_size=32,36,34", status=2
        )
        self.assertEqual(
            re.findall(r"(?m)^error: \S+ on (\S+.*): command line: \S+ = (\d+): must", output),
            [("s2", "36"), ("s1", "34"), ("s2", "34")],
        )
        self.assertEqual((self.starts(), self.folder_of_sweep()), ({}, []))
        self.sweep(*self.configs("a"), *kinds, *grid, "training.global_batch_size=32,64")
        cells = [f"a_lr{lr}_global_batch_size{size}" for lr in (1, 2) for size in (32, 64)]
        self.assertEqual(self.starts(), dict.fromkeys(cells, 1))
        self.assertEqual({self.attempts(name)[-1]["slice"] for name in cells}, {"s1", "s2"})
        (words,) = self.commands(cells[1])
        self.assertIn(
            " training.lr=1 training.global_batch_size=64 training.epochs=4 "
            "evaluation.interval_epochs=16 tpu.name=s",
            words,
        )

    def folder_of_sweep(self):
        return SweepFolder(join(self.out, "sweep")).names()

    def test_a_cell_goes_on_on_another_kind(self):
        """Where its slice is none of --slices; after Ctrl-C nothing is deleted, and what is left is
        said."""
        self.plan = {"a": ["wait"]}
        self.make_slices("s1")
        launcher = self.begin(*self.configs("a"), "--slices", "s1", "--delete_when_done")
        launcher.until(lambda: self.pids("a"))
        launcher.send_signal(signal.SIGINT)
        output = self.ends(launcher, 130)
        self.assertIn("runs on them go on:\n  bash scripts/delete_tpu.sh tpu.name=s1 ", output)
        self.assertEqual((self.states("a"), self.slices()), (["waiting"], ["s1"]))
        self.sweep(*self.configs("a"), "--slices", "s2:v4-16:spot")
        self.assertEqual(
            self.history("a"),
            [
                ("s1", "v4-8", "us-central2-b", False, 143),
                ("s2", "v4-16", "us-central2-b", True, 0),
            ],
        )
        status = self.sweep("--status")  # of the bucket, which the environment names
        self.assertIn(" s1:v4-8:us-central2-b, s2:v4-16:us-central2-b:spot", status)

    def test_a_slice_is_known_by_its_zone_too(self):
        """What runs on trm-a of one zone is waited for, not looked for on trm-a of another."""
        self.plan = {"a": ["locked"]}
        launcher = self.begin(*self.configs("a"), "--slices", "s1")
        run = open_folder(join(self.out, "a"))
        launcher.until(lambda: self.pids("a") and self.lock_owner(run) in self.pids("a"))
        launcher.kill()
        launcher.ends(-signal.SIGKILL)
        launcher = self.begin(*self.configs("a"), "--slices", "s1:us-east1-d")
        launcher.says("another training holds")
        self.assertEqual(self.starts(), {"a": 1})
        self.wait_file.unlink()
        self.ends(launcher)
        self.assertEqual(self.states("a"), ["finished"])

    def test_a_slice_that_google_does_not_give(self):
        """Its cells are no failures: they go on on another slice, or another time."""
        self.plan = {"a": ["no quota"]}
        output = self.sweep(*self.configs("ab"), "--slices", "s1", status=2)
        self.assertIn("error: s1: Google Cloud: p has no quota for v6e-16", output)
        self.assertEqual((self.starts(), self.states("a", "b")), ({"a": 1}, ["waiting", "waiting"]))
        self.plan = {"a": ["", "no quota"], "b": ["no quota"]}  # whichever comes first is refused
        output = self.sweep(*self.configs("a"), "--slices", "s1", "s2")
        self.assertIn("no cell is tried on it any more: Google Cloud: p has no quota", output)
        self.assertEqual((self.starts(), self.states("a")), ({"a": 3}, ["finished"]))

    def test_slices_are_deleted_once_nothing_is_left_for_them(self):
        """Not before, and each as soon as what is left runs on others."""
        self.plan = {"a": ["wait", "kill"], "b": ["mistake"]}
        self.make_slices("s1", "s2", "s3")
        launcher = self.begin(*self.configs("ab"), "--slices", "s1", "s2", "--delete_when_done")
        launcher.until(lambda: len(self.slices()) == 2)
        (held,) = self.history("a")
        stays(lambda: self.slices() == [held[0], "s3"], 1)  # many looks
        self.wait_file.unlink()
        output = self.ends(launcher, 1)
        self.assertEqual((self.slices(), output.count(": it is deleted")), (["s3"], 2))
        self.assertEqual(self.states("a", "b"), ["finished", "failed"])
        self.assertNotIn("scripts/delete_tpu.sh", output)

    def test_a_slice_in_use_is_not_deleted(self):
        """By another launcher, by a run of the kit that is none of the sweep's, or by any program
        that has its chips."""
        self.plan = {"b": ["wait"]}
        self.make_slices("s1", "s2", "s3", "s4")
        other = self.begin(*self.configs("b"), "--slices", "s1")
        other.until(lambda: self.pids("b"))
        run, chips = (self.cloud / "slices" / name for name in ("s3/0/trm/lock", "s4/0/dev/accel0"))
        with self.open_file(run, "flock 9"):
            output = self.sweep(
                *self.configs("a"), "--slices", "s1", "s2", "s3", "--delete_when_done"
            )
        self.assertEqual(self.slices(), ["s1", "s3", "s4"])
        self.assertIn("s3: no cell is left for it: s3 is in use by the run theirs: it is", output)
        self.assertEqual(
            re.findall(r"^  bash scripts/delete_tpu.sh tpu.name=(\S+) ", output, re.MULTILINE),
            ["s1", "s3"],
        )
        with self.open_file(chips, ":"):  # every host here sees it: they are one machine
            output = self.sweep(*self.configs("a"), "--slices", "s4", "--delete_when_done")
        self.assertIn(
            "s4: no cell is left for it: s4 is in use by a program that has the chips", output
        )
        (self.cloud / "silent").write_text("1")  # no answer is not "nothing"
        output = self.sweep(*self.configs("a"), "--slices", "s3", "--delete_when_done")
        self.assertIn(
            "the hosts of s3 do not say whether something runs there: it is not deleted", output
        )
        self.assertEqual(self.slices(), ["s1", "s3", "s4"])
        self.wait_file.unlink()
        self.ends(other)
        self.sweep(*self.configs("a"), "--slices", "s1", "s3", "s4", "--delete_when_done")
        self.assertEqual((self.slices(), self.starts()), ([], {"a": 1, "b": 1}))

    def test_a_launcher_that_is_told_to_stop_deletes_nothing(self):
        """Nor where it has just found that there is nothing left to do."""
        for word, told in (("s1", True), ("s2", False)):
            cell = mock.Mock(places={word: ("my-project-1", "v4-8", "us-central2-b")})
            cell.name = "a"
            launcher = sweep_launcher.Launcher(
                [cell],
                SweepFolder(str(self.folder)),
                sweep_slices.parse_slices([word]),
                1,
                [],
                delete_when_done=True,
            )
            launcher.done.add("a")
            if told:
                launcher.stop.set()
            with (
                mock.patch.object(sweep_launcher, "delete_if_idle", return_value=(0, "")) as delete,
                contextlib.redirect_stdout(io.StringIO()),
            ):
                launcher._next(launcher.slots[0])
            self.assertEqual(
                (delete.call_count, launcher.deleted), (0, set()) if told else (1, {"s2"})
            )

    @contextlib.contextmanager
    def open_file(self, path, then):
        """A program that has the file open, and has done the shell command `then` to it (as 9),
        until the block ends."""
        path.parent.mkdir()
        path.write_text("theirs\n")
        shell = f'exec 9<"$0"; {then}; echo; exec sleep 100'
        program = begin(self, ["bash", "-c", shell, path])
        program.line()
        yield
        program.end()

    def test_where_status_looks(self):
        """On this host and in the bucket; a table of nothing is none."""
        configs = self.configs("a")
        with self.subTest("nothing anywhere"):
            output = self.sweep(
                *configs, "logging.output_dir=sweeps_of_this_test", "--status", status=2
            )
            self.assertEqual(output.count("error: "), 1)
            self.assertIn(
                f"is in sweeps_of_this_test/sweep or {self.url}/sweeps_of_this_test/sweep", output
            )
            self.assertNotIn("cell ", output.replace("no cell of", ""))
        self.sweep(*configs, "--slices", "s1")
        for words in (configs, [], [*configs, "--slices", "s1"]):
            output = self.sweep(*words, "--status")
            self.assertEqual(
                (output.split(":")[0], self.row(output, "a")[1]), ("gs", "finished"), output
            )
        self.sweep(*configs, "--local", "--status", status=2)
        with self.subTest("both"):
            here = f"logging.output_dir={self.folder}/runs"
            self.sweep(*configs, "--local", here)
            self.assertEqual(self.sweep(*configs, here, "--status").count("finished"), 1)
        with self.subTest("out of reach"):
            self.proxy.fail("status", 503, times=999)
            self.assertIn(
                "no success within",
                self.sweep(*configs, "--status", status=1, TRM_TEST_DEADLINE="1"),
            )

    def test_dry_run_without_the_bucket(self):
        """Out of reach, or not made yet: the commands are the same."""
        configs = self.configs("ab")
        known = self.sweep(*configs, "--slices", "s1", "s2:spot", "--dry_run").splitlines()
        self.assertEqual(known[-1], "on s2: tpu.name=s2 --spot in place of tpu.name=s1")
        self.assertEqual(self.starts(), {})
        self.proxy.fail("status", 503, times=999)
        unknown = self.sweep(
            *configs, "--slices", "s1", "s2:spot", "--dry_run", TRM_TEST_DEADLINE="1"
        ).splitlines()
        self.assertRegex(unknown[0], "^how the cells stand is not known: .*no success within 1 s")
        self.assertEqual(
            unknown[1:], [line.replace("  waiting  ", "  unknown  ") for line in known]
        )
        self.proxy.faults.clear()
        with mock.patch.dict(os.environ):
            del os.environ["TPU_BUCKET"]
            not_given = self.sweep(*configs, "--slices", "s1", "s2:spot", "--dry_run").splitlines()
            self.sweep(*configs, "--slices", "s1", status=2)
        self.assertIn("not known: tpu.bucket is not given: export TPU_BUCKET", not_given[0])
        # The stand-in for a command names the folder of the run, the real one does not.
        self.assertEqual(
            [line.replace(sweep_cells.NO_BUCKET, self.url) for line in not_given[1:]], unknown[1:]
        )
        for words, status in ((["--dry_run"], 0), ([], 2)):
            output = self.sweep(
                *configs,
                "--slices",
                "s1",
                *words,
                status=status,
                TPU_BUCKET="gs://not-made-yet/trm",
            )
            self.assertIn("there is no bucket", output)

    def test_mistakes(self):
        good = self.configs("a")
        for words, says in [
            (["s1", "logging.output_dir=/shared"], "logging.output_dir = '/shared'"),
            (["s1", "tpu.name=s3"], "by --slices alone"),
            (["s1", "--jobs", "2"], "--jobs 2: only with --local"),
            (["s1", "--max_steps", "2"], "--max_steps 2: only with --local"),
            (
                ["s1:v4"],
                "--slices s1:v4: 'v4' is no type, no zone and neither spot nor queued: a slice is "
                "NAME, or",
            ),
            (["s1:v4-8:spot:v4-8"], "'v4-8' is the second type"),
            (["v4-8:S1"], "'S1' is no type"),
            ([":spot"], "'' is no name"),
            (["s1:spot", "s2", "s1:us-east1-d"], "s1 is given twice"),
            (["s1", "--", "--delete_when_done"], "give it before --"),
        ]:
            with self.subTest(words):
                output = self.sweep(*good, "--slices", *words, status=2)
                self.assertEqual(output.count("error: "), 1)
                self.assertIn(says, output)
        self.assertIn("only with --slices", self.sweep(*good, "--local", "--", "--spot", status=2))
        self.assertIn(
            "only with --slices", self.sweep(*good, "--local", "--delete_when_done", status=2)
        )

    def test_a_configuration_that_a_slice_cannot_run(self):
        """Its global batch, 8, divides by the chips of a v4-16: all that do not fit are named at
        once."""
        a, b, c = self.configs("abc")
        for old, new in (
            ("global_batch_size: 8", "global_batch_size: 4"),
            ("device: tpu", "device: auto"),
        ):
            Path(c).write_text(Path(c).read_text().replace(old, new))
        output = self.sweep(a, b, c, "--slices", "s1", "s2:v4-16", "s3:v4-32", "s4:v4-32", status=2)
        found = re.findall(
            r"^error: \S*/(\w).yaml on ([\w, ]+): .*must be divisible by workers .* = (\d+) x 1 = "
            r".*$",
            output,
            re.MULTILINE,
        )
        self.assertEqual(
            found,
            [("a", "s3, s4", "16"), ("b", "s3, s4", "16"), ("c", "s2", "8"), ("c", "s3, s4", "16")],
        )
        self.assertEqual(output.count("error: "), 4)
        # the configuration's own type does not matter where every slice says one
        self.sweep(c, "tpu.accelerator_type=v4-64", "--slices", "s1:v4-8")

    def test_configurations_that_want_different_slices(self):
        a, b = self.configs("ab")
        Path(b).write_text(
            Path(b).read_text().replace("accelerator_type: v4-8", "accelerator_type: v4-16")
        )
        output = self.sweep(a, b, "--slices", "s1", "s2:v4-8", status=2)
        self.assertRegex(
            output,
            r"\Aerror: --slices s1: it is v4-8 in us-central2-b of my-project-1 by \S+a.yaml and "
            r"v4-16 in .*\n\Z",
        )
        self.sweep(a, b, "--slices", "s2:v4-8")


class OnASlice(SliceTest):
    def test_preempted_in_the_middle(self):
        self.hold(17)
        sweep = self.begin(
            "launch_sweep",
            "configs/tiny.yaml",
            "--slices",
            NAME,
            "--seeds",
            "1",
            "--delete_when_done",
            "--",
            "--poll",
            "0.5",
            "--log_dir",
            str(self.folder / "log"),
        )
        self.arrived(17)
        self.wait_for(
            lambda: (
                "checkpoint_step_14.json"
                in self.gcloud.listed(f"{self.url}/runs/tiny_seed1/checkpoints")
            )
        )
        self.preempt()
        self.release(17)
        output = sweep.ends(seconds=120)
        (attempt,) = json.loads(self.in_bucket("runs/sweep/tiny_seed1/attempts.json"))
        self.assertEqual((attempt["exit_status"], attempt["slice"]), (0, NAME))
        self.assertEqual([start["step"] for start in self.starts("tiny_seed1")], [0, 14])
        self.assertRegex(
            output, f"(?m)^tiny_seed1  finished         1     60 .* {NAME}:v4-8:us-central2-b$"
        )
        self.assertIn(f"{NAME}: no cell is left for it: it is deleted", output)
        self.assertEqual(
            (self.changes()[-1], os.listdir(self.cloud / "slices")), ("tpu-vm delete", [])
        )

    def test_a_terminal_that_closes(self):
        """What the sweep has started on this machine ends with it; the run on the slice goes on."""
        self.hold(17)
        words = ["configs/tiny.yaml", "--slices", NAME, "--", "--poll", "0.5"]
        words += ["--log_dir", self.folder / "log"]
        sweep = self.begin("launch_sweep", *words, terminal=True)
        self.arrived(17)

        self.assertGreater(len(sweep.relatives()), 1)
        sweep.hang_up()
        sweep.all_end(128 + signal.SIGHUP)
        self.assertTrue(self.host_processes())
        self.release(17)

    def test_a_dry_run_without_a_bucket(self):
        with mock.patch.dict(os.environ):
            del os.environ["TPU_BUCKET"]
            words = ["configs/tiny.yaml", "--slices", NAME, "--dry_run"]
            output = self.script("launch_sweep", *words)
        self.assertRegex(output, "(?m)^tiny  unknown  bash .*keep_alive.sh configs/tiny.yaml ")
        self.assertEqual(self.calls(), [])

    def test_what_could_not_start_is_said_before(self):
        for words, says in (
            (["tpu.bucket=nowhere"], "tpu.bucket = 'nowhere'"),
            (["device=cpu"], "configs/tiny.yaml on my-tpu: device = 'cpu'"),
            ([], "uncommitted changes"),
        ):
            if not words:
                (self.kit / "mine.py").touch()
                self.addCleanup((self.kit / "mine.py").unlink)
            self.mistake("launch_sweep", "configs/tiny.yaml", "--slices", NAME, *words, says=[says])
        self.assertEqual(self.calls(), [])


if __name__ == "__main__":
    unittest.main()
