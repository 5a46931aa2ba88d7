"""Train and evaluate a Tiny Recursive Model.

    python train_tpu.py --config configs/quickstart.yaml                        # a laptop: 3 to 10 minutes
    python train_tpu.py --config configs/e1_1.yaml --print_config               # what would run, and how much of it
    python train_tpu.py --config configs/e1_1.yaml device=cuda training.seed=1 --run_name e1_1_seed1
    python train_tpu.py --config configs/quickstart.yaml --eval_only --checkpoint best

The same command again goes on where the run stopped.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch

import preemption
import trm_model
import workers
from adam_atan2 import AdamATan2, PuzzleEmbeddingSGD, lr_at, new_state
from checkpoint_manager import load_checkpoint
from config import (
    config_yaml,
    differences,
    evaluation_interval_steps,
    load_config,
    planned_workers,
    total_steps,
)
from data_loader_tpu import SudokuDatasetTPU, create_dataloader_tpu
from dataset_cache import local_dataset
from device import Device
from ema_distributed import EMADistributed
from evaluation import evaluate, evaluate_step, write_eval_json
from metrics_logger import MetricsLogger, SilentLogger, console_line
from run_folder import (
    RunFolder,
    check_seen_by_all,
    open_checkpoints,
    run_url,
    start_record,
    writing_to,
)
from storage import StorageError, join, open_folder
from trm_model import METRIC_KEYS, Carry
from utils import UserError, WorkerGone, replace_file, run_cli


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration"
    )
    parser.add_argument(
        "--run_name", help="folder under logging.output_dir (default: the configuration's name)"
    )
    parser.add_argument(
        "--max_steps", type=int, metavar="N", help="stop after step N of the run, with a checkpoint"
    )
    parser.add_argument(
        "--init_from",
        metavar="FILE",
        help="start from these weights (the original's or this kit's)",
    )
    parser.add_argument(
        "--take_over",
        action="store_true",
        help="train even though another process holds the run; that one ends",
    )
    parser.add_argument(
        "--eval_only",
        action="store_true",
        help="evaluate --checkpoint on the test split, write eval.json",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|FILE",
        help="what --eval_only evaluates (default: latest)",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print what would run, and stop"
    )
    args = parser.parse_intermixed_args()
    args.run_name = Path(args.config).stem if args.run_name is None else args.run_name
    if Path(args.run_name).name != args.run_name or args.run_name in ("", ".."):
        raise UserError(
            f"--run_name {args.run_name!r}: must be one folder name; set logging.output_dir for the place"
        )
    for name in ("init_from", "checkpoint"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} '': must name a checkpoint: a shell variable may be unset")
    if args.max_steps is not None and args.max_steps < 1:
        raise UserError(f"--max_steps {args.max_steps}: must be >= 1")
    if args.checkpoint and not args.eval_only:
        raise UserError(
            "--checkpoint: only --eval_only takes it; to start from weights use --init_from, to resume give no flag"
        )
    if args.init_from and args.eval_only:
        raise UserError("--init_from: not with --eval_only: name the file by --checkpoint")
    return args


def main():
    args = parse_args()
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print_config(config)
    elif args.eval_only:
        return workers.launch(evaluate_only, config, args)
    else:
        return workers.launch(train_worker, config, args)


# ---------------------------------------------------------------------------------------------------------
# The parts of a run
# ---------------------------------------------------------------------------------------------------------
def load_dataset(config, split):
    dataset = SudokuDatasetTPU(local_dataset(config.data.dataset_path), split)
    expected = config.data.expected_puzzles
    if split == "train" and expected not in (None, dataset.num_puzzles):
        raise UserError(
            f"data.expected_puzzles = {expected}: {config.data.dataset_path} has {dataset.num_puzzles} training puzzles: "
            "build the dataset that this configuration is planned for, or change data.expected_puzzles"
        )
    return dataset


def load_datasets(config):
    """{split: dataset} of what a training needs; raises UserError where a split or enough training puzzles are missing."""
    datasets = {
        split: load_dataset(config, split) for split in ("train", config.evaluation.split, "test")
    }
    check_schedule(config, datasets["train"].num_puzzles)
    return datasets


def create_model(config, dataset):
    """The model for a dataset's grids, on the CPU; initial weights depend on training.seed alone."""
    return trm_model.TinyRecursiveModel(
        config.model,
        dataset.seq_len,
        dataset.vocab_size,
        dataset.num_puzzle_identifiers,
        config.training.seed,
    )


