"""Processes that tests start, and conditions that tests wait for. No other file of the tests starts
a process that it does not wait for, or sleeps; programs that tests start are in tests/programs/.

    process = begin(self, [sys.executable, "train_tpu.py", "--config", ...])
    process.until(marker.exists)              # fails at once if the process ends before
    process.send_signal(signal.SIGTERM)
    output = process.ends(143, seconds=25)    # fails if it takes longer, or has another status

What a process prints (stdout and stderr together) goes to a log, which every failure here shows.
At the end of the test the process is killed, with everything it has started: its children inherit
an environment variable by which they are found, even if their parent is gone or if they run in a
session of their own.
"""

import contextlib
import fcntl
import itertools
import os
import pty
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "TRM_TEST_MARK"
numbers = itertools.count()
# A shell's background jobs ignore it, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition, seconds=60, failure=lambda: ""):
    """Call `condition()` every 5 ms until it is true, and return its value. After `seconds` this
    fails, with the text that `failure()` returns."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain; {failure()}")
        time.sleep(0.005)
    return value


def stays(condition, seconds):
    """`condition()` is true now and at every look for so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not condition():
            raise AssertionError(f"true no more before {seconds} s were over")
        time.sleep(0.05)


def pause(seconds):
    """Wait for what nothing can be asked about: a time in which somebody else may act."""
    time.sleep(seconds)


def free_port():
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_running(pid):
    """Whether there is a process `pid`. One that has ended does not count, even if nobody has
    waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid):
    """The processes that `pid` has started, and those that these have started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [k for child in map(int, children) for k in (child, *descendants(child))]


def begin(test, command, environment=None, **options):
    """Start `command` in the kit's root folder; options: see Process.

    test: the test, or its class (in setUpClass), at whose end the process is killed.
    """
    process = Process(command, environment, **options)
    add_cleanup = test.addClassCleanup if isinstance(test, type) else test.addCleanup
    add_cleanup(process.end)
    return process


def run(test, command, status=0, seconds=300, answer="", **options):
    """Start `command` with the input `answer`, wait for its end, which must have this status, and
    return its output."""
    process = begin(test, command, feed=bool(answer), **options)
    if answer:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(answer)
    return process.ends(status, seconds)


class Process(subprocess.Popen):
    """A process in a session (and process group) of its own.

    environment: variables that are set besides those of this process, or taken away (None).
    feed: whether it has an input to write to; without, its input is empty.
    terminal: whether it runs in a terminal of its own, of 24 lines of 100 characters.
    options: those of subprocess.Popen. With `stdout` given, there is no log.
    """

    def __init__(self, command, environment=None, feed=False, terminal=False, **options):
        self.mark = f"{os.environ.get(MARK, '')}{os.getpid()}.{next(numbers)}/"
        variables = {**options.pop("env", os.environ), **(environment or {}), MARK: self.mark}
        self.log = tempfile.TemporaryFile(buffering=0)
        self.lines_read, self.terminal = 0, None
        if terminal:
            self.terminal, end = pty.openpty()
            os.set_blocking(self.terminal, False)
            fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
            options |= dict.fromkeys(("stdin", "stdout", "stderr"), end)
            options["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        super().__init__(
            list(map(str, command)),
            text=True,
            env={name: str(value) for name, value in variables.items() if value is not None},
            **{
                "cwd": ROOT,
                "stdin": subprocess.PIPE if feed else subprocess.DEVNULL,
                "stdout": self.log,
                "stderr": subprocess.STDOUT,
                "start_new_session": True,
                **options,
            },
        )
        if terminal:
            os.close(end)

    def output(self):
        """What it has printed until now."""
        with contextlib.suppress(OSError):  # nothing is there now, or nobody is at the other end
            while self.terminal is not None and (block := os.read(self.terminal, 4096)):
                self.log.write(block)
        descriptor = self.log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def press(self, keys):
        """Type these bytes at its terminal."""
        os.write(self.terminal, keys)

    def hang_up(self):
        """Close its terminal."""
        self.output()
        os.close(self.terminal)
        self.terminal = None

    def until(self, condition, seconds=60):
        """`wait_until`, which fails at once if the process ends before the condition is true."""

        def met():
            running = self.poll() is None  # asked first: its last act may be what is waited for
            value = condition()
            if not value and not running:
                raise AssertionError(f"it ended with {self.returncode} too soon: {self.output()}")
            return value

        return wait_until(met, seconds, self.output)

    def says(self, text, seconds=60):
        """Wait until `text` is in its output, and return that."""
        return self.until(lambda: text in (output := self.output()) and output, seconds)

    def line(self, seconds=60):
        """Wait for the line after the one that the last call has returned."""
        lines = self.until(
            lambda: (lines := self.output().split("\n"))[self.lines_read + 1 :] and lines, seconds
        )
        self.lines_read += 1
        return lines[self.lines_read - 1]

    def feed(self, line=""):
        """Write a line to its input."""
        self.stdin.write(line + "\n")
        self.stdin.flush()

    def signal_all(self, number):
        """Send a signal to it and to the children in its process group."""
        os.killpg(self.pid, number)

    def ends(self, status=0, seconds=60):
        """Wait for its end, which must come in time and with this status; returns its output."""

        def ended():
            self.output()  # a terminal that nobody reads would stop it
            return self.poll() is not None

        wait_until(ended, seconds, lambda: f"it still runs: {self.output()}")
        if self.returncode != status:
            raise AssertionError(f"status {self.returncode}, not {status}: {self.output()}")
        return self.output()

    def all_end(self, status=0, seconds=60):
        """`ends`, of it and of everything that it has started."""
        wait_until(
            lambda: self.poll() is not None and not self.relatives(),
            seconds,
            lambda: f"{self.relatives()} still run: {self.output()}",
        )
        return self.ends(status)

    def relatives(self):
        """It and what it has started, as far as they still run."""
        mark, found = f"{MARK}={self.mark}".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def end(self):
        """Kill it and everything that it has started."""
        if self.poll() is None:
            for pid in [self.pid, *descendants(self.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.kill_relatives(), 30, lambda: f"{self.relatives()} stay")
        self.wait()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        if self.terminal is not None:
            self.hang_up()
        self.log.close()

    def kill_relatives(self):
        """Kill what still runs, and return it: a process may start another just then."""
        pids = self.relatives()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids
