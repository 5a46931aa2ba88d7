"""Configurations: reading, inheritance, overrides, and what each mistake is told."""

import dataclasses
import re
import unittest

import yaml

from config import config_from_dict, config_yaml, differences, load_config, planned_workers
from schedule import Schedule, evaluation_interval_steps, total_steps
from tests.helpers import ROOT, FolderTest, write_config

DATA = "data: {dataset_path: nowhere}\n"


class ConfigTest(FolderTest):
    def write(self, name, text):
        return write_config(self.folder / name, text)

    def load(self, text="", *overrides):
        return load_config(self.write("run.yaml", DATA + text), overrides)

    def refused(self, text, *says):
        """`text` as a file must be refused, the message beginning with the file."""
        path = self.write("run.yaml", text)
        message = self.user_error(lambda: load_config(path), *says)
        self.assertTrue(message.startswith(f"{path}: "), message)
        self.assertNotIn("\n", message)
        return message


class Reading(ConfigTest):
    def test_defaults_of_the_code(self):
        config = self.load()
        self.assertEqual(config.data.dataset_path, "nowhere")
        self.assertEqual(
            (config.device, config.training.global_batch_size, config.model.halt_max_steps),
            ("auto", 768, 16),
        )

    def test_the_base_repeats_every_knob_with_its_default(self):
        """The three that differ belong to the study: where it runs, and its dataset."""
        defaults = dataclasses.asdict(self.load())
        base = yaml.safe_load((ROOT / "configs/base_sudoku_tpu.yaml").read_text())
        self.assertEqual((base.pop("device"), base["data"].pop("expected_puzzles")), ("tpu", 1000))
        base["data"]["dataset_path"] = "nowhere"
        del defaults["device"], defaults["data"]["expected_puzzles"]
        base["training"]["lr"] = float(base["training"]["lr"])  # YAML 1.1 reads 1e-4 as text
        base["training"]["puzzle_emb_lr"] = float(base["training"]["puzzle_emb_lr"])
        self.assertEqual(base, defaults)

    def test_numbers(self):
        config = self.load(
            "training: {lr: 1e-4, puzzle_emb_lr: 2E-3, epochs: 5e4, weight_decay: .5e+1,\n"
            "           beta2: 0.99, seed: 3.0}\n"
        )
        self.assertEqual(config.training.lr, 0.0001)
        self.assertEqual(config.training.puzzle_emb_lr, 0.002)
        self.assertEqual(
            (config.training.epochs, config.training.weight_decay, config.training.beta2),
            (50000.0, 5.0, 0.99),
        )
        # a whole number may be written 3.0, and is an int from here on
        self.assertIs(type(config.training.seed), int)
        self.assertIs(type(config.training.epochs), float)

    def test_null_where_it_is_a_value(self):
        self.assertIsNone(self.load("evaluation: {max_examples: null}\n").evaluation.max_examples)
        self.assertEqual(self.load("evaluation: {max_examples: 7}\n").evaluation.max_examples, 7)

    def test_empty_sections_and_files(self):
        self.assertEqual(self.load("tpu: {}\n"), self.load())
        self.refused("", "data.dataset_path is missing", "defaults")

    def test_derived_numbers(self):
        config = self.load()
        self.assertEqual(total_steps(config, 1000), 65_104)
        self.assertEqual(evaluation_interval_steps(config, 1000), 6510)
        tiny = self.load("", "evaluation.interval_epochs=0.001", "training.epochs=0.5")
        self.assertEqual((total_steps(tiny, 1000), evaluation_interval_steps(tiny, 1000)), (0, 1))

    def test_what_is_due_at_which_step(self):
        def due(last_step):
            schedule = Schedule(50, last_step, 20, 15, 30)
            return [
                [step for step in range(1, last_step + 1) if is_due(step)]
                for is_due in (schedule.evaluation_due, schedule.checkpoint_due, schedule.log_due)
            ]

        self.assertEqual(due(50), [[20, 40, 50], [20, 30, 40, 50], [15, 30, 45, 50]])
        # --max_steps 45: the run is not at its end, and there is nothing to evaluate
        self.assertEqual(due(45), [[20, 40], [20, 30, 40, 45], [15, 30, 45]])
        for last_step, step, evaluated, done in (
            (50, 49, True, False),
            (50, 50, False, False),
            (50, 50, True, True),
            (45, 45, False, True),
            (40, 40, False, False),
        ):
            schedule = Schedule(50, last_step, 20, 15, 30)
            self.assertEqual(schedule.is_done(step, evaluated), done, (last_step, step, evaluated))

    def test_any_number_of_puzzles_is_the_same_number_of_steps(self):
        """E3.2 and its miniatures: only the puzzles differ, not the length of the training."""
        for pattern, base in (("e3_2_*", "e1_1"), ("mini/mini_e3_2_*", "mini/mini_e1_1")):
            paths = sorted((ROOT / "configs").glob(f"{pattern}.yaml"))
            self.assertEqual(len(paths), 2)
            plans = set()
            for path in [*paths, ROOT / "configs" / f"{base}.yaml"]:
                config = load_config(path)
                puzzles = config.data.expected_puzzles
                plans.add(
                    (total_steps(config, puzzles), evaluation_interval_steps(config, puzzles))
                )
            self.assertEqual(len(plans), 1, plans)

    def test_planned_workers(self):
        config = self.load("", "tpu.accelerator_type=v4-64")
        self.assertEqual(planned_workers(config), 1)
        self.assertEqual(planned_workers(config, "tpu"), 32)
        self.assertEqual(planned_workers(self.load("device: tpu\n")), 32)
        self.assertEqual(
            planned_workers(self.load("device: tpu\ntpu: {accelerator_type: v5litepod-4}\n")), 4
        )

    def test_every_shipped_configuration(self):
        paths = sorted((ROOT / "configs").glob("**/*.yaml"))
        self.assertGreater(len(paths), 0)
        for path in paths:
            with self.subTest(path.name):
                config = load_config(path)
                again = load_config(self.write("again.yaml", config_yaml(config)))
                self.assertEqual(dataclasses.asdict(again), dataclasses.asdict(config))

    def test_yaml_of_a_config_keeps_every_value(self):
        config = self.load(
            "",
            "training.lr=3e-5",
            "evaluation.max_examples=5",
            "device=cpu",
            "training.ema=false",
            "logging.output_dir='1e3'",
        )
        again = load_config(self.write("again.yaml", config_yaml(config)))
        self.assertEqual(again, config)
        self.assertEqual(
            (again.training.lr, again.training.ema, again.logging.output_dir), (3e-5, False, "1e3")
        )

    def test_what_a_run_may_go_on_with(self):
        """Each knob of these sections is part of what a run is, but for those that change no
        number."""
        config, free = self.load(), set()
        for section in ("model", "data", "training"):
            knobs = getattr(config, section)
            for field in dataclasses.fields(knobs):
                value = [getattr(knobs, field.name), "changed"]
                changed = dataclasses.replace(knobs, **{field.name: value})
                other = dataclasses.replace(config, **{section: changed})
                found = differences(other, dataclasses.asdict(config), (section,))
                if not found:
                    free.add(f"{section}.{field.name}")
                else:
                    self.assertTrue(found.startswith(f"{section}.{field.name} "), found)
        self.assertEqual(
            free,
            {
                "data.dataset_path",
                "data.prefetch_batches",
                "model.activation_checkpointing",
                "training.compile",
                "training.ema_strategy",
                "training.num_workers",
                "training.pallas_kernels",
            },
        )

    def test_config_from_a_checkpoints_dict(self):
        config = self.load("", "training.lr=3e-5", "evaluation.max_examples=5", "device=cpu")
        self.assertEqual(config_from_dict(dataclasses.asdict(config), "file.pt"), config)
        values = dataclasses.asdict(config)
        values["model"]["hidden_sise"] = values["model"].pop("hidden_size")
        self.user_error(
            lambda: config_from_dict(values, "file.pt"),
            "file.pt: model.hidden_sise: there is no such key; did you mean model.hidden_size?",
        )
        values["model"] = 5
        self.user_error(
            lambda: config_from_dict(values, "file.pt"), "file.pt: model: a section must hold"
        )


