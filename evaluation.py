"""How many puzzles a model solves: every puzzle exactly once, at any number of workers and any
batch size."""

import base64
import dataclasses
import json
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trm_model
from checkpoint_manager import is_of_run, load_checkpoint
from config import Config, differences
from data_loader_tpu import SudokuDatasetTPU, evaluation_batches
from device import Device
from initial_weights import weights_in
from metrics_logger import MetricsLogger, SilentLogger, console_line
from mixing import choose_mixing
from run_folder import EVAL_FILE, RunFolder, open_checkpoints, run_url, writing_to
from storage import join, open_folder
from train_state import TrainState, create_model, load_dataset, settle_forward_dtype
from utils import UserError

RATING_EDGES = (0, 1, 5, 10, 20, 50, 100, 200, 500)  # lower edges of the rating buckets
# of a result: for eval.json, too long for a record of metrics.jsonl
PER_PUZZLE_KEYS = ("solved", "dataset_sha256")
# of a result: for the marker of the checkpoint
MARKER_KEYS = ("split", "weights", "count", "exact_accuracy", "cell_accuracy")
# of the scores of trm_model.evaluation_step, in their order
SCORES = ("cell_accuracy", "exact_accuracy", "q_halt_accuracy", "lm_loss", "q_halt_loss")
EXACT = SCORES.index("exact_accuracy")


@torch.no_grad()
def evaluate(
    model: trm_model.TinyRecursiveModel,
    dataset: SudokuDatasetTPU,
    device: Device,
    batch_size: int,
    forward: Callable,
    max_examples: int | None = None,
) -> dict[str, Any] | None:
    """Give every puzzle exactly halt_max_steps supervision steps; each worker takes its share.

    batch_size: puzzles of one worker. forward: trm_model.evaluation_step, compiled or not.
    max_examples: only so many, a random subset that is always the same.

    Returns None but on rank 0, where it returns a dict: count; cell_accuracy, exact_accuracy,
    q_halt_accuracy, lm_loss, q_halt_loss (means over puzzles after the last step);
    exact_accuracy_by_step [halt_max_steps]; by_rating [{rating_min, rating_max, count,
    exact_accuracy}]; eval_seconds; puzzles_per_second; solved (pack_solved of the puzzles in the
    dataset's order); dataset_sha256 (of the split's inputs and labels: two runs with the same one
    saw the same puzzles).
    """
    start = time.perf_counter()
    rows, scores = _evaluate_share(model, dataset, device, batch_size, forward, max_examples)
    gathered = device.workers.gather([torch.from_numpy(rows), scores])
    if gathered is None:
        return None
    seconds = time.perf_counter() - start
    rows, all_scores = np.concatenate(gathered[0]), np.concatenate(gathered[1], axis=2)
    real = rows >= 0
    rows, all_scores = rows[real], all_scores[:, :, real]
    expected = min(max_examples or len(dataset), len(dataset))
    if not len(set(rows.tolist())) == len(rows) == expected:
        raise AssertionError("a puzzle was left out or evaluated twice")
    order = np.argsort(rows)  # sums in one order, whatever the number of workers
    rows, all_scores = rows[order], all_scores[:, :, order]
    exact = all_scores[:, EXACT]
    final = all_scores[-1].astype(np.float64).mean(1)
    ratings = None if dataset.ratings is None else dataset.ratings[rows]
    return {
        "count": len(rows),
        **dict(zip(SCORES, final)),
        "exact_accuracy_by_step": exact.astype(np.float64).mean(1).tolist(),
        "by_rating": accuracy_by_rating(ratings, exact[-1]),
        "eval_seconds": seconds,
        "puzzles_per_second": len(rows) / seconds,
        "solved": pack_solved(exact[-1] > 0),
        "dataset_sha256": dataset.fingerprint,
    }


