"""Where the puzzles of a dataset come from: generated, from CSV files, or from a list of puzzles.

Every row of a file is checked. The work is spread over processes; the result does not depend on how
many there are.
"""

import argparse
import collections
import csv
import itertools
import multiprocessing
import random
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import sudoku
from utils import UserError, end_with_parent

MAX_REJECTED = 20_000  # unusable generated puzzles in a row, before giving up
COLUMNS = ("question", "answer", "rating")  # of a CSV file; others are not read
SMALL_BATCH = 500  # puzzles: so few are not worth starting processes for

GeneratedRow = tuple[np.ndarray, np.ndarray, int]  # puzzle [S], solution [S], rating


class Split(NamedTuple):
    """Puzzles, their solutions and how difficult they are, row by row."""

    puzzles: np.ndarray  # uint8 [N, S] of 0..size
    solutions: np.ndarray  # uint8 [N, S] of 1..size
    ratings: np.ndarray  # int32 [N]

    def take(self, index: np.ndarray) -> "Split":
        """The rows that `index` selects, as numpy indexing does."""
        return Split(*(array[index] for array in self))


def rows_as_bytes(array: np.ndarray) -> list[bytes]:
    """Each row of an array [N, S], as something that can be put into a set."""
    return [row.tobytes() for row in np.ascontiguousarray(array)]


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------
def start_worker() -> None:
    """Prepare a worker process: it ignores Ctrl-C, to which its parent responds, and it ends when
    its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def ordered_map(function: Callable, items: Iterable, num_workers: int) -> Generator:
    """Like map, but over processes: the results in the order of `items`, which may be endless.

    Raises UserError if a worker process dies.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    items = iter(items)
    pending: collections.deque = collections.deque()
    # spawn: forking a process that has threads (tqdm, numpy) can deadlock
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        while True:
            more = itertools.islice(items, 3 * num_workers - len(pending))
            pending.extend(pool.submit(function, item) for item in more)
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most often because memory ran out: use fewer --num_workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def solve_chunk(puzzles: np.ndarray) -> list[sudoku.Solved]:
    """What the solver finds for each puzzle, [N, S]; two solutions at most."""
    return [sudoku.solve(puzzle) for puzzle in puzzles]


def solve_all(puzzles: np.ndarray, num_workers: int) -> Iterator[sudoku.Solved]:
    """`solve_chunk` over processes, in the order of `puzzles` [N, S]."""
    workers = num_workers if len(puzzles) > SMALL_BATCH else 1
    chunks = (puzzles[start : start + 100] for start in range(0, len(puzzles), 100))
    return itertools.chain.from_iterable(ordered_map(solve_chunk, chunks, workers))


# --------------------------------------------------------------------------------------------------
# Splits that share nothing: generated puzzles, and lists of puzzles
# --------------------------------------------------------------------------------------------------
class Dealer:
    """Deals puzzles to the splits train, test and val until each has as many as it is to have.

    A solution grid belongs to the split that got it first, so no two splits share a puzzle or a
    solution. A puzzle comes once.
    """

    def __init__(self, args: argparse.Namespace):
        sizes = {"train": args.num_train - args.val_size, "test": args.num_test}
        self.wanted = sizes | ({"val": args.val_size} if args.val_size else {})
        self.total = sum(self.wanted.values())
        self.rows: dict[str, list[GeneratedRow]] = {name: [] for name in self.wanted}
        self.owner: dict[bytes, str] = {}  # of each solution grid: its split
        self.seen: set[bytes] = set()  # puzzles that were dealt

    @property
    def missing(self) -> int:
        """How many more puzzles are to be dealt."""
        return self.total - len(self.seen)

    def add(self, row: GeneratedRow) -> bool:
        """Give a puzzle to a split; returns whether one could take it."""
        puzzle, solution, _ = row
        key = puzzle.tobytes()
        if key in self.seen:
            return False
        # A new grid goes to the split that is filled least: so the few grids of size 4 are dealt
        # in proportion to the splits' sizes.
        least = min(self.wanted, key=lambda name: len(self.rows[name]) / self.wanted[name])
        name = self.owner.setdefault(solution.tobytes(), least)
        if len(self.rows[name]) == self.wanted[name]:
            return False
        self.rows[name].append(row)
        self.seen.add(key)
        return True

    def text(self) -> str:
        """For messages: how full the splits are."""
        return ", ".join(
            f"{len(self.rows[name])} of {wanted} {name}" for name, wanted in self.wanted.items()
        )

    def splits(self) -> dict[str, Split]:
        """The splits by name."""
        return {
            name: Split(
                np.stack([puzzle for puzzle, _, _ in rows]),
                np.stack([solution for _, solution, _ in rows]),
                np.array([rating for _, _, rating in rows], np.int32),
            )
            for name, rows in self.rows.items()
        }


