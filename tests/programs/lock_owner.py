"""A process that takes the lock of a run: argv is its folder, whether it takes it over, the seconds
between two renewals, and whether it waits for a line when it has read the lock, before it does
anything about it. It says "held", and then does what each line of its input asks.
"""

import contextlib
import io
import signal
import sys

import run_lock
import storage
import utils

signal.alarm(120)
url, beat_seconds = sys.argv[1], float(sys.argv[3])
take_over, pause = (text == "True" for text in (sys.argv[2], sys.argv[4]))
run_lock.GRACE_SECONDS = 0.2
folder = storage.open_folder(url, deadline=5)
read_version = folder.read_version


def look_and_wait(name):
    folder.read_version = read_version
    try:
        return read_version(name)
    finally:
        print("looked", flush=True)
        sys.stdin.readline()


if pause:
    folder.read_version = look_and_wait
try:
    with contextlib.redirect_stderr(io.StringIO()):
        lock = run_lock.RunLock(folder, take_over, beat_seconds)
except utils.UserError as error:
    print("refused:", error, flush=True)
    sys.exit()
print("held", flush=True)
for command in sys.stdin:
    try:
        eval(command)
        print("fine", flush=True)
    except utils.RunFailure as error:
        print("lost:", error, flush=True)