def _evaluate_share(
    model: trm_model.TinyRecursiveModel,
    dataset: SudokuDatasetTPU,
    device: Device,
    batch_size: int,
    forward: Callable,
    max_examples: int | None,
) -> tuple[np.ndarray, torch.Tensor]:
    """(example numbers [N], -1 for a pad; SCORES of each step [halt_max_steps, 5, N] on the
    CPU)."""
    workers = device.workers
    carry = device.put(model.empty_carry(batch_size))
    rows: list[np.ndarray] = []
    results: list[list[torch.Tensor]] = []
    pending: deque[list[torch.Tensor]] = deque()
    batches = evaluation_batches(
        dataset, batch_size, max_examples, workers.rank, workers.world_size
    )
    for batch, batch_rows in batches:
        batch = device.put(batch)
        scores = []
        for _ in range(model.config.halt_max_steps):
            carry, score = forward(model, carry, batch)
            device.end_step()
            scores.append(score)
        rows.append(np.pad(batch_rows, (0, batch_size - len(batch_rows)), constant_values=-1))
        pending.append(scores)
        if len(pending) > 1:  # read a batch late, so that the device has the next one to work on
            results.append(device.fetch(pending.popleft()))
    results.append(device.fetch(pending.popleft()))
    return np.concatenate(rows), torch.cat([torch.stack(batch) for batch in results], dim=2)


class Evaluator:
    """Evaluates a training at its present step, on all workers; rank 0 has the result."""

    def __init__(
        self,
        state: TrainState,
        datasets: dict[str, SudokuDatasetTPU],
        folder: RunFolder,
        logger: MetricsLogger | SilentLogger,
    ):
        self.state, self.datasets, self.folder, self.logger = state, datasets, folder, logger
        self.forward = state.device.compiled(
            trm_model.evaluation_step, state.config.training.compile
        )

    def run(self) -> None:
        """Evaluate the checkpoint of this step and note the result in its marker.

        Always: evaluation.max_examples of evaluation.split, with the averaged weights if there are
        any. The best checkpoint is chosen by that, on the same puzzles every time. After the last
        step of the run also all of test, with averaged and raw weights, for eval.json.
        """
        state, config = self.state, self.state.config.evaluation
        models = {"raw": state.model}
        if state.ema:
            models = {"ema": state.ema.ready_module(), "raw": state.model}
        available = len(self.datasets[config.split])
        count = min(config.max_examples or available, available)
        wanted = [(config.split, next(iter(models)), count)]
        is_final = state.step == state.total_steps
        if is_final:
            wanted += [("test", name, len(self.datasets["test"])) for name in models]
        results = []
        for split, name, count in dict.fromkeys(wanted):
            if is_final:
                self.logger.say(f"evaluating {count:,} puzzles of {split}, {name} weights")
            result = self._evaluate(split, name, models[name], count)
            if result:
                results.append(result)
        if results:
            if is_final:
                folder, url = open_folder(self.folder.path), self.folder.checkpoints.url(state.step)
                write_eval_json(folder, url, state.config, results[-len(models) :])
            self.folder.add_evaluation(state.step, {key: results[0][key] for key in MARKER_KEYS})

    def _evaluate(
        self, split: str, name: str, model: trm_model.TinyRecursiveModel, count: int
    ) -> dict[str, Any] | None:
        state, batch_size = self.state, self.state.config.evaluation.batch_size
        metrics = evaluate(
            model, self.datasets[split], state.device, batch_size, self.forward, count
        )
        if metrics is None:
            return None
        result = {
            "step": state.step,
            "split": split,
            "weights": name,
            "wall_time": time.time(),
            "train_seconds": state.train_seconds,
            **metrics,
        }
        self.logger.log({k: value for k, value in result.items() if k not in PER_PUZZLE_KEYS})
        return result


