"""What phases 3 and 4 of the study add: a curriculum, the weights of the loss, fixed augmentations,
nested subsets, early stop and averages of checkpoints."""

import dataclasses
import json
import signal
import sys
import unittest

import numpy as np
import torch

import trm_model
from checkpoint_manager import load_checkpoint
from config import config_from_dict, config_yaml, load_config
from data_loader_tpu import SudokuDatasetTPU
from evaluation import THRESHOLDS, early_stop
from schedule import stages
from tests.helpers import CommandTest, FolderTest, write_config
from tests.processes import begin
from tests.test_model import admitted, no_minimum, small_model
from train_state import create_model
from trm_model import Cycles, Objective, act_step

STAGES = (
    "[{begin: 0, H_cycles: 1, L_cycles: 1}, {begin: 0.3, H_cycles: 1, L_cycles: 2}, "
    "{begin: 0.6, H_cycles: 2, L_cycles: 1}]"
)
CURRICULUM = f"training.curriculum={STAGES}"  # of the tiny configuration, in which T 2, n 1
EVERYTHING = (
    CURRICULUM,
    "training.step_loss_decay=0.7",
    "training.ponder_cost=0.1",
    "data.augmentations=3",
)


class Curriculum(FolderTest):
    def load(self, stages, *overrides):
        text = "data: {dataset_path: nowhere}\nmodel: {H_cycles: 2, L_cycles: 1}\n"
        path = write_config(self.folder / "curriculum.yaml", text)
        return load_config(path, [f"training.curriculum={stages}", *overrides])

    def test_stages_and_their_steps(self):
        config = self.load(STAGES)
        self.assertEqual(
            [(begin, stage.H_cycles, stage.L_cycles) for begin, stage in stages(config, 65_104)],
            [(0, 1, 1), (19_531, 1, 2), (39_062, 2, 1)],
        )
        plain = self.load("null")
        ((begin, whole),) = stages(plain, 10)
        self.assertEqual((begin, whole.H_cycles, whole.L_cycles), (0, 2, 1))
        written = write_config(self.folder / "written.yaml", config_yaml(config))
        self.assertEqual(load_config(written), config)
        saved = dataclasses.asdict(config)  # as in a checkpoint
        self.assertEqual(config_from_dict(saved, "a checkpoint"), config)
        self.user_error(lambda: stages(config, 1), "training.curriculum", "one has no step")

    def test_mistakes(self):
        for given, *says in (
            ("[{begin: 0.1, H_cycles: 2, L_cycles: 1}]", "begins at 0.1", "must begin at 0"),
            ("[{begin: 0, H_cycles: 1, L_cycles: 1}]", "the last stage", "the model, 2 and 1"),
            (
                "[{begin: 0, H_cycles: 1, L_cycles: 1}, {begin: 0, H_cycles: 2, L_cycles: 1}]",
                "each stage must begin after the one before",
            ),
            ("[{begin: 0, H_cycles: 2}]", "training.curriculum[0]", "begin, H_cycles, L_cycles"),
            ("[{begin: 0, H_cycles: 2, L_cycles: 1, T: 3}]", "and no others"),
            ("[{begin: 0, H_cycles: 0, L_cycles: 1}]", "training.curriculum[0].H_cycles = 0: must"),
            ("[{begin: 1.0, H_cycles: 2, L_cycles: 1}]", "[0].begin = 1.0: must be < 1"),
            ("[]", "must be null, or a list"),
            ("3", "training.curriculum = 3", "a list of {begin, H_cycles, L_cycles}"),
        ):
            with self.subTest(given):
                self.user_error(lambda: self.load(given), "command line: ", *says)


