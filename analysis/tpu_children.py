"""Run a script in a child process within limits of memory and time.

If a configuration is too large for this machine, only the child is ended: the process that started
it goes on, and the machine keeps enough memory.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tpu_types import GIB
from utils import UserError

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl()


def run_child(
    doing: str,
    command: Sequence[str | Path],
    folder: Path,
    memory_gib: float | None = None,
    minutes: float = 20,
) -> str | None:
    """Run a Python script, and kill it when it takes too much memory or time.

    doing: what it does, for messages and for the name of its log in `folder`. command: the script
    and its arguments. memory_gib: the limit in GiB (None: 80% of the free memory).

    Returns what went wrong as one line, or None. If the script ended with status 2 and a line
    "error: ...", raises UserError with the text of that line.
    """
    limit = memory_gib * GIB if memory_gib else 0.8 * free_memory()
    end = time.monotonic() + 60 * minutes
    log = folder / f"{doing}.log"
    with open(log, "w") as output:
        child = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_clean_environment(),
            preexec_fn=_die_with_parent,
        )
        try:
            while child.poll() is None:
                if resident_bytes(child.pid) > limit:
                    return (
                        f"{doing} it needs more than {limit / GIB:.1f} GiB of this machine's "
                        "memory: too large to be judged here (--memory_gib sets the limit)"
                    )
                if time.monotonic() > end:
                    return (
                        f"{doing} it takes more than {minutes:g} minutes on this machine: "
                        "too large to be judged here (--minutes sets the limit)"
                    )
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
    return _what_went_wrong(doing, child.returncode, log)


def _what_went_wrong(doing: str, status: int, log: Path) -> str | None:
    if status == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    mistakes = [line for line in lines if line.startswith("error: ")]
    if status == 2 and mistakes:
        raise UserError(mistakes[-1].removeprefix("error: "))
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"{doing} ended {how}: {' | '.join(lines[-3:])[-600:] or 'it printed nothing'}"


def _clean_environment() -> dict[str, str]:
    """This environment without flags for XLA: they may be for another device or another slice."""
    prefixes = ("PJRT_", "XLA_", "TPU_", "LIBTPU_", "JAX_")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


def _die_with_parent() -> None:
    """In a child: ask for SIGKILL when the parent ends, since nobody would watch its memory then.

    utils.end_with_parent does this for children of multiprocessing, which know their parent.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def resident_bytes(pid: int) -> int:
    """Bytes of memory that a process holds; 0 for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def free_memory() -> int:
    """Bytes of memory that this machine, or the container around this process, has left."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found, "/proc/meminfo has no MemAvailable"
    free = 1024 * int(found[1])
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # there is no container, or it has no limit
        return free
