"""analysis/compare_with_original.py: a log of the original code beside a real run's records."""

import csv
import subprocess
import sys
import unittest

import numpy as np
import pandas as pd

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
        """[{column: value}] of every step, scattered about the records' means.

        As the original's: a step that finishes no puzzle has 0 in all columns of finished ones,
        train/count is 1 or 0, and an evaluation is in the row of its step, whose time it takes.
        """
        evaluations = dict(
            zip(self.trained.evaluations.step, self.trained.evaluations.exact_accuracy)
        )
        rows, step, runtime, last = [{"_step": 0, "num_params": 5}], 0, 0.0, 0
        stream = np.random.default_rng(0)
        for record in self.records:
            steps, last = record["step"] - last, record["step"]
            for k in range(steps):
                step, runtime = step + 1, runtime + 1 / record["steps_per_second"]
                place = k % 4 if k < steps - 1 else 2
                if place == 0:
                    shift = stream.uniform(0.1, 0.3)
                # two rows have the record's mean, a third has it alone, the fourth no puzzle
                factor = {0: 1 + shift, 1: 1 - shift}.get(place, 1.0)
                row = {"_step": step, "_runtime": runtime, "train/count": float(place < 3)}
                for column in LOGGED:
                    finished = KEYS[column].over == "finished"
                    row[column] = record[KEYS[column].key] * factor * (place < 3 or not finished)
                if step in evaluations:
                    row["all.exact_accuracy"] = evaluations[step]
                    row["_runtime"] += 50  # how much of its time this row has, is not known
                    runtime += 100
                rows.append(row)
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
        table = table[(table.quantity != "test exact accuracy") | (table.step < 500)]
        np.testing.assert_allclose(table.original, table.ours, rtol=1e-9)
        np.testing.assert_allclose(table.difference, 0, atol=1e-9)
        sizes = table.groupby("quantity").size().to_dict()
        self.assertEqual(sizes.pop("test exact accuracy"), 9)
        self.assertEqual(set(sizes.values()), {20})

    def test_the_last_evaluation_is_of_all_puzzles(self):
        """Ours on the way are of fewer; the one at the end is that of eval.json."""
        table = self.table(self.rows())
        (row,) = table[(table.quantity == "test exact accuracy") & (table.step == 500)].to_dict(
            "records"
        )
        final = self.trained.final()
        self.assertEqual((final["count"], row["ours"]), (1000, final["exact_accuracy"]))
        self.assertEqual(row["original"], self.trained.evaluations.exact_accuracy.iloc[-1])
        self.assertNotEqual(row["original"], row["ours"])

    def test_without_a_count(self):
        """Steps that finish no puzzle are told by train/steps; without it, nothing can be said."""
        rows = self.rows()
        for row in rows:
            row.pop("train/count", None)
        table = self.table(rows)
        accuracy = table[table.quantity == "cell accuracy"]
        self.assertEqual(len(accuracy), 20)
        np.testing.assert_allclose(accuracy.original, accuracy.ours, rtol=1e-9)
        for row in rows:
            row.pop("train/steps", None)
        self.assertNotIn("cell accuracy", set(self.table(rows).quantity))

    def test_differences(self):
        """Of another size, without a column, of every third step, and longer than our run."""
        rows = self.rows()
        for row in rows:
            row.pop("train/q_halt_loss", None)
            if "train/grad_norm" in row:
                row["train/grad_norm"] *= 2
                row["train/accuracy"] *= 0.5
        table = self.table(rows)
        ratios = (table.ours / table.original).groupby(table.quantity).median()
        self.assertNotIn("halting loss", ratios)
        self.assertAlmostEqual(ratios["gradient norm"], 0.5)
        self.assertAlmostEqual(ratios["cell loss"], 1)
        accuracy = table[table.quantity == "cell accuracy"]
        np.testing.assert_allclose(accuracy.difference, accuracy.ours / 2)
        lines = compare_with_original.lines(compare_with_original.summarised(table))
        (line,) = [line for line in lines if line.startswith("gradient norm")]
        self.assertRegex(line, r"25-500 .* ratio +0\.500 \(0\.500 to 0\.500, 20\)")
        (line,) = compare_with_original.not_compared(table)
        self.assertIn("halting loss (train/q_halt_loss, q_halt_loss), peak memory", line)
        sampled = [
            row
            for row in rows[1:]
            if row["_step"] % 3 == 0 or row.get("all.exact_accuracy") is not None
        ]
        sampled += [{**sampled[-1], "_step": step} for step in range(501, 600)]
        table = self.table(sampled)
        self.assertEqual(table.step.max(), 500)
        rate = table[table.quantity == "steps per second"]
        # a sampled interval begins in the one before, whose speed is another
        np.testing.assert_allclose(rate.original, rate.ours, rtol=0.2)

    def test_command(self):
        log, out = self.write(self.rows()), self.folder / "out"
        output = self.command(
            "compare_with_original.py", "--log", log, "--run", RUN, "--out", out
        ).splitlines()
        self.assertRegex(output[0], r"^ +steps +original +this kit +ours against the original")
        self.assertRegex(output[1], r"^cell loss .* ratio +1\.000 \(1\.000 to 1\.000, 20\)$")
        self.assertRegex(output[5], r"^exact accuracy .* difference \+0\.000 \([+-]0\.000 to ")
        self.assertIn("original, key of ours): peak memory (bytes) (train/peak", output[-2])
        self.assertRegex(output[-1], r"with_original\.png: 10 quantities$")
        names = {path.name for path in out.iterdir()}
        files = {f"with_original.{kind}" for kind in ("png", "pdf", "csv")}
        self.assertEqual(names, files | {"with_original_summary.csv"})
        summary = pd.read_csv(out / "with_original_summary.csv").set_index("quantity")
        self.assertEqual(
            list(summary.compared[["cell loss", "cell accuracy"]]), ["ratio", "difference"]
        )
        self.assertAlmostEqual(summary["median"]["cell loss"], 1)
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
            (
                self.write(rows[:1], "c.csv"),
                RUN,
                "no column train/lm_loss (it has _step, num_params)",
            ),
            (self.write([{**rows[1], "_step": "x"}], "d.csv"), RUN, "no row has numbers in both"),
            (ROOT / "docs/images/solve.gif", RUN, "solve.gif: not readable as CSV"),
            (self.write(late, "b.csv"), RUN, "those of " + str(RUN) + ", 25 to 500, have none in"),
            (good, samples, "name one of them"),
            (good, self.folder, "there is no run here"),
        ):
            with self.subTest(says):
                flags = ("--log", log, "--run", run, "--out", self.folder / "out")
                self.mistake(says, compare_with_original, *flags)
        self.assertFalse((self.folder / "out").exists())

    def test_a_mistake_in_a_process_of_its_own(self):
        done = subprocess.run(
            [sys.executable, "analysis/compare_with_original.py", "--log", "nowhere.csv"]
            + ["--run", str(RUN), "--out", str(self.folder / "out")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertRegex(done.stderr, r"\Aerror: --log nowhere\.csv: not readable as CSV .*\n\Z")


if __name__ == "__main__":
    unittest.main()
