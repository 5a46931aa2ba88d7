"""Run folders made by hand, for numbers that no short training would give.

They have the files and keys that train_tpu.py writes.
"""

import json

import numpy as np

from config import config_yaml, load_config
from evaluation import pack_solved
from schedule import stages, total_steps

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
    early_stop=None,
    averages=(),
    step_seconds=36.0,
    loss=1.0,
):
    """A run of 400 steps in `folder`, a path; returns the folder.

    overrides: as on the command line, of the configuration file `config` (None: CONFIG).
    solved: [N] bool, which puzzles the weights solve that the run is judged by. raw: the same of
        the raw weights, if a run with an average has them too.
    steps: how many are done; only with all of them there is a final evaluation.
    evaluations: exact accuracies during training, as shares of the final one.
    starts: changes to START, for each start. count, digest, ratings, early_stop: of the final
        evaluation. averages: (steps, solved) of each average of checkpoints.
    step_seconds: of each step. loss: multiplies the training losses.
    """
    folder.mkdir(parents=True)
    if config is None:
        config = folder.parent / "made.yaml"
        config.write_text(CONFIG)
    config = load_config(config, overrides)
    (folder / "config.yaml").write_text(config_yaml(config))
    solved = solved_first(0.5) if solved is None else solved
    puzzles = ({**START, **starts[0]} if starts else START)["datasets"]["train"]["puzzles"]
    total = total_steps(config, puzzles)
    steps, weights = total if steps is None else steps, "ema" if config.training.ema else "raw"
    every = max(1, total // 10)
    records = [
        _training_record(step, total, puzzles, config, step_seconds, loss)
        for step in sorted({*range(every, steps, every), steps})
    ]
    for k, share in enumerate(evaluations, 1):
        if (step := k * total // len(evaluations)) <= steps:
            records.append(
                _evaluation_record(step, weights, share * accuracy_of(solved), step_seconds)
            )
    if steps == total:
        final = {"step": total, "dataset_sha256": digest, "by_rating": ratings or []}
        final |= {"early_stop": early_stop} if early_stop else {}
        outcomes = [({"weights": weights}, solved)]
        outcomes += [] if raw is None else [({"weights": "raw"}, raw)]
        outcomes += [({"weights": "average", "averaged_steps": s}, one) for s, one in averages]
        _write_evaluation(folder, outcomes, count, final)
    _write_lines(folder / "metrics.jsonl", records)
    first = {**START, "step": 0, "train_seconds": 0.0, "world_size": 1}
    if starts:
        _write_lines(folder / "starts.jsonl", [{**first, **start} for start in starts])
    return folder


def _write_evaluation(folder, outcomes, count, final):
    """eval.json of outcomes, (what they are of, [N] bool of puzzles solved); final: for each."""
    results = [_result(solved, count or len(solved), **what, **final) for what, solved in outcomes]
    content = {"checkpoint": "x", "config": {}, "results": results}
    (folder / "eval.json").write_text(json.dumps(content))


def stop_at(folder, step):
    """Make the run in `folder` one that was stopped at `step`, and evaluated there."""
    metrics, evaluation = folder / "metrics.jsonl", folder / "eval.json"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    _write_lines(metrics, [record for record in records if record["step"] <= step])
    content = json.loads(evaluation.read_text())
    content["results"] = [result | {"step": step} for result in content["results"]]
    evaluation.write_text(json.dumps(content))


def train_flops(config, total, step):
    """Of the first `step` steps, with as much for each as it has updates of z."""
    begins = [begin for begin, _ in stages(config, total)]
    return sum(
        1e12 * stage.H_cycles * (stage.L_cycles + 1) * max(0, min(step, end) - begin)
        for (begin, stage), end in zip(stages(config, total), [*begins[1:], total])
    )


def _training_record(step, total, puzzles, config, step_seconds, loss):
    training = config.training
    batch = training.global_batch_size
    return {
        "step": step,
        "split": "train",
        "epoch": step * batch / puzzles,
        "lr": training.lr,
        "loss": 2 * loss / step,
        "lm_loss": loss / step,
        "q_halt_loss": 2 * loss / step,
        "grad_norm": 1.0,
        "count": 10,
        "cell_accuracy": step / total,
        "exact_accuracy": step / total / 2,
        "q_halt_accuracy": 0.5,
        "mean_steps": 2.0,
        "wall_time": 1.8e9 + step,
        "train_seconds": step_seconds * step,
        "steps_per_second": 1 / step_seconds,
        "examples_per_second": batch / step_seconds,
        "train_flops": train_flops(config, total, step),
        "model_flops_per_second": 1e12,
        "mfu": 0.5,
    }


def _evaluation_record(step, weights, accuracy, step_seconds):
    return {
        "step": step,
        "split": "test",
        "weights": weights,
        "train_seconds": step_seconds * step,
        "count": 100,
        "exact_accuracy": accuracy,
        "cell_accuracy": 0.9,
    }


def _result(solved, count, **more):
    """An entry of eval.json."""
    accuracy = accuracy_of(solved)
    return {
        "split": "test",
        "count": count,
        "exact_accuracy": accuracy,
        "cell_accuracy": 0.95,
        "q_halt_accuracy": 0.9,
        "lm_loss": 0.1,
        "exact_accuracy_by_step": [accuracy / 2, accuracy],
        "solved": pack_solved(solved),
        **more,
    }


def _write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
