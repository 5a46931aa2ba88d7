"""The steps of tests/programs/xla_replicas.py on the plain CPU, as one worker.

    python tests/programs/one_worker.py CONFIG FILE [section.key=value ...]

What the run holds after every step is written to FILE, with the distance that two computations of
the first z_H in float32 may have from each other (tests/exact.py).
"""

import sys

import torch

from config import load_config
from device import Device
from tests import exact
from train_state import TrainState, load_dataset
from trm_model import TinyRecursiveModel

STEPS = 4


def tolerance(model: TinyRecursiveModel, carry) -> float:
    """How far one float32 result for z_H may be from another, relative to max(1, max |z_H|)."""
    weights = dict(model.named_parameters())
    ((_, tolerances),) = exact.tolerances(
        model.config, weights, carry, model.puzzle_rows(carry), model.rope
    )
    return 2 * tolerances["z_H"]


def main():
    config = load_config(sys.argv[1], sys.argv[3:])
    run = TrainState(config, Device("cpu"), load_dataset(config, "train"))
    batches, seen = iter(run.loader), []
    content = {"start": [p.detach().clone() for p in run.model.parameters()], "steps": seen}
    for step in range(STEPS):
        batch = run.device.put(run.host_batch(next(batches)))
        if step == 0:
            content["tolerance"] = tolerance(run.model, run.model.admit(run.carry, batch))
        run.train_step(batch)
        run.step += 1
        seen.append(
            {
                "totals": run.totals,
                "weights": [p.detach().clone() for p in run.model.parameters()],
                "ema": [p.clone() for p in run.ema.module.parameters()],
                "halted": run.carry.halted,
                "z_H": run.carry.z_H,
            }
        )
    batches.close()
    torch.save(content, sys.argv[2])


if __name__ == "__main__":
    main()
