"""Errors, warnings, seeded random streams, and small files. Nothing here imports torch."""

import errno
import hashlib
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np


class UserError(Exception):
    """A mistake that the user can correct. It ends the program with one message and status 2."""


class RunFailure(Exception):
    """A failure that is not the user's mistake, such as a storage that does not answer.

    It ends the program with one message and status 1.
    """


class WorkerGone(RunFailure):
    """Another worker has ended or does not answer."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main()` and end the process with the status that it returns.

    UserError and a full disk end with one line and status 2, RunFailure with one line and status 1.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except RunFailure as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: the disk is full ({error}): free some space, then run the same command again; "
            "what was complete before is kept",
            file=sys.stderr,
        )
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def warn(message: object) -> None:
    """Print one warning to stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def random_stream(seed: int, purpose: int, index: int) -> np.random.Generator:
    """A numpy Generator that depends on (seed, purpose, index) alone.

    Philox is counter-based (Salmon et al. 2011), so stream `index` costs the same as stream 0, and
    a resumed run needs no saved state. purpose: one of the STREAM_ constants below.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, index]))


(STREAM_EPOCH_ORDER, STREAM_AUGMENTATION, STREAM_EXPLORATION, STREAM_EVAL_SUBSET) = range(4)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal, read block by block."""
    sha256 = hashlib.sha256()  # hashlib.file_digest is not in Python 3.10
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def check_output_file(flag: str, path: str | Path, make_folder: bool = False) -> None:
    """Raises UserError unless a file can be written at `path`.

    Called before the work whose result the file will hold. flag: the option that named the file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "is a folder")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(
            f"{flag} {path}: no file can be written there ({error.strerror}): name a file in a "
            "folder that exists and can be written to"
        ) from None


def replace_file(path: str | Path, text: str) -> None:
    """Write a small text file completely or not at all (temporary file, fsync, rename)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def end_with_parent() -> None:
    """End this process with status 1, and without clean-up, as soon as its parent has ended.

    For a process that multiprocessing has started.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "the main process has no parent to end with"

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
