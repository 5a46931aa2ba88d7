"""Where the numbers of a run come from: command, code, versions, machine, puzzles."""

import contextlib
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import trm_model
from device import Device
from train_state import TrainState


def start_record(
    state: TrainState, datasets: dict[str, Any], config_file: str, init_from: str | None
) -> dict[str, Any]:
    """One line of starts.jsonl, for each time that the command starts or resumes a training.

    It says at which step, and with which command, code, machine and data. state: before the first
    step. datasets: {split: dataset}. init_from: the argument of --init_from.
    """
    device, (commit, dirty) = state.device, code_version()
    on_tpu = device.name == "tpu"
    return {
        "wall_time": time.time(),
        "step": state.step,
        "train_seconds": state.train_seconds,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config_file": config_file,
        "init_from": init_from,
        "commit": commit,
        "dirty": dirty,
        "device": device.name,
        "device_model": _device_model(device),
        "world_size": device.workers.world_size,
        "accelerator_type": state.config.tpu.accelerator_type if on_tpu else None,
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torch_xla", "numpy")},
        "parameters": trm_model.num_parameters(state.model),
        "datasets": {
            split: {"puzzles": dataset.num_puzzles, "sha256": dataset.fingerprint}
            for split, dataset in datasets.items()
        },
    }


def code_version(root: Path = Path(__file__).parent) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the kit's code, or (None, None) if they are not known.

    They come from git. Without a repository they come from $TRM_COMMIT or the file COMMIT, which
    hold what `git describe --always --dirty` writes. dirty: whether tracked files differ from the
    commit.
    """
    text = os.environ.get("TRM_COMMIT") or ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        with contextlib.suppress(OSError):  # no git on this machine
            # without tags, so that the text is the commit's hash
            done = subprocess.run([*command, "--exclude=*"], text=True, capture_output=True)
            text = done.stdout or text
    elif not text and (root / "COMMIT").exists():
        text = (root / "COMMIT").read_text()
    text = text.strip()
    if not text:
        return None, None
    return text.removesuffix("-dirty"), text.endswith("-dirty")


def _device_model(device: Device) -> str:
    if device.name == "cuda":
        return torch.cuda.get_device_name()
    if device.generation:
        return f"TPU {device.generation.name}"
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
