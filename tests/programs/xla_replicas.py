"""Training steps as one program over four XLA CPU devices.

    python tests/programs/xla_replicas.py CONFIG FILE [section.key=value ...]

The slots are spread over the devices, and each device has the weights; the partitioner adds the
all-reduces. Replicas in threads of one process, each with a program of its own, as on a TPU, would
often deadlock in the CPU runtime. What the run holds after every step is written to FILE.
"""

import os
import sys
import time

os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
import numpy as np
import torch
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime

from config import load_config
from device import Device, tree_map
from train_state import TrainState, load_dataset

STEPS = 4


def main():
    torch_xla.runtime.use_spmd()
    device = Device("xla_cpu")
    mesh = spmd.Mesh(np.arange(4), (4,), ("slots",))

    def spread(tree):
        return tree_map(
            lambda t: spmd.mark_sharding(t, mesh, ("slots", *[None] * (t.dim() - 1))).global_tensor,
            tree,
        )

    config = load_config(sys.argv[1], sys.argv[3:])
    run = TrainState(config, device, load_dataset(config, "train"))
    run.carry = spread(run.carry)
    batches, seen = iter(run.loader), []
    for _ in range(STEPS):
        batch = device.put(run.host_batch(next(batches)))
        batch = {
            **spread({name: t for name, t in batch.items() if name != "scalars"}),
            "scalars": batch["scalars"],
        }
        run.train_step(batch)
        run.carry = spread(run.carry)
        device.end_step()
        run.step += 1
        seen.append(
            device.fetch(
                {
                    "totals": run.totals,
                    "weights": list(run.model.parameters()),
                    "ema": list(run.ema.module.parameters()),
                    "puzzle": run.model.puzzle_emb.weights,
                    "halted": run.carry.halted,
                    "z_H": run.carry.z_H,
                }
            )
        )
    time.sleep(0.5)  # executions are counted a moment after their results are there
    torch.save(
        {
            "steps": seen,
            "counters": device.counters(),
            "devices": torch_xla.runtime.global_runtime_device_count(),
            "sharding": torch_xla._XLAC._get_xla_sharding_spec(run.carry.z_H),
        },
        sys.argv[2],
    )


if __name__ == "__main__":
    main()
