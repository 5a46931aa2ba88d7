"""SIGTERM at any time, to one worker or to all: a checkpoint, exit status 143 soon, and the same
training afterwards."""

import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import sys
import unittest
from unittest import mock

from checkpoint_manager import load_checkpoint
from tests.helpers import WITH_KIT, CommandTest
from tests.metadata_server import MetadataServer
from tests.processes import begin, descendants, free_port, pause, run

SECONDS = 25  # from the signal to the end, of a run whose steps take under a second

# No checkpoint and no evaluation before the last step: right after one nothing would be unsaved,
# and the run would end without another.
NONE_ON_THE_WAY = "checkpoint.interval_steps=1000", "evaluation.interval_epochs=1000"


numbers = itertools.count()


class PreemptionTest(CommandTest):
    inside = ()  # a command that runs the one it is given, for `begin`

    def begin(self, run_name, pauses, *flags):
        """Start the command with pauses, of which tests/programs/slow_train.py tells."""
        self.arrivals = self.folder / f"{run_name}.arrivals.{next(numbers)}"
        self.arrivals.touch()
        environment = {
            **WITH_KIT,
            "TRM_TEST_PAUSES": json.dumps(pauses),
            "TRM_TEST_ARRIVALS": self.arrivals,
            "TORCHINDUCTOR_CACHE_DIR": self.folder / f"{run_name}.compiled",
        }  # each compile takes its time
        command = [*self.inside, sys.executable, "tests/programs/slow_train.py"]
        command += ["--config", self.config, "--run_name", run_name, *flags]
        process = begin(self, command, environment)
        process.arrivals = self.arrivals
        return process

    def begin_hosts(
        self, run_name, pauses, *flags, environments=({}, {}), inside=((), ()), address="127.0.0.1"
    ):
        """`begin` on each of several hosts, with one worker each; that of rank 0 holds the store,
        as on a TPU slice."""
        where = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(len(environments)),
        }
        processes = []
        for rank, (environment, self.inside) in enumerate(zip(environments, inside, strict=True)):
            with mock.patch.dict(os.environ, {**where, "RANK": str(rank), **environment}):
                processes.append(self.begin(run_name, pauses, *flags))
        return processes

    def arrived(self, process, place, count, rank=0):
        """Wait until worker `rank` has come to `place` for the count-th time; its pid."""

        def pid():
            here = [line.split() for line in process.arrivals.read_text().splitlines()]
            pids = [int(pid) for name, who, pid in here if name == place and int(who) == rank]
            return pids[-1] if len(pids) >= count else None

        return process.until(pid, 300)

    def ends(self, process, status=143, seconds=SECONDS):
        """What it prints to its end, which comes in time, and its workers' with it."""
        output = process.all_end(status, seconds)
        self.assertNotIn("Traceback", output)
        return output

    def newest(self, run_name):
        markers = (self.folder / "runs" / run_name / "checkpoints").glob("*.json")
        return max((json.loads(path.read_text())["step"] for path in markers), default=None)


