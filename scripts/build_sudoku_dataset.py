#!/usr/bin/env python3
"""Build a Sudoku dataset: Sudoku-Extreme, your own CSV files, or freshly generated puzzles.

    # Sudoku-Extreme, 1,000 training puzzles, the whole test set (downloads about 0.8 GB)
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku-extreme-1k --subsample_size 1000
    # the same from files at hand; columns source,question,answer,rating
    python scripts/build_sudoku_dataset.py --output_dir data/mine --train_csv train.csv --test_csv test.csv
    # no download: 4x4 puzzles in a few seconds; 9x9 puzzles of 36 to 50 clues in about ten
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku4 --generate --size 4 --num_train 1000 --num_test 200
    python scripts/build_sudoku_dataset.py --output_dir data/sudoku9 --generate --num_train 8000 --num_test 1000 --clues 36 50

Every row is checked: lengths, characters, a legal solution, givens that agree with it, exactly one
solution. That last check costs 0.3 ms (17 clues) to 6 ms (the hardest known) per puzzle and core, on
two cores some 1 to 20 minutes for Sudoku-Extreme's 422,786 test puzzles; --no_check_unique leaves
it out.
Generated splits share no puzzle and no solution. Up to the trainer's augmentation, though, there are
only 2 grids of size 4 and 49 of size 6: small sizes serve to try things out, not to measure them.
The result depends on the arguments only, not on the number of processes, and appears at
--output_dir all at once: an interrupted build leaves nothing there.
"""

import argparse
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sudoku_sources import Split, csv_splits, generate_splits, rows_as_bytes

import sudoku
from storage import sync_folder
from utils import STREAM_STORED_AUGMENTATION, UserError, random_stream, run_cli

HUB_REPO = "sapientinc/sudoku-extreme"
GENERATE_ONLY = ("num_train", "num_test", "clues", "min_guesses")
CSV_ONLY = ("subsample_size", "min_difficulty", "skip_bad", "no_check_unique")
NOT_CONTENT = (
    "output_dir",
    "overwrite",
    "num_workers",
    "train_csv",
    "test_csv",
)  # files count by their hash


def hub_files():
    """Paths of Sudoku-Extreme's files in the hub's cache, downloaded if need be."""
    try:
        from huggingface_hub import hf_hub_download, logging
    except ImportError:
        raise UserError(
            "downloading needs the package huggingface_hub: install it, name files you have with "
            "--train_csv and --test_csv, or make puzzles with --generate"
        )
    logging.set_verbosity_error()  # its retries would bury the one message below
    try:
        return {
            name: hf_hub_download(HUB_REPO, f"{name}.csv", repo_type="dataset")
            for name in ("train", "test")
        }
    except Exception as error:  # the hub raises anything from timeouts to its own HTTP errors
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot download {HUB_REPO} ({first_line}): name files you have with --train_csv and "
            "--test_csv, or make puzzles with --generate"
        )


# ---------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------
def report(splits):
    """Prints sizes, clues, ratings and what splits have in common."""
    for name, split in splits.items():
        clues = (split.puzzles > 0).sum(1)
        quantiles = np.quantile(split.ratings, [0, 0.25, 0.5, 0.75, 0.9, 1]).astype(int)
        print(
            f"{name}: {len(clues)} puzzles, clues {clues.min()} to {clues.max()} (mean {clues.mean():.1f}), "
            f"rating quantiles 0/25/50/75/90/100%: {' '.join(map(str, quantiles))}"
        )
    train = set(rows_as_bytes(splits["train"].puzzles))
    duplicates = len(splits["train"].puzzles) - len(train)
    grids = set(rows_as_bytes(splits["train"].solutions))
    overlap = {
        name: (
            sum(p in train for p in rows_as_bytes(splits[name].puzzles)),
            sum(s in grids for s in rows_as_bytes(splits[name].solutions)),
        )
        for name in splits
        if name != "train"
    }
    print(f"duplicate puzzles within train: {duplicates}")
    for name, (puzzles, solutions) in overlap.items():
        print(
            f"{name} puzzles also in train: {puzzles}; "
            f"{name} puzzles whose solution is a train solution: {solutions}"
        )
    return {
        "train_duplicates": duplicates,
        **{f"{name}_puzzles_in_train": o[0] for name, o in overlap.items()},
        **{f"{name}_solutions_in_train": o[1] for name, o in overlap.items()},
    }