class Miniatures(ConfigTest):
    """configs/mini against the study in configs/: what a file of the one changes in its base, its
    counterpart changes in its own."""

    CELLS = {  # files of each experiment
        "e1_1": 1,
        "e1_3": 2,
        "e2_1": 1,
        "e2_2": 3,
        "e2_3": 1,
        "e2_4": 2,
        "e3_1": 2,
        "e3_2": 2,
        "e3_3": 3,
        "e3_4": 1,
        "e4_1": 2,
        "e4_2": 3,
        "e4_3": 2,
        "e4_4": 1,
    }
    BASES = {"e3_3": "mini_e3_2_500.yaml"}  # others build on mini_base.yaml

    def changes(self, path, base):
        """{dotted key: value} of what the file itself says, which builds on `base` alone; every key
        must be a change."""
        own = yaml.safe_load(path.read_text())
        self.assertEqual(
            [(path.parent / f"{name}.yaml").resolve() for name in own.pop("defaults")], [base], path
        )
        config, before = load_config(path), load_config(base)
        keys = [(section, key) for section, values in own.items() for key in values]
        return (
            {f"{section}.{key}": getattr(getattr(config, section), key) for section, key in keys},
            config,
            before,
        )

    def test_every_cell_changes_what_its_study_changes(self):
        mini, study = ROOT / "configs" / "mini", ROOT / "configs"
        paths = sorted(mini.glob("*.yaml"))
        experiments = {}
        for path in paths:
            with self.subTest(path.name):
                self.assertFalse((study / path.name).exists(), "two runs of one name")
                experiment = re.match(r"mini_(e\d_\d)", path.stem)[1]
                base = self.BASES.get(experiment, "../mini_base.yaml")
                changes, config, before = self.changes(path, (mini / base).resolve())
                experiments.setdefault(experiment, []).append((changes, config))
                counterparts = [
                    self.changes(name, study / "base_sudoku_tpu.yaml")[0]
                    for name in sorted(study.glob(f"{experiment}*.yaml"))
                ]
                self.assertIn(set(changes), [set(counterpart) for counterpart in counterparts])
                for key in {"training.ema", "model.mlp_t", "model.pos_encodings"} & set(changes):
                    self.assertEqual({changes[key]}, {other[key] for other in counterparts})
                differ = {
                    key
                    for section in (
                        "data",
                        "model",
                        "training",
                        "checkpoint",
                        "logging",
                        "evaluation",
                    )
                    for key, value in dataclasses.asdict(getattr(config, section)).items()
                    if value != getattr(getattr(before, section), key)
                    for key in [f"{section}.{key}"]
                }
                self.assertEqual(bool(differ), bool(changes))
                self.assertLessEqual(differ, set(changes))
                self.assertAlmostEqual(
                    config.training.lr / config.training.global_batch_size,
                    before.training.lr / before.training.global_batch_size,
                )
                self.assertEqual(config.model.puzzle_emb_ndim, config.model.hidden_size)
                self.assertIn(f"--config configs/mini/{path.name}\n", path.read_text())
        self.assertEqual({name: len(cells) for name, cells in experiments.items()}, self.CELLS)
        schedules = {
            (config.model.H_cycles, config.model.L_cycles)
            for _, config in [*experiments["e2_2"], *experiments["e1_1"]]
        }
        cycles, updates = map(set, zip(*schedules))
        self.assertEqual(
            len(schedules), len(cycles) * len(updates), "a table of T and n without a hole"
        )


