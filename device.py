"""The device a worker computes on and its fellow workers, behind one small class: the training loop reads as if
there were one device.

Two kinds of collectives. `all_reduce` sums tensors on their device (XLA, nccl or gloo) and is part of the training
step. Everything else passes host memory between the hosts over gloo, whatever the device: on XLA a collective in a
graph that not all replicas run alike would hang the slice.
"""

import contextlib
import datetime
import importlib.util
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

import tpu_types
from utils import UserError, WorkerGone

# dense bfloat16 FLOP/s of the data sheets; TPUs are in tpu_types.py, and any other device is measured when the run starts
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
}
LOST_SECONDS = 300  # without a word from a fellow worker; more than any of them takes on its own


def resolve_device(name):
    """ "auto" as "tpu", "cuda" or "cpu", the first that is here; any other name as it is. Starts no device.
    Raises UserError where it needs torch_xla and that is not installed."""
    has_xla = importlib.util.find_spec("torch_xla") is not None
    if name in ("tpu", "xla_cpu") and not has_xla:
        raise UserError(
            f"device = {name!r}: torch_xla is not installed: pip install -r requirements.txt, or use device=cpu or cuda"
        )
    if name != "auto":
        return name
    on_tpu_vm = has_xla and tpu_types.chips_here()[0]
    return "tpu" if on_tpu_vm else "cuda" if torch.cuda.is_available() else "cpu"


