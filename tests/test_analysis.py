"""Reading run folders, and comparing runs with a baseline and with the paper.

The numbers are those of the files. Also seeds, intervals and paired tests.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
import pandas as pd

from storage import join, open_folder
from tests.gcs_server import GCSTest
from tests.helpers import ROOT, CommandTest, FolderTest
from tests.run_folders import DATASETS, START, solved_first, stop_at, write_run

sys.path.insert(0, str(ROOT / "analysis"))
import compare_experiments
import paper
import results
import run_groups
import study_statistics
import tables

from config import load_config
from evaluation import unpack_solved
from utils import run_cli


def groups_in(folder):
    return run_groups.group_runs(results.load_runs(folder))


class AnalysisCommandTest(FolderTest):
    def command(self, script, *args):
        """stdout of analysis/script in a process of its own."""
        done = subprocess.run(
            [sys.executable, f"analysis/{script}", *map(str, args)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=300,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")
        return done.stdout

    def inside(self, module, *args):
        """(status, stdout, stderr) of a script's command line in this process.

        A process of its own would take seconds to import everything once more.
        """
        with (
            mock.patch.object(sys, "argv", [module.__file__, *map(str, args)]),
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as said,
        ):
            with self.assertRaises(SystemExit) as end:
                run_cli(module.main)
        return end.exception.code or 0, out.getvalue(), said.getvalue()

    def mistake(self, says, module, *args):
        """The command line must end with status 2 and one line."""
        status, _, said = self.inside(module, *args)
        self.assertEqual(status, 2, said)
        self.assertRegex(said, r"\Aerror: .*\n\Z")
        self.assertIn(says, said)


class RealRuns(CommandTest):
    """A run, one without an average, and a stopped run that two workers continued."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for name, *flags in (
            ("e1_1_seed0",),
            ("e2_1", "training.ema=false"),
            ("stopped", "model.H_cycles=1", "--max_steps", "25"),
            ("stopped", "model.H_cycles=1", "--max_steps", "45", "training.num_workers=2"),
        ):
            cls().train("--run_name", name, *flags)
        cls.groups = groups_in(cls.folder / "runs")

    def run_of(self, name):
        return next(run for group in self.groups for run in group.runs if run.name == name)

    def content(self, run_name, file):
        text = (self.folder / "runs" / run_name / file).read_text()
        return (
            json.loads(text)
            if file.endswith(".json")
            else [json.loads(line) for line in text.splitlines()]
        )

    def test_groups_and_states(self):
        self.assertEqual(
            [(group.label, [run.seed for run in group.runs]) for group in self.groups],
            [("e1_1", [0]), ("e2_1", [0]), ("stopped", [0])],
        )
        self.assertEqual(
            [run.state for group in self.groups for run in group.runs],
            ["finished"] * 2 + ["unfinished: step 45 of 60"],
        )
        self.assertEqual(
            run_groups.differences(*self.groups[1::-1]), {"training.ema": (True, False)}
        )
        self.assertEqual(self.run_of("e1_1_seed0").config_name, "tiny")
        self.assertEqual({run.train_puzzles for group in self.groups for run in group.runs}, {80})

    def test_final_numbers_are_those_of_eval_json(self):
        table = tables.evaluations_table(self.groups)
        expected = [
            (
                name,
                r["weights"],
                r["step"],
                r["count"],
                r["exact_accuracy"],
                r["cell_accuracy"],
                r["lm_loss"],
            )
            for name in ("e1_1_seed0", "e2_1")
            for r in self.content(name, "eval.json")["results"]
        ]
        self.assertEqual(
            list(
                table[
                    [
                        "run",
                        "weights",
                        "step",
                        "count",
                        "exact_accuracy",
                        "cell_accuracy",
                        "lm_loss",
                    ]
                ].itertuples(index=False, name=None)
            ),
            expected,
        )
        self.assertEqual(len(expected), 3)
        for row in table.itertuples():
            self.assertTrue(
                row.low <= row.exact_accuracy <= row.high
                and row.count == 50
                and row.parameters > 1000
                and row.supervision_steps == 3
            )

    def test_curves_are_those_of_metrics_jsonl(self):
        for name in ("e1_1_seed0", "stopped"):
            records, run = self.content(name, "metrics.jsonl"), self.run_of(name)
            train = [r for r in records if r["split"] == "train"]
            self.assertEqual(
                run.train[["step", "loss", "examples"]].values.tolist(),
                [[r["step"], r["loss"], 8 * r["step"]] for r in train],
            )
            self.assertEqual(
                (3600 * run.train.hours).round(9).tolist(),
                [round(r["train_seconds"], 9) for r in train],
            )
            looks = [r for r in records if r["split"] == "test" and r["count"] == 20]
            self.assertEqual(
                run.evaluations[["step", "exact_accuracy"]].values.tolist(),
                [[r["step"], r["exact_accuracy"]] for r in looks],
            )
            self.assertEqual(len(looks), 3 if name == "e1_1_seed0" else 2)
            self.assertAlmostEqual(
                run.flops_per_step
                / (train[-1]["model_flops_per_second"] / train[-1]["steps_per_second"]),
                1,
            )

    def test_chip_hours_count_the_workers_of_each_start(self):
        run, starts = self.run_of("stopped"), self.content("stopped", "starts.jsonl")
        self.assertEqual([(s["step"], s["world_size"]) for s in starts], [(0, 1), (25, 2)])
        on_chips = dataclasses.replace(run, starts=[{**s, "device": "cuda"} for s in starts])
        until = starts[1]["train_seconds"]
        self.assertAlmostEqual(3600 * on_chips.chip_hours, until + 2 * (3600 * run.hours - until))
        self.assertEqual(run.device, f"cpu, {starts[0]['device_model']}, 2 workers")

    def test_mcnemar_of_two_trainings(self):
        outcomes = [
            unpack_solved(self.content(name, "eval.json")["results"][0]["solved"], 50)
            for name in ("e1_1_seed0", "e2_1")
        ]
        gained, lost, _ = run_groups.paired_test(self.run_of("e2_1"), self.run_of("e1_1_seed0"))
        self.assertEqual(
            (gained, lost),
            (int((outcomes[1] & ~outcomes[0]).sum()), int((outcomes[0] & ~outcomes[1]).sum())),
        )

    def test_eval_only_of_an_earlier_checkpoint_does_not_count_as_the_end(self):
        folder = self.folder / "copied" / "e2_1"
        shutil.copytree(self.folder / "runs" / "e2_1", folder)
        content = self.content("e2_1", "eval.json")
        content["results"][0] |= {"step": 40, "exact_accuracy": 0.123}
        (folder / "eval.json").write_text(json.dumps(content))
        (run,) = results.load_runs(folder)
        last = [r for r in self.content("e2_1", "metrics.jsonl") if r.get("count") == 50][-1]
        self.assertEqual(run.final("raw"), last)
        self.assertTrue(run.finished)
        self.assertNotIn("solved", run.final("raw"))

    def test_the_command_on_folders(self):
        names = [str(self.folder / "runs" / name) for name in ("e1_1_seed0", "e2_1", "stopped")]
        done = subprocess.run(
            [sys.executable, "analysis/compare_experiments.py", *names, "--format", "csv"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        )
        table = pd.read_csv(io.StringIO(done.stdout))
        self.assertEqual(table.run.tolist(), ["e1_1", "e2_1", "stopped"])
        self.assertEqual(
            table.changes.tolist(), ["baseline", "ema True -> False", "H_cycles 2 -> 1"]
        )
        self.assertEqual(
            table.state.tolist(), ["finished", "finished", "unfinished: step 45 of 60"]
        )
        self.assertAlmostEqual(
            table.raw[1], self.content("e2_1", "eval.json")["results"][0]["exact_accuracy"]
        )
        self.assertTrue(np.isnan(table.ema[1]) and np.isnan(table.ema[2]))


class MadeRuns(FolderTest):
    def setUp(self):
        super().setUp()
        self.runs = self.folder / "runs"

    def load(self, *args, **how):
        return results.load_runs(
            write_run(self.runs / f"run{len(list(self.runs.glob('run*')))}", *args, **how)
        )[0]

    def test_a_last_line_that_is_being_written_is_no_record(self):
        folder = write_run(self.runs / "cut", steps=200)
        before = results.load_runs(folder)[0].records
        for name in ("metrics.jsonl", "starts.jsonl"):
            with open(folder / name, "a") as file:
                file.write('{"step": 240, "spl')
        run = results.load_runs(folder)[0]
        self.assertEqual(
            (run.records, len(run.starts), run.state), (before, 1, "unfinished: step 200 of 400")
        )

    def test_missing_files_and_keys(self):
        folder = write_run(self.runs / "bare", starts=())
        lines = [
            {
                k: v
                for k, v in json.loads(line).items()
                if k not in ("train_seconds", "model_flops_per_second", "cell_accuracy")
            }
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "eval.json").unlink()
        (run,) = results.load_runs(folder)
        self.assertTrue(
            np.isnan(run.hours) and np.isnan(run.chip_hours) and np.isnan(run.flops_per_step)
        )
        # the evaluation of 100 puzzles at the last step is no final one
        self.assertEqual(
            (run.state, run.device, run.train_puzzles, run.final("ema")),
            ("trained to the end, no final evaluation (eval.json)", "unknown", 1000, None),
        )
        (folder / "metrics.jsonl").unlink()
        (run,) = results.load_runs(folder)
        self.assertEqual(
            (run.state, run.best, run.final("ema"), len(run.train)),
            ("no records yet", None, None, 0),
        )

    def test_weights_that_were_only_evaluated(self):
        folder = write_run(self.runs / "weights")
        (folder / "metrics.jsonl").unlink()
        content = json.loads((folder / "eval.json").read_text())
        content["results"][0]["step"] = None
        (folder / "eval.json").write_text(json.dumps(content))
        (run,) = results.load_runs(folder)
        self.assertEqual((run.state, run.final("ema")["exact_accuracy"]), ("evaluated only", 0.5))

    def test_a_damaged_run_is_named_and_left_out(self):
        write_run(self.runs / "good")
        damaged = write_run(self.runs / "damaged") / "metrics.jsonl"
        damaged.write_text("{\n" + damaged.read_text())
        (self.runs / "no_config").mkdir()
        (self.runs / "no_config" / "metrics.jsonl").write_text("")
        (self.runs / "other_device").mkdir()
        (self.runs / "other_device" / "config.yaml").write_text("device: abacus\n")
        (write_run(self.runs / "no_yaml") / "config.yaml").write_text("model: [\n")
        (write_run(self.runs / "half_eval") / "eval.json").write_text('{"results": [{"weigh')
        with contextlib.redirect_stderr(io.StringIO()) as said:
            found = results.load_runs(self.runs)
        self.assertEqual([run.name for run in found], ["good"])
        self.assertEqual(said.getvalue().count("\n"), 5)
        for text in (
            f"damaged is left out: {damaged}: a record is damaged (line 1",
            "no_yaml is left out: ParserError: ",
            "half_eval is left out: Unterminated string",
            "no_config is left out: it has no configuration",
            "other_device is left out: ",
        ):
            self.assertIn(text, said.getvalue())

    def test_no_runs(self):
        (self.folder / "empty").mkdir()
        for place in ("empty", "nowhere"):
            self.user_error(
                lambda place=place: results.load_runs(self.folder / place),
                str(self.folder / place),
                "there is no run here or below",
            )

    def test_a_run_of_another_version_of_the_kit(self):
        folder = write_run(self.runs / "older")
        text = (folder / "config.yaml").read_text().replace(
            "  ema: true\n", "  gone_knob: 1\n"
        ) + "gone_section: {a: 1}\n"
        (folder / "config.yaml").write_text(text)
        (run,) = results.load_runs(folder)
        self.assertIs(run.config.training.ema, True)

    def test_chip_hours_after_crashes(self):
        """Of three starts the second was void: the third went on from an earlier step."""
        run = self.load(
            starts=(
                {"device": "tpu", "world_size": 4},
                {"device": "tpu", "step": 200, "train_seconds": 7200.0, "world_size": 8},
                {"device": "tpu", "step": 100, "train_seconds": 3600.0, "world_size": 2},
            )
        )
        self.assertAlmostEqual(run.hours, 4)
        self.assertAlmostEqual(run.chip_hours, 4 * 1 + 2 * 3)
        np.testing.assert_allclose(run.train.chip_hours.iloc[[0, -1]], (0.4 * 4, 10))
        lost = {"device": "tpu", "train_seconds": 3600.0}  # what was before it is not known
        self.assertTrue(np.isnan(self.load(["training.seed=1"], starts=(lost,)).chip_hours))

    def test_a_cpu_has_no_chip_hours(self):
        for seed, starts in enumerate(
            (
                ({"device": "cpu"},),
                ({"device": "xla_cpu"},),
                ({"device": "cpu"}, {"device": "tpu", "step": 200, "train_seconds": 7200.0}),
            )
        ):
            run = self.load([f"training.seed={seed}"], starts=starts)
            self.assertTrue(np.isnan(run.chip_hours) and run.train.chip_hours.isna().all())
            self.assertAlmostEqual(run.hours, 4)

    def test_grouping(self):
        for name, overrides, starts in (
            ("a_seed0", [], ({},)),
            (
                "a_seed1",
                ["training.seed=1", "training.num_workers=4", "data.dataset_path=elsewhere"],
                ({},),
            ),
            ("b", ["training.lr=2e-4"], ({},)),
            (
                "c/a_seed0",
                [],
                ({"datasets": {**DATASETS, "test": {"puzzles": 400, "sha256": "c" * 64}}},),
            ),
            ("d", [], ({"init_from": "weights.pt"},)),
        ):
            write_run(self.runs / name, overrides, starts=starts)
        write_run(self.runs / "a_seed1_again", ["training.seed=1"], steps=40)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            groups = groups_in(self.runs)
        self.assertEqual(
            [(group.label, [run.name for run in group.runs]) for group in groups],
            [
                ("a_seed0", ["a_seed0", "a_seed1"]),
                ("b", ["b"]),
                ("c/a_seed0", ["c/a_seed0"]),
                ("d", ["d"]),
            ],
        )
        self.assertIn("a_seed1_again is left out: ", said.getvalue())
        self.assertEqual(
            run_groups.differences(groups[1], groups[0]), {"training.lr": (1e-4, 2e-4)}
        )
        self.assertEqual(list(run_groups.differences(groups[2], groups[0])), ["dataset.test"])
        self.assertEqual(
            run_groups.differences(groups[3], groups[0]), {"init_from": (None, "weights.pt")}
        )
        self.assertIs(run_groups.find_group(groups, "a_seed1"), groups[0])
        self.user_error(
            lambda: run_groups.find_group(groups, "e"),
            "'e': there is no such run: the runs are a_seed0, b, c/a_seed0, d",
        )

    def test_unfinished_seeds_are_not_averaged(self):
        for seed, share in ((0, 0.9), (1, 0.7), (2, 0.1)):
            seed_flag = [f"training.seed={seed}"]
            write_run(self.runs / f"a_seed{seed}", seed_flag, solved_first(share))
        stop_at(self.runs / "a_seed2", 200)
        for seed, steps in ((0, 80), (1, 160)):
            overrides = [f"training.seed={seed}", "model.H_cycles=5"]
            write_run(self.runs / f"b_seed{seed}", overrides, steps=steps)
        a, b = groups_in(self.runs)
        self.assertEqual([run.seed for run in a.averaged], [0, 1])
        self.assertEqual((a.mean("hours"), a.accuracy().mean, a.accuracy().runs), (4, 0.8, 2))
        self.assertEqual(a.state, "1 of 3 seeds unfinished and not averaged")
        # without a finished seed the one that has come furthest stands for the group
        self.assertEqual(([run.seed for run in b.averaged], b.mean("hours")), ([1], 1.6))
        table = compare_experiments.comparison([a, b], a).set_index("run")
        self.assertEqual(table.averaged.tolist(), ["0 1", "1"])
        np.testing.assert_allclose(table.loc["a", ["ema", "best"]].astype(float), 0.8)
        self.assertEqual(table.hours.tolist(), [4, 1.6])
        by_step = tables.steps_table([a]).set_index("supervision_steps")
        np.testing.assert_allclose(by_step.exact_accuracy, (0.4, 0.8))

    def test_a_copied_folder_does_not_hide_its_original(self):
        """Also where the copy comes first in the order of names, and is as far."""
        start = {"command": f"{START['command']} --run_name b_seed0"}
        original = write_run(self.runs / "b_seed0", starts=(start,))
        shutil.copytree(original, self.runs / "a_copy")
        shutil.copytree(original, self.runs / "c_old_copy")
        stop_at(self.runs / "c_old_copy", 200)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            (group,) = groups_in(self.runs)
        self.assertEqual([run.name for run in group.runs], ["b_seed0"])
        self.assertEqual([run.name for run, _ in group.left_out], ["a_copy", "c_old_copy"])
        for how_far, (_, why) in zip(("as far", "further"), group.left_out):
            self.assertRegex(why, f"copies of one training, and b_seed0 came {how_far}")
        self.assertEqual(said.getvalue().count("is left out"), 2)
        self.assertIs(run_groups.find_group([group], "a_copy"), group)

    def test_records_in_which_nobody_halted_have_no_accuracies(self):
        """Null, or 0 in records of an earlier version of the kit."""
        folder = write_run(self.runs / "a")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        for k, value in ((0, None), (1, 0.0)):
            nothing = dict.fromkeys(("exact_accuracy", "cell_accuracy", "mean_steps"), value)
            lines[k] = json.dumps({**json.loads(lines[k]), "count": 0, **nothing})
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        train = results.load_runs(folder)[0].train
        for key in ("exact_accuracy", "cell_accuracy", "mean_steps"):
            self.assertEqual(train[key].isna().tolist(), [True] * 2 + [False] * 8, key)

    def test_families(self):
        for name, overrides in (
            ("base", []),
            ("t2", ["model.H_cycles=2"]),
            ("t2n2", ["model.H_cycles=2", "model.L_cycles=2"]),
            ("batch", ["training.global_batch_size=50", "training.lr=5e-5"]),
        ):
            write_run(self.runs / name, overrides)
        groups = groups_in(self.runs)

        def labels(*keys):
            return [
                [group.label for group in family] for family in run_groups.families(groups, *keys)
            ]

        self.assertEqual(labels(("model.H_cycles",)), [["base", "t2"]])
        self.assertEqual(labels(("model.H_cycles", "model.L_cycles")), [["base", "t2", "t2n2"]])
        self.assertEqual(labels(("training.global_batch_size",)), [])
        self.assertEqual(
            labels(("training.global_batch_size",), ("training.lr",)), [["base", "batch"]]
        )

    def test_reached(self):
        run = self.load(solved=solved_first(0.9), evaluations=(0.5, 1, 0.2, 1))
        self.assertEqual(
            (run.reached(0.85).step, run.reached(0.85).hours, run.best.step), (200, 2.0, 200)
        )
        self.assertIsNone(run.reached(0.95))


class Settings(unittest.TestCase):
    def test_a_dtype_that_a_configuration_leaves_to_the_machine_is_no_other_setting(self):
        path = ROOT / "configs" / "mini" / "mini_e1_1.yaml"
        for dtype in ("float32", "bfloat16"):
            run = load_config(path, [f"model.forward_dtype={dtype}"])
            self.assertEqual(paper.other_settings(run, load_config(path)), [])
            study = load_config(ROOT / "configs" / "e1_1.yaml")
            self.assertEqual(
                f"model.forward_dtype {dtype}" in paper.other_settings(run, study),
                dtype == "float32",
            )
            self.assertIn("model.hidden_size 64", paper.other_settings(run, study))


class Statistics(unittest.TestCase):
    def test_wilson(self):
        for accuracy, count, low, high in (
            (0.8, 10, 0.490162, 0.943318),
            (0.0, 20, 0.0, 0.161125),
            (0.5, 100, 0.403832, 0.596168),
        ):
            np.testing.assert_allclose(
                study_statistics.wilson(accuracy, count), (low, high), atol=1e-6
            )

    def test_mcnemar(self):
        def outcomes(both, gained, lost, none):
            ours = np.repeat([True, True, False, False], (both, gained, lost, none))
            return ours, np.repeat([True, False, True, False], (both, gained, lost, none))

        # two-sided binomial: 2 * 0.5^6, 2 * (1 + 12 + 66) / 2^12
        for pair, expected in (
            (outcomes(5, 6, 0, 9), (6, 0, 0.03125)),
            (outcomes(100, 10, 2, 3), (10, 2, 2 * 79 / 4096)),
            (outcomes(3, 0, 0, 2), (0, 0, 1.0)),
            (outcomes(0, 5, 5, 0), (5, 5, 1.0)),
        ):
            self.assertEqual(study_statistics.mcnemar(*pair)[:2], expected[:2])
            self.assertAlmostEqual(study_statistics.mcnemar(*pair)[2], expected[2])

    def test_spread(self):
        np.testing.assert_allclose(
            study_statistics.spread([1, 2, 3]),
            (2, 1, 3, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5),
            atol=1e-6,
        )
        np.testing.assert_equal(study_statistics.spread([1, 2]), (1.5, 1, 2, np.nan, np.nan))


class Comparison(AnalysisCommandTest):
    def setUp(self):
        super().setUp()
        self.runs = self.folder / "runs"
        for seed, share in ((0, 0.9), (1, 0.8), (2, 0.85)):
            write_run(
                self.runs / f"base_seed{seed}", [f"training.seed={seed}"], solved_first(share)
            )
        better = solved_first(0.95)
        better[:3] = False  # 40 puzzles less are missed, and 3 more
        chip = {"device": "cuda", "device_model": "NVIDIA H100"}
        write_run(
            self.runs / "better", ["model.H_cycles=4"], better, evaluations=(0.5, 1), starts=(chip,)
        )
        write_run(self.runs / "elsewhere", ["model.H_cycles=5"], solved_first(0.9), digest="c" * 64)
        write_run(self.runs / "running", ["model.H_cycles=6"], steps=160)

    def test_table(self):
        groups = groups_in(self.runs)
        table = compare_experiments.comparison(groups, groups[0], 0.85).set_index("run")
        self.assertEqual(
            table.loc["base", ["seeds", "state", "changes", "ema_runs"]].tolist(),
            ["0 1 2", "finished", "baseline", 3],
        )
        np.testing.assert_allclose(
            table.loc["base", ["ema", "ema_low", "ema_high"]].astype(float), (0.85, 0.8, 0.9)
        )
        half = 4.302653 * 0.05 / 3**0.5
        np.testing.assert_allclose(
            table.loc["base", ["ema_t_low", "ema_t_high"]].astype(float),
            (0.85 - half, 0.85 + half),
            atol=1e-6,
        )
        self.assertEqual(
            (
                table.loc["base", "reached"],
                table.loc["base", "steps_to_target"],
                table.loc["base", "hours"],
            ),
            (2, 400, 4),
        )
        self.assertEqual(table.loc["better", "changes"], "H_cycles 3 -> 4")
        self.assertAlmostEqual(table.loc["better", "difference"], 377 / 400 - 0.85)
        self.assertEqual(table.loc["better", "mcnemar"], "+20 -3 p=0.00049 (seed 0)")
        self.assertEqual(
            (
                table.loc["better", "steps_to_target"],
                table.loc["better", "hours_to_target"],
                table.loc["better", "chip_hours_to_target"],
            ),
            (400, 4, 4),
        )
        np.testing.assert_allclose(
            table.loc["better", ["ema_low", "ema_high"]].astype(float),
            study_statistics.wilson(377 / 400, 400),
        )
        self.assertIn(
            "no test: they were tested on other puzzles", table.loc["elsewhere", "mcnemar"]
        )
        self.assertIn("no test: running has no final evaluation", table.loc["running", "mcnemar"])
        self.assertEqual(
            (table.loc["running", "state"], table.loc["running", "reached"]),
            ("unfinished: step 160 of 400", 0),
        )
        self.assertTrue(
            np.isnan(table.loc["running", "ema"])
            and np.isnan(table.loc["running", "steps_to_target"])
        )

    def test_formats(self):
        text = self.inside(compare_experiments, "base", "--results_dir", self.runs)[1]
        self.assertRegex(text, r"base +85\.0 \[80\.0, 90\.0\] \(3\) t \[72\.6, 97\.4\]")
        self.assertRegex(text, r"base +400 \(2 of 3\) +4 \(2 of 3\)")
        self.assertRegex(text, r"running +- +- +12\.5 \[")
        self.assertIn("p is not corrected for the number of comparisons", text)
        markdown = self.inside(
            compare_experiments,
            "base",
            "better",
            "--results_dir",
            self.runs,
            "--format",
            "markdown",
            "--target",
            "0.99",
        )[1]
        self.assertIn("| better | better", markdown)
        self.assertRegex(markdown, r"\| better +\| - +\| - +\| - +\| +4 \| 4 +\| - ")
        self.assertNotIn("elsewhere", markdown)
        table = pd.read_csv(
            io.StringIO(
                self.inside(
                    compare_experiments,
                    self.runs / "base_seed1",
                    self.runs / "better",
                    "--format",
                    "csv",
                )[1]
            )
        )
        self.assertEqual(table.run.tolist(), ["base", "better"])
        np.testing.assert_allclose(
            table[["ema", "difference"]], [(0.8, 0), (377 / 400, 377 / 400 - 0.8)]
        )
        self.assertIn("(seeds 0 and 1)", table.mcnemar[1])

    def test_mistakes(self):
        (self.folder / "empty").mkdir()
        for args, says in (
            (
                ("x", "--results_dir", self.runs),
                "'x': there is no such run: the runs are base, better",
            ),
            ((self.runs / "base_seed0",), "name their folders after it, or give --results_dir"),
            ((self.folder / "empty", self.runs / "better"), "there is no run here or below"),
            ((self.runs, self.runs / "better"), "it holds runs of several configurations"),
            (
                ("base", "--results_dir", self.runs, "--target", "85"),
                "--target 85: must be an accuracy",
            ),
        ):
            self.mistake(says, compare_experiments, *args)


class Paper(FolderTest):
    def run_of(self, name, *overrides, train=1000, test=422_786, config=None):
        folder = write_run(
            self.folder / str(len(list(self.folder.iterdir()))) / name,
            ["device=cpu", *overrides],
            config=config or ROOT / "configs" / "e2_1.yaml",
            count=test,
            solved=np.ones(test, bool),
            starts=(
                {
                    "datasets": {
                        "train": {"puzzles": train, "sha256": "a" * 64},
                        "test": {"puzzles": test, "sha256": "b" * 64},
                    }
                },
            ),
        )
        return results.load_runs(folder)[0]

    def test_comparable_only_with_the_papers_data_and_settings(self):
        entry, reason = paper.paper_result(
            self.run_of(
                "e2_1_seed3",
                "training.seed=3",
                "evaluation.max_examples=5",
                "data.dataset_path=gs://bucket/x",
            )
        )
        self.assertEqual((entry["exact_accuracy"], entry["table"], reason), (79.9, 1, None))
        for run, says in (
            (self.run_of("e2_1", test=1000), "1,000 test puzzles, Sudoku-Extreme has 422,786"),
            (self.run_of("e2_1", train=5000), "5,000 train puzzles"),
            (
                self.run_of("e2_1", "training.lr=2e-4"),
                "other settings than configs/e2_1.yaml: training.lr 0.0002",
            ),
            (self.run_of("mini_e2_1"), "generated puzzles and a smaller network"),
        ):
            entry, reason = paper.paper_result(run)
            self.assertEqual(entry["exact_accuracy"], 79.9)
            self.assertIn(says, reason)
        self.assertEqual(paper.paper_result(self.run_of("quickstart")), (None, None))

    def test_every_configuration_that_it_names_is_there_and_fits(self):
        """The file's settings are what the configurations say."""
        named = {
            name: entry["setting"]
            for entry in paper.paper()["results"]
            for name in entry.get("configs", [])
        }
        self.assertEqual(set(named), {"e1_1", "e2_2_t3n6", "e2_1", "e2_3", "e2_2_t2n2"})
        base = run_groups.config_settings(load_config(ROOT / "configs" / "base_sudoku_tpu.yaml"))
        changes = {
            name: {
                key: value
                for key, value in run_groups.config_settings(
                    load_config(ROOT / "configs" / f"{name}.yaml")
                ).items()
                if value != base[key]
            }
            for name in named
        }
        self.assertEqual(
            changes,
            {
                "e1_1": {},
                "e2_2_t3n6": {},
                "e2_1": {"training.ema": False},
                "e2_3": {"model.mlp_t": False, "model.pos_encodings": "rope"},
                "e2_2_t2n2": {"model.H_cycles": 2, "model.L_cycles": 2},
            },
        )


class InABucket(GCSTest):
    def test_the_same_as_local(self):
        local = self.folder / "runs"
        write_run(local / "a_seed0", solved=solved_first(0.7))
        write_run(
            local / "deeper" / "b", ["training.ema=false"], steps=200, starts=({"world_size": 8},)
        )
        bucket = open_folder(self.url)
        for path in local.rglob("*"):
            if path.is_file():
                bucket.put(path, f"runs/{path.relative_to(local).as_posix()}")
        bucket.write("runs/a_seed0/checkpoints/checkpoint_step_400.pt", b"x" * 1000)
        there, here = (results.load_runs(place) for place in (join(self.url, "runs"), local))
        self.assertEqual(
            [(run.name, run.config, run.records, run.results, run.starts) for run in there],
            [(run.name, run.config, run.records, run.results, run.starts) for run in here],
        )
        self.assertEqual(there[1].url, join(self.url, "runs", "deeper", "b"))
        self.assertEqual(results.load_runs(join(self.url, "runs", "a_seed0"))[0].name, "a_seed0")
        self.assertEqual(self.proxy.count("GET", "checkpoint_step_400"), 0)
        self.user_error(
            lambda: results.load_runs(join(self.url, "nothing")), "there is no run here or below"
        )
        done = subprocess.run(
            [
                sys.executable,
                "analysis/compare_experiments.py",
                "a",
                "--results_dir",
                join(self.url, "runs"),
                "--format",
                "csv",
            ],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={**os.environ, "TRM_CACHE": str(self.folder / "cache")},
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(pd.read_csv(io.StringIO(done.stdout)).ema[0], 0.7)


if __name__ == "__main__":
    unittest.main()
