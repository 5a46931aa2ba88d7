"""Trace a configuration's training step and evaluation step as one worker of its TPU slice.

    python analysis/tpu_trace.py FOLDER

This works on any machine; analysis/tpu_report.py runs it in a process of its own. It reads
FOLDER/config.yaml. It writes the programs that torch_xla would compile, FOLDER/train.hlo.pb and
FOLDER/evaluation.hlo.pb, and FOLDER/trace.json. With a training.curriculum there is a training
program for each stage: train_1, train_2, ... Nothing is computed: weights, optimizer, average and
carry are placeholders without memory, so that a configuration of any size can be traced.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before torch_xla is imported. Without XLA_ALWAYS_ALLREDUCE torch_xla would leave the all-reduce
# out of a program of one process alone. What this CPU computes itself, to measure the host's time,
# would take longer to optimise than to run.
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
from config import Config, load_config
from device import Device, tree_map
from mixing import num_kernels, use_kernels
from schedule import Schedule
from train_state import TrainState, load_dataset, settle_forward_dtype
from utils import UserError, run_cli
from xla_program import changed_places, places

SUDOKU_EXTREME_TEST_PUZZLES = 422_786
WARMUP_STEPS, TIMED_STEPS, TIMED_EXAMPLES = 3, 15, 8
XLAC = torch_xla._XLAC
Batch = dict[str, np.ndarray]
Program = dict[str, Any]


def main() -> None:
    folder = Path(sys.argv[1])
    config = load_config(folder / "config.yaml")
    dataset, dataset_source = training_puzzles(config)
    Schedule.of(config, dataset.num_puzzles)  # refuses what training would refuse
    device = TracedDevice(tpu_types.slice_type(config.tpu.accelerator_type))
    config = settle_forward_dtype(config, device)
    state = traced_state(config, device, dataset)
    batch = state.loader.batch(0)
    stages = training_stages(state)
    programs = trace_programs(state, device, batch, dataset, stages)
    for program in programs:
        (folder / f"{program['name']}.hlo.pb").write_bytes(program.pop("hlo"))

    step_ms = host_milliseconds(state, batch, dataset)
    evaluation_ms = milliseconds(lambda: trace_evaluation(state, dataset, keep=False))
    per_chip = config.training.global_batch_size // device.workers.world_size
    trace = {
        "programs": programs,
        "stages": stages,
        "host_ms_per_step": statistics.median(step_ms),
        "host_ms_range": [min(step_ms), max(step_ms)],
        "evaluation_host_ms_per_step": statistics.median(evaluation_ms),
        "parameters": trm_model.num_parameters(state.model),
        "per_chip_batch": per_chip,
        "sequence_length": state.model.length,
        "in_kernel": in_kernel(state.model),
        "num_puzzles": dataset.num_puzzles,
        "dataset": dataset_source,
        **split_sizes(config),
    }
    (folder / "trace.json").write_text(json.dumps(trace))


# --------------------------------------------------------------------------------------------------
# Programs
# --------------------------------------------------------------------------------------------------
class TracedDevice(Device):
    """The first worker of a slice. It keeps each program that another device would compile and run.

    programs: those of the training steps, in the order in which they were traced, without names.
    """

    def __init__(self, slice_: tpu_types.Slice):
        super().__init__("xla_cpu")
        self.workers.world_size, self.generation = slice_.chips, slice_.generation
        self.programs: list[Program] = []

    def follow(self, state: TrainState) -> None:
        """Keep the programs of this state's steps."""
        self.tensors = state.tensors
        self.places = places(state.tensors())

    def end_step(self) -> None:
        self.programs.append(pending_program(self.tensors(), self.places))
        # the results become placeholders, and so does the all-reduce's token
        XLAC._clear_pending_irs(str(self.torch))
        self.places = places(self.tensors())


def traced_state(config: Config, device: TracedDevice, dataset: Any) -> TrainState:
    """A TrainState that has placeholders for everything that it holds on the device."""
    device.torch, xla = torch.device("meta"), device.torch
    with torch.device("meta"):
        state = TrainState(config, device, dataset)
    device.torch = xla
    if config.training.pallas_kernels:
        assert device.generation, "a slice has one"
        for model in (state.model, state.ema.module) if state.ema else (state.model,):
            use_kernels(model, device.generation)
    for tensor in state.tensors():
        become_placeholder(tensor)
    device.follow(state)
    return state