def use_kernels(model, config, device, training=True):
    """On a TPU: let the model (still on the CPU) run through pallas_kernels.py if that works there, on every worker; say so if not."""
    if device.name != "tpu" or not config.training.pallas_kernels:
        return
    batch = (
        config.training.global_batch_size
        // device.world_size
        // config.training.grad_accumulation_steps
    )
    try:
        import pallas_kernels

        reason = pallas_kernels.fault(
            model, device, batch if training else None, config.evaluation.batch_size
        )
    except Exception as error:  # without jax, or what it, its export or the compiler raise: none of it ends a run, which needs no kernels
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    failed = torch.tensor([int(reason is not None)])
    if device.world_size > 1:
        device.wait_for_vote(device.start_vote(failed))
    if not failed.item():
        pallas_kernels.use(model, device.generation)
    elif device.rank == 0:
        print(
            f"warning: the TPU kernels are not used, and a step takes longer: {reason or 'they do not work on another worker'} "
            "(training.pallas_kernels=false: no kernels, no warning)",
            file=sys.stderr,
        )


def create_optimizer(config, model):
    """(optimizer of the network, optimizer of the puzzle embedding or None) for a model on its device.

    Learning rates are set at every step, as tensors; state has its final shape from the start.
    """
    training = config.training
    shared = {"betas": (training.beta1, training.beta2), "weight_decay": training.weight_decay}
    if training.optimizer == "adam_atan2":
        optimizer = AdamATan2(model.parameters(), 0.0, **shared)
    else:
        on_cpu = model.H_init.device.type == "cpu"
        optimizer = torch.optim.AdamW(model.parameters(), 0.0, capturable=not on_cpu, **shared)
        for p in model.parameters():
            optimizer.state[p] = new_state(p)
    puzzle_optimizer = None
    if model.prefix_len:
        puzzle_optimizer = PuzzleEmbeddingSGD(
            model.puzzle_emb.weights, training.puzzle_emb_weight_decay
        )
    return optimizer, puzzle_optimizer


class Run:
    """Everything that training changes, on its device: what a checkpoint holds."""

    def __init__(self, config, device, dataset, checkpoint=None, init_from=None):
        self.config, self.device = config, device
        torch.manual_seed(config.training.seed)
        self.model = create_model(config, dataset)
        use_kernels(self.model, config, device)
        if checkpoint:
            trm_model.load_named_state(self.model, checkpoint["model"], "checkpoint")
        elif init_from:
            trm_model.load_initial_weights(self.model, init_from, device.rank)
        # a deep copy on the CPU: one made on XLA would be part of the first step's graph, and of no other's
        self.ema = (
            EMADistributed(
                self.model, config.training.ema_rate, device, config.training.ema_strategy
            )
            if config.training.ema
            else None
        )
        if checkpoint and self.ema:
            trm_model.load_named_state(self.ema.module, checkpoint["ema"], "checkpoint")
        self.model.to(device.torch)
        if self.ema:
            self.ema.module.to(device.torch)
        self.optimizer, self.puzzle_optimizer = create_optimizer(config, self.model)
        self.loader = create_dataloader_tpu(dataset, config, device.rank, device.world_size)
        self.step, self.train_seconds = 0, 0.0
        self.total_steps = total_steps(config, dataset.num_puzzles)
        self.start_interval()
        carry = self.model.empty_carry(config.training.global_batch_size // device.world_size)
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.loader.load_state_dict(checkpoint["loader"])
            torch.set_rng_state(checkpoint["generator"])
            carry = Carry(
                **{name: tensor[self.loader.mine] for name, tensor in checkpoint["carry"].items()}
            )
            self.totals = device.put(checkpoint["totals"])
            for name in ("step", "train_seconds", "interval_steps", "interval_seconds"):
                setattr(self, name, checkpoint[name])
        self.carry = device.put(carry)

    def start_interval(self):
        """Begin a new logging interval. totals: sums of METRIC_KEYS and of the gradient norm, and the first step
        with a non-finite number (0: none)."""
        self.totals = self.device.put(torch.zeros(len(METRIC_KEYS) + 2))
        self.interval_steps, self.interval_seconds = 0, 0.0

    def tensors(self):
        """Every tensor that the run keeps on its device from step to step, each once."""
        modules = [self.model, self.ema.module] if self.ema else [self.model]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        tensors += [
            t
            for state in self.optimizer.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor)
        ]
        return list({id(t): t for t in (*tensors, *self.carry, self.totals)}.values())

    def state_dict(self):
        """All of it on the CPU, as tensors and plain data, the same whatever the number of workers; on rank 0 (None on the
        others, all of which must call it: each has its slots of the carry)."""
        carry = self.device.gather(list(self.device.fetch(self.carry)))
        if carry is None:
            return None
        return self.device.fetch(
            {
                "step": self.step,
                "model": trm_model.named_state(self.model),
                "ema": trm_model.named_state(self.ema.module) if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "carry": {name: torch.cat(parts) for name, parts in zip(Carry._fields, carry)},
                "loader": self.loader.state_dict(),
                "generator": torch.get_rng_state(),
                "config": dataclasses.asdict(self.config),
                "totals": self.totals,
                "train_seconds": self.train_seconds,
                "interval_steps": self.interval_steps,
                "interval_seconds": self.interval_seconds,
            }
        )


