"""Figures, the report and the notebook.

What is drawn is what the files contain; it is legible; a figure without data is not drawn.
"""

import html.parser
import json
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import matplotlib.text
import numpy as np
import pandas as pd
from PIL import Image

from tests.helpers import ROOT
from tests.run_folders import DATASETS, solved_first, stop_at, write_run
from tests.test_analysis import AnalysisCommandTest, groups_in

sys.path.insert(0, str(ROOT / "analysis"))
import plot_results
import plot_scaling
import plot_style
import report

RATINGS = [
    {"rating_min": low, "rating_max": high, "count": count, "exact_accuracy": accuracy}
    for low, high, count, accuracy in (
        (0, 0, 100, 0.9),
        (1, 4, 80, 0.8),
        (5, 9, 60, 0.7),
        (10, 19, 50, 0.6),
        (20, 49, 50, 0.5),
        (50, 99, 30, 0.4),
        (100, 199, 20, 0.3),
        (200, 499, 8, 0.25),
        (500, None, 2, 0.0),
    )
]
# kinds of figures that test_study_figures.py draws
LATER = ("augmentations", "curriculum", "early_stop", "precision", "weight_averages")
MORE_DATA = {**DATASETS, "train": {"puzzles": 2000, "sha256": "c" * 64}}


def make_study(folder):
    """18 configurations.

    The base has three seeds. They solve 200, 240 and 280 of 400 puzzles with averaged weights.
    """
    for seed in range(3):
        write_run(
            folder / f"e1_1_seed{seed}",
            [f"training.seed={seed}"],
            solved_first(0.5 + 0.1 * seed),
            ratings=RATINGS,
        )
    for name, overrides, share in (
        ("e2_1", ["training.ema=false"], 0.4),
        ("t2n2", ["model.H_cycles=2", "model.L_cycles=2"], 0.3),
        ("t2n6", ["model.H_cycles=2"], 0.35),
        ("mixer", ["model.mlp_t=false", "model.pos_encodings=rope"], 0.45),
        ("nsup4", ["model.halt_max_steps=4"], 0.65),
        ("nsup8", ["model.halt_max_steps=8"], 0.7),
        ("b50", ["training.global_batch_size=50", "training.lr=5e-5"], 0.9),
        ("b200", ["training.global_batch_size=200", "training.lr=2e-4"], 0.2),
        ("b400", ["training.global_batch_size=400", "training.lr=4e-4"], 0.1),
        ("b200_low", ["training.global_batch_size=200"], 0.15),
        ("a_rather_long_name_of_a_run_that_is_under_way", ["training.weight_decay=0.5"], 0.5),
    ):
        write_run(
            folder / name,
            overrides,
            solved_first(share),
            ratings=RATINGS,
            steps=160 if "under_way" in name else None,
        )
    on_its_way = folder / "evaluated_on_its_way"
    stop_at(write_run(on_its_way, ["training.weight_decay=0.2"], solved_first(0.99)), 200)
    for width, parameters in ((768, 4200), (1024, 4567)):
        write_run(
            folder / f"width{width}",
            [f"model.hidden_size={width}", f"model.puzzle_emb_ndim={width}"],
            solved_first(0.6),
            ratings=RATINGS,
            starts=(
                {
                    "parameters": parameters,
                    "world_size": 32,
                    "device": "tpu",
                    "accelerator_type": "v4-64",
                },
            ),
        )
    write_run(
        folder / "more_data",
        ["training.epochs=20"],
        solved_first(0.8),
        starts=({"datasets": MORE_DATA},),
    )
    return folder


