"""Trace the training and the evaluation step of a configuration as one worker of its TPU slice, on any machine.

    python analysis/tpu_trace.py FOLDER

analysis/tpu_report.py runs this in a process of its own. Reads FOLDER/config.yaml; writes the programs that torch_xla
would compile, FOLDER/train.hlo.pb and FOLDER/evaluation.hlo.pb, and FOLDER/trace.json. Nothing is computed: weights,
optimizer, average and carry are placeholders without memory, so that a configuration of any size can be traced.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# one process of many: without it torch_xla leaves the all-reduce out of a program of one process. What this CPU itself computes, for the
# host's time, would take longer to compile than to run
os.environ.update(
    PJRT_DEVICE="CPU", XLA_ALWAYS_ALLREDUCE="1", XLA_FLAGS="--xla_backend_optimization_level=0"
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch_xla
import tpu_hlo
from torch_xla.core.xla_builder import create_placeholder_tensor

import tpu_types
import trm_model
from config import load_config
from device import Device, tree_map
from mixing import num_kernels
from train_state import TrainState, load_dataset, settle_forward_dtype
from utils import UserError, run_cli
from xla_program import changed_places, places

SUDOKU_EXTREME_TEST_PUZZLES = 422_786
WARMUP_STEPS, TIMED_STEPS, TIMED_EXAMPLES = 3, 15, 8


def main():
    folder = Path(sys.argv[1])
    config = load_config(folder / "config.yaml")
    dataset, known = training_puzzles(config)
    device = TracedDevice(tpu_types.slice_type(config.tpu.accelerator_type))
    config = settle_forward_dtype(config, device)
    run = traced_run(config, device, dataset)
    batch = run.loader.batch(0)
    device.follow(run)

    # ----- programs, with the line of code that each operation comes from -----
    torch_xla._XLAC._set_ir_debug(True)
    train_step(run, batch)
    programs = [
        {"name": "train" if k == 0 else f"train_{k + 1}", **program}
        for k, program in enumerate(device.programs)
    ]
    programs.append({"name": "evaluation", **trace_evaluation(run, dataset)})
    torch_xla._XLAC._set_ir_debug(False)
    for program in programs:
        (folder / f"{program['name']}.hlo.pb").write_bytes(program.pop("hlo"))

    # ----- host time -----
    per_step = host_milliseconds(run, batch, dataset)
    per_evaluation_step = milliseconds(lambda: trace_evaluation(run, dataset, keep=False))
    per_chip = config.training.global_batch_size // device.workers.world_size
    trace = {
        "programs": programs,
        "host_ms_per_step": statistics.median(per_step),
        "host_ms_range": [min(per_step), max(per_step)],
        "evaluation_host_ms_per_step": statistics.median(per_evaluation_step),
        "parameters": trm_model.num_parameters(run.model),
        "per_chip_batch": per_chip,
        "sequence_length": run.model.length,
        "model_flops_per_chip_step": per_chip
        * trm_model.step_flops_per_example(run.model, train=True),
        "in_kernel": in_kernel(run.model),
        "num_puzzles": dataset.num_puzzles,
        "dataset": known,
        **split_sizes(config),
    }
    (folder / "trace.json").write_text(json.dumps(trace))


def train_step(run, batch):
    run.train_step(run.device.put(run.host_batch(batch)))
    run.device.end_step()


class TracedDevice(Device):
    """The first worker of a tpu_types.Slice. Where another device would compile and run what is pending, this one keeps the program."""

    def __init__(self, slice_):
        super().__init__("xla_cpu")
        self.workers.world_size, self.generation = slice_.chips, slice_.generation
        self.programs = []

    def follow(self, run):
        """Its steps are the programs to come."""
        self.tensors = run.tensors
        self.places = places(run.tensors())

    def end_step(self):
        self.programs.append(pending_program(self.tensors(), self.places))
        torch_xla._XLAC._clear_pending_irs(
            str(self.torch)
        )  # the results become placeholders; so does the all-reduce's token
        self.places = places(self.tensors())


def traced_run(config, device, dataset):
    """TrainState with placeholders for all that it holds on the device."""
    device.torch, xla = torch.device("meta"), device.torch
    with torch.device("meta"):
        run = TrainState(config, device, dataset)
    device.torch = xla
    if config.training.pallas_kernels:
        import pallas_mixing

        for model in (run.model, run.ema.module) if run.ema else (run.model,):
            pallas_mixing.use(model, device.generation)
    for tensor in run.tensors():
        become_placeholder(tensor)
    return run


def in_kernel(model):
    """{"token mixing", "channel mixing": whether it is a kernel}; of self-attention only the latter."""
    names = {1: "token mixing", 2: "channel mixing"}
    swiglus = model.L_level.layers[0].swiglus()
    return {names[axis]: num_kernels(swiglu) == 1 for axis, swiglu in swiglus}


def become_placeholder(tensor):
    new = create_placeholder_tensor(tensor.shape, tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)  # the optimizer and the average know this very tensor


def pending_program(tensors, places_before):
    """The program that computes what is pending of `tensors`: its HLO protobuf; the FLOPs of its products; and the arguments whose
    memory results may take: what was in the places that now have another tensor (as XLAProgram gives it away)."""
    xla = torch_xla._XLAC
    changed = changed_places(tensors)
    outputs = [tensors[place] for place in changed]
    arguments, _ = xla._get_tensors_xla_device_data_node(outputs)
    return {
        "hlo": xla._get_xla_tensors_hlo_proto(outputs),
        "flops": tpu_hlo.product_flops(xla._get_xla_tensors_hlo(outputs)),
        "donated": [
            k for k, tensor_id in enumerate(arguments) if places_before.get(tensor_id) in changed
        ],
    }


def host_milliseconds(run, batch, dataset):
    """Milliseconds of the main thread for each of TIMED_STEPS training steps, from the batch to the started program. A replayed step
    costs the host by the number of its tensors, whatever is in them: so it is that of the same model at the least width, number of
    cycles and batch, which the CPU computes meanwhile; the batch of the run itself comes on top."""
    model, training = run.config.model, run.config.training
    small = TrainState(
        dataclasses.replace(
            run.config,
            model=dataclasses.replace(
                model,
                hidden_size=8 * model.num_heads,
                H_cycles=1,
                L_cycles=1,
                puzzle_emb_ndim=min(model.puzzle_emb_ndim, 8),
            ),
            training=dataclasses.replace(
                training, global_batch_size=TIMED_EXAMPLES * training.grad_accumulation_steps
            ),
        ),
        Device("xla_cpu"),
        dataset,
    )
    few = small.loader.batch(0)

    def timed():
        small.run_step(small.device.put(small.host_batch(few)))
        small.step += 1

    steps = milliseconds(timed, lambda: small.device.fetch(small.totals))
    batches = milliseconds(lambda: small.device.put(run.host_batch(batch)))
    return [sum(both) for both in zip(steps, batches)]


def milliseconds(function, wait=lambda: None):
    """Milliseconds that the main thread computes in each of TIMED_STEPS calls; wait() follows each of them, untimed."""
    taken = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.thread_time()  # and no clock on the wall: others may be using this machine
        function()
        taken.append(1e3 * (time.thread_time() - start))
        wait()
    return taken[WARMUP_STEPS:]


@torch.no_grad()
def trace_evaluation(run, dataset, keep=True):
    """The program of evaluation.evaluate, at its batch of one worker. keep=False: for the time it takes, as a run does for a program
    that it has compiled."""
    size = run.config.evaluation.batch_size
    with torch.device("meta"):
        carry = run.model.empty_carry(size)
    carry = tree_map(lambda t: create_placeholder_tensor(t.shape, t.dtype), carry)
    cells = np.zeros((size, dataset.seq_len), np.uint8)
    batch = run.device.put(
        {"inputs": cells, "labels": cells, "puzzle_identifiers": np.zeros(size, np.int32)}
    )
    carry, scores = trm_model.evaluation_step(run.model, carry, batch)
    program = (
        pending_program([*carry, scores], {})
        if keep
        else torch_xla._XLAC._get_graph_hash([*carry, scores])
    )
    torch_xla._XLAC._clear_pending_irs(str(run.device.torch))
    return program


# ---------------------------------------------------------------------------------------------------------
# The puzzles: the dataset's where it is on this machine, otherwise as many of 9x9 as the configuration expects
# ---------------------------------------------------------------------------------------------------------
def training_puzzles(config):
    """(what TrainState needs of a dataset, where it comes from)."""
    path, count = config.data.dataset_path, config.data.expected_puzzles
    if (Path(path) / "train" / "dataset.json").exists():
        return load_dataset(config, "train"), path
    if count is None:
        raise UserError(
            f"data.expected_puzzles = null: {path} is not on this machine: set the number of training puzzles that it has"
        )
    cells, numbers = np.full((count, 81), 2, np.uint8), np.arange(count + 1)
    return SimpleNamespace(
        inputs=cells,
        labels=cells,
        puzzle_identifiers=np.zeros(count, np.int32),
        group_indices=numbers,
        num_puzzles=count,
        size=9,
        seq_len=81,
        vocab_size=11,
        num_puzzle_identifiers=1,
        fingerprint="",
    ), "assumed: 9x9, data.expected_puzzles"


def split_sizes(config):
    """Examples of each split that is evaluated, and where the number of the test split comes from (None: it is assumed)."""
    sizes, known = {"test": SUDOKU_EXTREME_TEST_PUZZLES}, None
    for split in (config.evaluation.split, "test"):
        meta = Path(config.data.dataset_path) / split / "dataset.json"
        if meta.exists():
            sizes[split] = len(
                np.load(meta.with_name("all__puzzle_identifiers.npy"), mmap_mode="r")
            )
            if split == "test":
                known = config.data.dataset_path
    sizes.setdefault(config.evaluation.split, sizes["test"])
    return {"split_sizes": sizes, "test_dataset": known}


if __name__ == "__main__":
    run_cli(main)