def with_augmentations(split, size, num_aug, seed):
    """Each row followed by its `num_aug` random images."""
    copies, augmenter = 1 + num_aug, sudoku.SudokuAugmenter(size)
    out = Split(*(np.repeat(array, copies, axis=0) for array in split))
    rows = np.flatnonzero(np.arange(len(out.ratings)) % copies)
    draws = random_stream(seed, STREAM_STORED_AUGMENTATION, 0).bit_generator.random_raw(len(rows))
    for part in np.array_split(
        np.arange(len(rows)), -(-len(rows) // 20_000)
    ):  # bounds the memory of the maps
        pairs = sudoku.paired(out.puzzles[rows[part]], out.solutions[rows[part]])
        out.puzzles[rows[part]], out.solutions[rows[part]] = augmenter(pairs, draws[part])
    return out


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def synced(path, write, mode):
    with open(path, mode) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_split(folder, split, size, group_size):
    folder.mkdir()
    rows = len(split.ratings)
    arrays = {
        "inputs": split.puzzles + np.uint8(1),  # 0 is padding, 1 an empty cell
        "labels": split.solutions + np.uint8(1),
        "puzzle_identifiers": np.zeros(rows, np.int32),
        "puzzle_indices": np.arange(rows + 1, dtype=np.int32),
        "group_indices": np.arange(0, rows + 1, group_size, dtype=np.int32),
        "ratings": split.ratings.astype(np.int32),
    }
    for name, array in arrays.items():
        # Into memory first: numpy's own writing to a file hides why it failed.
        buffer = io.BytesIO()
        np.save(buffer, array)
        synced(folder / f"all__{name}.npy", lambda file: file.write(buffer.getbuffer()), "wb")
    metadata = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": size + 2,
        "seq_len": size * size,
        "num_puzzle_identifiers": 1,
        "total_groups": rows // group_size,
        "mean_puzzle_examples": 1,
        "total_puzzles": rows // group_size,
        "sets": ["all"],
    }
    synced(folder / "dataset.json", lambda file: json.dump(metadata, file, indent=1), "w")
    sync_folder(folder)


