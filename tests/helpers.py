"""What several test files share: temporary folders, tiny configurations and datasets, the command
in a process."""

import atexit
import functools
import importlib.util
import json
import os
import random
import re
import sys
import tempfile
import unittest
from pathlib import Path

# For every process that the tests start. The models are tiny, so on a busy machine waiting for a
# second thread takes many times as long as the work. XLA takes longer to compile a program than to
# run it, and its newer code generator takes twice as long as the older one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
import numpy as np
import torch

import sudoku
from metrics_logger import TIMING_KEYS
from tests.processes import Process, run
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
WITH_KIT = {"PYTHONPATH": str(ROOT)}  # for programs elsewhere that import the kit


class ContentTest(unittest.TestCase):
    """Tests that compare what checkpoints hold."""

    def same_content(self, ours, theirs, path="checkpoint"):
        """Assert that both are equal bit for bit, except measured seconds and the output folder."""
        self.assertIs(type(ours), type(theirs), path)
        if isinstance(ours, dict):
            self.assertEqual(list(ours), list(theirs), path)
            for key in set(ours) - {"train_seconds", "interval_seconds", "output_dir"}:
                self.same_content(ours[key], theirs[key], f"{path}.{key}")
        elif isinstance(ours, (list, tuple)):
            self.assertEqual(len(ours), len(theirs), path)
            for k, pair in enumerate(zip(ours, theirs)):
                self.same_content(*pair, f"{path}[{k}]")
        elif isinstance(ours, torch.Tensor):
            self.assertTrue(ours.dtype == theirs.dtype and torch.equal(ours, theirs), path)
        else:
            self.assertEqual(ours, theirs, path)


class FolderTest(ContentTest):
    """A test with a folder of its own, self.folder."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)

    def user_error(self, function, *says):
        """Assert that `function()` raises UserError with each of `says` in its message.

        Returns the message.
        """
        with self.assertRaises(UserError) as caught:
            function()
        for text in says:
            self.assertIn(text, str(caught.exception))
        return str(caught.exception)


class XLATest(unittest.TestCase):
    """Tests on torch_xla's CPU device, `self.device`, each in a process of its own.

    PyTorch's autograd engine counts the devices at the first backward of a process, and fails on
    one that is registered later.
    """

    def run(self, result=None):
        if os.environ.get("TRM_TEST_PROCESS") != self.id():
            self.setUp, method = self.skip_without_torch_xla, self.in_own_process
            setattr(self, self._testMethodName, method)
        else:
            import torch_xla

            self.device = str(torch_xla.device())
        return super().run(result)

    def skip_without_torch_xla(self):
        if importlib.util.find_spec("torch_xla") is None:
            self.skipTest("torch_xla is not installed here")

    def in_own_process(self):
        environment = {"PJRT_DEVICE": "CPU", "TRM_TEST_PROCESS": self.id()}
        command = [sys.executable, "-m", "unittest", self.id()]
        output = run(self, command, seconds=600, environment=environment)
        self.assertIn("Ran 1 test", output)
        if skipped := re.search(r"^OK \(skipped=1\)", output, re.MULTILINE):
            self.skipTest(f"{skipped[0]} in its own process: {output}")


def write_config(path, text="data: {dataset_path: nowhere}\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def random_pairs(size, count, seed=0, clue_share=0.5):
    """`count` puzzles and their solutions in a dataset's codes (1 empty, 2.. digits).

    Each is [count, S] uint8. A puzzle may have more than one solution, which these tests allow.
    """
    stream = np.random.Generator(np.random.Philox(seed))
    solution = np.frombuffer(sudoku.random_solution(size, random.Random(seed)), np.uint8)
    grid = solution[None].repeat(count, 0)
    draws = stream.bit_generator.random_raw(count)
    _, solutions = sudoku.SudokuAugmenter(size)(sudoku.paired(grid, grid), draws)
    labels = solutions + np.uint8(1)
    return np.where(stream.random(labels.shape) < clue_share, labels, 1).astype(np.uint8), labels


def write_split(folder, inputs, labels, group_sizes=None, ratings=None):
    """One split in the layout of scripts/build_sudoku_dataset.py.

    Every group has its own puzzle identifier, by which tests recognise it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    count, cells = inputs.shape
    group_sizes = [1] * count if group_sizes is None else group_sizes
    arrays = {
        "inputs": inputs,
        "labels": labels,
        "puzzle_identifiers": np.repeat(np.arange(len(group_sizes), dtype=np.int32), group_sizes),
        "puzzle_indices": np.arange(count + 1, dtype=np.int32),
        "group_indices": np.cumsum([0, *group_sizes]).astype(np.int32),
        **({} if ratings is None else {"ratings": np.asarray(ratings, np.int32)}),
    }
    for name, array in arrays.items():
        np.save(folder / f"all__{name}.npy", array)
    meta = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": round(cells**0.5) + 2,
        "seq_len": cells,
        "num_puzzle_identifiers": len(group_sizes),
        "total_groups": len(group_sizes),
        "mean_puzzle_examples": 1,
        "total_puzzles": len(group_sizes),
        "sets": ["all"],
    }
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


