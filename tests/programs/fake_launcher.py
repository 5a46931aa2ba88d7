"""The launcher of sweeps with another training, without its checks of datasets and slices, and with
short times. argv: the name of its host or "", the training (a program, or "slow"), then its own.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import sweep
import sweep_cells
import sweep_launcher
import sweep_state

import run_lock
import utils

host, training = sys.argv[1:3]
sys.argv = ["sweep.py", *sys.argv[3:]]
# A lock that another process watches is renewed more often than it is watched for: a busy machine
# may be late.
sweep_state.BEAT_SECONDS = 0.2 if host else 0.7
sweep_launcher.LOOK_SECONDS, run_lock.GRACE_SECONDS = 0.1, 0.2
sweep_state.DEADLINE_SECONDS = float(os.environ.get("TRM_TEST_DEADLINE", 10))
if host:
    run_lock.socket.gethostname = lambda: host
    sweep_launcher.now = lambda: "2222-02-22 22:22:22 UTC"  # its clock is wrong
real = sweep_cells.command


def fake(cell, slot, flags):
    text = json.dumps(dataclasses.asdict(cell.config))
    own = [cell.name, cell.url, slot.name if slot else "None", text]
    return [sys.executable, training, *own, *real(cell, slot, flags)]


def slow(cell, slot, flags):
    words = [cell.path, "--run_name", cell.name, *cell.overrides, *flags]
    return [sys.executable, "tests/programs/slow_train.py", "--config", *words]


if training == "slow":
    sweep_cells.command = slow
else:
    sweep_cells.command = fake
    sweep_cells.check_datasets = lambda cells: None
    sweep_cells.check_slices = lambda cells, slices, flags, environment: None
utils.run_cli(sweep.main)
