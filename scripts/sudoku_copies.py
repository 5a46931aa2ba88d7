"""Puzzles of a held-out split that are copies of training puzzles.

Two Sudokus are the same puzzle if a symmetry maps one to the other: digits relabelled, bands,
stacks and the lines within them permuted, and the grid transposed where its boxes are square. A
9x9 puzzle has up to 1.2e12 such copies, and the trainer's augmentation draws from them: a held-out
puzzle that is one of them has been trained on.

The search has three stages, from cheap to exact: identical puzzles, by a dictionary; an invariant
(`invariants`), about 20 microseconds a puzzle, which all copies share; and a canonical form
(`canonical_form`), a few milliseconds each, for the few puzzles whose invariant a training puzzle
has, too.
"""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import sudoku

ROUNDS = 3  # of refinement; more tell no further puzzles apart
BLOCK = 5_000  # puzzles at a time: bounds the memory


class Copies(NamedTuple):
    """The copies in one held-out split. identical: how many of its puzzles are in the training
    split, too, cell by cell. symmetric: how many more are symmetric copies of one that is.
    examples: the first copies, identical ones before the others."""

    identical: int
    symmetric: int
    examples: list[tuple[bytes, bytes]]  # (held-out puzzle, training puzzle) of digits 0..size


def find_copies(train_puzzles, train_solutions, puzzles, solutions, shown: int = 3) -> Copies:
    """Which of the held-out `puzzles` [N, S] are copies of one of `train_puzzles` [M, S].

    All arrays are uint8, 0 for an empty cell; solutions are those of the puzzles. A puzzle is
    judged together with its solution: two puzzles that each have one solution are copies of each
    other if and only if the pairs are. shown: how many examples to return at most.
    """
    size = sudoku.size_of(puzzles.shape[1])
    train_index = {row.tobytes(): k for k, row in enumerate(train_puzzles)}
    found = [train_index.get(row.tobytes()) for row in puzzles]
    identical = sum(k is not None for k in found)
    examples = [
        (puzzles[i].tobytes(), train_puzzles[k].tobytes())
        for i, k in enumerate(found)
        if k is not None
    ]
    train_keys, keys = invariants(train_puzzles, train_solutions), invariants(puzzles, solutions)
    shared = np.intersect1d(train_keys, keys)
    candidates = [i for i in np.flatnonzero(np.isin(keys, shared)) if found[i] is None]
    if not candidates:
        return Copies(identical, 0, examples[:shown])
    wanted = np.flatnonzero(np.isin(train_keys, keys[candidates]))
    forms = {canonical_form(train_puzzles[k], train_solutions[k], size): k for k in wanted}
    symmetric = 0
    for i in tqdm(candidates, desc="symmetric copies", unit="puzzle", disable=None):
        match = forms.get(canonical_form(puzzles[i], solutions[i], size))
        if match is not None:
            symmetric += 1
            examples.append((puzzles[i].tobytes(), train_puzzles[match].tobytes()))
    return Copies(identical, symmetric, examples[:shown])


# --------------------------------------------------------------------------------------------------
# Invariant
# --------------------------------------------------------------------------------------------------
def _mix(values: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _salted(values: np.ndarray, salt: int) -> np.ndarray:
    return _mix(values + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64))


