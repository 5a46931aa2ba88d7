"""The training command in a process that has imported everything: `CommandTest.train` uses it.

Importing torch takes longer than most runs of the tests. For each line of JSON on its input this
process forks, the child runs the command, and this process prints the child's exit status.

    {"args": command line, "environment": variables, "output": file for stdout and stderr}
"""

import json
import os
import sys

import torch._dynamo  # noqa: F401  (what the first optimizer of a process imports)

import train_tpu
import utils


def run_forked(args: list[str], environment: dict[str, str], output: str) -> int:
    """Run `train_tpu.py args` in a child; returns its exit status (-N: signal N)."""
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["train_tpu.py", *args]
        utils.run_cli(train_tpu.main)  # ends the child
    return os.waitstatus_to_exitcode(os.wait()[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run_forked(**json.loads(line)), flush=True)
