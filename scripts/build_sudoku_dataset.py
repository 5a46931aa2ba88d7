#!/usr/bin/env python3
"""Build a Sudoku dataset: Sudoku-Extreme, your own files, or freshly generated puzzles.

    # Sudoku-Extreme, 1,000 training puzzles, the whole test set (downloads about 0.8 GB)
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku-extreme-1k \\
        --subsample_size 1000
    # 1,000, 5,000 and 10,000 of them, each set a part of the next
    python scripts/build_sudoku_dataset.py --subsample_size 1000 5000 10000 \\
        --output_dir data/sudoku-extreme-1k data/sudoku-extreme-5k data/sudoku-extreme-10k
    # the same from files that you have; columns source,question,answer,rating
    python scripts/build_sudoku_dataset.py --output_dir data/mine \\
        --train_csv train.csv --test_csv test.csv
    # a list of puzzles without solutions, here the 49,158 with 17 clues (see below)
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku_17_clue \\
        --puzzles puzzles2_17_clue --num_train 10000 --num_test 2000
    # no download: 4x4 puzzles in a few seconds; 9x9 puzzles of 36 to 50 clues in about ten
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku4 \\
        --generate --size 4 --num_train 1000 --num_test 200
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku9 \\
        --generate --num_train 8000 --num_test 1000 --clues 36 50

Every row is checked: lengths, characters, a legal solution, givens that agree with it, exactly one
solution. That last check costs 0.3 ms (17 clues) to 6 ms (the hardest known) per puzzle and core,
on two cores some 1 to 20 minutes for Sudoku-Extreme's 422,786 test puzzles; --no_check_unique
leaves it out.

A test or validation puzzle that is also a training puzzle is an error, and so is a symmetric copy
of one (digits relabelled; bands, stacks, rows and columns permuted; transposed): the trainer's
augmentation would have shown it to the model. --allow_test_in_train builds such a dataset all the
same. The check costs about 20 microseconds per puzzle of either split (8 s for 1,000 training and
422,786 test puzzles on one core) and a few milliseconds per copy. Generated puzzles of sizes 4 and
6 are only counted, since there are 2 and 49 different grids of these sizes up to symmetry: they
serve to try things out, not to measure.

Lists of puzzles with 17 clues, the fewest that a Sudoku can have: Gordon Royle's 49,151
("sudoku17"; search for it on the Internet Archive), completed to 49,158 in the file
data/puzzles2_17_clue of https://github.com/t-dillon/tdoku/raw/master/data.zip (73 MB). Both have
one puzzle a line, . or 0 for an empty cell, as --puzzles reads it. No two of them are copies of
each other.

The result depends on the arguments only, not on the number of processes, and appears at
--output_dir all at once: an interrupted build leaves nothing there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import startup

startup.require("tqdm")
import argparse
import os
import time
from typing import Any

import numpy as np
from dataset_files import check_same, clean_up_after_dead, previous_build, write_dataset
from sudoku_copies import Copies, find_copies
from sudoku_sources import Split, csv_splits, generate_splits, list_splits, rows_as_bytes

import sudoku
from utils import UserError, run_cli, sha256_of

HUB_REPO = "sapientinc/sudoku-extreme"
HUB_PAGE = f"https://huggingface.co/datasets/{HUB_REPO}/tree/main"
# which flags go with which source of puzzles
COUNTS = ("num_train", "num_test")
GENERATE_ONLY = ("clues", "min_guesses")
CSV_ONLY = ("train_csv", "test_csv", "min_difficulty", "no_check_unique")
FILES_ONLY = ("skip_bad",)
# arguments that do not change the dataset; files count by their checksum
NOT_CONTENT = (
    "output_dir",
    "overwrite",
    "num_workers",
    "train_csv",
    "test_csv",
    "puzzles",
    "allow_test_in_train",
)


def hub_files() -> dict[str, str]:
    """Paths of Sudoku-Extreme's files in the hub's cache, downloaded if need be."""
    by_hand = (
        f"download train.csv and test.csv from {HUB_PAGE} and name them with --train_csv and "
        "--test_csv, or make puzzles with --generate"
    )
    try:
        from huggingface_hub import hf_hub_download, logging  # optional
    except ImportError:
        raise UserError(
            "to download Sudoku-Extreme the package huggingface_hub is needed: pip install "
            f"huggingface_hub; or {by_hand}"
        ) from None
    logging.set_verbosity_error()  # its retries would bury the one message below
    try:
        return {
            name: hf_hub_download(HUB_REPO, f"{name}.csv", repo_type="dataset")
            for name in ("train", "test")
        }
    except Exception as error:  # the hub raises anything from timeouts to its own HTTP errors
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot download {HUB_REPO} ({first_line}): {by_hand}") from None


# --------------------------------------------------------------------------------------------------
# What the splits have in common
# --------------------------------------------------------------------------------------------------
def report(splits: dict[str, Split]) -> dict[str, int]:
    """Print sizes, clues, ratings and what the splits have in common; returns the latter."""
    for name, split in splits.items():
        clues = (split.puzzles > 0).sum(1)
        quantiles = np.quantile(split.ratings, [0, 0.25, 0.5, 0.75, 0.9, 1]).astype(int)
        print(
            f"{name}: {len(clues)} puzzles, clues {clues.min()} to {clues.max()} "
            f"(mean {clues.mean():.1f}), rating quantiles 0/25/50/75/90/100%: "
            f"{' '.join(map(str, quantiles))}"
        )
    train = splits["train"]
    duplicates = len(train.puzzles) - len(set(rows_as_bytes(train.puzzles)))
    print(f"duplicate puzzles within train: {duplicates}")
    train_grids = set(rows_as_bytes(train.solutions))
    identical, copied, solved = {}, {}, {}
    for name, split in splits.items():
        if name == "train":
            continue
        copies = find_copies(train.puzzles, train.solutions, split.puzzles, split.solutions)
        grids = sum(grid in train_grids for grid in rows_as_bytes(split.solutions))
        identical[f"{name}_puzzles_in_train"] = copies.identical
        copied[f"{name}_copies_in_train"] = copies.symmetric
        solved[f"{name}_solutions_in_train"] = grids
        print(
            f"{name} puzzles also in train: {copies.identical}; symmetric copies of a train "
            f"puzzle: {copies.symmetric}; {name} puzzles whose solution is a train solution: "
            f"{grids}"
        )
        print_examples(name, copies)
    return {"train_duplicates": duplicates} | identical | solved | copied


def print_examples(name: str, copies: Copies) -> None:
    """Print some puzzles of the split `name` beside the train puzzles that they are copies of."""
    for held_out, train in copies.examples:
        print(f"  {name} {sudoku.format_grid(held_out)} is train {sudoku.format_grid(train)}")


def check_overlap(overlap: dict[str, int], args: argparse.Namespace) -> None:
    """UserError if a held-out puzzle is in train, unless that is allowed."""
    if args.allow_test_in_train or (args.generate and args.size < 9):
        return
    for name in ("test", "val"):
        identical = overlap.get(f"{name}_puzzles_in_train", 0)
        symmetric = overlap.get(f"{name}_copies_in_train", 0)
        if identical or symmetric:
            raise UserError(
                f"{identical + symmetric} {name} puzzles are also in train ({identical} identical, "
                f"{symmetric} symmetric copies), so an accuracy on {name} would count what was "
                "trained on: take them out of one of the two, or allow it with "
                "--allow_test_in_train"
            )


def with_augmentations(split: Split, size: int, num_aug: int, seed: int) -> Split:
    """Each row followed by its `num_aug` images, those that data.augmentations draws from."""
    copies, augmenter = 1 + num_aug, sudoku.SudokuAugmenter(size)
    out = Split(*(np.repeat(array, copies, axis=0) for array in split))
    rows = np.flatnonzero(np.arange(len(out.ratings)) % copies)
    draws = sudoku.fixed_draws(seed, *np.divmod(rows, copies))
    # in parts: it bounds the memory of the maps
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // 20_000)):
        pairs = sudoku.paired(out.puzzles[rows[part]], out.solutions[rows[part]])
        out.puzzles[rows[part]], out.solutions[rows[part]] = augmenter(pairs, draws[part])
    return out


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    integer: dict[str, Any] = {"type": int, "metavar": "N"}
    # None where it is off: a flag that a dataset was built without is left out of the comparison
    switch: dict[str, Any] = {"action": "store_true", "default": None}
    add = parser.add_argument
    text = "folder of the dataset, or a folder for each of several --subsample_size"
    add("--output_dir", required=True, nargs="+", metavar="DIR", help=text)
    add("--overwrite", action="store_true", help="replace the dataset that is there")
    add("--seed", type=int, default=0)
    sizes = sorted(sudoku.BOX_SHAPES)
    add("--size", type=int, default=9, choices=sizes, help="side of the grid (default 9)")
    text = "store N augmented copies after each train puzzle (default 0: the trainer augments)"
    add("--num_aug", default=0, **integer, help=text)
    add("--val_size", default=0, **integer, help="take N train puzzles as a split val")
    text = "processes (default: one for each core); does not change the result"
    add("--num_workers", default=os.cpu_count(), **integer, help=text)
    text = "keep N random train puzzles (default: all); with several N, one dataset for each, the "
    text += "puzzles of a smaller one are part of those of a larger one"
    add("--subsample_size", nargs="+", **integer, help=text)
    text = "build even if a test or val puzzle, or a symmetric copy of it, is also in train"
    add("--allow_test_in_train", **switch, help=text)

    add = parser.add_argument_group("files (default: Sudoku-Extreme from the hub)").add_argument
    add("--train_csv", metavar="FILE", help="columns source,question,answer,rating")
    add("--test_csv", metavar="FILE")
    text = "one puzzle a line; solutions and ratings are computed, and the puzzles split at random"
    add("--puzzles", metavar="FILE", help=text)
    text = "of CSV files: keep the rows of rating N or more, in both splits"
    add("--min_difficulty", **integer, help=text)
    text = "leave bad rows out, instead of refusing the file"
    add("--skip_bad", **switch, help=text)
    text = "of CSV files: do not check that each puzzle has only one solution"
    add("--no_check_unique", **switch, help=text)

    add = parser.add_argument_group("generated puzzles, and --puzzles").add_argument
    text = "make puzzles; a rating is the solver's number of failed guesses"
    add("--generate", action="store_true", help=text)
    add("--num_train", **integer, help="train puzzles, --val_size included")
    add("--num_test", **integer, help="test puzzles")
    text = "MIN MAX: a number drawn for each puzzle; or min: remove clues until none can go"
    add("--clues", nargs="+", metavar="C", help=f"{text} (default)")
    text = "only puzzles of rating N or more; others are made and dropped"
    add("--min_guesses", **integer, help=f"{text} (with a range of --clues that favours few)")
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """UserError for a value out of range, and for flags that do not go together."""
    positive = ("num_workers", "num_train", "num_test")
    for name in (*positive, "num_aug", "val_size", "seed", "min_difficulty", "min_guesses"):
        value, lowest = getattr(args, name), int(name in positive)
        if value is not None and value < lowest:
            raise UserError(f"--{name} {value} must be {lowest} or more")
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed} must be below 2^63")
    for folder in args.output_dir:
        if folder.startswith("gs:"):
            raise UserError(
                f"--output_dir {folder}: datasets are built in a local folder: give one, and "
                "copy it to the bucket then (gcloud storage cp -r)"
            )
    check_sizes(args)
    check_source(args)
    if args.generate or args.puzzles:
        missing = [f"--{name}" for name in COUNTS if getattr(args, name) is None]
        if missing:
            source = "--generate" if args.generate else "--puzzles"
            raise UserError(f"{source} needs {' and '.join(missing)}")
        if args.val_size >= args.num_train:
            raise UserError(
                f"--val_size {args.val_size} must be below --num_train {args.num_train}, "
                "which it is part of"
            )
    if args.generate:
        args.clues = parse_clues(args.clues, args.size)


def check_sizes(args: argparse.Namespace) -> None:
    """UserError unless there is a folder for each size, and no size that cannot be."""
    sizes = args.subsample_size or [None]
    if len(sizes) != len(args.output_dir):
        raise UserError(
            f"--output_dir names {len(args.output_dir)} folder(s) for {len(sizes)} dataset(s): "
            "give a folder for each --subsample_size, in their order"
        )
    folders = [Path(folder).resolve() for folder in args.output_dir]
    for what, values in (("--subsample_size", sizes), ("--output_dir", folders)):
        if len(set(values)) < len(values):
            raise UserError(f"{what} {' '.join(map(str, values))}: give each one only once")
    most = (args.num_train or 0) - args.val_size
    for size in args.subsample_size or []:
        if size < 1:
            raise UserError(f"--subsample_size {size} must be 1 or more")
        if args.num_train and size > most:
            raise UserError(f"--subsample_size {size}: there are only {most} train puzzles")


def check_source(args: argparse.Namespace) -> None:
    """UserError where flags of two sources of puzzles are mixed, or half of one is missing."""
    wrong: tuple[str, ...]
    if args.generate:
        source, wrong = "--generate", (*CSV_ONLY, "puzzles", *FILES_ONLY)
    elif args.puzzles:
        source, wrong = "--puzzles", (*CSV_ONLY, *GENERATE_ONLY)
    else:
        source, wrong = "", (*COUNTS, *GENERATE_ONLY)
    flags = ", ".join(f"--{name}" for name in wrong if getattr(args, name) is not None)
    if flags:
        fault = f"cannot go with {source}" if source else "needs --generate"
        raise UserError(f"{flags} {fault}")
    if (args.train_csv is None) != (args.test_csv is None):
        raise UserError(
            "--train_csv and --test_csv go together: the test split is never cut from train"
        )
    if not source and args.train_csv is None and args.size != 9:
        raise UserError(
            f"--size {args.size}: Sudoku-Extreme is 9x9: use --generate, or --train_csv and "
            "--test_csv"
        )


def parse_clues(texts: list[str] | None, size: int) -> str | list[int]:
    """The value of --clues: "min", or [least, most]."""
    if texts in (None, ["min"]):
        return "min"
    low, high = sudoku.MIN_CLUES[size], size * size
    try:
        least, most = map(int, texts)
    except ValueError:
        raise UserError(
            f"--clues {' '.join(texts)}: give two whole numbers MIN MAX, or the word min"
        ) from None
    if not low <= least <= most <= high:
        raise UserError(
            f"--clues {least} {most}: needs {low} <= MIN <= MAX <= {high} for size {size}"
        )
    return [least, most]


def source_files(args: argparse.Namespace) -> dict[str, str]:
    """The files that the puzzles come from, by what they hold; none for generated puzzles."""
    if args.generate:
        return {}
    if args.puzzles:
        return {"puzzles": args.puzzles}
    paths = {"train": args.train_csv, "test": args.test_csv} if args.train_csv else hub_files()
    return {f"{name}_csv": path for name, path in paths.items()}


def read_or_generate(
    args: argparse.Namespace, files: dict[str, str]
) -> tuple[dict[str, Split], np.ndarray]:
    """The splits by name: train, test, and val if it is asked for; and the place of each train
    puzzle in a random order, by which subsets are taken, [train puzzles]."""
    if files and not args.puzzles:
        return csv_splits(args, {"train": files["train_csv"], "test": files["test_csv"]})
    splits = list_splits(args) if args.puzzles else generated(args)
    return splits, np.random.default_rng(args.seed).permutation(len(splits["train"].ratings))


def generated(args: argparse.Namespace) -> dict[str, Split]:
    """The splits of freshly generated puzzles."""
    clues = args.clues if args.clues == "min" else "{} to {}".format(*args.clues)
    print(
        f"generating {args.num_train} train and {args.num_test} test puzzles of size {args.size}, "
        f"clues {clues}, failed guesses {args.min_guesses or 0} or more, seed {args.seed}, "
        f"{args.num_workers} process(es)"
    )
    return generate_splits(args)


def folder_for(out: Path) -> dict[str, Any] | None:
    """Make way for a dataset at `out`. Returns build_info.json of the one that is there, or None.

    Raises UserError if nothing can be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clean_up_after_dead(out)
        return previous_build(out)
    except OSError as error:
        raise UserError(
            f"cannot write to {out.parent} ({error.strerror}): choose another --output_dir"
        ) from None


