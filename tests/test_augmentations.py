"""data.augmentations: fixed symmetries of each puzzle, and the datasets that store them."""

import itertools
import sys
import unittest

import numpy as np

import sudoku
from config import load_config
from data_loader_tpu import SudokuDatasetTPU, TrainLoader, create_dataloader_tpu
from tests.helpers import write_config
from tests.processes import run
from tests.test_data_loader import LoaderTest
from train_state import load_dataset


def splitmix64(seed, index):
    """Output `index` of SplitMix64, with Python's integers."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


class Augmentations(LoaderTest):
    def test_the_draws_are_those_of_splitmix64(self):
        """Other draws would give a run that is continued other puzzles than it began with."""
        published = [  # the first outputs of seed 1234567
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]
        self.assertEqual([splitmix64(1234567, k) for k in range(5)], published)
        cases = list(itertools.product((0, 1234567, 2**63 - 1), (0, 1, 9999), (0, 1, 2, 2000)))
        for seed, puzzle, copy in cases:
            draw = sudoku.fixed_draws(seed, np.array([puzzle]), np.array([copy]))
            self.assertEqual(draw.dtype, np.uint64)
            self.assertEqual(draw.tolist(), [splitmix64(splitmix64(seed, puzzle), copy)])
        _, puzzles, copies = (np.array(column) for column in zip(*cases))
        whole = sudoku.fixed_draws(7, puzzles, copies)
        for row in range(len(cases)):
            part = slice(row, row + 1)
            self.assertEqual(sudoku.fixed_draws(7, puzzles[part], copies[part]), whole[part])

    def built(self, size, count, copies, *words):
        """Folder of a dataset from scripts/build_sudoku_dataset.py itself."""
        out = self.folder / f"{size}-{copies}"
        words = ["--generate", "--size", size, "--num_train", count, "--num_test", 2, *words]
        words += ["--num_aug", copies, "--num_workers", 1, "--output_dir", out]
        run(self, [sys.executable, "scripts/build_sudoku_dataset.py", *words])
        return out

    def test_a_stored_set_and_a_drawn_one_are_the_same(self):
        for size, count, copies in ((4, 7, 5), (9, 4, 3)):
            with self.subTest(size=size):
                plain, stored = (
                    SudokuDatasetTPU(self.built(size, count, stored), "train")
                    for stored in (0, copies)
                )
                self.assertEqual((len(plain), len(stored)), (count, count * (1 + copies)))
                for dataset, augmentations in ((stored, copies), (plain, 0)):
                    drawn = TrainLoader(plain, 0, 6, True, 2, augmentations=augmentations)
                    kept = TrainLoader(dataset, 0, 6, False, 2)
                    for step in range(50):
                        self.same(drawn.batch(step), kept.batch(step))

    def test_a_subset_numbers_its_own_puzzles(self):
        """As the loader does, which knows nothing of the set that the puzzles were taken from."""
        plain, stored = (
            SudokuDatasetTPU(self.built(4, 9, copies, "--subsample_size", 4), "train")
            for copies in (0, 3)
        )
        drawn = TrainLoader(plain, 0, 4, True, 2, augmentations=3)
        for step in range(20):
            self.same(drawn.batch(step), TrainLoader(stored, 0, 4, False, 2).batch(step))

    def test_each_of_a_puzzle_is_drawn_equally_often(self):
        copies, steps, data = 4, 500, self.dataset(size=9, count=8)
        loader = TrainLoader(data, 3, 8, True, 2, augmentations=copies)
        draws = sudoku.fixed_draws(3, np.repeat(np.arange(8), copies), np.tile([1, 2, 3, 4], 8))
        rows = np.repeat(np.arange(8), copies)
        images, _ = loader.augmenter(loader.pairs[rows], draws)
        groups = [
            {data.inputs[puzzle].tobytes(), *(row.tobytes() for row in images[rows == puzzle])}
            for puzzle in range(8)
        ]
        counts = [dict.fromkeys(group, 0) for group in groups]
        for step in range(steps):
            batch = loader.batch(step)
            for row, puzzle in zip(batch["inputs"], batch["puzzle_identifiers"]):
                counts[puzzle][row.tobytes()] += 1  # KeyError: it is none of them
        for group in counts:
            self.assertEqual(sum(group.values()), steps)
            self.assertEqual(len(group), 1 + copies)
            # 100 each; five standard deviations of a binomial distribution are 45
            self.assertLess(max(abs(count - 100) for count in group.values()), 45)

    def test_a_batch_depends_on_seed_and_step_alone(self):
        data = self.dataset(size=9, count=12)
        config = load_config(
            write_config(self.folder / "run.yaml"),
            ["training.seed=5", "training.global_batch_size=8", "data.augmentations=3"],
        )
        whole = create_dataloader_tpu(data, config)
        batches = [whole.batch(step) for step in range(8)]
        for world_size in (2, 4):
            for step in (7, 2, 5):
                parts = [
                    create_dataloader_tpu(data, config, rank, world_size).batch(step)
                    for rank in range(world_size)
                ]
                joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
                self.same(joined, batches[step])
        resumed = create_dataloader_tpu(data, config)
        resumed.load_state_dict({**whole.state_dict(), "step": 3})
        for batch, expected in zip(resumed, batches[3:]):
            self.same(batch, expected)
        for other in (
            TrainLoader(data, 6, 8, True, 2, augmentations=3),
            TrainLoader(data, 5, 8, True, 2, augmentations=4),
            TrainLoader(data, 5, 8, True, 2),
        ):
            self.assertTrue((other.batch(0)["inputs"] != batches[0]["inputs"]).any())

    def test_stored_ones_are_refused(self):
        data = self.dataset(count=12, group_sizes=[3] * 4).path
        config = load_config(
            write_config(self.folder / "run.yaml", f"data: {{dataset_path: {data}}}\n"),
            ["data.augmentations=2"],
        )
        self.user_error(
            lambda: load_dataset(config, "train"),
            f"data.augmentations = 2: {data} holds 12 examples of 4 puzzles",
            "leave data.augmentations null",
            "without --num_aug",
        )


if __name__ == "__main__":
    unittest.main()
