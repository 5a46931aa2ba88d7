"""Grids of a sweep: the names and lengths of their runs, what is refused, and a grid that really
trains, interrupted and finished."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import unittest
from unittest import mock

from sweep_grid import Point, parse_grid
from sweep_state import SweepFolder

from checkpoint_manager import load_checkpoint
from config import load_config
from schedule import evaluation_interval_steps, total_steps
from storage import join
from tests.helpers import ROOT, TINY, CommandTest, FolderTest, write_config
from tests.sweeps import SweepTest

BATCH = "training.global_batch_size"


def names(*words):
    return [point.name for point in parse_grid(list(words), None, []).points]


class Names(FolderTest):
    def test_each_combination_once(self):
        self.assertEqual(
            names("training.lr=1e-4,2e-4", f"{BATCH}=512,768"),
            [
                "_lr1e-4_global_batch_size512",
                "_lr1e-4_global_batch_size768",
                "_lr2e-4_global_batch_size512",
                "_lr2e-4_global_batch_size768",
            ],
        )
        self.assertEqual(parse_grid([], None, []).points, (Point(),))

    def test_a_value_has_one_name_however_it_is_written(self):
        for written, name in [
            ("1e-4,0.0001", "1e-4"),
            ("0.00066667,6.6667E-4", "6.6667e-4"),
            ("0.0123,1.23e-2", "0.0123"),
            ("1,1.0,1e0", "1"),
            ("250000,2.5e5", "250000"),
            ("1e+22,1e22", "1e22"),
        ]:
            for value in written.split(","):
                with self.subTest(value):
                    point, _ = parse_grid([f"training.lr={value},7"], None, []).points
                    self.assertEqual(point.name, f"_lr{name}")
                    path = write_config(self.folder / "a.yaml")
                    config = load_config(path, point.overrides)
                    self.assertEqual(config.training.lr, float(value))
        self.assertEqual(
            names("training.num_workers=null,2.0", "training.ema=true,false")[::3],
            ["_num_workersnull_ematrue", "_num_workers2_emafalse"],
        )

    def test_two_keys_with_the_same_last_part(self):
        self.assertEqual(
            names("logging.interval_steps=5", "checkpoint.interval_steps=7,9", "training.lr=1"),
            [
                "_logging_interval_steps5_checkpoint_interval_steps7_lr1",
                "_logging_interval_steps5_checkpoint_interval_steps9_lr1",
            ],
        )

    def test_a_name_is_one_folder_for_every_system(self):
        grid = parse_grid(["data.dataset_path=data/a b,../c:d,'1e3'"], None, [])
        self.assertEqual(
            [point.name for point in grid.points],
            ["_dataset_pathdata-a-b", "_dataset_path..-c-d", "_dataset_path1e3"],
        )
        path = write_config(self.folder / "a.yaml")
        self.assertEqual(
            [load_config(path, point.overrides).data.dataset_path for point in grid.points],
            ["data/a b", "../c:d", "1e3"],
        )


class Mistakes(FolderTest):
    def test_each_is_told(self):
        for words, same, says in [
            (["training.lrr=1,2"], None, ["--grid: training.lrr: there is no such key; did you"]),
            (["training.lr"], None, ["--grid training.lr: write section.key=value,value"]),
            (["training.lr="], None, ["--grid training.lr=: a value is missing"]),
            (["training.lr=1,,2"], None, ["a value is missing"]),
            (["training.lr=1,fast"], None, ["--grid: training.lr = 'fast': must be a finite"]),
            (["training.lr=1,-1"], None, ["--grid: training.lr = -1.0: must be > 0"]),
            (["training.lr=1,2", "training.lr=3"], None, ["training.lr is given twice: write"]),
            (["training.lr=1e-4,0.0001"], None, ["training.lr = 1e-4 is given twice: give"]),
            (["training.lr=1", "model.L_layers=2"], None, ["training.lr=1 model.L_layers=2: this"]),
            (["training.beta1=0.5,0.6"], None, ["--grid: training.beta1 is also an override"]),
            (["training.curriculum=null,[1]"], None, ["a list is no value of a grid"]),
            (["data.dataset_path=a/b,a-b"], None, ["dataset_path=a/b and data.dataset_path=a-b"]),
            (["training.seed=1,2"], None, ["training.seed cannot be in a grid: give the seeds by"]),
            (["logging.output_dir=a,b"], None, ["all runs of a sweep lie in one folder"]),
            (["tpu.accelerator_type=v4-8,v4-16"], None, ["name the slices by --slices"]),
            ([], "steps", ["--same steps: only with --grid"]),
            (["training.lr=1,2"], "steps", ["--same steps: only with training.global_batch_size"]),
            (["training.lr=1,2"], "examples", ["--same examples: only with"]),
            (
                [f"{BATCH}=8,16", "training.epochs=1,2"],
                "steps",
                ["--same steps: training.epochs in --grid changes how many steps a run has"],
            ),
            (
                [f"{BATCH}=8,16", "data.expected_puzzles=1,2"],
                "examples",
                ["--same examples: data.expected_puzzles in --grid"],
            ),
            (
                ["training.lr=fast,1,slow", "modell.x=1,2", f"{BATCH}=8.5,16"],
                None,
                ["training.lr = 'fast'", "training.lr = 'slow'", "modell.x: there", "= 8.5: must"],
            ),
        ]:
            with self.subTest(words):
                override = ["training.beta1=0.5"]
                message = self.user_error(lambda: parse_grid(words, same, override), *says)
                self.assertEqual(len(message.split("\nerror: ")), len(says), message)

    def test_a_grid_that_says_how_long_its_runs_are_has_nothing_in_common(self):
        words = [f"{BATCH}=8,16", "training.epochs=1,2"]
        self.assertIsNone(parse_grid(words, None, []).same)
        self.assertEqual(parse_grid(words[:1], None, []).same, "examples")
        self.assertIsNone(parse_grid(["training.lr=1,2"], None, []).same)


class Lengths(FolderTest):
    def plans(self, same, batches, puzzles, *overrides):
        """[(steps, steps between evaluations, examples)] of the configuration's own batch 8, then
        of each of the batches."""
        text = TINY.format(data="nowhere", out="runs")
        path = str(write_config(self.folder / "a.yaml", text))
        overrides = [f"data.expected_puzzles={puzzles}", *overrides]
        grid = parse_grid([f"{BATCH}={','.join(map(str, batches))}"], same, overrides)
        changes = [[], *(grid.overrides(path, overrides, point) for point in grid.points)]
        configs = [load_config(path, [*overrides, *own]) for own in changes]
        self.assertEqual({config.training.lr_warmup_steps for config in configs}, {10})
        self.assertEqual({config.checkpoint.interval_steps for config in configs}, {7})
        return [
            (
                (steps := total_steps(config, puzzles)),
                evaluation_interval_steps(config, puzzles),
                steps * config.training.global_batch_size,
            )
            for config in configs
        ]

    def test_same_examples(self):
        """Up to part of a batch, and evaluations after as many examples."""
        self.assertEqual(
            self.plans("examples", [4, 8, 16, 32], 80),
            [(60, 20, 480), (120, 40, 480), (60, 20, 480), (30, 10, 480), (15, 5, 480)],
        )
        own, *others = self.plans("examples", [12, 100], 90, "training.epochs=7.3")
        self.assertEqual((own, others), ((82, 22, 656), [(54, 15, 648), (6, 2, 600)]))

    def test_same_steps(self):
        """Whatever the rounding, and evaluations after as many steps."""
        batches = [1, 3, 5, 7, 8, 12, 48, 49, 96, 768, 1000, 3072]
        for puzzles in (80, 100, 7777):
            for epochs in ("6", "0.3", "2.32", "8.8", "1000", "33333.3"):
                own, *others = self.plans("steps", batches, puzzles, f"training.epochs={epochs}")
                self.assertEqual({plan[:2] for plan in others}, {own[:2]}, (puzzles, epochs))
                self.assertEqual([plan[2] // own[0] for plan in others], batches)

    def test_same_steps_needs_the_number_of_puzzles(self):
        path = str(write_config(self.folder / "a.yaml", TINY.format(data="nowhere", out="runs")))
        grid = parse_grid([f"{BATCH}=8,16"], "steps", [])
        self.user_error(
            lambda: grid.overrides(path, [], grid.points[0]),
            f"{path}: data.expected_puzzles = None: --same steps needs the number of training",
            "nowhere has no training set here",
        )

    def test_the_batch_of_the_configuration_need_not_fit_the_slice(self):
        """Only those of the grid do."""
        text = "data: {dataset_path: x, expected_puzzles: 80}\ndevice: tpu\n"
        text += "training: {global_batch_size: 10, epochs: 1}\n"
        path = str(write_config(self.folder / "a.yaml", text))
        grid = parse_grid([f"{BATCH}=32,64"], "steps", [])
        own = grid.overrides(path, [], grid.points[1])
        self.assertEqual(load_config(path, own).training.epochs, 6.4)


class Sweeps(SweepTest):
    """Launchers, with the fake training."""

    GRID = ("--grid", "training.lr=1e-2,2e-2", f"{BATCH}=8,16")
    CELLS = [f"a_lr{lr}_global_batch_size{batch}" for lr in ("0.01", "0.02") for batch in (8, 16)]
    PUZZLES = "data.expected_puzzles=80"

    def configs_of(self, *cells):
        folder = SweepFolder(join(self.out, "sweep"))
        return [folder.progress(join(self.out, name)).config for name in cells]

    def test_each_cell_once_with_its_values(self):
        arguments = (*self.configs("a"), "--local", "--jobs", "2", *self.GRID)
        output = self.sweep(*arguments)
        self.assertEqual(self.starts(), dict.fromkeys(self.CELLS, 1))
        self.assertEqual(
            [
                (config["training"]["lr"], config["training"]["global_batch_size"])
                for config in self.configs_of(*self.CELLS)
            ],
            [(0.01, 8), (0.01, 16), (0.02, 8), (0.02, 16)],
        )
        self.assertEqual(self.row(output, self.CELLS[3])[1], "finished")
        # the same values, written in another way, are the same cells; a new value adds its own
        again = ("--grid", "training.lr=0.01,0.02,3e-2", "--grid", f"{BATCH}=8,16.0")
        self.sweep(*self.configs("a"), "--local", *again)
        self.assertEqual(
            self.starts(),
            dict.fromkeys(
                [*self.CELLS, "a_lr0.03_global_batch_size8", "a_lr0.03_global_batch_size16"], 1
            ),
        )
        status = self.sweep(*self.configs("a"), "--status", *self.GRID)
        self.assertIn("4 cell(s)", status)

    def test_with_configurations_seeds_and_overrides(self):
        grid = ("--grid", "training.lr=1,2", "--seeds", "0", "1", "training.beta1=0.5")
        self.sweep(*self.configs("ab"), "--local", "--jobs", "4", *grid)
        cells = [f"{name}_lr{lr}_seed{k}" for name in "ab" for lr in (1, 2) for k in (0, 1)]
        self.assertEqual(self.starts(), dict.fromkeys(cells, 1))
        self.assertEqual({config["training"]["beta1"] for config in self.configs_of(*cells)}, {0.5})

    def test_stopped_and_gone_on_with_from_another_host(self):
        self.plan = {self.CELLS[1]: ["wait"]}
        arguments = (*self.configs("a"), "--local", *self.GRID)
        first = self.begin(*arguments, host="elsewhere")
        first.until(lambda: self.pids(self.CELLS[1]))
        first.send_signal(signal.SIGTERM)
        first.ends(143)
        self.assertEqual(self.states(*self.CELLS), ["finished"] + ["waiting"] * 3)
        self.sweep(*arguments)
        self.assertEqual(self.starts(), dict(zip(self.CELLS, (1, 2, 1, 1))))
        # cells of the same name and another length are other cells
        steps = self.sweep(*arguments, "--same", "steps", self.PUZZLES, status=2)
        self.assertRegex(steps, r"global_batch_size16 was begun with another .*training\.epochs 6")

    def test_dry_run_shows_values_steps_and_examples(self):
        arguments = (*self.configs("a"), "--local", "--dry_run", *self.GRID, self.PUZZLES)
        output = self.sweep(*self.configs("a"), "--local", "--dry_run", *self.GRID)
        self.assertEqual(
            self.row(output, self.CELLS[1])[1:], ["0.01", "16", "unknown", "unknown", "10"]
        )
        for same, rows in [
            ("examples", [["60", "480", "10", "(16.7%)"], ["30", "480", "10", "(33.3%)"]]),
            ("steps", [["60", "480", "10", "(16.7%)"], ["60", "960", "10", "(16.7%)"]]),
        ]:
            output = self.sweep(*arguments[:-1], "--same", same, self.PUZZLES)
            self.assertIn(f"4 cells: as many {same} each as the configuration", output)
            self.assertEqual(
                [self.row(output, name)[1:] for name in self.CELLS],
                [
                    [lr, batch, *row]
                    for lr in ("0.01", "0.02")
                    for batch, row in zip("8 16".split(), rows)
                ],
            )
            self.assertRegex(output, r"(?m)^a_lr0\.02_global_batch_size16  waiting  .*train_tpu")
        self.assertEqual(self.starts(), {})
        self.assertFalse((self.folder / "runs").exists())

    def test_mistakes_of_all_cells_before_the_first_begins(self):
        good = self.configs("a")
        for arguments, says in [
            (
                ("training.num_workers=4", "--grid", f"{BATCH}=8,10,11"),
                ["= 10: must", "= 11: must"],
            ),
            (
                ("--grid", "training.lr=1,2", "--same", "epochs"),
                ["--same: invalid choice: 'epochs'"],
            ),
            (("--grid",), ["--grid: expected at least one argument"]),
            (("--grid", "training.lr=1,2", "--same", "steps"), ["--same steps: only with"]),
            (
                (self.PUZZLES, "--grid", f"{BATCH}=8,999"),
                ["a_global_batch_size999: training.epochs"],
            ),
            (("training.lr=1", "--grid", "training.lr=1,2"), ["training.lr is also an override"]),
            (("--grid", "training.lr=1,2", *self.configs("b")), ["b.yaml: write section.key"]),
        ]:
            with self.subTest(arguments):
                output = self.sweep(*good, "--local", *arguments, status=2)
                errors = [line for line in output.splitlines() if line.startswith("error: ")]
                self.assertEqual(len(errors), len(says), output)
                for error, text in zip(errors, says):
                    self.assertIn(text, error)
        self.assertEqual(self.starts(), {})
        self.assertFalse((self.folder / "runs").exists())
        output = self.sweep("--status", "--grid", "training.lr=1,2", status=2)
        self.assertIn("error: --grid: of which configuration?", output)


class Headers(SweepTest):
    """The commands in the headers of the configurations that are there for a grid."""

    def planned(self, name):
        """{cell: [values, steps, examples, warm-up]} of the command in configs/NAME.yaml."""
        text = (ROOT / "configs" / f"{name}.yaml").read_text().replace("\\\n# ", "")
        words = shlex.split(re.search(r"bash scripts/launch_sweep.sh (.*)", text)[1])
        output = self.sweep(*words, "--dry_run", f"logging.output_dir={self.out}")
        table = output.partition("\n\n")[0].splitlines()[2:]
        return {row[0]: row[1:5] for row in map(str.split, table)}

    def test_e3_4(self):
        with mock.patch.dict(os.environ, {"TPU_PROJECT": "my-project-1"}):
            os.environ.pop("TPU_BUCKET", None)
            self.out = "runs"
            cells = self.planned("e3_4")
        self.assertEqual(len(cells), 16)
        self.assertEqual(
            cells["e3_4_lr1e-4_global_batch_size768"], ["1e-4", "768", "65,104", "49,999,872"]
        )
        self.same_as_the_header("e3_4", cells)

    def test_mini_e3_4(self):
        cells = self.planned("mini/mini_e3_4")
        self.assertEqual(len(cells), 9)
        self.assertEqual(
            cells["mini_e3_4_lr4e-3_global_batch_size64"], ["4e-3", "64", "500", "32,000"]
        )
        self.same_as_the_header("mini/mini_e3_4", cells)

    def same_as_the_header(self, name, cells):
        (time,) = re.findall(
            r"^# time: (.*?)^# run:", (ROOT / f"configs/{name}.yaml").read_text(), re.S | re.M
        )
        for _, _, steps, _ in cells.values():
            self.assertRegex(time, rf"\b{steps}\b")
        self.assertIn(f"There are {len(cells)} runs", " ".join(time.replace("#", "").split()))


class RealTraining(CommandTest, SweepTest):
    def setUp(self):
        SweepTest.setUp(self)
        self.arrivals = self.folder / "arrivals"
        self.arrivals.touch()
        self.folder = type(self).folder  # the runs of a class lie in one
        self.out = str(self.folder / "runs")

    def test_a_grid_is_stopped_then_finished(self):
        """Each cell ends as a training by hand with its values does."""
        slow = {
            "TRM_TEST_PAUSES": json.dumps({"train_step": 0.05}),
            "TRM_TEST_ARRIVALS": str(self.arrivals),
        }
        arguments = (str(self.config), "--local", "--jobs", "2", "training.epochs=2")
        arguments += ("--grid", "training.lr=1e-2,2e-3", f"{BATCH}=8,16", "--same", "steps")
        cells = [
            f"tiny_lr{lr}_global_batch_size{size}" for lr in ("0.01", "2e-3") for size in (8, 16)
        ]
        first = self.begin(*arguments, training="slow", **slow)
        first.until(lambda: self.arrivals.read_text().count("train_step") >= 17)
        first.send_signal(signal.SIGINT)
        first.ends(130)
        self.assertEqual(self.states(*cells), ["waiting"] * 4)
        output = self.sweep(*arguments, training="slow", TRM_TEST_PAUSES="{}")
        self.assertEqual([self.row(output, name)[1] for name in cells], ["finished"] * 4)
        self.assertEqual([self.row(output, name)[3] for name in cells], ["20"] * 4)
        self.assertIn("goes on after step", self.log(cells[0]))
        for name in cells:
            evaluation = json.loads((self.folder / "runs" / name / "eval.json").read_text())
            self.assertEqual({result["step"] for result in evaluation["results"]}, {20})
        by_hand = ("training.lr=2e-3", f"{BATCH}=16", "training.epochs=4")
        self.train("--run_name", "by_hand", *by_hand, "evaluation.interval_epochs=4")
        self.assertEqual(self.records(cells[3]), self.records("by_hand"))
        self.same_content(
            load_checkpoint(self.checkpoint(cells[3], 20)),
            load_checkpoint(self.checkpoint("by_hand", 20)),
        )

    def test_the_dataset_of_each_cell_is_looked_at(self):
        """And tells the number of puzzles, where the configuration does not."""
        data = f"data.dataset_path={self.folder}/nowhere,{self.folder}/data"
        command = [sys.executable, "scripts/sweep.py", str(self.config), "--local", "--dry_run"]
        for grid, status, says in [
            (["training.lr=1,2", data], 2, "nowhere': there is no train split"),
            ([f"{BATCH}=8,40", "--same", "steps"], 0, r"size40 +40 +60 +2,400 "),
        ]:
            done = subprocess.run(
                [*command, f"logging.output_dir={self.folder}/none", "--grid", *grid],
                cwd=ROOT,
                text=True,
                capture_output=True,
                timeout=120,
            )
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertRegex(done.stdout + done.stderr, says)
        self.assertFalse((self.folder / "none").exists())


if __name__ == "__main__":
    unittest.main()
