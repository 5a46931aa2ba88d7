"""A run from its dataset to its result, once: trained, killed, resumed and evaluated."""

import json
import signal
import sys
import unittest

from tests.helpers import CommandTest
from tests.processes import begin


class EndToEnd(CommandTest):
    def test_trained_killed_resumed_evaluated(self):
        run = self.folder / "runs" / "tiny"
        process = begin(self, [sys.executable, "train_tpu.py", "--config", self.config])
        process.until(self.checkpoint("tiny", 14).with_suffix(".json").exists, 120)
        process.send_signal(signal.SIGKILL)
        process.ends(-signal.SIGKILL)
        self.assertFalse((run / "eval.json").exists())

        output = self.train()
        self.assertRegex(output, r"after step (14|21|28|35|42|49|56):")
        self.assertIn("step 60 of 60: finished", output)
        records = self.records("tiny")
        steps = [record["step"] for record in records if record["split"] == "train"]
        self.assertEqual(steps, list(range(5, 61, 5)))
        final = json.loads((run / "eval.json").read_text())["results"]
        self.assertEqual([(r["weights"], r["count"]) for r in final], [("ema", 50), ("raw", 50)])

        (run / "eval.json").unlink()
        self.train("--eval_only", "--checkpoint", "latest", "evaluation.batch_size=7")
        again = json.loads((run / "eval.json").read_text())["results"]
        for key in ("weights", "step", "count", "exact_accuracy", "solved"):
            self.assertEqual([r[key] for r in again], [r[key] for r in final])


if __name__ == "__main__":
    unittest.main()
