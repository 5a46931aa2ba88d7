"""analysis/tpu_report.py: reading costs from HLO text, mistakes in the command, limits of its child processes, the traced
program, and, where the TPU compiler is installed, real compiles."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from config import load_config
from tests.helpers import ROOT, FolderTest, XLATest, write_config
from utils import UserError

sys.path.insert(0, str(ROOT / "analysis"))
import tpu_hlo
import tpu_report

import tpu_types

V4, V6E = tpu_types.GENERATIONS["v4"], tpu_types.GENERATIONS["v6e"]

SMALL = """\
device: tpu
tpu: {}
data: {dataset_path: nowhere, expected_puzzles: 100}
model: {hidden_size: 128, num_heads: 4, puzzle_emb_ndim: 128, puzzle_emb_len: 1, H_cycles: 2, L_cycles: 1, L_layers: 1, halt_max_steps: 4}
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


def read_cost(text, kernel_cycles={}, chip=V4):
    return tpu_hlo.read_cost(text, chip, kernel_cycles)


class CostTest(unittest.TestCase):
    def test_a_loop_counts_its_passes_and_a_fusion_what_it_says_itself(self):
        cost = read_cost(LOOP)
        # 100 outside; 7 passes of (30 + 5 of the condition); what the fused computations hold is inside the fusions' own estimates
        self.assertEqual(cost.cycles, 100 + 7 * (30 + 5))
        self.assertEqual(dict(cost.counts), {"fusion": 1 + 7 + 7})
        self.assertEqual(cost.loops_of_unknown_length, 0)
        self.assertAlmostEqual(cost.seconds, cost.cycles / 1.05e9)
        self.assertAlmostEqual(read_cost(LOOP, chip=V6E).seconds, cost.cycles / 1.75e9)

    def test_a_loop_of_unknown_length_is_told(self):
        cost = read_cost(LOOP.replace(', backend_config={"known_trip_count":{"n":"7"}}', ""))
        self.assertEqual((cost.cycles, cost.loops_of_unknown_length), (100 + 35, 1))

    def test_a_loop_that_counts_up_to_a_constant(self):
        """As the TPU compiler writes torch_xla's scan: a counter of 64 bits in two halves, the condition in logic, no number of passes."""
        self.assertEqual(read_cost(COUNTED).cycles, 6 * 40)
        self.assertEqual(
            read_cost(
                COUNTED.replace(
                    "%zero = u32[]{:T(128)} constant(0)", "%zero = u32[]{:T(128)} constant(2)"
                )
            ).cycles,
            4 * 40,
        )
        for change in (
            ("%zero = u32[]{:T(128)} constant(0)", "%zero = u32[]{:T(128)} parameter(1)"),
            ("constant(6)", "parameter(1)"),
            ("direction=LT", "direction=GT"),
        ):
            cost = read_cost(COUNTED.replace(*change))
            self.assertEqual((cost.cycles, cost.loops_of_unknown_length), (40, 1), change)

    def test_flops_of_products_in_a_traced_program(self):
        """A loop inside a called computation that is told where to start, as torch_xla's scan; and what a kernel states."""
        self.assertEqual(tpu_hlo.product_flops(TRACED), 5 * 2 * 4 * 16 * 8 + 1000)

    def test_precision_of_products(self):
        """What "highest" asks for counts only with an operand in float32; inside fusions, and in a loop as often as it runs."""
        self.assertEqual(
            tpu_hlo.product_precisions(PRODUCTS), {"bfloat16": 1 + 1, "float32": 3 + 1}
        )

    def test_called_computations_and_every_branch_count(self):
        self.assertEqual(read_cost(CALLS).cycles, 11 + 13 + 17 + 19)

    def test_nothing_without_an_estimate_counts_as_zero(self):
        cost = read_cost(REST)
        self.assertEqual(cost.cycles, 0)
        kernel, unstated = cost.custom_calls["tpu_custom_call"], cost.custom_calls["Other"]
        # the kernel states its cost: 2.75e9 FLOPs take 10 us at the peak, its bytes less; the other has its bytes only
        self.assertEqual(
            kernel,
            {
                "count": 1,
                "bytes": 3 * 4 * 1024 * 256,
                "flops": 2750000000,
                "bound_seconds": 1e-5,
                "seconds": 1e-5,
            },
        )
        self.assertEqual((unstated["bytes"], unstated["flops"]), (2 * 4 * 1024 * 256, 0))
        self.assertAlmostEqual(unstated["seconds"], 2 * 4 * 1024 * 256 / 1.2e12)
        self.assertNotIn("ConcatBitcast", cost.custom_calls)
        self.assertEqual(cost.unestimated["count"], 1)  # the concatenation
        self.assertEqual(cost.unestimated["bytes"], 4 * 4 * 1024 * 256)
        self.assertEqual(cost.collectives["all-reduce"], {"count": 1, "bytes": 4 * 1024 * 256})
        self.assertEqual(cost.prefetch_bytes, 4 * 1024 * 256 + 4 * 128 * 256)
        self.assertAlmostEqual(
            cost.seconds, kernel["seconds"] + unstated["seconds"] + cost.unestimated["seconds"]
        )
        self.assertAlmostEqual(tpu_hlo.all_reduce_seconds(300e9, 4, V4), 1.5)
        self.assertAlmostEqual(tpu_hlo.all_reduce_seconds(400e9, 4, V6E), 1.5)
        faster = read_cost(REST, chip=V6E).custom_calls
        self.assertAlmostEqual(faster["tpu_custom_call"]["seconds"], 2750000000 / 918e12)
        self.assertAlmostEqual(faster["Other"]["seconds"], 2 * 4 * 1024 * 256 / 1638e9)

    def test_a_kernel_takes_its_schedule_and_its_bytes_one_after_the_other(self):
        kernel = next(i for _, _, i in tpu_hlo.executed(*tpu_hlo.parse(REST)) if '"body"' in i.rest)
        size = 3 * 4 * 1024 * 256
        for cycles, seconds in (
            (21_000, 20e-6 + size / 1.2e12),
            (1, 10e-6),
        ):  # never less than its bound
            call = read_cost(REST, {tpu_hlo.kernel_key(kernel): cycles}).custom_calls[
                "tpu_custom_call"
            ]
            self.assertAlmostEqual(call["seconds"], seconds)
            self.assertEqual(call["bound_seconds"], 1e-5)
        other = next(
            i
            for _, _, i in tpu_hlo.executed(
                *tpu_hlo.parse(REST.replace('"body":"x"', '"body":"y"'))
            )
            if '"body"' in i.rest
        )
        self.assertNotEqual(tpu_hlo.kernel_key(other), tpu_hlo.kernel_key(kernel))

    def test_cycles_by_line_of_code(self):
        cost = read_cost(LOOP)
        self.assertEqual(
            tpu_hlo.cycles_by_source(cost, "/kit"),
            [
                (210, 7, "trm_model.py:62", "aten__mm", "f32[8]"),
                (100, 1, "", "aten__mul", "f32[8]"),
                (35, 7, "", "fusion", "pred[]"),
            ],
        )

    def test_bytes_of_shapes(self):
        for shape, size in (
            ("f32[3,4]{1,0:T(8,128)S(3)}", 48),
            ("(bf16[5], pred[7], u32[])", 10 + 7 + 4),
            ("s4[3]", 2),
            ("f8e4m3fn[9]", 9),
            ("token[]", 0),
        ):
            self.assertEqual(tpu_hlo.array_bytes(shape), size, shape)

    def test_other_text_is_refused(self):
        with self.assertRaises(ValueError):
            read_cost("no HLO")


