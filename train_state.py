"""The state of a run: everything that training changes, one step, and what a checkpoint holds.

Training, evaluation, benchmark, compile report and tests all build their model and make their steps
here.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

import trm_model
from adam_atan2 import AdamATan2, AdamW, PuzzleEmbeddingSGD, lr_at
from config import Config, differences, with_forward_dtype
from data_loader_tpu import SudokuDatasetTPU, create_dataloader_tpu
from dataset_cache import local_dataset
from device import Device
from ema_distributed import EMADistributed
from mixing import choose_mixing
from schedule import stages, total_steps
from trm_model import METRIC_KEYS, Carry
from utils import UserError

TOTALS = (*METRIC_KEYS, "grad_norm", "first_not_finite")  # the entries of TrainState.totals


class StepScalars(NamedTuple):
    """Numbers that the host gives to a step: floats there, and float32 scalars on the device.

    They go to the device as one tensor [3], because each transfer takes time.
    """

    lr: Any
    puzzle_emb_lr: Any
    step: Any  # from 1


# --------------------------------------------------------------------------------------------------
# The parts of a run
# --------------------------------------------------------------------------------------------------
def load_dataset(config: Config, split: str) -> SudokuDatasetTPU:
    """One split of the configuration's dataset.

    Raises UserError if it is missing or damaged, or not what the data section expects.
    """
    dataset = SudokuDatasetTPU(local_dataset(config.data.dataset_path), split)
    expected = config.data.expected_puzzles
    if split == "train" and expected not in (None, dataset.num_puzzles):
        raise UserError(
            f"data.expected_puzzles = {expected}: {config.data.dataset_path} has "
            f"{dataset.num_puzzles} training puzzles: build the dataset that this configuration is "
            "planned for, or change data.expected_puzzles"
        )
    augmentations, puzzles = config.data.augmentations, dataset.num_puzzles
    if split == "train" and augmentations is not None and len(dataset) != puzzles:
        raise UserError(
            f"data.augmentations = {augmentations}: {config.data.dataset_path} holds "
            f"{len(dataset)} examples of {puzzles} puzzles, so its augmentations are stored: leave "
            "data.augmentations null, or build the dataset without --num_aug"
        )
    return dataset


def load_datasets(config: Config) -> dict[str, SudokuDatasetTPU]:
    """{split: dataset} of the splits that a training needs: train, test and evaluation.split.

    Raises what `load_dataset` raises.
    """
    splits = ("train", config.evaluation.split, "test")
    return {split: load_dataset(config, split) for split in splits}


def create_model(config: Config, dataset: SudokuDatasetTPU) -> trm_model.TinyRecursiveModel:
    """A model for the dataset's grids, on the CPU; its weights depend on training.seed alone."""
    return trm_model.TinyRecursiveModel(
        config.model,
        dataset.seq_len,
        dataset.vocab_size,
        dataset.num_puzzle_identifiers,
        config.training.seed,
    )


def create_optimizer(
    config: Config, model: trm_model.TinyRecursiveModel
) -> tuple[AdamATan2 | AdamW, PuzzleEmbeddingSGD | None]:
    """(optimizer of the network, optimizer of the puzzle embedding or None if there is none).

    model: already on its device, because the optimizer's state is made there, in its final shape.
    The learning rate is an argument of each step.
    """
    training = config.training
    kind = AdamATan2 if training.optimizer == "adam_atan2" else AdamW
    betas = training.beta1, training.beta2
    optimizer = kind(model.parameters(), betas, training.weight_decay)
    if not model.prefix_len:
        return optimizer, None
    weights = model.puzzle_emb.weights
    return optimizer, PuzzleEmbeddingSGD(weights, training.puzzle_emb_weight_decay)


def settle_forward_dtype(
    config: Config, device: Device, saved: dict[str, Any] | None = None
) -> Config:
    """The configuration with "bfloat16" or "float32" in place of a forward_dtype "auto".

    saved: the configuration in the checkpoint to continue from; "auto" takes its forward_dtype.
    Without a checkpoint "auto" takes what suits the device. Also sets the device's precision of
    matrix products, so call it before the first program is compiled.
    """
    forward_dtype = config.model.forward_dtype
    if forward_dtype == "auto" and saved:
        forward_dtype = saved["model"]["forward_dtype"]
    forward_dtype = device.forward_dtype(forward_dtype)
    device.set_matmul_precision(forward_dtype)
    return with_forward_dtype(config, forward_dtype)


