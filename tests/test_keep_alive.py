"""scripts/keep_alive.sh, for real: a run on a slice of local processes that is preempted, gone,
silent, failing or stopped."""

import json
import re
import unittest

from checkpoint_manager import load_checkpoint
from metrics_logger import TIMING_KEYS
from tests.slice import DELETE, ENDLESS, NAME, SliceTest


class KeepAlive(SliceTest):
    def begin_keeping(self, *words):
        return self.begin(
            "keep_alive",
            "configs/tiny.yaml",
            "--poll",
            "0.5",
            "--log_dir",
            str(self.folder / "log"),
            *words,
        )

    def ends(self, process, status):
        """The log file, once it has ended so."""
        self.assertNotIn("Traceback", process.ends(status, 120))
        log = (self.folder / "log" / "tiny.log").read_text()
        for line in log.splitlines():
            self.assertRegex(line, r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC tiny: ")
        return log

    def attempts(self, log):
        return [int(number) for number in re.findall(r"attempt (\d+)$", log, re.MULTILINE)]

    def test_two_preemptions_to_the_end(self):
        self.refuse("create", "no_room")
        self.hold(17)
        process = self.begin_keeping("--spot", "--max_attempts", "3")
        self.arrived(17)
        head = self.git("rev-parse", "HEAD")
        self.git(
            "commit", "--quiet", "--allow-empty", "--message=later"
        )  # is not what runs from now on
        self.hold(10)
        self.wait_for(
            lambda: (
                "checkpoint_step_14.json" in self.gcloud.listed(f"{self.url}/runs/tiny/checkpoints")
            )
        )
        self.preempt()  # without time for a checkpoint
        self.release(17)
        self.arrived(17 + 10)
        self.preempt(None, noticed=lambda: self.release(10))
        log = self.ends(process, 0)
        self.assertEqual(self.attempts(log), [1, 1, 2, 3])
        for text in ("attempt 1: no room for the slice", "attempt 3: started", "tiny: finished ("):
            self.assertIn(text, log)
        creates = [call for call in self.calls() if call["command"].endswith("create")]
        self.assertEqual(["--spot" in call["flags"] for call in creates], [True] * 4)
        self.assertEqual(self.changes().count("tpu-vm delete"), 1)
        starts = self.starts("tiny")
        self.assertEqual([start["commit"] for start in starts], [head] * 3)
        self.assertEqual([start["step"] for start in starts[:2]], [0, 14])
        self.assertTrue(23 <= starts[2]["step"] <= 27, starts)

        self.train("--run_name", "unbroken")
        (self.folder / "ours.pt").write_bytes(
            self.in_bucket("runs/tiny/checkpoints/checkpoint_step_60.pt")
        )
        contents = [
            load_checkpoint(path)
            for path in (
                self.folder / "ours.pt",
                self.shared / "runs" / "unbroken" / "checkpoints" / "checkpoint_step_60.pt",
            )
        ]
        for content in contents:
            for section in ("data", "logging", "device"):
                content["config"].pop(section)
        self.same_content(*contents)
        ours, theirs = (
            [
                {k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS}
                for line in text.splitlines()
            ]
            for text in (
                self.in_bucket("runs/tiny/metrics.jsonl"),
                (self.shared / "runs" / "unbroken" / "metrics.jsonl").read_bytes(),
            )
        )
        self.assertEqual(ours, theirs)

    def test_budget(self):
        begun = self.stand_in(ENDLESS, ENDLESS)
        process = self.begin_keeping("--max_attempts", "1")
        begun(1)
        self.preempt()
        log = self.ends(process, 1)
        self.assertEqual(self.attempts(log), [1])
        self.assertIn("the 1 attempts are spent", log)
        process = self.begin_keeping("--max_hours", "0.003")  # 11 s
        begun(2)
        self.assertIn(
            "the 0.003 hours are spent; run and slice are left as they are", self.ends(process, 1)
        )
        self.script("launch_experiment", "status", "tiny", status=3)

    def test_mistakes_and_stop(self):
        begun = self.stand_in("exit 2", ENDLESS)
        log = self.ends(self.begin_keeping(), 2)
        self.assertEqual(self.attempts(log), [1])
        self.assertIn("a mistake that another attempt would not mend", log)
        self.mistake(
            "keep_alive", "configs/tiny.yaml", "training.lr=fast", says=["training.lr = 'fast'"]
        )
        process = self.begin_keeping("--run_name", "tiny", "training.seed=1")
        begun(2)
        self.script("launch_experiment", "stop", "tiny", status=7)
        log = self.ends(process, 143)
        self.assertIn("stopped by its user: not started again", log)

    def test_a_run_that_crashes_at_once_waits_ever_longer(self):
        """To ten polls, and from one again after a run that was up for ten looks."""
        begun = self.stand_in(*["exit 1"] * 5, ENDLESS, "exit 1")
        process = self.begin(
            "keep_alive",
            "configs/tiny.yaml",
            "--poll",
            "0.1",
            "--max_attempts",
            "7",
            "--log_dir",
            str(self.folder / "log"),
        )
        begun(6)
        before = len(self.looks())
        self.wait_for(
            lambda: len(self.looks()) > before + 10
        )  # the first of them may have been answered before
        self.kill("tiny")
        log = self.ends(process, 1)
        self.assertEqual(self.attempts(log), [1, 2, 3, 4, 5, 6, 7])
        self.assertEqual(
            re.findall(
                r"failure (\d) in a row: the next attempt is in (\S+) s$", log, re.MULTILINE
            ),
            [("1", "0.1"), ("2", "0.2"), ("3", "0.4"), ("4", "0.8"), ("5", "1"), ("1", "0.1")],
        )
        self.assertIn("the 7 attempts are spent", log)

    def looks(self):
        return [
            call
            for call in self.calls()
            if "status tiny" in call["flags"].get("--command", "").replace("\\", "")
        ]

    def test_crash_then_silence(self):
        begun = self.stand_in(ENDLESS, ENDLESS)
        process = self.begin_keeping()
        begun(1)
        self.kill("tiny")
        begun(2)  # started again, on the same slice
        self.assertNotIn("tpu-vm delete", self.changes())
        self.refuse("describe", "offline", "unavailable")
        self.refused("describe")
        (self.cloud / "silent").write_text("2")  # not often enough
        self.wait_for(lambda: (self.cloud / "silent").read_text() == "0")
        self.wait_for(
            lambda: "running" in (self.folder / "log" / "tiny.log").read_text().splitlines()[-1]
        )
        self.assertNotIn("tpu-vm delete", self.changes())
        (self.cloud / "silent").write_text("99")
        log = self.ends(process, 2)
        self.assertEqual(self.attempts(log), [1, 2])
        for text in (
            "failed (hosts: status 137)",
            "failure 1 in a row: the next attempt is in 0.5 s",
            "unknown (gcloud gives no answer",
            f"unknown (the hosts of {NAME} do not answer, and Google calls it READY and HEALTHY)",
            f"look by: gcloud compute tpus tpu-vm ssh {NAME} --project=my-project-1 "
            "--zone=us-central2-b --quiet",
            f"{NAME} is READY and HEALTHY, and its hosts have not answered ten times: nothing is "
            "deleted",
            DELETE,
        ):
            self.assertIn(text, log)
        self.assertEqual(len(self.host_processes()) > 0, True)  # the run goes on
        self.assertEqual(
            [
                change
                for change in self.changes()
                if change != "tpu-vm scp" and not change.endswith("rsync")
            ],
            ["tpu-vm create"],
        )


if __name__ == "__main__":
    unittest.main()
