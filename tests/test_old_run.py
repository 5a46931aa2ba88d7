"""A run folder and a checkpoint that an earlier version of this kit has written: they resume bit
for bit.

`tests/old_run/run.zip` holds a dataset, a configuration and a run that was stopped at step 33 of
60, between two records and two evaluations. `expected.json` holds what the same version got without
a stop: a digest of every tensor of the last checkpoint, the records and the final evaluation.
Neither is ever made anew: a change that this test does not pass loses the runs of everybody who has
one under way.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile

import torch

from metrics_logger import TIMING_KEYS
from tests.helpers import ROOT, FolderTest

# the same sums in the same order on every x86 processor
PLAIN_ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
ARITHMETIC = """
import hashlib, torch
x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
norm = torch.rsqrt(x.square().mean(-1, keepdim=True))
y = torch.nn.functional.silu(x @ x) * norm + torch.atan2(x, x.exp())
print(hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""
ARITHMETIC_DIGEST = "5227024fbc4a64eda7033981556c979847ff1da55071e10f6e69a57ce5e3c5a0"


def digests(tree, path=""):
    """{path in a checkpoint: digest of the tensor, or the value} without measured seconds and the
    configuration."""
    if isinstance(tree, dict):
        return {
            name: value
            for key, branch in tree.items()
            for name, value in digests(branch, f"{path}/{key}").items()
            if not name.endswith("seconds") and not name.startswith("/config/")
        }
    if isinstance(tree, (list, tuple)):
        return {
            name: value
            for key, branch in enumerate(tree)
            for name, value in digests(branch, f"{path}/{key}").items()
        }
    if isinstance(tree, torch.Tensor):
        return {path: hashlib.sha256(tree.contiguous().numpy().tobytes()).hexdigest()[:16]}
    return {path: tree}


def untimed(records):
    return [
        {key: value for key, value in record.items() if key not in TIMING_KEYS}
        for record in records
    ]


class OldRun(FolderTest):
    def python(self, *arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, **PLAIN_ARITHMETIC},
            text=True,
            timeout=300,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def test_it_resumes_bit_for_bit(self):
        if self.python("-c", ARITHMETIC).strip() != ARITHMETIC_DIGEST:
            self.skipTest("this processor, or another version of PyTorch, rounds otherwise")
        with zipfile.ZipFile(ROOT / "tests" / "old_run" / "run.zip") as archive:
            archive.extractall(self.folder)
        expected = json.loads((ROOT / "tests" / "old_run" / "expected.json").read_text())
        said = self.python(str(ROOT / "train_tpu.py"), "--config", "old.yaml")
        run = self.folder / "runs" / "old"
        self.assertIn("after step 33", said)
        last = torch.load(run / "checkpoints" / "checkpoint_step_60.pt", weights_only=True)
        self.assertEqual(digests(last), expected["checkpoint"])
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        # one record more than without the stop: --max_steps made it, of the steps from 30 to 33
        self.assertEqual(
            [r for r in untimed(records) if r["step"] not in (33, 35)],
            [r for r in untimed(expected["metrics"]) if r["step"] != 35],
        )
        final = json.loads((run / "eval.json").read_text())
        self.assertEqual(untimed(final["results"]), untimed(expected["eval"]["results"]))
