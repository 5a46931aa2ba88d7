"""Train and evaluate a Tiny Recursive Model.

    python train_tpu.py --config configs/quickstart.yaml            # a laptop: 3 to 10 minutes
    python train_tpu.py --config configs/e1_1.yaml --print_config   # what would run
    python train_tpu.py --config configs/e1_1.yaml device=cuda training.seed=1 --run_name e1_1_seed1
    python train_tpu.py --config configs/quickstart.yaml --eval_only --checkpoint best
    python train_tpu.py --config configs/e4_4.yaml --eval_only --average 4

The same command again goes on where the run stopped.
"""

import startup

startup.require("torch")
import argparse
import re
from argparse import Namespace
from pathlib import Path

from config import Config, load_config
from device import Device
from eval_only import evaluate_only, steps_to_average
from evaluation import Evaluator
from initial_weights import initial_weights
from plan import plan_text, start_text
from preemption import Preemption, cause, exit_status, lost_workers_may_be_preempted
from provenance import start_record
from run_folder import RunFolder, open_checkpoints
from schedule import Schedule
from train_state import TrainState, check_same_run, load_datasets, settle_forward_dtype
from utils import UserError, run_cli
from workers import check_workers, launch


def parse_args() -> Namespace:
    """The command line, checked. Raises UserError if an argument is not valid."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML configuration")
    add("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    add("--run_name", help="folder under logging.output_dir (default: the configuration's name)")
    add("--max_steps", type=int, metavar="N", help="stop after step N, with a checkpoint")
    add("--init_from", metavar="FILE", help="start from these weights (the original's or ours)")
    add("--take_over", action="store_true", help="train even if another process has the run")
    add("--eval_only", action="store_true", help="evaluate --checkpoint on test, write eval.json")
    add(
        "--checkpoint",
        metavar="latest|best|STEP|FILE",
        help="what --eval_only evaluates (default: latest)",
    )
    add(
        "--average",
        action="append",
        default=[],
        metavar="K|STEP,STEP,...",
        help="with --eval_only: also the mean of the raw weights of the last K checkpoints, or of "
        "those of these steps; may be given several times",
    )
    add("--print_config", action="store_true", help="print what would run, and stop")
    args = parser.parse_intermixed_args()
    args.run_name = Path(args.config).stem if args.run_name is None else args.run_name
    if Path(args.run_name).name != args.run_name or args.run_name in ("", ".."):
        raise UserError(
            f"--run_name {args.run_name!r}: must be one folder name; set logging.output_dir for "
            "the place"
        )
    for name in ("init_from", "checkpoint"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} '': must name a checkpoint: a shell variable may be unset")
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError(f"--max_steps {args.max_steps}: must be >= 1")
    if args.checkpoint and not args.eval_only:
        raise UserError(
            "--checkpoint: only --eval_only takes it; to start from weights use --init_from, to "
            "resume give no flag"
        )
    for text in args.average:
        check_average(text, args)
    if args.init_from and args.eval_only:
        raise UserError("--init_from: not with --eval_only: name the file by --checkpoint")
    return args


def check_average(text: str, args: Namespace) -> None:
    """Raises UserError unless `text` is valid for --average: K >= 2, or different steps."""
    if not args.eval_only:
        raise UserError("--average: only with --eval_only, which evaluates the averaged weights")
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(
            f"--average {text}: must be a number of checkpoints, as 4, or steps, as 1000,2000,3000"
        )
    numbers = [int(number) for number in text.split(",")]
    if numbers[0] < 2 and len(numbers) == 1:
        raise UserError(f"--average {text}: must be at least 2 checkpoints")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--average {text}: a step is given twice")


def main() -> int | None:
    """Run what the command line asks for. Returns the exit status; None is 0."""
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(plan_text(config))
        return 0
    if args.average:
        # Texts become lists of steps here, so that a mistake ends the command before any worker
        # starts.
        checkpoints = open_checkpoints(config, args.run_name)
        args.average = [steps_to_average(checkpoints, text) for text in args.average]
    return launch(evaluate_only if args.eval_only else train_worker, config, args)


def train_worker(rank: int, config: Config, args: Namespace) -> int:
    """Train one worker. Returns the exit status: 0, 143 after SIGTERM, 130 after Ctrl-C."""
    with lost_workers_may_be_preempted():
        return train(config, args, Device(config.device))


def train(config: Config, args: Namespace, device: Device) -> int:
    """Train from the newest checkpoint, or from the start, to the last step, and evaluate.

    Every worker runs these lines. What only rank 0 does lies inside of RunFolder and its logger.
    Returns the exit status, as `train_worker` does.
    """
    with device.workers.together():  # if one worker raises in here, all end with that one message
        datasets, weights = load_datasets(config), None
        check_workers(config, device)
        schedule = Schedule.of(config, datasets["train"].num_puzzles, args.max_steps)
        if args.init_from:
            weights = initial_weights(config, datasets["train"], args.init_from, device.workers)

    folder = RunFolder(config, args.run_name, device.workers, args.take_over)
    with folder, Preemption(device.workers, folder) as preemption:
        checkpoint = folder.latest()
        with device.workers.together():
            config = resumed_config(config, args, device, checkpoint, folder.url)
            state = TrainState(config, device, datasets["train"], checkpoint, weights)
        evaluated = folder.is_evaluated(state.step)
        if schedule.is_done(state.step, evaluated):
            folder.say_done(state.step, schedule.total_steps)
            preemption.part_from_workers()
            return 0
        start = start_record(state, datasets, args.config, args.init_from)
        logger = folder.begin(config, start, schedule.last_step, evaluated)
        peak_flops, source = device.peak_flops(state.model.forward_dtype)
        logger.say(start_text(state, schedule, folder.url, peak_flops, source))
        evaluator = Evaluator(state, datasets, folder, logger)
        if schedule.evaluation_due(state.step) and not evaluated:
            evaluator.run()  # an earlier start ended between this checkpoint and its evaluation

        stop = False
        state.start_clock()
        for batch in state.batches(schedule.last_step):
            state.advance(batch)
            logger.advance(state.step)
            stop, save = preemption.after_step(state.step, folder.save_due())
            save = save or stop or schedule.checkpoint_due(state.step)
            if not (save or schedule.log_due(state.step)):
                continue
            totals = state.wait()  # the one place where the host waits for the device
            folder.check(totals)
            if schedule.log_due(state.step):
                logger.log(state.record(totals, peak_flops))
                state.start_interval()
            if save:
                folder.save(state.step, state.state_dict())
                preemption.saved()
            if stop:
                break
            if schedule.evaluation_due(state.step):
                evaluator.run()
            state.start_clock()
        return end(state, schedule, folder, preemption, stop)


def end(
    state: TrainState, schedule: Schedule, folder: RunFolder, preemption: Preemption, stop: bool
) -> int:
    """Leave the other workers and complete the run's folder. Returns the exit status.

    stop: whether SIGTERM or Ctrl-C ended the training. Then only a few seconds are left.
    """
    folder.logger.close()
    saved = folder.leave() if stop else True
    preemption.part_from_workers()  # they need not wait for the last upload
    if stop:
        how = f"stopped by {cause()}"
    else:
        folder.close()
        how = "finished" if state.step == schedule.total_steps else "stopped by --max_steps"
    folder.say_end(state.step, schedule.total_steps, how, saved)
    return exit_status() if stop else 0


def resumed_config(
    config: Config, args: Namespace, device: Device, checkpoint: dict | None, url: str
) -> Config:
    """The configuration with the forward_dtype of the checkpoint, or without one of the device.

    checkpoint: of RunFolder.latest(). url: the run's folder, for messages. Raises UserError if the
    run was begun with another configuration, or if --init_from is given and there is a checkpoint.
    """
    saved = None
    if checkpoint:
        saved = checkpoint["config"]
        check_same_run(config, saved, url)
        if args.init_from:
            raise UserError(
                f"--init_from {args.init_from}: {url} has begun already, and goes on from its own "
                f"step {checkpoint['step']}: leave the flag out, or give another --run_name"
            )
    return settle_forward_dtype(config, device, saved)


if __name__ == "__main__":
    run_cli(main)
