"""A TPU slice for tests: processes of this machine behind tests/gcloud, and a copy of the kit as
its user has it, a git repository."""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from tests.gcs_server import GCSTest
from tests.helpers import ROOT, CommandTest
from tests.host_tools import make_programs
from tests.processes import begin, free_port, run, wait_until

NAME = "my-tpu"
DELETE = (
    f"uses up its quota until it is deleted: bash scripts/delete_tpu.sh tpu.name={NAME} "
    "tpu.zone=us-central2-b tpu.project=my-project-1"
)
# the Python of a host's environment, which is filled in name alone (tests/host_tools.py): a
# training may pause, and each takes a line of the file `instead` (if it is there) and does that;
# the check of the devices is left out unless there is a file real_check, and host `bad_host` gets
# wrong sums
HOST_PYTHON = """#!/usr/bin/env bash
case "$*" in
    scripts/check_environment.py*)
        [ "$(printf '%s\n' "${{@:2}}")" = "$(cat "$(dirname "$0")/../files")" ] ;;
    train_tpu.py*)
        if [ -s "$TRM_TEST_CLOUD/instead" ]; then
            read -r instead < "$TRM_TEST_CLOUD/instead"
            sed -i 1d "$TRM_TEST_CLOUD/instead"
            eval "$instead"
        fi
        if [ -n "${{TRM_TEST_PAUSES:-}}" ]; then
            shift
            set -- {root}/tests/programs/slow_train.py "$@"
        fi
        PYTHONPATH=. exec {python} "$@" ;;
    scripts/check_devices.py*)
        if [ ! -e "$TRM_TEST_CLOUD/real_check" ]; then exit; fi  # importing PyTorch takes seconds
        if [ "$(cat "$TRM_TEST_CLOUD/bad_host" 2>/dev/null)" = "$TRM_TEST_HOST" ]; then
            shift
            set -- {root}/tests/programs/wrong_sum.py "$@"
        fi
        exec {python} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""
ENDLESS = "exec sleep 600"  # a training, for SliceTest.stand_in


def load_gcloud():
    """tests/gcloud as a module."""
    loader = importlib.machinery.SourceFileLoader(
        "gcloud_for_tests", str(ROOT / "tests" / "gcloud")
    )
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    with mock.patch.object(sys, "dont_write_bytecode", True):
        loader.exec_module(module)
    return module


def installed_commands(test):
    """The tree of commands and flags that an installed Google Cloud CLI completes; skips `test`
    where there is none."""
    found = shutil.which("gcloud")
    tree = found and Path(found).resolve().parent.parent / "data" / "cli" / "gcloud_completions.py"
    if not tree or not tree.exists():
        test.skipTest("the Google Cloud CLI is not installed here")
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("gcloud_completions", tree)
    )
    with mock.patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
    return module.STATIC_COMPLETION_CLI_TREE


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class SliceTest(GCSTest, CommandTest):
    """self.kit: the user's repository, with configs/tiny.yaml (CommandTest's, but device auto, and
    paths that lie in the bucket self.url); self.cloud: the folder of tests/gcloud; self.script(...)
    runs one of the scripts on both."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared, cls.kit = cls.folder, cls.folder / "kit"
        for folder in ("", "scripts", "configs"):
            (cls.kit / folder).mkdir()
            for path in [
                *(ROOT / folder).glob("*.py"),
                *(ROOT / folder).glob("*.sh"),
                *(ROOT / folder).glob("*.yaml"),
                *(ROOT / folder).glob("requirements*.txt"),
            ]:
                shutil.copy(path, cls.kit / folder)
        shutil.copy(ROOT / ".gitignore", cls.kit)
        shutil.copytree(cls.shared / "data", cls.kit / "data")
        text = (
            cls.config.read_text()
            .replace("device: cpu", "device: auto")
            .replace(str(cls.shared / "data"), "data")
            .replace(str(cls.shared / "runs"), "runs")
        )
        (cls.kit / "configs" / "tiny.yaml").write_text(text)
        cls.git("init", "--quiet")
        cls.git("add", "--all")
        cls.git("commit", "--quiet", "--message=kit")
        # the laptop's environment, complete as far as scripts/environment.sh can tell
        executable(
            cls.shared / "venv" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        )
        (cls.shared / "venv" / cls.marker("requirements.txt")).touch()
        executable(
            cls.shared / "bin" / "gcloud",
            f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/gcloud "$@"\n',
        )
        executable(
            cls.shared / "host" / "python", HOST_PYTHON.format(root=ROOT, python=sys.executable)
        )
        make_programs(cls.shared / "host" / "bin", cls.shared / "host" / "python")

    @classmethod
    def marker(cls, name):
        """The file by which scripts/environment.sh knows that a requirements file is installed."""
        return f"installed-{hashlib.sha256((cls.kit / name).read_bytes()).hexdigest()[:16]}"

    @classmethod
    def git(cls, *words):
        return subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words],
            cwd=cls.kit,
            check=True,
            text=True,
            capture_output=True,
        ).stdout.strip()

    def setUp(self):
        super().setUp()
        self.cloud, self.arrivals = self.folder / "cloud", self.folder / "arrivals"
        self.cloud.mkdir()
        self.arrivals.touch()
        environment = {
            "TRM_TEST_CLOUD": str(self.cloud),
            "PATH": f"{self.shared}/bin:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "TPU_PROJECT": "my-project-1",
            "TPU_NAME": NAME,
            "TPU_BUCKET": self.url,
            "TRM_VENV": str(self.shared / "venv"),
            "TRM_ANSWER_SECONDS": "30",
            "TRM_CONTACT_SECONDS": "30",
        }
        patch = mock.patch.dict(os.environ, environment)
        patch.start()
        self.addCleanup(patch.stop)
        for name in (
            "SSH_AUTH_SOCK",
            "TPU_ZONE",
            "TRM_GCLOUD_SSH_FLAGS",
            "TRM_REASON_SECONDS",
            "PIP_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
            "TRM_COMMIT",
        ):
            os.environ.pop(name, None)
        (self.folder / "home").mkdir()
        self.on_hosts = {
            "PATH": str(self.shared / "host" / "bin"),
            "TRM_TEST_CLOUD": str(self.cloud),
            "OMP_NUM_THREADS": "1",
            "STORAGE_EMULATOR_HOST": os.environ["STORAGE_EMULATOR_HOST"],
            "MASTER_PORT": str(free_port()),
            "TRM_TEST_ARRIVALS": str(self.arrivals),
        }
        self.write_host_environment()
        self.gcloud = load_gcloud()
        self.addCleanup(self.gcloud.end_processes, f"{self.cloud}/slices/")

    def write_host_environment(self, **more):
        (self.cloud / "host_environment.json").write_text(json.dumps({**self.on_hosts, **more}))

    def hold(self, *steps):
        """Trainings that start from now on wait before these steps of theirs (the K-th after their
        start), until release(step)."""
        for step in steps:
            (self.folder / f"hold.{step}").touch()
        self.write_host_environment(
            TRM_TEST_PAUSES=json.dumps({"train_step": str(self.folder / "hold")})
        )

    def release(self, step):
        (self.folder / f"hold.{step}").unlink()

    def stand_in(self, *commands):
        """The next trainings do these shell commands instead; returns how to wait until `count` of
        them have begun."""
        path = self.cloud / "instead"
        path.write_text("".join(f"{command}\n" for command in commands))
        return lambda count: self.wait_for(
            lambda: path.read_text().count("\n") == len(commands) - count
        )

    def refuse(self, what, *errors):
        """The next calls of gcloud that create, describe or ssh (`what`) end with these of
        tests/gcloud's ERRORS; "late_": after they were taken."""
        (self.cloud / "refuse").mkdir(exist_ok=True)
        (self.cloud / "refuse" / what).write_text("\n".join(errors))

    def refused(self, what):
        """Wait until all of these errors were given."""
        self.wait_for(lambda: (self.cloud / "refuse" / what).read_text() == "")

    def kill(self, run):
        os.kill(int((self.host() / "trm" / "runs" / run / "pid").read_text()), signal.SIGKILL)

    def host_processes(self):
        """{pid: command line} of what runs on the hosts."""
        return self.gcloud.processes(f"{self.cloud}/slices/")

    def wait_for(self, what, seconds=60):
        def logs():
            texts = [path.read_text() for path in self.cloud.glob("slices/*/*/trm/runs/*/log")]
            return f"{self.host_processes()} {texts}"

        wait_until(what, seconds, logs)

    def script(self, name, *words, status=0, answer=""):
        """Run scripts/NAME.sh; its stdout and stderr as one text."""
        output = run(self, self.command(name, *words), status, answer=answer, cwd=self.kit)
        self.assertNotIn("Traceback", output)
        return output

    def mistake(self, name, *words, says):
        """The script ends with status 2 and one error line that holds each of `says`, before it
        changes anything."""
        before = self.changes()
        output = self.script(name, *words, status=2)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        self.assertEqual(len(errors), 1, output)
        for text in says:
            self.assertIn(text, errors[0])
        self.assertEqual(self.changes(), before)

    def begin(self, name, *words, **options):
        return begin(self, self.command(name, *words), cwd=self.kit, **options)

    def command(self, name, *words):
        return ["bash", f"scripts/{name}.sh", *words]

    def calls(self):
        path = self.cloud / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def changes(self):
        """The commands so far that change the slice, the queue or what is on the hosts and in the
        bucket."""
        return [
            call["command"].removeprefix("compute tpus ")
            for call in self.calls()
            if call["command"].split()[-1] in ("create", "delete", "scp")
            or call["command"] == "storage rsync"
            and call["positionals"][1].startswith("gs:")
        ]

    def slice_state(self, state):
        (self.cloud / "slices" / NAME / "state").write_text(state)

    def preempt(self, state="PREEMPTED", noticed=None):
        """The slice goes: SIGTERM to its processes and, if somebody has `noticed` (is called then),
        some time; SIGKILL to what is left. state None: it is not even listed any more."""
        mark = self.gcloud.mark(NAME)
        self.slice_state(state or "STOPPING")
        self.gcloud.end_processes(mark, *((25, noticed) if noticed else ()))
        if state is None:
            shutil.rmtree(self.cloud / "slices" / NAME)

    def stop(self, run, held):
        """`launch_experiment.sh stop`, of a run that is held before a step and goes on once it has
        SIGTERM."""
        stopping = self.begin("launch_experiment", "stop", run)
        self.wait_for(
            lambda: any("flock\0--timeout\x0090" in line for line in self.host_processes().values())
        )  # then it is sent
        self.release(held)
        return stopping.ends(7)

    def starts(self, run):
        """The lines of its starts.jsonl in the bucket."""
        return [
            json.loads(line) for line in self.in_bucket(f"runs/{run}/starts.jsonl").splitlines()
        ]

    def make_slice(self, accelerator="v4-8"):
        """A slice as scripts/setup_tpu.sh leaves it."""
        self.gcloud.make_slice(NAME, accelerator)
        for host in range(2 if accelerator == "v4-16" else 1):
            venv = self.host(host) / "trm" / "venv"
            executable(venv / "bin" / "python", (self.shared / "host" / "python").read_text())
            for name in ("requirements.txt", "requirements-tpu.txt"):
                (venv / self.marker(name)).touch()

    def host(self, number=0):
        return self.cloud / "slices" / NAME / str(number)

    def arrived(self, step, rank=0):
        """Wait until trainings have begun so many steps since the test began."""
        self.wait_for(lambda: self.arrivals.read_text().count(f"train_step {rank} ") >= step)

    def in_bucket(self, name):
        return self.gcloud.read(f"{self.url}/{name}")