def check_same_run(config: Config, saved: dict[str, Any], url: str) -> None:
    """Raises UserError if the run at `url` was begun with a configuration that computes other
    numbers.

    saved: the configuration in its checkpoint, as a dict.
    """
    if changed := differences(config, saved, ("model", "data", "training")):
        raise UserError(
            f"{url} was begun with another configuration ({changed}): give this one its own "
            "--run_name, or restore the old values to go on"
        )


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor that the backward pass has reached."""
    assert tensor.grad is not None
    return tensor.grad


class TrainState:
    """Everything that training changes, on its device.

    dataset: the training split. checkpoint: what `state_dict` returned, to continue from. weights:
    a state dict to begin with; it is used only if there is no checkpoint. Raises UserError if one
    of them does not fit the model or the dataset.

    step: optimizer steps done. train_seconds: seconds spent in them. totals: float32, one entry for
    each name in TOTALS, summed over the steps since `start_interval`. The entry first_not_finite is
    no sum: it is the first step with a number that is not finite, or 0.
    """

    def __init__(
        self,
        config: Config,
        device: Device,
        dataset: SudokuDatasetTPU,
        checkpoint: dict[str, Any] | None = None,
        weights: dict[str, torch.Tensor] | None = None,
    ):
        self.config, self.device = config, device
        workers = device.workers
        torch.manual_seed(config.training.seed)
        self.model = create_model(config, dataset)
        choose_mixing(self.model, config, device)
        if checkpoint:
            trm_model.load_named_state(self.model, checkpoint["model"], "checkpoint")
        elif weights:
            trm_model.load_named_state(self.model, weights, "initial weights")
        # The EMA model is copied while the weights are on the CPU. A copy on XLA would be part of
        # the first step's program and of no other, so that the second step would compile again.
        self.ema = None
        if config.training.ema:
            rate, strategy = config.training.ema_rate, config.training.ema_strategy
            self.ema = EMADistributed(self.model, rate, device, strategy)
            if checkpoint:
                trm_model.load_named_state(self.ema.module, checkpoint["ema"], "checkpoint")
        self.model.to(device.torch)
        if self.ema:
            self.ema.module.to(device.torch)
        self.optimizer, self.puzzle_optimizer = create_optimizer(config, self.model)
        self.loader = create_dataloader_tpu(dataset, config, workers.rank, workers.world_size)
        self.num_puzzles = dataset.num_puzzles
        self.total_steps = total_steps(config, dataset.num_puzzles)
        self.stages = stages(config, self.total_steps)
        self.step, self.train_seconds = 0, 0.0
        self.start_interval()
        slots = config.training.global_batch_size // workers.world_size
        carry = self.model.empty_carry(slots)
        if checkpoint:
            carry = self._restore(checkpoint)
        self.carry = device.put(carry)
        self.forward = device.compiled(trm_model.act_step, config.training.compile)
        self.begin_stage()
        self.start_clock()

    # ----- what a checkpoint holds -----
    def state_dict(self) -> dict[str, Any] | None:
        """The content of a checkpoint on rank 0, as CPU tensors and plain data; elsewhere None.

        It does not depend on the number of workers. All workers must call this, because each of
        them holds its own slots of the carry.
        """
        slots = self.device.workers.gather(list(self.device.fetch(self.carry)))
        if slots is None:
            return None
        return self.device.fetch(
            {
                "step": self.step,
                "model": trm_model.named_state(self.model),
                "ema": trm_model.named_state(self.ema.module) if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "carry": {name: torch.cat(parts) for name, parts in zip(Carry._fields, slots)},
                "loader": self.loader.state_dict(),
                "generator": torch.get_rng_state(),
                "config": dataclasses.asdict(self.config),
                "totals": self.totals,
                "train_seconds": self.train_seconds,
                "interval_steps": self.interval_steps,
                "interval_seconds": self.interval_seconds,
            }
        )

    def _restore(self, checkpoint: dict[str, Any]) -> Carry:
        """Restore everything except the weights, which are loaded before the model is moved.

        Returns this worker's slots of the carry, on the CPU.
        """
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.loader.load_state_dict(checkpoint["loader"])
        torch.set_rng_state(checkpoint["generator"])
        self.totals = self.device.put(checkpoint["totals"])
        self.step, self.train_seconds = checkpoint["step"], checkpoint["train_seconds"]
        self.interval_steps = checkpoint["interval_steps"]
        self.interval_seconds = checkpoint["interval_seconds"]
        slots = checkpoint["carry"].items()
        return Carry(**{name: tensor[self.loader.mine] for name, tensor in slots})

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that stays on the device from step to step, each once."""
        modules = [self.model, self.ema.module] if self.ema else [self.model]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        for state in self.optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
        return list({id(t): t for t in (*tensors, *self.carry, self.totals)}.values())

    # ----- one step -----
    def begin_stage(self) -> None:
        """Use the recursion depth of the next step's stage. On XLA this compiles a new program."""
        training = self.config.training
        stage = [stage for begin, stage in self.stages if begin <= self.step][-1]
        cycles = trm_model.Cycles(stage.H_cycles, stage.L_cycles)
        self.objective = trm_model.Objective(cycles, training.step_loss_decay, training.ponder_cost)
        self.run_step = self.device.traced_once(self.train_step, self.tensors)

    def batches(self, last_step: int) -> Iterator[dict[str, np.ndarray]]:
        """The loader's batches for the steps up to `last_step`."""
        batches = iter(self.loader)
        try:
            while self.step < last_step:
                yield next(batches)
        finally:
            batches.close()

    def advance(self, batch: dict[str, np.ndarray]) -> None:
        """One step with a batch of the loader. Does not wait for the device."""
        if self.step and self.step in (begin for begin, _ in self.stages):
            self.begin_stage()
        self.run_step(self.device.put(self.host_batch(batch)))
        if self.ema:
            self.ema.update_after_step(self.model)
        self.step += 1
        self.interval_steps += 1

    def host_batch(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The loader's batch with what else the next step needs from the host.

        Adds min_halt_steps [B] int32 (halting exploration) and scalars [3] float32 (StepScalars).
        """
        training, model, step = self.config.training, self.config.model, self.step + 1
        min_halt_steps = trm_model.exploration_min_steps(
            training.seed,
            step,
            training.global_batch_size,
            model.halt_exploration_prob,
            model.halt_max_steps,
        )
        scalars = StepScalars(
            self.lr(step, training.lr), self.lr(step, training.puzzle_emb_lr), step
        )
        return {
            **batch,
            "min_halt_steps": min_halt_steps[self.loader.mine],
            "scalars": np.array(scalars, np.float32),
        }

    def lr(self, step: int, base: float) -> float:
        """The learning rate of `step` (from 1), where `base` is the rate after the warmup."""
        training = self.config.training
        return lr_at(step, base, training.lr_warmup_steps, self.total_steps, training.lr_min_ratio)

    def train_step(self, batch: dict[str, torch.Tensor]) -> None:
        """Forward, backward and update. batch: what `host_batch` returned, on the device.

        On XLA this is one program with one all-reduce, and nothing in it waits for the device.
        """
        training, model = self.config.training, self.model
        scalars = StepScalars(*batch["scalars"].unbind())
        metrics, row_grads = self._forward_backward(batch)

        params = list(model.parameters())
        row_sums: tuple[torch.Tensor, ...] = ()
        if self.puzzle_optimizer:
            identifiers = self.carry.puzzle_identifiers
            assert row_grads is not None
            row_sums = self.puzzle_optimizer.row_sums(identifiers, row_grads)
        metrics, *summed = self.device.workers.all_reduce(
            [metrics, *(gradient(p) for p in params), *row_sums]
        )
        for p, grad in zip(params, summed):
            p.grad = grad
        grad_norm = torch.nn.utils.get_total_norm([gradient(p) for p in params])
        if training.grad_clip_norm:
            torch.nn.utils.clip_grads_with_norm_(params, training.grad_clip_norm, grad_norm)
        self.optimizer.step(scalars.lr)
        self.optimizer.zero_grad(set_to_none=True)
        if self.puzzle_optimizer:
            row_grad_sums, occurrences = summed[len(params) :]
            self.puzzle_optimizer.step(row_grad_sums, occurrences, scalars.puzzle_emb_lr)
        self._add_to_totals(torch.cat((metrics, grad_norm.float().view(1))), scalars.step)
        if self.ema:
            self.ema.update_in_step(model)

    def _forward_backward(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and backward, one part of grad_accumulation_steps after the other.

        Adds the gradients to .grad and replaces the carry. Returns the sums of METRIC_KEYS, and the
        gradient [B, puzzle_emb_ndim] float32 of the slots' rows of the puzzle embedding, or None
        without one.
        """
        training, model = self.config.training, self.model
        parts = training.grad_accumulation_steps
        carry = model.admit(self.carry, batch)
        rows = model.puzzle_rows(carry)
        metrics, carries, row_grads = [], [], []
        for part in range(parts):
            part_of = Carry(*(tensor.chunk(parts)[part] for tensor in carry))
            part_rows = None
            if rows is not None:
                part_rows = rows.chunk(parts)[part].detach().requires_grad_()
            min_halt_steps = batch["min_halt_steps"].chunk(parts)[part]
            loss, part_metrics, after = self.forward(
                model, part_of, part_rows, min_halt_steps, self.objective
            )
            (loss / training.global_batch_size).backward()
            metrics.append(part_metrics)
            carries.append(after)
            if part_rows is not None:
                row_grads.append(gradient(part_rows))
        if parts == 1:
            self.carry = carries[0]
        else:
            self.carry = Carry(*(torch.cat(tensors) for tensors in zip(*carries)))
        return functools.reduce(torch.add, metrics), torch.cat(row_grads) if row_grads else None

    def _add_to_totals(self, sums: torch.Tensor, step: torch.Tensor) -> None:
        """sums: all of TOTALS but first_not_finite. step: from 1, a float32 scalar."""
        first = self.totals[-1]
        first = torch.where((first == 0) & ~torch.isfinite(sums).all(), step, first)
        self.totals = torch.cat((self.totals[:-1] + sums, first.view(1)))

    # ----- what it has measured -----
    def start_interval(self) -> None:
        """Begin a new logging interval."""
        self.totals = self.device.put(torch.zeros(len(TOTALS)))
        self.interval_steps, self.interval_seconds = 0, 0.0

    def start_clock(self) -> None:
        """Count the time from here on as training time, until `wait`."""
        self.clock = time.monotonic()

    def wait(self) -> dict[str, float]:
        """Wait until the device has done all steps, and add the time to the measured seconds.

        Returns {name in TOTALS: its value}.
        """
        totals = self.device.fetch(self.totals).tolist()
        now = time.monotonic()
        self.train_seconds += now - self.clock
        self.interval_seconds += now - self.clock
        self.clock = now
        return dict(zip(TOTALS, totals))

    def flops(self, steps: int) -> float:
        """FLOPs of the matrix products in the first `steps` steps, over all workers."""
        total, ends = 0.0, [begin for begin, _ in self.stages[1:]] + [self.total_steps]
        for (begin, stage), end in zip(self.stages, ends, strict=True):
            cycles = trm_model.Cycles(stage.H_cycles, stage.L_cycles)
            each = trm_model.step_flops_per_example(self.model, train=True, cycles=cycles)
            total += max(0, min(steps, end) - begin) * each
        return total * self.config.training.global_batch_size

    def record(self, totals: dict[str, float], peak_flops: float) -> dict[str, Any]:
        """The record of the logging interval, for metrics.jsonl.

        Losses are means over the examples. loss leaves out step_loss_decay and ponder_cost, so that
        runs can be compared. Accuracies and mean_steps are means over the examples that halted in
        the interval, or None if none did. grad_norm is the mean over the steps, before clipping.
        mfu is a share from 0 to 1. peak_flops: of one worker, in FLOP/s.
        """
        batch, steps = self.config.training.global_batch_size, self.interval_steps
        count, rate = totals["count"], steps / self.interval_seconds
        lm_loss, q_halt_loss = (totals[key] / (steps * batch) for key in ("lm_loss", "q_halt_loss"))
        flops = self.flops(self.step) - self.flops(self.step - steps)
        flops_per_second = flops / self.interval_seconds

        def of_halted(key):
            return totals[key] / count if count else None

        return {
            "step": self.step,
            "split": "train",
            "epoch": self.step * batch / self.num_puzzles,
            "lr": float(np.float32(self.lr(self.step, self.config.training.lr))),
            "loss": lm_loss + 0.5 * q_halt_loss,
            "lm_loss": lm_loss,
            "q_halt_loss": q_halt_loss,
            "grad_norm": totals["grad_norm"] / steps,
            "count": int(count),
            "cell_accuracy": of_halted("cell_accuracy"),
            "exact_accuracy": of_halted("exact_accuracy"),
            "q_halt_accuracy": of_halted("q_halt_accuracy"),
            "mean_steps": of_halted("steps"),
            "wall_time": time.time(),
            "train_seconds": self.train_seconds,
            "steps_per_second": rate,
            "examples_per_second": rate * batch,
            "train_flops": self.flops(self.step),
            "model_flops_per_second": flops_per_second,
            "mfu": flops_per_second / peak_flops / self.device.workers.world_size,
            **self.device.counters(),
        }
