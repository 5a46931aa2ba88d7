"""The training command in a process that has imported everything: `CommandTest.train` uses it.

Importing torch takes longer than most runs of the tests. For each line of JSON on its input this
process forks, the child runs the command, and this process prints the child's exit status.

    {"args": command line, "environment": variables, "output": file for stdout and stderr,
     "driver": program that runs in place of train_tpu.py, or null}
"""

import atexit
import json
import os
import runpy
import sys
import threading

import torch._dynamo  # noqa: F401  (what the first optimizer of a process imports)

import train_tpu
import utils


def leave(status: int) -> None:
    """End this process as Python does, but without freeing every object of torch, which takes most
    of a second in a fork."""
    threading._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_forked(
    args: list[str], environment: dict[str, str], output: str, driver: str | None
) -> int:
    """Run the command with `args` in a child; returns its exit status (-N: signal N)."""
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [driver or "train_tpu.py", *args]
        try:
            if driver:
                runpy.run_path(driver, run_name="__main__")
            else:
                utils.run_cli(train_tpu.main)
        except SystemExit as end:
            leave(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            leave(1)
    return os.waitstatus_to_exitcode(os.wait()[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run_forked(**json.loads(line)), flush=True)
