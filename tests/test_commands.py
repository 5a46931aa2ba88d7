"""The command as a user types it: what it prints, what it writes, and how it ends after each kind
of mistake."""

import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
import torch
import yaml

import trm_model
from checkpoint_manager import load_checkpoint
from collectives import Workers
from config import load_config
from data_loader_tpu import SudokuDatasetTPU
from device import Device
from evaluation import PER_PUZZLE_KEYS, SCORES, evaluate, unpack_solved
from initial_weights import initial_weights
from provenance import code_version
from tests.helpers import ROOT, CommandTest, FolderTest, random_pairs, run_command, write_split
from tests.processes import begin
from utils import STREAM_EVAL_SUBSET, random_stream


class Training(CommandTest):
    def test_says_what_it_will_do_and_writes_it_down(self):
        output = self.train("--run_name", "whole")
        for text in (
            "to step 60 of 60 (6 epochs of 80 puzzles), evaluation every 20",
            "device cpu, 1 worker(s), batch 8 (8 a worker)",
            "TFLOP/s",
            "step     60 of 60  loss",
            "evaluation: ",
            "step 60 of 60: finished",
            "checkpoint_step_60.pt",
        ):
            self.assertIn(text, output)
        run_dir = self.folder / "runs" / "whole"
        self.assertEqual(load_config(run_dir / "config.yaml"), load_config(self.config))
        for record in self.records("whole", timing=True):
            self.assertTrue(0 <= record["exact_accuracy"] <= record["cell_accuracy"] <= 1, record)
            self.assertGreater(record["wall_time"], 1.7e9)
            if record["split"] == "train":
                self.assertAlmostEqual(
                    record["loss"], record["lm_loss"] + 0.5 * record["q_halt_loss"], places=6
                )
                self.assertTrue(
                    record["examples_per_second"] > 0
                    and 0 < record["mfu"] < 1
                    and 1 <= record["mean_steps"] <= 3,
                    record,
                )

    def test_eval_json_counts_every_puzzle_of_each_rating_once(self):
        self.train("--run_name", "judged")
        content = json.loads((self.folder / "runs" / "judged" / "eval.json").read_text())
        self.assertEqual(
            [(r["weights"], r["split"], r["count"], r["step"]) for r in content["results"]],
            [("ema", "test", 50, 60), ("raw", "test", 50, 60)],
        )
        for result in content["results"]:
            self.assertEqual(sum(bucket["count"] for bucket in result["by_rating"]), 50)
            self.assertAlmostEqual(
                sum(b["count"] * b["exact_accuracy"] for b in result["by_rating"]),
                50 * result["exact_accuracy"],
                places=6,
            )
            self.assertEqual(len(result["exact_accuracy_by_step"]), 3)
            self.assertEqual(result["exact_accuracy_by_step"][-1], result["exact_accuracy"])
            self.assertAlmostEqual(
                unpack_solved(result["solved"], 50).mean(), result["exact_accuracy"]
            )
            self.assertEqual(
                result["dataset_sha256"], SudokuDatasetTPU(self.folder / "data", "test").fingerprint
            )
        self.assertTrue(
            all(key not in record for record in self.records("judged") for key in PER_PUZZLE_KEYS)
        )
        before = content["results"]
        for checkpoint in ("best", "latest", str(self.checkpoint("judged", 60))):
            (self.folder / "runs" / "judged" / "eval.json").unlink()
            self.train(
                "--run_name",
                "judged",
                "--eval_only",
                "--checkpoint",
                checkpoint,
                "evaluation.batch_size=7",
            )
            again = json.loads((self.folder / "runs" / "judged" / "eval.json").read_text())
            self.assertEqual([r["count"] for r in again["results"]], [50, 50])
            if checkpoint != "best":  # whatever the batch size
                self.assertEqual(
                    [(r["exact_accuracy"], r["solved"]) for r in again["results"]],
                    [(r["exact_accuracy"], r["solved"]) for r in before],
                )

    def test_validation_split_chooses_the_best_and_the_end_takes_all_of_test(self):
        self.train("--run_name", "chosen", "evaluation.split=val")
        looks = [
            (r["step"], r["split"], r["weights"], r["count"])
            for r in self.records("chosen")
            if r["split"] != "train"
        ]
        self.assertEqual(
            looks,
            [
                (20, "val", "ema", 10),
                (40, "val", "ema", 10),
                (60, "val", "ema", 10),
                (60, "test", "ema", 50),
                (60, "test", "raw", 50),
            ],
        )
        marker = json.loads(self.checkpoint("chosen", 60).with_suffix(".json").read_text())
        self.assertEqual(marker["metrics"]["split"], "val")

    def test_init_from_takes_weights_of_the_original_compiled_or_not(self):
        self.train("--run_name", "source", "--max_steps", "5")
        state = load_checkpoint(self.checkpoint("source", 5))["model"]
        weights = {name: tensor for name, tensor in state.items() if not name.endswith("_init")}
        for prefix in ("", "_orig_mod."):
            path = self.folder / f"weights{prefix}.pt"
            torch.save(
                {
                    prefix + name: torch.randn(tensor.shape) if name in weights else tensor
                    for name, tensor in state.items()
                }
                | {"step": torch.tensor(1)},
                path,
            )
            given = load_checkpoint(path)
            run_name = f"from{len(prefix)}"
            output = self.train(
                "--run_name",
                run_name,
                "--init_from",
                str(path),
                "--max_steps",
                "1",
                "training.lr_warmup_steps=1000000",
            )
            self.assertIn(f"initial weights: {path}", output)
            self.assertIn("left out: step has no place here", output)
            trained = load_checkpoint(self.checkpoint(run_name, 1))["model"]
            for name in weights:
                # a learning rate of 1e-8 moved them by no more
                if name != trm_model.CHECKPOINT_PREFIX + "puzzle_emb.weights":
                    torch.testing.assert_close(
                        trained[name], given[prefix + name], rtol=0, atol=1e-6, msg=name
                    )

    def test_init_from_a_checkpoint_takes_its_raw_weights(self):
        self.train("--run_name", "whole_checkpoint", "--max_steps", "5")
        path = self.checkpoint("whole_checkpoint", 5)
        dataset = SudokuDatasetTPU(self.folder / "data", "train")
        with contextlib.redirect_stdout(io.StringIO()):
            weights = initial_weights(load_config(self.config), dataset, str(path), Workers(0, 1))
        content = load_checkpoint(path)
        self.same_content(weights, content["model"])
        with self.assertRaises(AssertionError):
            self.same_content(weights, content["ema"])

    def test_eval_only_of_weights_alone(self):
        """As the original saves them: no configuration, no step, no average."""
        self.train("--run_name", "whole_one", "--max_steps", "5")
        torch.save(
            load_checkpoint(self.checkpoint("whole_one", 5))["model"],
            self.folder / "weights_only.pt",
        )
        self.assertIn(
            "step      -  test (raw weights, 50 puzzles)",
            self.train(
                "--run_name",
                "alone",
                "--eval_only",
                "--checkpoint",
                str(self.folder / "weights_only.pt"),
            ),
        )
        content = json.loads((self.folder / "runs" / "alone" / "eval.json").read_text())
        self.assertEqual(
            [(r["weights"], r["step"], r["count"]) for r in content["results"]], [("raw", None, 50)]
        )
        self.assertEqual(content["config"]["model"]["hidden_size"], 32)
        self.user_mistake(
            "--eval_only",
            "--checkpoint",
            str(self.folder / "weights_only.pt"),
            "logging.output_dir=/proc",
            says=["logging.output_dir = '/proc'"],
        )
        for name, saved in (("list.pt", [1, 2]), ("numbers.pt", {"a": 1})):
            torch.save(saved, self.folder / name)
            self.train(
                "--run_name",
                "alone",
                "--eval_only",
                "--checkpoint",
                str(self.folder / name),
                status=2,
            )

    def test_print_config_runs_nothing(self):
        output = self.train("--print_config", "training.lr=2e-4")
        self.assertEqual(yaml.safe_load(output)["training"]["lr"], 2e-4)
        for text in (
            "# total steps: 60",
            "# per-worker batch: 8",
            "# epochs: 6",
            "# parameters: ",
            "# evaluation every: 20 steps",
        ):
            self.assertIn(text, output)
        self.assertFalse((self.folder / "runs" / "tiny").exists())
        arguments = ["--config", "configs/e1_1.yaml", "--print_config"]
        output, status = run_command(arguments, os.environ.copy())
        self.assertEqual(status, 0, output)
        for text in (
            "# workers: 32",
            "# per-worker batch: 24",
            "# parameters: 5028866",
            "# total steps: 65104",
        ):
            self.assertIn(text, output)

    def test_a_bar_on_a_terminal(self):
        command = [sys.executable, "train_tpu.py", "--config", self.config]
        process = begin(self, [*command, "--run_name", "terminal"], terminal=True)
        shown = process.ends()
        self.assertIn("| 60/60 [", shown)
        self.assertIn("step     60 of 60  loss", shown)