def check_same_run(config, saved, url):
    if changed := differences(config, saved, ("model", "data", "training")):
        raise UserError(
            f"{url} was begun with another configuration ({changed}): give this one its own --run_name, or restore the old "
            "values to go on"
        )


def check_same_model(config, saved, checkpoint):
    if changed := differences(config, saved, ("model",)):
        raise UserError(
            f"--checkpoint {checkpoint}: it was trained with another model ({changed}): evaluate it with that model section"
        )


# ---------------------------------------------------------------------------------------------------------
# One training step
# ---------------------------------------------------------------------------------------------------------
def train_step(run, batch, forward):
    """Forward, backward and update on this worker's part of a batch: one XLA graph, one all-reduce, no host sync.

    batch: on the device; the loader's, with min_halt_steps [B] and scalars = (lr, puzzle_emb_lr, step) float32.
    forward: trm_model.act_step, compiled or not.
    """
    training, model = run.config.training, run.model
    lr, puzzle_emb_lr, step = batch["scalars"].unbind()
    parts = training.grad_accumulation_steps
    carry = model.admit(run.carry, batch)
    rows = model.puzzle_rows(carry)
    metrics, carries, row_grads = 0, [], []
    for part in range(parts):
        part_of = [tensor.chunk(parts)[part] for tensor in carry]
        part_rows = None if rows is None else rows.chunk(parts)[part].detach().requires_grad_()
        loss, part_metrics, after = forward(
            model, Carry(*part_of), part_rows, batch["min_halt_steps"].chunk(parts)[part]
        )
        (loss / training.global_batch_size).backward()
        metrics = metrics + part_metrics
        carries.append(after)
        row_grads.append(None if rows is None else part_rows.grad)
    run.carry = (
        carries[0] if parts == 1 else Carry(*(torch.cat(tensors) for tensors in zip(*carries)))
    )

    params = list(model.parameters())
    row_sums = (
        ()
        if rows is None
        else run.puzzle_optimizer.row_sums(run.carry.puzzle_identifiers, torch.cat(row_grads))
    )
    metrics, *summed = run.device.all_reduce([metrics, *(p.grad for p in params), *row_sums])
    for p, grad in zip(params, summed):
        p.grad = grad
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if training.grad_clip_norm:
        torch.nn.utils.clip_grads_with_norm_(params, training.grad_clip_norm, grad_norm)
    run.optimizer.param_groups[0]["lr"] = lr
    run.optimizer.step()
    run.optimizer.param_groups[0]["lr"] = 0.0  # this step's own, and no part of a checkpoint
    run.optimizer.zero_grad(set_to_none=True)
    if rows is not None:
        run.puzzle_optimizer.step(*summed[len(params) :], puzzle_emb_lr)

    sums = torch.cat((metrics, grad_norm.float().view(1)))
    first_bad = run.totals[-1]
    first_bad = torch.where((first_bad == 0) & ~torch.isfinite(sums).all(), step, first_bad)
    run.totals = torch.cat((run.totals[:-1] + sums, first_bad.view(1)))
    if run.ema:
        run.ema.update_in_step(model)


def replayed_step(run, forward):
    """train_step as a function of the batch alone, which on XLA is traced at its first call and replayed after."""
    return run.device.traced_once(lambda batch: train_step(run, batch, forward), run.tensors)


