"""Sudoku rules, solver, puzzle generator and symmetries for sizes 4, 6 and 9.

This module needs only numpy and the standard library.

A grid is its cells in reading order: digits 1..size, 0 for an empty cell. The solver sees the
puzzle as exact cover. One Python integer holds every candidate, bit d * cells + c meaning "digit
d + 1 may stand in cell c". Each candidate belongs to four groups of `size` candidates, of which
exactly one is true: its cell, and its digit's row, column and box. The groups of one kind lie at
the same distances from each other, so a handful of shifts examine all of them at once; in pure
Python that is several times faster than visiting cells.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

BOX_SHAPES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size -> (rows, columns) of a box


Grid = np.ndarray | Sequence[int]  # [S] of 0..size: an array, a list or bytes


class Solved(NamedTuple):
    """What `solve` found."""

    solutions: list[bytes]  # at most `limit`; one byte for each cell, 1..size
    guesses: int  # the number of failed guesses


def box_shape(size: int) -> tuple[int, int]:
    """(rows, columns) of a box of a size x size grid. ValueError for an unsupported size."""
    if size not in BOX_SHAPES:
        raise ValueError(f"size {size!r} is not one of {sorted(BOX_SHAPES)}")
    return BOX_SHAPES[size]


def size_of(cells: int) -> int:
    """Side of a grid of `cells` cells. ValueError unless it is 16, 36 or 81."""
    for size in BOX_SHAPES:
        if size * size == cells:
            return size
    raise ValueError(f"{cells} cells; a grid has one of {[s * s for s in BOX_SHAPES]}")


def parse(text: str) -> np.ndarray:
    """A puzzle string as uint8 [S] of 0..size; '.' or '0' is an empty cell.

    Raises ValueError if the length or a character is wrong.
    """
    size = size_of(len(text))
    allowed = ".0123456789"[: size + 2]
    for position, char in enumerate(text, 1):
        if char not in allowed:
            raise ValueError(f"character {char!r} at position {position}; allowed are {allowed}")
    return np.array([0 if char == "." else int(char) for char in text], np.uint8)


def split_puzzles(text: str) -> list[tuple[int, str]]:
    """[(line number from 1, puzzle string)] of a text that holds puzzles.

    A puzzle is one line, or a grid of as many lines as it has columns. Spaces, empty lines, a
    byte-order mark and what follows # do not count. Nothing is checked here; `parse` does that.
    """
    lines = [
        (number, "".join(line.partition("#")[0].split()))
        for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1)
    ]
    lines = [(number, line) for number, line in lines if line]
    found, position = [], 0
    while position < len(lines):
        number, first = lines[position]
        rows = [line for _, line in lines[position : position + len(first)]]
        is_grid = len(first) in BOX_SHAPES and {len(row) for row in rows} == {len(first)}
        taken = len(first) if is_grid and len(rows) == len(first) else 1
        found.append((number, "".join(rows[:taken])))
        position += taken
    return found


def format_grid(grid: Iterable[int]) -> str:
    """Grid [S] of 0..size to a puzzle string with '.' for an empty cell."""
    return "".join("." if digit == 0 else str(int(digit)) for digit in grid)


def units(size: int) -> np.ndarray:
    """Cell numbers of every row, column and box: int [3 * size, size]."""
    rows, columns = box_shape(size)
    cell = np.arange(size * size).reshape(size, size)
    boxes = cell.reshape(size // rows, rows, size // columns, columns).swapaxes(1, 2)
    return np.concatenate([cell, cell.T, boxes.reshape(size, size)])


def is_solved(grids: np.ndarray) -> np.ndarray:
    """bool [N]: which of the uint8 [N, S] grids hold every digit 1..size once in each row, column
    and box."""
    grids = np.asarray(grids)
    size = size_of(grids.shape[1])
    legal: np.ndarray = np.all((grids >= 1) & (grids <= size), axis=1)
    seen = np.left_shift(1, np.where(legal[:, None], grids, 1).astype(np.int32))
    for unit in units(size):
        # size values whose bitwise OR has all size bits are all different.
        legal &= np.bitwise_or.reduce(seen[:, unit], axis=1) == (2 << size) - 2
    return legal


def has_conflict(puzzles: np.ndarray) -> np.ndarray:
    """bool [N]: which of the uint8 [N, S] puzzles hold a digit twice in a row, column or box."""
    puzzles = np.asarray(puzzles)
    size = size_of(puzzles.shape[1])
    conflict = np.zeros(len(puzzles), bool)
    bits = np.where(puzzles > 0, np.left_shift(1, puzzles.astype(np.int32)), 0)
    for unit in units(size):
        # Distinct bits add up to their OR; a repeated one carries.
        conflict |= bits[:, unit].sum(1) != np.bitwise_or.reduce(bits[:, unit], axis=1)
    return conflict


class _Tables(NamedTuple):
    cells: int
    full: int  # every candidate
    # (shifts, mask, spread) for cells, rows, columns and boxes. mask: the first candidate of each
    # group; shifts: from it to each candidate of the group; spread: the sum of 2^shift.
    kinds: list[tuple[list[int], int, int]]
    keep: list[int]  # for each candidate: all candidates but those that it rules out


@cache
def _tables(size: int) -> _Tables:
    rows, columns = box_shape(size)
    cells = size * size
    full = (1 << size * cells) - 1

    def kind(shifts: list[int], first: Iterable[int]) -> tuple[list[int], int, int]:
        mask = sum(1 << f for f in first)
        return shifts, mask, sum(1 << s for s in shifts)

    boards = [d * cells for d in range(size)]
    corners = [r * size + c for r in range(0, size, rows) for c in range(0, size, columns)]
    kinds = [
        kind(boards, range(cells)),
        kind(list(range(size)), [b + r * size for b in boards for r in range(size)]),
        kind([r * size for r in range(size)], [b + c for b in boards for c in range(size)]),
        kind(
            [r * size + c for r in range(rows) for c in range(columns)],
            [b + c for b in boards for c in corners],
        ),
    ]
    keep = []
    for candidate in range(size * cells):
        group = 0
        for shifts, mask, spread in kinds:
            for shift in shifts:
                first = candidate - shift
                if first >= 0 and mask >> first & 1:
                    group |= spread << first
        keep.append(full & ~group | 1 << candidate)
    return _Tables(cells, full, kinds, keep)


def _propagate(tables: _Tables, x: int, done: int) -> tuple[int, int]:
    """Find naked and hidden singles until nothing changes.

    x: the candidates left; done: those that are known to be true and were carried through. Returns
    (x, done), or (0, 0) on a contradiction. The result does not depend on the order of the steps.
    """
    keep = tables.keep
    while True:
        singles = 0
        for shifts, mask, spread in tables.kinds:
            once = twice = 0
            for shift in shifts:
                part = x >> shift & mask
                twice |= once & part
                once |= part
            if once != mask:
                return 0, 0
            # The product copies the first bit of each group with one candidate to the whole group;
            # nothing carries.
            singles |= x & (once ^ twice) * spread
        new = singles & ~done
        if not new:
            return x, done
        done |= singles
        while new:
            low = new & -new
            x &= keep[low.bit_length() - 1]
            new ^= low


def _choices(tables: _Tables, x: int) -> list[int]:
    """Candidate numbers of the first cell among those with the fewest (but two or more)."""
    shifts, mask, _ = tables.kinds[0]
    at_least = [mask] + [0] * (len(shifts) + 1)
    for shift in shifts:
        part = x >> shift & mask
        for k in range(len(shifts), 0, -1):
            at_least[k] |= at_least[k - 1] & part
    for k in range(2, len(shifts) + 1):
        cells = at_least[k] & ~at_least[k + 1]
        if cells:
            cell = (cells & -cells).bit_length() - 1
            return [cell + shift for shift in shifts if x >> cell + shift & 1]
    raise AssertionError("no open cell")


def _search(
    tables: _Tables, x: int, done: int, limit: int, order: Callable[[list], None] | None = None
) -> Solved:
    """Depth-first search from candidates x; see `solve`. `order(list)` may reorder the choices."""
    solutions: list[bytes] = []
    failed = 0

    def visit(x: int, done: int) -> bool:
        """Returns whether propagation alone refuted these candidates."""
        nonlocal failed
        x, done = _propagate(tables, x, done)
        if not x:
            return True
        if x == done:
            solutions.append(_digits(tables, x))
            return False
        choices = _choices(tables, x)
        if order:
            order(choices)
        for choice in choices:
            found = len(solutions)
            at_once = visit(x & tables.keep[choice], done | 1 << choice)
            if len(solutions) >= limit:
                break
            if len(solutions) == found and not (solutions and at_once):
                failed += 1
        return False

    visit(x, done)
    return Solved(solutions, failed)


def _digits(tables: _Tables, x: int) -> bytes:
    grid = bytearray(tables.cells)
    while x:
        low = x & -x
        digit, cell = divmod(low.bit_length() - 1, tables.cells)
        grid[cell] = digit + 1
        x ^= low
    return bytes(grid)


def _start(tables: _Tables, puzzle: Grid) -> tuple[int, int]:
    """Candidates left by the givens alone, and the givens as candidates."""
    x, done = tables.full, 0
    for cell, digit in enumerate(puzzle):
        if digit:
            candidate = (int(digit) - 1) * tables.cells + cell
            x &= tables.keep[candidate]
            done |= 1 << candidate
    return x, done


def solve(puzzle: Grid, limit: int = 2) -> Solved:
    """Solutions of a puzzle ([S] of 0..size; array, list or bytes), at most `limit`, as `Solved`.

    Singles are propagated. Then the candidates of the first cell with the fewest are tried in
    ascending order. `guesses` is the difficulty rating: the number of tried candidates that led to
    no solution. When a solution is known, the search continues, to prove it unique. From then on a
    candidate counts only if propagation alone does not refute it. A puzzle that singles solve has
    rating 0. Contradictory givens have no solution.

    Raises ValueError if the number of cells is wrong or a digit is outside 0..size.
    """
    size = size_of(len(puzzle))
    if not all(0 <= digit <= size for digit in puzzle):
        raise ValueError(f"a cell is outside 0..{size}")
    tables = _tables(size)
    return _search(tables, *_start(tables, puzzle), limit)


def random_solution(size: int, rng: random.Random) -> bytes:
    """A completed grid as bytes: a shuffled first row, completed with random guesses.

    Every grid can come out, though not all with the same probability.
    """
    tables = _tables(size)
    row = list(range(1, size + 1))
    rng.shuffle(row)
    x, done = _start(tables, row)
    return _search(tables, x, done, 1, rng.shuffle).solutions[0]


def dig(solution: bytes, rng: random.Random, clues: int = 0) -> bytes:
    """Empty cells of a completed grid in random order, as long as the solution stays unique.

    It ends when `clues` are left, or when no clue can be removed. Returns the puzzle as bytes. One
    pass is enough: a clue that was needed once stays needed when fewer others are left.
    """
    tables = _tables(size_of(len(solution)))
    puzzle, left = bytearray(solution), len(solution)
    cells = list(range(len(solution)))
    rng.shuffle(cells)
    for cell in cells:
        if left <= clues:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        x, done = _start(tables, puzzle)
        # Unique stays unique if and only if no solution has another digit here.
        x &= ~(1 << (digit - 1) * tables.cells + cell)
        if _search(tables, x, done, 1).solutions:
            puzzle[cell] = digit
        else:
            left -= 1
    return bytes(puzzle)


MIN_CLUES = {4: 4, 6: 9, 9: 22}  # with fewer clues `generate` almost never succeeds
_MAX_DIGS = 5000


def generate(
    size: int, rng: random.Random, clues: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A random puzzle with exactly one solution and that solution, two uint8 [S] arrays.

    clues: the number of givens, from MIN_CLUES[size] to size^2. Grids are tried until one allows so
    few, which takes seconds near MIN_CLUES. None removes clues until none can be removed. The same
    state of `rng` gives the same puzzle. Raises ValueError if clues is out of range, and
    RuntimeError if none of _MAX_DIGS grids allows so few.
    """
    box_shape(size)
    if clues is not None and not MIN_CLUES[size] <= clues <= size * size:
        raise ValueError(f"clues {clues} is outside {MIN_CLUES[size]}..{size * size}")
    for _ in range(_MAX_DIGS):
        solution = random_solution(size, rng)
        puzzle = dig(solution, rng, clues or 0)
        if clues is None or len(puzzle) - puzzle.count(0) == clues:
            return np.frombuffer(puzzle, np.uint8), np.frombuffer(solution, np.uint8)
    raise RuntimeError(f"no {size}x{size} puzzle with {clues} clues in {_MAX_DIGS} grids")