class Loss(unittest.TestCase):
    def step(self, objective, mlp_t=True):
        model = small_model(mlp_t=mlp_t)
        carry = admitted(model)._replace(steps=torch.arange(8, dtype=torch.int32) % 4)
        with torch.no_grad():
            model.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        loss, metrics, _ = act_step(
            model, carry, model.puzzle_rows(carry), no_minimum(carry), objective
        )
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        return model, carry, loss.detach(), metrics, gradients

    def test_off_is_the_base_bit_for_bit(self):
        model, *_ = self.step(trm_model.PAPER_OBJECTIVE)
        for objective in (Objective(model.cycles), Objective(model.cycles, 1.0, 0.0)):
            _, _, *base = self.step(trm_model.PAPER_OBJECTIVE)
            _, _, *given = self.step(objective)
            for ours, theirs in zip(base[:2], given[:2], strict=True):
                self.assertTrue(torch.equal(ours, theirs))
            for ours, theirs in zip(base[2], given[2], strict=True):
                self.assertTrue(torch.equal(ours, theirs))

    def test_step_loss_decay_weighs_the_cell_loss_of_each_supervision_step(self):
        model, carry, base, plain, _ = self.step(trm_model.PAPER_OBJECTIVE)
        _, _, loss, metrics, _ = self.step(Objective(step_loss_decay=0.7))
        self.assertTrue(torch.equal(metrics, plain))  # reported without weights
        with torch.no_grad():
            logits = model.supervision_step(carry, model.puzzle_rows(carry))[2]
        cells = trm_model.stablemax_loss(logits, carry.labels)
        weights = torch.tensor([1, 0.7, 0.49, 0.343] * 2, dtype=cells.dtype)
        expected = base - cells.sum() + (weights * cells).sum()
        self.assertAlmostEqual(loss.item(), expected.item(), places=5)

    def test_ponder_cost_is_the_price_of_a_further_step(self):
        model, carry, base, plain, base_gradients = self.step(trm_model.PAPER_OBJECTIVE)
        _, _, loss, metrics, gradients = self.step(Objective(ponder_cost=0.25))
        self.assertTrue(torch.equal(metrics, plain))
        with torch.no_grad():
            q_halt = model.supervision_step(carry, model.puzzle_rows(carry))[3]
        further = 1 - torch.sigmoid(q_halt)
        self.assertAlmostEqual((loss - base).item(), 0.25 * further.sum().item(), places=5)
        # the derivative by the bias of the halting logit: -(1 - s) s, summed over the slots
        names = [name for name, _ in model.named_parameters()]
        place = names.index("q_head.bias")
        change = (gradients[place] - base_gradients[place])[0].item()
        self.assertAlmostEqual(change, -0.25 * (further * (1 - further)).sum().item(), places=5)

    def test_a_stage_has_its_own_recursion(self):
        shallow, deep = small_model(H_cycles=1, L_cycles=2), small_model()
        deep.load_state_dict(shallow.state_dict())
        carry = admitted(shallow)
        with torch.no_grad():
            rows = shallow.puzzle_rows(carry)
            ours = deep.supervision_step(carry, rows, Cycles(1, 2))
            for one, other in zip(ours, shallow.supervision_step(carry, rows), strict=True):
                self.assertTrue(torch.equal(one, other))
        self.assertEqual(
            trm_model.step_flops_per_example(deep, True, Cycles(1, 2)),
            trm_model.step_flops_per_example(shallow, True),
        )


class EarlyStop(unittest.TestCase):
    def test_the_first_sure_step_counts(self):
        sure, unsure = 9.0, -9.0
        logits = np.array([[sure, unsure, unsure], [unsure, sure, unsure], [sure, sure, unsure]])
        exact = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
        rows = early_stop(logits, exact)
        self.assertEqual([row["threshold"] for row in rows], list(THRESHOLDS))
        for row in rows:  # puzzle 0 stops after 1 step, 1 after 2, and 2 never before the end
            self.assertAlmostEqual(row["exact_accuracy"], 1.0)
            self.assertAlmostEqual(row["mean_steps"], 2.0)

    def test_thresholds(self):
        stream = np.random.Generator(np.random.Philox(0))
        logits, exact = 4 * stream.standard_normal((5, 200)), stream.integers(0, 2, (5, 200))
        for row in early_stop(logits, exact):
            steps, right = 0, 0
            for puzzle in range(200):
                probabilities = 1 / (1 + np.exp(-logits[:, puzzle]))
                stops = [t for t in range(5) if probabilities[t] >= row["threshold"]] or [4]
                steps, right = steps + stops[0] + 1, right + exact[stops[0], puzzle]
            self.assertAlmostEqual(row["exact_accuracy"], right / 200)
            self.assertAlmostEqual(row["mean_steps"], steps / 200)


