"""For the tests of sweeps: real launchers, with a training that does what a test says in place of
the real one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from sweep_state import SweepFolder

from storage import join, open_folder
from tests.helpers import ROOT, TINY, FolderTest, write_config


class SweepTest(FolderTest):
    """Sweeps over configs a, b, ... in self.folder, with the fake training; the runs are in
    self.out."""

    def setUp(self):
        super().setUp()
        self.out = str(self.folder / "runs")
        self.starts_file, self.wait_file = self.folder / "starts", self.folder / "starts.wait"
        self.commands_file = self.folder / "starts.commands"
        self.starts_file.touch(), self.wait_file.touch()
        self.plan = {}

    def configs(self, names="ab"):
        return [
            str(
                write_config(
                    self.folder / f"{name}.yaml", TINY.format(data="nowhere", out=self.out)
                )
            )
            for name in names
        ]

    def environment(self):
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TRM_TEST_STARTS": str(self.starts_file),
            "TRM_TEST_PLAN": json.dumps(self.plan),
        }

    def command(self, *arguments, host="", training="tests/fake_training.py"):
        return [sys.executable, "tests/fake_launcher.py", host, training, *arguments]

    def begin(self, *arguments, host="", training="tests/fake_training.py", **environment):
        process = subprocess.Popen(
            self.command(*arguments, host=host, training=training),
            cwd=ROOT,
            env={**self.environment(), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.communicate()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def ends(self, process, status=0):
        output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, status, output)
        self.assertNotIn("Traceback", output)
        return output

    def sweep(self, *arguments, status=0, **options):
        return self.ends(self.begin(*arguments, **options), status)

    def pids(self, name=""):
        return [
            int(line.split()[1])
            for line in self.starts_file.read_text().splitlines()
            if line.startswith(name)
        ]

    def starts(self):
        names = [line.split()[0] for line in self.starts_file.read_text().splitlines()]
        return {name: names.count(name) for name in sorted(names)}

    def attempts(self, name):
        """The entries of its attempts.json."""
        return json.loads(open_folder(join(self.out, "sweep")).read(f"{name}/attempts.json"))

    def states(self, *names):
        folder = SweepFolder(join(self.out, "sweep"))
        return [folder.standing(name, join(self.out, name)).state for name in names]

    def log(self, name):
        return (self.folder / "runs" / "sweep" / name / "output.log").read_text()

    def commands(self, name):
        """The real command of each of its attempts, from the configuration on."""
        lines = self.commands_file.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def lock_owner(self, run):
        try:
            return json.loads(run.read("run.lock"))["pid"]
        except FileNotFoundError:
            return None

    def until(self, condition, process=None):
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end or (process and process.poll() is not None):
                self.fail(f"this did not come about: {process and process.communicate()[0]}")
            time.sleep(0.01)

    def row(self, output, name):
        return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])