def write_dataset(out, splits, args, info):
    """Writes a hidden sibling of `out` and renames it at the end, so that `out` is whole or absent.
    The sibling is locked while its writer lives; see `clean_up_after_dead`."""
    clean_up_after_dead(out)
    building, old = siblings(out)
    building.mkdir()
    lock = os.open(building, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, split in splits.items():
            write_split(
                building / name, split, args.size, 1 + args.num_aug if name == "train" else 1
            )
        synced(building / "identifiers.json", lambda file: json.dump(["<blank>"], file), "w")
        info["sha256"] = {
            str(path.relative_to(building)): sha256(path)
            for path in sorted(building.glob("*/*.npy"))
        }
        synced(building / "build_info.json", lambda file: json.dump(info, file, indent=1), "w")
        sync_folder(building)
        if out.exists() and any(out.iterdir()):
            os.rename(
                out, old
            )  # killed between the two renames, `out` is absent: the next run builds it
        os.rename(building, out)
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def siblings(out):
    return out.with_name(f".{out.name}.building"), out.with_name(f".{out.name}.old")


def clean_up_after_dead(out):
    """Removes what a killed build of `out` left beside it. UserError while another one is writing."""
    building, old = siblings(out)
    if building.exists():
        lock = os.open(building, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(building, ignore_errors=True)
        except BlockingIOError:
            raise UserError(
                f"another build of {out} is being written right now; wait for it, then run this again"
            )
        finally:
            os.close(lock)
    shutil.rmtree(old, ignore_errors=True)


def previous_build(out):
    """What `out` says of the dataset it holds; None where nothing is. UserError if it holds anything else."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return None
    try:
        info = json.loads((out / "build_info.json").read_text())
        info["content"].items(), info["sha256"].items()
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Not even --overwrite: it deletes, and must never be able to delete a home folder.
        raise UserError(
            f"--output_dir {out} exists and is not a dataset of this script; name another folder"
        )


def check_same(out, previous, content):
    """UserError unless the dataset at `out` is whole and was built from `content`."""
    built = previous["content"]
    differing = [
        f"{key} {built.get(key)!r} -> {content.get(key)!r}"
        for key in sorted({*built, *content})
        if built.get(key) != content.get(key)
    ]
    if differing:
        raise UserError(
            f"--output_dir {out} holds a dataset built with other arguments ({'; '.join(differing)}); "
            "name another folder, or replace it with --overwrite"
        )
    for name, digest in previous["sha256"].items():
        if not (out / name).is_file() or sha256(out / name) != digest:
            raise UserError(
                f"--output_dir {out} is damaged: {name} is missing or changed; rebuild with --overwrite"
            )


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------
def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", required=True, help="where the dataset goes")
    add("--overwrite", action="store_true", help="replace the dataset that is there")
    add("--seed", type=int, default=0)
    add(
        "--size",
        type=int,
        default=9,
        choices=sorted(sudoku.BOX_SHAPES),
        help="side of the grid (default 9)",
    )
    add(
        "--num_aug",
        type=int,
        default=0,
        metavar="N",
        help="store N augmented copies after each train puzzle (default 0: the trainer augments on the fly)",
    )
    add("--val_size", type=int, default=0, metavar="N", help="take N train puzzles as a split val")
    add(
        "--num_workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes (default: the cores); does not change the result",
    )
    group = parser.add_argument_group(
        "CSV files (default: Sudoku-Extreme from the Hugging Face hub)"
    )
    add = group.add_argument
    add("--train_csv", metavar="FILE", help="columns source,question,answer,rating")
    add("--test_csv", metavar="FILE")
    add("--subsample_size", type=int, metavar="N", help="keep N random train puzzles (default all)")
    add(
        "--min_difficulty",
        type=int,
        metavar="N",
        help="keep rows of rating N or more, in both splits",
    )
    add(
        "--skip_bad",
        action="store_true",
        default=None,
        help="leave bad rows out instead of refusing the file",
    )
    add(
        "--no_check_unique",
        action="store_true",
        default=None,
        help="do not check that solutions are unique",
    )
    group = parser.add_argument_group("generated puzzles")
    add = group.add_argument
    add(
        "--generate",
        action="store_true",
        help="make puzzles; a rating is the solver's number of failed guesses",
    )
    add("--num_train", type=int, metavar="N", help="train puzzles, --val_size included")
    add("--num_test", type=int, metavar="N")
    add(
        "--clues",
        nargs="+",
        metavar="C",
        help="MIN MAX: a number drawn for each puzzle; or min: remove clues until none can go (default)",
    )
    add(
        "--min_guesses",
        type=int,
        metavar="N",
        help="only puzzles of rating N or more, by rejection (with a range of --clues that favours few)",
    )
    args = parser.parse_args()
    check_args(args)
    return args


def check_args(args):
    lowest = {
        "num_workers": 1,
        "num_aug": 0,
        "val_size": 0,
        "seed": 0,
        "subsample_size": 1,
        "min_difficulty": 0,
        "num_train": 1,
        "num_test": 1,
        "min_guesses": 0,
    }
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name} {value} must be {low} or more")
    if args.output_dir.startswith("gs:"):
        raise UserError(
            f"--output_dir {args.output_dir}: datasets are built in a local folder: copy it to the bucket then "
            "(gcloud storage cp -r)"
        )
    if args.seed >= 2**63:
        raise UserError(f"--seed {args.seed} must be below 2^63")
    wrong = [
        f"--{name}"
        for name in (CSV_ONLY + ("train_csv", "test_csv") if args.generate else GENERATE_ONLY)
        if getattr(args, name) is not None
    ]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)} "
            + ("cannot go with --generate" if args.generate else "needs --generate")
        )
    if args.generate:
        missing = [f"--{name}" for name in ("num_train", "num_test") if getattr(args, name) is None]
        if missing:
            raise UserError(f"--generate needs {' and '.join(missing)}")
        if args.val_size >= args.num_train:
            raise UserError(
                f"--val_size {args.val_size} must be below --num_train {args.num_train}, "
                "which it is part of"
            )
        args.clues = parse_clues(args.clues, args.size)
    elif (args.train_csv is None) != (args.test_csv is None):
        raise UserError(
            "--train_csv and --test_csv go together: the test split is never cut from train"
        )
    elif args.train_csv is None and args.size != 9:
        raise UserError(
            f"--size {args.size}: Sudoku-Extreme is 9x9; use --generate or --train_csv and --test_csv"
        )


def parse_clues(texts, size):
    """ "min", or [low, high]."""
    if texts in (None, ["min"]):
        return "min"
    low, high = sudoku.MIN_CLUES[size], size * size
    try:
        least, most = map(int, texts)
    except ValueError:
        raise UserError(
            f"--clues {' '.join(texts)}: give two whole numbers MIN MAX, or the word min"
        )
    if not low <= least <= most <= high:
        raise UserError(
            f"--clues {least} {most}: needs {low} <= MIN <= MAX <= {high} for size {size}"
        )
    return [least, most]


def main():
    args = parse_args()
    start = time.time()
    out = Path(args.output_dir).resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clean_up_after_dead(out)
        previous = previous_build(out)
    except OSError as error:
        raise UserError(
            f"cannot write to {out.parent} ({error.strerror}); choose another --output_dir"
        )

    content = {key: value for key, value in vars(args).items() if key not in NOT_CONTENT}
    paths = None
    if not args.generate:
        paths = {"train": args.train_csv, "test": args.test_csv} if args.train_csv else hub_files()
        try:
            content.update({f"{name}_csv_sha256": sha256(path) for name, path in paths.items()})
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}")
    if previous and not args.overwrite:
        check_same(out, previous, content)
        print(f"already built: {out} was made with these arguments; nothing to do")
        return

    if args.generate:
        clues = args.clues if args.clues == "min" else "{} to {}".format(*args.clues)
        print(
            f"generating {args.num_train} train and {args.num_test} test puzzles of size {args.size}, clues {clues}, "
            f"failed guesses {args.min_guesses or 0} or more, seed {args.seed}, {args.num_workers} process(es)"
        )
        splits = generate_splits(args)
    else:
        splits = csv_splits(args, paths)
    info = {
        "content": content,
        "csv": paths,
        "counts": {name: len(s.ratings) for name, s in splits.items()},
        "overlap": report(splits),
    }
    if args.num_aug:
        splits["train"] = with_augmentations(splits["train"], args.size, args.num_aug, args.seed)
        print(
            f"train: {len(splits['train'].ratings)} rows with {args.num_aug} augmented copies of each puzzle"
        )
    try:
        write_dataset(out, splits, args, info)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; nothing half-written is left. "
            "Free space or choose another --output_dir, then run this again"
        )
    print(f"done in {time.time() - start:.1f} s: {out}")


if __name__ == "__main__":
    run_cli(main)
