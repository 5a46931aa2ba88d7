"""scripts/diagnose.py: sections by themselves, hosts that are processes of this machine, and their
reports in one file."""

import contextlib
import fcntl
import functools
import http.server
import io
import math
import os
import random
import shutil
import sys
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

import torch

from tests.helpers import ROOT, FolderTest, write_config
from tests.processes import is_running, run, wait_until
from tests.slice import SliceTest, executable

sys.path.insert(0, str(ROOT / "scripts"))
import check_devices
import diagnose
import diagnose_sections

import layers
from config import load_config
from device import Device
from layers import SwiGLU
from utils import RunFailure

PARTS = [
    "host",
    "variables",
    "metadata",
    "clock",
    "network",
    "packages",
    "chips",
    "bucket",
    "all-reduce",
    "step",
    "kernels",
]
SECRETS = {  # where none of them is a real one
    "ya29.a0AfB_byCexampleexampleexample": "ya29.a0AfB_byCexampleexampleexample",
    "HF_TOKEN=hf_abcdefghijklmnop": "hf_abcdefghijklmnop",
    'the answer {"access_token": "abc-def", "expires_in": 3599}': "abc-def",
    "Authorization: Bearer abcdefgh12345678": "abcdefgh12345678",
    "PIP_INDEX_URL=https://me:hunter2@wheels.example.org/simple": "hunter2",
    "TPU_API_KEY='p q'": "p q",
    "client_secret: 12345": "12345",
    "password = letmein": "letmein",
    "AIzaSyA1234567890abcdefghijklmnopqrstu": "AIzaSyA",
    "key=abc": "abc",
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADAN\nBgkqhkiG9w0B\n-----END PRIVATE "
    "KEY-----": "BgkqhkiG9w0B",
    "ssh AAAAB3NzaC1yc2EAAAADAQABAAABgQC7abcdefghijklmnopqrstuvw me@laptop": "AAAAB3NzaC1yc2E",
}
HARMLESS = [
    "commit 42762080941bb9780c408f51c853783e09232ff7, with uncommitted changes",
    "/home/me/trm/code/0123456789ab-0123456789ab/scripts/check_devices.py, line 12 in checkTheSum",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "KeyError: 'TPU_PROCESS_BOUNDS'",
    "the TPU kernels: 2 apart, by 3%",
    "TPU_PROCESS_ADDRESSES=10.0.0.2:8476,10.0.0.3:8476",
    "_ZN9torch_xla7runtime21PjRtComputationClient20ExecuteReplicatedEv+0x1f",
    "https://storage.googleapis.com/my-bucket/trm",
    "TRM_VENV=/home/me/tmpAb3xyz/a/long/way/to/trm/venv/bin/python3.11",
    "ACCELERATOR_TYPE: 'v4-16'",
    "key of a run",
    "tokens are words",
]


class Secrets(unittest.TestCase):
    def test_they_are_taken_out_and_nothing_else(self):
        for text, secret in SECRETS.items():
            with self.subTest(text):
                redacted = diagnose.redact(text)
                self.assertNotIn(secret, redacted)
                self.assertIn("(redacted)", redacted)
                self.assertEqual(
                    diagnose.redact(redacted), redacted
                )  # the host does it, and then the laptop
        for text in HARMLESS:
            self.assertEqual(diagnose.redact(text), text)


