"""Writing a dataset's folder: whole or not at all, and nothing is deleted that was not built here.

out/train/all__inputs.npy, all__labels.npy, ...   the arrays of a split
out/train/dataset.json                            what they hold
out/build_info.json                               arguments, counts, sha256 of every array
"""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from sudoku_sources import Split

from storage import sync_folder
from utils import UserError, sha256_of


def write_dataset(
    out: Path, splits: dict[str, Split], size: int, group_size: int, info: dict[str, Any]
) -> None:
    """Write `splits` to the folder `out`, in the place of what is there.

    size: side of the grids. group_size: rows of one training puzzle (it and its augmented copies).
    info: content of build_info.json, without the checksums. Everything is written to a hidden
    sibling of `out`, which is renamed at the end. Raises OSError; then the sibling is deleted.
    """
    clean_up_after_dead(out)
    building, old = _siblings(out)
    building.mkdir()
    with _locked(building):
        try:
            for name, split in splits.items():
                _write_split(building / name, split, size, group_size if name == "train" else 1)
            _write(building / "identifiers.json", json.dumps(["<blank>"]).encode())
            arrays = sorted(building.glob("*/*.npy"))
            info["sha256"] = {str(path.relative_to(building)): sha256_of(path) for path in arrays}
            _write(building / "build_info.json", json.dumps(info, indent=1).encode())
            sync_folder(building)
            # a kill between the two renames leaves no `out`: the next run builds it
            if out.exists() and any(out.iterdir()):
                os.rename(out, old)
            os.rename(building, out)
            sync_folder(out.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def _write_split(folder: Path, split: Split, size: int, group_size: int) -> None:
    folder.mkdir()
    rows = len(split.ratings)
    arrays: dict[str, np.ndarray] = {
        "inputs": split.puzzles + np.uint8(1),  # 0 is padding, 1 an empty cell
        "labels": split.solutions + np.uint8(1),
        "puzzle_identifiers": np.zeros(rows, np.int32),
        "puzzle_indices": np.arange(rows + 1, dtype=np.int32),
        "group_indices": np.arange(0, rows + 1, group_size, dtype=np.int32),
        "ratings": split.ratings.astype(np.int32),
    }
    for name, array in arrays.items():
        # into memory first: where numpy writes to a file itself, its error hides the cause
        buffer = io.BytesIO()
        np.save(buffer, array)
        _write(folder / f"all__{name}.npy", buffer.getbuffer())
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
    _write(folder / "dataset.json", json.dumps(metadata, indent=1).encode())
    sync_folder(folder)


def _write(path: Path, content: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _siblings(out: Path) -> tuple[Path, Path]:
    """The folder in which a new `out` is built, and the one to which an old `out` is renamed."""
    return out.with_name(f".{out.name}.building"), out.with_name(f".{out.name}.old")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder`; the kernel releases it when this process ends, however it ends.
    Raises BlockingIOError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def clean_up_after_dead(out: Path) -> None:
    """Delete what a killed build of `out` left beside it.

    Raises UserError if another build of `out` is being written now.
    """
    building, old = _siblings(out)
    if building.exists():
        try:
            with _locked(building):
                shutil.rmtree(building, ignore_errors=True)
        except BlockingIOError:
            raise UserError(
                f"another build of {out} is being written right now: wait for it, then run this "
                "again"
            ) from None
    shutil.rmtree(old, ignore_errors=True)


def previous_build(out: Path) -> dict[str, Any] | None:
    """build_info.json of the dataset at `out`, or None if nothing is there. Raises UserError if
    anything else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        info = json.loads((out / "build_info.json").read_text())
        info["content"].items(), info["sha256"].items()
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # --overwrite is no way out: it deletes, and must never be able to delete a home folder
        raise UserError(
            f"--output_dir {out} exists and is not a dataset of this script: name another folder"
        ) from None


def check_same(out: Path, previous: dict[str, Any], content: dict[str, Any]) -> None:
    """Raises UserError unless the dataset at `out` is whole and was built from `content`."""
    built = previous["content"]
    differing = [
        f"{key} {built.get(key)!r} -> {content.get(key)!r}"
        for key in sorted({*built, *content})
        if built.get(key) != content.get(key)
    ]
    if differing:
        raise UserError(
            f"--output_dir {out} holds a dataset built with other arguments "
            f"({'; '.join(differing)}): name another folder, or replace it with --overwrite"
        )
    for name, expected in previous["sha256"].items():
        if not (out / name).is_file() or sha256_of(out / name) != expected:
            raise UserError(
                f"--output_dir {out} is damaged: {name} is missing or changed: rebuild it with "
                "--overwrite"
            )
