"""The device a worker computes on, behind one small class: the training loop reads the same on all of them."""
import glob
import importlib.util
import os
import time

import torch

from utils import UserError

# dense bfloat16 FLOP/s of the data sheets; any other device is measured when the run starts
PEAK_FLOPS = {"tpu v4": 275e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12}


class Device:
    """One worker's device.

    name: "auto" (TPU, then CUDA, then CPU), "tpu", "xla_cpu", "cuda" or "cpu". torch_xla is imported for tpu and
    xla_cpu only. Raises UserError where the device is not to be had.
    """

    rank, world_size = 0, 1

    def __init__(self, name):
        if name == "auto":
            on_tpu_vm = glob.glob("/dev/accel[0-9]*") and importlib.util.find_spec("torch_xla")
            name = "tpu" if on_tpu_vm else "cuda" if torch.cuda.is_available() else "cpu"
        self.name, self.is_xla = name, name in ("tpu", "xla_cpu")
        if self.is_xla:
            self._start_xla()
        elif name == "cuda" and not torch.cuda.is_available():
            raise UserError("device = 'cuda': PyTorch sees no CUDA device here: use device=cpu, or install a CUDA build and its driver")
        else:
            self.torch = torch.device(name)

    def _start_xla(self):
        if importlib.util.find_spec("torch_xla") is None:
            raise UserError(f"device = {self.name!r}: torch_xla is not installed: pip install -r requirements.txt, or use device=cpu or cuda")
        os.environ["PJRT_DEVICE"] = "TPU" if self.name == "tpu" else "CPU"
        import torch_xla
        import torch_xla.debug.metrics
        self._xla = torch_xla
        try:
            self.torch = torch_xla.device()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"device = {self.name!r}: no such device here ({reason}): run on a TPU VM, or use device=cpu") from None

    def put(self, tree):
        """Copy CPU tensors and numpy arrays (also in dicts, lists and named tuples) to the device."""
        def copy(leaf):
            leaf = torch.as_tensor(leaf)
            # from pageable memory a copy to CUDA would wait for the kernels queued before it
            return (leaf.pin_memory() if self.name == "cuda" else leaf).to(self.torch, non_blocking=True)
        return tree_map(copy, tree)

    def fetch(self, tree):
        """Copy tensors (also in dicts, lists and named tuples) to the CPU; waits for what computes them."""
        return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf, tree)

    def end_step(self):
        """On XLA: compile (the first time) and start what was traced since the last call. Does not wait for it."""
        if self.is_xla:
            self._xla.sync()

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
        return {"xla_compiles": read("CompileTime", 0), "xla_executions": read("ExecuteTime", 0),
                "xla_bytes_to_device": read("OutboundData", 1), "xla_bytes_from_device": read("InboundData", 1)}

    def peak_flops(self):
        """(FLOP/s, where the number comes from): the data sheet's, or a bfloat16 matrix product measured now."""
        if self.name == "tpu":
            return PEAK_FLOPS["tpu v4"], "TPU v4 data sheet"
        model = torch.cuda.get_device_name() if self.name == "cuda" else ""
        for name, peak in PEAK_FLOPS.items():
            if model.startswith(name):
                return peak, f"{name} data sheet"
        size = 8192 if self.name == "cuda" else 1024
        # a generator of its own: the global one is part of the run's state
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16().to("cuda" if self.name == "cuda" else "cpu")
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            a @ a
            if self.name == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * size ** 3 / min(seconds), "a bfloat16 matrix product, measured here"


def tree_map(function, tree):
    """Apply `function` to the leaves of nested dicts, lists, tuples and named tuples."""
    if isinstance(tree, dict):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(tree_map(function, value) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(function, value) for value in tree)
    return function(tree)