def generate_chunk(task: tuple[int, list[int] | None, int, int, int]) -> list[GeneratedRow]:
    """The candidates number first..first + count - 1; task: (size, clues, seed, first, count).

    clues: (least, most), or None for as few as possible. Each candidate has its own random stream,
    so the result does not depend on which process makes it.
    """
    size, clues, seed, first, count = task
    rows = []
    for index in range(first, first + count):
        rng = random.Random(f"{seed}/{index}")
        puzzle, solution = sudoku.generate(size, rng, rng.randint(*clues) if clues else None)
        solved = sudoku.solve(puzzle)
        assert solved.solutions == [solution.tobytes()]
        rows.append((puzzle, solution, solved.guesses))
    return rows


def generate_splits(args: argparse.Namespace) -> dict[str, Split]:
    """Train, test and val from one stream of generated candidates.

    Raises UserError where the puzzles that were asked for cannot be found.
    """
    dealer, rejected = Dealer(args), 0
    clues = None if args.clues == "min" else args.clues
    chunk = 20
    tasks = ((args.size, clues, args.seed, first, chunk) for first in itertools.count(0, chunk))
    results = ordered_map(generate_chunk, tasks, args.num_workers)
    with tqdm(total=dealer.total, desc="generate", unit="puzzle", disable=None) as progress:
        for row in itertools.chain.from_iterable(results):
            if rejected == MAX_REJECTED:
                raise UserError(
                    f"generated {dealer.text()} puzzles, then {MAX_REJECTED:,} in a row that were "
                    "duplicates, below --min_guesses, or of a solution grid of another split: "
                    "lower the numbers of puzzles or --min_guesses, or widen --clues"
                )
            if row[2] < (args.min_guesses or 0) or not dealer.add(row):
                rejected += 1
                continue
            rejected = 0
            progress.update()
            if not dealer.missing:
                break
    results.close()
    return dealer.splits()


def list_splits(args: argparse.Namespace) -> dict[str, Split]:
    """Train, test and val from a list of puzzles, dealt in random order; ratings are the solver's.

    Raises UserError where the file cannot be read, holds a bad puzzle (unless --skip_bad), or has
    too few puzzles.
    """
    path, dealer = args.puzzles, Dealer(args)
    bad = BadRows(path, args.skip_bad)
    puzzles, lines = read_list(path, args.size, bad)
    print(f"{path}: {len(lines)} well-formed puzzles")
    if not args.skip_bad:
        bad.report()
    order, position = np.random.default_rng(args.seed).permutation(len(lines)), 0
    with tqdm(total=dealer.total, desc="solve", unit="puzzle", disable=None) as progress:
        while dealer.missing and position < len(order):
            batch = order[position : position + dealer.missing]
            position += len(batch)
            for row, solved in zip(batch, solve_all(puzzles[batch], args.num_workers)):
                if len(solved.solutions) != 1:
                    several = "more than one" if solved.solutions else "no"
                    bad.add(lines[row], f"the puzzle has {several} solution")
                    continue
                solution = np.frombuffer(solved.solutions[0], np.uint8)
                progress.update(dealer.add((puzzles[row], solution, solved.guesses)))
    bad.report()
    if dealer.missing:
        raise UserError(
            f"{path} has only {len(dealer.seen)} puzzles that could be dealt ({dealer.text()}): "
            "lower --num_train or --num_test"
        )
    return dealer.splits()


# --------------------------------------------------------------------------------------------------
# Files whose every row is checked
# --------------------------------------------------------------------------------------------------
class BadRows:
    """The bad rows of one file, by line. They end the build unless they are to be skipped."""

    def __init__(self, path: str | Path, skip: bool | None):
        self.path, self.skip = path, skip
        self.lines: dict[int, str] = {}

    def add(self, line: int, reason: str) -> None:
        """Note what is wrong with a line."""
        self.lines[int(line)] = reason

    def report(self) -> None:
        """Print the bad rows, or raise UserError if they are not to be skipped."""
        if not self.lines:
            return
        shown = [f"  {self.path}:{line}: {self.lines[line]}" for line in sorted(self.lines)[:10]]
        if len(self.lines) > len(shown):
            shown.append(f"  and {len(self.lines) - len(shown)} more")
        listing = f"{len(self.lines)} bad row(s) in {self.path}\n" + "\n".join(shown)
        if not self.skip:
            raise UserError(listing + "\nmend the file, or leave these rows out with --skip_bad")
        print(f"left out: {listing}")