class Inheritance(ConfigTest):
    def test_later_files_win_and_sections_merge(self):
        self.write("base.yaml", DATA + "training: {lr: 1e-3, beta1: 0.5}\ndevice: cpu\n")
        self.write("other.yaml", "training: {lr: 2e-3}\n")
        path = self.write("run.yaml", "defaults: [base, other]\ntraining: {weight_decay: 0.25}\n")
        training = load_config(path).training
        self.assertEqual((training.lr, training.beta1, training.weight_decay), (2e-3, 0.5, 0.25))
        path = self.write("run.yaml", "defaults: [other.yaml, base]\n")
        self.assertEqual(load_config(path).training.lr, 1e-3)
        path = self.write("run.yaml", "training: {lr: 5e-3}\ndefaults: [base, other]\n")
        self.assertEqual(load_config(path).training.lr, 5e-3)

    def test_paths_are_relative_to_the_file_that_names_them(self):
        self.write("root.yaml", DATA + "device: cpu\n")
        self.write("study/base.yaml", "defaults: [../root]\nmodel: {L_layers: 3}\n")
        path = self.write("study/deep/run.yaml", "defaults: [../base]\nmodel: {H_cycles: 2}\n")
        config = load_config(path)
        self.assertEqual(
            (config.device, config.model.L_layers, config.model.H_cycles), ("cpu", 3, 2)
        )

    def test_the_same_base_twice_is_no_circle(self):
        self.write("base.yaml", DATA)
        self.write("a.yaml", "defaults: [base]\n")
        self.assertEqual(
            load_config(self.write("run.yaml", "defaults: [a, base]\n")).data.dataset_path,
            "nowhere",
        )

    def test_circle(self):
        for chain in (["run.yaml"], ["run.yaml", "a.yaml", "b.yaml"]):
            for name, following in zip(chain, [*chain[1:], chain[0]]):
                path = self.write(name, f"defaults: [{following}]\n")
            with self.subTest(chain):
                self.user_error(
                    lambda: load_config(self.folder / "run.yaml"),
                    str(path.parent / "run.yaml"),
                    "defaults",
                    "circular",
                    " -> ".join([*chain, chain[0]]),
                )

    def test_missing_parent_and_missing_file(self):
        self.write("base_sudoku.yaml", DATA)
        path = self.write("run.yaml", "defaults: [base_sudokus]\n")
        self.user_error(
            lambda: load_config(path),
            str(self.folder / "base_sudokus.yaml"),
            "No such file",
            "did you mean",
            "base_sudoku.yaml?",
        )
        self.user_error(
            lambda: load_config(self.folder / "absent.yaml"),
            str(self.folder / "absent.yaml"),
            "cannot read",
            "No such file",
        )

    def test_defaults_of_a_wrong_kind(self):
        for text in ("base", "{a: b}", "[1]", "null"):
            self.refused(
                DATA + f"defaults: {text}\n", "defaults = ", "must be a list of file names"
            )

    def test_a_wrong_value_is_reported_with_the_file_it_stands_in(self):
        base = self.write("base.yaml", DATA + "training: {lr: -1.0}\n")
        path = self.write("run.yaml", "defaults: [base]\n")
        self.user_error(lambda: load_config(path), f"{base}: training.lr = -1.0: must be > 0")
        self.assertEqual(load_config(path, ["training.lr=1e-3"]).training.lr, 1e-3)


