"""When something is due in a run, and how deep the recursion is at each step."""

from dataclasses import dataclass

from config import Config, Stage
from utils import UserError


def total_steps(config: Config, num_puzzles: int) -> int:
    """Optimizer steps of the whole run: floor(epochs * puzzles / global batch)."""
    return int(config.training.epochs * num_puzzles // config.training.global_batch_size)


def evaluation_interval_steps(config: Config, num_puzzles: int) -> int:
    """`evaluation.interval_epochs` in optimizer steps, at least one."""
    examples = config.evaluation.interval_epochs * num_puzzles
    return max(1, round(examples / config.training.global_batch_size))


def stages(config: Config, total_steps: int) -> list[tuple[int, Stage]]:
    """[(steps done before the stage, stage)] of training.curriculum.

    Without a curriculum there is one stage, with the model's H_cycles and L_cycles. A stage begins
    after round(begin * total_steps) steps. Raises UserError if a stage has no step.
    """
    model = config.model
    whole = Stage(begin=0.0, H_cycles=model.H_cycles, L_cycles=model.L_cycles)
    given = config.training.curriculum
    if not given:
        return [(0, whole)]
    begins = [round(stage.begin * total_steps) for stage in given]
    if any(first == second for first, second in zip(begins, [*begins[1:], total_steps])):
        raise UserError(
            f"training.curriculum: of {total_steps} steps its stages begin after {begins}, so one "
            "has no step: train for more steps, or leave a stage out"
        )
    return list(zip(begins, given))


@dataclass(frozen=True)
class Schedule:
    """When something is due in a run of `total_steps` optimizer steps. Steps count from 1."""

    total_steps: int
    last_step: int  # where this command stops: at total_steps, or earlier by --max_steps
    evaluation_interval: int  # this and the next two in steps
    log_interval: int
    checkpoint_interval: int

    @classmethod
    def of(cls, config: Config, num_puzzles: int, max_steps: int | None = None) -> "Schedule":
        """The schedule that `config` gives for this many training puzzles.

        Raises UserError if the epochs make no full batch.
        """
        total = total_steps(config, num_puzzles)
        if total < 1:
            raise UserError(
                f"training.epochs = {config.training.epochs}: of {num_puzzles} puzzles they make "
                f"no full batch of {config.training.global_batch_size}: ask for more epochs, or a "
                "smaller training.global_batch_size"
            )
        return cls(
            total,
            min(total, max_steps or total),
            evaluation_interval_steps(config, num_puzzles),
            config.logging.interval_steps,
            config.checkpoint.interval_steps,
        )

    def log_due(self, step: int) -> bool:
        """Whether a record is due after `step`."""
        return step % self.log_interval == 0 or step == self.last_step

    def is_done(self, step: int, evaluated: bool) -> bool:
        """Whether nothing is left to do after `step`. evaluated: whether it has been evaluated."""
        return step >= self.last_step and (evaluated or not self.evaluation_due(step))

    def evaluation_due(self, step: int) -> bool:
        """Whether an evaluation is due after `step`. The end by --max_steps alone needs none."""
        return step > 0 and (step % self.evaluation_interval == 0 or step == self.total_steps)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`: an evaluation is recorded in one, too."""
        return (
            step % self.checkpoint_interval == 0
            or step == self.last_step
            or self.evaluation_due(step)
        )
