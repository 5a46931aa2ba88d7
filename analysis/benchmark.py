"""Measure what a configuration does on the present device.

    python analysis/benchmark.py --config configs/quickstart.yaml
    python analysis/benchmark.py --config configs/e1_1.yaml device=cuda --repeats 9 --json cuda.json

One worker with its share of training.global_batch_size is measured, without the other workers; on
a TPU this is one chip. Of a training.curriculum the last stage is measured. Every figure is
measured --repeats times, in turn with the others, and given as median, minimum and maximum:

    step_seconds, steps_per_second, examples_per_second
        a training step as train_tpu.py makes it, with the loader's batch
    model_flops_per_second, mfu
        trm_model.step_flops_per_example a second, and its share of the device's peak
    matmul_seconds, matmul_share
        on CPU and CUDA: the step's matrix products alone, and their share of the step
    host_ms_per_step
        processor time of the main thread in a step, without the loader's batch. On the CPU device
        that thread computes the step, too, so there this is no overhead
    loader_examples_per_second
        batches made one after the other, per second of processor time of one core
    puzzles_per_second
        evaluation of whole batches of test puzzles
    checkpoint_seconds, checkpoint_bytes
        from the device to a complete checkpoint on the local disk

For matmul_seconds one step is run uncompiled, and every matrix product in it is noted, forward and
backward, with shape, strides and dtype (attention as the products that it fuses: two forward, four
backward). Then torch.mm and torch.bmm multiply random matrices of the same kind, as often as the
step does, one product after the other. matmul_share is their time divided by that of the step. At 1
the step would spend all of its time in products as fast as this device makes them. It can be above
1 where the step is faster than torch.mm, as fused attention may be.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import analysis_startup

analysis_startup.require()
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trm_model
import workers
from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager
from config import Config, load_config, planned_workers
from data_loader_tpu import SudokuDatasetTPU, create_dataloader_tpu
from device import Device, resolve_device
from evaluation import evaluate
from provenance import start_record
from run_folder import working_folder
from schedule import Schedule
from storage import open_folder
from train_state import TrainState, load_datasets, settle_forward_dtype
from utils import UserError, check_output_file, replace_file, run_cli

# one measurement takes about so long; what takes longer is called once
SECONDS = 0.5
UNITS = {
    "step_seconds": "s",
    "steps_per_second": "steps/s",
    "examples_per_second": "examples/s",
    "model_flops_per_second": "FLOP/s",
    "mfu": "of the peak",
    "matmul_seconds": "s a step",
    "matmul_share": "of the step",
    "host_ms_per_step": "ms",
    "loader_examples_per_second": "examples/s",
    "puzzles_per_second": "puzzles/s",
    "checkpoint_seconds": "s",
    "checkpoint_bytes": "bytes",
}
Products = Counter[tuple["Operand", "Operand"]]


def parse_args() -> argparse.Namespace:
    """The command line. Raises UserError for a value that makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="measurements of each figure (default: 5)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the figures, and what they were measured on, to this file",
    )
    args = parser.parse_intermixed_args()
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be >= 1")
    if args.json:
        check_output_file("--json", args.json)
    return args


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    datasets = load_datasets(config)
    Schedule.of(config, datasets["train"].num_puzzles)  # refuses what training would refuse
    home = local_folder(config)
    world_size = planned_workers(config, resolve_device(config.device))
    workers.start_alone(config.device)
    device = Device(config.device)
    share = settle_forward_dtype(share_of_one_worker(config, world_size), device)
    state = TrainState(share, device, datasets["train"])
    peak, peak_source = device.peak_flops(state.model.forward_dtype)
    record = start_record(state, datasets, args.config, None)
    batch_size = share.training.global_batch_size
    share_text = f", one of {world_size} workers' share" if world_size > 1 else ""
    print(
        f"{args.config} on {record['device']} ({record['device_model']}): batch {batch_size}"
        f"{share_text}; {record['parameters']:,} parameters; "
        f"peak {peak / 1e12:.2f} TFLOP/s ({peak_source})",
        flush=True,
    )
    measured = measure(state, datasets, peak, args.repeats, home)
    figures = {
        key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for key, values in measured.items()
    }
    counters = device.counters()
    print_figures(figures, counters)
    if args.json:
        content = {
            **record,
            "config": dataclasses.asdict(config),
            "batch_size": batch_size,
            "repeats": args.repeats,
            "peak_flops": peak,
            "peak_source": peak_source,
            **counters,
            "figures": figures,
        }
        replace_file(args.json, json.dumps(content, indent=1) + "\n")
        print(f"written: {args.json}")


