"""The training command, whose weights become NaN before step argv[1]."""

import sys

import torch

import train_tpu
import utils
from train_state import TrainState

at = int(sys.argv[1])
sys.argv = ["train_tpu.py", *sys.argv[2:]]
step = TrainState.train_step


def poisoned(run, *rest):
    if run.step + 1 == at:
        with torch.no_grad():
            run.model.lm_head.weight.fill_(torch.nan)
    step(run, *rest)


TrainState.train_step = poisoned
utils.run_cli(train_tpu.main)
