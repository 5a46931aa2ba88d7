#!/usr/bin/env python3
"""Check that all chips of a slice are seen, and that an all-reduce over them gives the right sum. Run it on every host at once.

    python scripts/check_devices.py --config configs/e1_1.yaml
    python scripts/check_devices.py --config configs/quickstart.yaml training.num_workers=2     # two workers of this CPU
"""
import argparse
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import utils
import workers
from device import Device
from utils import RunFailure

LENGTH = 1 << 20        # float32 numbers in the all-reduce: 4 MB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    args = parser.parse_intermixed_args()
    return workers.launch(check_worker, utils.load_config(args.config, args.overrides))


def check_worker(rank, config):
    """Join the other workers, as training does, and sum a number of each over all."""
    device = Device(config.device)
    device.on_all(lambda: workers.check_workers(config, device))
    device.on_all(lambda: check_sum(device))
    print(f"worker {device.rank} of {device.world_size} on {socket.gethostname()}: device {device.name}, the all-reduce is right", flush=True)
    device.leave()


def check_sum(device):
    """Raises RunFailure where the sum over all workers, of rank + 1 in float32, is not what it must be in every element."""
    total, = device.all_reduce([device.put(torch.full((LENGTH,), device.rank + 1.0))])
    device.end_step()
    expected = device.world_size * (device.world_size + 1) / 2
    wrong = device.fetch(total) != expected
    if wrong.any():
        raise RunFailure(f"{socket.gethostname()}: worker {device.rank} got a wrong sum over the {device.world_size} workers in {int(wrong.sum())} of "
                         f"{LENGTH} elements, the first {device.fetch(total)[wrong][0]:g} instead of {expected:g}: delete the slice and ask for another")


if __name__ == "__main__":
    utils.run_cli(main)