def local_folder(config: Config) -> Path:
    """The local folder of the configuration's runs; raises UserError if it cannot be made."""
    home = working_folder(config.logging.output_dir)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"logging.output_dir = {config.logging.output_dir!r}: no folder can be made there "
            f"({error.strerror}): give another"
        ) from None
    return home


def share_of_one_worker(config: Config, world_size: int) -> Config:
    """The configuration of one worker of `world_size`, for a training of its own. It has the
    model's full depth from the start."""
    training = dataclasses.replace(
        config.training,
        global_batch_size=config.training.global_batch_size // world_size,
        num_workers=None,
        curriculum=None,
    )
    return dataclasses.replace(config, training=training)


def print_figures(figures: dict[str, dict[str, float]], counters: dict[str, int]) -> None:
    """A table of the figures, and the device's counters below it."""
    print(f"{'':<28}{'median':>18}{'min':>18}{'max':>18}")
    for key, values in figures.items():
        columns = [
            f"{value:>18,.0f}" if value >= 1000 else f"{value:>18.4g}" for value in values.values()
        ]
        print(f"{key:<28}{''.join(columns)}  {UNITS[key]}")
    for key, value in counters.items():
        print(f"{key:<28}{value:>18,}")


# ------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------
def measure(
    state: TrainState, datasets: dict[str, SudokuDatasetTPU], peak: float, repeats: int, home: Path
) -> dict[str, list[float]]:
    """{figure: its values, one a repeat}; keys and units as in UNITS.

    peak: of the device, FLOP/s. home: a local folder, in which a checkpoint is written and deleted.
    """
    config, device = state.config, state.device
    batch_size = config.training.global_batch_size
    flops = batch_size * trm_model.step_flops_per_example(state.model, train=True)
    # the state's own loader has a thread at work
    loader = create_dataloader_tpu(datasets["train"], config)
    with (
        contextlib.closing(iter(state.loader)) as batches,
        tempfile.TemporaryDirectory(prefix=".benchmark_", dir=home) as folder,
    ):
        products = None if device.is_xla else step_products(state, next(batches))
        checkpoints = CheckpointManager(open_folder(folder), 1, folder, BackgroundWriter())
        evaluation = EvaluationSpeed(state, datasets["test"])

        train_steps(state, batches, 2)  # compiles
        steps = max(1, round(SECONDS / train_steps(state, batches, 1)[0]))
        if products:
            matmul_seconds(products, device, 1)  # loads the libraries' kernels

        measured: dict[str, list[float]] = {}
        for _ in range(repeats):
            seconds, host_seconds = train_steps(state, batches, steps)
            values = {
                "step_seconds": seconds,
                "steps_per_second": 1 / seconds,
                "examples_per_second": batch_size / seconds,
                "model_flops_per_second": flops / seconds,
                "mfu": flops / seconds / peak,
            }
            if products:
                values["matmul_seconds"] = matmul_seconds(products, device, steps)
                values["matmul_share"] = values["matmul_seconds"] / seconds
            values["host_ms_per_step"] = 1e3 * host_seconds
            values["loader_examples_per_second"] = loader_rate(loader)
            values["puzzles_per_second"] = evaluation.rate(evaluation.num_batches)
            seconds, size = save_checkpoint(state, checkpoints)
            values |= {"checkpoint_seconds": seconds, "checkpoint_bytes": size}
            for key, value in values.items():
                measured.setdefault(key, []).append(value)
    return measured


def train_steps(
    state: TrainState, batches: Iterator[dict[str, np.ndarray]], count: int
) -> tuple[float, float]:
    """(seconds, seconds of the main thread's processor time) of one of `count` training steps.

    Waits for the device at the end. batches: of the state's loader, whose part in a step counts
    only in the first number.
    """
    host, start = 0.0, time.perf_counter()
    for _ in range(count):
        batch = next(batches)
        begun = time.thread_time()
        state.advance(batch)
        host += time.thread_time() - begun
    state.device.fetch(state.totals)
    return (time.perf_counter() - start) / count, host / count


