"""One record per logging interval: metrics.jsonl, TensorBoard, and the console (a bar on a terminal, lines elsewhere)."""
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from utils import replace_file

# what differs between two runs of the same training
TIMING_KEYS = ("wall_time", "train_seconds", "eval_seconds", "examples_per_second", "steps_per_second", "puzzles_per_second",
               "model_flops_per_second", "mfu", "xla_compiles", "xla_executions", "xla_bytes_to_device", "xla_bytes_from_device",
               "peak_memory_bytes")


class MetricsLogger:
    """Writes the records of one run.

    folder: metrics.jsonl and tensorboard/ go here. start_step: the step of the checkpoint that the run goes on from;
    records of later steps are dropped, and its own evaluation if that was not finished (evaluated), so that resuming
    neither repeats nor loses one. last_step: end of the progress bar.
    """

    def __init__(self, folder, start_step, evaluated, last_step, tensorboard=True):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            replace_file(self.path, "".join(_records_until(self.path, start_step, evaluated)))
        self.file = open(self.path, "a")
        self.writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter
            self.writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=start_step + 1)
        self.bar = tqdm(total=last_step, initial=start_step, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def log(self, record):
        """record: a flat dict with step, split, wall_time (Unix seconds) and metrics."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.writer:
            name = record["split"] if "weights" not in record else f"{record['split']}_{record['weights']}"
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "wall_time"):
                    self.writer.add_scalar(f"{name}/{key}", value, record["step"], record["wall_time"])
        self.say(console_line(record))

    def say(self, text):
        """A line for people; on a terminal above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def advance(self, step):
        """Move the bar to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def flush(self):
        """Bring every record to the disk; done before the checkpoint that would make them count."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.writer:
            self.writer.flush()

    def close(self):
        self.flush()
        self.file.close()
        if self.writer:
            self.writer.close()
        if self.bar is not None:
            self.bar.close()


class SilentLogger:
    """What the other workers have in place of a MetricsLogger."""

    def log(self, record):
        pass

    def say(self, text):
        pass

    def advance(self, step):
        pass

    def flush(self):
        pass

    def close(self):
        pass


def console_line(record):
    """One line of text for a record."""
    if record["split"] == "train":
        return (f"step {record['step']:>6}  loss {record['loss']:.4f}  exact {record['exact_accuracy']:.1%}  cells {record['cell_accuracy']:.1%}  "
                f"steps {record['mean_steps']:.1f}  lr {record['lr']:.1e}  {record['examples_per_second']:,.0f} ex/s")
    step = "-" if record["step"] is None else record["step"]        # weights of the original do not tell
    return (f"step {step:>6}  {record['split']} ({record['weights']} weights, {record['count']:,} puzzles)  exact {record['exact_accuracy']:.2%}  "
            f"cells {record['cell_accuracy']:.2%}  halting head {record['q_halt_accuracy']:.1%}  {record['puzzles_per_second']:,.0f} puzzles/s")


def _records_until(path, step, evaluated):
    """The lines of `path` of steps up to `step` (its evaluation if `evaluated`); one cut off by a kill is dropped."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and (record["step"] < step or (record["step"] == step and (evaluated or record["split"] == "train"))):
            kept.append(line)
    return kept