def invariants(puzzles: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """A number for each puzzle, uint64 [N], which all symmetric copies of a puzzle share.

    Colour refinement (Weisfeiler and Leman 1968): the first colour of a cell says whether it is
    given. In each round the new colour is a hash of the old one and of four sums of colours: over
    the cell's row, its column, its box and the cells with its digit in the solution. A sum does not
    depend on the order, and rows and columns are treated alike.
    """
    parts = [
        _refine(puzzles[k : k + BLOCK], solutions[k : k + BLOCK])[0].sum(1)
        for k in range(0, len(puzzles), BLOCK)
    ]
    return _mix(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _refine(puzzles: np.ndarray, solutions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hashed colours of the cells [N, S], of the lines [N, 2 * size]: rows, then columns)."""
    count, cells = puzzles.shape
    size = sudoku.size_of(cells)
    height, width = sudoku.box_shape(size)
    by_digit = np.argsort(solutions, axis=1, kind="stable")  # `size` cells of each digit in turn
    digit = solutions.astype(np.intp) - 1
    colours = _salted((puzzles > 0).astype(np.uint64), 1)
    for _ in range(ROUNDS):
        grid = colours.reshape(count, size, size)
        boxed = grid.reshape(count, size // height, height, size // width, width)
        rows, columns = _mix(grid.sum(2)), _mix(grid.sum(1))
        # with the colour of its band, because the lines of a band stay together
        rows = _with_band(rows, height)
        columns = _with_band(columns, width)
        boxes = _salted(boxed.sum((2, 4)), 2)
        digits = np.take_along_axis(colours, by_digit, 1).reshape(count, size, size).sum(2)
        colours = colours + (rows[:, :, None] + columns[:, None, :]).reshape(count, cells)
        colours += np.repeat(np.repeat(boxes, height, 1), width, 2).reshape(count, cells)
        colours = _mix(colours + np.take_along_axis(_salted(digits, 3), digit, 1))
    return colours, np.concatenate([rows, columns], axis=1)


def _with_band(lines: np.ndarray, width: int) -> np.ndarray:
    """New colours of lines [N, size], each hashed together with the colour of its band of `width`
    lines."""
    bands = _mix(lines.reshape(len(lines), -1, width).sum(2))
    return _salted(lines + np.repeat(bands, width, axis=1), 4)


# --------------------------------------------------------------------------------------------------
# Canonical form
# --------------------------------------------------------------------------------------------------
def canonical_form(puzzle: np.ndarray, solution: np.ndarray, size: int) -> bytes:
    """The same bytes for all symmetric copies of a puzzle, and other bytes for any other puzzle.

    A symmetry is determined by the line that becomes the first row and by the order of the columns,
    because the rest is fixed: digits are relabelled so that the first row of the solution reads 1,
    2, 3, ..., and the other rows are sorted by their first digit. The form is the smallest image
    under these symmetries. Only lines with the smallest colour are tried as the first row.
    """
    height, width = sudoku.box_shape(size)
    _, lines = _refine(puzzle[None], solution[None])
    lines = lines[0, : 2 * size if height == width else size]
    # one number a cell: the digit of the solution, plus `size` if it is given
    grid = (solution + np.uint8(size) * (puzzle > 0).astype(np.uint8)).reshape(size, size)
    images = []
    for line in np.flatnonzero(lines == lines.min()):
        transposed, first = divmod(int(line), size)
        images += _images(grid.T if transposed else grid, first, size, height, width)
    return min(images)


def _images(grid, first, size, height, width):
    """The images [S bytes each] of `grid` with row `first` on top, one for each column order."""
    orders = sudoku.line_permutations(size // width, width)
    count = len(orders)
    moved = grid[:, orders].swapaxes(0, 1).astype(np.intp)  # [orders, rows, columns]
    given = moved > size
    digits = moved - size * given
    labels = np.zeros((count, size + 1), np.intp)
    np.put_along_axis(labels, digits[:, first], np.arange(1, size + 1)[None], 1)
    digits = np.take_along_axis(labels, digits.reshape(count, -1), 1).reshape(count, size, size)
    # sort rows within their band, and bands by their smallest first digit. Row `first` comes first,
    # because its first digit is 1
    bands = digits[:, :, 0].reshape(count, -1, height).min(2)
    order = np.argsort(np.repeat(bands, height, axis=1) * (size + 1) + digits[:, :, 0], axis=1)
    image = np.take_along_axis(digits + size * given, order[:, :, None], 1).astype(np.uint8)
    return [row.tobytes() for row in image.reshape(count, -1)]
