"""How many puzzles a model solves: every puzzle exactly once, at any number of workers and any
batch size."""

import base64
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import trm_model
from config import Config
from data_loader_tpu import SudokuDatasetTPU, evaluation_batches
from device import Device
from metrics_logger import MetricsLogger, SilentLogger
from run_folder import EVAL_FILE, RunFolder
from storage import join, open_folder
from train_state import TrainState

RATING_EDGES = (0, 1, 5, 10, 20, 50, 100, 200, 500)  # lower edges of the rating buckets
# keys of a result that go to eval.json only, because they are too long for a line of metrics.jsonl
PER_PUZZLE_KEYS = ("solved", "dataset_sha256")
# keys of a result that go into the marker of the checkpoint
MARKER_KEYS = ("split", "weights", "count", "exact_accuracy", "cell_accuracy")
# the rows of what trm_model.evaluation_step returns, in order
SCORES = ("cell_accuracy", "exact_accuracy", "q_halt_accuracy", "lm_loss", "q_halt_loss")
EXACT = SCORES.index("exact_accuracy")
HALTING_LOGIT = len(SCORES)  # the row after them
# probabilities of halting (sigmoid of the halting logit) at which early_stop stops
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)


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

    batch_size: puzzles in one batch of a worker. forward: trm_model.evaluation_step, compiled or
    not. max_examples: evaluate only so many, a random subset that is always the same.

    Collective. Rank 0 gets a dict with these keys, and the other workers get None:

    - count; cell_accuracy, exact_accuracy, q_halt_accuracy, lm_loss, q_halt_loss: the number of
      puzzles, and means over them after the last step
    - exact_accuracy_by_step: [halt_max_steps]
    - early_stop, by_rating: what the functions `early_stop` and `accuracy_by_rating` return
    - eval_seconds, puzzles_per_second: over all workers
    - solved: `pack_solved` of the puzzles in the dataset's order
    - dataset_sha256: of the split's inputs and labels
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
        "early_stop": early_stop(all_scores[:, HALTING_LOGIT], exact),
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
    """(example numbers [N] int64, -1 for a pad; scores [halt_max_steps, 6, N] float32 on the CPU).

    The scores are what trm_model.evaluation_step returned at each step.
    """
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
        if len(pending) > 1:  # fetched one batch later, while the device computes the next one
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
        """Collective. Evaluate the checkpoint of this step and write the result into its marker.

        This uses evaluation.max_examples puzzles of evaluation.split, the same every time, and the
        averaged weights if there are any. The best checkpoint is chosen by this result. After the
        last step of the run all of test is evaluated too, with averaged and raw weights, and
        eval.json is written.
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


def early_stop(halting_logits: np.ndarray, exact: np.ndarray) -> list[dict[str, float]]:
    """The result of an evaluation with early stopping, for each of THRESHOLDS.

    Such an evaluation stops a puzzle at the first step at which the sigmoid of the halting logit is
    at least the threshold, and otherwise after the last step. halting_logits, exact (0 or 1):
    [steps, N]. Returns [{threshold, exact_accuracy, mean_steps}].
    """
    steps, count = exact.shape
    rows = []
    for threshold in THRESHOLDS:
        sure = halting_logits >= np.log(threshold / (1 - threshold))
        sure[-1] = True
        last = sure.argmax(0)
        rows.append(
            {
                "threshold": threshold,
                "exact_accuracy": float(exact[last, np.arange(count)].mean(dtype=np.float64)),
                "mean_steps": float(last.mean(dtype=np.float64)) + 1,
            }
        )
    return rows


def accuracy_by_rating(ratings: np.ndarray | None, exact: np.ndarray) -> list[dict[str, Any]]:
    """Exact accuracy in the buckets between RATING_EDGES, without the empty ones.

    ratings: [N] int, the guesses of sudoku.solve, or None for a dataset that has none. exact: [N],
    0 or 1. Returns [{rating_min, rating_max, count, exact_accuracy}], which is empty without
    ratings. rating_max is inclusive, and None in the last bucket.
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
    """Write eval.json, the final evaluation, and print where it is.

    folder: from storage.open_folder. checkpoint: its path or URL. results: of `evaluate`, one for
    each set of weights.
    """
    content = {
        "checkpoint": str(checkpoint),
        "config": dataclasses.asdict(config),
        "results": results,
    }
    folder.write(EVAL_FILE, (json.dumps(content, indent=1) + "\n").encode())
    print(f"evaluation: {join(folder.url, EVAL_FILE)}", flush=True)
