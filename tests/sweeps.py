"""For the tests of sweeps: real launchers, with a training that does what a test says in place of
the real one."""

import json
import sys

from sweep_state import SweepFolder

from storage import join, open_folder
from tests.helpers import TINY, WITH_KIT, FolderTest, write_config
from tests.processes import begin

TRAINING = "tests/programs/fake_training.py"


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

    def begin(self, *arguments, host="", training=TRAINING, terminal=False, **environment):
        command = [sys.executable, "tests/programs/fake_launcher.py", host, training, *arguments]
        starts = {"TRM_TEST_STARTS": self.starts_file, "TRM_TEST_PLAN": json.dumps(self.plan)}
        return begin(self, command, {**WITH_KIT, **starts, **environment}, terminal=terminal)

    def ends(self, process, status=0):
        output = process.ends(status)
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

    def row(self, output, name):
        return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])