class ShortRuns(PreemptionTest):
    """Runs of 30 steps."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.output = cls().train("--run_name", "unbroken", "training.epochs=3")

    def begin(self, run_name, pauses, *flags):
        return super().begin(run_name, pauses, "training.epochs=3", *flags)

    def goes_on_as_unbroken(self, run_name):
        self.train("--run_name", run_name, "training.epochs=3")
        self.same_content(
            load_checkpoint(self.checkpoint(run_name, 30)),
            load_checkpoint(self.checkpoint("unbroken", 30)),
        )
        self.assertEqual(self.records(run_name), self.records("unbroken"))


class OneWorker(ShortRuns):
    def test_in_a_step(self):
        process = self.begin("step", {"train_step": 0.05})
        self.arrived(process, "train_step", 17)
        process.terminate()
        output = self.ends(process)
        self.assertRegex(
            output, r"step \d+ of 30: stopped by SIGTERM; the last good checkpoint is "
        )
        self.assertGreaterEqual(self.newest("step"), 17)
        self.assertLess(self.newest("step"), 20)
        self.goes_on_as_unbroken("step")

    def test_interrupted_from_the_keyboard(self):
        process = self.begin("keyboard", {"train_step": 0.05})
        self.arrived(process, "train_step", 17)
        process.send_signal(signal.SIGINT)
        output = self.ends(process, 130)
        self.assertIn("interrupted: the run saves a checkpoint and ends", output)
        self.assertRegex(output, r"step \d+ of 30: stopped by SIGINT; the last good checkpoint is ")
        self.assertTrue(17 <= self.newest("keyboard") < 20)
        self.goes_on_as_unbroken("keyboard")

    def test_interrupted_twice(self):
        """The second time it does not wait for the step."""
        hold = self.folder / "hold.17"
        hold.touch()
        process = self.begin("twice", {"train_step": str(hold.with_suffix(""))})
        self.arrived(process, "train_step", 17)
        process.send_signal(signal.SIGINT)
        process.says("interrupted: the run saves")
        pause(0.5)  # no finger is so fast that the main thread has not noted the first
        process.send_signal(signal.SIGINT)
        self.assertIn("interrupted\n", self.ends(process, 130))
        self.assertEqual(self.newest("twice"), 14)
        hold.unlink()
        self.goes_on_as_unbroken("twice")

    def test_interrupted_with_nothing_to_save(self):
        """As before the training begins, or in an evaluation of its own. A background job, which is
        told to ignore Ctrl-C, does so."""
        for handler, status, says in (
            (signal.default_int_handler, 130, "SIGINT"),
            (signal.SIG_IGN, 143, "SIGTERM"),
        ):
            output = run(
                self,
                [sys.executable, "tests/programs/interrupts_itself.py"],
                status,
                environment=WITH_KIT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
            )
            self.assertEqual(output, f"{says}: nothing is unsaved; status {status}\n")

    def test_login_ends(self):
        """At a shutdown its processes get SIGTERM, and SIGHUP on its heels; where a terminal is
        closed, SIGHUP alone."""
        for which, signals in (
            ("SIGTERM", (signal.SIGTERM, signal.SIGHUP)),
            ("SIGHUP", (signal.SIGHUP,)),
        ):
            with self.subTest(which):
                process = self.begin(which, {"train_step": 0.05})
                self.arrived(process, "train_step", 17)
                for number in signals:
                    process.send_signal(number)
                self.assertIn(
                    f"stopped by {which}; the last good checkpoint is ", self.ends(process)
                )
                self.assertTrue(17 <= self.newest(which) < 20)

    def test_login_ends_on_a_host_of_a_slice(self):
        """What tpu_host.sh starts ignores SIGHUP, and its supervisor lives on to write down how the
        training ended."""
        python, home, arrivals = (
            self.folder / "venv" / "bin" / "python",
            self.folder / "home",
            self.folder / "host.arrivals",
        )
        folder = home / "trm" / "runs" / "host"
        for made in (python.parent, folder):
            made.mkdir(parents=True)
        python.write_text(
            f'#!/bin/sh\nshift\nexec {sys.executable} tests/programs/slow_train.py "$@"\n'
        )
        python.chmod(0o755)
        arrivals.touch()
        environment = {
            **WITH_KIT,
            "HOME": home,
            "TRM_VENV": python.parent.parent,
            "TRM_TEST_PAUSES": '{"train_step": 0.05}',
            "TRM_TEST_ARRIVALS": arrivals,
        }
        command = ["nohup", "bash", "scripts/tpu_host.sh", "supervise", "host"]
        command += ["--config", self.config, "--run_name", "host", "training.epochs=3"]
        supervisor = begin(self, command, environment)
        supervisor.arrivals = arrivals
        self.arrived(supervisor, "train_step", 3)
        supervisor.signal_all(signal.SIGHUP)
        self.arrived(supervisor, "train_step", 17)
        supervisor.signal_all(signal.SIGTERM)
        supervisor.signal_all(signal.SIGHUP)
        self.assertIn("stopped by SIGTERM; the last good checkpoint is ", self.ends(supervisor, 0))
        self.assertEqual((folder / "status").read_text(), "143\n")
        self.assertGreaterEqual(self.newest("host"), 17)

    def test_in_the_last_step(self):
        """The final evaluation is still to come: the run is not finished."""
        process = self.begin("last", {"train_step": 0.05})
        self.arrived(process, "train_step", 30)
        process.terminate()
        self.assertIn("step 30 of 30: stopped by SIGTERM", self.ends(process))
        self.goes_on_as_unbroken("last")

    def test_in_an_evaluation(self):
        process = self.begin("evaluation", {"evaluate": 3600})
        self.arrived(process, "evaluate", 1)
        process.terminate()
        self.assertIn("SIGTERM: nothing is unsaved", self.ends(process))
        self.assertEqual(self.newest("evaluation"), 20)
        self.goes_on_as_unbroken("evaluation")

    def test_twice_in_a_save(self):
        process = self.begin("save", {"save": 1.0})
        self.arrived(process, "save", 1)
        process.terminate()
        pause(0.2)
        process.terminate()
        self.ends(process)
        self.assertGreaterEqual(self.newest("save"), 7)
        self.goes_on_as_unbroken("save")

    def test_in_a_compile(self):
        """Before the first step is done there is nothing to save, and a compile, which takes long,
        is not waited for."""
        process = self.begin("compile", {}, "training.compile=always")
        process.says("begins: to step 30")
        pause(0.5)
        process.terminate()
        output = self.ends(process)
        self.assertIn("SIGTERM: nothing is unsaved", output)
        self.assertNotIn("step      5", output)
        self.assertIsNone(self.newest("compile"))


class Notice(ShortRuns):
    """The metadata server's, that a host is preempted."""

    def told(self, run_name, server, *flags, pauses=None, place="train_step", count=17):
        """The command with that metadata server, which tells it once it is there; what it
        prints."""
        with mock.patch.dict(os.environ, GCE_METADATA_HOST=server.host):
            process = self.begin(run_name, pauses or {"train_step": 0.05}, *flags)
            self.arrived(process, place, count)
            server.wait_until(lambda: server.waiting == 1)
            server.preempt()
            return self.ends(process)

    def test_in_a_step(self):
        with MetadataServer() as server:
            output = self.told("step", server)
            self.assertIn(
                f"stopped by the notice that {socket.gethostname()} is preempted; "
                "the last good checkpoint is ",
                output,
            )
            self.assertTrue(17 <= self.newest("step") < 20)
            self.assertEqual(server.answers, [200, 200])
        with MetadataServer() as server, mock.patch.dict(os.environ, GCE_METADATA_HOST=server.host):
            self.goes_on_as_unbroken("step")
            self.assertEqual(server.answers[0], 200)

    def test_in_an_evaluation(self):
        """One of the host's two workers asks, and tells the other."""
        with MetadataServer() as server:
            output = self.told(
                "evaluation",
                server,
                "training.num_workers=2",
                pauses={"evaluate": 3600},
                place="evaluate",
                count=1,
            )
            for rank in range(2):
                self.assertIn(
                    f"the notice that {socket.gethostname()} is preempted: nothing is unsaved; "
                    f"worker {rank} ends with status 143",
                    output,
                )
            self.assertEqual(server.answers, [200, 200])
            self.assertEqual(self.newest("evaluation"), 20)

    def test_before_it_starts(self):
        """The value is as it was before anybody waited for it to change."""
        with MetadataServer() as server, mock.patch.dict(os.environ, GCE_METADATA_HOST=server.host):
            server.preempt()
            output = self.ends(self.begin("before", {"train_step": 0.05}))
            self.assertIn(
                f"the notice that {socket.gethostname()} is preempted: nothing is unsaved", output
            )
            self.assertEqual(server.answers, [200])

    def test_of_a_server_that_is_restarted(self):
        with (
            MetadataServer(down=True) as server,
            mock.patch.dict(os.environ, GCE_METADATA_HOST=server.host),
        ):
            process = self.begin("restarted", {"train_step": 0.5})
            server.wait_until(lambda: server.answers == [503, 503])
            server.come_up()
            server.wait_until(lambda: server.waiting == 1)
            self.arrived(process, "train_step", 2)
            server.preempt()
            self.assertIn("stopped by the notice that ", self.ends(process))
            self.assertEqual(server.answers, [503, 503, 200, 200])

    def test_of_nobody(self):
        """Nobody at that address, or somebody who is not Google's: nothing is said, and the
        training is the same."""

        def unmeasured(output, run_name):
            return re.sub(
                r" +\d+ (ex|puzzles)/s|  \d+ s left|peak .* TFLOP/s",
                "",
                output.replace(f"/{run_name}", ""),
            )

        with MetadataServer() as gone, MetadataServer(flavor=None) as stranger:
            gone.__exit__()
            for name, server in (("gone", gone), ("stranger", stranger)):
                server.preempt()
                with self.subTest(name), mock.patch.dict(os.environ, GCE_METADATA_HOST=server.host):
                    output = self.train("--run_name", name, "training.epochs=3")
                    self.assertEqual(unmeasured(output, name), unmeasured(self.output, "unbroken"))
                    self.assertEqual(set(server.answers), set() if server is gone else {200})
                    self.same_content(
                        load_checkpoint(self.checkpoint(name, 30)),
                        load_checkpoint(self.checkpoint("unbroken", 30)),
                    )
                    self.assertEqual(self.records(name), self.records("unbroken"))

    def test_to_one_host_of_two(self):
        """Both save, or have nothing to save, and both end."""
        for place, count, says in (
            ("train_step", 10, "stopped by {}; the last good checkpoint is "),
            ("evaluate", 1, "{}: nothing is unsaved; worker 0 ends"),
        ):
            with self.subTest(place), MetadataServer() as ours, MetadataServer() as theirs:
                processes = self.begin_hosts(
                    place,
                    {"train_step": 0.1} if place == "train_step" else {"evaluate": 3600},
                    *(NONE_ON_THE_WAY if place == "train_step" else ()),
                    environments=[{"GCE_METADATA_HOST": server.host} for server in (ours, theirs)],
                )
                for rank, process in enumerate(processes):
                    self.arrived(process, place, count, rank)
                theirs.wait_until(lambda: theirs.waiting == 1)
                theirs.preempt()
                output, _ = map(self.ends, processes)
                self.assertIn(
                    says.format(f"the notice that {socket.gethostname()} is preempted"), output
                )
                self.assertEqual(self.newest(place) % 4, 0)
                self.assertEqual(ours.answers, [200])  # and the other request is held to the end


