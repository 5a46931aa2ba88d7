"""What goes wrong on Google Cloud, against tests/gcloud: quota, permission, login, health, slow
ssh, keys in the terminal, a terminal that closes; and that its texts are those of an installed
gcloud."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import unittest
from pathlib import Path
from unittest import mock

from tests.helpers import FolderTest
from tests.processes import pause
from tests.slice import DELETE, ENDLESS, NAME, SliceTest, load_gcloud

LOCATION = "--project=my-project-1 --zone=us-central2-b --quiet"


class Refusals(SliceTest):
    def setup_tpu(self, *words, **how):
        return self.script("setup_tpu", "configs/tiny.yaml", "--poll", "0.1", *words, **how)

    def test_what_waiting_does_not_mend_ends_at_once(self):
        """With status 2, one message and the way out, from each script, and nothing is asked for
        again."""
        quota = "TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI"
        for error, *says in (
            (
                "no_quota",
                "my-project-1 has no quota for v4-8 in us-central2: ",
                f"the limit of {quota} is 0",
                "compare its e-mail",
            ),
            ("late_no_quota", f"the limit of {quota} is 0"),
            ("little_quota", f"the limit of {quota} is 2"),
            ("denied", "the account may not do this in tpu.project = my-project-1", "TPU Admin"),
            (
                "api_off",
                "the service tpu.googleapis.com is off in my-project-1: gcloud services enable "
                "tpu.googleapis.com --project=my-project-1",
            ),
            ("no_zone", "tpu.zone = us-central2-b: Google knows no such zone"),
            (
                "wrong_type",
                "Google refuses the request: its message is above; check tpu.accelerator_type = "
                "v4-8",
            ),
            ("late_wrong_type", "Google refuses the request"),
            ("expired", "gcloud's login has expired: gcloud auth login"),
            ("logged_out", "gcloud's login has expired"),
            ("reauth", "gcloud's login has expired"),
        ):
            with self.subTest(error=error):
                self.refuse("create", error)
                output = self.setup_tpu(status=2)
                errors = [line for line in output.splitlines() if line.startswith("error: ")]
                self.assertEqual(len(errors), 1, output)
                for text in says:
                    self.assertIn(text, errors[0])
                self.assertIn(
                    "ERROR: (gcloud.compute.tpus.tpu-vm.create)", output
                )  # Google's own words
        self.assertEqual(set(self.changes()), {"tpu-vm create"})
        for script, words in (
            ("setup_tpu", ["configs/tiny.yaml"]),
            ("launch_experiment", ["configs/tiny.yaml"]),
            ("launch_experiment", ["status", "r"]),
            ("keep_alive", ["configs/tiny.yaml"]),
            ("delete_tpu", ["--yes"]),
        ):
            with self.subTest(script=script, words=words):
                self.refuse("describe", "expired")
                self.mistake(script, *words, says=["gcloud's login has expired: gcloud auth login"])
        self.make_slice()
        self.refuse("ssh", "denied")
        self.mistake("launch_experiment", "status", "r", says=["the account may not do this"])

    def test_keep_alive_ends_where_waiting_does_not_help(self):
        self.refuse("create", "no_quota")
        output = self.script(
            "keep_alive",
            "configs/tiny.yaml",
            "--poll",
            "0.1",
            "--log_dir",
            str(self.folder / "log"),
            status=2,
        )
        self.assertIn("attempt 1: not tried again\n", output)
        self.assertIn("error: Google Cloud: my-project-1 has no quota for v4-8", output)
        self.assertEqual(self.changes(), ["tpu-vm create"])
        self.assertIn(
            DELETE.replace("uses", "where it is there, uses"),
            (self.folder / "log" / "tiny.log").read_text(),
        )

    def test_what_waiting_mends_is_waited_for(self):
        for error, says in (
            ("no_room", "Google has no v4-8 free in us-central2-b"),
            ("late_no_room", "Google has no v4-8 free"),
            (
                "full_quota",
                "64, is in use: by another slice, or by a queued resource that is FAILED or "
                "SUSPENDED",
            ),
        ):
            self.refuse("create", error)
            self.assertIn(says, self.setup_tpu(status=3))
        self.refuse("describe", "offline", "no_answer", "broken", "unavailable")
        self.assertIn("my-tpu is ready", self.setup_tpu())
        self.assertEqual(self.changes().count("tpu-vm create"), 4)

    def test_somebody_asks_at_the_same_time(self):
        self.refuse("create", "exists")
        self.refuse("describe", "not_found", "not_found")
        self.gcloud.make_slice(NAME, "v4-8")
        self.assertIn("my-tpu: somebody has asked for it meanwhile", self.setup_tpu())

    def test_a_failed_request_shows_why_and_is_an_attempt(self):
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "queued").write_text("WAITING_FOR_RESOURCES\nFAILED")
        process = self.begin(
            "keep_alive",
            "configs/tiny.yaml",
            "--queued",
            "--poll",
            "0.1",
            "--max_attempts",
            "1",
            "--log_dir",
            str(self.folder / "log"),
        )
        output = process.ends(1)
        for text in (
            "Google on the queued resource my-tpu:",
            "There is no more capacity in the zone",
            "the request FAILED, for the reason above",
            "the 1 attempts are spent",
        ):
            self.assertIn(text, output)
        self.setup_tpu()  # it holds quota, and is deleted first
        self.assertEqual(
            self.changes(),
            ["queued-resources create", "queued-resources delete", "tpu-vm create", "tpu-vm scp"],
        )

    def test_a_request_that_failed_for_want_of_quota_ends_at_once(self):
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "queued").write_text("WAITING_FOR_RESOURCES\nFAILED")
        process = self.begin("setup_tpu", "configs/tiny.yaml", "--queued", "--poll", "0.5")
        self.wait_for((self.cloud / "queued" / NAME / "state").exists)
        (self.cloud / "queued" / NAME / "why").write_text("no_quota")
        output = process.ends(2)
        self.assertIn("error: Google Cloud: my-project-1 has no quota for v4-8", output)

    def test_a_queued_resource_of_other_slices_is_left_alone(self):
        for nodes, status in (("other", 2), (f"{NAME};other", 2), (NAME, 0)):
            queued = self.cloud / "queued" / NAME
            queued.mkdir(parents=True, exist_ok=True)
            (queued / "state").write_text("ACTIVE")
            (queued / "nodes").write_text(nodes)
            output = self.setup_tpu(status=status)
            self.assertEqual("is for slices of other names" in output, status == 2, output)
            self.assertEqual("queued-resources delete" in self.changes(), status == 0)

    def test_a_slice_that_goes_between_setup_and_launch(self):
        """It is asked for again, and nobody's mistake."""
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "slices").write_text("READY\nPREEMPTED")
        self.stand_in("exit 0")
        output = self.script(
            "keep_alive",
            "configs/tiny.yaml",
            "--poll",
            "0.1",
            "--log_dir",
            str(self.folder / "log"),
        )
        self.assertIn("the slice my-tpu is PREEMPTED before the run could start", output)
        self.assertEqual(self.changes().count("tpu-vm create"), 2)

    def test_a_bucket_that_does_not_answer_is_no_mistake(self):
        self.make_slice()
        self.refuse("ls", "unavailable")
        output = self.script(
            "launch_experiment",
            "configs/tiny.yaml",
            f"data.dataset_path={self.url}/other",
            status=1,
        )
        self.assertIn("/other: gcloud storage does not say what is there", output)

    def test_the_reason_for_waiting_is_shown_from_time_to_time(self):
        with mock.patch.dict(os.environ, TRM_REASON_SECONDS="1"):
            output = self.setup_tpu("--queued", "--max_hours", "0.0015", status=3)
        self.assertGreaterEqual(
            output.count(
                "Google on the queued resource my-tpu:\n    state:\n      state: "
                "WAITING_FOR_RESOURCES"
            ),
            2,
        )
        self.assertEqual(output.count("WAITING_FOR_RESOURCES in the queue, slice GONE, waiting"), 1)
        output = self.setup_tpu("--queued", "--max_hours", "0.0005", status=3)
        self.assertNotIn("Google on the queued resource", output)

    def test_another_slice_has_the_name(self):
        self.make_slice()
        self.mistake(
            "setup_tpu",
            "configs/tiny.yaml",
            "tpu.accelerator_type=v4-16",
            says=[
                "Google Cloud: the slice my-tpu is a v4-8, and tpu.accelerator_type asks for v4-16"
            ],
        )
        self.mistake(
            "launch_experiment",
            "configs/tiny.yaml",
            "tpu.accelerator_type=v4-16",
            says=["the slice my-tpu is a v4-8"],
        )

    def test_buckets(self):
        self.make_slice()
        with mock.patch.dict(os.environ, TPU_BUCKET="gs://not-there/trm"):
            self.mistake(
                "launch_experiment",
                "configs/tiny.yaml",
                says=[
                    "there is no bucket gs://not-there: gcloud storage buckets create gs://not-there"
                ],
            )
        self.stand_in("exit 1", "exit 1", "exit 1")
        for region, warns in (("EUROPE-WEST4", True), ("US", False), ("US-CENTRAL2", False)):
            (self.cloud / "region").write_text(region)
            output = self.script("launch_experiment", "configs/tiny.yaml", status=4)
            self.assertEqual(
                f"is in {region.lower()} and the slice in us-central2: every checkpoint" in output,
                warns,
                output,
            )


