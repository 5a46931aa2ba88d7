#!/usr/bin/env python3
"""Check that all chips of a slice are seen, and that an all-reduce over them gives the right sum.
Run it on every host at once.

    python scripts/check_devices.py --config configs/e1_1.yaml
    # two workers of this CPU:
    python scripts/check_devices.py --config configs/quickstart.yaml training.num_workers=2
    # and train a few steps:
    python scripts/check_devices.py --config configs/quickstart.yaml --steps
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import io
import os
import random
import socket
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "analysis")]
import numpy as np
import torch

import sudoku
import trm_model
import workers
from config import load_config
from device import Device, resolve_device
from mixing import num_kernels
from train_state import TrainState, settle_forward_dtype
from utils import RunFailure, run_cli

LENGTH = 1 << 20  # float32 numbers in the all-reduce: 4 MB
STEPS = 6  # trained under --steps; the first one compiles
PUZZLES = 1000  # made up for them
# The largest relative differences that are accepted between steps with the TPU kernels and steps
# without. Both round to bfloat16, in different places. STATE_TOLERANCE is for the carry after a
# step: if each of the 84 SwiGLUs of configs/e1_1.yaml is off by the usual 0.004, this adds up to
# 0.34 at most, while two unrelated states differ by 1.4. The loss alone would show nothing: at the
# start it is that of guessing.
LOSS_TOLERANCE, NORM_TOLERANCE, STATE_TOLERANCE = 0.02, 0.1, 0.4


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration"
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help="also train a few steps on made-up puzzles, without the TPU "
        "kernels and with them; a CPU trains a model of the least size",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="after so long each worker prints where it is, and ends with status 1",
    )
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if args.steps and resolve_device(config.device) in ("cpu", "xla_cpu"):
        config = of_least_size(config)
    args.deadline = args.limit and time.monotonic() + args.limit
    return workers.launch(check_worker, config, args)


def check_worker(rank, config, args):
    """Join the other workers, as training does, and check an all-reduce over all of them.

    args: steps (whether to train some, too), and deadline by time.monotonic(), or None. Raises
    RunFailure if a number is wrong.
    """
    if args.deadline:
        faulthandler.dump_traceback_later(max(1.0, args.deadline - time.monotonic()), exit=True)
    device = Device(config.device)
    config = settle_forward_dtype(config, device)
    rank, world_size = device.workers.rank, device.workers.world_size
    with device.workers.together():
        workers.check_workers(config, device)
    wrong = check_sum(device)
    with device.workers.together():
        if wrong:
            raise RunFailure(wrong)
    print(
        f"worker {rank} of {world_size} on {socket.gethostname()}: device {device.name}, the "
        "all-reduce is right",
        flush=True,
    )
    if args.steps:
        passed("all-reduce", f"the sum over {world_size} worker(s) is right")
        check_steps(config, device)
    faulthandler.cancel_dump_traceback_later()
    device.workers.leave()


def passed(name, text):
    """Print, once on each host, that a part has passed, in the form that scripts/diagnose.py
    reads."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"[PASS] {name}: {text}", flush=True)


def check_sum(device):
    """What is wrong with the sum over all workers of rank + 1 in float32, or None."""
    rank, world_size = device.workers.rank, device.workers.world_size
    (total,) = device.workers.all_reduce([device.put(torch.full((LENGTH,), rank + 1.0))])
    device.end_step()
    expected = world_size * (world_size + 1) / 2
    wrong = device.fetch(total) != expected
    if wrong.any():
        return (
            f"{socket.gethostname()}: worker {rank} got a wrong sum over the {world_size} workers "
            f"in {int(wrong.sum())} of {LENGTH} elements, the first "
            f"{device.fetch(total)[wrong][0]:g} instead of {expected:g}: delete the slice and ask "
            "for another"
        )


# --------------------------------------------------------------------------------------------------
# --steps
# --------------------------------------------------------------------------------------------------
def of_least_size(config):
    """The configuration at the least width, number of cycles and batch: what a CPU trains in
    seconds."""
    model, training = config.model, config.training
    batch = (
        8
        * int(os.environ.get("WORLD_SIZE", training.num_workers or 1))
        * training.grad_accumulation_steps
    )
    small = dataclasses.replace(
        model,
        hidden_size=8 * model.num_heads,
        H_cycles=1,
        L_cycles=1,
        puzzle_emb_ndim=min(model.puzzle_emb_ndim, 8),
    )
    return dataclasses.replace(
        config, model=small, training=dataclasses.replace(training, global_batch_size=batch)
    )


def made_up_puzzles():
    """PUZZLES Sudokus of 9x9, half of their cells given (solutions are not unique): what TrainState
    needs of a dataset."""
    grid = np.frombuffer(sudoku.random_solution(9, random.Random(0)), np.uint8)[None].repeat(
        PUZZLES, 0
    )
    stream = np.random.Generator(np.random.Philox(0))
    _, solutions = sudoku.SudokuAugmenter(9)(
        sudoku.paired(grid, grid), stream.bit_generator.random_raw(PUZZLES)
    )
    labels = solutions + np.uint8(1)
    inputs = np.where(stream.random(labels.shape) < 0.5, labels, 1).astype(np.uint8)
    return SimpleNamespace(
        inputs=inputs,
        labels=labels,
        puzzle_identifiers=np.zeros(PUZZLES, np.int32),
        group_indices=np.arange(PUZZLES + 1),
        num_puzzles=PUZZLES,
        size=9,
        seq_len=81,
        vocab_size=11,
        num_puzzle_identifiers=1,
        fingerprint="",
    )