class PerPuzzle(FolderTest):
    def test_solved_stands_in_the_order_of_the_dataset(self):
        """With a model that solves the puzzles with an even number of clues at the second step."""
        inputs, labels = random_pairs(4, 50)
        write_split(self.folder / "test", inputs, labels)
        dataset = SudokuDatasetTPU(self.folder, "test")

        def forward(model, carry, batch):
            solved = (
                ((batch["inputs"] > 1).sum(1) % 2 == 0)
                if next(step) == 2
                else torch.zeros(len(carry), dtype=torch.bool)
            )
            return carry, solved.float().expand(len(SCORES) + 1, -1)  # and the halting logit

        step = itertools.cycle((1, 2))
        model = mock.Mock(config=mock.Mock(halt_max_steps=2), empty_carry=torch.zeros)
        expected = (inputs > 1).sum(1) % 2 == 0
        self.assertTrue(10 < expected.sum() < 40)
        for batch_size in (7, 50, 64):
            result = evaluate(model, dataset, Device("cpu"), batch_size, forward)
            self.assertEqual(unpack_solved(result["solved"], 50).tolist(), expected.tolist())
        chosen = np.sort(random_stream(0, STREAM_EVAL_SUBSET, 0).permutation(50)[:20])
        result = evaluate(model, dataset, Device("cpu"), 7, forward, 20)
        self.assertEqual(unpack_solved(result["solved"], 20).tolist(), expected[chosen].tolist())
        with self.assertRaises(ValueError):
            unpack_solved(result["solved"], 50)


