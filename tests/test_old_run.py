"""A run folder and a checkpoint that an earlier version of this kit has written: they resume bit
for bit.

`tests/old_run/run.zip` holds a dataset, a configuration and a run that was stopped at step 33 of
60, between two records and two evaluations. `expected_PROCESSOR.json` holds what that version got
from there on a kind of processor: a digest of every tensor of the last checkpoint, the records and
the final evaluation. Processors round differently, and on one of another kind only the records are
compared, roughly. None of these files is ever made anew: a change that this test does not pass
loses the runs of everybody who has one under way.
"""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import torch

from metrics_logger import TIMING_KEYS
from tests.helpers import ROOT, FolderTest
from tests.processes import run

# so that the instructions that one processor has and the next has not make no difference
PLAIN_ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
# AdamATan2's first updates follow the sign of a gradient, so that one bit may move a weight by a
# whole learning rate; 2e-7 was seen between the two processors.
ELSEWHERE = 0.01


def processor():
    """The kind of this machine's processor, as in the names of the files, or "another"."""
    text = Path("/proc/cpuinfo").read_text()
    if "GenuineIntel" in text and " avx512f " in text:
        return "intel_avx512"
    return "amd_avx2" if "AuthenticAMD" in text and " avx512f " not in text else "another"


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
    """Without measured times, and without what the stop changes: the record at it, and the next
    one, which is of fewer steps."""
    return [
        {key: value for key, value in record.items() if key not in TIMING_KEYS}
        for record in records
        if record["step"] not in (33, 35)
    ]


class OldRun(FolderTest):
    def python(self, *arguments):
        command = [sys.executable, *arguments]
        return run(self, command, cwd=self.folder, environment=PLAIN_ARITHMETIC)

    def test_it_resumes_bit_for_bit(self):
        with zipfile.ZipFile(ROOT / "tests" / "old_run" / "run.zip") as archive:
            archive.extractall(self.folder)
        self.assertIn(
            "after step 33", self.python(str(ROOT / "train_tpu.py"), "--config", "old.yaml")
        )
        run = self.folder / "runs" / "old"
        recorded = ROOT / "tests" / "old_run" / f"expected_{processor()}.json"
        same = recorded.exists()
        if not same:
            recorded = recorded.with_name("expected_amd_avx2.json")
        expected = json.loads(recorded.read_text())
        last = torch.load(run / "checkpoints" / "checkpoint_step_60.pt", weights_only=True)
        ours, theirs = digests(last), expected["checkpoint"]
        self.assertEqual(ours if same else ours.keys(), theirs if same else theirs.keys())
        for ours, theirs in (
            (self.records(run), expected["metrics"]),
            (json.loads((run / "eval.json").read_text())["results"], expected["eval"]["results"]),
        ):
            for our, their in zip(untimed(ours), untimed(theirs), strict=True):
                if same:  # what a later version writes besides is left out
                    self.assertEqual({name: our[name] for name in their}, their)
                self.assertEqual(our["step"], their["step"])
                for name in ("lm_loss", "q_halt_loss"):
                    self.assertAlmostEqual(our[name] / their[name], 1, delta=ELSEWHERE)

    def records(self, run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(f"[{','.join(lines)}]")
