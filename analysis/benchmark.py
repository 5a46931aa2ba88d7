"""Measure what a configuration does on the present device.

    python analysis/benchmark.py --config configs/quickstart.yaml
    python analysis/benchmark.py --config configs/e1_1.yaml device=cuda --repeats 9 --json e1_1_cuda.json

One worker with its share of training.global_batch_size is measured, without fellow workers; on a TPU one chip. Every figure
is measured --repeats times, all of them in turn, and given as median, minimum and maximum:

    step_seconds, steps_per_second, examples_per_second    a training step as train_tpu.py does it, the loader's batch included
    model_flops_per_second, mfu       trm_model.step_flops_per_example a second, and its share of the device's peak
    matmul_seconds, matmul_share      CPU and CUDA: the step's own matrix products alone, and their share of the step
    host_ms_per_step                  processor time of the main thread, from the batch to the started step; on the CPU
                                      device that thread computes too, so there it is no overhead
    loader_examples_per_second        of one core: batches made one after the other, in the loader thread's processor time
    puzzles_per_second                evaluation of whole batches of test puzzles
    checkpoint_seconds, checkpoint_bytes    from the device to a checkpoint on the local disk of the runs, waited for

matmul_seconds: one step is run eagerly and every matrix product in it noted, forward and backward, by shape, strides and dtype
(attention as the products that it fuses: two forward, four backward). Random operands of the same kind are then multiplied by
torch.mm and torch.bmm, each product as often as the step has it, one after the other in this process. Their time over that of
the step is matmul_share: 1 would be a step of which nothing but products at this device's own pace is left. A share above 1 is
possible where the step multiplies faster than torch.mm does, as fused attention may.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trm_model
import workers
from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager
from config import load_config, planned_workers
from data_loader_tpu import create_dataloader_tpu
from device import Device, resolve_device
from evaluation import evaluate
from provenance import start_record
from run_folder import working_folder
from storage import open_folder
from train_state import TrainState, load_datasets, settle_forward_dtype
from utils import UserError, check_output_file, replace_file, run_cli

SECONDS = 0.5  # one measurement takes about so long, or one call of what takes longer
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


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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


def main():
    args = parse_args()
    config = load_config(args.config, args.overrides)
    datasets = load_datasets(config)
    home = working_folder(config.logging.output_dir)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"logging.output_dir = {config.logging.output_dir!r}: no folder can be made there ({error.strerror}): give another"
        ) from None
    sharing = planned_workers(config, resolve_device(config.device))
    batch_size = config.training.global_batch_size // sharing
    workers.start_alone(config.device)
    share = dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training, global_batch_size=batch_size, num_workers=None
        ),
    )
    device = Device(config.device)
    run = TrainState(settle_forward_dtype(share, device), device, datasets["train"])
    peak, peak_source = run.device.peak_flops(run.model.forward_dtype)
    record = start_record(run, datasets, args.config, None)
    print(
        f"{args.config} on {record['device']} ({record['device_model']}): batch {batch_size}"
        + (f", one of {sharing} workers' share" if sharing > 1 else "")
        + f"; {record['parameters']:,} parameters; peak {peak / 1e12:.2f} TFLOP/s ({peak_source})",
        flush=True,
    )

    measured = measure(run, datasets, peak, args.repeats, home)
    figures = {
        key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for key, values in measured.items()
    }
    print(f"{'':<28}{'median':>18}{'min':>18}{'max':>18}")
    for key, values in figures.items():
        print(
            f"{key:<28}"
            + "".join(
                f"{value:>18,.0f}" if value >= 1000 else f"{value:>18.4g}"
                for value in values.values()
            )
            + f"  {UNITS[key]}"
        )
    counters = run.device.counters()
    print("".join(f"{key:<28}{value:>18,}\n" for key, value in counters.items()), end="")
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


# ------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------
def measure(run, datasets, peak, repeats, home):
    """{figure: its values, one a repeat}; keys and units as UNITS. run: TrainState; peak: FLOP/s; home: a local folder."""
    config, device = run.config, run.device
    loader = create_dataloader_tpu(datasets["train"], config)  # the run's own has a thread at work
    batch_size, evaluation_batch = config.training.global_batch_size, config.evaluation.batch_size
    flops = batch_size * trm_model.step_flops_per_example(run.model, train=True)
    with (
        contextlib.closing(iter(run.loader)) as batches,
        tempfile.TemporaryDirectory(prefix=".benchmark_", dir=home) as folder,
    ):
        products = None if device.is_xla else step_products(run, next(batches))
        eval_forward = device.compiled(trm_model.evaluation_step, config.training.compile)
        step = run.run_step
        checkpoints = CheckpointManager(open_folder(folder), 1, folder, BackgroundWriter())

        def evaluation_rate(num_batches):
            return evaluate(
                run.ema.ready_module() if run.ema else run.model,
                datasets["test"],
                device,
                evaluation_batch,
                eval_forward,
                num_batches * evaluation_batch,
            )["puzzles_per_second"]

        train_steps(run, step, batches, 2)  # compiles
        steps = max(1, round(SECONDS / train_steps(run, step, batches, 1)[0]))
        evaluation_rate(1)  # compiles
        if products:
            matmul_seconds(products, device, 1)  # loads the libraries' kernels
        num_batches = max(
            1, min(round(SECONDS * evaluation_rate(1)), len(datasets["test"])) // evaluation_batch
        )

        measured = {key: [] for key in UNITS if products or not key.startswith("matmul_")}
        for _ in range(repeats):
            seconds, host_seconds = train_steps(run, step, batches, steps)
            values = {
                "step_seconds": seconds,
                "steps_per_second": 1 / seconds,
                "examples_per_second": batch_size / seconds,
                "model_flops_per_second": flops / seconds,
                "mfu": flops / seconds / peak,
                "host_ms_per_step": 1e3 * host_seconds,
            }
            if products:
                values["matmul_seconds"] = matmul_seconds(products, device, steps)
                values["matmul_share"] = values["matmul_seconds"] / seconds
            values["loader_examples_per_second"] = loader_rate(loader)
            values["puzzles_per_second"] = evaluation_rate(num_batches)
            values["checkpoint_seconds"], values["checkpoint_bytes"] = save_checkpoint(
                run, checkpoints
            )
            for key, value in values.items():
                measured[key].append(value)
    return measured


def train_steps(run, step, batches, count):
    """(seconds, seconds of the main thread's processor time) of one of `count` training steps, waited for at the end."""
    host, start = 0.0, time.perf_counter()
    for _ in range(count):
        batch = next(batches)
        begun = time.thread_time()
        step(run.device.put(run.host_batch(batch)))
        if run.ema:
            run.ema.update_after_step(run.model)
        host += time.thread_time() - begun
        run.step += 1
    run.device.fetch(run.totals)
    return (time.perf_counter() - start) / count, host / count


def loader_rate(loader):
    """Examples per second of processor time: the work of the loader's thread, done in this one."""
    start, count = time.thread_time(), 0
    while time.thread_time() - start < SECONDS:
        loader.batch(count)
        count += 1
    return count * loader.global_batch_size / (time.thread_time() - start)


def save_checkpoint(run, checkpoints):
    """(seconds, bytes) of a checkpoint of the present state."""
    start = time.perf_counter()
    checkpoints.save(run.step, run.state_dict())
    checkpoints.writer.finish()
    return time.perf_counter() - start, checkpoints.markers()[-1]["bytes"]


# ------------------------------------------------------------------------------
# The matrix products of a step
# ------------------------------------------------------------------------------
class Operand(NamedTuple):
    """What a product's time may depend on."""

    shape: tuple  # [M, N] or [batch, M, N]
    strides: tuple
    dtype: torch.dtype


class ProductRecorder(TorchDispatchMode):
    """While it is entered, counts the matrix products in `products`, a Counter of (Operand, Operand)."""

    def __init__(self, products):
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(*args[:2])
        elif name in ("addmm", "baddbmm"):
            self._add(*args[1:3])
        elif name.startswith("_scaled_dot_product"):
            query, key, value = (
                t.flatten(0, 1) for t in args[1 if name.endswith("_backward") else 0 :][:3]
            )  # [B * heads, L, head size]
            scores = (
                query.new_empty(()).expand(len(query), query.shape[1], key.shape[1]).contiguous()
            )
            if name.endswith("_backward"):  # the gradients of V, of the scores, of Q and of K
                pairs = (scores.mT, value), (value, value.mT), (scores, key), (scores.mT, query)
            else:
                pairs = (query, key.mT), (scores, value)
            for pair in pairs:
                self._add(*pair)
        return function(*args, **kwargs or {})

    def _add(self, a, b):
        self.products[
            Operand(tuple(a.shape), a.stride(), a.dtype),
            Operand(tuple(b.shape), b.stride(), b.dtype),
        ] += 1


def step_products(run, batch):
    """Do one training step, uncompiled; a Counter of its matrix products (ProductRecorder)."""
    products = Counter()
    with ProductRecorder(products):
        run.train_step(run.device.put(run.host_batch(batch)))
    run.step += 1
    return products


@torch.no_grad()
def matmul_seconds(products, device, passes):
    """Seconds of all the products of one step, over `passes` of them."""
    operands = [
        (*(random_operand(operand, device) for operand in pair), count)
        for pair, count in products.items()
    ]
    device.fetch(operands[-1][0].flatten()[:1])  # the operands are there
    start = time.perf_counter()
    for _ in range(passes):
        for a, b, count in operands:
            multiply = torch.mm if a.dim() == 2 else torch.bmm
            for _ in range(count):
                result = multiply(a, b)
    device.fetch(result.flatten()[:1])
    return (time.perf_counter() - start) / passes


def random_operand(operand, device):
    """A tensor of this shape, these strides and this dtype, normal random numbers."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(operand.shape, operand.strides))
    return torch.randn(reach, dtype=operand.dtype, device=device.torch).as_strided(
        operand.shape, operand.strides
    )


if __name__ == "__main__":
    run_cli(main)