class ManyWorkers(PreemptionTest):
    """Runs of 26 steps."""

    WORKERS, FLAGS = (
        3,
        ("training.num_workers=3", "training.global_batch_size=9", "training.epochs=3"),
    )

    def begin(self, run_name, pauses, *flags):
        return super().begin(run_name, pauses, *self.FLAGS, *flags)

    def check(self, name, place, count, pauses, whom, *flags):
        process = self.begin(name, pauses, *flags)
        pids = [self.arrived(process, place, count, rank) for rank in range(self.WORKERS)]
        for pid in {"parent": [process.pid], "one": [pids[2]], "all": [process.pid, *pids]}[whom]:
            os.kill(pid, signal.SIGTERM)
        return self.ends(process)

    def test_in_a_step(self):
        self.train("--run_name", "unbroken", *self.FLAGS, *NONE_ON_THE_WAY)
        last = self.newest("unbroken")
        for whom in ("parent", "one", "all"):
            with self.subTest(whom):
                name = f"step_{whom}"
                self.assertIn(
                    "stopped by SIGTERM",
                    self.check(name, "train_step", 10, {"train_step": 0.1}, whom, *NONE_ON_THE_WAY),
                )
                # a vote every four steps, read four steps later
                self.assertEqual(self.newest(name) % 4, 0)
                self.assertLessEqual(self.newest(name), 10 + 12)
                self.train("--run_name", name, *self.FLAGS, *NONE_ON_THE_WAY)
                self.same_content(
                    load_checkpoint(self.checkpoint(name, last)),
                    load_checkpoint(self.checkpoint("unbroken", last)),
                )
                self.assertEqual(self.records(name), self.records("unbroken"))

    def test_in_an_evaluation(self):
        for whom in ("one", "all"):
            with self.subTest(whom):
                output = self.check(f"evaluation_{whom}", "evaluate", 1, {"evaluate": 3600}, whom)
                self.assertEqual(output.count("SIGTERM: nothing is unsaved"), self.WORKERS)
                self.assertIsNotNone(self.newest(f"evaluation_{whom}"))

    def test_while_they_start(self):
        """Of multiprocessing's two processes the one that forks the workers imports PyTorch; or the
        last worker is just there."""
        for k, (processes, signals, status) in enumerate(
            (
                (2, signal.SIGTERM, 143),
                (2, signal.SIGINT, 130),
                (2 + self.WORKERS, signal.SIGTERM, 143),
            )
        ):
            with self.subTest(processes=processes, signals=signals):
                process = self.begin(f"start_{k}", {})
                process.until(lambda: len(descendants(process.pid)) >= processes)
                pause(0.5)
                process.signal_all(signals)
                self.ends(process, status)
                self.assertIsNone(self.newest(f"start_{k}"))

    def test_interrupted_from_the_keyboard(self):
        process = self.begin("keyboard", {"train_step": 0.1})
        self.arrived(process, "train_step", 10)
        process.signal_all(signal.SIGINT)
        self.assertIn("interrupted: the workers save and end", self.ends(process, 130))
        self.assertGreaterEqual(self.newest("keyboard"), 10)

    def test_in_a_compile(self):
        process = self.begin("compile", {}, "training.compile=always")
        process.says("begins: to step")
        process.terminate()
        self.assertEqual(self.ends(process).count("SIGTERM: nothing is unsaved"), self.WORKERS)