class Health(SliceTest):
    def setup_tpu(self, *words, **how):
        return self.script("setup_tpu", "configs/tiny.yaml", "--poll", "0.1", *words, **how)

    def test_a_healthy_slice_is_never_deleted(self):
        self.gcloud.make_slice(NAME, "v4-8")
        (self.cloud / "silent").write_text("999")
        with mock.patch.dict(os.environ, TRM_CONTACT_SECONDS="1"):
            for health in ("HEALTHY", "UNHEALTHY_TENSORFLOW", "HEALTH_UNSPECIFIED"):
                self.slice_state(f"READY {health}")
                output = self.setup_tpu(status=1)
                self.assertIn(
                    f"my-tpu is READY and {health}, and its hosts do not answer ssh within 1 s: "
                    "nothing is deleted",
                    output,
                )
                self.assertIn(
                    f"look by: gcloud compute tpus tpu-vm ssh my-tpu {LOCATION}\n", output
                )
            for state in ("STOPPED", "HIDDEN", "UNKNOWN"):
                self.slice_state(state)
                self.assertIn(
                    f"my-tpu is {state}, which no preemption leaves behind: nothing is deleted",
                    self.setup_tpu(status=1),
                )
            self.assertEqual(self.changes(), [])
            self.slice_state("READY")
            process = self.begin(
                "setup_tpu", "configs/tiny.yaml", "--poll", "0.1", "--replace_silent"
            )
            self.wait_for(lambda: "tpu-vm create" in self.changes())
        (self.cloud / "silent").write_text("0")
        process.ends()
        self.assertEqual(self.changes(), ["tpu-vm delete", "tpu-vm create", "tpu-vm scp"])

    def test_a_suspended_request_whose_slice_is_ready_is_not_deleted(self):
        (self.cloud / "queued" / NAME).mkdir(parents=True)
        (self.cloud / "queued" / NAME / "state").write_text("SUSPENDED")
        self.make_slice()
        self.assertIn("my-tpu is ready", self.setup_tpu())
        self.assertEqual(self.changes(), ["tpu-vm scp"])

    def test_maintenance_is_waited_for(self):
        self.make_slice()
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "slices").write_text(
            "READY UNHEALTHY_MAINTENANCE\n" * 3 + "READY HEALTHY"
        )
        output = self.setup_tpu()
        self.assertEqual(output.count("my-tpu: in maintenance, and goes on by itself, waiting"), 1)
        self.assertEqual(self.changes(), ["tpu-vm scp"])

    def test_one_look_at_timeout_deletes_nothing(self):
        """The slice was HEALTHY before; only one that was in TIMEOUT for all the time of silence is
        deleted."""
        self.gcloud.make_slice(NAME, "v4-8")
        (self.cloud / "later").mkdir()
        (self.cloud / "later" / "slices").write_text(
            "READY HEALTHY\nREADY TIMEOUT\nREADY HEALTHY\nREADY HEALTHY"
        )
        (self.cloud / "silent").write_text("999")
        with mock.patch.dict(os.environ, TRM_CONTACT_SECONDS="1"):
            output = self.setup_tpu(status=1)
        self.assertIn("my-tpu: in health TIMEOUT now", output)
        self.assertEqual(self.changes(), [])

    def test_keep_alive_in_a_maintenance_and_in_a_timeout(self):
        begun = self.stand_in(ENDLESS, ENDLESS)
        with mock.patch.dict(os.environ, TRM_CONTACT_SECONDS="1"):
            process = self.begin(
                "keep_alive",
                "configs/tiny.yaml",
                "--poll",
                "0.1",
                "--log_dir",
                str(self.folder / "log"),
            )
            begun(1)
            (self.cloud / "silent").write_text("999")
            self.slice_state("READY UNHEALTHY_MAINTENANCE")
            seen = int((self.cloud / "silent").read_text())
            self.wait_for(
                lambda: int((self.cloud / "silent").read_text()) < seen - 15
            )  # more looks than a healthy one has
            self.assertNotIn("tpu-vm delete", self.changes())
            self.slice_state("READY TIMEOUT")
            self.wait_for(lambda: self.changes().count("tpu-vm create") == 2)
            (self.cloud / "silent").write_text("0")
            begun(2)
        self.assertIn("tpu-vm delete", self.changes())
        process.send_signal(signal.SIGTERM)
        process.all_end(-signal.SIGTERM)

    def test_keep_alive_that_is_killed_leaves_nobody_at_work(self):
        (self.cloud / "first_contact").write_text("60")
        process = self.begin(
            "keep_alive",
            "configs/tiny.yaml",
            "--poll",
            "0.1",
            "--log_dir",
            str(self.folder / "log"),
        )
        self.wait_for(lambda: any(call["command"].endswith("ssh") for call in self.calls()))
        process.send_signal(signal.SIGTERM)  # its own process alone
        self.assertIn(DELETE, process.all_end(-signal.SIGTERM))

    def test_the_first_contact_may_take_longer_than_an_answer(self):
        (self.cloud / "first_contact").write_text("3")
        with mock.patch.dict(os.environ, TRM_ANSWER_SECONDS="2"):
            self.assertIn("my-tpu is ready", self.setup_tpu())