def host_batch(run, batch):
    """Add to a loader's batch what the next step needs from the host: exploration and learning rates."""
    training, model, step = run.config.training, run.config.model, run.step + 1
    min_steps = trm_model.exploration_min_steps(
        training.seed,
        step,
        training.global_batch_size,
        model.halt_exploration_prob,
        model.halt_max_steps,
    )
    rates = [
        lr_at(step, base, training.lr_warmup_steps, run.total_steps, training.lr_min_ratio)
        for base in (training.lr, training.puzzle_emb_lr)
    ]
    return {
        **batch,
        "min_halt_steps": min_steps[run.loader.mine],
        "scalars": np.float32([*rates, step]),
    }


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------
def train_worker(rank, config, args):
    """Train one worker from the newest checkpoint, or from the start, to the last step; evaluate on the way.
    Returns the exit status, 143 after SIGTERM, 130 after Ctrl-C."""
    files = preempted = None
    try:
        device = Device(config.device, config.model.forward_dtype)
        datasets = device.on_all(lambda: load_datasets(config))
        device.on_all(lambda: workers.check_workers(config, device))
        files = device.on_all(
            lambda: RunFolder(config, args.run_name, args.take_over) if rank == 0 else None
        )
        device.on_all(lambda: check_seen_by_all(run_url(config, args.run_name)))
        preempted = preemption.Preemption(
            device, *((files.hurry, files.leave) if files else (lambda: None, lambda: True))
        )
        return train(config, args, device, datasets, files, preempted)
    except WorkerGone:
        time.sleep(
            1
        )  # for news of a SIGTERM: that a fellow worker left because of it is no failure
        if preemption.requested():
            return preemption.exit_status()
        first = preempted and preempted.first_failure(1)
        if first:  # which has said what there is to say
            sys.exit(first)
        raise
    except Exception as error:
        if preempted:
            preempted.first_failure(2 if isinstance(error, UserError) else 1)
        raise
    finally:
        if preempted:
            preempted.close()
        if files:
            files.leave()


def train(config, args, device, datasets, files, preempted):
    """The training of one worker. files: RunFolder on rank 0, None on the others. Returns the exit status."""
    # ----- state -----
    num_puzzles, url = datasets["train"].num_puzzles, run_url(config, args.run_name)
    total, eval_interval = check_schedule(config, num_puzzles)
    last = min(total, args.max_steps or total)
    checkpoint = device.broadcast_bytes(
        device.on_all(lambda: files.checkpoints.load_latest() if files else None)
    )
    if checkpoint:
        checkpoint = load_checkpoint(checkpoint)
        device.on_all(lambda: check_same_run(config, checkpoint["config"], url))
    run = device.on_all(lambda: Run(config, device, datasets["train"], checkpoint, args.init_from))
    evaluated = bool(
        device.broadcast_bytes(b"yes" if files and files.checkpoints.metrics(run.step) else None)
    )

    def evaluation_due():
        return run.step > 0 and (run.step % eval_interval == 0 or run.step == total)

    if run.step >= last and (evaluated or not evaluation_due()):
        if files:
            print(
                f"{url} has done step {run.step} of {total} already: {files.checkpoints.newest_text()}"
            )
        preempted.close()
        device.leave()
        return 0

    # ----- say what will happen -----
    peak, logger = device.peak_flops(run.model.forward_dtype), SilentLogger()
    if files:
        files.prepare()
        replace_file(files.path / "config.yaml", config_yaml(config))
        files.note_start(start_record(run, datasets, args))
        logger = MetricsLogger(files.path, run.step, evaluated, last, config.logging.tensorboard)
    logger.say(start_text(run, num_puzzles, last, eval_interval, url, peak))
    forward, eval_forward = (
        device.compiled(f, config.training.compile)
        for f in (trm_model.act_step, trm_model.evaluation_step)
    )

    step = replayed_step(run, forward)

    # ----- the loop -----
    batches, stop = iter(run.loader), False
    if (
        evaluation_due() and not evaluated
    ):  # the run was stopped between this step's checkpoint and its evaluation
        evaluate_step(run, datasets, eval_forward, files, logger)
    clock = saved_at = time.monotonic()
    while run.step < last:
        batch = host_batch(run, next(batches))
        step(device.put(batch))
        if run.ema:
            run.ema.update_after_step(run.model)
        run.step += 1
        run.interval_steps += 1
        preempted.nothing_to_lose = False
        logger.advance(run.step)
        minutes = config.checkpoint.interval_minutes
        stop, save = preempted.poll(
            run.step, bool(files and minutes and time.monotonic() - saved_at > 60 * minutes)
        )
        log = run.step % config.logging.interval_steps == 0 or run.step == last
        save = (
            save
            or stop
            or run.step % config.checkpoint.interval_steps == 0
            or run.step == last
            or evaluation_due()
        )
        if not (log or save):
            continue
        totals = device.fetch(
            run.totals
        ).tolist()  # waits for the device, so that the clock is right
        seconds = time.monotonic() - clock
        run.train_seconds, run.interval_seconds = (
            run.train_seconds + seconds,
            run.interval_seconds + seconds,
        )
        stop_if_not_finite(totals, files)
        if files:
            files.lock.check()
        if log:
            logger.log(
                training_record(run, totals, float(batch["scalars"][0]), num_puzzles, peak[0])
            )
            run.start_interval()
        if save:
            logger.flush()
            state = run.state_dict()
            if files:
                files.save(run.step, state)
            saved_at = time.monotonic()
            preempted.saved()
        if stop:
            break
        if evaluation_due():
            preempted.nothing_to_lose = True
            evaluate_step(run, datasets, eval_forward, files, logger)
        clock = time.monotonic()

    # ----- the end -----
    batches.close()
    logger.close()
    if stop and files:
        saved = files.leave()
        logger.say(
            f"step {run.step} of {total}: stopped by {preemption.cause()}"
            + (f"; {files.newest_text()}; records: {url}/metrics.jsonl" if saved else "")
        )
    if stop or not files:
        preempted.close()
    device.leave()  # the others need not wait for the last upload
    if files and not stop:
        preempted.alone()
        preempted.nothing_to_lose = True
        files.close()
        ending = "finished" if run.step == total else "stopped by --max_steps"
        logger.say(
            f"step {run.step} of {total}: {ending}; {files.newest_text()}; records: {url}/metrics.jsonl"
        )
        preempted.close()
    return preemption.exit_status() if stop else 0


