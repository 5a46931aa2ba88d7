"""One record for each logging interval: metrics.jsonl, TensorBoard, and the console.

The console shows a progress bar on a terminal, and lines elsewhere. Reading records needs neither
tensorboardX nor tqdm.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from utils import UserError, replace_file

# the keys of a record that differ between two runs of the same training
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

    folder: for metrics.jsonl and tensorboard/. start_step: the step of the checkpoint to continue
    from, or 0. evaluated: whether the evaluation of that step was finished. Records of later steps
    are dropped, and so is an evaluation of start_step that was not finished. So resuming neither
    repeats a record nor loses one. last_step: where this command stops, for the progress bar and
    the time left. Raises UserError if the records are damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        start_step: int,
        evaluated: bool,
        last_step: int,
        tensorboard: bool = True,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            records = read_records(self.path.read_bytes(), self.path)
            kept = [record for record in records if _is_kept(record, start_step, evaluated)]
            replace_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(self.path, "a")
        self.last_step = last_step
        self.first_step_began: float | None = time.monotonic()
        self.writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # not needed to read records

            tensorboard_folder = str(Path(folder) / "tensorboard")
            self.writer = SummaryWriter(tensorboard_folder, purge_step=start_step + 1)
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=last_step, initial=start_step, unit="step", dynamic_ncols=True)

    def log(self, record: dict[str, Any]) -> None:
        """Write one record. It is a flat dict with step, split, wall_time (Unix seconds) and
        metrics."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.writer:
            name = record["split"]
            if "weights" in record:
                name += f"_{record['weights']}"
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "wall_time"):
                    step, wall_time = record["step"], record["wall_time"]
                    self.writer.add_scalar(f"{name}/{key}", value, step, wall_time)
        self.say(console_line(record, self.last_step))

    def say(self, text: str) -> None:
        """Print a line; on a terminal above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar to `step`. Where there is no bar, print a line after the first step, because
        it compiles and may take a minute."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
        elif self.first_step_began is not None:
            seconds = time.monotonic() - self.first_step_began
            self.say(f"the first step was started after {seconds:.0f} s")
        self.first_step_began = None

    def flush(self) -> None:
        """Write every record to the disk. Call it before saving a checkpoint: a run that resumes
        there relies on the records up to it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Write every record to the disk and close the files. `say` may be called after it."""
        self.flush()
        self.file.close()
        if self.writer:
            self.writer.close()
        if self.bar is not None:
            self.bar.close()


class SilentLogger:
    """The logger of the other workers: it has the methods of MetricsLogger, which do nothing."""

    def log(self, record: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def console_line(record: dict[str, Any], last_step: int | None = None) -> str:
    """One line of text for a record; with `last_step` how much is left of the training."""
    step = "-" if record["step"] is None else record["step"]  # not known of the original's weights
    if record["split"] != "train":
        weights = f"{record['weights']} weights"
        if steps := record.get("averaged_steps"):
            weights = f"average of {len(steps)} checkpoints"
        return (
            f"step {step:>6}  {record['split']} ({weights}, "
            f"{record['count']:,} puzzles)  exact {record['exact_accuracy']:.2%}  "
            f"cells {record['cell_accuracy']:.2%}  halting head {record['q_halt_accuracy']:.1%}  "
            f"{record['puzzles_per_second']:,.0f} puzzles/s"
        )
    of_total, left = "", ""
    if last_step is not None:
        of_total = f" of {last_step:,}"
        seconds = (last_step - record["step"]) / record["steps_per_second"]
        left = f"  {_duration(seconds)} left" if seconds > 0 else ""
    exact, cells, steps = (
        "-" if record[key] is None else format(record[key], spec)  # no example has halted
        for key, spec in (
            ("exact_accuracy", ".1%"),
            ("cell_accuracy", ".1%"),
            ("mean_steps", ".1f"),
        )
    )
    return (
        f"step {step:>6}{of_total}  loss {record['loss']:.4f}  exact {exact}  cells {cells}  "
        f"steps {steps}  lr {record['lr']:.1e}  {record['examples_per_second']:,.0f} ex/s{left}"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def read_records(data: bytes, name: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl or starts.jsonl, from the content of the file.

    A last line without a newline is no record: it is still being written, or was cut off by a kill.
    Raises UserError, which calls the file `name`, if another line is damaged.
    """
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no mapping")
        except ValueError as error:
            raise UserError(
                f"{name}: a record is damaged (line {number}: {error}): take that line out, or "
                "bring the file back as it was"
            ) from None
        records.append(record)
    return records


def _is_kept(record: dict[str, Any], step: int, evaluated: bool) -> bool:
    """Whether a run that resumes at `step` keeps a record. See MetricsLogger."""
    if record["step"] != step:
        return record["step"] < step
    return evaluated or record["split"] == "train"
