"""How many puzzles a model solves: every puzzle exactly once, at any number of workers and any batch size."""

import base64
import dataclasses
import json
import time
from collections import deque

import numpy as np
import torch

from data_loader_tpu import evaluation_batches
from storage import join, open_folder

RATING_EDGES = (0, 1, 5, 10, 20, 50, 100, 200, 500)  # lower edges of the rating buckets
PER_PUZZLE_KEYS = (
    "solved",
    "dataset_sha256",
)  # of a result: for eval.json, too long for a record of metrics.jsonl


@torch.no_grad()
def evaluate(model, dataset, device, batch_size, forward, max_examples=None):
    """Run every puzzle (or a random max_examples) once for exactly halt_max_steps supervision steps, each worker its share.

    batch_size: puzzles of one worker. forward: trm_model.evaluation_step, compiled or not.
    Returns on rank 0 a dict: count, exact_accuracy, cell_accuracy, q_halt_accuracy, lm_loss, q_halt_loss (means over
    puzzles), exact_accuracy_by_step [halt_max_steps], by_rating [{rating_min, rating_max, count, exact_accuracy}],
    eval_seconds, puzzles_per_second, solved (pack_solved of the puzzles in the dataset's order), dataset_sha256 (of the
    split's inputs and labels: runs with the same one saw the same puzzles); None on the other workers.
    """
    start, steps = time.perf_counter(), model.config.halt_max_steps
    carry = device.put(model.empty_carry(batch_size))
    rows, results, pending = [], [], deque()
    for batch, batch_rows in evaluation_batches(
        dataset, batch_size, max_examples, device.rank, device.world_size
    ):
        batch = device.put(batch)
        scores = []
        for _ in range(steps):
            carry, score = forward(model, carry, batch)
            device.end_step()
            scores.append(score)
        rows.append(np.pad(batch_rows, (0, batch_size - len(batch_rows)), constant_values=-1))
        pending.append(scores)
        if (
            len(pending) > 1
        ):  # read one batch late: the device has the next one to work on meanwhile
            results.append(device.fetch(pending.popleft()))
    results.append(device.fetch(pending.popleft()))

    ours = torch.cat(
        [torch.stack(batch) for batch in results], dim=2
    )  # [N_sup, 5, puzzles and pads]
    gathered = device.gather([torch.from_numpy(np.concatenate(rows)), ours])
    if gathered is None:
        return None
    seconds = time.perf_counter() - start
    rows, scores = np.concatenate(gathered[0]), np.concatenate(gathered[1], axis=2)
    real = rows >= 0
    rows, scores = rows[real], scores[:, :, real]
    assert (
        len(set(rows.tolist())) == len(rows) == min(max_examples or len(dataset), len(dataset))
    ), "a puzzle was left out or evaluated twice"
    order = np.argsort(rows)  # sums in one order, whatever the number of workers
    rows, scores = rows[order], scores[:, :, order]
    final = scores[-1].astype(np.float64).mean(1)
    return {
        "count": len(rows),
        **{
            key: final[k]
            for k, key in enumerate(
                ("cell_accuracy", "exact_accuracy", "q_halt_accuracy", "lm_loss", "q_halt_loss")
            )
        },
        "exact_accuracy_by_step": scores[:, 1].astype(np.float64).mean(1).tolist(),
        "by_rating": accuracy_by_rating(
            None if dataset.ratings is None else dataset.ratings[rows], scores[-1, 1]
        ),
        "eval_seconds": seconds,
        "puzzles_per_second": len(rows) / seconds,
        "solved": pack_solved(scores[-1, 1] > 0),
        "dataset_sha256": dataset.fingerprint,
    }


def evaluate_step(run, datasets, forward, files, logger):
    """Evaluate the present step and note the result beside its checkpoint.

    Always: evaluation.max_examples of evaluation.split, averaged weights if there are any; the best checkpoint is
    chosen by this look, at the same puzzles every time. At the end also: all of test, averaged and raw weights, into
    eval.json.
    """
    config, final = run.config.evaluation, run.step == run.total_steps
    models = {"ema": run.ema.ready_module(), "raw": run.model} if run.ema else {"raw": run.model}
    selects = next(iter(models))
    look = min(config.max_examples or len(datasets[config.split]), len(datasets[config.split]))
    wanted = [(config.split, selects, look)]
    if final:
        wanted = list(
            dict.fromkeys([*wanted, *(("test", name, len(datasets["test"])) for name in models)])
        )
    results = []
    for split, name, count in wanted:
        if final:
            logger.say(f"evaluating {count:,} puzzles of {split}, {name} weights")
        metrics = evaluate(
            models[name], datasets[split], run.device, config.batch_size, forward, count
        )
        if metrics:
            results.append(
                {
                    "step": run.step,
                    "split": split,
                    "weights": name,
                    "wall_time": time.time(),
                    "train_seconds": run.train_seconds,
                    **metrics,
                }
            )
            logger.log(
                {key: value for key, value in results[-1].items() if key not in PER_PUZZLE_KEYS}
            )
    logger.flush()
    if files:
        if final:
            write_eval_json(
                open_folder(files.path),
                files.checkpoints.url(run.step),
                run.config,
                results[-len(models) :],
            )
        files.checkpoints.add_metrics(
            run.step,
            {
                key: results[0][key]
                for key in ("split", "weights", "count", "exact_accuracy", "cell_accuracy")
            },
        )


def pack_solved(solved):
    """[N] bool as text: base64 of numpy.packbits."""
    return base64.b64encode(np.packbits(solved)).decode()


def unpack_solved(text, count):
    """The [count] bool array that pack_solved made `text` from. Raises ValueError where it is of another length."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} puzzles")
    return np.unpackbits(packed, count=count).astype(bool)


def accuracy_by_rating(ratings, exact):
    """Exact accuracy in the buckets that RATING_EDGES cut; empty buckets, and datasets without ratings, give none."""
    buckets = []
    for low, high in zip(RATING_EDGES, (*RATING_EDGES[1:], None)) if ratings is not None else ():
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


def write_eval_json(folder, checkpoint, config, results):
    """The final evaluation as eval.json in a folder of storage.py: the checkpoint's place, the configuration it was evaluated
    with, and one record for each set of weights."""
    content = {
        "checkpoint": str(checkpoint),
        "config": dataclasses.asdict(config),
        "results": results,
    }
    folder.write("eval.json", (json.dumps(content, indent=1) + "\n").encode())
    print(f"evaluation: {join(folder.url, 'eval.json')}", flush=True)
