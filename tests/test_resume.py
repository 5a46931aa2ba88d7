"""Runs that are killed and started again: nothing is lost but time, and the training is the same
bit by bit."""

import importlib.metadata
import json
import shutil
import signal
import sys
import unittest

import torch

from checkpoint_manager import load_checkpoint
from data_loader_tpu import SudokuDatasetTPU
from provenance import code_version
from tests.helpers import CommandTest
from tests.processes import begin, run

KILLS_ITSELF = "tests/programs/kills_itself.py"


class ResumeTest(CommandTest):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls().train("--run_name", "unbroken")
        cls.last = load_checkpoint(cls().checkpoint("unbroken", 60))

    def same_as_unbroken(self, run_name):
        self.same_content(load_checkpoint(self.checkpoint(run_name, 60)), self.last)
        self.assertEqual(self.records(run_name), self.records("unbroken"))
        markers = [
            json.loads(self.checkpoint(name, 60).with_suffix(".json").read_text())["metrics"]
            for name in (run_name, "unbroken")
        ]
        self.assertEqual(*markers)

    def test_unbroken_run_records_every_step_once(self):
        records = self.records("unbroken")
        self.assertEqual(
            [r["step"] for r in records if r["split"] == "train"], list(range(5, 61, 5))
        )
        self.assertAlmostEqual(records[0]["lr"], 0.005)  # half of the warmup
        self.assertEqual(
            [(r["step"], r["weights"], r["count"]) for r in records if r["split"] == "test"],
            [(20, "ema", 20), (40, "ema", 20), (60, "ema", 20), (60, "ema", 50), (60, "raw", 50)],
        )

    def test_killed_at_every_kind_of_moment(self):
        moments = [
            ("step", 1),
            ("half a payload", 1),
            ("step", 9),
            ("half a record", 3),
            ("between payload and marker", 2),
            ("in evaluation", 1),
            ("half a payload", 2),
            ("step", 17),
            ("in evaluation", 3),
            ("before the final evaluation counts", 1),
        ]
        for point, count in moments:
            output = self.train(
                "--run_name",
                "killed",
                status=-signal.SIGKILL,
                driver=(KILLS_ITSELF, point, str(count)),
            )
            self.assertNotIn("Traceback", output, point)
        self.train("--run_name", "killed")
        self.same_as_unbroken("killed")

    def test_every_start_is_noted(self):
        self.train("--run_name", "noted", "--max_steps", "20")
        # of step 28's checkpoint: that of step 21 is whole
        driver = (KILLS_ITSELF, "between payload and marker", "2")
        self.train("--run_name", "noted", status=-signal.SIGKILL, driver=driver)
        self.train("--run_name", "noted", "training.num_workers=2", "--max_steps", "30")
        self.train("--run_name", "noted", "--max_steps", "30")  # has nothing to do
        self.train(
            "--run_name",
            "from",
            "--init_from",
            str(self.checkpoint("noted", 30)),
            "--max_steps",
            "1",
        )
        file = str(self.checkpoint("noted", 30))
        self.user_mistake("--run_name", "from", "--init_from", file, says=["has begun already"])
        starts, (other,) = (
            [
                json.loads(line)
                for line in (self.folder / "runs" / name / "starts.jsonl").read_text().splitlines()
            ]
            for name in ("noted", "from")
        )
        self.assertEqual([(s["step"], s["world_size"]) for s in starts], [(0, 1), (20, 1), (21, 2)])
        self.assertEqual(starts[0]["train_seconds"], 0)
        self.assertEqual(
            starts[1]["train_seconds"],
            [r for r in self.records("noted", timing=True) if r["step"] == 20][0]["train_seconds"],
        )
        self.assertEqual(
            (starts[0]["init_from"], other["init_from"]), (None, str(self.checkpoint("noted", 30)))
        )
        for start in starts:
            self.assertEqual(
                (start["config_file"], start["device"], start["accelerator_type"]),
                (str(self.config), "cpu", None),
            )
            self.assertEqual(
                [start["torch"], start["numpy"]],
                [importlib.metadata.version(name) for name in ("torch", "numpy")],
            )
            self.assertIn("--run_name noted", start["command"])
            self.assertEqual((start["commit"], start["dirty"]), code_version())
            self.assertEqual(
                start["datasets"],
                {
                    split: {
                        "puzzles": count,
                        "sha256": SudokuDatasetTPU(self.folder / "data", split).fingerprint,
                    }
                    for split, count in (("train", 80), ("test", 50))
                },
            )
            self.assertTrue(
                start["hostname"]
                and start["device_model"]
                and start["wall_time"] > 1.7e9
                and start["parameters"] > 1000
            )

    def test_killed_from_outside(self):
        """By SIGKILL from another process, each time soon after so many records are there."""
        metrics = self.folder / "runs" / "outside" / "metrics.jsonl"
        for lines in (1, 6, 11):
            command = [sys.executable, "train_tpu.py", "--config", self.config]
            process = begin(self, [*command, "--run_name", "outside"])
            process.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= lines)
            process.kill()
            process.ends(-signal.SIGKILL)
        self.train("--run_name", "outside")
        self.same_as_unbroken("outside")

    def test_damaged_newest_checkpoint_is_passed_over(self):
        for name, ignored, damage in (
            ("cut", "checkpoint_step_35.json", lambda content: content[: len(content) // 2]),
            (
                "flipped",
                "checkpoint_step_35.pt",
                lambda content: (
                    content[:5000] + bytes(b ^ 255 for b in content[5000:5100]) + content[5100:]
                ),
            ),
        ):
            self.train("--run_name", name, "--max_steps", "35")
            newest = self.checkpoint(name, 35)
            newest.write_bytes(damage(newest.read_bytes()))
            output = self.train("--run_name", name)
            self.assertRegex(output, f"warning: .*{ignored} is ignored")
            self.assertIn("goes on after step 28", output)
            self.same_as_unbroken(name)

    def test_max_steps_then_on_and_finished(self):
        self.assertIn(
            "stopped by --max_steps", self.train("--run_name", "short", "--max_steps", "23")
        )
        self.assertTrue(self.checkpoint("short", 23).with_suffix(".json").exists())
        self.train("--run_name", "short")
        # a record is due at the last step, so step 23 has one of its own and the interval after it
        # is shorter
        self.same_content(load_checkpoint(self.checkpoint("short", 60)), self.last)
        self.assertEqual(
            [r["step"] for r in self.records("short") if r["split"] == "train"],
            [5, 10, 15, 20, 23, *range(25, 61, 5)],
        )
        before = {
            p: p.stat().st_mtime_ns
            for p in (self.folder / "runs" / "short").rglob("*")
            if p.is_file()
        }
        self.assertIn("has done step 60 of 60 already", self.train("--run_name", "short"))
        self.assertEqual(
            {
                p: p.stat().st_mtime_ns
                for p in (self.folder / "runs" / "short").rglob("*")
                if p.is_file()
            },
            before,
        )

    def test_another_training_does_not_resume(self):
        self.train("--run_name", "fixed", "--max_steps", "2")
        self.user_mistake(
            "--run_name", "fixed", "training.lr=0.5", says=["training.lr 0.01 -> 0.5", "--run_name"]
        )
        for change, says in (
            ("model.L_layers=1", "model.L_layers 2 -> 1"),
            ("data.augment=false", "data.augment True -> False"),
            ("training.seed=1", "training.seed 0 -> 1"),
        ):
            self.user_mistake("--run_name", "fixed", change, says=[says])
        shutil.copytree(self.folder / "data", self.folder / "moved", dirs_exist_ok=True)
        self.train(
            "--run_name",
            "fixed",
            "--max_steps",
            "4",
            "logging.interval_steps=1",
            "evaluation.batch_size=5",
            "checkpoint.keep_last_n=1",
            f"data.dataset_path={self.folder / 'moved'}",
        )
        command = [sys.executable, "scripts/build_sudoku_dataset.py", "--generate", "--size", 4]
        command += ["--num_train", 90, "--num_test", 50, "--seed", 1]
        run(self, [*command, "--output_dir", self.folder / "other"])
        self.user_mistake(
            "--run_name",
            "fixed",
            f"data.dataset_path={self.folder / 'other'}",
            says=["not those this run began with"],
        )

    def test_activation_checkpointing_is_switched_on_the_way(self):
        self.train(
            "--run_name", "switched", "--max_steps", "30", "model.activation_checkpointing=true"
        )
        self.train("--run_name", "switched")
        self.same_as_unbroken("switched")

    def test_best_and_last_n_are_kept(self):
        markers = sorted(
            (self.folder / "runs" / "unbroken" / "checkpoints").glob("*.json"),
            key=lambda p: int(p.stem.split("_")[-1]),
        )
        content = [json.loads(p.read_text()) for p in markers]
        self.assertEqual([m["step"] for m in content][-3:], [49, 56, 60])
        scored = {
            r["step"]: r["exact_accuracy"]
            for r in self.records("unbroken")
            if r["split"] == "test" and r["count"] == 20
        }
        best = max(scored, key=lambda step: (scored[step], step))
        self.assertIn(best, [m["step"] for m in content])
        self.assertLessEqual(len(content), 4)
        self.assertTrue(all(torch.isfinite(t).all() for t in self.last["model"].values()))


if __name__ == "__main__":
    unittest.main()
