"""The device of one worker: where its tensors are and how its programs run."""

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import torch

import tpu_types
from collectives import Workers
from utils import UserError

# dense bfloat16 FLOP/s of the data sheets; those of TPUs are in tpu_types.py, and any other device
# is measured when a run starts
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
}


def resolve_device(name: str) -> str:
    """Return the name of the device to use: for "auto" the first of "tpu", "cuda" and "cpu" that
    this host has, any other name as it is. Starts no device.

    Raises UserError if the device needs torch_xla and that is not installed.
    """
    has_xla = importlib.util.find_spec("torch_xla") is not None
    if name in ("tpu", "xla_cpu") and not has_xla:
        raise UserError(
            f"device = {name!r}: torch_xla is not installed: pip install -r requirements.txt, "
            "or use device=cpu or cuda"
        )
    if name != "auto":
        return name
    if has_xla and tpu_types.chips_here()[0]:
        return "tpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


class Device:
    """One worker's device, joined with the workers of the run (`workers`, see collectives.py).

    name: "auto" (TPU, then CUDA, then CPU), "tpu", "xla_cpu", "cuda" or "cpu". torch_xla is
    imported for tpu and xla_cpu only. `torch`: the torch.device. `generation`: of a TPU its
    tpu_types.Generation, else None. Raises UserError if there is no such device here, and
    WorkerGone if another worker has not connected within collectives.TIMEOUT_SECONDS.
    """

    def __init__(self, name: str):
        self.name = resolve_device(name)
        self.is_xla = self.name in ("tpu", "xla_cpu")
        self.generation: tpu_types.Generation | None = None
        if self.is_xla:
            self.workers = self._start_xla()
        else:
            self.workers = self._start_cuda() if self.name == "cuda" else self._start_cpu()

    def _start_cpu(self) -> Workers:
        self.torch = torch.device("cpu")
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1:  # the workers of one host share its cores
            on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_host))
        return Workers(int(os.environ.get("RANK", 0)), world_size)

    def _start_cuda(self) -> Workers:
        if not torch.cuda.is_available():
            raise UserError(
                "device = 'cuda': PyTorch sees no CUDA device here: use device=cpu, or install "
                "a CUDA build and its driver"
            )
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"training.num_workers: this host has {torch.cuda.device_count()} CUDA device(s), "
                "one for each worker: start fewer workers"
            )
        self.torch = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.torch)
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        return Workers(rank, world_size, "cpu:gloo,cuda:nccl")

    def _start_xla(self) -> Workers:
        os.environ["PJRT_DEVICE"] = "TPU" if self.name == "tpu" else "CPU"
        # an optional package, and its import starts the runtime's threads
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
                f"device = {self.name!r}: no such device here ({reason}): run on a TPU VM, "
                "or use device=cpu"
            ) from None
        if self.name == "tpu":
            self.generation = tpu_types.chips_here()[1]
            if self.generation is None:
                raise UserError(
                    "device = 'tpu': the chips of this host are none of "
                    f"{', '.join(tpu_types.GENERATIONS)}: ask for a slice such as "
                    f"{tpu_types.EXAMPLES}"
                )
            if torch_xla.runtime.world_size() > 1 and "MASTER_ADDR" not in os.environ:
                from torch_xla._internal.tpu import discover_master_worker_ip

                os.environ["MASTER_ADDR"] = discover_master_worker_ip()
        rank, world_size = torch_xla.runtime.global_ordinal(), torch_xla.runtime.world_size()
        return Workers(rank, world_size, xla_model=torch_xla.core.xla_model)

    def forward_dtype(self, name: str) -> str:
        """The dtype that a configuration's forward_dtype stands for here: "bfloat16" or "float32".

        "auto" is bfloat16. On a CPU that has no instructions for bfloat16 it is float32, because
        such a CPU takes ten times as long in bfloat16.
        """
        if name != "auto":
            return name
        slow = self.name == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "float32" if slow else "bfloat16"

    def set_matmul_precision(self, forward_dtype: str) -> None:
        """Let products of float32 tensors be float32: a TPU rounds their operands to bfloat16
        otherwise.

        To be called before the first program is compiled: torch_xla would not compile it again for
        another precision.
        """
        if self.is_xla and forward_dtype == "float32":
            # torch_xla's public function for this prints a warning at every call
            self._xla._XLAC._xla_set_mat_mul_precision("highest")

    # ----- tensors and programs -----
    def put(self, tree: Any) -> Any:
        """Bring tensors on the CPU and numpy arrays (also in dicts, lists and named tuples) to the
        device, with the same dtypes. Does not wait for the copy.

        On the device "cpu" nothing is copied: the result shares the memory of its source.
        """

        def copy(leaf):
            leaf = torch.as_tensor(leaf)
            # from pageable memory a copy to CUDA would wait for the kernels queued before it
            return (leaf.pin_memory() if self.name == "cuda" else leaf).to(
                self.torch, non_blocking=True
            )

        return tree_map(copy, tree)

    def fetch(self, tree: Any) -> Any:
        """Bring tensors (also in dicts, lists and named tuples) to the CPU, without their autograd
        graph. Waits until they are computed.

        A tensor that is on the CPU already is not copied. Leaves that are no tensors stay as they
        are.
        """
        return tree_map(
            lambda leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf, tree
        )

    def broadcast_parameters(self, module: torch.nn.Module) -> None:
        """Collective. Overwrite the parameters (float32) of `module` with those that rank 0 has.

        Raises WorkerGone.
        """
        if self.workers.world_size == 1:
            return
        params = list(module.parameters())
        flat = torch.cat([tensor.flatten() for tensor in self.fetch(params)])
        self.workers.broadcast(flat)
        if self.workers.rank:
            for param, part in zip(params, flat.split([p.numel() for p in params])):
                # new device data and no copy_, which would be an operation of the next step's
                # program on this worker alone
                param.data = self.put(part.view(param.shape).clone())

    def end_step(self) -> None:
        """On XLA: compile (the first time) and start what was traced since the last call. Does not
        wait for it."""
        if self.is_xla:
            self._xla.sync()

    def traced_once(self, function: Callable, state: Callable[[], list[torch.Tensor]]) -> Callable:
        """On XLA `function` (of a batch) as an XLAProgram over the tensors of state(), elsewhere
        `function` itself.

        An XLAProgram is traced at its first call and replayed after it. It starts its work itself.
        """
        if not self.is_xla:
            return function
        from xla_program import XLAProgram  # needs torch_xla

        return XLAProgram(function, state)

    def compiled(self, function: Callable, when: str) -> Callable:
        """torch.compile(function), or `function` itself. when: the value of training.compile:
        "always", "auto" (on CUDA only) or "never". XLA never gets it, as it compiles anyway."""
        if self.is_xla or when == "never" or (when == "auto" and self.name != "cuda"):
            return function
        return torch.compile(function, dynamic=False)

    # ----- what it has done and can do -----
    def counters(self) -> dict[str, int]:
        """Counts since this process began. On XLA: xla_compiles, xla_executions,
        xla_bytes_to_device and xla_bytes_from_device. On CUDA: peak_memory_bytes, the most bytes
        allocated at once. On the CPU: {}."""
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

    def peak_flops(self, dtype: torch.dtype) -> tuple[float, str]:
        """(peak FLOP/s of this one device, where the number comes from, for messages).

        The data sheet's number for bfloat16. A device that has none here is measured now, by a
        matrix product in `dtype`, which takes 0.2 s or more.
        """
        if self.generation:
            return self.generation.peak_flops, f"TPU {self.generation.name} data sheet"
        model = torch.cuda.get_device_name() if self.name == "cuda" else ""
        for name, peak in PEAK_FLOPS.items():
            if model.startswith(name):
                return peak, f"{name} data sheet"
        size = 8192 if self.name == "cuda" else 512
        # a generator of its own: the global one is part of the run's state
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        a = a.to("cuda" if self.name == "cuda" else "cpu", dtype)
        # the best of many: others may be using this machine
        seconds: list[float] = []
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end or len(seconds) < 8:
            start = time.perf_counter()
            a @ a
            if self.name == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        text = f"a {str(dtype).removeprefix('torch.')} matrix product, measured here"
        return 2 * size**3 / min(seconds), text


def tree_map(function: Callable, tree: Any) -> Any:
    """Apply `function` to the leaves of nested dicts, lists, tuples and named tuples."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, value) for value in tree)
    return function(tree)
