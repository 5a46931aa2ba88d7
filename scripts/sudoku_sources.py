"""Where Sudoku rows come from: generated puzzles, or CSV files whose every row is checked.

Both run over processes, and their result does not depend on how many there are.
"""

import collections
import csv
import itertools
import multiprocessing
import os
import random
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import sudoku
from utils import UserError

MAX_REJECTED = 20_000  # generated puzzles in a row of which none was wanted, before giving up


class Split(NamedTuple):
    puzzles: np.ndarray  # uint8 [N, S] of 0..size
    solutions: np.ndarray  # uint8 [N, S] of 1..size
    ratings: np.ndarray  # int32 [N]

    def take(self, index):
        return Split(*(array[index] for array in self))


def rows_as_bytes(array):
    return [row.tobytes() for row in np.ascontiguousarray(array)]


# ---------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------
def start_worker():
    """A worker neither answers Ctrl-C (the parent does) nor outlives a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def ordered_map(function, items, num_workers):
    """Like map, over processes: results in the order of `items`, which may be endless."""
    if num_workers == 1:
        yield from map(function, items)
        return
    items, pending = iter(items), collections.deque()
    # spawn: forking a process that has threads (tqdm, numpy) can deadlock.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        while True:
            pending.extend(
                pool.submit(function, item)
                for item in itertools.islice(items, 3 * num_workers - len(pending))
            )
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most often for want of memory: use fewer --num_workers"
        )
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------
# Generated puzzles
# ---------------------------------------------------------------------------------------------------------
def generate_chunk(task):
    """[(puzzle, solution, rating)] of the candidates first..first + count. Each has its own random
    stream, so the result does not depend on how candidates are dealt to processes."""
    size, clues, seed, first, count = task
    rows = []
    for index in range(first, first + count):
        rng = random.Random(f"{seed}/{index}")
        puzzle, solution = sudoku.generate(size, rng, rng.randint(*clues) if clues else None)
        solved = sudoku.solve(puzzle)
        assert solved.solutions == [solution.tobytes()]
        rows.append((puzzle, solution, solved.guesses))
    return rows


def generate_splits(args):
    """Train, test and val from one stream of candidates. A solution grid belongs to the split that
    saw it first, so no split shares a puzzle or a solution with another."""
    quotas = {"train": args.num_train - args.val_size, "test": args.num_test, "val": args.val_size}
    quotas = {name: quota for name, quota in quotas.items() if quota}
    rows = {name: [] for name in quotas}
    owner, seen, rejected, total = {}, set(), 0, sum(quotas.values())
    clues = args.clues if args.clues != "min" else None
    chunk = 20
    tasks = ((args.size, clues, args.seed, first, chunk) for first in itertools.count(0, chunk))
    results = ordered_map(generate_chunk, tasks, args.num_workers)
    progress = tqdm(total=total, desc="generate", unit="puzzle", disable=None)
    for puzzle, solution, rating in itertools.chain.from_iterable(results):
        if rejected == MAX_REJECTED:
            raise UserError(
                "generated "
                + ", ".join(f"{len(rows[n])} of {quotas[n]} {n}" for n in quotas)
                + f" puzzles, then {MAX_REJECTED:,} in a row that were duplicates, below --min_guesses, or of a "
                "solution grid of another split: lower the numbers of puzzles or --min_guesses, or widen --clues"
            )
        rejected += 1
        key, grid = puzzle.tobytes(), solution.tobytes()
        if rating < (args.min_guesses or 0) or key in seen:
            continue
        # A new grid goes to the split that is filled least; the few grids of size 4 are so dealt in proportion.
        name = owner.setdefault(grid, min(quotas, key=lambda n: len(rows[n]) / quotas[n]))
        if len(rows[name]) < quotas[name]:
            rows[name].append((puzzle, solution, rating))
            seen.add(key)
            progress.update()
            rejected = 0
            if len(seen) == total:
                break
    results.close()
    progress.close()
    return {
        name: Split(
            np.stack([r[0] for r in split]),
            np.stack([r[1] for r in split]),
            np.array([r[2] for r in split], np.int32),
        )
        for name, split in rows.items()
    }


# ---------------------------------------------------------------------------------------------------------
# CSV files
# ---------------------------------------------------------------------------------------------------------
class BadRows:
    """Bad rows of one file, by line: ends the build unless they are to be skipped."""

    def __init__(self, path, skip):
        self.path, self.skip, self.lines = path, skip, {}

    def add(self, line, reason):
        self.lines[int(line)] = reason

    def report(self):
        if not self.lines:
            return
        shown = [f"  {self.path}:{line}: {self.lines[line]}" for line in sorted(self.lines)[:10]]
        if len(self.lines) > len(shown):
            shown.append(f"  and {len(self.lines) - len(shown)} more")
        listing = f"{len(self.lines)} bad row(s) in {self.path}\n" + "\n".join(shown)
        if not self.skip:
            raise UserError(listing + "\nmend the file, or leave these rows out with --skip_bad")
        print(f"left out: {listing}")


def read_csv(path, size, bad):
    """All well-formed rows of a CSV as (Split, line numbers int64 [N]); the others go to `bad`."""
    cells = size * size
    blocks = []
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [name for name in ("question", "answer", "rating") if name not in header]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)} in the header {header}; "
                    "the columns are source,question,answer,rating"
                )
            columns = [header.index(name) for name in ("question", "answer", "rating")]
            numbered = ((reader.line_num, fields) for fields in reader)
            progress = tqdm(desc=f"read {Path(path).name}", unit="row", disable=None)
            while batch := list(itertools.islice(numbered, 50_000)):
                rows = []
                for line, fields in batch:
                    if len(fields) != len(header):
                        bad.add(line, f"{len(fields)} columns instead of {len(header)}")
                        continue
                    question, answer, rating = (fields[c] for c in columns)
                    if len(question) != cells:
                        bad.add(line, f"question has {len(question)} characters instead of {cells}")
                    elif len(answer) != cells:
                        bad.add(line, f"answer has {len(answer)} characters instead of {cells}")
                    elif not (rating.isascii() and rating.isdigit() and len(rating) < 10):
                        bad.add(line, f"rating {rating!r} is not a whole number of 0 or more")
                    else:
                        rows.append((line, question, answer, int(rating)))
                if rows:
                    blocks.append(check_rows(rows, size, bad))
                progress.update(len(batch))
            progress.close()
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a CSV file ({error})")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    if not blocks:
        bad.report()
        raise UserError(f"{path} holds no puzzle of size {size}")
    *arrays, lines = (np.concatenate(parts) for parts in zip(*blocks))
    return Split(*arrays), lines


def check_rows(rows, size, bad):
    """Arrays (puzzles, solutions, ratings, lines) of the rows that pass every check but uniqueness."""
    digit_of = np.full(256, 255, np.uint8)
    digit_of[list(b"0123456789"[: size + 1])] = range(size + 1)
    digit_of[ord(".")] = 0
    lines, questions, answers, ratings = zip(*rows)
    lines, ratings = np.array(lines, np.int64), np.array(ratings, np.int32)
    # "replace" keeps one byte per character, so the rows stay aligned.
    puzzles, solutions = (
        digit_of[np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8)].reshape(
            len(rows), -1
        )
        for texts in (questions, answers)
    )
    good = np.ones(len(rows), bool)

    def refuse(which, reason):
        for row in np.flatnonzero(which & good):
            bad.add(lines[row], reason)
        good[which] = False

    refuse((puzzles > size).any(1), f"question has a character other than '.' and 0..{size}")
    refuse(
        ((solutions < 1) | (solutions > size)).any(1),
        f"answer has a character other than 1..{size}",
    )
    good_puzzles = np.where(good[:, None], puzzles, 0)
    refuse(
        sudoku.has_conflict(good_puzzles), "the givens hold a digit twice in a row, column or box"
    )
    refuse(~sudoku.is_solved(solutions), "the answer holds a digit twice in a row, column or box")
    refuse(((puzzles > 0) & (puzzles != solutions)).any(1), "the answer does not keep the givens")
    return puzzles[good], solutions[good], ratings[good], lines[good]


def unique_chunk(puzzles):
    return [sudoku.is_unique(puzzle) for puzzle in puzzles]


def take_unique(split, lines, order, count, bad, args, name):
    """The first `count` row numbers in `order` whose puzzle has one solution; the others go to `bad`."""
    if args.no_check_unique:
        return order[:count]
    chosen, position = [], 0
    with tqdm(
        total=min(count, len(order)), desc=f"solve {name}", unit="puzzle", disable=None
    ) as progress:
        while len(chosen) < count and position < len(order):
            batch = order[position : position + count - len(chosen)]
            position += len(batch)
            # A short batch is not worth starting processes for.
            workers = args.num_workers if len(batch) > 500 else 1
            chunks = (split.puzzles[batch[i : i + 100]] for i in range(0, len(batch), 100))
            unique = []
            for verdicts in ordered_map(unique_chunk, chunks, workers):
                unique.extend(verdicts)
                progress.update(len(verdicts))
            for row, good in zip(batch, unique):
                if good:
                    chosen.append(row)
                else:
                    bad.add(lines[row], "the puzzle has more than one solution")
    return np.array(chosen, np.int64)


def csv_splits(args, paths):
    splits, read = {}, {}
    bad = {name: BadRows(paths[name], args.skip_bad) for name in paths}
    for name, path in paths.items():
        split, lines = read_csv(path, args.size, bad[name])
        print(f"{path}: {len(lines)} well-formed rows")
        if args.min_difficulty is not None:
            kept = split.ratings >= args.min_difficulty
            split, lines = split.take(kept), lines[kept]
            print(f"{path}: {len(lines)} rows have a rating of {args.min_difficulty} or more")
        read[name] = split, lines
        # Cheap faults end the build before the costly check, unless they are skipped.
        if not args.skip_bad:
            bad[name].report()

    train, lines = read["train"]
    order = np.random.default_rng(args.seed).permutation(len(lines))
    if args.val_size:
        val = take_unique(train, lines, order, args.val_size, bad["train"], args, "val")
        held = set(rows_as_bytes(train.solutions[val]))
        shares = np.array([grid in held for grid in rows_as_bytes(train.solutions)], bool)
        # Nothing of a validation puzzle stays in train, not even another puzzle with its solution.
        order = order[~shares[order]]
        if shares.sum() > len(val):
            print(
                f"left out of train: {shares.sum() - len(val)} puzzles with a validation puzzle's solution"
            )
        if len(val) < args.val_size:
            raise UserError(
                f"--val_size {args.val_size}: train has only {len(val)} usable puzzles; lower it"
            )
        splits["val"] = train.take(np.sort(val))
    wanted = args.subsample_size or len(order)
    if args.subsample_size is None:
        order = np.sort(order)
    chosen = take_unique(train, lines, order, wanted, bad["train"], args, "train")
    bad["train"].report()
    if args.subsample_size and len(chosen) < wanted:
        raise UserError(
            f"--subsample_size {wanted}: only {len(chosen)} usable train puzzles are left; lower it"
        )
    splits["train"] = train.take(np.sort(chosen))

    test, lines = read["test"]
    kept = take_unique(test, lines, np.arange(len(lines)), len(lines), bad["test"], args, "test")
    bad["test"].report()
    splits["test"] = test.take(kept)
    for name, split in splits.items():
        if not len(split.ratings):
            raise UserError(
                f"no puzzle is left for {name}; lower --min_difficulty or --val_size, or check {paths}"
            )
    return splits
