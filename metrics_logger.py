"""One record per logging interval: metrics.jsonl, TensorBoard, and the console (a bar on a terminal, lines elsewhere).

Needs no package to read records: what draws and what writes event files is imported where it is used.
"""

import json
import os
import sys
from pathlib import Path

from utils import UserError, replace_file

# what differs between two runs of the same training
TIMING_KEYS = (
    "wall_time",
    "train_seconds",
    "eval_seconds",
    "examples_per_second",
    "steps_per_second",
    "puzzles_per_second",
    "model_flops_per_second",
    "mfu",
    "xla_compiles",
    "xla_executions",
    "xla_bytes_to_device",
    "xla_bytes_from_device",
    "peak_memory_bytes",
)


class MetricsLogger:
    """Writes the records of one run.

    folder: metrics.jsonl and tensorboard/ go here. start_step: the step of the checkpoint that the run goes on from;
    records of later steps are dropped, and its own evaluation if that was not finished (evaluated), so that resuming
    neither repeats nor loses one. last_step: end of the progress bar. Raises UserError where the records are damaged.
    """

    def __init__(self, folder, start_step, evaluated, last_step, tensorboard=True):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [
                record
                for record in read_records(self.path.read_bytes(), self.path)
                if _before(record, start_step, evaluated)
            ]
            replace_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(self.path, "a")
        self.writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(
                str(Path(folder) / "tensorboard"), purge_step=start_step + 1
            )
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=last_step, initial=start_step, unit="step", dynamic_ncols=True)

    def log(self, record):
        """record: a flat dict with step, split, wall_time (Unix seconds) and metrics."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.writer:
            name = (
                record["split"]
                if "weights" not in record
                else f"{record['split']}_{record['weights']}"
            )
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "wall_time"):
                    self.writer.add_scalar(
                        f"{name}/{key}", value, record["step"], record["wall_time"]
                    )
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
        return (
            f"step {record['step']:>6}  loss {record['loss']:.4f}  exact {record['exact_accuracy']:.1%}  cells {record['cell_accuracy']:.1%}  "
            f"steps {record['mean_steps']:.1f}  lr {record['lr']:.1e}  {record['examples_per_second']:,.0f} ex/s"
        )
    step = "-" if record["step"] is None else record["step"]  # weights of the original do not tell
    return (
        f"step {step:>6}  {record['split']} ({record['weights']} weights, {record['count']:,} puzzles)  exact {record['exact_accuracy']:.2%}  "
        f"cells {record['cell_accuracy']:.2%}  halting head {record['q_halt_accuracy']:.1%}  {record['puzzles_per_second']:,.0f} puzzles/s"
    )


def read_records(data, name):
    """The records of metrics.jsonl or starts.jsonl, from its bytes. A last line without its newline, still being written or cut off
    by a kill, is no record; UserError, which calls the file `name`, where another line is none."""
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no mapping")
        except ValueError as error:
            raise UserError(
                f"{name}: a record is damaged (line {number}: {error}): take that line out, or bring the file back as it was"
            ) from None
        records.append(record)
    return records


def _before(record, step, evaluated):
    """Whether a record is of steps up to `step` (its evaluation if `evaluated`)."""
    return record["step"] < step or (
        record["step"] == step and (evaluated or record["split"] == "train")
    )
