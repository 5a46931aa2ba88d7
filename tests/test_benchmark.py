"""analysis/benchmark.py: the command on two devices, the products of a step, mistakes.

No test depends on how long something takes.
"""

import contextlib
import io
import json
import sys
import unittest
from collections import Counter
from unittest import mock

import torch

import trm_model
from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager
from config import load_config
from device import Device
from storage import open_folder
from tests.helpers import ROOT, TINY, FolderTest, XLATest, random_pairs, write_config, write_split
from tests.processes import run
from train_state import TrainState, load_datasets
from utils import run_cli

sys.path.insert(0, str(ROOT / "analysis"))
import benchmark

MATMUL = ("matmul_seconds", "matmul_share")


class BenchmarkTest(FolderTest):
    """With the tiny configuration, on 80 training and 50 test puzzles of 4x4."""

    def setUp(self):
        super().setUp()
        for split, count in (("train", 80), ("test", 50)):
            write_split(self.folder / "data" / split, *random_pairs(4, count, seed=count))
        self.path = write_config(
            self.folder / "tiny.yaml",
            TINY.format(data=self.folder / "data", out=self.folder / "runs"),
        )
        self.json = self.folder / "figures.json"

    def run_in_process(self, *overrides):
        """(TrainState, datasets) of the tiny configuration on the CPU."""
        config = load_config(self.path, overrides)
        datasets = load_datasets(config)
        return TrainState(config, Device("cpu"), datasets["train"]), datasets

    def main(self, *args):
        """(status, stdout, stderr) of the command, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["benchmark.py", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            with self.assertRaises(SystemExit) as end:
                run_cli(benchmark.main)
        return end.exception.code or 0, out.getvalue(), err.getvalue()

    def check(self, output, batch_size, repeats, without=()):
        """What holds of every result: returns the content of the JSON."""
        content = json.loads(self.json.read_text())
        self.assertEqual((content["batch_size"], content["repeats"]), (batch_size, repeats))
        figures = content["figures"]
        self.assertEqual(set(figures), set(benchmark.UNITS) - set(without))
        rows = {line.split()[0]: line.split() for line in output.splitlines() if line}
        for key, values in figures.items():
            self.assertEqual(list(values), ["median", "min", "max"])
            self.assertTrue(0 < values["min"] <= values["median"] <= values["max"], (key, values))
            for shown, value in zip(rows[key][1:4], values.values(), strict=True):
                self.assertLess(abs(float(shown.replace(",", "")) / value - 1), 1e-3, key)
        for name in ("median", "min", "max"):
            rate = figures["steps_per_second"][name]
            self.assertAlmostEqual(figures["examples_per_second"][name] / rate / batch_size, 1)
            self.assertAlmostEqual(
                figures["mfu"][name]
                * content["peak_flops"]
                / figures["model_flops_per_second"][name],
                1,
            )
        self.assertAlmostEqual(
            figures["step_seconds"]["min"] * figures["steps_per_second"]["max"], 1
        )
        config = load_config(self.path)
        model = trm_model.TinyRecursiveModel(config.model, 16, 6)
        self.assertAlmostEqual(
            figures["model_flops_per_second"]["max"]
            / figures["examples_per_second"]["max"]
            / trm_model.step_flops_per_example(model, train=True),
            1,
        )
        self.assertEqual(list((self.folder / "runs").iterdir()), [])  # the checkpoints are gone
        for key in ("device_model", "commit", "torch", "python", "peak_source"):
            self.assertTrue(content[key], key)
        self.assertEqual(content["datasets"]["train"]["puzzles"], 80)
        self.assertEqual(content["config"]["model"]["hidden_size"], 32)
        return content


class OnTheCPU(BenchmarkTest):
    def test_the_command(self):
        command = [
            sys.executable,
            "analysis/benchmark.py",
            "--config",
            self.path,
            "--repeats",
            "1",
            "training.num_workers=2",
            "--json",
            self.json,
        ]
        # of one of the two workers
        content = self.check(run(self, command), batch_size=4, repeats=1)
        self.assertEqual(
            (content["device"], content["config"]["training"]["global_batch_size"]), ("cpu", 8)
        )
        share, matmul, step = (
            content["figures"][key]["median"]
            for key in ("matmul_share", "matmul_seconds", "step_seconds")
        )
        self.assertAlmostEqual(share * step / matmul, 1)

    def test_the_products_of_a_step_are_its_flops(self):
        """What the model's own count does differently is known.

        It counts three products for the embedding, which has two, because its input needs no
        gradient. It leaves out the halting head, and the sums of the puzzle embedding's gradients.
        """
        for overrides in (
            (),
            ("model.mlp_t=false", "model.pos_encodings=rope", "model.H_cycles=1"),
            (
                "model.forward_dtype=float32",
                "training.grad_accumulation_steps=2",
                "model.L_cycles=2",
            ),
        ):
            run, _ = self.run_in_process(*overrides)
            run.forward = compiled = mock.Mock()  # compiled products would not be seen
            products = benchmark.step_products(run, run.loader.batch(0))
            compiled.assert_not_called()
            self.assertIs(run.forward, compiled)
            flops = sum(
                2 * count * torch.Size(a.shape).numel() * b.shape[-1]
                for (a, b), count in products.items()
            )
            dim, model = run.model.config.hidden_size, run.model
            expected = (
                trm_model.step_flops_per_example(model, train=True)
                - 2 * dim * model.vocab_size * model.seq_len
                + 3 * 2 * dim * 2
            )
            by_puzzle = 2 * 80 * 8 * 32  # puzzles, slots, puzzle_emb_ndim
            self.assertEqual(flops, 8 * expected + by_puzzle, overrides)
            wide = sum(
                count
                for (a, b), count in products.items()
                if a.dtype != model.forward_dtype or b.dtype != model.forward_dtype
            )
            self.assertEqual(
                wide, 0 if model.forward_dtype == torch.float32 else 3 + 1
            )  # those of these two
            self.assertEqual(run.step, 1)

    def test_products_are_timed_as_often_as_the_step_has_them(self):
        def operand(*shape, dtype=torch.float32, strides=None):
            return benchmark.Operand(shape, strides or torch.empty(shape).stride(), dtype)

        products = Counter(
            {
                (operand(3, 4), operand(4, 5, strides=(1, 4))): 2,
                (
                    operand(2, 3, 4, dtype=torch.bfloat16),
                    operand(2, 4, 6, dtype=torch.bfloat16, strides=(0, 6, 1)),
                ): 3,
            }
        )
        seen = Counter()

        def noting(function):
            def multiply(a, b):
                seen[
                    tuple(benchmark.Operand(tuple(t.shape), t.stride(), t.dtype) for t in (a, b))
                ] += 1
                return function(a, b)

            return multiply

        with (
            mock.patch.object(torch, "mm", noting(torch.mm)),
            mock.patch.object(torch, "bmm", noting(torch.bmm)),
        ):
            self.assertGreater(benchmark.matmul_seconds(products, Device("cpu"), passes=2), 0)
        self.assertEqual(seen, Counter({pair: 2 * count for pair, count in products.items()}))

    def test_a_checkpoint_is_whole_when_the_clock_stops(self):
        run, _ = self.run_in_process()
        checkpoints = CheckpointManager(
            open_folder(str(self.folder / "c")), 1, self.folder / "c", BackgroundWriter()
        )
        for step in (0, 7):
            run.step = step
            _, size = benchmark.save_checkpoint(run, checkpoints)
            self.assertEqual(
                {path.name: path.stat().st_size for path in (self.folder / "c").glob("*.pt")},
                {f"checkpoint_step_{step}.pt": size},
            )

    def test_mistakes_end_with_status_2(self):
        nowhere = self.folder / "no" / "figures.json"
        (self.folder / "file").write_text("")
        for args, *says in (
            (("--repeats", "0"), "--repeats 0", "must be >= 1"),
            (("--json", nowhere), f"--json {nowhere}", "folder that exists"),
            (("--json", self.folder), f"--json {self.folder}"),
            (("training.lrr=1",), "training.lrr", "did you mean"),
            (
                (f"data.dataset_path={nowhere}",),
                "there is no train split",
                "build_sudoku_dataset.py",
            ),
            (("training.epochs=0.01",), "training.epochs = 0.01"),
            (
                ("--json", "/proc/figures.json"),
                "--json /proc/figures.json",
                "no file can be written there",
            ),
            ((f"logging.output_dir={self.folder}/file",), "logging.output_dir"),
        ):
            status, out, err = self.main("--config", self.path, *args)
            self.assertEqual((status, err.count("\n"), out), (2, 1, ""), err)
            for text in ("error: ", *says):
                self.assertIn(text, err)
        self.assertFalse((self.folder / "runs").exists())

    def test_without_a_tpu(self):
        with mock.patch.dict("os.environ"):
            status, out, err = self.main(
                "--config", self.path, "device=tpu", "training.global_batch_size=32"
            )
        self.assertEqual((status, err.count("\n"), out), (2, 1, ""), err)
        self.assertIn("error: device = 'tpu': ", err)


class OnXLA(XLATest, BenchmarkTest):
    def test_the_command(self):
        with mock.patch.object(
            TrainState, "train_step", autospec=True, side_effect=TrainState.train_step
        ) as traced:
            status, out, err = self.main(
                "--config", self.path, "--repeats", 2, "device=xla_cpu", "--json", self.json
            )
        self.assertEqual(
            (status, traced.call_count), (0, 1), err
        )  # the rest is the program, replayed
        content = self.check(out, batch_size=8, repeats=2, without=MATMUL)
        self.assertEqual(content["device"], "xla_cpu")
        self.assertGreater(content["xla_executions"], content["xla_compiles"])
        for values in content["figures"].values():
            self.assertAlmostEqual(values["median"] * 2 / (values["min"] + values["max"]), 1)


if __name__ == "__main__":
    unittest.main()
