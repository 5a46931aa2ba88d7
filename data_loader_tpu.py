"""Sudoku datasets in the original's folder layout, and batches whose order depends on (seed, step) alone.

Everything stays uint8 until it is on the device. The global batch of a step does not depend on the number of
workers: each worker takes its slice of it.
"""

import hashlib
import io
import json
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sudoku import BOX_SHAPES, SudokuAugmenter, paired
from utils import (
    STREAM_AUGMENTATION,
    STREAM_EPOCH_ORDER,
    STREAM_EVAL_SUBSET,
    UserError,
    random_stream,
)

# name: dimensions; ratings may be missing
FIELDS = {
    "inputs": 2,
    "labels": 2,
    "puzzle_identifiers": 1,
    "puzzle_indices": 1,
    "group_indices": 1,
    "ratings": 1,
}


class SudokuDatasetTPU:
    """One split of a dataset folder, checked and held in memory.

    inputs, labels: [N, S] uint8 (0 pad, 1 empty cell, 2.. digits); puzzle_identifiers: [N] int32;
    group_indices: [G+1] (a group is one puzzle and its augmentations); ratings: [N] int32 or None (datasets of
    the original have none). Raises UserError where a file is missing, damaged or of another format.
    """

    def __init__(self, dataset_path, split):
        self.path, self.split = Path(dataset_path), split
        folder = self.path / split
        try:
            meta = json.loads((folder / "dataset.json").read_text())
            self.seq_len, self.vocab_size = int(meta["seq_len"]), int(meta["vocab_size"])
            self.num_puzzle_identifiers = int(meta["num_puzzle_identifiers"])
            pad, ignored = meta["pad_id"], meta["ignore_label_id"]
            self.size = math.isqrt(self.seq_len)
        except (FileNotFoundError, NotADirectoryError):
            others = [p.parent.name for p in sorted(self.path.glob("*/dataset.json"))]
            has = f" (it has {', '.join(others)})" if others else ""
            raise UserError(
                f"data.dataset_path = {str(self.path)!r}: there is no {split} split{has} in {self.path.resolve()}: "
                "build it by the `# dataset:` command at the top of the configuration file "
                "(python scripts/build_sudoku_dataset.py --help), or name another folder; a relative "
                "path counts from the current folder"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"dataset.json: {type(error).__name__}: {error}") from None
        files = {name: folder / f"all__{name}.npy" for name in FIELDS}
        arrays = {
            name: self._load(file)
            for name, file in files.items()
            if name != "ratings" or file.exists()
        }
        self.inputs, self.labels = (
            np.ascontiguousarray(arrays[name]) for name in ("inputs", "labels")
        )
        self.puzzle_identifiers, self.group_indices, self.ratings = (
            arrays.get(k) for k in ("puzzle_identifiers", "group_indices", "ratings")
        )
        self._check(arrays, pad, ignored)
        digest = hashlib.sha256(self.inputs)
        digest.update(self.labels)
        self.fingerprint = digest.hexdigest()

    def _load(self, file):
        try:
            # no pickles: numpy would run what they say; its advice to allow them is left out of the message
            return np.lib.format.read_array(io.BytesIO(file.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).split(". ")[0]
            raise self._damaged(f"{file.name}: {reason}") from None

    def _damaged(self, what):
        return UserError(
            f"dataset {self.path}, split {self.split}, is damaged or of another format: {what}. "
            "Build it again with scripts/build_sudoku_dataset.py --overwrite"
        )

    def _check(self, arrays, pad, ignored):
        for name, array in arrays.items():
            if array.ndim != FIELDS[name] or array.dtype.kind not in "iu":
                raise self._damaged(f"all__{name}.npy is {array.dtype}{list(array.shape)}")
        if (
            self.size not in BOX_SHAPES
            or self.size**2 != self.seq_len
            or self.vocab_size != self.size + 2
            or pad
            or ignored
        ):
            raise self._damaged(
                f"seq_len {self.seq_len}, vocab_size {self.vocab_size}, pad_id {pad}, ignore_label_id "
                f"{ignored}: Sudokus of size n in {list(BOX_SHAPES)} have n*n, n+2, 0, 0"
            )
        count = len(self.inputs)
        lengths = {
            len(a)
            for a in (
                self.labels,
                self.puzzle_identifiers,
                arrays["puzzle_indices"][1:],
                arrays.get("ratings", self.labels),
            )
        }
        if (
            lengths != {count}
            or not count
            or self.inputs.shape != self.labels.shape
            or self.inputs.shape[1] != self.seq_len
        ):
            raise self._damaged(
                f"its arrays differ in length (inputs {list(self.inputs.shape)}, labels {list(self.labels.shape)})"
            )
        if not np.array_equal(arrays["puzzle_indices"], np.arange(count + 1)):
            raise self._damaged("a puzzle of a Sudoku dataset has exactly one example")
        groups = self.group_indices
        if (
            len(groups) < 2
            or groups[0] != 0
            or groups[-1] != count
            or (np.diff(groups.astype(np.int64)) < 1).any()
        ):
            raise self._damaged("all__group_indices.npy does not cut the puzzles into groups")
        identifiers = self.puzzle_identifiers
        if identifiers.min() < 0 or identifiers.max() >= self.num_puzzle_identifiers:
            raise self._damaged(
                f"puzzle identifiers go from {identifiers.min()} to {identifiers.max()}, of {self.num_puzzle_identifiers}"
            )
        digits = (self.labels >= 2) & (self.labels < self.vocab_size)
        wrong = ~(digits & ((self.inputs == 1) | (self.inputs == self.labels))).all(1)
        if wrong.any():
            raise self._damaged(
                f"{wrong.sum()} of {count} puzzles do not agree with their solution (first: row {int(wrong.argmax())})"
            )
        self.inputs, self.labels = (
            self.inputs.astype(np.uint8, copy=False),
            self.labels.astype(np.uint8, copy=False),
        )

    def __len__(self):
        """Examples."""
        return len(self.inputs)

    @property
    def num_puzzles(self):
        """Puzzles: groups of one puzzle and its stored augmentations."""
        return len(self.group_indices) - 1


# ---------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------
class TrainLoader:
    """Endless training batches of one worker, prepared ahead by a thread.

    Puzzles stand in an endless row of epochs, each a permutation of them all; step s takes the s-th stretch of
    global_batch_size of them, and for each draws one of its stored augmentations and, if asked, a fresh one.
    """

    def __init__(
        self, dataset, seed, global_batch_size, augment, prefetch_batches, rank=0, world_size=1
    ):
        self.dataset, self.seed, self.global_batch_size = dataset, seed, global_batch_size
        self.prefetch_batches = prefetch_batches
        local = global_batch_size // world_size
        self.mine = slice(rank * local, (rank + 1) * local)
        self.augmenter = SudokuAugmenter(dataset.size, first_digit=2) if augment else None
        self.pairs = paired(dataset.inputs, dataset.labels)
        self.orders = {}
        self.step = 0  # batches handed out

    def _puzzles(self, step):
        """Puzzle (group) numbers of the global batch of `step`, [global_batch_size]."""
        count = self.dataset.num_puzzles
        position = step * self.global_batch_size + np.arange(self.global_batch_size)[self.mine]
        epochs, places = np.divmod(position, count)
        chosen = np.empty(len(places), np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            if epoch not in self.orders:
                # two orders at a time: the thread needs at most the epoch that ends and the one that begins
                self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1}
                self.orders[epoch] = random_stream(
                    self.seed, STREAM_EPOCH_ORDER, epoch
                ).permutation(count)
            here = epochs == epoch
            chosen[here] = self.orders[epoch][places[here]]
        return chosen

    def batch(self, step):
        """This worker's part of the global batch of `step` (from 0): numpy inputs, labels [b, S] uint8,
        puzzle_identifiers [b] int32. A pure function of (seed, step)."""
        data, puzzles = self.dataset, self._puzzles(step)
        bits = random_stream(self.seed, STREAM_AUGMENTATION, step).bit_generator.random_raw(
            2 * self.global_batch_size
        )
        member, draws = bits.reshape(-1, 2)[self.mine].T
        first = data.group_indices[puzzles].astype(np.int64)
        examples = first + (
            member % (data.group_indices[puzzles + 1] - first).astype(np.uint64)
        ).astype(np.int64)
        if self.augmenter is None:
            inputs, labels = data.inputs[examples], data.labels[examples]
        else:
            inputs, labels = self.augmenter(self.pairs[examples], draws)
        return {
            "inputs": inputs,
            "labels": labels,
            "puzzle_identifiers": data.puzzle_identifiers[examples].astype(np.int32),
        }

    def __iter__(self):
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as thread:
            ahead = deque(
                thread.submit(self.batch, self.step + k) for k in range(self.prefetch_batches)
            )
            try:
                while True:
                    batch = ahead.popleft().result()
                    ahead.append(thread.submit(self.batch, self.step + self.prefetch_batches))
                    self.step += 1
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def state_dict(self):
        """Where the loader stands, and what that position belongs to."""
        return {
            "step": self.step,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "fingerprint": self.dataset.fingerprint,
        }

    def load_state_dict(self, state):
        """Go on from `state`. Raises UserError if the training puzzles are not those it was saved with."""
        if state["fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"the training puzzles in {self.dataset.path} are not those this run began with (their checksum "
                "differs): restore that dataset, or start a new run with --run_name"
            )
        self.step = state["step"]


def create_dataloader_tpu(dataset, config, rank=0, world_size=1):
    """TrainLoader of one worker for a Config; rank's slice of each global batch is disjoint from the others'."""
    return TrainLoader(
        dataset,
        config.training.seed,
        config.training.global_batch_size,
        config.data.augment,
        config.data.prefetch_batches,
        rank,
        world_size,
    )


def evaluation_batches(dataset, batch_size, max_examples=None, rank=0, world_size=1):
    """One worker's share of the examples, every one in exactly one share, in as many batches on each worker.

    Yields (batch, rows): a batch of one fixed shape like the loader's, its last rows pads where examples run out, and the
    example numbers [<= batch_size] of its real rows. max_examples: a random subset, the same at every call.
    """
    chosen = np.arange(len(dataset))
    if max_examples is not None and max_examples < len(dataset):
        chosen = np.sort(
            random_stream(0, STREAM_EVAL_SUBSET, 0).permutation(len(dataset))[:max_examples]
        )
    share = math.ceil(len(chosen) / world_size)
    ours = chosen[rank * share : (rank + 1) * share]
    for start in range(0, share, batch_size):
        rows = ours[start : start + batch_size]
        missing = batch_size - len(rows)
        yield (
            {
                "inputs": np.pad(dataset.inputs[rows], ((0, missing), (0, 0))),
                "labels": np.pad(dataset.labels[rows], ((0, missing), (0, 0))),
                "puzzle_identifiers": np.pad(dataset.puzzle_identifiers[rows], (0, missing)).astype(
                    np.int32
                ),
            },
            rows,
        )