class EvaluationSpeed:
    """Evaluates whole batches of test puzzles, as training does, and tells the speed.

    num_batches: as many as take SECONDS, but no more than the dataset fills (at least one).
    """

    def __init__(self, state: TrainState, dataset: SudokuDatasetTPU):
        config = state.config
        self.state, self.dataset, self.batch_size = state, dataset, config.evaluation.batch_size
        self.forward = state.device.compiled(trm_model.evaluation_step, config.training.compile)
        self.rate(1)  # compiles
        puzzles = min(round(SECONDS * self.rate(1)), len(dataset))
        self.num_batches = max(1, puzzles // self.batch_size)

    def rate(self, num_batches: int) -> float:
        """Puzzles a second."""
        ema, puzzles = self.state.ema, num_batches * self.batch_size
        model = ema.ready_module() if ema else self.state.model
        result = evaluate(
            model, self.dataset, self.state.device, self.batch_size, self.forward, puzzles
        )
        assert result  # this is the only worker
        return result["puzzles_per_second"]


def loader_rate(loader: Any) -> float:
    """Examples per second of processor time: the work of the loader's thread, done in this one."""
    start, count = time.thread_time(), 0
    while time.thread_time() - start < SECONDS:
        loader.batch(count)
        count += 1
    return count * loader.global_batch_size / (time.thread_time() - start)


def save_checkpoint(state: TrainState, checkpoints: CheckpointManager) -> tuple[float, int]:
    """(seconds, bytes) of a checkpoint of the present state, until it is complete."""
    start = time.perf_counter()
    content = state.state_dict()
    assert content and checkpoints.writer  # this is the only worker, and saves in the background
    checkpoints.save(state.step, content)
    checkpoints.writer.finish()
    return time.perf_counter() - start, checkpoints.markers()[-1]["bytes"]


# ------------------------------------------------------------------------------
# The matrix products of a step
# ------------------------------------------------------------------------------
class Operand(NamedTuple):
    """What a product's time may depend on."""

    shape: tuple[int, ...]  # [M, N] or [batch, M, N]
    strides: tuple[int, ...]
    dtype: torch.dtype


class ProductRecorder(TorchDispatchMode):
    """While it is entered, counts the matrix products in `products`."""

    def __init__(self, products: Products):
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(*args[:2])
        elif name in ("addmm", "baddbmm"):
            self._add(*args[1:3])
        elif name.startswith("_scaled_dot_product"):
            self._add_attention(args, backward=name.endswith("_backward"))
        return function(*args, **kwargs or {})

    def _add_attention(self, args: tuple, backward: bool) -> None:
        """The products that a fused attention makes."""
        first = 1 if backward else 0  # the backward pass has the gradient of its result first
        # [B * heads, L, head size]
        query, key, value = (tensor.flatten(0, 1) for tensor in args[first : first + 3])
        scores = query.new_empty(()).expand(len(query), query.shape[1], key.shape[1]).contiguous()
        if backward:  # the gradients of V, of the scores, of Q and of K
            pairs = [(scores.mT, value), (value, value.mT), (scores, key), (scores.mT, query)]
        else:
            pairs = [(query, key.mT), (scores, value)]
        for pair in pairs:
            self._add(*pair)

    def _add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.products[
            Operand(tuple(a.shape), a.stride(), a.dtype),
            Operand(tuple(b.shape), b.stride(), b.dtype),
        ] += 1


def step_products(state: TrainState, batch: dict[str, np.ndarray]) -> Products:
    """Make one training step, uncompiled, and count its matrix products."""
    products: Products = Counter()
    compiled, state.forward = state.forward, trm_model.act_step
    with ProductRecorder(products):
        state.advance(batch)
    state.forward = compiled
    return products


@torch.no_grad()
def matmul_seconds(products: Products, device: Device, passes: int) -> float:
    """Seconds of all the products of one step, as a mean over `passes` of them."""
    operands = [
        (random_operand(a, device), random_operand(b, device), count)
        for (a, b), count in products.items()
    ]
    device.fetch(operands[-1][0].flatten()[:1])  # waits until the operands are there
    start = time.perf_counter()
    for _ in range(passes):
        for a, b, count in operands:
            multiply = torch.mm if a.dim() == 2 else torch.bmm
            for _ in range(count):
                result = multiply(a, b)
    device.fetch(result.flatten()[:1])
    return (time.perf_counter() - start) / passes


def random_operand(operand: Operand, device: Device) -> torch.Tensor:
    """A tensor of this shape, these strides and this dtype, of normally distributed numbers."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(operand.shape, operand.strides))
    numbers = torch.randn(reach, dtype=operand.dtype, device=device.torch)
    return numbers.as_strided(operand.shape, operand.strides)


if __name__ == "__main__":
    run_cli(main)