def read_list(path: str, size: int, bad: BadRows) -> tuple[np.ndarray, np.ndarray]:
    """The well-formed puzzles of a list, uint8 [N, S], and their line numbers, int64 [N].

    The others go to `bad`. For the format see `sudoku.split_puzzles`. Raises UserError where the
    file cannot be read or holds no puzzle of this size.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    puzzles, lines = [], []
    seen: dict[bytes, int] = {}
    for line, cells in sudoku.split_puzzles(text):
        try:
            puzzle = sudoku.parse(cells)
        except ValueError as error:
            bad.add(line, str(error))
            continue
        first = seen.setdefault(puzzle.tobytes(), line)
        if len(puzzle) != size * size:
            bad.add(line, f"the puzzle has {len(puzzle)} cells instead of {size * size} (--size)")
        elif first != line:
            bad.add(line, f"the same puzzle as in line {first}")
        else:
            puzzles.append(puzzle)
            lines.append(line)
    if not puzzles:
        bad.report()
        raise UserError(f"{path} holds no puzzle of size {size}")
    stacked, numbers = np.stack(puzzles), np.array(lines, np.int64)
    conflict = sudoku.has_conflict(stacked)
    for line in numbers[conflict]:
        bad.add(line, "the givens hold a digit twice in a row, column or box")
    return stacked[~conflict], numbers[~conflict]


def read_csv(path: str, size: int, bad: BadRows) -> tuple[Split, np.ndarray]:
    """All well-formed rows of a CSV file and their line numbers, int64 [N]; the others go to `bad`.

    Raises UserError where it cannot be read or holds no such row.
    """
    blocks = []
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [name for name in COLUMNS if name not in header]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)} in the header {header}; "
                    "the columns are source,question,answer,rating"
                )
            numbered = ((reader.line_num, fields) for fields in reader)
            with tqdm(desc=f"read {Path(path).name}", unit="row", disable=None) as progress:
                while batch := list(itertools.islice(numbered, 50_000)):
                    rows = well_formed(batch, header, size, bad)
                    if rows:
                        blocks.append(check_rows(rows, size, bad))
                    progress.update(len(batch))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a CSV file ({error})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not blocks:
        bad.report()
        raise UserError(f"{path} holds no puzzle of size {size}")
    puzzles, solutions, ratings, lines = (np.concatenate(parts) for parts in zip(*blocks))
    return Split(puzzles, solutions, ratings), lines


Row = tuple[int, str, str, int]  # line, question, answer, rating


def well_formed(
    batch: list[tuple[int, list[str]]], header: list[str], size: int, bad: BadRows
) -> list[Row]:
    """The rows of `batch`, (line, fields), that have the right lengths and a number as rating."""
    cells, rows = size * size, []
    columns = [header.index(name) for name in COLUMNS]
    for line, fields in batch:
        if len(fields) != len(header):
            bad.add(line, f"{len(fields)} columns instead of {len(header)}")
            continue
        question, answer, rating = (fields[column] for column in columns)
        if len(question) != cells:
            bad.add(line, f"question has {len(question)} characters instead of {cells}")
        elif len(answer) != cells:
            bad.add(line, f"answer has {len(answer)} characters instead of {cells}")
        elif not (rating.isascii() and rating.isdigit() and len(rating) < 10):
            bad.add(line, f"rating {rating!r} is not a whole number of 0 or more")
        else:
            rows.append((line, question, answer, int(rating)))
    return rows


def check_rows(rows: list[Row], size: int, bad: BadRows) -> tuple[np.ndarray, ...]:
    """Arrays (puzzles, solutions, ratings, lines) of the rows that pass every check but that of a
    unique solution; the others go to `bad`."""
    digit_of = np.full(256, 255, np.uint8)
    digit_of[list(b"0123456789"[: size + 1])] = range(size + 1)
    digit_of[ord(".")] = 0
    lines, questions, answers, ratings = zip(*rows)

    def digits(texts: Iterable[str]) -> np.ndarray:
        # "replace" keeps one byte for each character, so the rows stay aligned
        codes = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)
        return digit_of[codes].reshape(len(rows), -1)

    puzzles, solutions = digits(questions), digits(answers)
    good = np.ones(len(rows), bool)

    def refuse(which: np.ndarray | np.bool, reason: str) -> None:
        for row in np.flatnonzero(which & good):
            bad.add(lines[row], reason)
        good[which] = False

    refuse((puzzles > size).any(1), f"question has a character other than '.' and 0..{size}")
    illegal = (solutions < 1) | (solutions > size)
    refuse(illegal.any(1), f"answer has a character other than 1..{size}")
    good_puzzles = np.where(good[:, None], puzzles, 0)
    conflict = sudoku.has_conflict(good_puzzles)
    refuse(conflict, "the givens hold a digit twice in a row, column or box")
    refuse(~sudoku.is_solved(solutions), "the answer holds a digit twice in a row, column or box")
    refuse(((puzzles > 0) & (puzzles != solutions)).any(1), "the answer does not keep the givens")
    arrays = puzzles, solutions, np.array(ratings, np.int32), np.array(lines, np.int64)
    return tuple(array[good] for array in arrays)


def take_unique(
    split: Split,
    lines: np.ndarray,
    order: np.ndarray,
    count: int,
    bad: BadRows,
    args: argparse.Namespace,
    name: str,
) -> np.ndarray:
    """The first `count` row numbers in `order` whose puzzle has one solution; the others go to
    `bad`. name: of the split, for the progress bar."""
    if args.no_check_unique:
        return order[:count]
    chosen: list[int] = []
    position, total = 0, min(count, len(order))
    with tqdm(total=total, desc=f"solve {name}", unit="puzzle", disable=None) as progress:
        while len(chosen) < count and position < len(order):
            batch = order[position : position + count - len(chosen)]
            position += len(batch)
            for row, solved in zip(batch, solve_all(split.puzzles[batch], args.num_workers)):
                if len(solved.solutions) == 1:
                    chosen.append(row)
                else:
                    bad.add(lines[row], "the puzzle has more than one solution")
                progress.update()
    return np.array(chosen, np.int64)


def csv_splits(
    args: argparse.Namespace, paths: dict[str, str]
) -> tuple[dict[str, Split], np.ndarray]:
    """The splits train and test of two CSV files, and val, taken from train; and the place of each
    train puzzle in a random order, [train puzzles]. Train has the first max(--subsample_size).

    Raises UserError for a bad row (unless --skip_bad), and where too few rows are left.
    """
    bad = {name: BadRows(path, args.skip_bad) for name, path in paths.items()}
    train, train_lines = read_wanted(paths["train"], bad["train"], args)
    test, test_lines = read_wanted(paths["test"], bad["test"], args)
    order = np.random.default_rng(args.seed).permutation(len(train_lines))
    splits: dict[str, Split] = {}
    if args.val_size:
        val = take_unique(train, train_lines, order, args.val_size, bad["train"], args, "val")
        order = without_solutions_of(train, val, order)
        if len(val) < args.val_size:
            raise UserError(
                f"--val_size {args.val_size}: train has only {len(val)} usable puzzles; lower it"
            )
        splits["val"] = train.take(np.sort(val))
    wanted = max(args.subsample_size or [len(order)])
    if args.subsample_size is None:
        order = np.sort(order)
    chosen = take_unique(train, train_lines, order, wanted, bad["train"], args, "train")
    bad["train"].report()
    if args.subsample_size and len(chosen) < wanted:
        raise UserError(
            f"--subsample_size {wanted}: only {len(chosen)} usable train puzzles are left; lower it"
        )
    places = np.argsort(chosen)
    splits["train"] = train.take(chosen[places])
    every = np.arange(len(test_lines))
    kept = take_unique(test, test_lines, every, len(every), bad["test"], args, "test")
    bad["test"].report()
    splits["test"] = test.take(kept)
    for name, split in splits.items():
        if not len(split.ratings):
            raise UserError(
                f"no puzzle is left for {name}: lower --min_difficulty or --val_size, or check "
                f"{paths}"
            )
    return splits, places


def read_wanted(path: str, bad: BadRows, args: argparse.Namespace) -> tuple[Split, np.ndarray]:
    """`read_csv`, and of its rows those of --min_difficulty."""
    split, lines = read_csv(path, args.size, bad)
    print(f"{path}: {len(lines)} well-formed rows")
    if args.min_difficulty is not None:
        kept = split.ratings >= args.min_difficulty
        split, lines = split.take(kept), lines[kept]
        print(f"{path}: {len(lines)} rows have a rating of {args.min_difficulty} or more")
    # cheap faults end the build before the costly check, unless they are skipped
    if not args.skip_bad:
        bad.report()
    return split, lines


def without_solutions_of(train: Split, val: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`order` without the rows `val` and without other puzzles that have one of their solutions:
    nothing of a validation puzzle stays in train."""
    held_out = set(rows_as_bytes(train.solutions[val]))
    shares = np.array([grid in held_out for grid in rows_as_bytes(train.solutions)], bool)
    if shares.sum() > len(val):
        print(
            f"left out of train: {shares.sum() - len(val)} puzzles with a validation puzzle's "
            "solution"
        )
    return order[~shares[order]]
