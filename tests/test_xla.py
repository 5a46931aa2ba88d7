"""The command on torch_xla's CPU device: how often it compiles and executes, and that it is the same training."""
import importlib.util
import unittest

import torch

from checkpoint_manager import load_checkpoint
from tests.helpers import CommandTest

ATTENTION = ("model.mlp_t=false", "model.pos_encodings=rope")


@unittest.skipUnless(importlib.util.find_spec("torch_xla"), "torch_xla is not installed here")
class XLATrainingTest(CommandTest):
    def check_counts(self, run_name, *overrides):
        """20 steps with a record each, evaluations after 10 and 20, checkpoints after 7, 10, 14 and 20, a learning rate that
        changes at every step; then the rest of the 30 in a process of its own."""
        flags = ("--run_name", run_name, "device=xla_cpu", "training.epochs=3", "logging.interval_steps=1", "evaluation.interval_epochs=1",
                 "training.lr_warmup_steps=5", "training.lr_min_ratio=0.1", *overrides)
        self.train(*flags, "--max_steps", "20")
        self.train(*flags)
        records = self.records(run_name, timing=True)
        training = {r["step"]: r for r in records if r["split"] == "train"}
        self.assertEqual(list(training), list(range(1, 31)))
        self.assertEqual(len({r["lr"] for r in training.values()}), 30)
        # an evaluation of 20 puzzles: two batches of 16, three supervision steps each
        evaluation = 2 * 3
        for step, record in training.items():
            evaluations, since = (0, step) if step <= 10 else (1, step) if step <= 20 else (0, step - 20)
            with self.subTest(step=step):
                self.assertEqual(record["xla_compiles"], 1 + evaluations)      # the training step; the evaluation step once it has run
                # the runtime counts an execution a moment after its results are there: the last may be missing, none may be too many
                expected = since + evaluations * evaluation
                self.assertIn(record["xla_executions"], (expected - 1, expected))
        self.assertEqual([(r["step"], r["weights"], r["count"]) for r in records if r["split"] == "test"],
                         [(10, "ema", 20), (20, "ema", 20), (30, "ema", 20), (30, "ema", 50), (30, "raw", 50)])

    def test_one_compile_and_one_execution_a_step_with_the_token_mlp(self):
        self.check_counts("mlp")

    def test_one_compile_and_one_execution_a_step_with_attention(self):
        self.check_counts("attention", *ATTENTION)

    def test_one_compile_with_every_option(self):
        self.check_counts("options", "training.grad_accumulation_steps=2", "training.grad_clip_norm=0.5", "training.optimizer=adamw",
                          "model.pos_encodings=learned", "model.halt_exploration_prob=0.5")

    def test_same_training_as_on_the_cpu(self):
        """In float32, from one checkpoint of each device on to the same step on the other."""
        flags = ("model.forward_dtype=float32", "logging.interval_steps=1", "checkpoint.keep_last_n=9")
        for first, second in (("cpu", "xla_cpu"), ("xla_cpu", "cpu")):
            name = f"{first}_then_{second}"
            self.train("--run_name", name, "--max_steps", "8", f"device={first}", *flags)
            self.assertIn("goes on after step 8", self.train("--run_name", name, "--max_steps", "20", f"device={second}", *flags))
        ours, theirs = self.records("cpu_then_xla_cpu"), self.records("xla_cpu_then_cpu")
        self.assertEqual([r["step"] for r in ours if r["split"] == "train"], list(range(1, 21)))
        for one, other in zip(ours, theirs, strict=True):
            if one["split"] == "train":
                self.assertAlmostEqual(one["loss"], other["loss"], delta=0.01 * one["loss"], msg=str(one["step"]))
        start = load_checkpoint(self.checkpoint("cpu_then_xla_cpu", 7))["model"]
        ends = [load_checkpoint(self.checkpoint(name, 20))["model"] for name in ("cpu_then_xla_cpu", "xla_cpu_then_cpu")]
        changes = [torch.cat([(end[key] - start[key]).flatten() for key in start]) for end in ends]
        self.assertGreater(torch.cosine_similarity(*changes, dim=0).item(), 0.99)


if __name__ == "__main__":
    unittest.main()