class CodeVersion(FolderTest):
    def test_from_git_the_environment_or_the_file(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("TRM_COMMIT", None)
            self.assertEqual(code_version(self.folder), (None, None))
            (self.folder / "COMMIT").write_text("abc123\n")
            self.assertEqual(code_version(self.folder), ("abc123", False))
            os.environ["TRM_COMMIT"] = "def456-dirty"
            self.assertEqual(code_version(self.folder), ("def456", True))
            git = ["git", "-C", str(self.folder), "-c", "user.name=a", "-c", "user.email=a@b"]
            for command in (
                ["init", "-q"],
                ["add", "."],
                ["commit", "-qm", "first"],
                ["tag", "-am", "v1", "v1"],
            ):
                subprocess.run([*git, *command], check=True)
            head = subprocess.run(
                [*git, "rev-parse", "HEAD"], check=True, text=True, capture_output=True
            ).stdout.strip()
            self.assertEqual(code_version(self.folder), (head, False))
            (self.folder / "COMMIT").write_text("changed")
            self.assertEqual(code_version(self.folder), (head, True))
            os.environ["PATH"] = ""  # no git here: what the launcher says
            self.assertEqual(code_version(self.folder), ("def456", True))


class Mistakes(CommandTest):
    def user_mistakes(self, cases):
        """user_mistake for each of [(arguments, says)]."""
        for args, says in cases:
            with self.subTest(args=args):
                self.user_mistake(*args, says=says)

    def test_configuration_and_flags(self):
        self.user_mistakes(
            [
                (
                    ["training.learning_rate=1"],
                    ["training.learning_rate", "did you mean training."],
                ),
                (["training.lr=fast"], ["training.lr = 'fast'", "finite number"]),
                (["training.lr="], ["training.lr = None", "finite number"]),
                (["training.lr=[1"], ["command line: not valid YAML"]),
                (["training.lr"], ["'training.lr'", "section.key=value"]),
                (["model.pos_encodings=rotary"], ["model.pos_encodings", "none, learned, rope"]),
                (["--max_steps", "0"], ["--max_steps 0", ">= 1"]),
                (["--run_name", "a/b"], ["--run_name 'a/b'", "one folder name"]),
                (["--run_name", ".."], ["--run_name '..'", "one folder name"]),
                (["--run_name", ""], ["--run_name ''", "one folder name"]),
                (["--checkpoint", "best"], ["--eval_only"]),
                (
                    ["--eval_only", "--checkpoint", ""],
                    ["--checkpoint ''", "must name a checkpoint"],
                ),
                (["--init_from", "x", "--eval_only"], ["--checkpoint"]),
                (["--init_from", ""], ["--init_from ''", "must name a checkpoint"]),
                (["training.epochs=0.01"], ["no full batch of 8"]),
                (["data.expected_puzzles=1000"], ["has 80 training puzzles"]),
            ]
        )
        self.assertFalse((self.folder / "runs" / "tiny").exists())

    def test_places_that_can_hold_no_run(self):
        file, taken, long = self.folder / "file", self.folder / "taken", "a" * 256
        taken.mkdir()
        (taken / "run").mkdir()
        for path in (file, taken / "tiny", taken / "run" / "checkpoints"):
            path.touch()
        self.user_mistakes(
            [
                (
                    [f"logging.output_dir={file}"],
                    [f"{file}/tiny: {file} is no folder", "logging.output_dir"],
                ),
                ([f"logging.output_dir={file}/deeper"], [f"{file} is no folder"]),
                ([f"logging.output_dir={taken}"], [f"{taken}/tiny is no folder"]),
                (
                    [f"logging.output_dir={taken}", "--run_name", "run"],
                    [f"{taken}/run/checkpoints is no folder"],
                ),
                ([f"logging.output_dir={file}", "--eval_only"], [f"{file} is no folder"]),
                (
                    ["logging.output_dir=/proc"],
                    [
                        "logging.output_dir = '/proc': no run can be written there",
                        "/proc/tiny",
                        "another folder",
                    ],
                ),
                (
                    ["--run_name", long],
                    [f"logging.output_dir = '{self.folder}/runs'", "File name too long"],
                ),
            ]
        )

    def test_missing_configuration(self):
        for name in ("configs/e1_11.yaml", "e1_1"):
            output, status = run_command(["--config", name], os.environ.copy())
            self.assertEqual(status, 2, output)
            self.assertIn("did you mean configs/e1_1.yaml?", output)

    def test_missing_packages(self):
        """Without the environment (python -S has no installed packages): one line, no traceback."""
        for script in (
            "train_tpu.py",
            "analysis/solve.py",
            "analysis/benchmark.py",
            "analysis/report.py",
            "scripts/build_sudoku_dataset.py",
        ):
            command = [sys.executable, "-S", script, "--help"]
            done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
            self.assertEqual((done.returncode, done.stdout), (2, ""), script)
            self.assertRegex(
                done.stderr, r"\Aerror: numpy, yaml not installed for .*/bin/activate.*\n\Z"
            )

    def test_an_abbreviated_flag_is_refused(self):
        self.assertIn("unrecognized arguments: --max_step", self.train("--max_step", "4", status=2))

    def test_datasets(self):
        self.user_mistake(
            f"data.dataset_path={self.folder / 'nowhere'}",
            says=["there is no train split", "build_sudoku_dataset.py"],
        )
        damaged = self.folder / "damaged"
        shutil.copytree(self.folder / "data", damaged)
        file = damaged / "test" / "all__labels.npy"
        file.write_bytes(file.read_bytes()[:200])
        self.user_mistake(
            f"data.dataset_path={damaged}", says=[str(damaged), "split test", "is damaged"]
        )
        self.assertFalse((self.folder / "runs" / "tiny").exists())

    def test_checkpoints_of_another_model_and_none_at_all(self):
        self.user_mistake(
            "--eval_only", says=["--checkpoint latest: there is no such checkpoint", "train first"]
        )
        self.user_mistake(
            "--eval_only",
            "--checkpoint",
            "nowhere.pt",
            says=["nowhere.pt: there is no such checkpoint"],
        )
        self.train("--run_name", "mine", "--max_steps", "1")
        file = str(self.checkpoint("mine", 1))
        wider = ("model.hidden_size=64", "model.puzzle_emb_ndim=64")
        self.user_mistake(
            "--run_name",
            "other",
            "--init_from",
            file,
            *wider,
            says=["do not fit the model", "lm_head.weight is [6, 32], here [6, 64]"],
        )
        # of the same shapes, and yet another model
        for change in ("model.hidden_size=64", "model.H_cycles=3", "model.halt_max_steps=4"):
            key, value = change.split("=")
            self.user_mistake(
                "--run_name",
                "mine",
                "--eval_only",
                change,
                says=["was trained with another model", f"{key} ", f" -> {value}"],
            )
        self.assertFalse((self.folder / "runs" / "other").exists())

    def test_a_loss_that_is_not_finite_ends_the_run(self):
        output = self.user_mistake(
            "--run_name",
            "nan",
            driver=("tests/programs/nan_weights.py", "12"),
            says=["step 12:", "not finite", "checkpoint_step_7.pt", "training.lr"],
        )
        self.assertNotIn("finished", output)
        self.assertTrue(all(r["step"] <= 10 for r in self.records("nan")))
        self.assertEqual(
            sorted(p.name for p in self.checkpoint("nan", 7).parent.iterdir()),
            ["checkpoint_step_7.json", "checkpoint_step_7.pt"],
        )

    def test_no_space_for_a_checkpoint(self):
        """A limit on the size of files has the same effect as a full disk: the write fails."""
        output = self.user_mistake(
            "--run_name",
            "full",
            says=["checkpoint_step_7.pt: the checkpoint could not be written", "free some space"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        )
        self.assertIn("there is no checkpoint yet", output)
        self.assertEqual(list(self.checkpoint("full", 7).parent.iterdir()), [])
        self.assertIn("begins: to step 60", self.train("--run_name", "full"))

    def test_devices_that_are_not_here(self):
        if not torch.cuda.is_available():
            self.user_mistake("device=cuda", says=["device = 'cuda'", "use device=cpu"])
        driver = ("tests/programs/without_xla.py",)
        self.user_mistake(
            "device=xla_cpu",
            driver=driver,
            says=["device = 'xla_cpu'", "torch_xla is not installed"],
        )
        self.assertIn(
            "device cpu",
            self.train(
                "--run_name",
                "without_xla",
                "--max_steps",
                "1",
                "device=auto" if not torch.cuda.is_available() else "device=cpu",
                driver=driver,
            ),
        )


if __name__ == "__main__":
    unittest.main()