def become_placeholder(tensor: torch.Tensor) -> None:
    """Turn a tensor into a placeholder of the same shape and dtype on the XLA device.

    It stays the same Python object, because the optimizer and the average refer to it.
    """
    new = create_placeholder_tensor(tensor.shape, tensor.dtype)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)


def training_stages(state: TrainState) -> list[dict[str, Any]]:
    """The stages of training.curriculum, of which a run without one has only one.

    Each has program (the name of its training step's), begin and steps, H_cycles, L_cycles, and
    model_flops_per_chip_step: FLOPs of one chip's part of a step by the model's formula.
    """
    slots = len(state.carry.steps)
    begins = [begin for begin, _ in state.stages]
    found: list[dict[str, Any]] = []
    for (begin, stage), end in zip(state.stages, [*begins[1:], state.total_steps], strict=True):
        cycles = trm_model.Cycles(stage.H_cycles, stage.L_cycles)
        flops = trm_model.step_flops_per_example(state.model, train=True, cycles=cycles)
        found.append(
            {
                "program": f"train_{len(found) + 1}" if len(begins) > 1 else "train",
                "begin": begin,
                "steps": end - begin,
                "H_cycles": stage.H_cycles,
                "L_cycles": stage.L_cycles,
                "model_flops_per_chip_step": slots * flops,
            }
        )
    return found


def trace_programs(
    state: TrainState,
    device: TracedDevice,
    batch: Batch,
    dataset: Any,
    stages: list[dict[str, Any]],
) -> list[Program]:
    """The programs of a training step of each stage and of an evaluation step, as `pending_program`
    has them.

    Each has also a name. The programs say from which line of code each operation comes.
    """
    XLAC._set_ir_debug(True)
    for stage in stages:
        state.step = stage["begin"]
        state.begin_stage()
        state.train_step(device.put(state.host_batch(batch)))
        device.end_step()
    evaluation = trace_evaluation(state, dataset)
    XLAC._set_ir_debug(False)
    names = [*(stage["program"] for stage in stages), "evaluation"]
    programs = [*device.programs, evaluation]
    return [{"name": name, **program} for name, program in zip(names, programs, strict=True)]


@torch.no_grad()
def trace_evaluation(state: TrainState, dataset: Any, keep: bool = True) -> Program:
    """The program of evaluation.evaluate, at its batch size of one worker.

    keep: whether to return the program. Otherwise this returns {}, and only does what a run does on
    the host to start a program that is compiled already (to measure the time of that).
    """
    size = state.config.evaluation.batch_size
    with torch.device("meta"):
        carry = state.model.empty_carry(size)
    carry = tree_map(lambda t: create_placeholder_tensor(t.shape, t.dtype), carry)
    cells = np.zeros((size, dataset.seq_len), np.uint8)
    identifiers = np.zeros(size, np.int32)
    batch = state.device.put({"inputs": cells, "labels": cells, "puzzle_identifiers": identifiers})
    carry, scores = trm_model.evaluation_step(state.model, carry, batch)
    outputs, program = [*carry, scores], {}
    if keep:
        program = pending_program(outputs, {})
    else:
        XLAC._get_graph_hash(outputs)
    XLAC._clear_pending_irs(str(state.device.torch))
    return program


def pending_program(tensors: list[torch.Tensor], places_before: dict[int, int]) -> Program:
    """The program that computes what is pending of `tensors`.

    Returns its HLO protobuf (hlo), the FLOPs of its products (flops), and the numbers of the
    arguments whose memory the results may take (donated). As in XLAProgram these are the old values
    of the tensors that the step has replaced. places_before: xla_program.places before the step.
    """
    changed = changed_places(tensors)
    outputs = [tensors[place] for place in changed]
    arguments, _ = XLAC._get_tensors_xla_device_data_node(outputs)
    donated = [
        k for k, tensor_id in enumerate(arguments) if places_before.get(tensor_id) in changed
    ]
    return {
        "hlo": XLAC._get_xla_tensors_hlo_proto(outputs),
        "flops": tpu_hlo.product_flops(XLAC._get_xla_tensors_hlo(outputs)),
        "donated": donated,
    }