def check_steps(config, device):
    """Train STEPS steps of the configuration without the TPU kernels, then with them, from the same
    weights on the same batches. Raises RunFailure where a loss is not finite, a step after the
    first compiles again, the kernels do not work here, or the two disagree."""
    dataset = made_up_puzzles()
    plain = train_steps(config, device, dataset, kernels=False)
    passed("step", as_text(plain))
    fast = train_steps(config, device, dataset, kernels=True)
    # rank 0 alone has the reason why kernels are not used
    warning = device.workers.broadcast_bytes(fast.warning.encode()).decode()
    if warning:
        raise RunFailure(warning)
    with device.workers.together():
        compare(plain, fast)
    if fast.kernels:
        passed("kernels", f"{as_text(fast)}; losses, gradients and states agree with those without")
    else:
        passed(
            "kernels",
            "this configuration uses none on this device; the same steps again agree "
            f"({as_text(fast)})",
        )


def train_steps(config, device, dataset, kernels):
    """Train STEPS steps as train_tpu.py does, and return what was measured:

    losses, norms (of all gradients together), seconds, compiles, executions: one entry a step
    state: [z_H, z_L] of the carry after the first step, float32 on the CPU
    kernels: the number of SwiGLUs that run as kernels; asked: whether kernels were asked for
    warning: the warning that they are not used all the same, or ""
    examples, flops: of one step, over all workers
    peak: FLOP/s of all devices together, None on a CPU
    """
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, pallas_kernels=kernels)
    )
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        run = TrainState(config, device, dataset)
    print(heard.getvalue(), end="", file=sys.stderr, flush=True)
    lines = [
        line
        for line in heard.getvalue().splitlines()
        if line.startswith("warning: the TPU kernels are not used")
    ]
    batch_size = config.training.global_batch_size
    measured = SimpleNamespace(
        losses=[],
        norms=[],
        seconds=[],
        compiles=[],
        executions=[],
        warning="".join(lines),
        kernels=num_kernels(run.model),
        asked=kernels,
        examples=batch_size,
        flops=batch_size * trm_model.step_flops_per_example(run.model, train=True),
        peak=None,
    )
    if device.name in ("tpu", "cuda"):
        peak, *_ = device.peak_flops(run.model.forward_dtype)
        measured.peak = peak * device.workers.world_size
    measure_steps(run, device, measured)
    if any(measured.compiles[1:]):
        raise RunFailure(
            f"a step after the first compiles again (compiles of steps 1 to {STEPS}: "
            f"{measured.compiles}, kernels: {kernels}): each compile takes as long as the first "
            "step"
        )
    return measured


def measure_steps(run, device, measured):
    """Train STEPS steps and append to the lists of `measured`. Raises RunFailure where a loss or a
    gradient is not finite."""
    import benchmark  # only --steps needs what is in analysis/

    keys, counted = (*trm_model.METRIC_KEYS, "grad_norm", "first_bad"), device.counters()
    with contextlib.closing(iter(run.loader)) as batches:
        for number in range(1, STEPS + 1):
            seconds, _ = benchmark.train_steps(run, batches, 1)
            sums = dict(zip(keys, device.fetch(run.totals).tolist()))
            if sums["first_bad"]:
                raise RunFailure(
                    f"the loss or a gradient of step {number} is not finite (kernels: "
                    f"{measured.asked})"
                )
            run.start_interval()
            if number == 1:  # later the weights differ, too
                measured.state = device.fetch([run.carry.z_H.float(), run.carry.z_L.float()])
            if device.is_xla:
                time.sleep(0.2)  # an execution is counted a moment after its result is there
            before, counted = counted, device.counters()
            measured.losses.append(sums["lm_loss"] / measured.examples)
            measured.norms.append(sums["grad_norm"])
            measured.seconds.append(seconds)
            for name, values in (
                ("xla_compiles", measured.compiles),
                ("xla_executions", measured.executions),
            ):
                values.append(counted.get(name, 0) - before.get(name, 0))


def as_text(measured):
    later = measured.seconds[1:]
    median = statistics.median(later)
    share = f", {measured.flops / median / measured.peak:.1%} of the peak" if measured.peak else ""
    return (
        f"loss {measured.losses[0]:.5f} to {measured.losses[-1]:.5f}, gradient norm "
        f"{measured.norms[0]:.4g}; first step {measured.seconds[0]:.1f} s, then {1e3 * median:.1f} "
        f"ms ({1e3 * min(later):.1f} to {1e3 * max(later):.1f}; {measured.examples / median:,.0f} "
        f"examples/s{share}); compiles {measured.compiles}, executions {measured.executions}; "
        f"kernels in {measured.kernels} SwiGLUs"
    )


def compare(plain, fast):
    """Raises RunFailure where two results of train_steps differ by more than roundings explain."""
    for name, ours, theirs in zip(("z_H", "z_L"), fast.state, plain.state):
        off = float((ours - theirs).norm() / theirs.norm())
        if not off <= STATE_TOLERANCE:
            raise RunFailure(
                f"after the first step {name} with the TPU kernels is {off:.2g} (relative) off "
                f"what it is without, and not within {STATE_TOLERANCE}: train with "
                "training.pallas_kernels=false"
            )
    compared = (
        ("loss", fast.losses, plain.losses, LOSS_TOLERANCE),
        ("gradient norm", fast.norms, plain.norms, NORM_TOLERANCE),
    )
    for number in range(STEPS):
        for what, ours, theirs, tolerance in compared:
            off = abs(ours[number] - theirs[number]) / abs(theirs[number])
            if not off <= tolerance:
                raise RunFailure(
                    f"step {number + 1}: the {what} is {ours[number]:.5g} with the TPU kernels and "
                    f"{theirs[number]:.5g} without, {off:.1%} apart and not within "
                    f"{tolerance:.0%}: train with training.pallas_kernels=false"
                )


if __name__ == "__main__":
    run_cli(main)
