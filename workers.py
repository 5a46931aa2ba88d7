"""Starting the workers of a run on this host, one process a device, and ending with one exit
status."""

import importlib.util
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time

import preemption
import tpu_types
from config import Config, batch_fault, planned_workers
from device import Device, resolve_device
from utils import UserError, run_cli

END_TOGETHER_SECONDS = 60  # for the other workers to end by themselves once one has


def launch(function, config, *args):
    """Run function(rank, config, *args) once in every worker of this host; returns the exit status.

    TPU (and XLA on the CPU): one process a device of this host; the command runs on each host of
    the slice. CUDA and CPU: `training.num_workers` processes of this host, or, under torchrun, this
    process alone: one of its workers. function returns an exit status (None: 0). The status of
    several workers is the first that was not 0. Raises UserError where device = tpu and this host
    has no TPU.
    """
    preemption.listen()
    name = resolve_device(config.device)
    if name in ("tpu", "xla_cpu"):
        os.environ["PJRT_DEVICE"] = "TPU" if name == "tpu" else "CPU"
        count = local_tpu_processes() if name == "tpu" else 1
        # as torch_xla.launch lays its processes out. Its pool answers the death of one by SIGTERM
        # to the others, and drops their statuses and messages: what was a crash would look like a
        # preemption
        environment = {"PJRT_LOCAL_PROCESS_COUNT": str(count)}
        return _supervise(function, count, environment, config, *args)
    count = planned_workers(config)
    if "RANK" in os.environ or count == 1:
        preemption.listen_to_keyboard()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            preemption.listen_to_metadata_server()
        return function(int(os.environ.get("RANK", 0)), config, *args)
    import torch.distributed as dist

    # the store lies in this process, as with torchrun, and so survives whichever worker dies
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return _supervise(function, count, environment, config, *args)


def local_tpu_processes() -> int:
    """How many processes this host's TPU chips want. Raises UserError if there are none."""
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


def start_alone(device):
    """Before a Device is made: this process is the only worker, of a TPU slice with one chip of
    this host. device: its name. Raises UserError where that is tpu and this host has none."""
    if resolve_device(device) == "tpu":
        os.environ["PJRT_DEVICE"] = "TPU"
        local_tpu_processes()
        from torch_xla._internal import tpu

        tpu.configure_one_chip_topology()  # or its runtime would wait for the other hosts' processes


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
    # a process that has imported PyTorch, and nothing else, forks them: the import costs each of
    # them seconds
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo"])
    processes = [
        context.Process(target=_child, args=(environment, function, local_rank, *args))
        for local_rank in range(count)
    ]
    preemption.disable_immediate_exit()
    # a worker is born with these held back, until it listens, and so is that process. The tracker
    # first: its start would let them through again
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
        print(
            "interrupted: the workers save and end; once more to kill them",
            file=sys.stderr,
            flush=True,
        )
        try:
            _terminate(processes)
            _wait(processes)
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
        return 130


def _wait(processes):
    """The first status of a worker that was not 0, or 0, once all have ended."""
    status, running, deadline, killed = (
        0,
        {process.sentinel: process for process in processes if process.exitcode is None},
        None,
        set(),
    )
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait(list(running), left)
        if not ended:
            for process in running.values():
                print(
                    f"warning: worker {processes.index(process)} did not end by itself and is killed",
                    file=sys.stderr,
                )
                process.kill()
                killed.add(process)
            deadline = None  # a kill takes a moment
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode < 0 and process not in killed:
                print(
                    f"error: worker {processes.index(process)} was killed by signal {-process.exitcode}",
                    file=sys.stderr,
                )
            if status == 0 and process.exitcode:
                status = process.exitcode if process.exitcode > 0 else 1
                deadline = time.monotonic() + END_TOGETHER_SECONDS
                if status == preemption.EXIT_STATUS:
                    _terminate(processes)  # it left before it could tell the others
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
    # before the TPU's runtime starts: it would put its own handler in the default one's place
    preemption.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    die_with_parent()
    os.environ.update(environment)
    os.environ["LOCAL_RANK"] = str(local_rank)
    if local_rank == 0:
        preemption.listen_to_metadata_server()
    try:
        run_cli(lambda: function(_global_rank(local_rank), *args))
    except SystemExit as end:
        if (
            end.code
        ):  # at once: gloo's destructors would wait for the fellow workers, which wait for this one
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
        raise UserError(
            f"device: the {os.environ['PJRT_DEVICE']} runtime does not start ({str(error).strip().splitlines()[0]})"
        ) from None
    return runtime.global_ordinal()  # ordinals are not in the order of hosts or chips


def die_with_parent():
    """End this process (status 1, nothing cleaned up) when the one that started it is gone, however
    it went."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