def native_dtype(name):
    """ "bfloat16", or "float32" where device `name` is a CPU that has no instructions for bfloat16: it takes ten times as long and more."""
    slow = (
        name in ("auto", "cpu")
        and resolve_device(name) == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return "float32" if slow else "bfloat16"


class Device:
    """One worker's device; rank and world_size say which worker of how many.

    name: "auto" (TPU, then CUDA, then CPU), "tpu", "xla_cpu", "cuda" or "cpu". torch_xla is imported for tpu and
    xla_cpu only. Joins the other workers of the run (see workers.py) and waits for them.
    forward_dtype: of the model to be run. A TPU rounds the operands of every matrix product to bfloat16, also those of float32
    tensors, unless it is "float32".
    Raises UserError where the device is not to be had, WorkerGone where a worker does not come.
    """

    generation = None  # of a TPU: its tpu_types.Generation

    def __init__(self, name, forward_dtype="bfloat16"):
        self.name = name = resolve_device(name)
        self.is_xla = name in ("tpu", "xla_cpu")
        self.rank, self.world_size = (
            int(os.environ.get("RANK", 0)),
            int(os.environ.get("WORLD_SIZE", 1)),
        )
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.is_xla:
            self._start_xla(forward_dtype)
        elif name == "cuda":
            if not torch.cuda.is_available():
                raise UserError(
                    "device = 'cuda': PyTorch sees no CUDA device here: use device=cpu, or install a CUDA build and its driver"
                )
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"training.num_workers: this host has {torch.cuda.device_count()} CUDA device(s), one for each worker: start fewer workers"
                )
            self.torch = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.torch)
        else:
            self.torch = torch.device(name)
            if self.world_size > 1:  # workers of one host share its cores
                torch.set_num_threads(
                    max(
                        1,
                        (os.cpu_count() or 1)
                        // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)),
                    )
                )
        if self.world_size > 1:
            self._join()

    def _start_xla(self, forward_dtype):
        os.environ["PJRT_DEVICE"] = "TPU" if self.name == "tpu" else "CPU"
        import torch_xla
        import torch_xla.core.xla_model
        import torch_xla.debug.metrics
        import torch_xla.runtime

        self._xla = torch_xla
        try:
            self.torch = torch_xla.device()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"device = {self.name!r}: no such device here ({reason}): run on a TPU VM, or use device=cpu"
            ) from None
        if forward_dtype == "float32":
            # before the first program is compiled, which torch_xla would not compile again for it; its public function for this prints
            # a warning at every call
            torch_xla._XLAC._xla_set_mat_mul_precision("highest")
        self.rank, self.world_size = (
            torch_xla.runtime.global_ordinal(),
            torch_xla.runtime.world_size(),
        )
        if self.name == "tpu":
            self.generation = tpu_types.chips_here()[1]
            if self.generation is None:
                raise UserError(
                    f"device = 'tpu': the chips of this host are none of {', '.join(tpu_types.GENERATIONS)}: ask for a slice such as "
                    f"{tpu_types.EXAMPLES}"
                )

    def _join(self):
        if self.name == "tpu" and "MASTER_ADDR" not in os.environ:
            from torch_xla._internal.tpu import discover_master_worker_ip

            os.environ["MASTER_ADDR"] = discover_master_worker_ip()
        os.environ.setdefault("MASTER_PORT", "29500")
        backend = "cpu:gloo,cuda:nccl" if self.name == "cuda" else "gloo"
        with _stdout_closed():  # gloo prints a line from each worker
            self._collective(
                lambda: dist.init_process_group(
                    backend,
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=datetime.timedelta(seconds=LOST_SECONDS),
                )
            )

    def leave(self):
        """Wait for the fellow workers, then part from them: nobody takes its connections away while rank 0 still works."""
        if self.world_size > 1:
            self._collective(dist.barrier)
            dist.destroy_process_group()

    # ----- fellow workers -----
    def _collective(self, operation):
        """operation(), in which a worker that is gone is a WorkerGone."""
        try:
            return operation()
        except (RuntimeError, ValueError) as error:  # gloo, nccl and the store raise these
            reason = str(error).strip().splitlines()[0][:200]
            raise WorkerGone(
                f"worker {self.rank}: another worker is gone or does not answer ({reason}): "
                "run the same command again, it goes on from the last checkpoint"
            ) from None

    def all_reduce(self, tensors):
        """Sums over the workers of a list of float32 tensors on the device, as a list: one collective for all.

        Nothing is gained by starting earlier, with part of the gradients: every weight is used until the end of the
        backward pass.
        """
        if self.world_size == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        if self.is_xla:
            flat = self._xla.core.xla_model.all_reduce(self._xla.core.xla_model.REDUCE_SUM, flat)
        else:
            self._collective(lambda: dist.all_reduce(flat))
        return [
            part.view(tensor.shape)
            for part, tensor in zip(flat.split([tensor.numel() for tensor in tensors]), tensors)
        ]

    def gather(self, tensors):
        """[[tensor of worker 0, of worker 1, ...] for each of a list of CPU tensors] on rank 0, None elsewhere; the
        shapes must be the same on every worker."""
        if self.world_size == 1:
            return [[tensor] for tensor in tensors]
        ours = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        flat = torch.cat(ours)
        received = (
            [torch.empty_like(flat) for _ in range(self.world_size)] if self.rank == 0 else None
        )
        self._collective(lambda: dist.gather(flat, received, dst=0))
        if self.rank:
            return None
        pieces = [worker.split([len(part) for part in ours]) for worker in received]
        return [
            [worker[k].clone().view(tensor.dtype).view(tensor.shape) for worker in pieces]
            for k, tensor in enumerate(tensors)
        ]

    def broadcast_bytes(self, data):
        """The bytes (or None) that rank 0 gives, on every worker."""
        if self.world_size == 1:
            return data
        length = torch.tensor([-1 if data is None else len(data)])
        self._collective(lambda: dist.broadcast(length, src=0))
        if length < 0:
            return None
        buffer = (
            torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            if self.rank == 0
            else torch.empty(int(length), dtype=torch.uint8)
        )
        self._collective(lambda: dist.broadcast(buffer, src=0))
        return buffer.numpy().tobytes()

    def broadcast_parameters(self, module):
        """Give `module` of every worker the parameters (float32) that it has on rank 0."""
        if self.world_size == 1:
            return
        params = list(module.parameters())
        flat = torch.cat([tensor.flatten() for tensor in self.fetch(params)])
        self._collective(lambda: dist.broadcast(flat, src=0))
        if self.rank:
            for param, part in zip(params, flat.split([p.numel() for p in params])):
                # new device data and no copy_: that would be an operation of the next step's graph, on this replica alone
                param.data = self.put(part.view(param.shape).clone())

    def on_all(self, function):
        """function() of this worker, once it has succeeded on every one. What one raises ends them all: a UserError is said
        once, by rank 0; anything else by the worker that raised it, and is a WorkerGone on the others."""
        if self.world_size == 1:
            return function()
        result = failure = None
        try:
            result = function()
        except Exception as error:
            failure = error
        failures = [None] * self.world_size
        mine = failure and (isinstance(failure, UserError), str(failure))
        self._collective(lambda: dist.all_gather_object(failures, mine))
        mistakes = [text for is_mistake, text in filter(None, failures) if is_mistake]
        if mistakes and self.rank == 0:
            raise UserError(mistakes[0])
        if mistakes:
            sys.exit(2)
        if failure:
            raise failure
        if any(failures):
            raise WorkerGone(
                f"worker {self.rank}: another worker has failed ({next(filter(None, failures))[1]})"
            )
        return result

    def start_vote(self, votes):
        """Begin to sum `votes` (CPU integers) over the workers, in place; returns what to wait() for."""
        return self._collective(lambda: dist.all_reduce(votes, async_op=True))

    def wait_for_vote(self, work):
        """Return when the sum that start_vote began is there."""
        self._collective(work.wait)

    def second_store(self):
        """A connection of its own to the run's key-value store, for a thread; None with one worker."""
        if self.world_size == 1:
            return None
        client = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        return dist.PrefixStore(
            f"preemption/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", client
        )

    def store_is_apart(self):
        """Whether the run's key-value store lies in a process that is no worker; else in the one of rank 0."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    # ----- tensors and programs -----
    def put(self, tree):
        """Copy CPU tensors and numpy arrays (also in dicts, lists and named tuples) to the device."""

        def copy(leaf):
            leaf = torch.as_tensor(leaf)
            # from pageable memory a copy to CUDA would wait for the kernels queued before it
            return (leaf.pin_memory() if self.name == "cuda" else leaf).to(
                self.torch, non_blocking=True
            )

        return tree_map(copy, tree)

    def fetch(self, tree):
        """Copy tensors (also in dicts, lists and named tuples) to the CPU; waits for what computes them."""
        return tree_map(
            lambda leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf, tree
        )

    def end_step(self):
        """On XLA: compile (the first time) and start what was traced since the last call. Does not wait for it."""
        if self.is_xla:
            self._xla.sync()

    def traced_once(self, function, state):
        """On XLA: function(batch) as an XLAProgram over the tensors of state(), which starts its work itself; elsewhere function."""
        if not self.is_xla:
            return function
        from xla_program import XLAProgram

        return XLAProgram(function, state)

    def compiled(self, function, when):
        """torch.compile(function) where `training.compile` = `when` asks for it; never on XLA, which compiles anyway."""
        if self.is_xla or when == "never" or (when == "auto" and self.name != "cuda"):
            return function
        return torch.compile(function, dynamic=False)

    def counters(self):
        """So far: on XLA compiles, executions and transferred bytes; on CUDA the most bytes allocated; else nothing."""
        if self.name == "cuda":
            return {"peak_memory_bytes": torch.cuda.max_memory_allocated()}
        if not self.is_xla:
            return {}
        metrics = self._xla.debug.metrics

        def read(name, index):
            data = metrics.metric_data(name)
            return int(data[index]) if data else 0

        return {
            "xla_compiles": read("CompileTime", 0),
            "xla_executions": read("ExecuteTime", 0),
            "xla_bytes_to_device": read("OutboundData", 1),
            "xla_bytes_from_device": read("InboundData", 1),
        }

    def peak_flops(self, dtype):
        """(FLOP/s, where the number comes from): the data sheet's for bfloat16, or a matrix product in `dtype` measured now."""
        if self.generation:
            return self.generation.peak_flops, f"TPU {self.generation.name} data sheet"
        model = torch.cuda.get_device_name() if self.name == "cuda" else ""
        for name, peak in PEAK_FLOPS.items():
            if model.startswith(name):
                return peak, f"{name} data sheet"
        size = 8192 if self.name == "cuda" else 512
        # a generator of its own: the global one is part of the run's state
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(
            "cuda" if self.name == "cuda" else "cpu", dtype
        )
        seconds, end = (
            [],
            time.perf_counter() + 0.2,
        )  # the best of many: others may be using this machine
        while time.perf_counter() < end or len(seconds) < 8:
            start = time.perf_counter()
            a @ a
            if self.name == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(
            seconds
        ), f"a {str(dtype).removeprefix('torch.')} matrix product, measured here"


@contextlib.contextmanager
def _stdout_closed():
    """What C++ code prints to file descriptor 1 in the block goes nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def tree_map(function, tree):
    """Apply `function` to the leaves of nested dicts, lists, tuples and named tuples."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, value) for value in tree)
    return function(tree)
