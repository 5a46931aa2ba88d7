"""Measure what a configuration does on the present device.

    python analysis/benchmark.py --config configs/quickstart.yaml
    python analysis/benchmark.py --config configs/e1_1.yaml device=cuda

Loader examples/s on one core (processor time of the loader's thread), training steps/s, evaluation puzzles/s, and
the seconds of a checkpoint: median and range of several runs.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_tpu
import trm_model
import utils
from checkpoint_manager import CheckpointManager
from device import Device
from storage import BackgroundSaver, open_folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each figure (default: 5)")
    args = parser.parse_intermixed_args()
    config = utils.load_config(args.config, args.overrides)
    device = Device(config.device)
    datasets = {split: train_tpu.load_dataset(config, split) for split in ("train", "test")}
    run = train_tpu.Run(config, device, datasets["train"])
    batch_size = config.training.global_batch_size
    print(f"{args.config} on {device.name}: batch {batch_size}, {trm_model.num_parameters(run.model):,} parameters")
    row("loader", [loader_rate(run, seconds=1.0) for _ in range(args.runs)], "examples/s of one core")

    forward, eval_forward = (device.compiled(f, config.training.compile) for f in (trm_model.act_step, trm_model.evaluation_step))
    train_seconds(run, forward, steps=2)          # compiles
    rates = [1 / train_seconds(run, forward, steps=10) for _ in range(args.runs)]
    row("training", rates, "steps/s")
    row("training", [rate * batch_size for rate in rates], "examples/s")
    flops = batch_size * trm_model.step_flops_per_example(run.model, train=True)
    peak, source = device.peak_flops()
    row("training", [100 * rate * flops / peak for rate in rates], f"% of {peak / 1e12:.2f} TFLOP/s ({source})")

    def evaluation_rate():
        return train_tpu.evaluate(run.model, datasets["test"], device, config.evaluation.batch_size, eval_forward,
                                  max_examples=config.evaluation.batch_size)["puzzles_per_second"]
    evaluation_rate()                             # compiles
    row("evaluation", [evaluation_rate() for _ in range(args.runs)], "puzzles/s")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointManager(open_folder(folder), 1, folder, BackgroundSaver())
        row("checkpoint", [save_seconds(run, checkpoints) for _ in range(args.runs)], "s")
    for key, value in device.counters().items():
        print(f"{key} {value:,}")


def row(name, values, unit):
    print(f"{name:<12} {statistics.median(values):>14,.2f} {unit}  ({min(values):,.2f} to {max(values):,.2f})", flush=True)


def loader_rate(run, seconds):
    """Examples per second of processor time: batches made one after the other, no thread beside."""
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        run.loader.batch(count)
        count += 1
    return count * run.config.training.global_batch_size / (time.process_time() - start)


def train_seconds(run, forward, steps):
    """Seconds of a training step, over `steps` of them, the loader's work included."""
    batches = iter(run.loader)
    start = time.perf_counter()
    for _ in range(steps):
        train_tpu.train_step(run, run.device.put(train_tpu.host_batch(run, next(batches))), forward)
        run.device.end_step()
        run.step += 1
    run.device.fetch(run.totals)
    batches.close()
    return (time.perf_counter() - start) / steps


def save_seconds(run, checkpoints):
    start = time.perf_counter()
    checkpoints.save(run.step, run.state_dict())
    checkpoints.saver.finish()
    return time.perf_counter() - start


if __name__ == "__main__":
    utils.run_cli(main)
