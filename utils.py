"""Errors, seeded random streams, and small files. Nothing here imports torch."""

import errno
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np


class UserError(Exception):
    """A mistake that its user can mend: ends the program with one message and status 2."""


class RunFailure(Exception):
    """A failure that is not its user's mistake (a worker is gone, the storage does not answer): one message and status 1."""


class WorkerGone(RunFailure):
    """Another worker has ended or does not answer."""


def run_cli(main):
    """Run `main()` and end the process with the status it returns. UserError and a full disk give one line and status 2,
    RunFailure one line and status 1."""
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


def random_stream(seed, purpose, index):
    """A numpy Generator that depends on (seed, purpose, index) alone: nothing to save, nothing to replay.

    Philox is counter-based (Salmon et al. 2011), so stream `index` costs the same as stream 0.
    purpose: small non-negative int, one for each use (see the constants below).
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, index]))


(
    STREAM_EPOCH_ORDER,
    STREAM_AUGMENTATION,
    STREAM_EXPLORATION,
    STREAM_EVAL_SUBSET,
    STREAM_STORED_AUGMENTATION,
) = range(5)


def check_output_file(flag, path, make_folder=False):
    """Raises UserError unless a file could be written at `path`: before the work whose result it is to hold."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "is a folder")
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(
            f"{flag} {path}: no file can be written there ({error.strerror}): name a file in a folder that exists and can be written to"
        ) from None


def replace_file(path, text):
    """Write a small text file whole or not at all (temporary file, fsync, rename)."""
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
    """In a process that multiprocessing has started: end it (status 1, nothing is cleaned up) when
    its parent has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "the main process has no parent to end with"

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
