"""A whole day on a slice of two hosts: made, preempted without and with notice, one host vanishing,
finished, downloaded, deleted."""

import os
import re
import signal
import unittest
from unittest import mock

from tests.slice import NAME, SliceTest


class Rehearsal(SliceTest):
    def test_the_whole_day(self):
        two = ["configs/tiny.yaml", "tpu.accelerator_type=v4-16"]
        (self.cloud / "first_contact").write_text("2")
        log = [self.script("setup_tpu", *two, "--spot", "--poll", "0.5")]
        self.assertIn(f"{NAME} is ready", log[0])

        self.on_hosts["TRM_TEST_BEAT"] = "0.5"
        self.hold(10)
        with mock.patch.dict(
            os.environ, TRM_CONTACT_SECONDS="3"
        ):  # as long as a slice in TIMEOUT is waited for
            keeper = self.begin(
                "keep_alive",
                *two,
                "--spot",
                "--poll",
                "0.5",
                "--delete_when_done",
                "--log_dir",
                str(self.folder / "log"),
            )
        self.arrived(10)
        self.wait_for(
            lambda: (
                "checkpoint_step_7.json" in self.gcloud.listed(f"{self.url}/runs/tiny/checkpoints")
            )
        )
        self.preempt()  # without time for a checkpoint
        self.arrived(20)
        self.preempt("PREEMPTED", noticed=lambda: self.release(10))  # with it
        self.hold(15)
        self.arrived(35)
        # the second host is gone with its connections open; its worker, and the process that minds
        # it, answer nobody
        (self.host(1) / "vanished").touch()
        for pid, home in self.processes_by_host().items():
            if home == str(self.host(1)):
                os.kill(pid, signal.SIGSTOP)
        self.release(15)
        self.wait_for(lambda: (self.host(0) / "trm" / "runs" / "tiny" / "status").exists())
        self.assertEqual((self.host(0) / "trm" / "runs" / "tiny" / "status").read_text(), "1\n")
        lost = (self.host(0) / "trm" / "runs" / "tiny" / "log").read_text().splitlines()[-1]
        self.assertRegex(
            lost, r"^error: no sign of life for 5 s from worker 1 on \S+: gone, or stopped"
        )
        self.slice_state("READY TIMEOUT")
        output = keeper.ends(seconds=180)
        log += [
            lost,
            output,
            self.script("download_results", "tiny", "--to", str(self.folder / "results")),
            self.script("launch_experiment", "status", "tiny", "tpu.accelerator_type=v4-16"),
            self.script("delete_tpu", "--yes"),
        ]
        self.day = "\n".join(log)

        notes = [
            line.split(" UTC tiny: ")[1] for line in output.splitlines() if " UTC tiny: " in line
        ]
        story = [re.sub(r" \(.*", "", note) for note in notes if not note.startswith("commit")]
        self.assertEqual(story[-3:], ["finished", "finished", f"{NAME} is deleted"], output)
        self.assertEqual(
            [note for note in story if re.fullmatch(r"attempt \d+", note)],
            [f"attempt {n}" for n in (1, 2, 3, 4)],
            output,
        )
        self.assertEqual(self.changes().count("tpu-vm create"), 4)
        self.assertEqual(self.changes().count("tpu-vm delete"), 4)
        starts = [start["step"] for start in self.starts("tiny")]
        self.assertEqual((len(starts), starts[0], starts[1]), (4, 0, 7))
        self.assertGreater(
            starts[2], 14
        )  # the second one saved where it was, not only at multiples of 7
        self.assertIn('"step": 60', (self.folder / "results" / "tiny" / "eval.json").read_text())
        self.assertIn("nothing to delete", log[-1])

    def processes_by_host(self):
        """{pid: home of its host}."""
        found = {}
        for pid in self.host_processes():
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    found[pid] = dict(
                        entry.split("=", 1)
                        for entry in file.read().decode().split("\0")
                        if "=" in entry
                    )["HOME"]
            except OSError:
                pass  # ended meanwhile
        return found


if __name__ == "__main__":
    unittest.main()
