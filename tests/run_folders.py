"""Run folders made by hand, in the files and keys that train_tpu.py writes: for numbers that no short training would give."""

import json

import numpy as np

from config import config_yaml, load_config, total_steps
from evaluation import pack_solved

PUZZLES = 1000
DATASETS = {
    "train": {"puzzles": PUZZLES, "sha256": "a" * 64},
    "test": {"puzzles": 400, "sha256": "b" * 64},
}
START = {
    "wall_time": 1.8e9,
    "command": "train_tpu.py --config x.yaml",
    "config_file": None,
    "init_from": None,
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": "cpu",
    "device_model": "a processor",
    "accelerator_type": None,
    "hostname": "here",
    "python": "3.11.7",
    "torch": "2.9.0",
    "torch_xla": None,
    "numpy": "2.2.6",
    "parameters": 1000,
    "datasets": DATASETS,
}
CONFIG = """\
device: cpu
tpu: {}
data: {dataset_path: data/made}
model: {halt_max_steps: 2}
training: {global_batch_size: 100, epochs: 40}
checkpoint: {}
logging: {}
evaluation: {}
"""


def accuracy_of(solved):
    return float(np.mean(solved))


def solved_first(share, count=400):
    """[count] bool: the first `share` of the puzzles are solved."""
    return np.arange(count) < round(share * count)


def write_run(
    folder,
    overrides=(),
    solved=None,
    raw=None,
    steps=None,
    evaluations=(0.25, 0.5, 1),
    starts=({},),
    config=None,
    count=None,
    digest=DATASETS["test"]["sha256"],
    ratings=None,
):
    """A run in `folder` (a pathlib path) of 400 steps (`steps`: so far; the final evaluation only at the end).

    overrides: as on the command line. solved: [N] bool, the outcome with the weights that count (raw: of the raw ones besides the
    averaged, if both are wanted). evaluations: exact accuracy of the evaluations during training, in parts of the final one. starts: changes to START.
    """
    folder.mkdir(parents=True)
    if config is None:
        config = folder.parent / "made.yaml"
        config.write_text(CONFIG)
    config = load_config(config, overrides)
    (folder / "config.yaml").write_text(config_yaml(config))
    solved = solved_first(0.5) if solved is None else solved
    count, batch = count or len(solved), config.training.global_batch_size
    puzzles = ({**START, **starts[0]} if starts else START)["datasets"]["train"]["puzzles"]
    total = total_steps(config, puzzles)
    steps, weights = total if steps is None else steps, "ema" if config.training.ema else "raw"
    records = [
        {
            "step": step,
            "split": "train",
            "epoch": step * batch / puzzles,
            "lr": config.training.lr,
            "loss": 2 / step,
            "lm_loss": 1 / step,
            "q_halt_loss": 2 / step,
            "grad_norm": 1.0,
            "count": 10,
            "cell_accuracy": step / total,
            "exact_accuracy": step / total / 2,
            "q_halt_accuracy": 0.5,
            "mean_steps": 2.0,
            "wall_time": 1.8e9 + step,
            "train_seconds": 36.0 * step,
            "steps_per_second": 1 / 36,
            "examples_per_second": batch / 36,
            "model_flops_per_second": 1e12,
            "mfu": 0.5,
        }
        for step in sorted({*range(max(1, total // 10), steps, max(1, total // 10)), steps})
    ]
    for k, part in enumerate(evaluations, 1):
        if (step := k * total // len(evaluations)) <= steps:
            records.append(
                {
                    "step": step,
                    "split": "test",
                    "weights": weights,
                    "train_seconds": 36.0 * step,
                    "count": 100,
                    "exact_accuracy": part * accuracy_of(solved),
                    "cell_accuracy": 0.9,
                }
            )
    if steps == total:
        results = []
        for name, outcome in ((weights, solved), ("raw", raw)):
            if outcome is None:
                continue
            accuracy = accuracy_of(outcome)
            results.append(
                {
                    "step": total,
                    "split": "test",
                    "weights": name,
                    "count": count,
                    "exact_accuracy": accuracy,
                    "cell_accuracy": 0.95,
                    "q_halt_accuracy": 0.9,
                    "lm_loss": 0.1,
                    "exact_accuracy_by_step": [accuracy / 2, accuracy],
                    "by_rating": ratings or [],
                    "solved": pack_solved(outcome),
                    "dataset_sha256": digest,
                }
            )
        (folder / "eval.json").write_text(
            json.dumps({"checkpoint": "x", "config": {}, "results": results})
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if starts:
        lines = [
            {**START, "step": 0, "train_seconds": 0.0, "world_size": 1, **start} for start in starts
        ]
        (folder / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
