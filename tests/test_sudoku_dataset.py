"""Datasets built by scripts/build_sudoku_dataset.py: content, refusals, interruptions."""

import contextlib
import csv
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "build_sudoku_dataset.py"

sys.path.insert(0, str(ROOT))
import dataset_files
import sudoku_copies
import sudoku_sources

import sudoku
from tests.helpers import random_pairs
from utils import run_cli

spec = importlib.util.spec_from_file_location("build_sudoku_dataset", SCRIPT)
from tests.processes import begin, descendants, pause

script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SMALL = ["--generate", "--size", "4", "--num_train", "30", "--num_test", "10", "--num_workers", "1"]


def build(*arguments):
    """Run the script in this process, by default without others: (status, stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["build", "--num_workers", "1", *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            run_cli(script.main)
        except SystemExit as stop:
            return stop.code or 0, stdout.getvalue(), stderr.getvalue()


def load(folder):
    return {
        path.stem.removeprefix("all__"): np.load(path) for path in Path(folder).glob("all__*.npy")
    }


def fingerprint(folder):
    """Hash of every array; also fails where build_info.json and the arrays disagree."""
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).glob("*/*.npy"))
    }
    assert found == json.loads((Path(folder) / "build_info.json").read_text())["sha256"]
    return found


class Folder(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        self.out = self.folder / "out"

    def built(self, *arguments, out=None):
        out = out or self.out
        folders = [out] if isinstance(out, Path) else out
        status, stdout, stderr = build("--output_dir", *folders, *arguments)
        self.assertEqual(status, 0, stderr)
        return stdout

    def check_nested(self, *source):
        """Subsets of 3 and 6 train puzzles are parts of the whole; other splits are the same."""
        subsets = [self.folder / "3", self.folder / "6"]
        self.built(*source)
        self.built(*source, "--subsample_size", 3, 6, out=subsets)
        folders = [*subsets, self.out]
        few, more, whole = (
            {row.tobytes() for row in load(folder / "train")["inputs"]} for folder in folders
        )
        self.assertEqual((len(few), len(more)), (3, 6))
        self.assertTrue(few < more < whole)
        hashes = [fingerprint(folder) for folder in folders]
        for name in hashes[0]:
            same = len({of_one[name] for of_one in hashes}) == 1
            self.assertTrue(same or name.startswith("train/"), name)

    def refused(self, *arguments, says=()):
        status, stdout, stderr = build("--output_dir", self.out, *arguments)
        self.assertEqual(status, 2, stdout + stderr)
        for text in says:
            self.assertIn(text, stderr)
        return stderr


class Layout(Folder):
    def check_split(self, split, size, puzzles, group):
        arrays, cells = load(self.out / split), size * size
        rows = puzzles * group
        metadata = json.loads((self.out / split / "dataset.json").read_text())
        self.assertEqual(
            metadata,
            {
                "pad_id": 0,
                "ignore_label_id": 0,
                "blank_identifier_id": 0,
                "vocab_size": size + 2,
                "seq_len": cells,
                "num_puzzle_identifiers": 1,
                "total_groups": puzzles,
                "mean_puzzle_examples": 1,
                "total_puzzles": puzzles,
                "sets": ["all"],
            },
        )
        self.assertEqual(
            {name: (array.dtype.name, array.shape) for name, array in arrays.items()},
            {
                "inputs": ("uint8", (rows, cells)),
                "labels": ("uint8", (rows, cells)),
                "puzzle_identifiers": ("int32", (rows,)),
                "puzzle_indices": ("int32", (rows + 1,)),
                "group_indices": ("int32", (puzzles + 1,)),
                "ratings": ("int32", (rows,)),
            },
        )
        self.assertFalse(arrays["puzzle_identifiers"].any())
        self.assertEqual(arrays["puzzle_indices"].tolist(), list(range(rows + 1)))
        self.assertEqual(arrays["group_indices"].tolist(), list(range(0, rows + 1, group)))
        puzzle, solution = arrays["inputs"] - 1, arrays["labels"] - 1
        self.assertTrue(sudoku.is_solved(solution).all())
        self.assertTrue(((puzzle == 0) | (puzzle == solution)).all())
        for row in range(rows):
            solved = sudoku.solve(puzzle[row])
            self.assertEqual(len(solved.solutions), 1)
            if row % group == 0:
                self.assertEqual(solved.guesses, arrays["ratings"][row])
        return arrays

    def test_generated_sizes(self):
        for size, clues in [(4, ["min"]), (6, ["12", "18"]), (9, ["30", "40"])]:
            self.built(
                "--generate",
                "--size",
                size,
                "--num_train",
                20,
                "--num_test",
                10,
                "--val_size",
                5,
                "--clues",
                *clues,
                "--overwrite",
            )
            self.assertEqual(json.loads((self.out / "identifiers.json").read_text()), ["<blank>"])
            self.assertEqual(
                sorted(os.listdir(self.out)),
                ["build_info.json", "identifiers.json", "test", "train", "val"],
            )
            for split, puzzles in [("train", 15), ("test", 10), ("val", 5)]:
                arrays = self.check_split(split, size, puzzles, 1)
                if clues != ["min"]:
                    given = (arrays["inputs"] > 1).sum(1)
                    self.assertTrue(
                        (given >= int(clues[0])).all() and (given <= int(clues[1])).all()
                    )
                    self.assertGreater(len(set(given)), 1)
            fingerprint(self.out)
        self.assertEqual(os.listdir(self.folder), ["out"])

    def test_augmented_groups(self):
        for size in (6, 9):
            self.built(
                "--generate",
                "--size",
                size,
                "--num_train",
                6,
                "--num_test",
                3,
                "--num_aug",
                4,
                "--clues",
                15 if size == 6 else 32,
                20 if size == 6 else 40,
                "--overwrite",
            )
            arrays = self.check_split("train", size, 6, 5)
            self.check_split("test", size, 3, 1)
            for first in range(0, 30, 5):
                group = arrays["inputs"][first : first + 5]
                self.assertEqual(len(np.unique(group, axis=0)), 5)
                self.assertEqual(len(set((group > 1).sum(1))), 1)
                # A symmetry keeps how often each digit occurs, up to the names of the digits.
                profiles = [sorted(np.bincount(row, minlength=size + 2)[2:]) for row in group]
                self.assertTrue(all(profile == profiles[0] for profile in profiles))
                self.assertEqual(len(set(arrays["ratings"][first : first + 5])), 1)

    def test_splits_share_nothing_though_4x4_grids_are_few(self):
        self.built(
            "--generate", "--size", 4, "--num_train", 300, "--num_test", 50, "--val_size", 25
        )
        splits = [load(self.out / name) for name in ("train", "test", "val")]
        for key in ("inputs", "labels"):
            sets = [{row.tobytes() for row in split[key]} for split in splits]
            self.assertEqual(sum(map(len, sets)), len(set().union(*sets)))
            if key == "inputs":
                self.assertEqual([len(s) for s in sets], [275, 50, 25])

    def test_subsamples_are_nested(self):
        self.check_nested(*SMALL, "--val_size", 5)

    def test_min_guesses(self):
        self.built("--generate", "--num_train", 3, "--num_test", 2, "--min_guesses", 4)
        for split in ("train", "test"):
            for row, rating in zip(
                load(self.out / split)["inputs"], load(self.out / split)["ratings"]
            ):
                self.assertEqual(sudoku.solve(row - 1).guesses, rating)
                self.assertGreaterEqual(rating, 4)

    def test_seed_decides_and_processes_do_not(self):
        arguments = ["--generate", "--size", 6, "--num_train", 90, "--num_test", 30]
        arguments += ["--num_aug", 2, "--val_size", 10]
        hashes = []
        for seed, workers in [(5, 1), (5, 3), (6, 1)]:
            out = self.folder / f"{seed}-{workers}"
            self.built(*arguments, "--seed", seed, "--num_workers", workers, out=out)
            hashes.append(fingerprint(out))
        self.assertEqual(hashes[0], hashes[1])
        self.assertNotEqual(hashes[0]["train/all__inputs.npy"], hashes[2]["train/all__inputs.npy"])

    def test_the_command(self):
        command = [sys.executable, SCRIPT, "--output_dir", self.out, *SMALL]
        run = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertRegex(run.stdout, r"\ndone in \S+ s: .*/out\n\Z")
        fingerprint(self.out)


class FromCsv(Folder):
    @classmethod
    def setUpClass(cls):
        rows = sudoku_sources.generate_chunk((9, [30, 40], 0, 0, 60))
        cls.rows = [
            ["made", sudoku.format_grid(p), sudoku.format_grid(s), str(i)]
            for i, (p, s, _) in enumerate(rows)
        ]

    def write(self, name, rows, header=("source", "question", "answer", "rating")):
        path = self.folder / name
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    def sources(self, train=None, test=None):
        return [
            "--train_csv",
            self.write("train.csv", self.rows[:40] if train is None else train),
            "--test_csv",
            self.write("test.csv", self.rows[40:] if test is None else test),
            "--num_workers",
            1,
        ]

    def expected(self, rows, column):
        return [(sudoku.parse(row[column]) + 1).tolist() for row in rows]

    def test_rows_arrive_as_they_are(self):
        self.built(*self.sources())
        for split, rows in [("train", self.rows[:40]), ("test", self.rows[40:])]:
            arrays = load(self.out / split)
            self.assertEqual(arrays["inputs"].tolist(), self.expected(rows, 1))
            self.assertEqual(arrays["labels"].tolist(), self.expected(rows, 2))
            self.assertEqual(arrays["ratings"].tolist(), [int(row[3]) for row in rows])

    def test_subsample_val_and_difficulty(self):
        self.built(
            *self.sources(),
            "--subsample_size",
            12,
            "--val_size",
            8,
            "--min_difficulty",
            5,
            "--seed",
            3,
        )
        train, val, test = (load(self.out / name) for name in ("train", "val", "test"))
        self.assertEqual(
            (len(train["inputs"]), len(val["inputs"]), len(test["inputs"])), (12, 8, 20)
        )
        self.assertTrue(min(train["ratings"].min(), val["ratings"].min()) >= 5)
        ratings = [
            set(split["ratings"].tolist()) for split in (train, val, test)
        ]  # here the row numbers
        self.assertFalse(ratings[0] & ratings[1])
        self.assertTrue(ratings[0] | ratings[1] <= set(range(40)))
        self.assertEqual(ratings[2], set(range(40, 60)))
        self.built(
            *self.sources(),
            "--subsample_size",
            12,
            "--val_size",
            8,
            "--min_difficulty",
            5,
            "--seed",
            4,
            "--overwrite",
        )
        self.assertNotEqual(ratings[0], set(load(self.out / "train")["ratings"].tolist()))
        self.built(*self.sources(), "--min_difficulty", 5, "--overwrite")
        self.assertEqual(load(self.out / "train")["ratings"].tolist(), list(range(5, 40)))
        self.refused(
            *self.sources(),
            "--subsample_size",
            41,
            "--overwrite",
            says=["--subsample_size 41", "only 40"],
        )
        self.refused(
            *self.sources(), "--val_size", 41, "--overwrite", says=["--val_size 41", "only 40"]
        )
        self.refused(
            *self.sources(), "--min_difficulty", 99, "--overwrite", says=["--min_difficulty"]
        )

    def test_several_subsamples_are_nested_and_as_if_built_alone(self):
        sources = [*self.sources(), "--val_size", 4, "--seed", 3]
        folders = {size: self.folder / str(size) for size in (25, 5, 12)}
        self.built(*sources, "--subsample_size", *folders, out=folders.values())
        ratings = {  # which are the row numbers here
            size: load(folder / "train")["ratings"].tolist() for size, folder in folders.items()
        }
        self.assertEqual(
            {size: len(rows) for size, rows in ratings.items()}, {s: s for s in folders}
        )
        self.assertTrue(set(ratings[5]) < set(ratings[12]) < set(ratings[25]))
        for size, folder in folders.items():
            alone = self.folder / f"alone-{size}"
            self.built(*sources, "--subsample_size", size, out=alone)
            self.assertEqual(fingerprint(folder), fingerprint(alone))
        # one that is there is left alone, whatever else is built beside it
        more = [folders[12], self.folder / "8"]
        output = self.built(*sources, "--subsample_size", 12, 8, out=more)
        self.assertEqual(output.count("already built"), 1)
        eight = load(self.folder / "8" / "train")["ratings"].tolist()
        self.assertTrue(set(ratings[5]) < set(eight) < set(ratings[12]))

    def test_a_subsample_is_the_beginning_of_the_seeds_permutation(self):
        """So the 1,000 puzzles of Sudoku-Extreme are always the same."""
        self.built(*self.sources(), "--subsample_size", 12, "--seed", 3)
        chosen = np.sort(np.random.default_rng(3).permutation(40)[:12])
        self.assertEqual(load(self.out / "train")["ratings"].tolist(), chosen.tolist())

    def test_no_solution_of_val_stays_in_train(self):
        # Two puzzles of each solution: one with a clue more.
        twins = []
        for row in self.rows[:20]:
            cell = row[1].index(".")
            twins.append(["twin", row[1][:cell] + row[2][cell] + row[1][cell + 1 :], *row[2:]])
        self.built(*self.sources(self.rows[:20] + twins), "--val_size", 6)
        train, val = (
            {row.tobytes() for row in load(self.out / name)["labels"]} for name in ("train", "val")
        )
        self.assertFalse(train & val)
        self.assertEqual(len(train | val), 20)

    def test_what_the_splits_have_in_common_is_counted_and_refused(self):
        sources = self.sources(self.rows[:40] + self.rows[:3], self.rows[38:50])
        refusal = "2 test puzzles are also in train (2 identical, 0 symmetric copies)"
        self.refused(*sources, says=[refusal, "--allow_test_in_train"])
        self.assertFalse(self.out.exists())
        said = self.built(*sources, "--allow_test_in_train")
        self.assertIn("duplicate puzzles within train: 3", said)
        self.assertIn("test puzzles also in train: 2; symmetric copies of a train puzzle: 0", said)
        self.assertIn("test puzzles whose solution is a train solution: 2", said)
        puzzle = self.rows[38][1]
        self.assertIn(f"  test {puzzle} is train {puzzle}\n", said)
        self.assertEqual(
            json.loads((self.out / "build_info.json").read_text())["overlap"],
            {
                "train_duplicates": 3,
                "test_puzzles_in_train": 2,
                "test_solutions_in_train": 2,
                "test_copies_in_train": 0,
            },
        )
        self.refused(*sources, says=[refusal])  # the dataset that is there now
        self.assertIn("already built", self.built(*sources, "--allow_test_in_train"))

    def test_a_symmetric_copy_of_a_train_puzzle_is_refused(self):
        puzzle, solution = (sudoku.parse(self.rows[7][column])[None] for column in (1, 2))
        pair = sudoku.paired(puzzle, solution)
        copy = sudoku.SudokuAugmenter(9)(pair, np.array([123456789123456789], np.uint64))
        texts = [sudoku.format_grid(grid[0]) for grid in copy]
        self.assertNotIn(texts[0], [row[1] for row in self.rows])
        test = [*self.rows[40:45], ["copy", *texts, "0"]]
        sources = self.sources(test=test)
        self.refused(*sources, says=["1 test puzzles are also in train (0 identical, 1 symmetric"])
        self.assertIn(
            f"  test {texts[0]} is train {self.rows[7][1]}\n",
            self.built(*sources, "--allow_test_in_train"),
        )
        # a copy in val counts, too
        sources = self.sources([*self.rows[:10], test[-1]], self.rows[40:45])
        found = [self.build_val(sources, seed) for seed in range(8)]
        self.assertIn("1 val puzzles are also in train", "".join(found))

    def build_val(self, sources, seed):
        """What the build says on stderr, with half of the train puzzles in val."""
        flags = ["--output_dir", self.out, "--overwrite", "--val_size", 5, "--seed", seed]
        return build(*sources, *flags)[2]

    def bad_rows(self):
        source, question, answer, rating = self.rows[0]
        given = next(i for i, char in enumerate(question) if char != ".")
        other = str(int(question[given]) % 9 + 1)
        row = answer[:9]
        return [
            ([source, question[:80], answer, rating], "question has 80 characters instead of 81"),
            ([source, question, answer + "1", rating], "answer has 82 characters instead of 81"),
            ([source, "x" + question[1:], answer, rating], "question has a character other than"),
            ([source, "é" + question[1:], answer, rating], "question has a character other than"),
            (
                [source, question, "." + answer[1:], rating],
                "answer has a character other than 1..9",
            ),
            ([source, row[0] * 2 + "." * 79, answer, rating], "givens hold a digit twice"),
            ([source, "." * 80 + answer[80], row * 9, rating], "answer holds a digit twice"),
            (
                [source, question, row[1] + row[0] + answer[2:], rating],
                "answer holds a digit twice",
            ),
            (
                [source, "." * given + other + "." * (80 - given), answer, rating],
                "answer does not keep the givens",
            ),
            ([source, question, answer, "hard"], "rating 'hard' is not a whole number"),
            ([source, question, answer, "-1"], "rating '-1' is not a whole number"),
            ([source, question, answer], "3 columns instead of 4"),
            ([source, "." * 81, answer, rating], "more than one solution"),
        ]

    def test_each_bad_row_is_refused_with_its_line_or_skipped(self):
        for number, (bad, reason) in enumerate(self.bad_rows()):
            for where in ("train", "test"):
                if where == "test" and number % 4:
                    continue
                with self.subTest(reason, where=where):
                    rows = self.rows[:4] + [bad] + self.rows[4:8]
                    sources = self.sources(
                        **{"test": self.rows[50:52], "train": self.rows[52:54], where: rows}
                    )
                    self.refused(*sources, says=[f"{where}.csv:6: ", reason, "--skip_bad"])
                    self.assertFalse(self.out.exists())
                    said = self.built(*sources, "--skip_bad")
                    self.assertIn(f"{where}.csv:6: ", said)
                    self.assertEqual(
                        load(self.out / where)["inputs"].tolist(), self.expected(self.rows[:8], 1)
                    )
                    shutil.rmtree(self.out)

    def test_bad_rows_are_replaced_in_a_subsample(self):
        several = ["x", "." * 81, self.rows[0][2], "0"]
        sources = self.sources(self.rows[:30] + [several] * 30)
        self.refused(*sources, "--subsample_size", 20, says=["more than one solution"])
        self.built(*sources, "--subsample_size", 20, "--skip_bad")
        self.assertEqual(len(load(self.out / "train")["inputs"]), 20)

    def test_no_check_unique(self):
        sources = self.sources(self.rows[:5] + [["x", "." * 81, self.rows[0][2], "0"]])
        self.built(*sources, "--no_check_unique")
        self.assertEqual(len(load(self.out / "train")["inputs"]), 6)

    def test_files_that_are_no_such_csv(self):
        sources = self.sources()
        sources[1] = self.write(
            "train.csv", self.rows[:5], ("source", "puzzle", "answer", "rating")
        )
        self.refused(*sources, says=["no column question", "source,question,answer,rating"])
        sources[1] = self.folder / "absent.csv"
        self.refused(*sources, says=["absent.csv", "No such file"])
        sources[1] = self.write("train.csv", [])
        self.refused(*sources, says=["holds no puzzle of size 9"])
        self.assertFalse(self.out.exists())


class FromList(Folder):
    """--puzzles: a list without solutions."""

    @classmethod
    def setUpClass(cls):
        rows = sudoku_sources.generate_chunk((9, [30, 40], 0, 0, 20))
        cls.rows = {sudoku.format_grid(puzzle): row for row in rows for puzzle in row[:1]}
        cls.texts = list(cls.rows)

    def source(self, text, *flags):
        file = self.folder / "list.txt"
        file.write_text(text)
        return ["--puzzles", file, *flags]

    def numbers(self, train, test, val=0):
        return ["--num_train", train, "--num_test", test, "--val_size", val]

    def test_puzzles_are_solved_rated_and_dealt_at_random(self):
        grid = "\n".join(self.texts[0][start : start + 9] for start in range(0, 81, 9))
        rest = "\n".join(self.texts[1:]).replace(".", "0")
        text = f"\ufeff# the first one as a grid\n{grid}\n\n{rest}\n"
        splits = []
        for seed in (0, 0, 1):
            source = self.source(text, "--seed", seed, "--overwrite")
            self.built(*source, *self.numbers(15, 5, 3))
            arrays = {name: load(self.out / name) for name in ("train", "test", "val")}
            found = {}
            for name, split in arrays.items():
                for puzzle, solution, rating in zip(
                    split["inputs"] - 1, split["labels"] - 1, split["ratings"]
                ):
                    text_of_puzzle = sudoku.format_grid(puzzle)
                    _, expected, guesses = self.rows[text_of_puzzle]
                    self.assertEqual(solution.tolist(), expected.tolist())
                    self.assertEqual(rating, guesses)
                    found[text_of_puzzle] = name
            self.assertEqual(found.keys(), self.rows.keys())
            self.assertEqual([len(arrays[name]["inputs"]) for name in arrays], [12, 5, 3])
            splits.append(found)
        self.assertEqual(splits[0], splits[1])
        self.assertNotEqual(splits[0], splits[2])

    def test_subsamples_are_nested(self):
        self.check_nested(*self.source("\n".join(self.texts)), *self.numbers(15, 5, 3))

    def test_puzzles_of_one_solution_stay_in_one_split(self):
        twins = []
        for text in self.texts[:10]:
            cell = text.index(".")
            digit = self.rows[text][1][cell]
            twins += [text, f"{text[:cell]}{digit}{text[cell + 1 :]}"]
        self.built(*self.source("\n".join(twins)), *self.numbers(10, 5))
        train, test = (
            {row.tobytes() for row in load(self.out / name)["labels"]} for name in ("train", "test")
        )
        self.assertFalse(train & test)

    def test_bad_puzzles_are_refused_with_their_line_or_left_out(self):
        first = self.texts[0]
        given = next(cell for cell, digit in enumerate(first) if digit != ".")
        empty = next(cell for cell in range(81) if first[cell] == "." and cell // 9 == given // 9)
        twice = f"{first[:empty]}{first[given]}{first[empty + 1 :]}"
        for bad, reason in [
            (first[:80], "80 cells"),
            (first[:80] + "x", "character 'x' at position 81"),
            ("1" + "." * 15, "the puzzle has 16 cells instead of 81"),
            (twice, "the givens hold a digit twice"),
            ("." * 81, "the puzzle has more than one solution"),
            (self.texts[3], "the same puzzle as in line 4"),
        ]:
            with self.subTest(reason):
                text = "\n".join([*self.texts[:6], bad, *self.texts[6:8]])
                numbers = self.numbers(6, 2)
                if reason == "the puzzle has more than one solution":
                    numbers = self.numbers(7, 2)  # all puzzles are looked at
                self.refused(*self.source(text), *numbers, says=["list.txt:7: ", reason])
                numbers = self.numbers(6, 2)
                said = self.built(*self.source(text), *numbers, "--skip_bad", "--overwrite")
                if "solution" not in reason:
                    self.assertIn("list.txt:7: ", said)
                self.assertEqual(len(load(self.out / "train")["inputs"]), 6)
                shutil.rmtree(self.out)

    def test_mistakes(self):
        source = self.source("\n".join(self.texts))
        self.refused(*source, says=["--puzzles needs --num_train and --num_test"])
        self.refused(*source, *self.numbers(20, 1), says=["has only 20 puzzles", "lower --num_"])
        self.refused(*source, *self.numbers(2, 1), "--clues", 30, 40, says=["--clues cannot go"])
        self.refused(*self.source("# nothing\n"), *self.numbers(2, 1), says=["holds no puzzle"])
        source[1] = self.folder / "absent.txt"
        self.refused(*source, *self.numbers(2, 1), says=["cannot read", "absent.txt"])
        self.assertFalse(self.out.exists())


class Copies(unittest.TestCase):
    """sudoku_copies: which puzzles are symmetric copies of others."""

    def test_all_copies_are_found_and_nothing_else(self):
        draws = np.random.Generator(np.random.Philox(1)).bit_generator.random_raw(40)
        for size in (4, 6, 9):
            puzzles, solutions = (grid - 1 for grid in random_pairs(size, 40))
            augment = sudoku.SudokuAugmenter(size)
            images = augment(sudoku.paired(puzzles, solutions), draws)
            for one, other in zip(zip(puzzles, solutions), zip(*images)):
                form = sudoku_copies.canonical_form(*one, size)
                self.assertEqual(form, sudoku_copies.canonical_form(*other, size))
            np.testing.assert_array_equal(
                sudoku_copies.invariants(puzzles, solutions), sudoku_copies.invariants(*images)
            )
            copies = sudoku_copies.find_copies(puzzles, solutions, *images)
            self.assertEqual(copies.identical + copies.symmetric, 40)
            # One given fewer: another puzzle, with the same solution.
            fewer = images[0].copy()
            for puzzle in fewer:
                puzzle[np.flatnonzero(puzzle)[0]] = 0
            if size == 9:  # of smaller ones some are copies of others here
                none = sudoku_copies.find_copies(puzzles, solutions, fewer, images[1])
                self.assertEqual(none[:2], (0, 0))

    def test_the_canonical_form_holds_where_the_invariant_tells_nothing_apart(self):
        """Few givens, so that many lines have the same colour."""
        _, solutions = (grid - 1 for grid in random_pairs(9, 6))
        puzzles = np.where(np.arange(81) % 10 == 0, solutions, 0).astype(np.uint8)
        puzzles[3:] = 0
        draws = np.random.Generator(np.random.Philox(2)).bit_generator.random_raw(6)
        images = sudoku.SudokuAugmenter(9)(sudoku.paired(puzzles, solutions), draws)
        forms = [
            [sudoku_copies.canonical_form(*pair, 9) for pair in zip(*grids)]
            for grids in ((puzzles, solutions), images)
        ]
        self.assertEqual(forms[0], forms[1])

    def test_identical_puzzles_are_counted_apart(self):
        puzzles, solutions = (grid - 1 for grid in random_pairs(9, 4))
        found = sudoku_copies.find_copies(puzzles, solutions, puzzles[2:], solutions[2:], shown=1)
        self.assertEqual(found, (2, 0, [(puzzles[2].tobytes(), puzzles[2].tobytes())]))


class Mistakes(Folder):
    def test_arguments(self):
        for arguments, text in [
            (["--generate", "--num_train", "5"], "--num_test"),
            (["--num_train", "5"], "needs --generate"),
            (SMALL + ["--min_difficulty", "5"], "cannot go with --generate"),
            (SMALL + ["--skip_bad"], "cannot go with --generate"),
            (SMALL + ["--puzzles", "x.txt"], "cannot go with --generate"),
            (["--puzzles", "x.txt", "--train_csv", "x.csv"], "cannot go with --puzzles"),
            (SMALL + ["--num_wor", "1"], "unrecognized arguments: --num_wor"),
            (["--output_dir", "gs://b/data"], "copy it to the bucket"),
            (SMALL + ["--val_size", "30"], "--val_size 30"),
            (SMALL + ["--clues", "3", "9"], "4 <= MIN <= MAX <= 16"),
            (SMALL + ["--clues", "9", "5"], "--clues 9 5"),
            (SMALL + ["--clues", "few"], "MIN MAX"),
            (SMALL + ["--num_aug", "-1"], "--num_aug -1"),
            (SMALL + ["--num_workers", "0"], "--num_workers 0"),
            (SMALL + ["--seed", "x"], "--seed"),
            (SMALL + ["--seed", str(2**63)], "below 2^63"),
            (SMALL[:1] + ["--size", "5"], "--size"),
            (["--train_csv", "x.csv"], "go together"),
            (["--size", "4"], "Sudoku-Extreme is 9x9"),
        ]:
            with self.subTest(arguments):
                self.refused(*arguments, says=[text])
                self.assertEqual(os.listdir(self.folder), [])

    def test_subsamples(self):
        folder = self.folder / "x"
        for arguments, text in [
            (["--subsample_size", 5, 9], "names 1 folder(s) for 2 dataset(s)"),
            (["--output_dir", folder, self.out], "names 2 folder(s) for 1 dataset(s)"),
            (["--subsample_size", 5, 5, "--output_dir", folder, self.out], "5 5: give each one"),
            (
                ["--subsample_size", 5, 9, "--output_dir", folder, self.folder / "y" / ".." / "x"],
                f"{folder} {folder}: give each one only once",
            ),
            (["--subsample_size", 0], "--subsample_size 0 must be 1 or more"),
            (["--subsample_size", 31], "--subsample_size 31: there are only 30 train puzzles"),
            (["--subsample_size", 30, "--val_size", 5], "there are only 25 train puzzles"),
        ]:
            with self.subTest(arguments):
                self.refused(*SMALL, *arguments, says=[text])
                self.assertEqual(os.listdir(self.folder), [])

    def test_more_puzzles_than_there_are(self):
        with mock.patch.object(sudoku_sources, "MAX_REJECTED", 500):
            self.refused(
                *SMALL, "--clues", 16, 16, "--num_train", 400, says=["train", "lower the numbers"]
            )
            self.refused(*SMALL, "--min_guesses", 50, says=["0 of 30 train", "--min_guesses"])
        self.assertEqual(os.listdir(self.folder), [])

    def test_no_download(self):
        fake = mock.Mock()
        fake.hf_hub_download.side_effect = ConnectionError("no route")
        with mock.patch.dict(sys.modules, {"huggingface_hub": fake}):
            error = self.refused(
                says=[
                    "no route",
                    "https://huggingface.co/datasets/sapientinc/sudoku-extreme/tree/main",
                    "--train_csv",
                    "--generate",
                ]
            )
        self.assertEqual(error.count("\n"), 1)

    def test_existing_output(self):
        self.built(*SMALL)
        before = fingerprint(self.out)
        stamp = (self.out / "train" / "all__inputs.npy").stat().st_mtime_ns
        self.assertIn("already built", self.built(*SMALL))
        self.assertEqual((self.out / "train" / "all__inputs.npy").stat().st_mtime_ns, stamp)
        self.refused(*SMALL, "--seed", 1, says=["seed 0 -> 1", "--overwrite"])
        self.assertEqual(fingerprint(self.out), before)
        self.built(*SMALL, "--seed", 1, "--overwrite")
        self.assertNotEqual(fingerprint(self.out), before)
        (self.out / "test" / "all__labels.npy").write_bytes(b"")
        self.refused(*SMALL, "--seed", 1, says=["damaged", "all__labels.npy"])
        self.assertEqual(os.listdir(self.folder), ["out"])

    def test_never_deletes_what_it_did_not_build(self):
        self.out.mkdir()
        (self.out / "letters.txt").write_text("dear")
        self.refused(*SMALL, "--overwrite", says=["not a dataset of this script"])
        self.assertEqual(os.listdir(self.out), ["letters.txt"])
        (self.out / "letters.txt").unlink()
        self.built(*SMALL)  # an empty folder is fine


class Interruptions(Folder):
    def test_full_disk(self):
        self.built(*SMALL)
        before, syncs = fingerprint(self.out), []

        def full(descriptor):
            syncs.append(descriptor)
            if len(syncs) == 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with mock.patch.object(script.os, "fsync", full):
            error = self.refused(
                *SMALL, "--seed", 1, "--overwrite", says=["No space left", "Free space"]
            )
        self.assertEqual(error.count("\n"), 1)
        self.assertEqual(os.listdir(self.folder), ["out"])
        self.assertEqual(fingerprint(self.out), before)

    def test_write_that_fails_for_real(self):
        # a limit on the size of files makes write() fail as a full disk does
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
            f"sys.path[:0] = {[str(SCRIPT.parent)]!r}; "
            "import build_sudoku_dataset as script; script.run_cli(script.main)"
        )
        run = subprocess.run(
            [
                sys.executable,
                "-B",
                "-c",
                code,
                "--output_dir",
                self.out,
                *SMALL,
                "--num_train",
                "900",
            ],
            capture_output=True,
            text=True,
        )
        self.assertEqual(run.returncode, 2, run.stderr)
        self.assertRegex(run.stderr, r"^error: cannot write .*/out: File too large; .*\n$")
        self.assertEqual(os.listdir(self.folder), [])

    def test_two_builds_at_once(self):
        def second(*_):
            self.refused(*SMALL, says=["another build"])

        with mock.patch.object(dataset_files, "_write_split", second):
            self.built(*SMALL)

    def test_kill_at_every_step_of_writing(self):
        """SIGKILL before the k-th fsync, rename or deletion leaves the old folder, the new one or
        none."""
        self.built(*SMALL)
        old = fingerprint(self.out)
        self.built(*SMALL, "--seed", 1, out=self.folder / "new")
        new = fingerprint(self.folder / "new")
        seen = set()
        for kill_at in [1, 8, 18, 19, 20, 21, 22, 23, 24, 26, 30, 80]:
            status = self.killed_at(kill_at, *SMALL, "--seed", 1, "--overwrite")
            self.assertIn(status, (0, -signal.SIGKILL))
            if not self.out.exists():
                seen.add("none")
            else:
                seen.add("old" if fingerprint(self.out) == old else "new")
                self.assertIn(fingerprint(self.out), (old, new))
            if status == 0:
                break
            # The next build clears the remains away.
            self.built(*SMALL, "--overwrite")
            self.assertEqual(fingerprint(self.out), old)
            self.assertEqual(sorted(os.listdir(self.folder)), ["new", "out"])
        self.assertEqual(status, 0, "the last step should be past the end")
        self.assertEqual(seen, {"none", "old", "new"})

    def killed_at(self, step, *arguments):
        """Build in a forked process that is killed before its `step`-th call of one of these
        functions; returns its exit status."""
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        calls = itertools.count(1)

        def deadly(function):
            def call(*given, **more):
                if next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*given, **more)

            return call

        for name in ("fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, deadly(getattr(os, name)))
        os._exit(build("--output_dir", self.out, *arguments)[0])

    def test_kill_while_generating_leaves_no_process_and_no_file(self):
        command = [sys.executable, SCRIPT, "--output_dir", self.out, "--generate"]
        command += ["--num_train", 50_000, "--num_test", 10, "--num_workers", 2]
        process = begin(self, command)
        # two workers and a resource tracker
        process.until(lambda: len(descendants(process.pid)) >= 3)
        pause(0.5)
        process.kill()
        process.all_end(-signal.SIGKILL, 20)
        self.assertEqual(os.listdir(self.folder), [])


if __name__ == "__main__":
    unittest.main()