def check_legible(test, drawn):
    """3.3 inches wide, no text below 7 points, nothing outside, no tick labels that touch.

    drawn: {name: plot_style.Figure}.
    """
    for name, figure in drawn.items():
        fig = figure.fig
        fig.draw_without_rendering()
        test.assertEqual(fig.get_figwidth(), 3.3, name)
        for text in fig.findobj(matplotlib.text.Text):
            if text.get_text().strip() and text.get_visible():
                test.assertGreaterEqual(text.get_fontsize(), 7, f"{name}: {text.get_text()}")
        inside = fig.get_tightbbox()  # inches
        test.assertTrue(
            inside.x0 >= -0.02
            and inside.y0 >= -0.02
            and inside.x1 <= 3.32
            and inside.y1 <= fig.get_figheight() + 0.02,
            f"{name}: {inside}",
        )
        for ax in fig.axes:
            for label in (ax.xaxis.label, ax.yaxis.label):
                box = label.get_window_extent()
                fits = box.x0 >= 0 and box.x1 <= fig.bbox.x1
                test.assertTrue(fits or not label.get_text(), f"{name}: {label.get_text()}")
            for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
                boxes = [
                    label.get_window_extent()
                    for label in labels
                    if label.get_text()
                    and ax.get_window_extent().padded(30).contains(*label.get_window_extent().min)
                ]
                for one, other in zip(boxes, boxes[1:]):
                    test.assertFalse(
                        one.overlaps(other), f"{name}: {[label.get_text() for label in labels]}"
                    )


