"""Several workers: the same training at any number of them, one evaluation of every puzzle, and
clear ends."""

import contextlib
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from checkpoint_manager import load_checkpoint
from tests.helpers import CommandTest
from tests.processes import run
from workers import _wait

FLOAT32 = (
    "model.forward_dtype=float32",
    "logging.interval_steps=1",
    "checkpoint.interval_steps=1",
    "checkpoint.keep_last_n=99",
)


class WorkersTest(CommandTest):
    def grads(self, run_name, *flags):
        """Summed gradients of the steps of a run in which every worker records."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        driver = ("tests/programs/records_gradients.py", folder)
        self.train("--run_name", run_name, *FLOAT32, *flags, driver=driver)
        return [
            torch.cat([g.flatten() for g in torch.load(folder / f"grad{k + 1}.pt")])
            for k in range(len(list(folder.iterdir())))
        ]

    def torchrun(self, run_name, workers, *flags, status=0):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}"]
        command += ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
        command += ["train_tpu.py", "--config", self.config, "--run_name", run_name, *flags]
        return run(self, command, status)

    def resumed_from(self, run_name, source, step):
        """A run whose only checkpoint is that of another."""
        folder = self.checkpoint(run_name, step).parent
        folder.mkdir(parents=True)
        for end in (".pt", ".json"):
            (folder / f"checkpoint_step_{step}{end}").write_bytes(
                self.checkpoint(source, step).with_suffix(end).read_bytes()
            )


class SameTraining(WorkersTest):
    def test_gradients_of_the_first_and_of_a_later_step_from_the_same_state(self):
        whole = self.grads("one", "--max_steps", "6")
        self.assertEqual(len(whole), 6)
        for workers in (2, 4, 8):
            first = self.grads(
                f"first{workers}", "--max_steps", "1", f"training.num_workers={workers}"
            )
            self.resumed_from(f"from5_{workers}", "one", 5)
            later = self.grads(
                f"from5_{workers}", "--max_steps", "6", f"training.num_workers={workers}"
            )
            self.assertEqual((len(first), len(later)), (1, 1))
            for ours, theirs in ((whole[0], first[0]), (whole[5], later[0])):
                self.assertGreater(ours.abs().max().item(), 1e-3)
                self.assertLessEqual(
                    (ours - theirs).abs().max().item(), 1e-6 * max(1, ours.abs().max().item())
                )

    def test_fifty_steps_stay_together(self):
        """As far as the order of float sums allows: AdamATan2's first updates hang on the signs of
        gradients near zero."""
        records, changes = {}, {}
        for workers in (1, 2, 4, 8):
            name = f"long{workers}"
            self.train(
                "--run_name",
                name,
                *FLOAT32,
                "--max_steps",
                "50",
                f"training.num_workers={workers}",
                "training.lr=1e-3",
            )
            records[workers] = {r["step"]: r for r in self.records(name) if r["split"] == "train"}
            ends = [load_checkpoint(self.checkpoint(name, step))["model"] for step in (1, 50)]
            changes[workers] = torch.cat(
                [(ends[1][key] - ends[0][key]).flatten() for key in ends[0]]
            )
        for workers in (2, 4, 8):
            for step, record in records[1].items():
                self.assertAlmostEqual(
                    records[workers][step]["loss"],
                    record["loss"],
                    delta=0.01 * record["loss"],
                    msg=f"{workers} workers, step {step}",
                )
            self.assertGreater(
                torch.cosine_similarity(changes[1], changes[workers], dim=0).item(), 0.99, workers
            )

    def test_a_checkpoint_of_any_number_goes_on_at_any_other(self):
        flags = (*FLOAT32, "evaluation.max_examples=50")
        self.train("--run_name", "straight", *flags, "--max_steps", "24")
        self.train("--run_name", "changing", *flags, "--max_steps", "8", "training.num_workers=4")
        for workers, last in ((8, 12), (1, 16), (2, 24)):
            output = self.train(
                "--run_name",
                "changing",
                *flags,
                "--max_steps",
                str(last),
                f"training.num_workers={workers}",
            )
            self.assertIn(
                f"device cpu, {workers} worker(s), batch 8 ({8 // workers} a worker)", output
            )
        ours, theirs = (
            load_checkpoint(self.checkpoint(name, 24)) for name in ("straight", "changing")
        )
        for name in ("steps", "halted", "inputs", "labels", "puzzle_identifiers"):
            self.assertTrue(torch.equal(ours["carry"][name], theirs["carry"][name]), name)
        self.assertEqual(ours["loader"], theirs["loader"])
        for one, other in zip(self.records("straight"), self.records("changing"), strict=True):
            self.assertEqual(
                (one["step"], one["split"], one["count"]),
                (other["step"], other["split"], other["count"]),
            )
            if one["split"] == "train":
                self.assertAlmostEqual(one["loss"], other["loss"], delta=0.01 * one["loss"])

    def test_both_ways_to_keep_the_average_give_the_same(self):
        flags = ("--max_steps", "40", "training.num_workers=2")
        for strategy in ("every_worker", "rank0"):
            self.train("--run_name", strategy, *flags, f"training.ema_strategy={strategy}")
        states = [
            load_checkpoint(self.checkpoint(strategy, 40)) for strategy in ("every_worker", "rank0")
        ]
        (
            states[0]["config"]["training"].pop("ema_strategy"),
            states[1]["config"]["training"].pop("ema_strategy"),
        )
        self.same_content(*states)
        self.assertEqual(self.records("every_worker"), self.records("rank0"))
        self.assertEqual(
            [r["step"] for r in self.records("rank0") if r["split"] == "test"], [20, 40]
        )

    def test_evaluation_takes_every_puzzle_once_at_any_number(self):
        self.train("--run_name", "judged", "--max_steps", "10", "model.forward_dtype=float32")
        results = {}
        for workers in (1, 3, 8):
            # 50 puzzles: 7 a worker on eight, of which the last has one; batches of 4
            self.train(
                "--run_name",
                "judged",
                "--eval_only",
                f"training.num_workers={workers}",
                "evaluation.batch_size=4",
                "training.global_batch_size=24",
                "model.forward_dtype=float32",
            )
            results[workers] = json.loads(
                (self.folder / "runs" / "judged" / "eval.json").read_text()
            )["results"]
            for result in results[workers]:
                self.assertEqual(result["count"], 50)
                self.assertEqual(sum(bucket["count"] for bucket in result["by_rating"]), 50)
        for workers in (3, 8):
            for one, other in zip(results[1], results[workers], strict=True):
                for key in ("exact_accuracy", "cell_accuracy", "q_halt_accuracy", "lm_loss"):
                    self.assertAlmostEqual(one[key], other[key], delta=1e-6, msg=key)

    def test_under_torchrun(self):
        self.torchrun("torchrun", 2, "--max_steps", 10)
        self.train("--run_name", "spawned", "--max_steps", "10", "training.num_workers=2")
        ours, theirs = (
            load_checkpoint(self.checkpoint(name, 10)) for name in ("torchrun", "spawned")
        )
        ours["config"]["training"]["num_workers"] = 2
        self.same_content(ours, theirs)


class Statuses(unittest.TestCase):
    def test_the_first_that_is_not_0_counts(self):
        class Ended:
            def __init__(self, status):
                self.sentinel, self.status, self.exitcode = self, status, None

            def join(self):
                self.exitcode = self.status

            def is_alive(self):
                return False

        for statuses, expected in (
            ((0, 0, 0), 0),
            ((0, 3, 1), 3),
            ((3, 4, 0), 3),
            ((143, 1, 1), 143),
            ((-9, 143, 0), 1),
        ):
            processes = [Ended(status) for status in statuses]
            ends = [[process] for process in processes]
            with (
                mock.patch("multiprocessing.connection.wait", side_effect=ends),
                contextlib.redirect_stderr(io.StringIO()),
                self.subTest(statuses),
            ):
                self.assertEqual(_wait(processes), expected)


class Mistakes(WorkersTest):
    def test_said_once(self):
        """By the parent, or by rank 0 where it comes to light in the workers."""
        self.user_mistake(
            "training.num_workers=3",
            says=["training.global_batch_size = 8", "divisible by workers"],
        )
        self.user_mistake(
            "training.num_workers=2",
            f"data.dataset_path={self.folder / 'nowhere'}",
            says=["there is no train split"],
        )
        self.train("--run_name", "fixed", "--max_steps", "1", "training.num_workers=2")
        self.user_mistake(
            "--run_name",
            "fixed",
            "training.num_workers=2",
            "training.lr=0.5",
            says=["training.lr 0.01 -> 0.5"],
        )

    def test_torchrun_with_a_number_that_does_not_fit(self):
        self.assertIn(
            "training.global_batch_size = 8: must be divisible by workers x "
            "training.grad_accumulation_steps = 3 x 1",
            self.torchrun("three", 3, status=1),
        )


if __name__ == "__main__":
    unittest.main()
