"""analysis/tpu_report.py: command line, child processes, hours of a run, the traced program.

Where the TPU compiler is installed, it really compiles.
"""

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import tpu_children
import tpu_figures
import tpu_report
import tpu_text

import tpu_types
from config import load_config
from tests.helpers import ROOT, FolderTest, XLATest, write_config
from tests.processes import begin
from utils import UserError

V4 = tpu_types.GENERATIONS["v4"]
SMALL = """\
device: tpu
tpu: {}
data: {dataset_path: nowhere, expected_puzzles: 100}
model:
  hidden_size: 128
  num_heads: 4
  puzzle_emb_ndim: 128
  puzzle_emb_len: 1
  H_cycles: 2
  L_cycles: 1
  L_layers: 1
  halt_max_steps: 4
training: {global_batch_size: 32, epochs: 64}
checkpoint: {}
logging: {}
evaluation: {interval_epochs: 16, batch_size: 32}
"""


def try_dependencies():
    try:
        tpu_report.check_dependencies()
        return None
    except UserError as error:
        return str(error)


NOT_INSTALLED = try_dependencies()


def report(*args):
    """(status, output) of the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "analysis/tpu_report.py", *map(str, args)],
        cwd=ROOT,
        text=True,
        timeout=1200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


class CommandLine(FolderTest):
    def mistake(self, says, *args):
        status, output = report(*args)
        self.assertEqual((status, "Traceback" in output), (2, False), output)
        self.assertIn(says, output)

    def test_mistakes(self):
        path = write_config(self.folder / "a.yaml", SMALL)
        for args, says in (
            (("--accelerator", "v4-64"), "--config"),
            (("--config", path, "--accelerator", "v5e-8"), "v5e slices are called v5litepod-N"),
            (("--config", path, "--accelerator", "v4-9"), "take v4-8 or v4-16"),
            (("--config", "model.hidden_size=3"), "--config: give at least one file"),
            (("--config", path, "--minutes", "0"), "must be > 0"),
            (("--config", path, "--acc", "v4-64"), "--acc"),
            (("--config", path, "--json", self.folder), "(is a folder)"),
            (("--config", path, "--json", "/proc/a.json"), "no file can be written there"),
            (("--config", path, "--keep", path), "no file can be written there"),
        ):
            self.mistake(says, *args)

    @unittest.skipIf(NOT_INSTALLED, f"needs the TPU compiler: {NOT_INSTALLED}")
    def test_mistakes_in_a_configuration(self):
        path = write_config(self.folder / "a.yaml", SMALL)
        unknown_size = (path, "data.expected_puzzles=null", "--accelerator", "v4-8")
        for args, says in (
            ((path, "--accelerator", "v4-128"), "divisible"),
            ((path, "model.hidden=3"), "hidden"),
            ((self.folder / "b.yaml",), "cannot read"),
            (unknown_size, "data.expected_puzzles"),
            ((path, "training.epochs=0.1", "--accelerator", "v4-8"), "they make no full batch"),
        ):
            self.mistake(says, "--config", *args)

    def test_without_the_compiler_one_message_says_what_to_install(self):
        def version(name):
            if name == "libtpu":
                raise importlib.metadata.PackageNotFoundError
            return {"jax": "0.10.2", "jaxlib": "0.7.1"}.get(name, "2.9.0")

        with mock.patch("importlib.metadata.version", version):
            message = self.user_error(
                tpu_report.check_dependencies,
                "jax==0.7.1 (is 0.10.2)",
                "libtpu",
                "(not installed)",
                "pip install -r requirements.txt -r requirements-tpu.txt",
            )
        self.assertNotIn("jaxlib", message)

    @unittest.skipUnless(NOT_INSTALLED, "the TPU compiler is installed here")
    def test_without_the_compiler_the_command_ends_with_status_2(self):
        status, output = report("--config", "configs/e1_1.yaml")
        self.assertEqual((status, output.count("\n")), (2, 1), output)
        self.assertIn("requirements-tpu.txt", output)


class Children(FolderTest):
    """A child that takes too much, or dies, becomes one sentence."""

    def run_child(self, code, memory_gib=1, minutes=1):
        script = self.folder / "child.py"
        script.write_text(code)
        return tpu_children.run_child("compiling", [script], self.folder, memory_gib, minutes)

    def test_limits(self):
        greedy = "import time; a = bytearray(2**29); time.sleep(60)"
        message = self.run_child(greedy, memory_gib=0.2)
        self.assertIn("compiling it needs more than 0.2 GiB of this machine's memory", message)
        message = self.run_child("import time; time.sleep(60)", minutes=0.01)
        self.assertIn("more than 0.01 minutes", message)

    def test_flags_of_the_shell_for_the_compiler_do_not_count(self):
        names = "PJRT_DEVICE XLA_FLAGS TPU_PROCESS_BOUNDS LIBTPU_INIT_ARGS JAX_PLATFORMS".split()
        with mock.patch.dict("os.environ", dict.fromkeys(names, "x")):
            error = self.run_child(f"import os; assert not set({names}) & set(os.environ)")
        self.assertIsNone(error)

    def test_death(self):
        killed = "import os; print('last words', flush=True); os.kill(os.getpid(), 11)"
        self.assertIn("compiling ended by signal 11: last words", self.run_child(killed))
        self.assertIn("ended with status 1: ", self.run_child("raise KeyError('here')"))
        self.assertIsNone(self.run_child("print('fine')"))

    def test_no_child_outlives_the_report(self):
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        (self.folder / "child.py").write_text(code)
        parent = begin(self, [sys.executable, "tests/programs/start_a_child.py", self.folder])
        log = self.folder / "compiling.log"
        parent.until(lambda: log.exists() and log.read_text().endswith("\n"))
        parent.kill()
        parent.all_end(-signal.SIGKILL)
        self.assertFalse(tpu_children.resident_bytes(int(log.read_text())))

    def test_a_mistake_of_the_user_stays_one(self):
        code = "import sys; print('error: mend this', file=sys.stderr); sys.exit(2)"
        self.user_error(lambda: self.run_child(code), "mend this")


class Messages(FolderTest):
    def test_compiler_errors_in_plain_words(self):
        for text in (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 54.30G of 30.75G hbm. "
            "Exceeded by",
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (54.30G) exceeds available HBM (30.75G).",
        ):
            self.assertEqual(
                tpu_text.compiler_error(text, "wait", V4),
                "does not fit: needs 54.30 GiB of HBM, a program may use 30.75 GiB of a chip's 32: "
                "wait",
            )
        one = (
            "RESOURCE_EXHAUSTED: Allocation (size=44023414784) would exceed memory "
            "(size=34359738368) :: #allocation7 [shape = 'f32[262144,82,512]', space=hbm]"
        )
        self.assertEqual(
            tpu_text.compiler_error(one, "wait", V4),
            "does not fit: one tensor alone needs 41.00 GiB of HBM, a chip has 32: wait",
        )
        self.assertIn(
            "the compiler refuses it: UNIMPLEMENTED: no such thing",
            tpu_text.compiler_error("UNIMPLEMENTED: no\nsuch thing", "wait", V4),
        )

    def test_ways_out_of_too_little_memory(self):
        path = write_config(self.folder / "a.yaml", SMALL)
        for step, on, says in (
            ("train", "false", "set model.activation_checkpointing=true, or take a larger slice"),
            ("train", "true", "take a larger slice"),
            ("evaluation", "false", "take a smaller evaluation.batch_size"),
        ):
            config = load_config(path, [f"model.activation_checkpointing={on}"])
            self.assertEqual(tpu_text.way_out(step, config), says)


class Hours(FolderTest):
    REPORT = {
        "num_puzzles": 100,
        "chips": 4,
        "estimated_ms_per_step": 30.0,
        "stages": [{"steps": 200, "estimated_ms_per_step": 30.0}],
        "all_reduce_ms_at_least": 6.0,
        "host_ms_per_step": 20.0,
        "evaluation_ms_per_step": 10.0,
        "evaluation_host_ms_per_step": 20.0,
        "split_sizes": {"test": 1000, "val": 1000},
    }

    def figures(self, *overrides, **changes):
        path = write_config(self.folder / "a.yaml", SMALL)
        config = load_config(path, ["tpu.accelerator_type=v4-8", *overrides])
        return tpu_figures.run_figures({**self.REPORT, **changes}, config)

    def test_steps_and_hours(self):
        figures = self.figures("evaluation.max_examples=100")
        # 64 epochs of 100 puzzles in batches of 32. An evaluation of 100 puzzles after every 50
        # steps: 25 a chip, one batch of 4 steps. At the end 250 a chip, 8 batches, twice. There a
        # step takes 20 ms, because the host is slower than the device.
        self.assertEqual((figures["total_steps"], figures["evaluations"]), (200, 4))
        self.assertEqual(figures["bound_by"], "device")
        self.assertAlmostEqual(figures["training_hours"] * 3600, 200 * 0.036)
        self.assertAlmostEqual(figures["evaluation_hours"] * 3600, (4 * 4 + 2 * 8 * 4) * 0.020)
        self.assertAlmostEqual(figures["chip_hours"], 4 * figures["estimated_hours"])

    def test_the_last_evaluation_of_the_whole_test_split_is_a_part_of_the_final_one(self):
        for split, evaluations in (("test", 3), ("val", 4)):
            figures = self.figures(f"evaluation.split={split}", "evaluation.max_examples=null")
            seconds = (evaluations + 2) * 8 * 4 * 0.020
            self.assertAlmostEqual(figures["evaluation_hours"] * 3600, seconds)

    def test_a_step_takes_as_long_as_the_slower_of_device_and_host(self):
        figures = self.figures(host_ms_per_step=50.0)
        self.assertEqual(figures["bound_by"], "host")
        self.assertAlmostEqual(figures["training_hours"] * 3600, 200 * 0.050)

    def test_hours_of_a_curriculum(self):
        """Of its first stage the host sets the pace (20 ms), of the second the device."""
        stages = [(60, 4.0), (140, 30.0)]
        stages = [{"steps": steps, "estimated_ms_per_step": ms} for steps, ms in stages]
        figures = self.figures(stages=stages, estimated_ms_per_step=22.2)
        self.assertAlmostEqual(figures["training_hours"] * 3600, 60 * 0.020 + 140 * 0.036)


class Trace(XLATest):
    def test_the_traced_program_is_the_one_that_training_compiles(self):
        """Placeholders against real tensors, at the first step of eight replicas.

        The other steps replay it. Also the memory that results take over is the same.
        """
        import torch_xla
        import tpu_trace

        from device import Device
        from train_state import TrainState
        from xla_program import changed_places

        def pending(state):
            tensors = state.tensors()
            outputs = [tensors[place] for place in changed_places(tensors)]
            return torch_xla._XLAC._get_xla_tensors_hlo(outputs)

        with tempfile.TemporaryDirectory() as folder:
            path = write_config(Path(folder) / "a.yaml", SMALL)
            overrides = ["tpu.accelerator_type=v4-16", "training.pallas_kernels=false"]
            config = load_config(path, overrides)
        dataset, _ = tpu_trace.training_puzzles(config)
        device = Device("xla_cpu")
        device.workers.rank, device.workers.world_size = 0, 8
        state = TrainState(config, device, dataset)
        batch = state.loader.batch(0)
        state.train_step(device.put(state.host_batch(batch)))
        trained = pending(state)
        device.end_step()

        traced_device = tpu_trace.TracedDevice(tpu_types.slice_type("v4-16"))
        traced = tpu_trace.traced_state(config, traced_device, dataset)
        traced.train_step(traced_device.put(traced.host_batch(batch)))
        self.assertEqual(pending(traced), trained)
        self.assertEqual(len(re.findall(r" all-reduce\(", trained)), 1)
        traced_device.end_step()

        # What another state of the same kind gives away when it is replayed.
        again = TrainState(config, device, dataset)
        step = again.run_step
        step(device.put(again.host_batch(batch)))
        donated = [k for k, (place, _) in enumerate(step.arguments) if place in step.changed]
        parameters = len(list(traced.model.parameters()))
        # Weights, their averages, three tensors of optimizer state each, and the puzzle embedding;
        # of the carry and the sums some at least.
        self.assertGreater(len(donated), 5 * parameters + 1)
        self.assertEqual(traced_device.programs[0]["donated"], donated)


@unittest.skipIf(NOT_INSTALLED, f"needs the TPU compiler: {NOT_INSTALLED}")
class Compiled(FolderTest):
    def report(self, accelerator, *args, text=SMALL, name="small", others=(), status=0):
        """(the content of --json, the output) of the command for one or more configurations."""
        path, figures = self.folder / f"{name}.yaml", self.folder / "figures.json"
        write_config(path, text)
        words = ("--config", path, *others, "--accelerator", accelerator, "--json", figures)
        ended, output = report(*words, *args)
        self.assertEqual(ended, status, output)
        self.assertNotIn("Traceback", output)
        return json.loads(figures.read_text()), output

    def test_one_that_is_too_large_does_not_end_the_table(self):
        """And a program that two configurations have is compiled once."""
        text = SMALL.replace("batch_size: 32, epochs: 64", "batch_size: 262144, epochs: 99999")
        small = write_config(self.folder / "small.yaml", SMALL)
        augmented = SMALL.replace(
            "expected_puzzles: 100", "expected_puzzles: 100, augmentations: 5"
        )
        same = write_config(self.folder / "same.yaml", augmented)
        others = [small, same]
        all_, output = self.report("v4-8", text=text, name="large", others=others, status=1)
        self.assertEqual([report["compiles"] for report in all_["reports"]], [False, True, True])
        self.assertRegex(
            output,
            r"large +NO: train step: does not fit: needs [\d.]+ GiB of HBM.*: "
            r"set model.activation_checkpointing=true",
        )
        self.assertRegex(output, r"small +0\.01 ")
        self.assertRegex(
            output, r"evaluations are taken to be of Sudoku-Extreme's.*: small, same\n\Z"
        )
        _, one, other = all_["reports"]
        for figure in ("estimated_ms_per_step", "hbm_bytes", "custom_calls", "compile_seconds"):
            self.assertEqual(one[figure], other[figure])
        hours = one["estimated_hours"] + other["estimated_hours"]
        self.assertEqual((all_["judged"], all_["estimated_hours"]), (2, hours))

    def test_a_small_configuration(self):
        report, output = self.report("v4-8")
        self.assertIn(
            "100 to train on (assumed: 9x9, data.expected_puzzles), "
            "422,786 to test on (assumed: those of Sudoku-Extreme)",
            output,
        )
        self.assertEqual((report["accelerator"], report["compiles"]), ("v4-8", True))
        self.assertEqual((report["error"], report["programs"]), (None, 2))
        self.assertEqual((report["total_steps"], report["all_reduce_count"]), (200, 1))
        # Gradients, metrics, and the puzzle embedding's row with its count, all float32; and a
        # token of torch_xla's own, bfloat16.
        numbers = report["parameters"] + 7 + 128 + 1
        self.assertAlmostEqual(report["all_reduce_bytes"], 4 * numbers, delta=2)
        # weights, two moments, the average
        self.assertGreater(report["hbm_bytes"]["aliased"], 4 * 4 * report["parameters"])
        # The token mixing's gradient, in a kernel, computes the forward pass once more.
        more = report["flops_per_chip_step"] / report["model_flops_per_chip_step"]
        self.assertTrue(1.02 < more < 1.15, more)
        self.check_products(report)
        for figure in ("host_ms_per_step", "estimated_hours"):
            self.assertGreater(report[figure], 0)
        self.assertTrue(0 < report["estimated_mfu"] < 1)
        sources = [source for _, _, source, _, _ in report["where"]]
        self.assertTrue(any(re.fullmatch(r"trm_model\.py:\d+", s) for s in sources), sources)

    def test_a_curriculum(self):
        """A program for each stage, and hours and FLOPs by the steps of each."""
        plain, _ = self.report("v4-8")
        stages = "[{begin: 0, H_cycles: 1, L_cycles: 1}, {begin: 0.3, H_cycles: 2, L_cycles: 1}]"
        report, output = self.report("v4-8", f"training.curriculum={stages}")
        self.assertEqual(report["programs"], 3)
        self.assertEqual([stage["steps"] for stage in report["stages"]], [60, 140])
        shallow, deep = (stage["estimated_ms_per_step"] for stage in report["stages"])
        self.assertLess(shallow, deep)
        self.assertAlmostEqual(deep, plain["estimated_ms_per_step"])
        self.assertAlmostEqual(report["estimated_ms_per_step"], 0.3 * shallow + 0.7 * deep)
        self.assertLess(report["model_flops_per_chip_step"], plain["model_flops_per_chip_step"])
        self.assertEqual(report["where"], plain["where"])
        self.assertRegex(output, r"train_1 +[\d.]+ ms a step, 60 steps from step 0 on, with H_cy")
        self.assertRegex(output, r"matrix products +train_2: ")

    def check_products(self, report):
        kernels = report["custom_calls"]["train"]["tpu_custom_call"]
        # two SwiGLUs, two calls in each of two cycles; and the backward of the token mixing
        self.assertEqual(kernels["count"], 8 + 2)
        self.assertLess(0, kernels["bound_seconds"])
        self.assertLess(kernels["bound_seconds"], kernels["seconds"])
        self.assertLess(kernels["seconds"], 1e-3 * report["estimated_ms_per_step"])
        # Besides those of the kernels: in evaluation the output head; in training more, because of
        # the gradient.
        train, evaluation = (report["matrix_products"][name] for name in ("train", "evaluation"))
        self.assertEqual((train["float32"], evaluation["float32"]), (0, 0))
        self.assertLess(0, evaluation["bfloat16"])
        self.assertLess(evaluation["bfloat16"], train["bfloat16"])

    def test_other_kinds_of_tpu(self):
        """They have one core a chip. Of attention only the channel mixing is a kernel."""
        attention = ("model.mlp_t=false", "model.pos_encodings=rope")
        for accelerator, chips, peak, memory, overrides, kernels, as_kernels in (
            ("v6e-16", 16, 918e12, "32", attention, 4, "channel mixing"),
            ("v5litepod-8", 8, 197e12, "16", (), 10, "token mixing, channel mixing"),
        ):
            with self.subTest(accelerator):
                report, output = self.report(accelerator, *overrides)
                self.assertEqual((report["accelerator"], report["chips"]), (accelerator, chips))
                self.assertEqual(report["per_chip_batch"], 32 // chips)
                self.assertEqual(report["all_reduce_count"], 1)
                flops, ms = report["model_flops_per_chip_step"], report["estimated_ms_per_step"]
                self.assertAlmostEqual(report["estimated_mfu"], flops / (1e-3 * ms * peak))
                calls = report["custom_calls"]["train"]["tpu_custom_call"]
                self.assertEqual(calls["count"], kernels)
                self.assertTrue(0 < calls["bound_seconds"] < calls["seconds"])
                self.assertRegex(output, rf"HBM needed +[\d.]+ of {memory} GiB a chip")
                self.assertRegex(output, rf"kernels +{as_kernels}\n")
        report["in_kernel"] = {"token mixing": False, "channel mixing": False}
        self.assertRegex(
            tpu_text.full_text(report),
            r"kernels +none\n +in XLA's form +token mixing, channel mixing: .*128 MiB of VMEM",
        )

    def test_a_float32_configuration_is_multiplied_in_float32(self):
        text = SMALL.replace("H_cycles: 2", "H_cycles: 1")
        report, output = self.report("v4-8", "model.forward_dtype=float32", text=text)
        targets = {target for calls in report["custom_calls"].values() for target in calls}
        self.assertNotIn("tpu_custom_call", targets)  # no kernels
        for name, products in report["matrix_products"].items():
            self.assertGreater(products["float32"], 10)
            self.assertRegex(
                output,
                rf"matrix products +{name}: 0 in bfloat16, {products['float32']} in float32 "
                r"\(highest precision\)\n",
            )

    def test_activation_checkpointing_takes_less_memory(self):
        """All temporaries together are less than what a backward pass would have to keep.

        Without activation checkpointing it keeps gate and up of the channel mixing alone in: calls
        of the block, slots, positions, width, 2 bytes.
        """
        text = SMALL.replace("batch_size: 32, epochs", "batch_size: 1024, epochs")
        text = text.replace("H_cycles: 2", "H_cycles: 1").replace("L_cycles: 1", "L_cycles: 6")
        report, _ = self.report("v4-8", "model.activation_checkpointing=true", text=text)
        temporaries = report["hbm_bytes_by_program"]["train"]["temporaries"]
        self.assertLess(temporaries, 7 * 2 * 256 * 82 * 512 * 2)


if __name__ == "__main__":
    unittest.main()
