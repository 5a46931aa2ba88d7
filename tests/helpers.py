"""What several test files share: temporary folders, tiny configurations and datasets."""
import json
import random
import tempfile
import unittest
from pathlib import Path

import numpy as np

import sudoku
import utils

ROOT = Path(__file__).resolve().parent.parent


class FolderTest(unittest.TestCase):
    """A test with a folder of its own, self.folder."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)

    def user_error(self, function, *says):
        """`function()` must raise UserError, with each of `says` in its message; returns the message."""
        with self.assertRaises(utils.UserError) as caught:
            function()
        for text in says:
            self.assertIn(text, str(caught.exception))
        return str(caught.exception)


def write_config(path, text="data: {dataset_path: nowhere}\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def random_pairs(size, count, seed=0, clue_share=0.5):
    """`count` puzzles and their solutions in a dataset's codes (1 empty, 2.. digits), each [count, S] uint8.
    The puzzles are not unique in their solutions: nothing here asks for that."""
    stream = np.random.Generator(np.random.Philox(seed))
    grid = np.frombuffer(sudoku.random_solution(size, random.Random(seed)), np.uint8)[None].repeat(count, 0)
    _, solutions = sudoku.SudokuAugmenter(size)(sudoku.paired(grid, grid), stream.bit_generator.random_raw(count))
    labels = solutions + np.uint8(1)
    return np.where(stream.random(labels.shape) < clue_share, labels, 1).astype(np.uint8), labels


def write_split(folder, inputs, labels, group_sizes=None, ratings=None):
    """One split in the layout of scripts/build_sudoku_dataset.py. Every group has its own puzzle identifier, by
    which tests know it again."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    count, cells = inputs.shape
    group_sizes = [1] * count if group_sizes is None else group_sizes
    arrays = {"inputs": inputs, "labels": labels,
              "puzzle_identifiers": np.repeat(np.arange(len(group_sizes), dtype=np.int32), group_sizes),
              "puzzle_indices": np.arange(count + 1, dtype=np.int32),
              "group_indices": np.cumsum([0, *group_sizes]).astype(np.int32),
              **({} if ratings is None else {"ratings": np.asarray(ratings, np.int32)})}
    for name, array in arrays.items():
        np.save(folder / f"all__{name}.npy", array)
    meta = {"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": round(cells ** 0.5) + 2,
            "seq_len": cells, "num_puzzle_identifiers": len(group_sizes), "total_groups": len(group_sizes),
            "mean_puzzle_examples": 1, "total_puzzles": len(group_sizes), "sets": ["all"]}
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder
