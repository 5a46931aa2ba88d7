"""Exponential moving average of the trained weights."""
import copy

import torch


class EMADistributed:
    """shadow = rate * shadow + (1 - rate) * weight after each optimizer step, no bias correction.

    `module` is a second model with the averaged weights, ready to evaluate. It shares the buffers of the trained
    model (H_init, L_init, puzzle embedding), which are not averaged. Make it before the model goes to its device.
    """

    def __init__(self, model, rate):
        self.rate = rate
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.share_buffers(model)

    def share_buffers(self, model):
        """Let `module` use the buffers of `model`; call again after the model has moved to a device."""
        for (path, ours), theirs in zip(self.module.named_modules(), model.modules(), strict=True):
            ours._buffers = theirs._buffers

    @torch.no_grad()
    def update(self, model):
        """Take in the model's present weights (float32, on the same device)."""
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - self.rate)