class ReportTest(FolderTest):
    def report(self, *args):
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


class CommandLineTest(ReportTest):
    def test_mistakes_end_with_status_2(self):
        path = write_config(self.folder / "a.yaml", SMALL)
        for args, says in (
            (("--accelerator", "v4-64"), "--config"),
            (("--config", path, "--accelerator", "v5e-8"), "v5e slices are called v5litepod-N"),
            (("--config", path, "--accelerator", "v4-9"), "take v4-8 or v4-16"),
            (("--config", path, "--minutes", "0"), "must be > 0"),
            (("--config", path, "--json", self.folder), "(is a folder)"),
            (("--config", path, "--json", "/proc/a.json"), "no file can be written there"),
            (("--config", path, "--keep", path), "no file can be written there"),
        ):
            status, output = self.report(*args)
            self.assertEqual((status, "Traceback" in output), (2, False), output)
            self.assertIn(says, output)

    @unittest.skipIf(NOT_INSTALLED, f"needs the TPU compiler: {NOT_INSTALLED}")
    def test_mistakes_in_a_configuration_end_with_status_2(self):
        path = write_config(self.folder / "a.yaml", SMALL)
        for args, says in (
            ((path, "--accelerator", "v4-128"), "divisible"),
            ((path, "model.hidden=3"), "hidden"),
            ((self.folder / "b.yaml",), "cannot read"),
            (
                (path, "data.expected_puzzles=null", "--accelerator", "v4-8"),
                "data.expected_puzzles",
            ),
        ):
            status, output = self.report("--config", *args)
            self.assertEqual((status, "Traceback" in output), (2, False), output)
            self.assertIn(says, output)

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
        status, output = self.report("--config", "configs/e1_1.yaml")
        self.assertEqual((status, output.count("\n")), (2, 1), output)
        self.assertIn("requirements-tpu.txt", output)


