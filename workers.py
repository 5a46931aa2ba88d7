"""Starting the workers of a run on this host, one process a device, and ending with one exit status."""
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import preemption
import utils
from device import resolve_device

END_TOGETHER_SECONDS = 60       # for the other workers to end by themselves once one has


def launch(function, config, *args):
    """Run function(rank, config, *args) once in every worker of this host; returns the exit status.

    TPU (and XLA on the CPU): torch_xla starts one process a device, on each host of the slice that runs this command.
    CUDA and CPU: `training.num_workers` processes of this host, or, under torchrun, this process alone: one of its workers.
    function returns an exit status (None: 0). The status of several workers is the first that was not 0.
    """
    preemption.listen()
    if resolve_device(config.device) in ("tpu", "xla_cpu"):
        return _launch_xla(function, config, *args)
    if "RANK" in os.environ:
        return function(int(os.environ["RANK"]), config, *args)
    if utils.planned_workers(config) == 1:
        return function(0, config, *args)
    return _spawn(function, utils.planned_workers(config), config, *args)


# ---------------------------------------------------------------------------------------------------------
# XLA
# ---------------------------------------------------------------------------------------------------------
class _Worker:
    """What torch_xla.launch calls in a thread of each process that it starts.

    Signals can be listened for in a process's main thread alone, and that is where this object is unpickled.
    """

    def __init__(self, function):
        self.function = function

    def __setstate__(self, state):
        self.__dict__ = state
        preemption.listen()
        die_with_parent()
        forward_sigterm(lambda: [multiprocessing.parent_process().pid])      # so that the parent knows what a worker's status, which it does not get, was

    def __call__(self, rank, *args):
        status = self.function(rank, *args)
        if status:
            raise SystemExit(status)        # torch_xla hands exceptions on to the parent, and drops results


def _launch_xla(function, config, *args):
    os.environ["PJRT_DEVICE"] = "TPU" if resolve_device(config.device) == "tpu" else "CPU"
    import torch_xla
    forward_sigterm(lambda: [process.pid for process in multiprocessing.active_children()])
    try:
        torch_xla.launch(_Worker(function), args=(config, *args))
    except BrokenProcessPool:
        return preemption.EXIT_STATUS if preemption.requested() else 1     # a worker that left in the midst of a compile has said why


# ---------------------------------------------------------------------------------------------------------
# CUDA and CPU
# ---------------------------------------------------------------------------------------------------------
def _spawn(function, num_workers, *args):
    import torch.distributed as dist
    # the store lies in this process, as with torchrun, and so survives whichever worker dies
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(num_workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_child, args=({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, rank, *args))
                 for rank in range(num_workers)]
    forward_sigterm(lambda: [process.pid for process in processes])
    for process in processes:
        process.start()
    status, running, deadline = 0, {process.sentinel: process for process in processes}, None
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait(list(running), left)
        if not ended:
            for process in running.values():
                print(f"warning: worker {processes.index(process)} did not end by itself and is killed", file=sys.stderr)
                process.kill()
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode < 0:
                print(f"error: worker {processes.index(process)} was killed by signal {-process.exitcode}", file=sys.stderr)
            if status == 0 and process.exitcode:
                status = process.exitcode if process.exitcode > 0 else 1
                deadline = time.monotonic() + END_TOGETHER_SECONDS
    return status


def _child(environment, function, rank, *args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent answers Ctrl-C, and its end is theirs
    os.environ.update(environment)
    preemption.listen()
    die_with_parent()
    try:
        utils.run_cli(lambda: function(rank, *args))
    except SystemExit as end:
        if end.code:        # at once: gloo's destructors would wait for the fellow workers, which wait for this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)


def die_with_parent():
    """End this process (status 1, nothing cleaned up) when the one that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def forward_sigterm(pids):
    """Pass a SIGTERM of this process on to those of pids(), which end by themselves."""
    def watch():
        preemption.wait()
        for pid in pids():
            if pid:
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    pass        # it was faster
    threading.Thread(target=watch, daemon=True).start()