def check_schedule(config, num_puzzles):
    """(total steps, steps between evaluations); raises UserError where not one full batch is asked for."""
    total = total_steps(config, num_puzzles)
    if total < 1:
        raise UserError(
            f"training.epochs = {config.training.epochs}: of {num_puzzles} puzzles they make no full batch of "
            f"{config.training.global_batch_size}: ask for more epochs, or a smaller training.global_batch_size"
        )
    return total, evaluation_interval_steps(config, num_puzzles)


def stop_if_not_finite(totals, files):
    if totals[-1]:
        if not files:
            raise SystemExit(2)  # rank 0 says it
        with contextlib.suppress(StorageError):  # the loss is what is to be said
            files.saver.finish()
        raise UserError(
            f"step {int(totals[-1])}: the loss or a gradient is not finite; {files.checkpoints.newest_text()}. "
            "Lower training.lr, set training.grad_clip_norm, or use model.forward_dtype=float32"
        )


def training_record(run, totals, lr, num_puzzles, peak):
    """The record of a logging interval: losses are means over examples, accuracies over those that halted."""
    sums, batch = (
        dict(zip((*METRIC_KEYS, "grad_norm"), totals)),
        run.config.training.global_batch_size,
    )
    halted, steps = max(1.0, sums["count"]), run.interval_steps
    rate = steps / run.interval_seconds
    lm_loss, q_halt_loss = (sums[key] / (steps * batch) for key in ("lm_loss", "q_halt_loss"))
    flops = rate * batch * trm_model.step_flops_per_example(run.model, train=True)
    return {
        "step": run.step,
        "split": "train",
        "epoch": run.step * batch / num_puzzles,
        "lr": lr,
        "loss": lm_loss + 0.5 * q_halt_loss,
        "lm_loss": lm_loss,
        "q_halt_loss": q_halt_loss,
        "grad_norm": sums["grad_norm"] / steps,
        "count": int(sums["count"]),
        **{
            key: sums[key] / halted
            for key in ("cell_accuracy", "exact_accuracy", "q_halt_accuracy")
        },
        "mean_steps": sums["steps"] / halted,
        "wall_time": time.time(),
        "train_seconds": run.train_seconds,
        "steps_per_second": rate,
        "examples_per_second": rate * batch,
        "model_flops_per_second": flops,
        "mfu": flops / peak / run.device.world_size,
        **run.device.counters(),
    }