class ChildTest(FolderTest):
    """A child that takes too much, or dies, is one sentence."""

    def run_child(self, code, **limits):
        script = self.folder / "tpu_compile.py"
        script.write_text(code)
        return tpu_report.run_child(
            [str(script)], self.folder, SimpleNamespace(**{"memory_gib": 1, "minutes": 1, **limits})
        )

    def test_limits(self):
        self.assertIn(
            "more than 0.2 GiB of this machine's memory",
            self.run_child("import time; a = bytearray(2**29); time.sleep(60)", memory_gib=0.2),
        )
        self.assertIn(
            "more than 0.01 minutes", self.run_child("import time; time.sleep(60)", minutes=0.01)
        )

    def test_the_shell_s_own_flags_for_the_compiler_do_not_count(self):
        flags = dict.fromkeys(
            ("PJRT_DEVICE", "XLA_FLAGS", "TPU_PROCESS_BOUNDS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS"),
            "x",
        )
        with mock.patch.dict("os.environ", flags):
            self.assertIsNone(
                self.run_child(f"import os; assert not set({list(flags)}) & set(os.environ)")
            )

    def test_death(self):
        self.assertIn(
            "ended by signal 11: last words",
            self.run_child("import os; print('last words', flush=True); os.kill(os.getpid(), 11)"),
        )
        self.assertIn("ended with status 1: ", self.run_child("raise KeyError('here')"))
        self.assertIsNone(self.run_child("print('fine')"))

    def test_no_child_outlives_the_report(self):
        (self.folder / "tpu_compile.py").write_text(
            "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
        )
        parent = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; sys.path.insert(0, 'analysis'); import tpu_report, types, pathlib\n"
                "tpu_report.run_child([sys.argv[1] + '/tpu_compile.py'], pathlib.Path(sys.argv[1]), "
                "types.SimpleNamespace(memory_gib=1, minutes=1))",
                str(self.folder),
            ],
            cwd=ROOT,
        )
        self.addCleanup(parent.kill)
        log = self.folder / "compiling.log"
        self.wait(lambda: log.exists() and log.read_text().endswith("\n"))
        parent.kill()
        parent.wait()
        self.wait(lambda: not tpu_report.resident_bytes(int(log.read_text())))

    def wait(self, condition):
        end = time.monotonic() + 30
        while not condition():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.05)

    def test_a_mistake_of_the_user_stays_one(self):
        self.user_error(
            lambda: self.run_child(
                "import sys; print('error: mend this', file=sys.stderr); sys.exit(2)"
            ),
            "mend this",
        )

    def test_compiler_errors_in_plain_words(self):
        for text in (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 54.30G of 30.75G hbm. Exceeded by",
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (54.30G) exceeds available HBM (30.75G).",
        ):
            self.assertEqual(
                tpu_report.compiler_error(text, "wait", V4),
                "does not fit: needs 54.30 GiB of HBM, a program may use 30.75 GiB of a chip's 32: wait",
            )
        one = "RESOURCE_EXHAUSTED: Allocation (size=44023414784) would exceed memory (size=34359738368) :: #allocation7 [shape = 'f32[262144,82,512]', space=hbm]"
        self.assertEqual(
            tpu_report.compiler_error(one, "wait", V4),
            "does not fit: one tensor alone needs 41.00 GiB of HBM, a chip has 32: wait",
        )
        self.assertIn(
            "the compiler refuses it: UNIMPLEMENTED: no such thing",
            tpu_report.compiler_error("UNIMPLEMENTED: no\nsuch thing", "wait", V4),
        )

    def test_ways_out_of_too_little_memory(self):
        path = write_config(self.folder / "a.yaml", SMALL)
        for step, on, says in (
            ("train", "false", "set model.activation_checkpointing=true, or take a larger slice"),
            ("train", "true", "take a larger slice"),
            ("evaluation", "false", "take a smaller evaluation.batch_size"),
        ):
            self.assertEqual(
                tpu_report.way_out(
                    step, load_config(path, [f"model.activation_checkpointing={on}"])
                ),
                says,
            )


