"""Start the workers of a run on this host, one process for each device, and end with one status."""

import importlib.util
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable

import preemption
import tpu_types
from config import Config, batch_fault, planned_workers
from device import Device, resolve_device
from utils import UserError, end_with_parent, run_cli, warn

# how long the others may take to end by themselves, once a worker has ended with a status that is
# not 0
END_TOGETHER_SECONDS = 60


def launch(
    function: Callable[[int, Config, Namespace], int | None], config: Config, args: Namespace
) -> int | None:
    """Run function(rank, config, args) in every worker of this host; returns the exit status.

    On a TPU, and on XLA's CPU device, it starts one process for each device of this host; on a
    slice the same command has to run on every host. On CUDA and CPU it starts
    `training.num_workers` processes on this host. Under torchrun this process is one of the
    workers, and starts no other.

    function returns an exit status (None: 0). With several workers the result is the first status
    that was not 0. Raises UserError if device = tpu and this host has no TPU.
    """
    preemption.listen()
    name = resolve_device(config.device)
    if name in ("tpu", "xla_cpu"):
        os.environ["PJRT_DEVICE"] = "TPU" if name == "tpu" else "CPU"
        count = local_tpu_processes() if name == "tpu" else 1
        # The same processes as torch_xla.launch would start. But when one of its processes dies,
        # torch_xla.launch sends SIGTERM to the others and drops their statuses and messages, so
        # that a crash would look like a preemption.
        environment = {"PJRT_LOCAL_PROCESS_COUNT": str(count)}
        return _supervise(function, count, environment, config, args)
    count = planned_workers(config)
    if "RANK" in os.environ or count == 1:
        preemption.listen_to_keyboard()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            preemption.listen_to_metadata_server()
        return function(int(os.environ.get("RANK", 0)), config, args)
    import torch.distributed as dist  # takes seconds, and only these workers need it

    # The store is in this process, as with torchrun, and survives the death of any worker.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return _supervise(function, count, environment, config, args)


def local_tpu_processes() -> int:
    """How many processes the TPU chips of this host need. Raises UserError if there are none."""
    missing = "libtpu is not installed: pip install -r requirements-tpu.txt"
    count = 0
    if importlib.util.find_spec("libtpu"):
        from torch_xla._internal import tpu  # an optional package

        missing, count = "this host has no TPU chip", tpu.num_local_processes()
    if count < 1:
        raise UserError(
            f"device = 'tpu': {missing}: use device=cpu or device=cuda here; "
            "analysis/tpu_report.py tells what a slice would do with this configuration, and "
            "scripts/setup_tpu.sh asks Google Cloud for one"
        )
    return count


def start_alone(device: str) -> None:
    """Make this process the only worker, with one chip if `device` is a TPU.

    Call it before a Device is made. device: its name. Raises UserError if it is tpu and this host
    has none.
    """
    if resolve_device(device) == "tpu":
        os.environ["PJRT_DEVICE"] = "TPU"
        local_tpu_processes()
        from torch_xla._internal import tpu

        tpu.configure_one_chip_topology()  # else its runtime would wait for the other hosts


def check_workers(config: Config, device: Device) -> None:
    """Raises UserError if the workers that are here are not those of the configuration."""
    slice_name, world_size = config.tpu.accelerator_type, device.workers.world_size
    generation = tpu_types.slice_type(slice_name).generation
    if device.generation and device.generation != generation:
        raise UserError(
            f"tpu.accelerator_type = {slice_name!r}: its chips are {generation.name}, and those of "
            f"this host are {device.generation.name}: name the slice that this is"
        )
    planned = planned_workers(config, "tpu")
    if device.name == "tpu" and world_size != planned:
        raise UserError(
            f"tpu.accelerator_type = {slice_name!r}: it has {planned} chips, and {world_size} are "
            "here: name this slice, and run the command on all of its hosts"
        )
    if text := batch_fault(config, world_size):
        batch = config.training.global_batch_size
        raise UserError(
            f"training.global_batch_size = {batch}: {text}: this many workers have been started"
        )


# --------------------------------------------------------------------------------------------------
# The parent
# --------------------------------------------------------------------------------------------------
def _supervise(function, count, environment, *args):
    """Start `count` workers with these environment variables; returns their exit status."""
    # A process that has imported PyTorch, and nothing else, forks the workers, because the import
    # would cost each of them seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    processes = [
        context.Process(target=_child, args=(environment, function, local_rank, *args))
        for local_rank in range(count)
    ]
    preemption.disable_immediate_exit()
    # These signals are blocked when a worker starts, until it listens. The resource tracker starts
    # first, because its start unblocks them.
    signals = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
    multiprocessing.resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for process in processes:
        process.start()
    threading.Thread(target=_forward_sigterm, args=(processes,), daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return _wait(processes)
    except KeyboardInterrupt:
        text = "interrupted: the workers save and end; press Ctrl-C again to kill them"
        print(text, file=sys.stderr, flush=True)
        try:
            _terminate(processes)
            _wait(processes)
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
        return 130


def _wait(processes):
    """Wait until all have ended; returns the first status that was not 0, or 0."""
    status, deadline, killed = 0, None, set()
    running = {process.sentinel: process for process in processes if process.exitcode is None}
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait(list(running), left)
        if not ended:
            for process in running.values():
                warn(f"worker {processes.index(process)} did not end by itself and is killed")
                process.kill()
                killed.add(process)
            deadline = None  # a kill takes a moment
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode < 0 and process not in killed:
                rank, number = processes.index(process), -process.exitcode
                print(f"error: worker {rank} was killed by signal {number}", file=sys.stderr)
            if status == 0 and process.exitcode:
                status = process.exitcode if process.exitcode > 0 else 1
                deadline = time.monotonic() + END_TOGETHER_SECONDS
                if status == preemption.EXIT_STATUS:
                    # SIGTERM ended it during its start, when it could not tell the others
                    _terminate(processes)
    return status


def _terminate(processes):
    for process in processes:
        if process.is_alive():
            process.terminate()


def _forward_sigterm(processes):
    preemption.wait()
    while True:  # a second SIGTERM does no harm, and one may come before a worker is there
        _terminate(processes)
        time.sleep(1)


# --------------------------------------------------------------------------------------------------
# A worker
# --------------------------------------------------------------------------------------------------
def _child(environment, function, local_rank, *args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    # Before the TPU's runtime starts, because that replaces the default handler by its own.
    preemption.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    end_with_parent()
    os.environ.update(environment)
    os.environ["LOCAL_RANK"] = str(local_rank)
    if local_rank == 0:
        preemption.listen_to_metadata_server()
    try:
        run_cli(lambda: function(_global_rank(local_rank), *args))
    except SystemExit as end:
        if end.code:
            # Without clean-up: gloo's destructors would wait for the other workers, and these wait
            # for this process to end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)


def _global_rank(local_rank):
    count = os.environ.get("PJRT_LOCAL_PROCESS_COUNT")
    if count is None:
        os.environ["RANK"] = str(local_rank)  # all workers are on this host
        return local_rank
    from torch_xla import runtime
    from torch_xla._internal import pjrt

    try:
        pjrt.initialize_multiprocess(local_rank, int(count))
    except RuntimeError as error:
        runtime_name, reason = os.environ["PJRT_DEVICE"], str(error).strip().splitlines()[0]
        raise UserError(f"device: the {runtime_name} runtime does not start ({reason})") from None
    return runtime.global_ordinal()  # ordinals are not in the order of hosts or chips