@unittest.skipUnless(importlib.util.find_spec("torch_xla"), "torch_xla is not installed here")
class OnXLA(PreemptionTest):
    """As on a TPU: the command is the parent of a process for each device."""

    def test_in_a_step(self):
        for whom in ("parent", "worker"):
            with self.subTest(whom):
                process = self.begin(f"step_{whom}", {"train_step": 0.05}, "device=xla_cpu")
                pid = self.arrived(process, "train_step", 10)
                os.kill(process.pid if whom == "parent" else pid, signal.SIGTERM)
                self.assertIn("stopped by SIGTERM", self.ends(process))
                self.assertGreaterEqual(self.newest(f"step_{whom}"), 10)

    def test_in_a_compile(self):
        process = self.begin(
            "compile", {"train_step": 0}, "device=xla_cpu", "model.H_cycles=6", "model.L_cycles=8"
        )
        pid = self.arrived(process, "train_step", 1)
        pause(0.5)
        os.kill(pid, signal.SIGTERM)
        self.assertIn("SIGTERM: nothing is unsaved", self.ends(process))
        self.assertIsNone(self.newest("compile"))


class Interval(PreemptionTest):
    def test_an_evaluation_is_no_time_of_training(self):
        process = self.begin("timed", {"evaluate": 2.0})
        self.ends(process, status=0)
        records = [r for r in self.records("timed", timing=True) if r["split"] == "train"]
        first, last = records[0], records[-1]
        seconds = last["wall_time"] - first["wall_time"]
        # two evaluations lie between these records; 0.1 s for what is read off both clocks
        self.assertLess(last["train_seconds"] - first["train_seconds"], seconds - 2 * 2.0 + 0.1)

    def test_minutes_make_checkpoints_too(self):
        process = self.begin(
            "minutes",
            {"train_step": 0.1},
            "checkpoint.interval_steps=1000",
            "evaluation.interval_epochs=6",
            f"checkpoint.interval_minutes={2 / 60}",
            "checkpoint.keep_last_n=99",
        )
        process.ends(seconds=120)
        steps = sorted(
            int(path.stem.split("_")[-1])
            for path in (self.folder / "runs" / "minutes" / "checkpoints").glob("*.json")
        )
        self.assertEqual(steps[-1], 60)
        # sixty steps of a tenth of a second or more, a checkpoint every two seconds: some, and not
        # at every step
        self.assertTrue(3 <= len(steps) <= 30, steps)


if __name__ == "__main__":
    unittest.main()
