"""analysis/solve.py: a trained model's way through a puzzle, as text and as an animation."""

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import sys
import unittest
from unittest import mock

import numpy as np
import torch

import sudoku
import trm_model
from analysis import solve
from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager, load_checkpoint
from config import load_config
from data_loader_tpu import SudokuDatasetTPU
from device import Device
from evaluation import evaluate
from storage import open_folder
from tests.gcs_server import GCSTest
from tests.helpers import TINY, CommandTest, FolderTest, random_pairs, write_config
from tests.processes import run
from utils import UserError

NOT_INSTALLED = [name for name in ("matplotlib", "PIL") if importlib.util.find_spec(name) is None]
PUZZLE = "12..34..21434321"


def frames_of(path):
    """(frames, uint8 [height, width, 3] each; milliseconds of each; loop count) of a GIF."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        frames = [
            (np.array(frame.convert("RGB")), frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]
        return (
            [frame for frame, _ in frames],
            [duration for _, duration in frames],
            image.info["loop"],
        )


def run_here(*args):
    """What the command prints, in this process."""
    text = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["solve.py", *args]),
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        solve.main()
    return text.getvalue()


class Solving(CommandTest):
    """On a checkpoint of the real command after 20 steps on 4x4 grids.

    It takes 3 supervision steps (halt_max_steps), and most answers are wrong.
    """

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls().train("--run_name", "solver", "--max_steps", "20")
        cls.run_folder = str(cls.folder / "runs" / "solver")

    def process(self, *args, status=0, driver=("analysis/solve.py",)):
        command = [sys.executable, *driver, "--checkpoint", self.run_folder, *args]
        return run(self, command, status)

    def solve(self, *args, checkpoint=None):
        """What the command prints, in this process."""
        return run_here("--checkpoint", checkpoint or self.run_folder, *args)

    def mistake(self, *args, **options):
        """The message of the UserError that the command raises before it has printed anything."""
        with (
            mock.patch.object(solve, "print", self.fail, create=True),
            self.assertRaises(UserError) as caught,
        ):
            self.solve(*args, **options)
        return str(caught.exception)

    def test_the_command(self):
        # only an animation needs the libraries of requirements-analysis.txt
        hidden = (
            "import sys, runpy\nsys.modules.update(matplotlib=None, PIL=None)\n"
            "sys.argv[0] = 'analysis/solve.py'\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        )
        output = self.process(PUZZLE, driver=("-c", hidden))
        self.assertIn(
            f"checkpoint {self.checkpoint('solver', 20)}\npuzzle     {PUZZLE}  (12 clues)\n", output
        )
        for step in (1, 2, 3):
            self.assertRegex(
                output,
                rf"\nsupervision step {step}: \d+ cells changed, \d+ of 16 right, "
                r"(the rules hold|\d+ breaks? a rule), halting head [\d.]+% sure, \d+ ms\n",
            )
        self.assertNotIn("supervision step 4", output)
        self.assertRegex(output, r"\n(solved|not solved): [1-4.]{16}")
        self.assertRegex(
            self.process("1" + PUZZLE, status=2), r"\Aerror: [^\n]+: 17 cells[^\n]+\n\Z"
        )

    def test_held_out_puzzles_and_a_checkpoint_file(self):
        file = str(self.checkpoint("solver", 20))
        held_out = [
            self.solve(*flags, checkpoint=checkpoint).splitlines()[:2]
            for checkpoint, *flags in (
                (file,),
                (file, "--example", "0"),
                (self.run_folder, "--example", "1"),
            )
        ]
        self.assertEqual({checkpoint for checkpoint, _ in held_out}, {f"checkpoint {file}"})
        self.assertNotEqual(held_out[1], held_out[2])
        self.assertIn("(5 clues)", held_out[0][1])  # one with the fewest

    def test_answers_are_those_of_the_evaluation_and_changes_are_between_them(self):
        model, config = solve.load_model(self.checkpoint("solver", 20))
        dataset = SudokuDatasetTPU(config.data.dataset_path, "test")
        right = []
        for inputs, labels in zip(dataset.inputs, dataset.labels):
            before = inputs - 1
            for step in solve.supervision_steps(model, inputs - 1):
                self.assertEqual(step.changed.tolist(), (step.grid != before).tolist())
                before = step.grid
            right.append((before == labels - 1).mean())
        evaluated = evaluate(model, dataset, Device("cpu"), 1, trm_model.evaluation_step)
        self.assertAlmostEqual(np.mean(right), evaluated["cell_accuracy"], places=6)

    def test_a_file_of_puzzles(self):
        file = self.folder / "puzzles.txt"
        file.write_text(f"{PUZZLE}\n\n  {PUZZLE[::-1]}\r\n0{PUZZLE[1:]}\n")
        output = self.solve(str(file))
        self.assertEqual(
            re.findall(r"puzzle     (\S+)", output), [PUZZLE, PUZZLE[::-1], "." + PUZZLE[1:]]
        )
        solved = len(re.findall("^solved: ", output, re.MULTILINE))
        self.assertEqual(solved + output.count("\nnot solved: "), 3)
        self.assertTrue(output.endswith(f"\n{solved} of 3 puzzles solved\n"), output)
        for content, says in (
            (f"{PUZZLE}\n\n{PUZZLE}4\n".encode(), "line 3: 17 cells"),
            (b"\n \n", "holds no puzzle"),
            (b"\xff" * 16, "line 1: character"),
        ):
            file.write_bytes(content)
            self.assertRegex(self.mistake(str(file)), f"^'?{re.escape(str(file))}'?:? {says}")

    def test_a_file_with_a_byte_order_mark_comments_and_grids(self):
        file = self.folder / "grids.txt"
        grid = "\n".join(PUZZLE[start : start + 4] for start in range(0, 16, 4))
        file.write_text(f"\ufeff# two puzzles\n{grid}\n\n{PUZZLE[::-1]}\n")
        output = self.solve(str(file))
        self.assertEqual(re.findall(r"puzzle     (\S+)", output), [PUZZLE, PUZZLE[::-1]])
        self.assertIn(f"puzzle     {PUZZLE} ", self.solve(grid))

    def test_mistakes(self):
        for text, says in (
            ("11..............", "two of its givens conflict"),
            ("123...4.........", "it has no solution"),
            (PUZZLE + "1", "17 cells"),
            ("12..34..2143432x", "it is no puzzle either"),
            ("." * 81, "this checkpoint solves 4x4 grids"),
            ("puzzles.txt", "'puzzles.txt': there is no such file"),
            ("1" * 300, "300 cells"),
            ("", "holds no puzzle"),
        ):
            self.assertIn(says, self.mistake(text), text)
        self.assertIn("has puzzles 0 to 49", self.mistake("--example", "50"))
        self.assertIn("has puzzles 0 to 49", self.mistake("--example", "-1"))
        file = self.folder / "a_file"
        file.touch()
        self.assertIn("--example 0: not with a puzzle", self.mistake(PUZZLE, "--example", "0"))
        self.assertIn("there is no such checkpoint", self.mistake(PUZZLE, checkpoint="nowhere.pt"))
        self.assertIn("there is no such folder", self.mistake(PUZZLE, checkpoint="runs/nowhere"))
        self.assertRegex(
            self.mistake(PUZZLE, checkpoint=str(self.folder / "runs")),
            rf"--checkpoint \S+/runs: there is no checkpoint .* its runs: {self.run_folder}",
        )
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        self.assertIn("give the folder of a run", self.mistake(PUZZLE, checkpoint=str(empty)))
        self.assertIn(f"{file} is no folder", self.mistake(PUZZLE, checkpoint=f"{file}/run"))

    def test_a_dataset_that_is_not_below_the_current_folder(self):
        with mock.patch.object(solve, "local_dataset", lambda path: "data/elsewhere"):
            self.assertIn("a relative path counts from the current folder", self.mistake())

    def test_auto_in_a_configuration_becomes_the_dtype_of_this_machine(self):
        content = load_checkpoint(self.checkpoint("solver", 20))
        for saved, bfloat16_is_fast, used in (
            ("auto", True, "bfloat16"),
            ("auto", False, "float32"),
            ("bfloat16", False, "bfloat16"),
        ):
            content["config"]["model"]["forward_dtype"] = saved
            torch.save(content, self.folder / "auto.pt")
            supported = mock.Mock(return_value=bfloat16_is_fast)
            with mock.patch("torch.ops.mkldnn._is_mkldnn_bf16_supported", supported):
                model, config = solve.load_model(self.folder / "auto.pt")
            self.assertEqual(config.model.forward_dtype, used)
            self.assertEqual(model.config.forward_dtype, used)

    def test_a_puzzle_with_several_solutions_gets_a_warning_and_is_tried(self):
        for text in ("12..............", "." * 16):
            output = self.solve(text)
            self.assertIn(f"warning: puzzle {text} has more than one solution", output)
            self.assertNotIn(" right", output)  # which of them would be right?
            self.assertEqual(output.count("\nsupervision step "), 3)
            self.assertRegex(output, r"\n(not )?solved: .*the puzzle has many solutions\)\n\Z")

    def test_an_abbreviated_flag_is_refused(self):
        with self.assertRaises(SystemExit) as caught:
            self.solve("--exam", "1")
        self.assertEqual(caught.exception.code, 2)

    @unittest.skipIf(NOT_INSTALLED, f"not installed: {NOT_INSTALLED}")
    def test_an_animation(self):
        file = self.folder / "solve.gif"
        output = self.solve("--example", "3", "--gif", str(file))
        frames, durations, loop = frames_of(file)
        told = re.findall(
            r"supervision step \d+: (\d+) cells changed, .* right, (the rules hold|\d+ break)",
            output,
        )
        self.assertEqual((len(frames), len(told), loop), (4, 3, 0))
        self.assertEqual(durations, [solve.FIRST_MS, solve.FRAME_MS, solve.FRAME_MS, solve.LAST_MS])
        self.assertIn(f"{file}: 4 frames, ", output)
        self.assertLess(file.stat().st_size, 300_000)

        def pixels(color, frame):
            return np.all(
                np.abs(frame.astype(int) - [int(color[k : k + 2], 16) for k in (1, 3, 5)]) < 12, -1
            ).sum()

        self.assertGreater(int(told[0][0]), 0)
        for color, counts in (
            (solve.CHANGED, [int(changed) for changed, _ in told]),
            (solve.CONFLICT, [int(re.sub(r"\D", "", rules) or 0) for _, rules in told]),
        ):
            legend = pixels(color, frames[0])
            self.assertEqual(
                [bool(pixels(color, frame) > legend) for frame in frames[1:]],
                [count > 0 for count in counts],
            )

    @unittest.skipIf(NOT_INSTALLED, f"not installed: {NOT_INSTALLED}")
    def test_mistakes_about_an_animation(self):
        puzzles = self.folder / "two.txt"
        puzzles.write_text(f"{PUZZLE}\n{PUZZLE}\n")
        self.assertIn(
            "has 2: give one", self.mistake(str(puzzles), "--gif", str(self.folder / "a.gif"))
        )
        self.assertIn(
            "there is no folder",
            self.mistake(PUZZLE, "--gif", str(self.folder / "nowhere" / "a.gif")),
        )
        self.assertIn("NAME.gif", self.mistake(PUZZLE, "--gif", str(self.folder / "a.png")))
        self.assertEqual(
            [path.name for path in self.folder.iterdir() if path.name.startswith("a.")], []
        )

    def test_without_the_libraries_of_pictures(self):
        file = self.folder / "missing.gif"
        for name in ("matplotlib", "PIL"):
            with mock.patch.dict(sys.modules, {name: None}):  # an import of it fails
                self.assertIn(
                    f"{name} is not installed: pip install -r requirements-analysis.txt",
                    self.mistake(PUZZLE, "--gif", str(file)),
                )
        self.assertFalse(file.exists())


class FromABucket(GCSTest):
    def test_a_run_and_a_checkpoint_file(self):
        config = load_config(
            write_config(self.folder / "tiny.yaml", TINY.format(data="nowhere", out="nowhere"))
        )
        model = trm_model.TinyRecursiveModel(config.model, 16, 6)
        state = {
            "config": dataclasses.asdict(config),
            "ema": None,
            "model": trm_model.named_state(model),
        }
        saver = BackgroundWriter()
        CheckpointManager(
            open_folder(f"{self.url}/run/checkpoints"), 1, self.folder / "staging", saver
        ).save(20, state)
        saver.finish()
        answer = solve.supervision_steps(model.eval(), sudoku.parse(PUZZLE))[-1].grid
        for number, checkpoint in enumerate(("run", "run/checkpoints/checkpoint_step_20.pt")):
            cache, file = self.folder / f"cache{number}", self.folder / f"{number}.gif"
            flags = [] if NOT_INSTALLED else ["--gif", str(file)]
            with mock.patch.dict(os.environ, TRM_CACHE=str(cache)):
                output = run_here("--checkpoint", f"{self.url}/{checkpoint}", PUZZLE, *flags)
            self.assertTrue(output.startswith(f"checkpoint {cache}"), output)
            self.assertRegex(output, f"\nnot solved: {sudoku.format_grid(answer)}")
            self.assertEqual(file.exists(), not NOT_INSTALLED)


class Rules(unittest.TestCase):
    def test_conflicts(self):
        solution = sudoku.parse("1234341221434321")
        puzzle = sudoku.parse(PUZZLE)

        def found(*changes):
            grid = solution.copy()
            for cell, digit in changes:
                grid[cell] = digit
            return np.flatnonzero(solve.conflicts(grid, puzzle)).tolist()

        self.assertEqual(found(), [])
        self.assertEqual(found((2, 0)), [2])  # empty
        self.assertEqual(found((2, 1)), [0, 2, 6])  # a row; a column and a box share the other
        relabelled = np.array([0, 2, 1, 3, 4], np.uint8)[
            solution
        ]  # keeps the rules, but not the givens
        self.assertEqual(
            np.flatnonzero(solve.conflicts(relabelled, puzzle)).tolist(),
            [c for c in range(16) if puzzle[c] in (1, 2)],
        )

    def test_none_where_and_only_where_it_is_solved(self):
        inputs, labels = random_pairs(9, 50, clue_share=0.3)
        stream = np.random.default_rng(0)
        for given, solution in zip(inputs - 1, labels - 1):
            self.assertFalse(solve.conflicts(solution, given).any())
            wrong = solution.copy()
            cell = stream.integers(81)
            wrong[cell] = wrong[cell] % 9 + 1
            self.assertTrue(solve.conflicts(wrong, given)[cell])

    def test_text(self):
        grid = sudoku.parse("1.34341221434322")
        step = solve.Step(
            grid, np.arange(16) == 15, solve.conflicts(grid, sudoku.parse("." * 16)), 0.25, 1.0
        )
        self.assertEqual(
            solve.picture(step).splitlines(),
            [
                " 1   _! | 3   4",
                " 3   4  | 1   2!",
                "--------+--------",
                " 2   1  | 4   3",
                " 4   3  | 2! [2]!",
            ],
        )


@unittest.skipIf(NOT_INSTALLED, f"not installed: {NOT_INSTALLED}")
class Animation(FolderTest):
    def test_each_mark_stands_in_its_cell(self):
        """The pixels that a mark changes are a square, placed as the cell is in the grid."""
        for size in sudoku.BOX_SHAPES:
            nothing = np.zeros(size * size, bool)
            blank = solve.Step(nothing.astype(np.uint8), nothing, nothing, 0.0, 0.0)

            unmarked = solve.draw_frame(blank.grid, blank, "", "")

            def place(mark, cell):
                """First and last column and row of pixels that the mark changes."""
                marked = blank._replace(**{mark: np.arange(size * size) == cell})
                frame = solve.draw_frame(blank.grid, marked, "", "")
                y, x = np.nonzero((frame != unmarked).any(-1))
                return np.array([x.min(), x.max(), y.min(), y.max()])

            for mark in ("changed", "conflicts"):
                first, last = place(mark, 0), place(mark, size * size - 1)
                pitch = (last - first)[0] / (size - 1)
                for cell in (1, size, size * (size // 2) + size - 1):
                    row, column = divmod(cell, size)
                    found = place(mark, cell)
                    expected = first + pitch * np.array([column, column, row, row])
                    what = size, mark, cell, found, expected
                    self.assertLess(np.abs(found - expected).max(), 4, what)
                    for side in (found[1] - found[0], found[3] - found[2]):
                        self.assertTrue(0.75 * pitch < side < pitch + 1, what)

    def test_givens_are_bold_and_confidence_is_a_length(self):
        solution = sudoku.parse("1234341221434321")
        nothing = np.zeros(16, bool)
        step = solve.Step(solution, nothing, nothing, 0.25, 0.0)

        def dark(puzzle, step):
            """Pixels darker than half, as a given's black and the other digits' grey both are."""
            return int((solve.draw_frame(puzzle, step, "title", "remark").max(-1) < 128).sum())

        self.assertGreater(dark(solution, step), 1.05 * dark(solution * 0, step))
        amounts = [
            dark(solution, step._replace(halting=halting)) for halting in (0.2, 0.4, 0.6, 0.8)
        ]
        self.assertTrue(all(np.diff(amounts) > 0.8 * np.diff(amounts).max()), amounts)

    def test_a_failed_write_leaves_the_old_file_as_it_was(self):
        from PIL import Image

        file = self.folder / "old.gif"
        file.write_bytes(b"old")

        def half(image, path, **options):
            with open(path, "wb") as target:
                target.write(b"half")
            raise OSError(28, "No space left on device")

        puzzle = sudoku.parse(PUZZLE)
        step = solve.Step(puzzle, puzzle == 0, puzzle == 0, 0.5, 1.0)
        with mock.patch.object(Image.Image, "save", half), self.assertRaises(OSError):
            solve.write_gif(str(file), puzzle, [step])
        self.assertEqual(file.read_bytes(), b"old")
        self.assertEqual(
            [path.name for path in self.folder.iterdir() if "old" in path.name], ["old.gif"]
        )


if __name__ == "__main__":
    unittest.main()