class RunFiguresTest(unittest.TestCase):
    def test_steps_and_hours(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        config = load_config(
            write_config(Path(folder.name) / "a.yaml", SMALL),
            ["tpu.accelerator_type=v4-8", "evaluation.max_examples=100"],
        )
        report = {
            "num_puzzles": 100,
            "chips": 4,
            "estimated_ms_per_step": 30.0,
            "all_reduce_ms_at_least": 6.0,
            "host_ms_per_step": 20.0,
            "evaluation_ms_per_step": 10.0,
            "evaluation_host_ms_per_step": 20.0,
            "split_sizes": {"test": 1000},
        }
        figures = tpu_report.run_figures(report, config)
        # 64 epochs of 100 puzzles by 32; looks at 100 puzzles after every 50 steps: 25 a chip, one batch of 4 steps; at the
        # end 250 a chip, 8 batches, twice; 20 ms a step there, since the host is slower than the device
        self.assertEqual(
            (figures["total_steps"], figures["evaluations"], figures["bound_by"]),
            (200, 4, "device"),
        )
        self.assertAlmostEqual(figures["training_hours"] * 3600, 200 * 0.036)
        self.assertAlmostEqual(figures["evaluation_hours"] * 3600, (4 * 4 + 2 * 8 * 4) * 0.020)
        self.assertAlmostEqual(figures["chip_hours"], 4 * figures["estimated_hours"])
        # of the whole test split the last look is the first half of the final evaluation, of another split it is not
        for overrides, looks in (((), 3), (("evaluation.split=val",), 4)):
            whole = load_config(
                Path(folder.name) / "a.yaml",
                ["tpu.accelerator_type=v4-8", "evaluation.max_examples=null", *overrides],
            )
            figures = tpu_report.run_figures(
                {**report, "split_sizes": {"test": 1000, "val": 1000}}, whole
            )
            self.assertAlmostEqual(figures["evaluation_hours"] * 3600, (looks + 2) * 8 * 4 * 0.020)
        slow = tpu_report.run_figures({**report, "host_ms_per_step": 50.0}, config)
        self.assertEqual(slow["bound_by"], "host")
        self.assertAlmostEqual(slow["training_hours"] * 3600, 200 * 0.050)


class TraceTest(XLATest):
    def test_the_traced_program_is_the_one_that_training_compiles(self):
        """Placeholders against real tensors, at the first step (the others replay it) of eight replicas; and the memory that results
        take over."""
        import torch_xla
        import tpu_trace

        from device import Device
        from train_state import TrainState

        def pending(run):
            tensors = run.tensors()
            tensors = [
                t
                for t, is_pending in zip(
                    tensors, torch_xla._XLAC._check_tensor_need_materialization(tensors)
                )
                if is_pending
            ]
            return torch_xla._XLAC._get_xla_tensors_hlo(tensors)

        with tempfile.TemporaryDirectory() as folder:
            config = load_config(
                write_config(Path(folder) / "a.yaml", SMALL),
                ["tpu.accelerator_type=v4-16", "training.pallas_kernels=false"],
            )
        dataset, _ = tpu_trace.training_puzzles(config)
        device = Device("xla_cpu")
        device.workers.rank, device.workers.world_size = 0, 8
        run = TrainState(config, device, dataset)
        run.train_step(device.put(run.host_batch(run.loader.batch(0))))
        trained = pending(run)
        device.end_step()
        traced_device = tpu_trace.TracedDevice(tpu_types.slice_type("v4-16"))
        traced = tpu_trace.traced_run(config, traced_device, dataset)
        traced_device.follow(traced)
        traced.train_step(traced_device.put(traced.host_batch(run.loader.batch(0))))
        self.assertEqual(pending(traced), trained)
        self.assertEqual(len(re.findall(r" all-reduce\(", trained)), 1)
        traced_device.end_step()
        # another run of theirs, replayed: what it gives away
        again = TrainState(config, device, dataset)
        step = again.run_step
        step(device.put(again.host_batch(run.loader.batch(0))))
        donated = [k for k, (place, _) in enumerate(step.arguments) if place in step.changed]
        parameters = len(list(traced.model.parameters()))
        # weights, their averages, three tensors of optimizer state each, the puzzle embedding; of the carry and the sums some at least
        self.assertGreater(len(donated), 5 * parameters + 1)
        self.assertEqual(traced_device.programs[0]["donated"], donated)


@unittest.skipIf(NOT_INSTALLED, f"needs the TPU compiler: {NOT_INSTALLED}")
class CompileTest(ReportTest):
    def test_a_small_configuration_alone_and_after_one_that_is_too_large(self):
        small = write_config(self.folder / "small.yaml", SMALL)
        large = write_config(
            self.folder / "large.yaml",
            SMALL.replace("global_batch_size: 32", "global_batch_size: 262144"),
        )
        status, output = self.report(
            "--config", large, small, "--accelerator", "v4-8", "--json", self.folder / "both.json"
        )
        self.assertEqual(status, 1, output)
        self.assertNotIn("Traceback", output)
        both = json.loads((self.folder / "both.json").read_text())
        self.assertEqual([report["compiles"] for report in both["reports"]], [False, True])
        self.assertRegex(
            output,
            r"large +NO: train step: does not fit: needs [\d.]+ GiB of HBM.*: set model.activation_checkpointing=true",
        )
        self.assertTrue(
            output.endswith(
                "evaluations as of Sudoku-Extreme's test split, where the dataset is not on this machine: small\n"
            ),
            output,
        )
        self.assertEqual(
            (both["judged"], both["estimated_hours"]), (1, both["reports"][1]["estimated_hours"])
        )

        status, output = self.report(
            "--config", small, "--accelerator", "v4-8", "--json", self.folder / "small.json"
        )
        self.assertEqual(status, 0, output)
        self.assertIn(
            "100 to train on (assumed: 9x9, data.expected_puzzles), 422,786 to test on (assumed: Sudoku-Extreme's)",
            output,
        )
        reports = [json.loads((self.folder / "small.json").read_text()), both["reports"][1]]
        for key in (
            "estimated_ms_per_step",
            "estimated_mfu",
            "hbm_bytes",
            "flops_per_chip_step",
            "all_reduce_bytes",
            "where",
        ):
            self.assertEqual(reports[0][key], reports[1][key], key)
        report = reports[0]
        self.assertEqual(
            (
                report["accelerator"],
                report["compiles"],
                report["error"],
                report["programs"],
                report["total_steps"],
            ),
            ("v4-8", True, None, 2, 200),
        )
        self.assertEqual(report["all_reduce_count"], 1)
        # gradients, metrics and the puzzle embedding's row with its count, float32
        self.assertAlmostEqual(
            report["all_reduce_bytes"], 4 * (report["parameters"] + 7 + 128 + 1), delta=2
        )  # and torch_xla's own token, bfloat16
        self.assertGreater(
            report["hbm_bytes"]["aliased"], 4 * 4 * report["parameters"]
        )  # weights, two moments, the average
        # the token mixing's gradient, in a kernel, computes its forward once more
        self.assertTrue(
            1.02 < report["flops_per_chip_step"] / report["model_flops_per_chip_step"] < 1.15
        )
        kernels = report["custom_calls"]["train"]["tpu_custom_call"]
        self.assertEqual(
            kernels["count"], 8 + 2
        )  # two SwiGLUs, two calls in each of two cycles; and the backward of the token mixing
        self.assertTrue(
            0
            < kernels["bound_seconds"]
            < kernels["seconds"]
            < 1e-3 * report["estimated_ms_per_step"]
        )
        self.assertTrue(0 < report["estimated_mfu"] < 1)
        # besides the kernels' own: the output head, in evaluation nothing but that; and what has a gradient, in training
        self.assertEqual(
            {products["float32"] for products in report["matrix_products"].values()}, {0}
        )
        self.assertGreater(
            report["matrix_products"]["train"]["bfloat16"],
            report["matrix_products"]["evaluation"]["bfloat16"],
        )
        self.assertGreater(report["matrix_products"]["evaluation"]["bfloat16"], 0)
        self.assertGreater(report["host_ms_per_step"], 0)
        self.assertGreater(report["estimated_hours"], 0)
        self.assertTrue(
            any(
                re.fullmatch(r"trm_model\.py:\d+", source) for _, _, source, _, _ in report["where"]
            ),
            report["where"],
        )

    def test_other_kinds_of_tpu(self):
        """One core a chip; of attention the channel mixing alone is a kernel."""
        path = write_config(self.folder / "small.yaml", SMALL)
        for accelerator, chips, peak, memory, overrides, as_kernels in (
            (
                "v6e-16",
                16,
                918e12,
                "32 GiB",
                ["model.mlp_t=false", "model.pos_encodings=rope"],
                "channel mixing",
            ),
            ("v5litepod-8", 8, 197e12, "16 GiB", [], "token mixing, channel mixing"),
        ):
            with self.subTest(accelerator):
                status, output = self.report(
                    "--config",
                    path,
                    "--accelerator",
                    accelerator,
                    "--json",
                    self.folder / "out.json",
                    *overrides,
                )
                self.assertEqual(status, 0, output)
                report = json.loads((self.folder / "out.json").read_text())
                self.assertEqual(
                    (
                        report["accelerator"],
                        report["chips"],
                        report["per_chip_batch"],
                        report["all_reduce_count"],
                    ),
                    (accelerator, chips, 32 // chips, 1),
                )
                self.assertAlmostEqual(
                    report["estimated_mfu"],
                    report["model_flops_per_chip_step"]
                    / (1e-3 * report["estimated_ms_per_step"] * peak),
                )
                kernels = report["custom_calls"]["train"]["tpu_custom_call"]
                self.assertEqual(kernels["count"], {"v6e-16": 4, "v5litepod-8": 10}[accelerator])
                self.assertTrue(0 < kernels["bound_seconds"] < kernels["seconds"])
                self.assertRegex(output, rf"HBM needed +[\d.]+ of {memory} a chip")
                self.assertRegex(output, rf"kernels +{as_kernels}\n")
        without = tpu_report.full_text(
            {**report, "in_kernel": {"token mixing": False, "channel mixing": False}}
        )
        self.assertRegex(
            without,
            r"kernels +none\n +in XLA's form +token mixing, channel mixing: .*128 MiB of VMEM",
        )

    def test_a_float32_configuration_is_multiplied_in_float32(self):
        path = write_config(self.folder / "exact.yaml", SMALL.replace("H_cycles: 2", "H_cycles: 1"))
        status, output = self.report(
            "--config",
            path,
            "--accelerator",
            "v4-8",
            "--json",
            self.folder / "out.json",
            "model.forward_dtype=float32",
        )
        self.assertEqual(status, 0, output)
        report = json.loads((self.folder / "out.json").read_text())
        self.assertNotIn(
            "tpu_custom_call",
            {target for calls in report["custom_calls"].values() for target in calls},
        )  # no kernels
        for name, products in report["matrix_products"].items():
            self.assertGreater(products["float32"], 10)
            self.assertRegex(
                output,
                rf"matrix products +{name}: 0 in bfloat16, {products['float32']} in float32 \(highest precision\)\n",
            )

    def test_activation_checkpointing_takes_less_memory(self):
        """All temporaries of the training step together are less than what a backward without it keeps of the channel mixing alone."""
        text = SMALL.replace("global_batch_size: 32", "global_batch_size: 1024").replace(
            "H_cycles: 2, L_cycles: 1", "H_cycles: 1, L_cycles: 6"
        )
        path = write_config(self.folder / "wide.yaml", text)
        status, output = self.report(
            "--config",
            path,
            "--accelerator",
            "v4-8",
            "--json",
            self.folder / "out.json",
            "model.activation_checkpointing=true",
        )
        self.assertEqual(status, 0, output)
        temporaries = json.loads((self.folder / "out.json").read_text())["hbm_bytes_by_program"][
            "train"
        ]["temporaries"]
        self.assertLess(
            temporaries, 7 * 2 * 256 * 82 * 512 * 2
        )  # calls of the block, gate and up, slots, positions, width, bytes


LOOP = """\
HloModule m, is_scheduled=true

%fused (a.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  ROOT %m.1 = f32[8]{0:T(128)} multiply(%a.1, %a.1), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %fusion.2 = f32[8]{0:T(128)S(3)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="aten__mm.3/aten__mm" source_file="/kit/trm_model.py" source_line=62 source_end_line=62}, backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %fusion.2)
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %fusion.3 = pred[] fusion(%c), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"5"}}
}

ENTRY %main.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p.1), kind=kLoop, calls=%fused, metadata={op_name="aten__mul" source_file="/elsewhere/torch/functional.py" source_line=9 source_end_line=9}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %z = s32[] constant(0)
  %t.1 = (s32[], f32[8]{0}) tuple(%z, %fusion.1)
  %while.1 = (s32[]{:T(128)}, f32[8]{0}) while(%t.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""

COUNTED = """\
HloModule m
%body (b: (u32[], u32[], f32[8])) -> (u32[], u32[], f32[8]) {
  %b = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) parameter(0)
  ROOT %t = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) fusion(%b), kind=kLoop, calls=%x, backend_config={"window_config":{"estimated_cycles":"40"}}
}
%condition (c: (u32[], u32[], f32[8])) -> pred[] {
  %c.1 = s32[]{:T(128)} constant(0)
  %c.2 = u32[]{:T(128)} constant(0)
  %c.3 = u32[]{:T(128)} constant(6)
  %c = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}, /*index=3*/f32[]) parameter(0)
  %high = u32[]{:T(128)} get-tuple-element(%c), index=1
  %sign = s32[]{:T(128)S(6)} bitcast-convert(%high)
  %negative = pred[]{:T(512)S(6)} compare(%sign, %c.1), direction=LT
  %equal = pred[]{:T(512)S(6)} compare(%high, %c.2), direction=EQ
  %low = u32[]{:T(128)} get-tuple-element(%c), index=0
  %less = pred[]{:T(512)S(6)} compare(%low, %c.3), direction=LT
  %both = pred[]{:T(512)S(6)} and(%equal, %less)
  ROOT %or = pred[]{:T(512)} or(%negative, %both)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %copy.1 = u32[]{:T(128)} copy(%zero)
  %t = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) tuple(%copy.1, %zero, %p)
  %w = (u32[]{:T(128)}, u32[]{:T(128)}, f32[8]{0}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=2
}
"""

TRACED = """\
HloModule m
%Body (b: (s64[], bf16[4,8])) -> (s64[], bf16[4,8]) {
  %b = (s64[], bf16[4,8]{1,0}) parameter(0)
  %i = s64[] get-tuple-element((s64[], bf16[4,8]{1,0}) %b), index=0
  %x = bf16[4,8]{1,0} get-tuple-element((s64[], bf16[4,8]{1,0}) %b), index=1
  %w = bf16[16,8]{1,0} constant({...})
  %d = bf16[4,16]{1,0} dot(bf16[4,8]{1,0} %x, bf16[16,8]{1,0} %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s64[], bf16[4,8]{1,0}) tuple(s64[] %i, bf16[4,8]{1,0} %x)
}
%Condition (c: (s64[], bf16[4,8])) -> pred[] {
  %c = (s64[], bf16[4,8]{1,0}) parameter(0)
  %i.1 = s64[] get-tuple-element((s64[], bf16[4,8]{1,0}) %c), index=0
  %five = s64[] constant(5)
  ROOT %l = pred[] compare(s64[] %i.1, s64[] %five), direction=LT
}
%scan (i: s64[], x: bf16[4,8]) -> (s64[], bf16[4,8]) {
  %i.2 = s64[] parameter(0)
  %x.2 = bf16[4,8]{1,0} parameter(1)
  %t.2 = (s64[], bf16[4,8]{1,0}) tuple(s64[] %i.2, bf16[4,8]{1,0} %x.2)
  ROOT %loop = (s64[], bf16[4,8]{1,0}) while((s64[], bf16[4,8]{1,0}) %t.2), condition=%Condition, body=%Body
}
ENTRY %main (p: bf16[4,8]) -> (s64[], bf16[4,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %k = bf16[4,8]{1,0} custom-call(bf16[4,8]{1,0} %p), custom_call_target="tpu_custom_call", backend_config={"custom_call_config": {"cost_estimate": {"flops": "1000", "bytes_accessed": "64"}}}
  %z = s64[] constant(0)
  ROOT %call = (s64[], bf16[4,8]{1,0}) call(s64[] %z, bf16[4,8]{1,0} %k), to_apply=%scan
}
"""

PRODUCTS = """\
HloModule m
%inner (a: f32[8,8], b: bf16[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %sum = f32[8,8]{1,0} add(%a, %a)
  ROOT %c.1 = f32[8,8]{1,0} convolution(%sum, %b), dim_labels=bf_io->bf, operand_precision={highest,highest}
}
%outer (a: f32[8,8], b: bf16[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %f.1 = f32[8,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%inner
}
%body (t: (s32[], f32[8,8], bf16[8,8])) -> (s32[], f32[8,8], bf16[8,8]) {
  %t = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %y = bf16[8,8]{1,0} get-tuple-element(%t), index=2
  %f.2 = f32[8,8]{1,0} fusion(%x, %y), kind=kOutput, calls=%outer
  ROOT %n = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%i, %f.2, %y)
}
%condition (t: (s32[], f32[8,8], bf16[8,8])) -> pred[] {
  %t = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) parameter(0)
  ROOT %p = pred[] fusion(%t), kind=kLoop, calls=%elsewhere
}
ENTRY %main (p: f32[8,8], q: bf16[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = bf16[8,8]{1,0} parameter(1)
  %d.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %d.2 = f32[8,8]{1,0} dot(%d.1, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %d.3 = bf16[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %z = s32[] constant(0)
  %t = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%z, %d.2, %d.3)
  %w = (s32[], f32[8,8]{1,0}, bf16[8,8]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%w), index=1
}
"""

CALLS = """\
HloModule m
%one (a: f32[8]) -> f32[8] {
  ROOT %f.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{"estimated_cycles":"11"}}
}
%two (a: f32[8]) -> f32[8] {
  ROOT %f.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{"estimated_cycles":"13"}}
}
%three (a: f32[8]) -> f32[8] {
  ROOT %f.3 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{"estimated_cycles":"17"}}
}
%four (a: f32[8]) -> f32[8] {
  ROOT %f.4 = f32[8]{0} fusion(%a), kind=kLoop, calls=%x, backend_config={"window_config":{"estimated_cycles":"19"}}
}
ENTRY %main (p: f32[8], s: s32[]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %s = s32[] parameter(1)
  %c = f32[8]{0} conditional(%s, %p, %p), branch_computations={%one, %two}
  %d = f32[8]{0} call(%c), to_apply=%three
  %e = ((f32[8]), f32[8], u32[]) async-start(%d), calls=%four
  ROOT %g = f32[8]{0} async-done(%e)
}
"""

REST = """\
HloModule m
ENTRY %main (p: f32[1024,256], q: f32[1024,256]) -> f32[1024,256] {
  %p = f32[1024,256]{1,0:T(8,128)} parameter(0)
  %q = f32[1024,256]{1,0:T(8,128)} parameter(1)
  %k = f32[1024,256]{1,0:T(8,128)} custom-call(%p, %q), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":2750000000,"transcendentals":0,"bytes_accessed":3145728}}}
  %o = f32[1024,256]{1,0:T(8,128)} custom-call(%k), custom_call_target="Other", backend_config={}
  %b = f32[2048,256]{1,0:T(8,128)} custom-call(%k, %o), custom_call_target="ConcatBitcast"
  %c = f32[2048,256]{1,0:T(8,128)} concatenate(%k, %o), dimensions={0}
  %cs = (f32[1024,256]{1,0:T(8,128)S(3)}, f32[1024,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %cd = f32[1024,256]{1,0:T(8,128)S(3)} copy-done(%cs)
  %ss = ((f32[1024,256]{1,0:T(8,128)}), f32[128,256]{1,0:T(8,128)S(3)}, s32[]{:S(2)}) slice-start(%p), slice={[0:128], [0:256]}
  %sd = f32[128,256]{1,0:T(8,128)S(3)} slice-done(%ss)
  ROOT %r = f32[1024,256]{1,0:T(8,128)} all-reduce(%o), replica_groups={}, to_apply=%add
}
"""


if __name__ == "__main__":
    unittest.main()