class Study(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        cls.runs = make_study(Path(holder.name) / "runs")
        cls.groups = groups_in(cls.runs)
        drawn = dict(plot_results.draw_all(cls.groups))
        cls.drawn = {name: one for name, one in drawn.items() if not isinstance(one, str)}

    def accuracy(self, name):
        return json.loads((self.runs / name / "eval.json").read_text())["results"][-1][
            "exact_accuracy"
        ]

    def axes(self, name):
        return self.drawn[name].fig.axes

    def test_every_kind_is_drawn(self):
        kinds = {re.sub(r"_\d+$", "", name) for name in self.drawn}
        self.assertEqual(kinds, set(plot_results.FIGURES) - set(LATER))

    def test_bars_are_the_accuracies_of_eval_json(self):
        names = {"e1_1": [f"e1_1_seed{seed}" for seed in range(3)]}
        (ax,) = self.axes("final_accuracy")
        labels = [text.get_text() for text in ax.get_yticklabels()]
        self.assertEqual(
            sorted(labels),
            sorted(
                {group.label for group in self.groups}
                - {"a_rather_long_name_of_a_run_that_is_under_way"}
            ),
        )
        for label, patch, text in zip(labels, ax.patches, ax.texts, strict=True):
            expected = 100 * np.mean([self.accuracy(name) for name in names.get(label, [label])])
            self.assertAlmostEqual(patch.get_width(), expected)
            self.assertEqual(text.get_text(), f"{expected:.1f}")
        data = self.drawn["final_accuracy"].data.set_index("group")
        self.assertEqual(
            data.loc["e1_1", ["exact_accuracy", "low", "high", "runs", "kind"]].tolist(),
            [0.6, 0.5, 0.7, 3, "range of 3 seeds"],
        )
        self.assertEqual(data.loc["e2_1", "kind"], "95% Wilson interval")
        low = 100 * data.loc["e2_1", "low"]
        segments = ax.collections[0].get_segments()[labels.index("e2_1")]
        np.testing.assert_allclose(segments[:, 0], [low, 100 * data.loc["e2_1", "high"]])

    def test_ablations(self):
        self.assertEqual(
            [text.get_text() for text in self.axes("ablation_ema")[0].get_yticklabels()],
            ["e1_1: averaged", "e2_1: raw"],
        )
        self.assertEqual(
            [text.get_text() for text in self.axes("ablation_mixer")[0].get_yticklabels()],
            ["self-attention, rope", "token MLP"],
        )
        ax = self.axes("ablation_supervision")[0]
        self.assertEqual(
            [
                (text.get_text(), round(patch.get_width(), 6))
                for text, patch in zip(ax.get_yticklabels(), ax.patches)
            ],
            [("N_sup 2", 60), ("N_sup 4", 65), ("N_sup 8", 70)],
        )

    def test_heat_maps(self):
        ax = self.axes("ablation_schedule")[0]
        self.assertEqual(
            (
                [text.get_text() for text in ax.get_xticklabels()],
                [text.get_text() for text in ax.get_yticklabels()],
            ),
            (["2", "6"], ["2", "3"]),
        )
        self.assertEqual(
            {text.get_position(): text.get_text() for text in ax.texts},
            {(0.5, 0.5): "30.0", (1.5, 0.5): "35.0", (1.5, 1.5): "60.0\n3 seeds"},
        )
        self.assertEqual(
            [
                text.get_text()
                for text in self.axes("scaling_learning_rate_and_batch")[0].get_yticklabels()
            ],
            ["5e-5", "1e-4", "2e-4", "4e-4"],
        )

    def test_curves_are_the_records(self):
        records = [
            json.loads(line)
            for line in (self.runs / "e1_1_seed1" / "metrics.jsonl").read_text().splitlines()
        ]
        page = next(
            name
            for name, figure in self.drawn.items()
            if name.startswith("learning_curves_hours") and "e1_1" in set(figure.data.group)
        )
        loss, exact, cells = self.axes(page)[:3]
        for ax, split, key, scale in (
            (loss, "train", "loss", 1),
            (exact, "test", "exact_accuracy", 100),
            (cells, "test", "cell_accuracy", 100),
        ):
            expected = [
                (r["train_seconds"] / 3600, scale * r[key]) for r in records if r["split"] == split
            ]
            self.assertTrue(
                any(
                    np.allclose(line.get_xydata(), expected)
                    for line in ax.lines
                    if len(line.get_xydata()) == len(expected)
                ),
                key,
            )
        steps = pd.concat(
            [
                figure.data
                for name, figure in self.drawn.items()
                if name.startswith("learning_curves_step")
            ]
        )
        self.assertEqual(set(steps.group), {group.label for group in self.groups})
        self.assertTrue(
            (
                steps.examples
                == steps.step
                * steps.run.map(
                    lambda name: (
                        50
                        if name == "b50"
                        else 400
                        if name == "b400"
                        else 200
                        if name.startswith("b200")
                        else 100
                    )
                )
            ).all()
        )

    def test_rating_and_supervision_steps(self):
        ax = self.axes("accuracy_by_rating")[0]
        self.assertEqual(
            [text.get_text() for text in ax.get_xticklabels()],
            [f"{bucket['rating_min']}\n{bucket['count']}" for bucket in RATINGS],
        )
        np.testing.assert_allclose(
            ax.lines[0].get_ydata(), [100 * bucket["exact_accuracy"] for bucket in RATINGS]
        )
        data = pd.concat(
            [
                figure.data
                for name, figure in self.drawn.items()
                if name.startswith("accuracy_by_supervision_step")
            ]
        )
        self.assertEqual(data[data.group == "nsup4"].exact_accuracy.tolist(), [0.325, 0.65])

    def test_scaling_fit(self):
        """Not solved: 10, 50 and 40 and 30, 80, 90 percent at batches of 50 to 400.

        At a batch of 200 there are two settings; the better one is fitted.
        """
        figure = self.drawn["scaling_batch"]
        fitted = figure.data[figure.data.fitted]
        self.assertEqual(fitted.x.tolist(), [50, 100, 100, 100, 200, 400])
        self.assertEqual(set(figure.data.group) - set(fitted.group), {"b200_low"})
        slope = np.polyfit(np.log(fitted.x), np.log(fitted.error), 1)[0]
        self.assertIn(
            f"not solved ∝ x^{slope:.2f} (95% interval ", figure.fig.axes[0].get_title(loc="left")
        )
        self.assertLessEqual(figure.fig.axes[0].get_ylim()[1], 110)  # percent
        self.assertIn(
            "no fit: 3 sizes, 4 are needed",
            self.axes("scaling_parameters")[0].get_title(loc="left").replace("\n", " "),
        )
        self.assertEqual(sorted(set(self.drawn["scaling_parameters"].data.x)), [1000, 4200, 4567])
        self.assertEqual(sorted(set(self.drawn["scaling_data"].data.x)), [1000, 2000])

    def test_pareto(self):
        data = self.drawn["pareto_hours"].data.set_index("group")
        hours = {"b400": 1, "b200": 2, "e1_1": 4, "nsup8": 4, "more_data": 4, "b50": 8}
        self.assertEqual({name: data.hours[name] for name in hours}, hours)
        self.assertEqual(set(data.index[data.on_frontier]), {"b400", "b200", "more_data", "b50"})
        self.assertNotIn("evaluated_on_its_way", data.index)  # --eval_only of a run that goes on
        self.assertIn("evaluated_on_its_way", set(self.drawn["final_accuracy"].data.group))
        self.assertEqual(
            self.drawn["pareto_chip_hours"].data.set_index("group").chip_hours["width768"], 32 * 4
        )

    def test_throughput(self):
        ax = self.axes("throughput")[0]
        self.assertEqual(
            [
                round(patch.get_width(), 6)
                for text, patch in zip(ax.get_yticklabels(), ax.patches)
                if text.get_text() in ("b50", "b400")
            ],
            [round(50 / 36, 6), round(400 / 36, 6)],
        )

    def test_legible_in_one_column(self):
        check_legible(self, self.drawn)


class Parts(unittest.TestCase):
    def test_power_law_is_exact_where_there_is_one(self):
        x = np.array([1.0, 2, 4, 8])
        exponent, low, high, band = plot_scaling.power_law(x, 0.3 * x**-0.5)
        np.testing.assert_allclose((exponent, low, high), -0.5)
        np.testing.assert_allclose(band(np.array([16.0])), np.full((3, 1), 0.075))

    def test_interval_of_the_exponent_covers_it_19_times_of_20(self):
        stream, x, covered, banded = np.random.default_rng(0), np.array([1.0, 2, 4, 8, 16]), 0, 0
        for _ in range(1000):
            _, low, high, band = plot_scaling.power_law(
                x, 0.5 * x**-0.3 * np.exp(0.1 * stream.standard_normal(5))
            )
            covered += low <= -0.3 <= high
            _, below, above = band(np.array([16.0]))
            banded += below[0] <= 0.5 * 16.0**-0.3 <= above[0]
        for count in (covered, banded):
            self.assertTrue(930 <= count <= 970, count)

    def test_frontier(self):
        self.assertEqual(
            plot_scaling.frontier(np.array([1, 2, 2, 3, 4]), np.array([5, 6, 7, 7, 8])).tolist(),
            [True, False, True, False, True],
        )

    def test_numbers_as_people_write_them(self):
        for number, text in (
            (2.6667e-4, "2.67e-4"),
            (1e-4, "1e-4"),
            (0.05, "0.05"),
            (768, "768"),
            (1024, "1024"),
            (422_786, "423k"),
            (5_028_866, "5.03M"),
            (999_999, "1M"),
            (0, "0"),
        ):
            self.assertEqual(plot_style.readable(number), text)


class Few(AnalysisCommandTest):
    def drawn(self):
        return dict(plot_results.draw_all(groups_in(self.folder / "runs")))

    def reasons(self, drawn):
        return {name: reason for name, reason in drawn.items() if isinstance(reason, str)}

    def test_one_run(self):
        write_run(self.folder / "runs" / "one", raw=solved_first(0.4))
        drawn = self.drawn()
        reasons = self.reasons(drawn)
        self.assertEqual(
            set(reasons),
            {
                "ablation_mixer",
                "ablation_schedule",
                "ablation_supervision",
                "scaling_batch",
                "scaling_parameters",
                "scaling_data",
                "scaling_learning_rate_and_batch",
                "accuracy_by_rating",
                "learning_curves_chip_hours",
                "pareto_chip_hours",
                "pareto_hours",
                "pareto_flops",
                *LATER,
            },
        )
        self.assertEqual(reasons["pareto_hours"], "only one is finished and has hours of training")
        self.assertIn(
            "no two runs with a final evaluation differ in model.mlp_t alone",
            reasons["ablation_mixer"],
        )
        bars = drawn["ablation_ema"].fig.axes[0]
        self.assertEqual(
            [
                (text.get_text(), patch.get_width())
                for text, patch in zip(bars.get_yticklabels(), bars.patches)
            ],
            [("one: averaged", 50), ("one: raw", 40)],
        )
        self.assertIn("its dataset has no ratings", reasons["accuracy_by_rating"])

    def test_an_unfinished_run_without_starts(self):
        write_run(self.folder / "runs" / "one", steps=160, starts=())
        reasons = self.reasons(self.drawn())
        drawn = {
            "learning_curves_step",
            "learning_curves_examples",
            "learning_curves_hours",
            "throughput",
        }
        self.assertEqual(set(reasons), set(plot_results.FIGURES) - drawn)
        self.assertIn(
            "none was trained on TPU chips or GPUs", reasons["learning_curves_chip_hours"]
        )
        self.assertEqual(reasons["final_accuracy"], "no run has a final evaluation (eval.json)")

    def test_a_run_without_any_record(self):
        (self.folder / "runs" / "one").mkdir(parents=True)
        write_run(self.folder / "other")
        (self.folder / "other" / "config.yaml").rename(self.folder / "runs" / "one" / "config.yaml")
        self.assertEqual(set(self.reasons(self.drawn())), set(plot_results.FIGURES))

    def test_the_command(self):
        runs, out = self.folder / "runs", self.folder / "new" / "figures"
        write_run(runs / "a")
        write_run(runs / "b", ["model.mlp_t=false"], solved_first(0.25), steps=400)
        output = self.command("plot_results.py", "--results_dir", runs, "--out", out)
        self.assertIn(
            "not drawn: ablation_schedule: no runs with a final evaluation make a grid", output
        )
        self.assertIn(f"{out / 'ablation_mixer.png'}: Token MLP against self-attention.", output)
        names = {path.stem for path in out.iterdir()}
        self.assertEqual(
            names,
            {
                line.split("/")[-1].split(".png: ")[0]
                for line in output.splitlines()
                if ".png: " in line
            },
        )
        self.assertGreater(len(names), 8)
        for name in names:
            with Image.open(out / f"{name}.png") as picture:
                self.assertEqual(picture.format, "PNG")
                picture.load()
                self.assertEqual(picture.width, 990)
                self.assertGreater(
                    len(set(picture.convert("L").resize((200, 200)).tobytes())),
                    5,
                    f"{name} is blank",
                )
            content = (out / f"{name}.pdf").read_bytes()
            self.assertTrue(
                content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF"), name
            )
        self.assertEqual(
            pd.read_csv(out / "ablation_mixer.csv").exact_accuracy.tolist(), [0.25, 0.5]
        )

    def test_mistakes(self):
        runs, file = write_run(self.folder / "runs" / "a").parent, self.folder / "file"
        file.write_text("")
        for module, flags, says in (
            (
                plot_results,
                ("--results_dir", self.folder / "nowhere", "--out", self.folder / "x"),
                "there is no run here or below",
            ),
            (plot_results, ("--results_dir", runs, "--out", file), "this folder cannot be made"),
            (
                report,
                ("--results_dir", runs, "--out", self.folder / "x", "--configs", "nothing/*.yaml"),
                "--configs nothing/*.yaml: no such file",
            ),
            (
                report,
                ("--results_dir", runs, "--out", self.folder / "x", "--baseline", "b"),
                "'b': there is no such run",
            ),
        ):
            self.mistake(says, module, *flags)
        self.assertFalse((self.folder / "x").exists())
        for script in ("plot_results", "compare_experiments", "report"):
            hidden = (
                "import runpy, sys; sys.modules['pandas'] = None; sys.path.insert(0, 'analysis'); "
                f"runpy.run_path('analysis/{script}.py', run_name='__main__')"
            )
            done = subprocess.run(
                [sys.executable, "-c", hidden], cwd=ROOT, text=True, capture_output=True
            )
            self.assertEqual(
                (done.returncode, done.stdout, done.stderr),
                (
                    2,
                    "",
                    f"error: pandas not installed for {sys.executable}: {sys.executable} -m pip "
                    "install -r requirements-analysis.txt\n",
                ),
            )


class Page(html.parser.HTMLParser):
    """Counts what a browser would have to fetch, and the pictures inside."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.fetched, self.tables = 0, [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tables += tag == "table"
        for name, value in attributes:
            if name in ("src", "href"):
                self.inside += value.startswith("data:image/png;base64,")
                self.fetched += [] if value.startswith("data:") else [value]


class Report(AnalysisCommandTest):
    def test_report(self):
        runs, out, configs = self.folder / "runs", self.folder / "report", self.folder / "configs"
        config = runs / "made.yaml"
        for seed in (0, 1):
            write_run(
                runs / f"e1_1_seed{seed}",
                [f"training.seed={seed}"],
                solved_first(0.5 + 0.1 * seed),
                starts=({}, {"step": 200, "train_seconds": 7200.0, "hostname": "there"}),
            )
        write_run(runs / "e2_1", ["training.ema=false"], starts=({"dirty": True},))
        write_run(runs / "e2_3", ["model.mlp_t=false"], steps=160, starts=())
        write_run(
            runs / "e2_4",
            ["model.halt_max_steps=5"],
            starts=({"config_file": "configs/e2_4.yaml"},),
        )
        configs.mkdir()
        for name, text in (
            ("e1_1", ""),
            ("e2_1", "training: {ema: false}"),
            ("e2_3", "model: {mlp_t: false}"),
            ("e2_4", "model: {halt_max_steps: 4}"),
            ("e3_1", "model: {hidden_size: 1024}"),
        ):
            (configs / f"{name}.yaml").write_text(f"defaults: [{config}]\n{text}\n")
        output = self.command(
            "report.py", "--results_dir", runs, "--out", out, "--configs", configs / "e*.yaml"
        )
        text, page = (out / "report.md").read_text(), Page((out / "report.html").read_text())
        for line in (
            "- e2_1: 1 seed: 1 more for a spread",
            "- e2_3: unfinished: step 160 of 400",
            "- e2_4: missing; e2_4 has other settings (model.halt_max_steps 5)",
            "- e3_1: missing",
            "- e2_3: no starts.jsonl, so code, device and chip-hours are unknown",
            "- e2_1: the code had changes that no commit holds",
            "Baseline: e1_1.",
            "- ablation_schedule: no runs with a final evaluation make a grid of model.H_cycles "
            "and model.L_cycles, alike otherwise",
        ):
            self.assertIn(f"{line}\n", text)
        self.assertRegex(text, r"\| e1_1 +\| e1_1 +\| 2 +\| done +\|")
        self.assertNotIn("- e1_1:", text)
        self.assertRegex(
            text,
            r"\| e1_1_seed0 +\| finished +\| 0123456789ab +\| cpu, a processor, 1 worker "
            r"+\| 2 +\| here, there +\| 3\.11\.7 ",
        )
        self.assertRegex(text, r"\| e2_1 +\| finished +\| 0123456789ab and changes ")
        self.assertRegex(text, r"\| 3 +\| T 6, n 6 +\| 85\.8 +\|")
        pictures = sorted((out / "figures").glob("*.png"))
        self.assertEqual((page.fetched, page.inside, page.tables), ([], len(pictures), 6))
        self.assertEqual(
            sorted(re.findall(r"\]\((figures/\S+)\)", text)),
            [f"figures/{path.name}" for path in pictures],
        )
        self.assertIn(f"5 runs, {len(pictures)} figures", output)
        self.assertEqual(pd.read_csv(out / "comparison.csv").ema[0], 0.55)


class Notebook(AnalysisCommandTest):
    def test_runs_from_top_to_bottom(self):
        import nbclient
        import nbformat

        notebook = nbformat.read(ROOT / "notebooks" / "sudoku_analysis.ipynb", 4)
        self.assertTrue(all(not cell.get("outputs") for cell in notebook.cells))
        nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}
        ).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        text = "".join(
            output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))
            for output in outputs
        )
        self.assertIn("87 runs of 29 configurations; baseline mini_e4_4", text)
        self.assertIn("ema True -> False", text)
        self.assertGreater(sum("image/png" in output.get("data", {}) for output in outputs), 8)
        self.assertEqual([output for output in outputs if output.output_type == "error"], [])


if __name__ == "__main__":
    unittest.main()
