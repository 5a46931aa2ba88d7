"""analysis/compare_with_original.py: a log of the original code beside a real run's records."""

import csv
import sys
import unittest

import numpy as np

from tests.helpers import ROOT
from tests.test_analysis import AnalysisCommandTest
from tests.test_analysis_figures import check_legible

sys.path.insert(0, str(ROOT / "analysis"))
import compare_with_original
from results import load_runs

RUN = ROOT / "analysis" / "sample_results" / "mini_e1_1_seed0"
KEYS = {q.column: q for q in compare_with_original.QUANTITIES}
LOGGED = [
    column
    for column in KEYS
    if column.startswith("train/") and column != "train/peak_memory_bytes"  # none on a CPU
]


class Logs(AnalysisCommandTest):
    """The log is made of our own records: a row for each step, whose means are theirs."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        (cls.trained,) = load_runs(RUN)
        cls.records = [r for r in cls.trained.records if r["split"] == "train"]

    def rows(self):
        """[{column: value}] of every step, scattered about the records' means."""
        rows, step, runtime, last = [], 0, 0.0, 0
        stream = np.random.default_rng(0)
        for record in self.records:
            steps, last = record["step"] - last, record["step"]
            for k in range(steps):
                step, runtime = step + 1, runtime + 1 / record["steps_per_second"]
                weight = 10.0 * (1 + k % 2)  # puzzles that the step has finished
                row = {"_step": step, "_runtime": runtime, "train/count": weight}
                # the values of a pair of steps have the record's mean, weighted where it must be
                if k % 2 == 0:
                    shift = 0 if k == steps - 1 else stream.uniform(0.1, 0.3)
                for column in LOGGED:
                    share = 0.5 if KEYS[column].of_halted and k % 2 else 1.0
                    sign = -share if k % 2 else 1.0
                    row[column] = record[KEYS[column].key] * (1 + sign * shift)
                rows.append(row)
        for step, accuracy in zip(
            self.trained.evaluations.step, self.trained.evaluations.exact_accuracy
        ):
            rows.append({"_step": step, "all.exact_accuracy": accuracy})
        return rows

    def write(self, rows, name="original.csv"):
        path = self.folder / name
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        return path

    def table(self, rows):
        log = compare_with_original.read_log(str(self.write(rows)))
        return compare_with_original.side_by_side(log, self.trained)

    def test_the_same_training_is_the_same(self):
        table = self.table(self.rows())
        titles = [q.title for q in KEYS.values() if q.title != "peak memory (bytes)"]
        self.assertEqual(list(table.quantity.unique()), [*titles, "test exact accuracy"])
        np.testing.assert_allclose(table.original, table.ours, rtol=1e-9)
        self.assertEqual(set(table.groupby("quantity").size()), {20, 10})

    def test_differences(self):
        """Of another size, without a column, of every third step, and longer than our run."""
        rows = self.rows()
        for row in rows:
            row.pop("train/q_halt_loss", None)
            if "train/grad_norm" in row:
                row["train/grad_norm"] *= 2
        table = self.table(rows)
        ratios = (table.ours / table.original).groupby(table.quantity).median()
        self.assertNotIn("halting loss", ratios)
        self.assertAlmostEqual(ratios["gradient norm"], 0.5)
        self.assertAlmostEqual(ratios["cell loss"], 1)
        lines = compare_with_original.summary(table)
        (line,) = [line for line in lines if line.startswith("gradient norm")]
        self.assertRegex(line, r"25-500 .* 0\.500   0\.500 to 0\.500 \(20\)")
        sampled = [row for row in rows if row["_step"] % 3 == 0 and "train/lr" in row]
        sampled += [{**sampled[-1], "_step": step} for step in range(501, 600)]
        table = self.table(sampled)
        self.assertEqual(table.step.max(), 500)
        rate = table[table.quantity == "steps per second"]
        np.testing.assert_allclose(rate.original, rate.ours, rtol=1e-6)

    def test_command(self):
        log, out = self.write(self.rows()), self.folder / "out"
        output = self.command(
            "compare_with_original.py", "--log", log, "--run", RUN, "--out", out
        ).splitlines()
        self.assertRegex(output[0], r"^ +steps +original +this kit +ratio")
        self.assertRegex(output[1], r"^cell loss +25-500 .* 1\.000   1\.000 to 1\.000 \(20\)$")
        self.assertRegex(output[-1], r"with_original\.png: 10 quantities$")
        names = {path.name for path in out.iterdir()}
        self.assertEqual(names, {f"with_original.{kind}" for kind in ("png", "pdf", "csv")})
        table = self.table(self.rows())
        check_legible(self, {"with_original": compare_with_original.figure(table)})

    def test_mistakes(self):
        rows = self.rows()
        late = [{**row, "_step": row["_step"] + 10_000} for row in rows]
        empty = self.folder / "empty.csv"
        empty.write_text("")
        no_step = [{"step": 1, "train/lm_loss": 1.0}]
        good, samples = self.write(rows), RUN.parent
        for log, run, says in (
            (self.folder / "nowhere.csv", RUN, "nowhere.csv: not readable as CSV (No such file"),
            (empty, RUN, "not readable as CSV (No columns"),
            (self.write(no_step, "a.csv"), RUN, "no column _step (it has step, train/lm_loss)"),
            (self.write(late, "b.csv"), RUN, "those of " + str(RUN) + ", 25 to 500, have none in"),
            (good, samples, "name one of them"),
            (good, self.folder, "there is no run here"),
        ):
            with self.subTest(says):
                flags = ("--log", log, "--run", run, "--out", self.folder / "out")
                self.mistake(says, compare_with_original, *flags)
        self.assertFalse((self.folder / "out").exists())


if __name__ == "__main__":
    unittest.main()