class Reaching(SliceTest):
    def commands(self, *kinds):
        return [call for call in self.calls() if call["command"].split()[-1] in kinds]

    def test_flags_for_ssh(self):
        for flag, alpha in (("--internal-ip", False), ("--tunnel-through-iap", True)):
            self.make_slice()
            with mock.patch.dict(os.environ, TRM_GCLOUD_SSH_FLAGS=flag):
                before = len(self.calls())
                self.script("setup_tpu", "configs/tiny.yaml")
                self.stand_in("exit 0")
                self.script("launch_experiment", "configs/tiny.yaml", status=0)
                self.script("launch_experiment", "logs", "tiny")
                self.script("launch_experiment", "stop", "tiny")
            reached = [
                call
                for call in self.calls()[before:]
                if call["command"].split()[-1] in ("ssh", "scp")
            ]
            self.assertGreater(len(reached), 8)
            for call in reached:
                self.assertEqual((call["flags"].get(flag), call["alpha"]), (True, alpha), call)
            self.script("delete_tpu", "--yes")

    def test_a_private_agent_whatever_the_environment_says(self):
        self.make_slice("v4-16")
        with mock.patch.dict(
            os.environ, SSH_AUTH_SOCK=str(self.folder / "dead"), SSH_AGENT_PID="1"
        ):
            self.assertIn(
                "my-tpu is ready",
                self.script("setup_tpu", "configs/tiny.yaml", "tpu.accelerator_type=v4-16"),
            )
        self.assertEqual(self.left_behind(), [])

    def left_behind(self):
        """Processes of this test's commands that outlive them: ssh-agents, gclouds."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                if (
                    f"TRM_TEST_CLOUD={self.cloud}".encode() in (path / "environ").read_bytes()
                    and b"TRM_TEST_SLICE" not in (path / "environ").read_bytes()
                ):
                    found.append(b" ".join(words).decode())
        return [line for line in found if "ssh-agent" in line or "gcloud" in line]

    def test_flags_for_the_slice(self):
        for words, kind, flags in (
            (
                ["--autocheckpoint", "--spot"],
                "tpu-vm create",
                {"--autocheckpoint-enabled": True, "--spot": True},
            ),
            (["--internal_ips"], "tpu-vm create", {"--internal-ips": True}),
            (
                ["--queued", "--autocheckpoint"],
                "queued-resources create",
                {"--autocheckpoint-enabled": True},
            ),
        ):
            (self.cloud / "later").mkdir(exist_ok=True)
            (self.cloud / "later" / "queued").write_text("ACTIVE")
            self.script("setup_tpu", "configs/tiny.yaml", "--poll", "0.1", *words)
            call = self.commands("create")[-1]
            self.assertTrue(call["command"].endswith(kind))
            self.assertLessEqual(flags.items(), call["flags"].items())
            self.assertEqual(call["alpha"], "--autocheckpoint" in words)
            self.script("delete_tpu", "--yes")

    # ----- a terminal -----
    def test_a_key_stops_no_command(self):
        """gcloud hands its standard input to ssh, which reads it: from a terminal's background that
        would stop it."""
        (self.cloud / "first_contact").write_text("2")
        words = ["configs/tiny.yaml", "--poll", "0.5"]
        process = self.begin("setup_tpu", *words, terminal=True)
        process.says("may take minutes the first time")
        for _ in range(8):
            process.press(b"\n")
            pause(0.25)
        self.assertIn("my-tpu is ready", process.ends())

    def test_ctrl_c_and_a_terminal_that_closes_leave_the_run_alone(self):
        self.make_slice("v4-16")
        two = ["configs/tiny.yaml", "tpu.accelerator_type=v4-16"]
        begun = self.stand_in(*["echo begun; " + ENDLESS] * 2)
        for end in ("key", "close"):
            with self.subTest(end=end):
                words = two if end == "key" else ["logs", "tiny", "tpu.accelerator_type=v4-16"]
                process = self.begin("launch_experiment", *words, terminal=True)
                if end == "key":
                    begun(2)
                self.wait_for(
                    lambda: any("tail\0" in line for line in self.host_processes().values())
                )
                if end == "key":
                    process.press(b"\x03")
                    process.all_end(-signal.SIGINT)
                else:
                    process.hang_up()
                    process.all_end(-signal.SIGHUP)
                self.assertTrue(
                    any("sleep\x00600" in line for line in self.host_processes().values())
                )
        self.assertEqual(list(Path(self.temporary).iterdir()), [])

    def setUp(self):
        super().setUp()
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        patch = mock.patch.dict(os.environ, TMPDIR=str(self.temporary))
        patch.start()
        self.addCleanup(patch.stop)


class Words(SliceTest):
    """Messages of the scripts, and what they say at the end."""

    def test_flags_and_names(self):
        for script, words, says in (
            ("setup_tpu", ["configs/tiny.yaml", "--poll"], "--poll needs a value"),
            ("setup_tpu", ["--poll", "soon"], "--poll soon: must be a number above 0"),
            ("keep_alive", ["configs/tiny.yaml", "--max_hours"], "--max_hours needs a value"),
            ("delete_tpu", ["--config"], "--config needs a value"),
            ("download_results", ["--to"], "--to needs a value"),
            ("launch_experiment", ["configs/tiny.yaml", "--run_name"], "--run_name needs a value"),
            (
                "launch_experiment",
                ["stop"],
                "stop needs the name of a run; bash scripts/launch_experiment.sh status lists them",
            ),
            (
                "launch_experiment",
                ["status", "configs/tiny.yaml"],
                "configs/tiny.yaml: is no name of a run; did you mean tiny?",
            ),
            ("launch_experiment", ["stop", "a", "b"], "stop a b: one run at a time"),
            (
                "launch_experiment",
                ["elsewhere/tiny.yaml"],
                "elsewhere/tiny.yaml: cannot read this configuration",
            ),
            (
                "setup_tpu",
                ["../tiny.yaml"],
                "tiny.yaml: the hosts get this repository, and it is not in there",
            ),
            (
                "keep_alive",
                ["elsewhere/tiny.yaml"],
                "elsewhere/tiny.yaml: cannot read this configuration",
            ),
        ):
            self.mistake(script, *words, says=[says])

    def test_uncommitted_files_are_named(self):
        self.make_slice()
        for name in ("notes.md", "scripts/log.bin"):  # no code
            (self.kit / name).write_text("x")
            self.addCleanup((self.kit / name).unlink)
        self.stand_in("exit 1")
        self.script("launch_experiment", "configs/tiny.yaml", status=4)
        (self.kit / "analysis").mkdir()
        (self.kit / "analysis" / "new.py").write_text("x")
        self.addCleanup(shutil.rmtree, self.kit / "analysis")
        output = self.script("launch_experiment", "configs/tiny.yaml", status=2)
        self.assertIn(
            "?? analysis/new.py\nerror: there are uncommitted changes, 1 in all, the first are "
            "above: commit them",
            output,
        )

    def test_a_log_from_the_last_start_and_the_list_of_runs(self):
        self.make_slice()
        self.stand_in("echo first; exit 1", "echo second; exit 1", "echo other; exit 0")
        self.assertIn("first", self.script("launch_experiment", "configs/tiny.yaml", status=4))
        output = self.script("launch_experiment", "configs/tiny.yaml", status=4)
        self.assertIn("second", output)
        self.assertNotIn("first", output)
        self.assertIn(DELETE, output)
        self.assertNotIn("first", self.script("launch_experiment", "logs", "tiny"))
        self.assertRegex(
            self.script("launch_experiment", "logs", "--all", "tiny"), "(?s)first.*second"
        )
        self.script("launch_experiment", "configs/tiny.yaml", "--run_name", "other")
        self.assertEqual(
            self.script("launch_experiment", "status").splitlines(),
            ["other: status 0", "tiny: status 1"],
        )

    def test_delete_when_done(self):
        for words, deleted in ((["--delete_when_done"], True), ([], False)):
            self.stand_in("exit 0")
            log = self.folder / f"log{deleted}"
            output = self.script(
                "keep_alive", "configs/tiny.yaml", "--poll", "0.1", "--log_dir", str(log), *words
            )
            self.assertEqual((self.cloud / "slices" / NAME).exists(), not deleted)
            self.assertEqual(
                DELETE.replace("uses", "where it is there, uses") in output, not deleted
            )
            self.assertEqual("my-tpu is deleted" in (log / "tiny.log").read_text(), deleted)
        self.stand_in("exit 2")  # what did not go well is left to look at
        self.script(
            "keep_alive",
            "configs/tiny.yaml",
            "training.seed=1",
            "--run_name",
            "wrong",
            "--poll",
            "0.1",
            "--log_dir",
            str(log),
            "--delete_when_done",
            status=2,
        )
        self.assertTrue((self.cloud / "slices" / NAME).exists())


class FakeAPI(http.server.BaseHTTPRequestHandler):
    """Google's TPU service for an installed gcloud: a request for the slice `name` is answered with
    tests/gcloud's error of that name."""

    protocol_version, gcloud = "HTTP/1.1", None

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = re.search(r"(?:nodes/|nodeId=)(\w+)|operations/(\w+)", self.path)
        node, operation = name.groups() if name else (None, None)
        if operation:
            code = {"RESOURCE_EXHAUSTED": 8, "INVALID_ARGUMENT": 3}[
                self.gcloud.ERRORS[operation][1]
            ]
            return self.send(
                200,
                {
                    "name": f"projects/p/locations/z/operations/{operation}",
                    "done": True,
                    "error": {"code": code, "message": self.gcloud.ERRORS[operation][2]},
                },
            )
        if node.startswith("late_"):
            return self.send(
                200, {"name": f"projects/p/locations/z/operations/{node[5:]}", "done": False}
            )
        if node == "ready":
            return self.send(
                200,
                {
                    "name": "projects/p/locations/z/nodes/ready",
                    "state": "READY",
                    "health": "HEALTHY",
                    "acceleratorType": "v4-8",
                    "apiVersion": "V2",
                    "cidrBlock": "x",
                },
            )
        status, code, message = self.gcloud.ERRORS[node]
        return self.send(status, {"error": {"code": status, "message": message, "status": code}})

    def send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=UTF-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

    do_GET = do_POST = answer


