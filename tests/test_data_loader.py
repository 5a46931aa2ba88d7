"""Datasets and batches: order, augmentation, resuming, damage, and the evaluation's batches."""

import itertools
import json
import shutil
import threading
import unittest
from unittest import mock

import numpy as np

import sudoku
from config import load_config
from data_loader_tpu import SudokuDatasetTPU, TrainLoader, create_dataloader_tpu, evaluation_batches
from tests.helpers import FolderTest, random_pairs, write_config, write_split


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


class LoaderTest(FolderTest):
    def dataset(self, size=4, count=10, seed=0, **split):
        inputs, labels = random_pairs(size, count, seed)
        write_split(self.folder / f"{size}-{count}-{seed}" / "train", inputs, labels, **split)
        return SudokuDatasetTPU(self.folder / f"{size}-{count}-{seed}", "train")

    def same(self, one, other):
        self.assertEqual(one.keys(), other.keys())
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], key)


class Order(LoaderTest):
    def test_batches_have_the_promised_types(self):
        batch = TrainLoader(self.dataset(), 0, 6, True, 2).batch(3)
        self.assertEqual(
            {k: (v.dtype.name, v.shape) for k, v in batch.items()},
            {
                "inputs": ("uint8", (6, 16)),
                "labels": ("uint8", (6, 16)),
                "puzzle_identifiers": ("int32", (6,)),
            },
        )

    def test_a_batch_depends_on_seed_and_step_alone(self):
        data = self.dataset()
        forward, backward = TrainLoader(data, 7, 4, True, 2), TrainLoader(data, 7, 4, True, 5)
        batches = [forward.batch(step) for step in range(9)]
        for step in (8, 3, 5, 0, 1, 7, 2, 6, 4):
            self.same(backward.batch(step), batches[step])
        for step, batch in zip(range(9), backward):
            self.same(batch, batches[step])
        other_seed = TrainLoader(data, 8, 4, True, 2)
        self.assertTrue(
            any((other_seed.batch(s)["inputs"] != batches[s]["inputs"]).any() for s in range(3))
        )
        other = [other_seed.batch(s)["puzzle_identifiers"].tolist() for s in range(9)]
        self.assertNotEqual(other, [b["puzzle_identifiers"].tolist() for b in batches])

    def test_workers_take_disjoint_slices_of_one_global_batch(self):
        data = self.dataset(count=12, group_sizes=[1, 3, 2, 1, 5])
        for augment in (False, True):
            whole = TrainLoader(data, 3, 8, augment, 2)
            for world_size in (1, 2, 4):
                workers = [
                    TrainLoader(data, 3, 8, augment, 2, rank, world_size)
                    for rank in range(world_size)
                ]
                self.assertEqual([r for w in workers for r in range(8)[w.mine]], list(range(8)))
                for step in range(5):
                    parts = [worker.batch(step) for worker in workers]
                    self.same(
                        {k: np.concatenate([p[k] for p in parts]) for k in parts[0]},
                        whole.batch(step),
                    )

    def test_create_dataloader_takes_the_configuration(self):
        data = self.dataset()
        config = load_config(
            write_config(self.folder / "run.yaml"),
            ["training.seed=5", "training.global_batch_size=6", "data.augment=false"],
        )
        self.same(
            create_dataloader_tpu(data, config, 1, 2).batch(4),
            TrainLoader(data, 5, 6, False, 2, 1, 2).batch(4),
        )

    def test_every_epoch_visits_every_puzzle_once(self):
        count = 10
        data = self.dataset(count=count)
        for batch_size in (
            4,
            10,
            25,
            1,
        ):  # straddling epochs, one epoch, more than two epochs, single
            for augment in (False, True):
                with self.subTest(batch=batch_size, augment=augment):
                    loader = TrainLoader(data, 1, batch_size, augment, 3)
                    batches = [loader.batch(step) for step in range(-(-5 * count // batch_size))]
                    visited = np.concatenate([b["puzzle_identifiers"] for b in batches])[
                        : 5 * count
                    ].reshape(5, count)
                    self.assertEqual(np.sort(visited).tolist(), [list(range(count))] * 5)
                    self.assertEqual(
                        len(np.unique(visited, axis=0)), 5
                    )  # and each epoch in its own order
                    if not augment:
                        rows = np.concatenate([b["inputs"] for b in batches])[: 5 * count]
                        np.testing.assert_array_equal(rows, data.inputs[visited.ravel()])

    def test_groups_give_one_of_their_own_members(self):
        sizes = [1, 3, 2, 4]
        data = self.dataset(count=10, group_sizes=sizes)
        self.assertEqual((len(data), data.num_puzzles), (10, 4))
        loader, members = TrainLoader(data, 0, 4, False, 2), {g: set() for g in range(4)}
        for step in range(100):
            batch = loader.batch(step)
            self.assertEqual(sorted(batch["puzzle_identifiers"]), [0, 1, 2, 3])
            for row, label, group in zip(
                batch["inputs"], batch["labels"], batch["puzzle_identifiers"]
            ):
                row = [
                    r
                    for r in range(10)
                    if (data.inputs[r] == row).all() and (data.labels[r] == label).all()
                ]
                members[int(group)].update(row)
        starts = np.cumsum([0, *sizes])
        self.assertEqual(members, {g: set(range(starts[g], starts[g + 1])) for g in range(4)})


class Augmentation(LoaderTest):
    def test_images_are_legal_and_keep_their_givens(self):
        for size in (4, 6, 9):
            data = self.dataset(size=size)
            clues, loader = (data.inputs > 1).sum(1), TrainLoader(data, 0, 50, True, 2)
            for step in range(4):
                batch = loader.batch(step)
                inputs, labels = batch["inputs"], batch["labels"]
                self.assertTrue(sudoku.is_solved(labels - 1).all())
                self.assertTrue(((inputs == 1) | (inputs == labels)).all())
                np.testing.assert_array_equal(
                    (inputs > 1).sum(1), clues[batch["puzzle_identifiers"]]
                )
                self.assertGreater(len(np.unique(labels, axis=0)), 20)

    def test_every_map_of_4x4_once(self):
        """Each draw below the number of maps is another map.

        The codes 0 and 1, which maps do not change, distinguish the cells.
        """
        maps = 8 * 8 * 24 * 2
        bits = (np.arange(16) >> np.arange(4)[:, None] & 1).astype(np.uint8)
        probes = [
            sudoku.paired(*bits[None, :2].swapaxes(0, 1)),
            sudoku.paired(*bits[None, 2:].swapaxes(0, 1)),
            sudoku.paired(
                np.full((1, 16), 2, np.uint8) + np.arange(16, dtype=np.uint8) % 4, bits[None, 0]
            ),
        ]
        augment, draws = sudoku.SudokuAugmenter(4, first_digit=2), np.arange(maps, dtype=np.uint64)
        images = np.concatenate(
            [image for probe in probes for image in augment(probe.repeat(maps, 0), draws)], axis=1
        )
        self.assertEqual(len(np.unique(images, axis=0)), maps)

    def test_images_of_4x4_are_all_the_grids_there_are(self):
        """The 288 grids of size 4 fall into two classes, of 96 and 192.

        Russell and Jarvis count the classes of size 9 in this way.
        """
        solutions = np.array(
            [list(s) for s in sudoku.solve([0] * 16, limit=1000).solutions], np.uint8
        )
        self.assertEqual(len(solutions), 288)
        augment, draws = sudoku.SudokuAugmenter(4), np.arange(8 * 8 * 24 * 2, dtype=np.uint64)
        classes = {}
        for grid in solutions:
            if not any(grid.tobytes() in members for members in classes.values()):
                images = augment(
                    sudoku.paired(grid[None], grid[None]).repeat(len(draws), 0), draws
                )[1]
                classes[grid.tobytes()] = {image.tobytes() for image in images}
        self.assertEqual(sorted(map(len, classes.values())), [96, 192])
        self.assertEqual(set().union(*classes.values()), {s.tobytes() for s in solutions})

    def test_the_loader_reaches_all_of_them(self):
        data = self.dataset(count=1)
        loader, seen = TrainLoader(data, 0, 1000, True, 2), set()
        for step in range(4):
            seen.update(row.tobytes() for row in loader.batch(step)["labels"])
        self.assertIn(len(seen), (96, 192))

    def test_maps_of_6x6_and_9x9(self):
        for size, rows, columns, transposes in ((6, 48, 72, False), (9, 1296, 1296, True)):
            augment = sudoku.SudokuAugmenter(size)
            for table, count in ((augment.rows, rows), (augment.columns, columns)):
                self.assertEqual(len(np.unique(table, axis=0)), count)
                self.assertEqual(table.shape, (count, size))
            self.assertEqual(len(np.unique(augment.digits, axis=0)), {6: 720, 9: 362880}[size])
            # not a Sudoku: only cells 0 and 1 are filled, which share a column only after a
            # transposition
            probe = np.zeros((1, size * size), np.uint8)
            probe[0, :2] = 1
            total = rows * columns * len(augment.digits)
            draws = np.array([k * total + k for k in range(10)], np.uint64)
            images = augment(sudoku.paired(probe, probe).repeat(10, 0), draws)[0]
            where = np.nonzero(images)[1].reshape(10, 2) % size
            self.assertEqual(
                (where[:, 0] == where[:, 1]).tolist(),
                [transposes and k % 2 == 1 for k in range(10)],
            )


class Resuming(LoaderTest):
    def test_resumed_in_mid_stream(self):
        data = self.dataset()
        unbroken = list(itertools.islice(TrainLoader(data, 2, 4, True, 3), 12))
        loader = TrainLoader(data, 2, 4, True, 3)
        stream = iter(loader)
        for _ in range(5):
            next(stream)
        state = json.loads(json.dumps(loader.state_dict()))  # plain data
        self.assertEqual(state["step"], 5)
        stream.close()
        resumed = TrainLoader(data, 2, 4, True, 7)
        resumed.load_state_dict(state)
        for batch, expected in zip(resumed, unbroken[5:]):
            self.same(batch, expected)

    def test_another_dataset_is_refused(self):
        state = TrainLoader(self.dataset(seed=0), 0, 4, True, 2).state_dict()
        other = TrainLoader(self.dataset(seed=1), 0, 4, True, 2)
        self.user_error(
            lambda: other.load_state_dict(state),
            str(other.dataset.path),
            "checksum",
            "restore",
            "--run_name",
        )
        self.assertEqual(other.step, 0)

    def test_the_thread_ends_with_the_iterator(self):
        stream = iter(TrainLoader(self.dataset(), 0, 4, True, 8))
        next(stream)
        self.assertEqual(len(loader_threads()), 1)
        stream.close()
        self.assertEqual(loader_threads(), [])

    def test_an_exception_in_the_thread_reaches_the_consumer(self):
        loader = TrainLoader(self.dataset(), 0, 4, True, 2)
        real = loader.batch

        def broken(step):
            if step == 3:
                raise RuntimeError("broken at step 3")
            return real(step)

        with mock.patch.object(loader, "batch", broken):
            stream = iter(loader)
            for step in range(3):
                self.same(next(stream), real(step))
            with self.assertRaisesRegex(RuntimeError, "broken at step 3"):
                next(stream)
        self.assertEqual(loader.step, 3)
        self.assertEqual(loader_threads(), [])


class Damage(LoaderTest):
    """What SudokuDatasetTPU refuses. Each case changes one thing of a good dataset."""

    def setUp(self):
        super().setUp()
        inputs, labels = random_pairs(4, 6)
        self.split = write_split(
            self.folder / "data" / "train", inputs, labels, ratings=np.arange(6)
        )

    def test_the_undamaged(self):
        data = SudokuDatasetTPU(self.folder / "data", "train")
        self.assertEqual(
            (len(data), data.num_puzzles, data.size, data.seq_len, data.vocab_size),
            (6, 6, 4, 16, 6),
        )
        self.assertEqual(data.ratings.tolist(), list(range(6)))
        (self.split / "all__ratings.npy").unlink()
        self.assertIsNone(SudokuDatasetTPU(self.folder / "data", "train").ratings)
        wide = np.load(self.split / "all__inputs.npy").astype(
            np.int32
        )  # as some of the original's are
        np.save(self.split / "all__inputs.npy", wide)
        self.assertEqual(SudokuDatasetTPU(self.folder / "data", "train").inputs.dtype, np.uint8)

    def test_no_split(self):
        self.user_error(
            lambda: SudokuDatasetTPU(self.folder / "data", "test"),
            "data.dataset_path",
            str(self.folder / "data"),
            f"no test split (it has train) in {(self.folder / 'data').resolve()}: ",
            "the `# dataset:` command",
        )
        self.user_error(
            lambda: SudokuDatasetTPU(self.folder / "absent", "train"),
            str(self.folder / "absent"),
            "no train split in ",
        )

    def refused(self, *says):
        with self.subTest(says):
            message = self.user_error(
                lambda: SudokuDatasetTPU(self.folder / "data", "train"),
                f"dataset {self.folder / 'data'}, split train",
                "is damaged or of another format: ",
                "Build it again with scripts/build_sudoku_dataset.py --overwrite",
                *says,
            )
            self.assertNotIn("\n", message)

    def changed(self, name, change, *says):
        """`change(array)` of one file must be refused; the file is put back."""
        path = self.split / f"all__{name}.npy"
        good = path.read_bytes()
        np.save(path, change(np.load(path)))
        self.refused(*says)
        path.write_bytes(good)

    def test_missing_files(self):
        for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"):
            path = self.split / f"all__{name}.npy"
            good = path.read_bytes()
            path.unlink()
            self.refused(f"{path.name}: No such file")
            path.write_bytes(good)

    def test_cut_files(self):
        for name in ("inputs", "group_indices", "ratings"):
            path = self.split / f"all__{name}.npy"
            good = path.read_bytes()
            for length in (0, 5, 40, len(good) - 1):
                path.write_bytes(good[:length])
                self.refused(f"{path.name}: EOF: ")
            path.write_bytes(good)

    def test_pickles_are_not_opened(self):
        path = self.split / "all__labels.npy"
        np.save(path, np.array([{"a": 1}] * 6, object), allow_pickle=True)
        self.refused("all__labels.npy: Object arrays cannot be loaded")
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
        self.refused("all__labels.npy: ", "magic string")

    def test_wrong_kinds_and_shapes(self):
        for name in (
            "inputs",
            "labels",
            "puzzle_identifiers",
            "puzzle_indices",
            "group_indices",
            "ratings",
        ):
            self.changed(name, lambda a: a.astype(np.float32), f"all__{name}.npy is float32[")
            self.changed(name, lambda a: a[..., None], f"all__{name}.npy is ", "1]")
        self.changed("ratings", lambda a: a[0], "all__ratings.npy is int32[]")

    def test_wrong_lengths(self):
        for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "ratings"):
            self.changed(name, lambda a: a[:-1], "differ in length")
        self.changed("labels", lambda a: a[:, :-1], "differ in length", "[6, 15]")
        for name in ("inputs", "labels", "puzzle_identifiers", "ratings"):
            np.save(self.split / f"all__{name}.npy", np.load(self.split / f"all__{name}.npy")[:0])
        np.save(self.split / "all__puzzle_indices.npy", np.zeros(1, np.int32))
        self.refused("differ in length", "inputs [0, 16]")

    def test_wrong_content(self):
        def put(row, column, value):
            def change(array):
                array[row, column] = value
                return array

            return change

        given = int(np.argmax(np.load(self.split / "all__inputs.npy")[2] > 1))
        self.changed(
            "labels",
            lambda a: put(2, given, 7 - a[2, given])(a),
            "1 of 6 puzzles do not agree",
            "first: row 2",
        )
        self.changed("inputs", put(3, 0, 0), "1 of 6 puzzles do not agree", "first: row 3")
        self.changed(
            "labels", put(slice(None), 0, 6), "6 of 6 puzzles do not agree", "first: row 0"
        )
        self.changed("puzzle_indices", lambda a: a + 1, "exactly one example")
        for wrong in ([0, 7], [1, 6], [0], [0, 3, 3, 6], [0, 4, 2, 6]):
            for kind in (np.int32, np.uint32):
                self.changed(
                    "group_indices",
                    lambda a: np.array(wrong, kind),
                    "does not cut the puzzles into groups",
                )
        self.changed("puzzle_identifiers", lambda a: a + 1, "identifiers go from 1 to 6, of 6")
        self.changed("puzzle_identifiers", lambda a: a - 1, "identifiers go from -1 to 4")

    def test_metadata(self):
        path = self.split / "dataset.json"
        good = json.loads(path.read_text())
        for text in ("", "{", "[1]", "5", "null", json.dumps({})):
            path.write_text(text)
            self.refused("dataset.json: ", "Error: ")
        for key in ("seq_len", "vocab_size", "num_puzzle_identifiers", "pad_id", "ignore_label_id"):
            path.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
            self.refused("KeyError", key)
        for key, value, says in [
            ("seq_len", "many", "ValueError"),
            ("seq_len", -16, "ValueError"),
            ("seq_len", None, "TypeError"),
            ("seq_len", 25, "seq_len 25"),
            ("seq_len", 17, "seq_len 17"),
            ("seq_len", 81, "seq_len 81"),
            ("vocab_size", 11, "vocab_size 11"),
            ("pad_id", 1, "pad_id 1"),
            ("ignore_label_id", -100, "ignore_label_id -100"),
            ("num_puzzle_identifiers", 5, "of 5"),
        ]:
            path.write_text(json.dumps({**good, key: value}))
            self.refused(says)
        shutil.rmtree(self.split)
        self.user_error(lambda: SudokuDatasetTPU(self.folder / "data", "train"), "no train split")


class EvaluationBatches(LoaderTest):
    def test_every_example_once(self):
        data = self.dataset(count=10, group_sizes=[3, 3, 4])
        for batch_size in (1, 3, 5, 10, 13):
            seen = []
            for batch, rows in evaluation_batches(data, batch_size):
                self.assertEqual(
                    {k: (v.dtype.name, v.shape) for k, v in batch.items()},
                    {
                        "inputs": ("uint8", (batch_size, 16)),
                        "labels": ("uint8", (batch_size, 16)),
                        "puzzle_identifiers": ("int32", (batch_size,)),
                    },
                )
                for key, source in (
                    ("inputs", data.inputs),
                    ("labels", data.labels),
                    ("puzzle_identifiers", data.puzzle_identifiers),
                ):
                    np.testing.assert_array_equal(batch[key][: len(rows)], source[rows])
                    self.assertFalse(batch[key][len(rows) :].any())  # pads
                seen += rows.tolist()
            self.assertEqual(seen, list(range(10)))

    def test_workers_share_the_examples(self):
        data = self.dataset(count=10)
        for world_size in (1, 2, 3, 4, 8, 10):
            for batch_size in (1, 2, 3, 16):
                with self.subTest(world_size=world_size, batch_size=batch_size):
                    shares = [
                        [rows.tolist() for _, rows in evaluation_batches(data, batch_size, *share)]
                        for share in ((None, rank, world_size) for rank in range(world_size))
                    ]
                    self.assertEqual(len(set(map(len, shares))), 1)  # as many batches for each
                    seen = [row for batches in shares for rows in batches for row in rows]
                    self.assertEqual(seen, list(range(10)))

    def test_subsets_are_the_same_each_time(self):
        data = self.dataset(count=40)

        def rows(batch_size, max_examples):
            return np.concatenate(
                [rows for _, rows in evaluation_batches(data, batch_size, max_examples)]
            ).tolist()

        subset = rows(4, 10)
        self.assertEqual(len(set(subset)), 10)
        self.assertNotEqual(subset, list(range(10)))  # not simply the first
        self.assertEqual(subset, rows(4, 10))
        self.assertEqual(subset, rows(7, 10))
        self.assertTrue(set(subset) < set(rows(4, 20)))
        for everything in (40, 41, None):
            self.assertEqual(rows(7, everything), list(range(40)))


if __name__ == "__main__":
    unittest.main()
