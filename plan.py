"""What a run will do, in words: before it starts, and as its first lines."""

import trm_model
from config import Config, config_yaml, planned_workers, with_forward_dtype
from schedule import Schedule, stages
from train_state import TrainState, create_model, load_dataset
from utils import UserError


def plan_text(config: Config) -> str:
    """The configuration as YAML, and what follows from it as comments.

    Where the dataset cannot be read, 9x9 grids and data.expected_puzzles are assumed. Raises
    UserError as `Schedule.of` and `stages` do.
    """
    num_puzzles: int | None
    sized = with_forward_dtype(config, "float32")  # no device is there to settle "auto"
    try:
        dataset = load_dataset(config, "train")
        num_puzzles, known = dataset.num_puzzles, str(dataset.path)
        model = create_model(sized, dataset)
    except UserError as error:
        num_puzzles = config.data.expected_puzzles
        known = f"not read, 9x9 grids and data.expected_puzzles assumed: {error}"
        model = trm_model.TinyRecursiveModel(sized.model, 81, 11)
    batch, workers = config.training.global_batch_size, planned_workers(config)
    cells = f"{model.prefix_len} prefix positions and {model.seq_len} cells"
    lines = {
        "dataset": known,
        "training puzzles": num_puzzles or "unknown before the dataset is there",
        "workers": workers,
        "per-worker batch": batch // workers,
        "parameters": trm_model.num_parameters(model),
        "sequence length": f"{model.length} ({cells})",
        "FLOP a step": f"{step_flops(config, model):.4g}",
    }
    if num_puzzles:
        schedule, minutes = Schedule.of(config, num_puzzles), config.checkpoint.interval_minutes
        or_minutes = f" or {minutes:g} minutes" if minutes else ""
        lines |= {
            "steps an epoch": f"{num_puzzles / batch:.4g}",
            "epochs": f"{config.training.epochs:g}",
            "total steps": schedule.total_steps,
            **stage_lines(config, model, schedule.total_steps),
            "evaluation every": f"{schedule.evaluation_interval} steps",
            "checkpoint every": f"{schedule.checkpoint_interval} steps{or_minutes}",
        }
    comments = "".join(f"\n# {key}: {value}" for key, value in lines.items())
    return config_yaml(config) + comments


def step_flops(
    config: Config, model: trm_model.TinyRecursiveModel, cycles: trm_model.Cycles | None = None
) -> float:
    """FLOPs of a training step, over all workers. cycles: None for the model's own."""
    examples = config.training.global_batch_size
    return examples * trm_model.step_flops_per_example(model, train=True, cycles=cycles)


def stage_lines(
    config: Config, model: trm_model.TinyRecursiveModel, total_steps: int
) -> dict[str, str]:
    """{what: text} of each stage of training.curriculum; {} without one."""
    if not config.training.curriculum:
        return {}
    lines = {}
    for begin, stage in stages(config, total_steps):
        flops = step_flops(config, model, trm_model.Cycles(stage.H_cycles, stage.L_cycles))
        lines[f"stage from step {begin}"] = (
            f"H_cycles {stage.H_cycles}, L_cycles {stage.L_cycles}, {flops:.4g} FLOP a step"
        )
    return lines


def start_text(
    state: TrainState, schedule: Schedule, url: str, peak_flops: float, source: str
) -> str:
    """The first lines of a training. peak_flops, source: of Device.peak_flops."""
    training, world_size = state.config.training, state.device.workers.world_size
    batch = training.global_batch_size
    flops = step_flops(state.config, state.model, state.objective.cycles)
    curriculum = "".join(
        f"\n{what}: {text}"
        for what, text in stage_lines(state.config, state.model, schedule.total_steps).items()
    )
    begins = f"goes on after step {state.step}" if state.step else "begins"
    return (
        f"{url} {begins}: to step {schedule.last_step:,} of {schedule.total_steps:,} "
        f"({training.epochs:,g} epochs of {state.num_puzzles:,} puzzles), "
        f"evaluation every {schedule.evaluation_interval:,}\n"
        f"device {state.device.name}, {world_size} worker(s), batch {batch} "
        f"({batch // world_size} a worker), {trm_model.num_parameters(state.model):,} parameters, "
        f"{state.config.model.forward_dtype}, {flops:.3g} FLOP a step, "
        f"peak {peak_flops / 1e12:.2f} TFLOP/s ({source}){curriculum}"
    )