class Collecting(FolderTest):
    def report(self, host, *texts):
        """What a host prints, in lines."""
        with (
            mock.patch.object(diagnose, "HOST", host),
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            report = diagnose.Report()
            for text in (f"===== {host}", *texts, f"===== {host}: {diagnose.END}, nothing failed"):
                report.say(text)
        return out.getvalue().splitlines(keepends=True)

    def collect(self, lines, hosts, status):
        """(the file's text, what is printed) of the collector, in a Python without any package."""
        path = self.folder / "trm_diagnose.txt"
        command = [sys.executable, "-S", "scripts/diagnose.py", "--collect", path]
        output = run(self, [*command, "--hosts", hosts], status, answer="".join(lines))
        return path.read_text(), output

    def test_interleaved_lines_are_sorted_by_host(self):
        names = [f"t1v-n-w-{number}" for number in (0, 1, 2, 10)]
        hosts = {
            name: self.report(
                name, "[PASS] host: 96 cores", *(f"line {k} of {name}" for k in range(9))
            )
            for name in names
        }
        streams, order = [list(lines) for lines in hosts.values()], random.Random(0)
        lines = ["Using ssh batch size of 1.\n"]
        while any(streams):
            lines.append(order.choice([stream for stream in streams if stream]).pop(0))
        self.assertNotEqual(sorted(lines), lines)
        text, printed = self.collect(lines, 4, 0)
        wanted = [line.split(": ", 1)[1] for part in hosts.values() for line in (*part, "\n: \n")]
        self.assertEqual(
            text.partition("\n\n")[2].partition("===== what else was said\n")[0], "".join(wanted)
        )
        self.assertTrue(text.startswith("4 of 4 host(s); nothing failed\n"))
        self.assertTrue(text.endswith("===== what else was said\nUsing ssh batch size of 1.\n"))
        self.assertIn("t1v-n-w-10 [PASS] host: 96 cores\n", printed)

    def test_failures_lost_and_broken_lines_and_hosts_that_are_missing(self):
        first, second = (
            self.report("w-0", "[FAIL] step: no luck", "and on"),
            self.report("w-1", "a", "b")[:-1],
        )
        broken = first[2].rstrip("\n")[:-4] + second[1] + "d on\n"
        lines = [
            first[0],
            first[1],
            broken,
            first[3],
            second[0],
            "##### worker 1 failed: password=hunter2\n",
        ]
        text, printed = self.collect(lines, 3, 1)
        self.assertEqual(
            text.splitlines()[:4],
            [
                "2 of 3 host(s); 3 with a failure:",
                "w-0: step: no luck; 1 line(s) of its report were lost or damaged on the way",
                "w-1: its report is cut off: the host or the connection went",
                "a host has sent nothing",
            ],
        )
        self.assertIn("\nan (damaged on the way)\n", text)
        self.assertIn("\n===== w-1\na\n\n", text)
        self.assertIn("##### worker 1 failed: password=(redacted)\n", text)
        self.assertIn("d on\n", text)
        self.assertNotIn("hunter2", text + printed)
        self.assertIn("send it to us", printed)
        text, _ = self.collect([first[0], first[3]], 1, 1)
        self.assertIn("w-0: 2 line(s) of its report were lost", text)
        self.assertIn("(line 2) (lost on the way)\n(line 3) (lost on the way)\n", text)
        output = run(self, [sys.executable, "scripts/diagnose.py", "--collect", self.folder], 2)
        self.assertIn("no file can be written there", output)


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server; class attributes: what it has, and the time that it says."""

    entries, late = {}, 0.0

    def do_GET(self):
        entry = self.entries.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
        if self.path != "/" and self.headers["Metadata-Flavor"] != "Google":
            entry = None
        self.send_response(200 if entry else 404)
        self.end_headers()
        self.wfile.write((entry or "").encode())

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() - self.late)

    def log_message(self, *args):
        pass


class Sections(FolderTest):
    def section(self, name, *words, status=0, **environment):
        """What the section prints, in a process of its own."""
        command = [
            sys.executable,
            "scripts/diagnose_sections.py",
            name,
            "--config",
            "configs/quickstart.yaml",
            *words,
        ]
        return run(self, command, status, environment=environment)

    def metadata_server(self):
        """(its class, {variable: value} by which a section finds it) of a server that has what a
        healthy host's has."""
        healthy = {
            "attributes/accelerator-type": "v4-16",
            "attributes/agent-worker-number": "1",
            "attributes/worker-network-endpoints": "unknown:unknown:127.0.0.1,"
            "unknown:unknown:127.0.0.2",
            "attributes/tpu-env": "ACCELERATOR_TYPE: 'v4-16'\nWORKER_ID: '1'\n"
            "TPU_PROCESS_BOUNDS: '1,1,2'\n"
            "TPU_CHIPS_PER_PROCESS_BOUNDS: '2,2,1'",
            "preempted": "FALSE",
            "maintenance-event": "NONE",
            "service-accounts/default/scopes": "https://www.googleapis.com/auth/cloud-platform\n",
            "service-accounts/default/token": '{"access_token": "ya29.exampleexampleexample"}',
        }
        handler = type("Handler", (Metadata,), {"entries": healthy})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return handler, {"GCE_METADATA_HOST": f"127.0.0.1:{server.server_address[1]}"}

    def test_metadata(self):
        handler, where = self.metadata_server()
        output = self.section("metadata", **where)
        self.assertIn("[PASS] metadata: v4-16, host 1\n", output)
        self.assertIn("attributes/tpu-env: \n  ACCELERATOR_TYPE: 'v4-16'\n", output)
        self.assertNotIn("ya29", output)
        scopes, read_only = (
            "service-accounts/default/scopes",
            "https://www.googleapis.com/auth/devstorage.read_only",
        )
        for entry, value, says in (
            ("preempted", "TRUE", "is being preempted"),
            ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "goes into maintenance"),
            (scopes, read_only, "may write to a bucket"),
            (scopes, None, "may write to a bucket"),
        ):
            with mock.patch.dict(handler.entries, {entry: value}):
                self.assertIn(says, self.section("metadata", status=1, **where))
        output = self.section("metadata", GCE_METADATA_HOST="127.0.0.1:9")
        self.assertIn("[SKIP] metadata: 127.0.0.1:9 does not answer", output)

    def test_clock(self):
        handler, where = self.metadata_server()
        self.assertRegex(self.section("clock", **where), r"\[PASS\] clock: \+[01] s off")
        handler.late = 3600
        self.assertIn("error: the clock is +36", self.section("clock", status=1, **where))

    def test_network(self):
        _, where = self.metadata_server()
        several = {**where, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        output = self.section("network", **several, GLOO_SOCKET_IFNAME="lo")
        self.assertIn(
            "hosts of the slice: 127.0.0.1, 127.0.0.2; the way to 127.0.0.1 is by lo, from "
            "127.0.0.1\n",
            output,
        )
        self.assertIn(
            "[PASS] network: gloo listens at 127.0.0.1 (lo, by GLOO_SOCKET_IFNAME)", output
        )

    def test_gloo_where_others_do_not_reach_it(self):
        sockets = mock.Mock(
            getsockname=lambda: ("10.0.0.2", 9), connect=lambda target: None, fileno=lambda: 0
        )
        sockets.__enter__, sockets.__exit__ = (lambda self: self), (lambda *error: None)
        addresses = {b"lo": b"\x7f\0\0\1", b"ens8": b"\x0a\0\0\2", b"docker0": b"\xac\x11\0\1"}
        says = r"listens at 172.17.0.1 \(docker0\), .* at 10.0.0.2: export GLOO_SOCKET_IFNAME=ens8"
        with (
            mock.patch.multiple(
                diagnose_sections.socket,
                if_nameindex=lambda: enumerate(["lo", "ens8", "docker0"]),
                socket=mock.Mock(return_value=sockets),
                gethostbyname=lambda name: "172.17.0.1",
            ),
            mock.patch(
                "fcntl.ioctl",
                lambda probe, number, request: bytes(20) + addresses[request.rstrip(b"\0")],
            ),
            mock.patch.object(
                diagnose_sections, "ask_metadata", lambda path: "h:u:10.0.0.1,h:u:10.0.0.2"
            ),
            contextlib.redirect_stdout(io.StringIO()),
            self.assertRaisesRegex(diagnose_sections.Fault, says),
        ):
            diagnose_sections.check_network(None)

    def test_packages(self):
        self.assertIn(
            "[PASS] packages: all of requirements.txt as pinned", self.section("packages")
        )
        root = self.folder / "kit"
        root.mkdir()
        (root / "requirements.txt").write_text(
            "# torch for ...\ntorch==2.8.0     # too old\nno-such-package==1.0\n"
            "PyYAML\nnumpy==1.0; python_version < '3'\n"
        )
        args = mock.Mock(config=str(ROOT / "configs" / "quickstart.yaml"), overrides=[])
        says = r"torch 2\.\S+ in place of ==2.8.0; no-such-package none in place of ==1.0: "
        with (
            mock.patch.object(diagnose_sections, "ROOT", root),
            contextlib.redirect_stdout(io.StringIO()),
            self.assertRaisesRegex(diagnose_sections.Fault, says),
        ):
            diagnose_sections.check_packages(args)

    def test_chips(self):
        self.assertIn(
            "[SKIP] chips: there is no chip here, and device = 'cpu' asks for none",
            self.section("chips"),
        )
        output = self.section("chips", "device=tpu", status=1)
        self.assertIn("error: there is no chip here: this is no host of a TPU slice", output)

    def test_who_has_the_chips(self):
        chip = self.folder / "accel0"
        chip.touch()
        with mock.patch.object(diagnose_sections, "chip_files", lambda: [str(chip)]):
            self.assertEqual(diagnose_sections.holders(), {})
            with open(chip):
                self.assertEqual(list(diagnose_sections.holders()), [str(os.getpid())])

    def test_a_full_disk(self):
        with (
            mock.patch.object(diagnose_sections, "FREE_BYTES", 2**60),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            with self.assertRaisesRegex(diagnose_sections.Fault, "GiB free: delete"):
                diagnose_sections.check_host(None)


class Endings(FolderTest):
    """Sections that do not end as they should."""

    def result(self, code, parts="clock"):
        """The lines of a report of one section, whose process runs `code` instead."""
        (self.folder / "scripts").mkdir(exist_ok=True)
        (self.folder / "scripts" / "diagnose_sections.py").write_text(code)
        with (
            mock.patch.object(diagnose, "ROOT", self.folder),
            mock.patch.object(diagnose, "VENV_PYTHON", sys.executable),
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            report = diagnose.Report()
            report.section(parts, ["--config", "configs/quickstart.yaml"])
        return report.failed, [line.split(": ", 1)[1] for line in out.getvalue().splitlines()]

    def test_each_is_a_failure_with_its_reason(self):
        in_section = (
            f"import sys, time, os; sys.path.insert(0, '{ROOT}/scripts'); sys.argv = ['', 'clock', "
            "'--config', 'x']; import diagnose_sections as d; d.SECTIONS['clock'] = "
            "d.SECTIONS['clock']._replace(seconds={}, check=lambda args: {}); d.main()"
        )
        for code, says in (
            (in_section.format(9, "1 / 0"), "ZeroDivisionError: division by zero"),
            (
                in_section.format(1, "time.sleep(60)"),
                "no end within 0:00:01 (hours:minutes:seconds); where it was is above",
            ),
            (
                in_section.format(9, "os.kill(os.getpid(), 9)"),
                "signal 9 ended it; before that: nothing was printed",
            ),
            (
                "print('error: worker 0: another worker has failed (x)\\nerror: worker 1: too "
                "hot'); exit(1)",
                "worker 1: too hot",
            ),
            ("print('[PASS] clock: fine'); exit(1)", "[PASS] clock: fine"),
            ("", "nothing was printed"),
        ):
            with self.subTest(code=code):
                failed, lines = self.result(code)
                self.assertTrue(failed)
                means = (
                    "  what it means: Google may refuse requests, and the times in records are "
                    "wrong"
                )
                self.assertEqual(lines[-2:], [f"[FAIL] clock: {says}", means])
                if "sleep" in code:
                    self.assertTrue(any("in <lambda>" in line for line in lines), lines)
        self.assertEqual(
            self.result("print('[PASS] clock: fine')"),
            (False, ["----- clock -----", "[PASS] clock: fine"]),
        )

    def test_what_a_section_has_passed_stays(self):
        code = (
            "print('[PASS] all-reduce: right'); print('error: the loss of step 1 is not finite'); "
            "exit(1)"
        )
        failed, lines = self.result(code, "workers")
        self.assertTrue(failed)
        self.assertEqual(
            [line for line in lines if line[0] == "["],
            [
                "[PASS] all-reduce: right",
                "[FAIL] step: the loss of step 1 is not finite",
                "[SKIP] kernels: not reached",
            ],
        )

    def test_one_that_hangs_silently_is_ended_with_what_it_started(self):
        code = (
            "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, "
            "flush=True); time.sleep(600)"
        )
        section = diagnose.SECTIONS["clock"]._replace(seconds=1)
        with (
            mock.patch.dict(diagnose.SECTIONS, clock=section),
            mock.patch.object(diagnose, "KILL_SECONDS", 1),
        ):
            _, lines = self.result(code)
        self.assertEqual(
            lines[-2], "[FAIL] clock: no end within 1 s, and it did not say where it was"
        )
        wait_until(lambda: not is_running(int(lines[1])))  # its end may take a moment to show

    def test_without_an_environment(self):
        with mock.patch.object(diagnose, "VENV_PYTHON", Path("/nowhere/bin/python")):
            output, status = diagnose.run_section("chips", [])
        self.assertEqual(
            (output, status),
            (
                "error: /nowhere/bin/python is not there: scripts/setup_tpu.sh installs the "
                "environment",
                2,
            ),
        )


class Steps(FolderTest):
    """check_devices.py --steps, in this process on its CPU."""

    def setUp(self):
        super().setUp()
        self.config = check_devices.of_least_size(
            load_config(
                write_config(
                    self.folder / "tiny.yaml",
                    "device: cpu\ntpu: {}\ndata: {dataset_path: nowhere}\n"
                    "model: {num_heads: 2, forward_dtype: float32}\ntraining: {}\ncheckpoint: "
                    "{}\nlogging: {}\nevaluation: {}\n",
                )
            )
        )
        self.addCleanup(sys.path.remove, str(ROOT / "analysis"))
        sys.path.insert(0, str(ROOT / "analysis"))

    def check(self):
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            check_devices.check_steps(self.config, Device("cpu"))
        return out.getvalue()

    def fails(self, says):
        with self.assertRaisesRegex(RunFailure, says):
            self.check()

    def test_with_and_without_kernels(self):
        step, kernels = self.check().splitlines()
        self.assertRegex(
            step,
            r"^\[PASS\] step: loss \d\.\d+ to \d\.\d+, gradient norm \S+; first step .* s, then "
            r".* ms .*; "
            r"compiles \[0,.*; kernels in 0 SwiGLUs$",
        )
        self.assertIn(
            "[PASS] kernels: this configuration uses none on this device; the same steps again "
            "agree (loss ",
            kernels,
        )

    def spoilt(self, spoil):
        """spoil(model) in place of train_state.choose_mixing, where there shall be kernels."""

        def instead(model, config, device):
            if config.training.pallas_kernels:
                spoil(model)

        return mock.patch("train_state.choose_mixing", instead)

    def test_kernels_that_compute_something_else(self):
        def wrong(model):
            for swiglu in [module for module in model.modules() if isinstance(module, SwiGLU)]:
                swiglu.down_proj.weight.data *= -1.0

        with self.spoilt(wrong):
            self.fails(
                r"after the first step z_H with the TPU kernels is \S+ \(relative\) off what it "
                r"is without, and not"
            )

    def test_comparing(self):
        plain = {"losses": [2.0] * 6, "norms": [1.0] * 6, "state": [torch.ones(8), torch.ones(8)]}
        for change, says in (
            (
                {"losses": [2.05] * 6},
                "step 1: the loss is 2.05 with the TPU kernels and 2 without, 2.5% apart",
            ),
            ({"losses": [2.0] * 5 + [1.9]}, "step 6: the loss"),
            ({"norms": [1.2] * 6}, "step 1: the gradient norm"),
            ({"norms": [math.nan] * 6}, "the gradient norm"),
            ({"state": [torch.ones(8), 2 * torch.ones(8)]}, "z_L"),
            ({"state": [torch.full((8,), math.nan), torch.ones(8)]}, "z_H"),
        ):
            with self.assertRaisesRegex(RunFailure, says):
                check_devices.compare(mock.Mock(**plain), mock.Mock(**{**plain, **change}))
        near = mock.Mock(losses=[2.03] * 6, norms=[1.05] * 6, state=[1.1 * torch.ones(8)] * 2)
        check_devices.compare(mock.Mock(**plain), near)

    def test_kernels_that_are_used_and_said(self):
        def use(model):
            for module in model.modules():
                if isinstance(module, SwiGLU):
                    module.mix = functools.partial(layers.mix)
                    module.mix.chip = "v4"  # as a kernel's

        with self.spoilt(use):
            self.assertRegex(
                self.check().splitlines()[1],
                r"^\[PASS\] kernels: loss .*; kernels in [1-9]\d* SwiGLUs; "
                "losses, gradients and states agree with those without$",
            )

    def test_kernels_that_do_not_work(self):
        warning = "warning: the TPU kernels are not used, and a step takes longer: 3 is too large"
        with self.spoilt(lambda model: print(warning, file=sys.stderr)):
            self.fails(f"^{warning}$")

    def test_a_loss_that_is_not_finite(self):
        def spoil(model):
            next(model.parameters()).data.fill_(math.nan)

        with self.spoilt(spoil):
            self.fails(r"the loss or a gradient of step 1 is not finite \(kernels: True\)")

    def test_a_second_compile(self):
        counts = iter(range(99))
        with mock.patch.object(
            Device, "counters", lambda self: {"xla_compiles": next(counts), "xla_executions": 0}
        ):
            self.fails(
                r"a step after the first compiles again \(compiles of steps 1 to 6: \[1, 1, 1, "
                r"1, 1, 1\]"
            )


class Hosts(SliceTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        ignored = shutil.ignore_patterns("__pycache__", "sample_results")
        shutil.copytree(ROOT / "analysis", cls.kit / "analysis", ignore=ignored)
        cls.git("add", "--all")
        cls.git("commit", "--quiet", "--message=the rest")

    def make_ready(self, *words):
        self.script("setup_tpu", "configs/tiny.yaml", "--poll", "0.1", *words)
        (self.cloud / "real_check").touch()

    def diagnose(self, *words, status=0):
        """(the file's text, what is printed on the laptop)."""
        printed = self.script(
            "setup_tpu", "configs/tiny.yaml", "--diagnose", "--poll", "0.1", *words, status=status
        )
        (path,) = self.kit.glob("trm_diagnose_my-tpu_*.txt")
        self.assertIn(f"written: {path}", printed)
        text = path.read_text()
        path.unlink()
        return text, printed

    def results(self, text):
        """{host: [(PASS, part), ...]}."""
        found = {}
        for line in text.splitlines():
            if line.startswith("===== ") and ", 20" in line:
                host = line.split()[1].rstrip(",")
            elif result := diagnose.RESULT.fullmatch(line):
                found.setdefault(host, []).append((result[1], result[2]))
        return found

    def test_one_host_where_much_is_wrong(self):
        self.make_ready()
        (self.cloud / "bad_host").write_text("0")
        self.write_host_environment(
            TPU_ACCESS_TOKEN="hunter2hunter2",
            GCE_METADATA_HOST="127.0.0.1:9",
            PIP_INDEX_URL="https://me:hunter2@example.org/simple",
        )
        text, printed = self.diagnose("tpu.bucket=gs://no-such-bucket/trm", status=1)
        ((host, results),) = self.results(text).items()
        self.assertEqual([part for _, part in results], PARTS)
        self.assertEqual(
            [part for word, part in results if word == "FAIL"], ["bucket", "all-reduce"]
        )
        self.assertEqual(
            [part for word, part in results if word == "SKIP"],
            ["metadata", "chips", "step", "kernels"],
        )
        self.assertRegex(
            text,
            r"\[FAIL\] bucket: gs://no-such-bucket/trm/runs/diagnose\S*: there is no bucket "
            r"'no-such-bucket'",
        )
        self.assertRegex(
            text, r"\[FAIL\] all-reduce: \S+: worker 0 got a wrong sum over the 1 workers"
        )
        self.assertIn("  what it means: a run could not write its checkpoints\n", text)
        self.assertIn(f"commit {self.git('rev-parse', 'HEAD')}; Python 3.", text)
        self.assertIn("TPU_ACCESS_TOKEN=(redacted)\n", text)
        self.assertIn("PIP_INDEX_URL=https://(redacted)@example.org/simple\n", text)
        self.assertNotIn("hunter2", text + printed)
        self.assertIn(f"{host} [FAIL] all-reduce: ", printed)
        self.assertIn("1 of 1 host(s); 1 with a failure:\n", printed)

        with open(self.host() / "trm" / "lock", "w") as lock:
            lock.write("another")
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            text, printed = self.diagnose(status=1)
        self.assertIn("the run another has the chips: stop it first\n", text)
        self.assertEqual(self.results(text), {})
        self.assertIn("a host has sent nothing", printed)

    def test_two_hosts_and_a_section_that_is_killed_on_one(self):
        self.make_ready("tpu.accelerator_type=v4-16")
        python = self.host(0) / "trm" / "venv" / "bin" / "python"
        killed = 'case "$*" in\n    *diagnose_sections.py\\ bucket*) kill -9 $$ ;;'
        executable(python, python.read_text().replace('case "$*" in', killed, 1))
        text, printed = self.diagnose("tpu.accelerator_type=v4-16", status=1)
        results = self.results(text)
        self.assertEqual([name.partition(".")[2] for name in results], ["rank0", "rank1"])
        for found, failed in zip(results.values(), (["bucket"], [])):
            self.assertEqual([part for _, part in found], PARTS)
            self.assertEqual([part for word, part in found if word == "FAIL"], failed)
            self.assertEqual(
                [part for word, part in found if word == "SKIP"], ["metadata", "chips"]
            )
        self.assertIn("[FAIL] bucket: signal 9 ended it; before that: nothing was printed\n", text)
        self.assertIn(
            f"[PASS] bucket: an object in {self.url}/runs/diagnose was written, read and deleted\n",
            text,
        )
        self.assertEqual(self.gcloud.listed(f"{self.url}/runs/diagnose"), {})
        self.assertEqual(text.count("[PASS] all-reduce: the sum over 2 worker(s) is right\n"), 2)
        self.assertIn("2 of 2 host(s); 1 with a failure:\n", printed)
        self.assertEqual(self.host_processes(), {})


if __name__ == "__main__":
    unittest.main()