def build(
    out: Path, splits: dict[str, Split], args: argparse.Namespace, info: dict[str, Any]
) -> None:
    """Write one dataset. info: what build_info.json holds, but for what follows from `splits`."""
    overlap = report(splits)
    check_overlap(overlap, args)
    counts = {name: len(split.ratings) for name, split in splits.items()}
    if args.num_aug:
        augmented = with_augmentations(splits["train"], args.size, args.num_aug, args.seed)
        splits = splits | {"train": augmented}
        print(
            f"train: {len(augmented.ratings)} rows with {args.num_aug} augmented copies of each "
            "puzzle"
        )
    info = info | {"counts": counts, "overlap": overlap}
    try:
        write_dataset(out, splits, args.size, 1 + args.num_aug, info)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; nothing half-written is left. "
            "Free space or choose another --output_dir, then run this again"
        ) from None


def main() -> None:
    """Build the datasets that are not there already."""
    args = parse_args()
    start = time.time()
    outs = [Path(folder).resolve() for folder in args.output_dir]
    previous = {out: folder_for(out) for out in outs}
    files = source_files(args)
    content = {key: value for key, value in vars(args).items() if key not in NOT_CONTENT}
    try:
        content |= {f"{name}_sha256": sha256_of(path) for name, path in files.items()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    sizes = dict(zip(outs, args.subsample_size or [None]))
    contents = {out: content | {"subsample_size": size} for out, size in sizes.items()}
    for out, info in previous.items():
        if info and not args.overwrite:
            check_same(out, info, contents[out])
            check_overlap(info.get("overlap", {}), args)
            print(f"already built: {out} was made with these arguments: nothing to do")
            del contents[out]
    if not contents:
        return

    splits, places = read_or_generate(args, files)
    csv = {name.removesuffix("_csv"): path for name, path in files.items()} or None
    for out, content in contents.items():
        kept = np.flatnonzero(places < (sizes[out] or len(places)))
        subset = splits | {"train": splits["train"].take(kept)}
        build(out, subset, args, {"content": content, "csv": csv})
        print(f"done in {time.time() - start:.1f} s: {out}")


if __name__ == "__main__":
    run_cli(main)
