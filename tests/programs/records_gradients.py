"""The training command. Rank 0 writes the summed gradient of each step, as the optimizer gets it,
to the folder argv[1].
"""

import os
import sys

import torch

import train_state
import train_tpu
import utils

sys.argv[0] = "train_tpu.py"


class Recorder:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rank, config, args):
        create = train_state.create_optimizer

        def recording(config, model):
            optimizer, puzzle_optimizer = create(config, model)
            step, count = optimizer.step, [0]

            def recorded(lr):
                count[0] += 1
                if rank == 0:
                    grads = [p.grad for p in model.parameters()]
                    torch.save(grads, os.path.join(self.folder, f"grad{count[0]}.pt"))
                step(lr)

            optimizer.step = recorded
            return optimizer, puzzle_optimizer

        train_state.create_optimizer = recording
        return worker(rank, config, args)


worker = train_tpu.train_worker
if __name__ == "__main__":
    folder = sys.argv.pop(1)
    os.makedirs(folder, exist_ok=True)
    train_tpu.train_worker = Recorder(folder)
    utils.run_cli(train_tpu.main)
