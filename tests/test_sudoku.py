"""Rules, solver and generator of sudoku.py.

Real puzzles are read from TRM_REAL_DATA_DIR (default ../shared/data). Without them two tests are
skipped.
"""

import csv
import os
import random
import sys
import unittest
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("TRM_REAL_DATA_DIR", ROOT.parent / "shared" / "data"))

sys.path.insert(0, str(ROOT))
import sudoku_sources

import sudoku


def count_by_brute_force(puzzle, limit):
    """Solutions of a puzzle by plain backtracking, cell after cell: the solver's judge."""
    size = sudoku.size_of(len(puzzle))
    rows, columns = sudoku.box_shape(size)
    grid = [int(digit) for digit in puzzle]

    def clash(cell, digit):
        return any(
            grid[other] == digit
            and other != cell
            and (
                other // size == cell // size
                or other % size == cell % size
                or (other // size // rows, other % size // columns)
                == (cell // size // rows, cell % size // columns)
            )
            for other in range(size * size)
        )

    def count(cell, budget):
        if cell == size * size:
            return 1
        if puzzle[cell]:
            return 0 if clash(cell, grid[cell]) else count(cell + 1, budget)
        found = 0
        for digit in range(1, size + 1):
            if not clash(cell, digit):
                grid[cell] = digit
                found += count(cell + 1, budget - found)
                if found >= budget:
                    break
        grid[cell] = 0
        return found

    return count(0, limit)


class Rules(unittest.TestCase):
    def test_parse_and_format(self):
        text = "1..4....0....2.3"
        grid = sudoku.parse(text)
        self.assertEqual(grid.dtype, np.uint8)
        self.assertEqual(sudoku.format_grid(grid), text.replace("0", "."))
        for wrong in ("1" * 15, "5" + "." * 15, "x" + "." * 15, "٣" + "." * 80):
            with self.assertRaises(ValueError):
                sudoku.parse(wrong)

    def test_legal_grids_and_every_kind_of_fault(self):
        rng = random.Random(0)
        for size in (4, 6, 9):
            grid = np.frombuffer(sudoku.random_solution(size, rng), np.uint8)
            square = grid.reshape(size, size)
            # Rows and columns are right, boxes are not.
            shifted = np.array(
                [[(r + c) % size + 1 for c in range(size)] for r in range(size)], np.uint8
            )
            twice_in_row = square.copy()
            twice_in_row[0, [0, 1]] = square[0, 1]
            swapped_cells = square.copy()  # keeps the row, breaks two columns
            swapped_cells[0, [0, 1]] = square[0, [1, 0]]
            zero, large = grid.copy(), grid.copy()
            zero[3], large[3] = 0, size + 1
            cases = np.stack(
                [grid, *(g.ravel() for g in (shifted, twice_in_row, swapped_cells)), zero, large]
            )
            self.assertEqual(sudoku.is_solved(cases).tolist(), [True] + [False] * 5)

    def test_conflicts(self):
        empty = np.zeros((4, 36), np.uint8)
        empty[0, [0, 5]] = 3  # row
        empty[1, [0, 30]] = 3  # column
        empty[2, [0, 8]] = 3  # box: 2 rows of 3 columns
        empty[3, [0, 13]] = 3  # neighbouring box: fine
        self.assertEqual(sudoku.has_conflict(empty).tolist(), [True, True, True, False])

    def test_symmetries_keep_the_rules(self):
        draws = np.random.Philox(0).random_raw(200)
        for size in (4, 6, 9):
            grid = np.frombuffer(sudoku.random_solution(size, random.Random(1)), np.uint8)
            puzzle = np.where(np.arange(size * size) % 3 == 0, grid, 0).astype(np.uint8)
            for shift in (0, 1):  # this module's codes, and a dataset's
                pairs = np.repeat(
                    sudoku.paired(puzzle[None] + np.uint8(shift), grid[None] + np.uint8(shift)),
                    200,
                    0,
                )
                puzzles, solutions = (
                    a - shift for a in sudoku.SudokuAugmenter(size, 1 + shift)(pairs, draws)
                )
                self.assertTrue(sudoku.is_solved(solutions).all())
                self.assertTrue(((puzzles == 0) | (puzzles == solutions)).all())
                self.assertTrue(((puzzles > 0).sum(1) == (puzzle > 0).sum()).all())
                self.assertGreater(len(np.unique(solutions, axis=0)), 50)

    def test_symmetries_transpose_square_boxes_only(self):
        draws = np.random.Philox(0).random_raw(400)
        for size in (4, 6, 9):
            # not a Sudoku: only cells 0 and 1 are filled, which share a column only after a
            # transposition
            marked = np.zeros((400, size * size), np.uint8)
            marked[:, :2] = 1, 2
            images = sudoku.SudokuAugmenter(size)(sudoku.paired(marked, marked), draws)[0]
            columns = np.nonzero(images)[1].reshape(400, 2) % size
            transposed = (columns[:, 0] == columns[:, 1]).mean()
            self.assertTrue(transposed == 0 if size == 6 else 0.4 < transposed < 0.6, transposed)


class Solver(unittest.TestCase):
    def test_counts_like_brute_force(self):
        rng = random.Random(0)
        counts = set()
        for size, clues in [(4, 2), (4, 4), (4, 8), (6, 8), (6, 11), (6, 16)] * 6:
            solution = sudoku.random_solution(size, rng)
            kept = set(rng.sample(range(size * size), clues))
            puzzle = [d if c in kept else 0 for c, d in enumerate(solution)]
            solved = sudoku.solve(puzzle, 20)
            self.assertEqual(len(solved.solutions), count_by_brute_force(puzzle, 20))
            self.assertEqual(len(set(solved.solutions)), len(solved.solutions))
            for found in solved.solutions:
                self.assertTrue(all(p in (0, d) for p, d in zip(puzzle, found)))
            self.assertTrue(sudoku.is_solved(np.array([list(s) for s in solved.solutions])).all())
            counts.add(len(solved.solutions))
        self.assertTrue({1, 2, 20} <= counts, counts)

    def test_no_solution(self):
        self.assertEqual(sudoku.solve([1, 1] + [0] * 14), ([], 0))
        self.assertEqual(sudoku.solve([1, 2, 3, 0] + [0, 0, 0, 4] + [0] * 8).solutions, [])
        for wrong in ([0] * 15, [5] + [0] * 15, [-1] + [0] * 15):
            with self.assertRaises(ValueError):
                sudoku.solve(wrong)

    def check_real(self, name, step):
        path = REAL / name / "test.csv"
        if not path.exists():
            self.skipTest(f"no real puzzles at {path} (TRM_REAL_DATA_DIR)")
        with open(path) as file:
            rows = list(csv.DictReader(file))[::step]
        for row in rows:
            solved = sudoku.solve(sudoku.parse(row["question"]))
            self.assertEqual(solved.solutions, [sudoku.parse(row["answer"]).tobytes()])
            self.assertEqual(solved.guesses, int(row["rating"]), row)

    def test_real_17_clue_puzzles_and_ratings(self):
        self.check_real("sudoku_17_clue", 2)

    def test_real_hardest_puzzles_and_ratings(self):
        self.check_real("sudoku_forum_hardest", 50)


class Generator(unittest.TestCase):
    def test_unique_legal_and_of_the_wanted_clues(self):
        rng = random.Random(0)
        for size, low, high in [(4, 4, 10), (6, 10, 20), (9, 24, 50)]:
            for clues in (None, low, high) * 3:
                puzzle, solution = sudoku.generate(size, rng, clues)
                self.assertEqual((puzzle.dtype, solution.dtype), (np.uint8, np.uint8))
                self.assertTrue(sudoku.is_solved(solution[None]).all())
                self.assertEqual(sudoku.solve(puzzle).solutions, [solution.tobytes()])
                self.assertTrue(((puzzle == 0) | (puzzle == solution)).all())
                if clues:
                    self.assertEqual((puzzle > 0).sum(), clues)
                else:
                    for cell in np.flatnonzero(puzzle):
                        fewer = puzzle.copy()
                        fewer[cell] = 0
                        self.assertEqual(len(sudoku.solve(fewer).solutions), 2, "a clue could go")

    def test_clues_out_of_range(self):
        for clues in (3, 17):
            with self.assertRaises(ValueError):
                sudoku.generate(4, random.Random(0), clues)

    def test_some_puzzles_need_guesses(self):
        rows = sudoku_sources.generate_chunk((9, None, 0, 0, 40))
        self.assertGreater(sum(rating > 0 for _, _, rating in rows), 2)
        self.assertGreater(sum(rating == 0 for _, _, rating in rows), 2)


if __name__ == "__main__":
    unittest.main()