class Runs(CommandTest):
    """Real trainings with all of it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls().train("--run_name", "unbroken", "checkpoint.keep_last_n=9", *EVERYTHING)

    def killed_after(self, run_name, records):
        """Kill a training by SIGKILL once its metrics.jsonl has so many records."""
        metrics = self.folder / "runs" / run_name / "metrics.jsonl"
        command = [sys.executable, "train_tpu.py", "--config", self.config, "--run_name", run_name]
        process = begin(self, [*command, "checkpoint.keep_last_n=9", *EVERYTHING])
        process.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= records)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def test_killed_in_each_stage(self):
        """Stages begin after 18 and 36 of 60 steps; there is a record every 5 steps."""
        for records in (2, 5, 10):
            self.killed_after("killed", records)
        self.train("--run_name", "killed", "checkpoint.keep_last_n=9", *EVERYTHING)
        starts = (self.folder / "runs" / "killed" / "starts.jsonl").read_text().splitlines()
        self.assertEqual(len(starts), 4)
        ours, theirs = (
            load_checkpoint(self.checkpoint(name, 60)) for name in ("killed", "unbroken")
        )
        self.same_content(ours, theirs)
        self.assertEqual(self.records("killed"), self.records("unbroken"))

    def test_flops_follow_the_stages(self):
        config = load_config(self.config, [CURRICULUM])
        dataset = SudokuDatasetTPU(self.folder / "data", "train")
        model = create_model(config, dataset)
        per_step = [
            8 * trm_model.step_flops_per_example(model, True, Cycles(*cycles))
            for cycles in ((1, 1), (1, 2), (2, 1))
        ]
        total = {r["step"]: r["train_flops"] for r in self.records("unbroken") if "lr" in r}
        self.assertEqual(total[10], 10 * per_step[0])
        self.assertEqual(total[20], 18 * per_step[0] + 2 * per_step[1])
        self.assertEqual(total[60], 18 * per_step[0] + 18 * per_step[1] + 24 * per_step[2])

    def test_any_number_of_workers(self):
        """From one checkpoint in the first stage on, over the beginning of the second."""
        flags = ("--run_name", "workers", "checkpoint.keep_last_n=9", *EVERYTHING)
        self.train(*flags, "--max_steps", "14")
        self.train(*flags, "--max_steps", "25", "training.num_workers=2")
        ours, theirs = (
            {r["step"]: r for r in self.records(name) if "lr" in r}
            for name in ("workers", "unbroken")
        )
        for step in (20, 25):
            self.assertAlmostEqual(ours[step]["loss"] / theirs[step]["loss"], 1, delta=0.01)
        self.train(*flags)  # and back to one

    def test_compiled(self):
        """torch.compile makes a program for each stage."""
        flags = ("training.compile=always", "--max_steps", "20")
        self.train("--run_name", "compiled", *EVERYTHING, *flags)
        ours, theirs = (
            [r for r in self.records(name) if "lr" in r][:4] for name in ("compiled", "unbroken")
        )
        for one, other in zip(ours, theirs, strict=True):
            self.assertAlmostEqual(one["loss"] / other["loss"], 1, delta=0.01)

    def test_early_stop_is_recorded(self):
        results = self.eval_json("unbroken")
        for result in results:
            self.assertEqual([row["threshold"] for row in result["early_stop"]], list(THRESHOLDS))
            for row in result["early_stop"]:
                self.assertTrue(1 <= row["mean_steps"] <= 3)

    def eval_json(self, run_name):
        return json.loads((self.folder / "runs" / run_name / "eval.json").read_text())["results"]

    def test_averages_of_checkpoints(self):
        flags = ("--run_name", "unbroken", *EVERYTHING, "--eval_only")
        before = self.eval_json("unbroken")
        output = self.train(*flags, "--average", "3", "--average", "42,28")
        self.assertIn("(average of 3 checkpoints, 50 puzzles)", output)
        results = self.eval_json("unbroken")
        self.assertEqual(
            [(r["weights"], r["step"], r.get("averaged_steps")) for r in results],
            [
                ("ema", 60, None),
                ("raw", 60, None),
                ("average", 60, [49, 56, 60]),
                ("average", 42, [28, 42]),
            ],
        )
        for ours, theirs in zip(results, before):
            self.assertEqual(ours["lm_loss"], theirs["lm_loss"])
        # the same weights, averaged by hand, as a file of the original's form
        contents = [load_checkpoint(self.checkpoint("unbroken", step)) for step in (28, 42)]
        mean = {
            name: ((tensor.double() + contents[1]["model"][name].double()) / 2).float()
            for name, tensor in contents[0]["model"].items()
        }
        torch.save(mean, self.folder / "mean.pt")
        self.train(*flags, "--checkpoint", str(self.folder / "mean.pt"))
        self.assertEqual(self.eval_json("unbroken")[0]["lm_loss"], results[-1]["lm_loss"])
        self.train(*flags, "--average", "2", "training.num_workers=2")
        (two,) = [r for r in self.eval_json("unbroken") if r["weights"] == "average"]
        self.train(*flags, "--average", "2")
        (one,) = [r for r in self.eval_json("unbroken") if r["weights"] == "average"]
        self.assertEqual(two["solved"], one["solved"])
        self.assertAlmostEqual(two["lm_loss"], one["lm_loss"], places=6)

    def test_averages_that_cannot_be(self):
        flags = ("--run_name", "unbroken", *EVERYTHING)
        for given, *says in (
            ("1", "at least 2"),
            ("x", "--average x", "as 1000,2000,3000"),
            ("20", "no checkpoint for 20 of them", "steps 20, 21", "checkpoint.keep_last_n"),
            ("28,30", "no checkpoint of step 30", "28, "),
            ("28,28", "given twice"),
        ):
            with self.subTest(given):
                self.user_mistake(*flags, "--eval_only", "--average", given, says=says)
        self.user_mistake(*flags, "--average", "2", says=["only with --eval_only"])
        self.user_mistake(
            "--run_name", "nowhere", "--eval_only", "--average", "2", says=["has none"]
        )


if __name__ == "__main__":
    unittest.main()
