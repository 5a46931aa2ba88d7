"""Exponential moving average of the trained weights, on one worker or on all."""

import copy

import torch


class EMADistributed:
    """shadow = rate * shadow + (1 - rate) * weight after each optimizer step, no bias correction.

    `module` is a second model with the averaged weights. It shares the buffers of the trained model (H_init, L_init,
    puzzle embedding), which are not averaged. Make it before the model goes to its device.

    strategy: "every_worker" keeps the average on all of them, as part of the training step: nothing is sent. "rank0"
    keeps it there alone and sends it when it is evaluated. Both give the same numbers.
    """

    def __init__(self, model, rate, device, strategy="every_worker"):
        self.rate, self.device, self.strategy = rate, device, strategy
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.share_buffers(model)

    def share_buffers(self, model):
        """Let `module` use the buffers of `model`; call again after the model has moved to a device."""
        for (path, ours), theirs in zip(self.module.named_modules(), model.modules(), strict=True):
            ours._buffers = theirs._buffers

    def update_in_step(self, model):
        """Take in the model's present weights (float32, on the same device); part of the training step."""
        if self.strategy == "every_worker":
            self._update(model)

    def update_after_step(self, model):
        """As update_in_step, after the step: on XLA a program of its own, since replicas whose step programs differ would hang in
        the step's all-reduce."""
        if self.strategy == "rank0" and self.device.workers.rank == 0:
            self._update(model)
            self.device.end_step()

    @torch.no_grad()
    def _update(self, model):
        torch._foreach_lerp_(
            list(self.module.parameters()), list(model.parameters()), 1 - self.rate
        )

    def ready_module(self):
        """`module` with the average on every worker; all of them must call it."""
        if self.strategy == "rank0":
            self.device.broadcast_parameters(self.module)
        return self.module