class Mistakes(ConfigTest):
    def test_not_yaml(self):
        for text in ("a: [1,", "a:\n\t- b", "training: {lr: 2000-13-45}\n", "? [a, b]\n: 1\n"):
            with self.subTest(text):
                self.refused(text, "not valid YAML")
        path = self.folder / "run.yaml"
        path.write_bytes(b"logging: {output_dir: caf\xe9}")
        self.user_error(lambda: load_config(path), str(path), "not valid YAML")

    def test_not_a_mapping(self):
        self.refused("- a\n", "mapping of keys to values", "list")

    def test_duplicate_keys(self):
        self.refused(
            "training:\n  lr: 1e-4\n  lr: 1e-3\n", "not valid YAML", "duplicate key 'lr'", "line 3"
        )
        self.refused(
            "training: {lr: 1e-4}\ntraining: {beta1: 0.5}\n", "duplicate key 'training'", "line 2"
        )

    def test_unknown_keys(self):
        for text, key, near in [
            ("training: {learning_rate: 1e-4}\n", "training.learning_rate", None),
            ("training: {warmup_steps: 5}\n", "training.warmup_steps", "training.lr_warmup_steps"),
            ("model: {hidden_sise: 8}\n", "model.hidden_sise", "model.hidden_size"),
            ("model: {lr: 1e-4}\n", "model.lr", "training.lr"),
            ("modell: {hidden_size: 8}\n", "modell.hidden_size", "model.hidden_size"),
            ("devise: cpu\n", "devise", "device"),
            ("3: cpu\n", "3", None),
        ]:
            with self.subTest(key):
                message = self.refused(DATA + text, f": {key}: there is no such key")
                if near:
                    self.assertIn(f"did you mean {near}?", message)
                self.assertRegex(
                    message, r"did you mean \w+\.?\w+\?$|the sections are checkpoint, data, "
                )

    def test_section_without_lines(self):
        for text in ("training: 5\n", "training:\n", "training: [1]\n"):
            self.refused(DATA + text, ": training: a section must hold `key: value` lines")

    def test_wrong_types(self):
        for key, value, rule in [
            ("training.global_batch_size", "true", "= True: must be a whole number"),
            ("training.global_batch_size", "many", "= 'many': must be a whole number"),
            ("training.global_batch_size", "'8'", "= '8': must be a whole number"),
            ("training.global_batch_size", "1.5", "= 1.5: must be a whole number"),
            ("training.global_batch_size", ".inf", "= inf: must be a whole number"),
            ("training.global_batch_size", "null", "= None: must be a whole number"),
            ("evaluation.max_examples", "few", "= 'few': must be a whole number or null"),
            ("training.lr", "high", "= 'high': must be a finite number"),
            ("training.lr", "true", "= True: must be a finite number"),
            ("training.lr", ".nan", "= nan: must be a finite number"),
            ("training.lr", "{a: 1}", "= {'a': 1}: must be a finite number"),
            ("training.lr", "1" + "0" * 400, "must be a finite number"),
            ("training.ema", "1", "= 1: must be true or false"),
            ("training.ema", "maybe", "= 'maybe': must be true or false"),
            ("logging.output_dir", "5", "= 5: must be text"),
            ("logging.output_dir", "null", "= None: must be text"),
            ("device", "null", "= None: must be text"),
        ]:
            with self.subTest(f"{key}={value}"):
                section, _, name = key.rpartition(".")
                message = self.refused(
                    f"data: {{dataset_path: x}}\n{section}: {{{name}: {value}}}\n"
                    if section
                    else DATA + f"{name}: {value}\n",
                    f": {key} = ",
                    rule,
                )
                self.user_error(
                    lambda: self.load("", f"{key}={value}"), f"command line: {key} = ", rule
                )
                self.assertTrue(message.endswith(rule.split(": ", 1)[-1]), message)

    def test_ranges(self):
        for key, value, rule in [
            ("training.lr", "0", "> 0"),
            ("training.lr", "-1e-4", "> 0"),
            ("training.beta1", "1", "< 1"),
            ("training.beta2", "-0.1", ">= 0"),
            ("training.seed", "-1", ">= 0"),
            ("training.seed", str(2**63), f"< {2**63}"),
            ("model.halt_exploration_prob", "1.5", "<= 1"),
            ("model.H_cycles", "0", ">= 1"),
            ("model.hidden_size", "7", ">= 8"),
            ("evaluation.max_examples", "0", ">= 1"),
            ("data.prefetch_batches", "0", ">= 1"),
            ("data.augmentations", "-1", ">= 0"),
            ("training.grad_clip_norm", "-1", ">= 0"),
            ("model.expansion", "0", "> 0"),
        ]:
            with self.subTest(f"{key}={value}"):
                self.user_error(
                    lambda: self.load("", f"{key}={value}"),
                    f"command line: {key} = ",
                    f": must be {rule}",
                )

    def test_choices(self):
        for key, value, all_of_them, near in [
            ("model.pos_encodings", "ropes", "none, learned, rope", "rope"),
            ("model.pos_encodings", "alibi", "none, learned, rope", None),
            ("training.optimizer", "adam_atan", "adam_atan2, adamw", "adam_atan2"),
            ("device", "cdua", "auto, tpu, xla_cpu, cuda, cpu", "cuda"),
            ("device", "gpu", "auto, tpu, xla_cpu, cuda, cpu", "cuda"),
            ("evaluation.split", "gpu", "test, val", None),
            ("model.forward_dtype", "float16", "bfloat16, float32", "bfloat16"),
            ("evaluation.split", "tests", "test, val", "test"),
        ]:
            with self.subTest(f"{key}={value}"):
                message = self.user_error(
                    lambda: self.load("", f"{key}={value}"),
                    f"command line: {key} = {value!r}: must be one of {all_of_them}",
                )
                self.assertEqual(
                    message.endswith(f"did you mean {near}?"), near is not None, message
                )

    def test_impossible_combinations(self):
        for text, key, says in [
            (
                "device: tpu\ntpu: {accelerator_type: v4-64}\ntraining: {global_batch_size: 100}\n",
                "training.global_batch_size = 100",
                ["divisible by workers", "32 x 1 = 32", "v4-64 has 32 chips"],
            ),
            (
                "device: tpu\ntraining: {global_batch_size: 12, grad_accumulation_steps: 2}\n",
                "training.global_batch_size = 12",
                ["32 x 2 = 64"],
            ),
            (
                "training: {global_batch_size: 10, grad_accumulation_steps: 4}\n",
                "training.global_batch_size = 10",
                ["training.grad_accumulation_steps", "1 x 4 = 4"],
            ),
            (
                "training: {global_batch_size: 10, num_workers: 4}\n",
                "training.global_batch_size = 10",
                ["4 x 1 = 4"],
            ),
            (
                "device: xla_cpu\ntraining: {num_workers: 2, global_batch_size: 8}\n",
                "training.num_workers = 2",
                ["one worker", "device=cpu"],
            ),
            (
                "device: tpu\ntpu: {accelerator_type: v4-16}\ntraining: {num_workers: 4}\n",
                "training.num_workers = 4",
                ["v4-16 has 8 chips", "null"],
            ),
            (
                "model: {mlp_t: false, hidden_size: 100, num_heads: 8}\n",
                "model.hidden_size = 100",
                ["divisible by model.num_heads = 8"],
            ),
            (
                "model: {mlp_t: false, pos_encodings: rope, hidden_size: 36, num_heads: 4,\n"
                "        puzzle_emb_ndim: 0}\n",
                "model.num_heads = 4",
                ["rope needs an even head size", "36/4 is odd"],
            ),
            (
                "model: {mlp_t: true, pos_encodings: rope}\n",
                "model.pos_encodings = 'rope'",
                ["model.mlp_t=false", "none or learned"],
            ),
            (
                "model: {hidden_size: 64, puzzle_emb_len: 7, puzzle_emb_ndim: 512}\n",
                "model.puzzle_emb_len = 7",
                ["model.hidden_size = 64", "model.puzzle_emb_ndim = 512", "0 takes as many"],
            ),
            (
                "tpu: {accelerator_type: v5-8}\n",
                "tpu.accelerator_type = 'v5-8'",
                ["such as v4-32, v5litepod-16"],
            ),
            (
                "tpu: {accelerator_type: v4-9}\n",
                "tpu.accelerator_type = 'v4-9'",
                ["N TensorCores, 2 a chip", "take v4-8 or v4-16"],
            ),
            (
                "device: tpu\ntpu: {accelerator_type: v6e-8}\ntraining: {num_workers: 4}\n",
                "training.num_workers = 4",
                ["v6e-8 has 8 chips"],
            ),
            (
                "tpu: {accelerator_type: v6e-8, runtime_version: tpu-ubuntu2204-base}\n",
                "tpu.runtime_version = 'tpu-ubuntu2204-base'",
                ["Failed to get global TPU topology", "v2-alpha-tpuv6e"],
            ),
        ]:
            with self.subTest(key):
                self.refused(DATA + text, f": {key}: ", *says)

    def test_combinations_that_are_possible(self):
        self.load(
            "training: {global_batch_size: 100}\n", "tpu.accelerator_type=v4-64"
        )  # one worker: not on a TPU
        self.load("device: tpu\ntpu: {accelerator_type: v4-16}\ntraining: {num_workers: 8}\n")
        self.load("device: cpu\ntraining: {num_workers: 8, global_batch_size: 16}\n")
        self.load(
            "model: {mlp_t: true, hidden_size: 100, num_heads: 8, puzzle_emb_len: 0}\n"
        )  # no heads in the token MLP
        self.load("model: {hidden_size: 64, puzzle_emb_len: 8, puzzle_emb_ndim: 512}\n")
        self.load("model: {hidden_size: 64, puzzle_emb_len: 1, puzzle_emb_ndim: 0}\n")
        self.load("model: {mlp_t: false, pos_encodings: rope}\n")


