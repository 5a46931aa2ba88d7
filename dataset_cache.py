"""Datasets in gs:// folders, downloaded once per host and version."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

from storage import (
    LocalFolder,
    cache_folder,
    checked_name,
    digest,
    is_remote,
    open_folder,
    sync_folder,
)
from utils import UserError

DATASET_FILE = re.compile(
    r"identifiers\.json|build_info\.json|[^/]+/(?:dataset\.json|all__[^/]+\.npy)"
)


def local_dataset(url, cache_dir=None):
    """The local folder of the dataset at `url`: a local path as it is, a gs:// one downloaded once per host and version.

    cache_dir: by default $TRM_CACHE, or ~/.cache/trm. Processes of a host wait while one of them downloads. Another
    listing (names, sizes, generations, checksums) is another version; earlier ones stay, runs may be reading them.
    Raises UserError where there is no whole dataset, or a name in it leads out of its folder; StorageError.
    """
    if not is_remote(url):
        return Path(url)
    folder = open_folder(url)
    stored = folder.versions()
    for name in stored:
        checked_name(name, folder.url)
    stored = {name: stored[name] for name in sorted(stored) if DATASET_FILE.fullmatch(name)}
    if not any(name.endswith("/dataset.json") for name in stored):
        raise UserError(
            f"{folder.url}: there is no dataset: upload the folder that scripts/build_sudoku_dataset.py wrote, "
            "so that its splits lie in this one (train/dataset.json)"
        )
    listing = json.dumps(list(stored.values()))
    home = Path(cache_dir or cache_folder()) / "datasets" / digest(folder.url.encode())[:16]
    dataset = home / digest(listing.encode())[:16]
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = open(home / "lock", "a")
    except OSError as error:
        raise UserError(
            f"{home}: the dataset cannot be kept there ({error.strerror}): set TRM_CACHE to a folder that can be written"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets it go when its holder is killed
        if LocalFolder(dataset).list() != {name: version.size for name, version in stored.items()}:
            _download(folder, stored, dataset)
    return dataset


def _download(folder, stored, dataset):
    for leftover in dataset.parent.glob("*.tmp"):
        shutil.rmtree(leftover)
    changed = any(path.is_dir() and path != dataset for path in dataset.parent.iterdir())
    print(
        f"{folder.url}{' has changed:' if changed else ':'} downloading {len(stored)} files, "
        f"{sum(version.size for version in stored.values()) / 1e6:.1f} MB, to {dataset}",
        flush=True,
    )
    building = dataset.with_name(dataset.name + ".tmp")
    for name, version in stored.items():
        folder.get_version(name, version, building / name)
    _check_build(folder.url, building)
    if dataset.exists():  # files of it were deleted or cut off by somebody
        shutil.rmtree(dataset)
    os.replace(building, dataset)
    sync_folder(dataset.parent)


def _check_build(url, dataset):
    """Raises UserError if the files are not those that build_info.json (where there is one) was written for."""
    try:
        digests = json.loads((dataset / "build_info.json").read_bytes())["sha256"].items()
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{url}/build_info.json is damaged ({type(error).__name__}: {error}): upload the dataset again"
        ) from None
    for name, expected in digests:
        path = dataset / checked_name(name, f"{url}/build_info.json")
        if not path.is_file() or digest(path.read_bytes()) != expected:
            raise UserError(
                f"{url}/{name} is {'not the file (sha256)' if path.is_file() else 'missing, a file'} that build_info.json "
                "names: upload the dataset again, all of it"
            )