# --------------------------------------------------------------------------------------------------
# Symmetries
# --------------------------------------------------------------------------------------------------
def _all_permutations(n: int) -> np.ndarray:
    """Every permutation of 0..n-1, [n!, n] int64, built by insertion: no Python loop over them."""
    table: np.ndarray = np.zeros((1, 1), np.int64)
    for k in range(1, n):
        table = np.concatenate([np.insert(table, place, k, axis=1) for place in range(k + 1)])
    return table


@cache
def line_permutations(blocks: int, width: int) -> np.ndarray:
    """Every order of the rows (or columns) that keeps bands (or stacks) together.

    blocks: the number of bands; width: the rows in each. Returns [blocks! * (width!)^blocks, n]
    int64 with n = blocks * width.
    """
    inner = _all_permutations(width)
    return np.array(
        [
            np.concatenate([inner[k] + band * width for band, k in zip(order, choice)])
            for order in itertools.permutations(range(blocks))
            for choice in itertools.product(range(len(inner)), repeat=blocks)
        ]
    )


def paired(puzzles: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """Two uint8 [N, S] arrays as one of [N, S] uint16, for `SudokuAugmenter`.

    Permuting them together takes half the time.
    """
    return np.stack((puzzles, solutions), axis=-1).view(np.uint16)[..., 0]


def fixed_draws(seed: int, puzzles: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The draws of SudokuAugmenter for fixed symmetries of puzzles, [B] uint64.

    seed: below 2^64. puzzles, copies: [B] integers, the number of the puzzle in its dataset and the
    number of its symmetry. A draw depends on these three alone:

        draw = splitmix64(splitmix64(seed, puzzle), copy)

    where splitmix64(s, k) is output k, from 0, of the generator SplitMix64 (Steele, Lea and Flood
    2014) with seed s. Any output costs the same, and a whole batch is one numpy expression. No
    generator of numpy offers both.
    """
    draws = np.array([seed], np.uint64)
    for index in (puzzles, copies):
        draws = _splitmix64(draws, index.astype(np.uint64))
    return draws


def _splitmix64(seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Output `index`, from 0, of SplitMix64 with each seed; all are uint64, modulo 2^64."""
    x = seeds + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SudokuAugmenter:
    """Symmetries of Sudoku, the same map for a puzzle and its solution.

    Digits are relabelled; bands, stacks and the lines within them permuted; and the grid transposed
    if its boxes are square. first_digit: the code of digit 1, which is 1 in this module's grids and
    2 in a dataset. Codes below it (empty cell, padding) stay as they are.
    """

    def __init__(self, size: int, first_digit: int = 1):
        box_height, box_width = box_shape(size)
        self.size, self.square = size, box_height == box_width
        self.rows = line_permutations(size // box_height, box_height)
        self.columns = line_permutations(size // box_width, box_width)
        digits = _all_permutations(size).astype(np.uint8) + np.uint8(first_digit)
        kept = np.tile(np.arange(first_digit, dtype=np.uint8), (len(digits), 1))
        self.digits = np.concatenate([kept, digits], axis=1)  # [size!, codes]

    def __call__(self, pairs: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pairs: [B, S] uint16, see `paired`; draws: [B] uint64, uniform.

        Returns the images of puzzles and solutions, each [B, S] uint8. One draw decides the whole
        map: it is read as a number in mixed radix. Since 2^64 is no multiple of the number of
        maps, their probabilities differ by up to 1e-6 of their value.
        """
        batch, size = len(pairs), self.size
        draws, row = np.divmod(draws, np.uint64(len(self.rows)))
        draws, column = np.divmod(draws, np.uint64(len(self.columns)))
        draws, digit = np.divmod(draws, np.uint64(len(self.digits)))
        transposed = (draws & np.uint64(1)).astype(np.int64) * self.square
        row_stride = np.where(transposed, 1, size)[:, None]
        column_stride = np.where(transposed, size, 1)[:, None]
        first_cell = (np.arange(batch) * size * size)[:, None]
        rows = self.rows[row.astype(np.int64)] * row_stride + first_cell
        columns = self.columns[column.astype(np.int64)] * column_stride
        cells = (rows[:, :, None] + columns[:, None, :]).reshape(batch, -1)
        # [B, 2S], puzzle and solution in turn
        moved = np.take(pairs.reshape(-1), cells).view(np.uint8)
        codes = self.digits.shape[1]
        maps = self.digits[digit.astype(np.int64)]
        relabelled = np.take(maps.reshape(-1), moved + (np.arange(batch) * codes)[:, None])
        return np.ascontiguousarray(relabelled[:, 0::2]), np.ascontiguousarray(relabelled[:, 1::2])