class Overrides(ConfigTest):
    def test_the_last_word_is_the_command_lines(self):
        config = self.load(
            "training: {lr: 1e-3}\n",
            "training.lr=1e-2",
            " training.lr = 2e-2",
            "data.dataset_path=a=b",
            "evaluation.max_examples=null",
            "training.ema=false",
        )
        self.assertEqual(
            (
                config.training.lr,
                config.data.dataset_path,
                config.evaluation.max_examples,
                config.training.ema,
            ),
            (0.02, "a=b", None, False),
        )

    def test_mistakes(self):
        for override, says in [
            ("training.lr", ["'training.lr'", "section.key=value", "training.lr=2e-4"]),
            (
                "training.lrr=1",
                ["training.lrr", "there is no such key", "did you mean training.lr?"],
            ),
            ("lr=1", ["lr: there is no such key", "did you mean training.lr?"]),
            ("training.lr=", ["training.lr = None", "must be a finite number"]),
            ("training.lr=[1", ["not valid YAML"]),
            ("training={lr: 1}", ["training: a section must hold"]),
            ("=5", ["there is no such key"]),
        ]:
            with self.subTest(override):
                message = self.user_error(lambda: self.load("", override), *says)
                self.assertTrue(message.startswith("command line: "), message)

    def test_augmentations_need_augment(self):
        for count in (0, 3):
            self.user_error(
                lambda: self.load("", f"data.augmentations={count}", "data.augment=false"),
                f"command line: data.augmentations = {count}: data.augment is false",
                "leave this null",
            )
        self.load("", "data.augment=false")

    def test_combinations_name_the_place_of_the_value(self):
        self.user_error(
            lambda: self.load(
                "", "training.global_batch_size=10", "training.grad_accumulation_steps=3"
            ),
            "command line: training.global_batch_size = 10",
        )


if __name__ == "__main__":
    unittest.main()
