"""Datasets in gs:// folders, downloaded once for each host and version."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from storage import (
    GCSFolder,
    LocalFolder,
    ObjectVersion,
    cache_folder,
    checked_name,
    digest,
    is_remote,
    sync_folder,
)
from utils import UserError, sha256_of

DATASET_FILE = re.compile(
    r"identifiers\.json|build_info\.json|[^/]+/(?:dataset\.json|all__[^/]+\.npy)"
)


def local_dataset(url: str, cache_dir: str | Path | None = None) -> Path:
    """The local folder of the dataset at `url`, which is a local path or a gs:// folder.

    A gs:// folder is downloaded into cache_dir (default: $TRM_CACHE, or ~/.cache/trm). The other
    processes of the host wait meanwhile. If the listing in the bucket (names, sizes, generations,
    checksums) has changed, a new version is downloaded. Earlier versions stay, because runs may be
    reading them.

    Raises UserError if there is no whole dataset, or if a name in it leads out of its folder.
    Raises StorageError if the bucket does not answer.
    """
    if not is_remote(url):
        return Path(url)
    folder = GCSFolder(url)
    versions = _dataset_files(folder)
    home = Path(cache_dir or cache_folder()) / "datasets" / digest(folder.url.encode())[:16]
    listing = json.dumps(list(versions.values()))
    dataset = home / digest(listing.encode())[:16]
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home / "lock", "a")
    except OSError as error:
        raise UserError(
            f"{home}: the dataset cannot be kept there ({error.strerror}): set TRM_CACHE to a "
            "folder that can be written"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when its holder is killed
        sizes = {name: version.size for name, version in versions.items()}
        if LocalFolder(dataset).list() != sizes:
            _download(folder, versions, dataset)
    return dataset


def _dataset_files(folder: GCSFolder) -> dict[str, ObjectVersion]:
    """The files of the dataset in `folder`, sorted by name. Raises UserError if there is none."""
    stored = folder.versions()
    for name in stored:
        checked_name(name, folder.url)
    versions = {name: stored[name] for name in sorted(stored) if DATASET_FILE.fullmatch(name)}
    if not any(name.endswith("/dataset.json") for name in versions):
        raise UserError(
            f"{folder.url}: there is no dataset: upload the folder that "
            "scripts/build_sudoku_dataset.py wrote, so that its splits lie in this one "
            "(train/dataset.json)"
        )
    return versions


def _download(folder: GCSFolder, versions: dict[str, ObjectVersion], dataset: Path) -> None:
    for leftover in dataset.parent.glob("*.tmp"):
        shutil.rmtree(leftover)
    changed = any(path.is_dir() and path != dataset for path in dataset.parent.iterdir())
    size = sum(version.size for version in versions.values())
    print(
        f"{folder.url}{' has changed:' if changed else ':'} downloading {len(versions)} files, "
        f"{size / 1e6:.1f} MB, to {dataset}",
        flush=True,
    )
    building = dataset.with_name(dataset.name + ".tmp")
    for name, version in versions.items():
        folder.get_version(name, version, building / name)
    _check_build(folder.url, building)
    if dataset.exists():  # somebody has deleted files of it, or cut them off
        shutil.rmtree(dataset)
    os.replace(building, dataset)
    sync_folder(dataset.parent)


def _check_build(url: str, dataset: Path) -> None:
    """Raises UserError if the files are not those that build_info.json describes.

    Without a build_info.json nothing is checked.
    """
    try:
        digests = json.loads((dataset / "build_info.json").read_bytes())["sha256"].items()
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}/build_info.json is damaged ({type(error).__name__}: {error}): upload the "
            "dataset again"
        ) from None
    for name, expected in digests:
        path = dataset / checked_name(name, f"{url}/build_info.json")
        if not path.is_file() or sha256_of(path) != expected:
            what = "not the file (sha256)" if path.is_file() else "missing, a file"
            raise UserError(
                f"{url}/{name} is {what} that build_info.json names: upload the dataset again, "
                "all of it"
            )