TINY = """\
device: cpu
tpu: {{accelerator_type: v4-8}}
data: {{dataset_path: {data}}}
model:
  {{hidden_size: 32, H_cycles: 2, L_cycles: 1, num_heads: 2, puzzle_emb_ndim: 32, puzzle_emb_len: 1,
    halt_max_steps: 3, forward_dtype: float32}}
training: {{global_batch_size: 8, epochs: 6, lr: 1e-2, lr_warmup_steps: 10, ema_rate: 0.9}}
checkpoint: {{interval_steps: 7}}
logging: {{output_dir: {out}, interval_steps: 5, tensorboard: false}}
evaluation: {{interval_epochs: 2, batch_size: 16, max_examples: 20}}
"""


@functools.cache
def command_server():
    """The process of tests/programs/command_server.py, one for this test process."""
    command = [sys.executable, "-m", "tests.programs.command_server"]
    process = Process(command, feed=True, stderr=None)
    atexit.register(process.end)
    return process


def run_command(args, environment, driver=None, seconds=300):
    """(output, exit status) of train_tpu.py, or of `driver`, with these arguments and variables."""
    server = command_server()
    with tempfile.NamedTemporaryFile() as file:
        request = {"args": args, "environment": environment, "output": file.name, "driver": driver}
        server.feed(json.dumps(request))
        try:
            status = int(server.line(seconds))
        except AssertionError:
            server.end()
            command_server.cache_clear()
            raise AssertionError(f"{args} still runs: {file.read().decode()}") from None
        return file.read().decode(), status


class CommandTest(ContentTest):
    """Tests of the command itself, in real processes.

    They have 80 training, 50 test and 10 val puzzles of 4x4. A training has 60 steps of batch 8,
    an evaluation every 20 steps, a checkpoint every 7 and a record every 5.
    """

    @classmethod
    def setUpClass(cls):
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        cls.folder = Path(holder.name)
        build = [sys.executable, "scripts/build_sudoku_dataset.py", "--generate", "--size", "4"]
        build += ["--num_train", "90", "--num_test", "50", "--val_size", "10", "--clues", "5", "9"]
        build += ["--output_dir", str(cls.folder / "data")]
        run(cls, build)
        cls.config = write_config(
            cls.folder / "tiny.yaml", TINY.format(data=cls.folder / "data", out=cls.folder / "runs")
        )

    def train(self, *args, status=0, driver=None, **options):
        """Run the command on the tiny configuration; returns its stdout and stderr as one text.

        driver: a program that runs in place of train_tpu.py, and its own arguments. `options`:
        those of a new process, in tests/processes.py.
        """
        program, *own = driver or [None]
        args = list(map(str, [*own, "--config", self.config, *args]))
        if options:
            command = [sys.executable, program or "train_tpu.py", *args]
            return run(self, command, status, environment=WITH_KIT, **options)
        output, returncode = run_command(args, {**os.environ, **WITH_KIT}, program)
        self.assertEqual(returncode, status, output)
        return output

    def user_mistake(self, *args, says=(), **options):
        """Assert that the command ends with status 2 and one error line with each of `says`.

        Returns its output.
        """
        output = self.train(*args, status=2, **options)
        self.says_once(output, says)
        return output

    def says_once(self, output, says):
        """Assert that exactly one line begins with `error:`, and that it holds each of `says`."""
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        self.assertEqual(len(errors), 1, output)
        self.assertNotIn("Traceback", output)
        for text in says:
            self.assertIn(text, errors[0])

    def records(self, run_name, timing=False):
        """The run's metrics.jsonl, without what differs between two runs of the same training."""
        lines = (self.folder / "runs" / run_name / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if timing or k not in TIMING_KEYS}
            for line in lines
        ]

    def checkpoint(self, run_name, step):
        return self.folder / "runs" / run_name / "checkpoints" / f"checkpoint_step_{step}.pt"
