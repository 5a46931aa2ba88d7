"""--eval_only: evaluate the test split with the weights of a checkpoint, which may be of another
run or of the original, and with averages of the run's checkpoints."""

import io
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import trm_model
from checkpoint_manager import CheckpointManager, is_of_run, load_checkpoint
from collectives import Workers
from config import Config, differences
from device import Device
from evaluation import evaluate, write_eval_json
from initial_weights import weights_in
from metrics_logger import console_line
from mixing import choose_mixing
from run_folder import open_checkpoints, run_url, writing_to
from storage import join, open_folder
from train_state import create_model, load_dataset, settle_forward_dtype
from utils import UserError


def evaluate_only(rank: int, config: Config, args: Namespace) -> None:
    """Evaluate a checkpoint on the whole test split and write eval.json.

    Its averaged weights and its raw weights are evaluated. So is the mean of the checkpoints of
    each list of steps in args.average. Raises UserError if a checkpoint is missing or does not fit.
    """
    device = Device(config.device)
    workers = device.workers
    with workers.together():
        dataset = load_dataset(config, "test")
        checkpoints = open_checkpoints(config, args.run_name)
    source, data = _read(checkpoints, args.checkpoint or "latest", workers)
    with workers.together():
        content = load_checkpoint(data, source)
        states = weights_in(content, source)
        saved = content.get("config")  # None: weights of the original
        config = settle_forward_dtype(config, device, saved)
        if saved:
            check_same_model(config, saved, source)
    step = content["step"] if saved else None
    given = [({"step": step, "weights": name}, state) for name, state in states.items()]
    del content, data
    forward = device.compiled(trm_model.evaluation_step, config.training.compile)
    results = []
    for what, weights in chain(given, _averages(config, checkpoints, args.average, workers)):
        model = create_model(config, dataset)
        choose_mixing(model, config, device, training=False)
        with workers.together():
            trm_model.load_named_state(model, weights, source)
        metrics = evaluate(
            model.to(device.torch), dataset, device, config.evaluation.batch_size, forward
        )
        if metrics:
            results.append({**what, "split": "test", "wall_time": time.time(), **metrics})
            print(console_line(results[-1]), flush=True)
    with workers.together():
        if rank == 0:
            found = args.checkpoint
            if is_of_run(args.checkpoint or "latest"):
                found = join(checkpoints.folder.url, Path(source).name)
            with writing_to(config):
                write_eval_json(open_folder(run_url(config, args.run_name)), found, config, results)
    workers.leave()


def _read(checkpoints: CheckpointManager, name: str, workers: Workers) -> tuple[str, bytes]:
    """Collective. (path, content) of a checkpoint: rank 0 reads it and sends it to all."""
    path, data = Path(), b""
    with workers.together():
        if workers.rank == 0:
            path = checkpoints.resolve(name)
            data = path.read_bytes()
    source = (workers.broadcast_bytes(str(path).encode()) or b"").decode()
    return source, workers.broadcast_bytes(data) or b""


def _averages(
    config: Config, checkpoints: CheckpointManager, wanted: list[list[int]], workers: Workers
) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Collective. Yields (description, weights) of each average: rank 0 computes it for all."""
    for steps in wanted:
        file = io.BytesIO()
        with workers.together():
            if workers.rank == 0:
                torch.save(average_weights(config, checkpoints, steps), file)
        data = workers.broadcast_bytes(file.getvalue()) or b""
        what = {"step": steps[-1], "weights": "average", "averaged_steps": steps}
        yield what, load_checkpoint(data, "the average")


# --------------------------------------------------------------------------------------------------
# Averages of checkpoints
# --------------------------------------------------------------------------------------------------
def steps_to_average(checkpoints: CheckpointManager, text: str) -> list[int]:
    """The steps of the checkpoints that `--average text` names, in order.

    text: "K" for the last K, or "STEP,STEP,...". Raises UserError if there are no such checkpoints.
    """
    there = [marker["step"] for marker in checkpoints.markers()]
    numbers = [int(number) for number in text.split(",")]
    missing = [step for step in numbers if step not in there] if len(numbers) > 1 else []
    if not missing and len(numbers) > 1:
        return sorted(numbers)
    if not missing and numbers[0] <= len(there):
        return there[-numbers[0] :]
    has = f"has those of steps {', '.join(map(str, there))}" if there else "has none"
    lacks = f"of step {missing[0]}" if missing else f"for {numbers[0]} of them"
    raise UserError(
        f"--average {text}: there is no checkpoint {lacks}: {checkpoints.folder.url} {has}; a run "
        "keeps the last checkpoint.keep_last_n"
    )


def average_weights(
    config: Config, checkpoints: CheckpointManager, steps: list[int]
) -> dict[str, torch.Tensor]:
    """The mean of the raw weights of checkpoints, computed in float64, as float32.

    One checkpoint is in memory at a time. Raises UserError if one of them is missing, damaged or of
    another model.
    """
    sums: dict[str, torch.Tensor] = {}
    for step in steps:
        path = checkpoints.resolve(str(step))
        content = load_checkpoint(path)
        check_same_model(config, content["config"], str(path))
        for name, tensor in content["model"].items():
            sums[name] = sums.get(name, 0) + tensor.double()
    return {name: (total / len(steps)).float() for name, total in sums.items()}


def check_same_model(config: Config, saved: dict[str, Any], checkpoint: str) -> None:
    """Raises UserError unless a checkpoint's configuration has the same model section."""
    if changed := differences(config, saved, ("model",)):
        raise UserError(
            f"--checkpoint {checkpoint}: it was trained with another model ({changed}): evaluate "
            "it with that model section"
        )