def in_kernel(model: trm_model.TinyRecursiveModel) -> dict[str, bool]:
    """Whether the SwiGLUs of a block run as kernels, such as {"token mixing": True}.

    A block with self-attention has only "channel mixing".
    """
    names = {1: "token mixing", 2: "channel mixing"}
    swiglus = model.L_level.layers[0].swiglus()
    return {names[axis]: num_kernels(swiglu) == 1 for axis, swiglu in swiglus}


# --------------------------------------------------------------------------------------------------
# Time of the host
# --------------------------------------------------------------------------------------------------
def host_milliseconds(state: TrainState, batch: Batch, dataset: Any) -> list[float]:
    """The main thread's milliseconds for each of TIMED_STEPS training steps.

    This is the time from the loader's batch to the started program. What a replayed step costs the
    host depends on the number of its tensors, and not on their sizes. So it is measured with the
    same model at the least width, number of cycles and batch, which this CPU can compute. Added to
    it is the time for a batch of the real size.
    """
    model, training = state.config.model, state.config.training
    small_model = dataclasses.replace(
        model,
        hidden_size=8 * model.num_heads,
        H_cycles=1,
        L_cycles=1,
        puzzle_emb_ndim=min(model.puzzle_emb_ndim, 8),
    )
    batch_size = TIMED_EXAMPLES * training.grad_accumulation_steps
    small_training = dataclasses.replace(training, global_batch_size=batch_size)
    config = dataclasses.replace(state.config, model=small_model, training=small_training)
    small = TrainState(config, Device("xla_cpu"), dataset)
    small_batch = small.loader.batch(0)

    def step():
        small.run_step(small.device.put(small.host_batch(small_batch)))
        small.step += 1

    steps = milliseconds(step, lambda: small.device.fetch(small.totals))
    batches = milliseconds(lambda: small.device.put(state.host_batch(batch)))
    return [sum(both) for both in zip(steps, batches)]


def milliseconds(
    function: Callable[[], Any], wait: Callable[[], Any] = lambda: None
) -> list[float]:
    """The main thread's milliseconds of processor time for each of TIMED_STEPS calls.

    Processor time, because others may be using this machine. wait: is called after each call, and
    not measured.
    """
    taken = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        start = time.thread_time()
        function()
        taken.append(1e3 * (time.thread_time() - start))
        wait()
    return taken[WARMUP_STEPS:]


# --------------------------------------------------------------------------------------------------
# The puzzles
# --------------------------------------------------------------------------------------------------
class AssumedPuzzles(SimpleNamespace):
    """What a training needs of a dataset that is not on this machine."""

    def __len__(self) -> int:
        return len(self.inputs)


def training_puzzles(config: Config) -> tuple[Any, str]:
    """(what TrainState needs of a dataset, where it comes from).

    Without the dataset on this machine there are data.expected_puzzles empty puzzles of 9x9 cells.
    Raises UserError if that is null.
    """
    path, count = config.data.dataset_path, config.data.expected_puzzles
    if (Path(path) / "train" / "dataset.json").exists():
        return load_dataset(config, "train"), path
    if count is None:
        raise UserError(
            f"data.expected_puzzles = null: {path} is not on this machine: set the number of "
            "training puzzles that it has"
        )
    cells = np.full((count, 81), 2, np.uint8)
    dataset = AssumedPuzzles(
        inputs=cells,
        labels=cells,
        puzzle_identifiers=np.zeros(count, np.int32),
        group_indices=np.arange(count + 1),
        num_puzzles=count,
        size=9,
        seq_len=81,
        vocab_size=11,
        num_puzzle_identifiers=1,
        fingerprint="",
    )
    return dataset, "assumed: 9x9, data.expected_puzzles"


def split_sizes(config: Config) -> dict[str, Any]:
    """The number of examples of each split that is evaluated (split_sizes).

    test_dataset: where that of the test split comes from, or None if it is assumed.
    """
    sizes, source = {"test": SUDOKU_EXTREME_TEST_PUZZLES}, None
    for split in (config.evaluation.split, "test"):
        folder = Path(config.data.dataset_path) / split
        if (folder / "dataset.json").exists():
            sizes[split] = len(np.load(folder / "all__puzzle_identifiers.npy", mmap_mode="r"))
            if split == "test":
                source = config.data.dataset_path
    sizes.setdefault(config.evaluation.split, sizes["test"])
    return {"split_sizes": sizes, "test_dataset": source}


if __name__ == "__main__":
    run_cli(main)