# --------------------------------------------------------------------------------------------------
# --eval_only
# --------------------------------------------------------------------------------------------------
def evaluate_only(rank: int, config: Config, args: Namespace) -> None:
    """Evaluate a checkpoint on the whole test split, averaged and raw weights; write eval.json."""
    device = Device(config.device)
    workers, path, data = device.workers, Path(), b""  # the last two are known to rank 0
    with workers.together():
        dataset = load_dataset(config, "test")
        checkpoints = open_checkpoints(config, args.run_name)
        if rank == 0:
            path = checkpoints.resolve(args.checkpoint or "latest")
            data = path.read_bytes()
    source = (workers.broadcast_bytes(str(path).encode()) or b"").decode()
    data = workers.broadcast_bytes(data) or b""
    with workers.together():
        content = load_checkpoint(data, source)
        states = weights_in(content, source)
        is_ours = "config" in content
        config = settle_forward_dtype(config, device, content["config"] if is_ours else None)
        if is_ours:
            check_same_model(config, content["config"], source)
    forward = device.compiled(trm_model.evaluation_step, config.training.compile)
    results = []
    for name, weights in states.items():
        model = create_model(config, dataset)
        choose_mixing(model, config, device, training=False)
        with workers.together():
            trm_model.load_named_state(model, weights, source)
        metrics = evaluate(
            model.to(device.torch), dataset, device, config.evaluation.batch_size, forward
        )
        if metrics:
            step = content["step"] if is_ours else None
            result = {"step": step, "split": "test", "weights": name, "wall_time": time.time()}
            results.append({**result, **metrics})
            print(console_line(results[-1]), flush=True)
    with workers.together():
        if rank == 0:
            found = args.checkpoint
            if is_of_run(args.checkpoint or "latest"):
                found = join(checkpoints.folder.url, path.name)
            with writing_to(config):
                write_eval_json(open_folder(run_url(config, args.run_name)), found, config, results)
    workers.leave()


def check_same_model(config: Config, saved: dict[str, Any], checkpoint: str) -> None:
    """Raises UserError unless a checkpoint's configuration has the same model section."""
    if changed := differences(config, saved, ("model",)):
        raise UserError(
            f"--checkpoint {checkpoint}: it was trained with another model ({changed}): evaluate "
            "it with that model section"
        )


# --------------------------------------------------------------------------------------------------
# What a result holds
# --------------------------------------------------------------------------------------------------
def pack_solved(solved: np.ndarray) -> str:
    """[N] bool as text: base64 of numpy.packbits."""
    return base64.b64encode(np.packbits(solved).tobytes()).decode()


def unpack_solved(text: str, count: int) -> np.ndarray:
    """The [count] bool array of `pack_solved`. Raises ValueError if the text is of another
    length."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} puzzles")
    return np.unpackbits(packed, count=count).astype(bool)


def accuracy_by_rating(ratings: np.ndarray | None, exact: np.ndarray) -> list[dict[str, Any]]:
    """Exact accuracy in the buckets between RATING_EDGES; no entry for an empty bucket.

    ratings: [N] int, or None for a dataset that has none (then the list is empty). exact: [N], 0
    or 1.
    """
    if ratings is None:
        return []
    buckets = []
    for low, high in zip(RATING_EDGES, (*RATING_EDGES[1:], None)):
        inside = (ratings >= low) & (ratings < (high or np.inf))
        if inside.any():
            buckets.append(
                {
                    "rating_min": low,
                    "rating_max": high and high - 1,
                    "count": int(inside.sum()),
                    "exact_accuracy": float(exact[inside].mean(dtype=np.float64)),
                }
            )
    return buckets


def write_eval_json(folder: Any, checkpoint: Any, config: Config, results: list[dict]) -> None:
    """Write the final evaluation as eval.json into a folder of storage.py.

    It holds the checkpoint's place, the configuration of the evaluation, and a result for each set
    of weights.
    """
    content = {
        "checkpoint": str(checkpoint),
        "config": dataclasses.asdict(config),
        "results": results,
    }
    folder.write(EVAL_FILE, (json.dumps(content, indent=1) + "\n").encode())
    print(f"evaluation: {join(folder.url, EVAL_FILE)}", flush=True)