def start_text(run, num_puzzles, last, eval_interval, run_name, peak):
    config, device = run.config, run.device
    begins = f"goes on after step {run.step}" if run.step else "begins"
    flops = config.training.global_batch_size * trm_model.step_flops_per_example(
        run.model, train=True
    )
    return (
        f"{run_name} {begins}: to step {last:,} of {run.total_steps:,} ({config.training.epochs:,g} epochs of {num_puzzles:,} puzzles), "
        f"evaluation every {eval_interval:,}\n"
        f"device {device.name}, {device.world_size} worker(s), batch {config.training.global_batch_size} "
        f"({config.training.global_batch_size // device.world_size} a worker), {trm_model.num_parameters(run.model):,} parameters, "
        f"{flops:.3g} FLOP a step, peak {peak[0] / 1e12:.2f} TFLOP/s ({peak[1]})"
    )


# ---------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------
def evaluate_only(rank, config, args):
    """Evaluate a checkpoint on the whole test split, averaged and raw weights, and write eval.json."""
    device, checkpoints = (
        Device(config.device, config.model.forward_dtype),
        open_checkpoints(config, args.run_name),
    )
    dataset = device.on_all(lambda: load_dataset(config, "test"))
    path = device.on_all(
        lambda: checkpoints.resolve(args.checkpoint or "latest") if rank == 0 else None
    )
    source = device.broadcast_bytes(path and str(path).encode()).decode()
    content = device.broadcast_bytes(path and path.read_bytes())
    content = device.on_all(lambda: load_checkpoint(content, source))
    states = device.on_all(lambda: trm_model.weights_in(content, source))
    if "config" in content:
        device.on_all(lambda: check_same_model(config, content["config"], source))
    forward, results = device.compiled(trm_model.evaluation_step, config.training.compile), []
    for name, state in states.items():
        model = create_model(config, dataset)
        use_kernels(model, config, device, training=False)
        device.on_all(lambda: trm_model.load_named_state(model, state, source))
        metrics = evaluate(
            model.to(device.torch), dataset, device, config.evaluation.batch_size, forward
        )
        if metrics:
            results.append(
                {
                    "step": content["step"] if "config" in content else None,
                    "split": "test",
                    "weights": name,
                    "wall_time": time.time(),
                    **metrics,
                }
            )
            print(console_line(results[-1]), flush=True)
    if rank == 0:
        found = (
            join(checkpoints.folder.url, path.name)
            if args.checkpoint in (None, "latest", "best")
            else args.checkpoint
        )
        with writing_to(config):
            write_eval_json(open_folder(run_url(config, args.run_name)), found, config, results)
    device.leave()


# ---------------------------------------------------------------------------------------------------------
# --print_config
# ---------------------------------------------------------------------------------------------------------
def print_config(config):
    """The resolved configuration, and what follows from it."""
    print(config_yaml(config))
    try:
        dataset = load_dataset(config, "train")
        num_puzzles, known = dataset.num_puzzles, f"{dataset.path}"
        model = create_model(config, dataset)
    except UserError as error:
        num_puzzles, known = (
            config.data.expected_puzzles,
            f"not read, 9x9 grids and data.expected_puzzles assumed: {error}",
        )
        model = trm_model.TinyRecursiveModel(config.model, 81, 11)
    batch, workers = config.training.global_batch_size, planned_workers(config)
    derived = {
        "dataset": known,
        "training puzzles": num_puzzles if num_puzzles else "unknown before the dataset is there",
        "workers": workers,
        "per-worker batch": batch // workers,
        "parameters": trm_model.num_parameters(model),
        "sequence length": f"{model.length} ({model.prefix_len} prefix positions and {model.seq_len} cells)",
        "FLOP a step": f"{batch * trm_model.step_flops_per_example(model, train=True):.4g}",
    }
    if num_puzzles:
        total, eval_interval = check_schedule(config, num_puzzles)
        minutes = config.checkpoint.interval_minutes
        derived |= {
            "steps an epoch": f"{num_puzzles / batch:.4g}",
            "epochs": f"{config.training.epochs:g}",
            "total steps": total,
            "evaluation every": f"{eval_interval} steps",
            "checkpoint every": f"{config.checkpoint.interval_steps} steps"
            + (f" or {minutes:g} minutes" if minutes else ""),
        }
    for key, value in derived.items():
        print(f"# {key}: {value}")


if __name__ == "__main__":
    run_cli(main)
