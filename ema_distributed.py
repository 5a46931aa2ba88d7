"""Exponential moving average (EMA) of the trained weights, kept by rank 0 or by every worker."""

import copy

import torch

from device import Device
from trm_model import TinyRecursiveModel


class EMADistributed:
    """average = rate * average + (1 - rate) * weight after each optimizer step.

    There is no bias correction. `module` is a second model, whose weights are the average. It
    shares the buffers of the trained model (H_init, L_init, puzzle embedding), which are not
    averaged. Make it before the model goes to its device.

    strategy: "every_worker" keeps the average on all workers, as part of the training step, and
    sends nothing. "rank0" keeps it on rank 0 alone, and sends it when it is evaluated. Both give
    the same numbers.
    """

    def __init__(
        self, model: TinyRecursiveModel, rate: float, device: Device, strategy: str = "every_worker"
    ):
        self.rate, self.device, self.strategy = rate, device, strategy
        self.module = copy.deepcopy(model).requires_grad_(False)
        for ours, theirs in zip(self.module.modules(), model.modules(), strict=True):
            ours._buffers = theirs._buffers  # also after the model has moved to its device

    def update_in_step(self, model: TinyRecursiveModel) -> None:
        """Add the model's present weights, float32 and on the same device, to the average.

        `TrainState.train_step` calls it, so on XLA it is part of the step's program.
        """
        if self.strategy == "every_worker":
            self._update(model)

    def update_after_step(self, model: TinyRecursiveModel) -> None:
        """Do what update_in_step does, but for the strategy "rank0" and after the step.

        On XLA this is a program of its own, because only rank 0 runs it. Workers whose step
        programs differ would hang in the step's all-reduce.
        """
        if self.strategy == "rank0" and self.device.workers.rank == 0:
            self._update(model)
            self.device.end_step()

    @torch.no_grad()
    def _update(self, model):
        torch._foreach_lerp_(
            list(self.module.parameters()), list(model.parameters()), 1 - self.rate
        )

    def ready_module(self) -> TinyRecursiveModel:
        """`module` with the average on every worker. All workers must call it."""
        if self.strategy == "rank0":
            self.device.broadcast_parameters(self.module)
        return self.module
