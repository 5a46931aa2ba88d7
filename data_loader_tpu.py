"""Sudoku datasets in the original's folder layout, and batches that depend on (seed, step) alone.

Everything stays uint8 until it is on the device. The global batch of a step does not depend on the
number of workers: each worker takes its slice of it.
"""

import hashlib
import io
import json
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from sudoku import BOX_SHAPES, SudokuAugmenter, fixed_draws, paired
from utils import (
    STREAM_AUGMENTATION,
    STREAM_EPOCH_ORDER,
    STREAM_EVAL_SUBSET,
    UserError,
    random_stream,
)

# The arrays of a split, all__{name}.npy: {name: number of dimensions}. ratings may be missing.
FIELDS = {
    "inputs": 2,
    "labels": 2,
    "puzzle_identifiers": 1,
    "puzzle_indices": 1,
    "group_indices": 1,
    "ratings": 1,
}

Batch = dict[str, np.ndarray]  # inputs, labels [b, S] uint8; puzzle_identifiers [b] int32


class SudokuDatasetTPU:
    """One split of a dataset folder, checked and held in memory.

    inputs, labels: [N, S] uint8 (0 pad, 1 empty cell, 2 and above digits). puzzle_identifiers: [N]
    integers. group_indices: [G+1] integers; group g is one puzzle and its stored augmentations, in
    the rows from group_indices[g] up to, but not including, group_indices[g+1]. ratings: [N]
    integers, or None: the original's datasets have none. fingerprint: SHA-256 of inputs and labels.

    Raises UserError if a file is missing, damaged or of another format.
    """

    def __init__(self, dataset_path: str | Path, split: str):
        self.path, self.split = Path(dataset_path), split
        folder = self.path / split
        self._read_metadata(folder)
        files = {name: folder / f"all__{name}.npy" for name in FIELDS}
        if not files["ratings"].exists():
            del files["ratings"]
        arrays = {name: self._load(file) for name, file in files.items()}
        self.inputs = np.ascontiguousarray(arrays["inputs"])
        self.labels = np.ascontiguousarray(arrays["labels"])
        self.puzzle_identifiers = arrays["puzzle_identifiers"]
        self.group_indices = arrays["group_indices"]
        self.ratings = arrays.get("ratings")
        self._check_shapes(arrays)
        self._check_content()
        self.inputs = self.inputs.astype(np.uint8, copy=False)
        self.labels = self.labels.astype(np.uint8, copy=False)
        sha256 = hashlib.sha256(self.inputs.data)
        sha256.update(self.labels.data)
        self.fingerprint = sha256.hexdigest()

    def _read_metadata(self, folder: Path) -> None:
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
                f"data.dataset_path = {str(self.path)!r}: there is no {self.split} split{has} in "
                f"{self.path.resolve()}: build it by the `# dataset:` command at the top of the "
                "configuration file (python scripts/build_sudoku_dataset.py --help), or name "
                "another folder; a relative path counts from the current folder"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"dataset.json: {type(error).__name__}: {error}") from None
        square = self.size in BOX_SHAPES and self.size**2 == self.seq_len
        if not square or self.vocab_size != self.size + 2 or pad or ignored:
            raise self._damaged(
                f"seq_len {self.seq_len}, vocab_size {self.vocab_size}, pad_id {pad}, "
                f"ignore_label_id {ignored}: Sudokus of size n in {list(BOX_SHAPES)} have n*n, "
                "n+2, 0, 0"
            )

    def _load(self, file: Path) -> np.ndarray:
        try:
            # No pickles, because loading one executes code. The message keeps only the first
            # sentence of numpy's error, since the second advises to allow pickles.
            return np.lib.format.read_array(io.BytesIO(file.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error).split(". ")[0]
            raise self._damaged(f"{file.name}: {reason}") from None

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"dataset {self.path}, split {self.split}, is damaged or of another format: {what}. "
            "Build it again with scripts/build_sudoku_dataset.py --overwrite"
        )

    def _check_shapes(self, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if array.ndim != FIELDS[name] or array.dtype.kind not in "iu":
                raise self._damaged(f"all__{name}.npy is {array.dtype}{list(array.shape)}")
        count = len(self.inputs)
        rows = {name: len(array) for name, array in arrays.items() if name != "group_indices"}
        rows["puzzle_indices"] -= 1  # it holds boundaries, one more than puzzles
        shape = (count, self.seq_len)
        same_length = count > 0 and set(rows.values()) == {count}
        if not same_length or not self.inputs.shape == self.labels.shape == shape:
            raise self._damaged(
                f"its arrays differ in length (inputs {list(self.inputs.shape)}, labels "
                f"{list(self.labels.shape)})"
            )
        if not np.array_equal(arrays["puzzle_indices"], np.arange(count + 1)):
            raise self._damaged("a puzzle of a Sudoku dataset has exactly one example")

    def _check_content(self) -> None:
        count, groups = len(self.inputs), self.group_indices.astype(np.int64)
        covers_all = len(groups) > 1 and groups[0] == 0 and groups[-1] == count
        if not covers_all or (np.diff(groups) < 1).any():
            raise self._damaged("all__group_indices.npy does not cut the puzzles into groups")
        lowest, highest = self.puzzle_identifiers.min(), self.puzzle_identifiers.max()
        if lowest < 0 or highest >= self.num_puzzle_identifiers:
            raise self._damaged(
                f"puzzle identifiers go from {lowest} to {highest}, of "
                f"{self.num_puzzle_identifiers}"
            )
        digits = (self.labels >= 2) & (self.labels < self.vocab_size)
        wrong = ~(digits & ((self.inputs == 1) | (self.inputs == self.labels))).all(1)
        if wrong.any():
            raise self._damaged(
                f"{wrong.sum()} of {count} puzzles do not agree with their solution (first: row "
                f"{int(wrong.argmax())})"
            )

    def __len__(self) -> int:
        """Number of examples: puzzles and stored augmentations."""
        return len(self.inputs)

    @property
    def num_puzzles(self) -> int:
        """Number of puzzles, without their stored augmentations."""
        return len(self.group_indices) - 1


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------
class TrainLoader:
    """Endless training batches of one worker, prepared ahead by a thread.

    The order of the puzzles is one permutation for each epoch, one after the other. Step s, from 0,
    reads its positions s*B to (s+1)*B, where B is the global batch size. For each puzzle the loader
    draws one of the stored augmentations. If `augment`, it then applies a random symmetry.

    augmentations: None for any symmetry. A number N restricts each puzzle to N fixed symmetries and
    the puzzle itself, each drawn with the same probability. Symmetry k, from 1 to N, depends on
    (seed, puzzle, k) alone. So the batches are those of a dataset that was built with --num_aug N
    and this seed, and nothing is stored. The dataset must then have no stored augmentations, and
    `augment` must be true.
    """

    def __init__(
        self,
        dataset: SudokuDatasetTPU,
        seed: int,
        global_batch_size: int,
        augment: bool,
        prefetch_batches: int,
        rank: int = 0,
        world_size: int = 1,
        augmentations: int | None = None,
    ):
        assert augmentations is None or (augment and len(dataset) == dataset.num_puzzles)
        self.augmentations = augmentations
        self.dataset, self.seed, self.global_batch_size = dataset, seed, global_batch_size
        self.prefetch_batches = prefetch_batches
        local = global_batch_size // world_size
        self.mine = slice(rank * local, (rank + 1) * local)
        self.augmenter = SudokuAugmenter(dataset.size, first_digit=2) if augment else None
        self.pairs = paired(dataset.inputs, dataset.labels)
        self.orders: dict[int, np.ndarray] = {}
        self.step = 0  # batches handed out

    def _puzzles(self, step: int) -> np.ndarray:
        """This worker's puzzles (group numbers) of `step`, int64 [b]."""
        count = self.dataset.num_puzzles
        positions = step * self.global_batch_size + np.arange(self.global_batch_size)[self.mine]
        epochs, offsets = np.divmod(positions, count)
        chosen = np.empty(len(positions), np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            chosen[here] = self._order(epoch)[offsets[here]]
        return chosen

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch, [num_puzzles] int64.

        Two are cached, because a batch may hold the end of one epoch and the start of the next.
        """
        if epoch not in self.orders:
            self.orders = {k: order for k, order in self.orders.items() if k == epoch - 1}
            stream = random_stream(self.seed, STREAM_EPOCH_ORDER, epoch)
            self.orders[epoch] = stream.permutation(self.dataset.num_puzzles)
        return self.orders[epoch]

    def batch(self, step: int) -> Batch:
        """This worker's part of the global batch of `step` (from 0), a function of (seed, step).

        inputs, labels: [b, S] uint8; puzzle_identifiers: [b] int32, where b is the worker's batch
        size. Any thread may call it for any step.
        """
        data, puzzles = self.dataset, self._puzzles(step)
        stream = random_stream(self.seed, STREAM_AUGMENTATION, step)
        bits = stream.bit_generator.random_raw(2 * self.global_batch_size)
        members, draws = bits.reshape(-1, 2)[self.mine].T
        first = data.group_indices[puzzles].astype(np.int64)
        sizes = (data.group_indices[puzzles + 1] - first).astype(np.uint64)
        examples = first + (members % sizes).astype(np.int64)
        if self.augmenter is None:
            inputs, labels = data.inputs[examples], data.labels[examples]
        else:
            if self.augmentations is not None:
                copies = members % np.uint64(self.augmentations + 1)
                draws = fixed_draws(self.seed, puzzles, copies)
            inputs, labels = self.augmenter(self.pairs[examples], draws)
            if self.augmentations is not None:
                itself = copies == 0
                inputs[itself] = data.inputs[examples[itself]]
                labels[itself] = data.labels[examples[itself]]
        identifiers = data.puzzle_identifiers[examples].astype(np.int32)
        return {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers}

    def __iter__(self) -> Generator[Batch, None, None]:
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

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader, and the data that this position belongs to."""
        return {
            "step": self.step,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "fingerprint": self.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`. Raises UserError if it belongs to other puzzles."""
        if state["fingerprint"] != self.dataset.fingerprint:
            raise UserError(
                f"the training puzzles in {self.dataset.path} are not those this run began with "
                "(their checksum differs): restore that dataset, or start a new run with "
                "--run_name"
            )
        self.step = state["step"]


def create_dataloader_tpu(
    dataset: SudokuDatasetTPU, config: Config, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """The TrainLoader of one worker; each worker has another slice of every global batch."""
    return TrainLoader(
        dataset,
        config.training.seed,
        config.training.global_batch_size,
        config.data.augment,
        config.data.prefetch_batches,
        rank,
        world_size,
        config.data.augmentations,
    )


def evaluation_batches(
    dataset: SudokuDatasetTPU,
    batch_size: int,
    max_examples: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """One worker's share of the examples. Each example is in exactly one share, and each worker has
    the same number of batches.

    Yields (batch, rows). batch: `batch_size` rows, as TrainLoader.batch has them; pads fill the end
    of the last ones. rows: [<= batch_size] int64, the example numbers of those that are no pads.
    max_examples: evaluate only so many, a random subset that is the same at every call.
    """
    chosen: np.ndarray = np.arange(len(dataset))
    if max_examples is not None and max_examples < len(dataset):
        order = random_stream(0, STREAM_EVAL_SUBSET, 0).permutation(len(dataset))
        chosen = np.sort(order[:max_examples])
    share = math.ceil(len(chosen) / world_size)
    ours = chosen[rank * share : (rank + 1) * share]
    for start in range(0, share, batch_size):
        rows = ours[start : start + batch_size]
        missing = batch_size - len(rows)
        identifiers = np.pad(dataset.puzzle_identifiers[rows], (0, missing))
        batch = {
            "inputs": np.pad(dataset.inputs[rows], ((0, missing), (0, 0))),
            "labels": np.pad(dataset.labels[rows], ((0, missing), (0, 0))),
            "puzzle_identifiers": identifiers.astype(np.int32),
        }
        yield batch, rows