class InstalledGcloud(FolderTest):
    """The stand-in's texts, by which the scripts judge, are those that an installed gcloud makes of
    the same answers of Google's service."""

    def test_texts(self):
        found = shutil.which("gcloud")
        if (
            not found
            or not (Path(found).resolve().parent.parent / "lib" / "googlecloudsdk").exists()
        ):
            self.skipTest("the Google Cloud CLI is not installed here")
        with mock.patch.dict(os.environ, TRM_TEST_CLOUD="nowhere"):
            gcloud = load_gcloud()
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), type("API", (FakeAPI,), {"gcloud": gcloud})
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        (self.folder / "token").write_text("token")
        self.environment = {
            **os.environ,
            "CLOUDSDK_CONFIG": str(self.folder / "config"),
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(self.folder / "token"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{server.server_port}/",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        }
        ready = self.run_gcloud(
            "describe", "ready", "--format=csv[no-heading](state,health,acceleratorType)"
        )
        self.assertEqual((ready.returncode, ready.stdout), (0, "READY,HEALTHY,v4-8\n"))
        who = re.compile(r"This command is authenticated .*? property")
        for verb, name in (
            ("describe", "not_found"),
            ("describe", "denied"),
            ("describe", "expired"),
            ("create", "no_room"),
            ("create", "no_quota"),
            ("create", "wrong_type"),
            ("create", "exists"),
            ("create", "late_no_quota"),
            ("create", "late_wrong_type"),
        ):
            with self.subTest(verb=verb, name=name):
                done = self.run_gcloud(
                    verb,
                    name,
                    *(["--accelerator-type=v4-8", "--version=x"] if verb == "create" else []),
                )
                command = f"gcloud.compute.tpus.tpu-vm.{verb}"
                text = (
                    gcloud.late_error_text(name[5:], command)
                    if name.startswith("late_")
                    else gcloud.error_text(name, command)
                )
                self.assertEqual(done.returncode, 1)
                self.assertIn("ERROR: " + who.sub("WHO", text), who.sub("WHO", done.stderr))

    def run_gcloud(self, verb, name, *flags):
        return subprocess.run(
            [
                "gcloud",
                "compute",
                "tpus",
                "tpu-vm",
                verb,
                name,
                "--project=my-project-1",
                "--zone=us-central2-b",
                "--quiet",
                *flags,
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )


if __name__ == "__main__":
    unittest.main()
