"""The optimizers: AdamATan2 or AdamW for the network, signSGD for the puzzle embedding.

The schedule of their learning rates is here, too.
"""

import math
from collections.abc import Iterable

import torch


class AdamATan2(torch.optim.Optimizer):
    """Adam with atan2 in place of a division, which needs no epsilon (arXiv 2407.05872).

        p *= 1 - lr * weight_decay
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    As in the package that the original uses, 1 - beta1^t divides the result of atan2. In the paper
    it divides m, inside of atan2.

    The learning rate is an argument of `step`. The constructor makes the state in its final shape,
    and the step count is a tensor. Otherwise XLA would compile another program: for a first step
    that differs from the second, or for each new value of a Python number.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ):
        # A checkpoint has "lr" among the settings. With "capturable", load_state_dict puts the step
        # count on the parameter's device.
        settings = {"lr": 0.0, "betas": betas, "weight_decay": weight_decay, "capturable": True}
        super().__init__(params, settings)
        make_state(self)

    # The signature differs from the base class, whose only argument is an optional closure.
    @torch.no_grad()
    def step(self, lr: float | torch.Tensor) -> None:  # type: ignore[override]
        """Update every parameter from its gradient (float32).

        lr: a number, or a scalar tensor on the parameters' device.
        """
        for group in self.param_groups:
            params, (beta1, beta2) = group["params"], group["betas"]
            grads = [p.grad for p in params]
            m, v, steps = (
                [self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            torch._foreach_add_(steps, 1)
            t = steps[0].squeeze(0)
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            scale = torch._foreach_sqrt(v)
            torch._foreach_div_(scale, torch.sqrt(bias_correction(beta2, t)))
            update = [torch.atan2(a, b) for a, b in zip(m, scale)]
            torch._foreach_mul_(update, lr / bias_correction(beta1, t))
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(params, update)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW (arXiv 1711.05101) with the interface of AdamATan2."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ):
        params = list(params)
        on_cpu = params[0].device.type == "cpu"
        super().__init__(params, 0.0, betas, weight_decay=weight_decay, capturable=not on_cpu)
        make_state(self)

    # The signature differs from the base class, whose only argument is an optional closure.
    def step(self, lr: float | torch.Tensor) -> None:  # type: ignore[override]
        """Update every parameter from its gradient; lr as in `AdamATan2.step`."""
        (group,) = self.param_groups
        group["lr"] = lr
        super().step()
        # A checkpoint holds the settings, but not the rate of one step.
        group["lr"] = 0.0


def bias_correction(beta: float, t: torch.Tensor) -> torch.Tensor:
    """1 - beta^t of a float32 tensor t >= 1, to float32's accuracy.

    A float32 power of beta would give a relative error of up to 2e-5 at beta = 0.999.
    """
    return -torch.expm1(t * (math.log(beta) if beta else -math.inf))


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter Adam's state before the first step, under the names of torch.optim."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            # The zeros are made on the CPU and then moved, and the step count has one axis. Zeros
            # that are made on XLA, or a scalar 0 that is moved there, would be constants of the
            # first step's program, and the second step would compile again.
            zeros = torch.zeros_like(p, device="cpu")
            optimizer.state[p] = {
                "step": torch.zeros(1).to(p.device),
                "exp_avg": zeros.to(p.device),
                "exp_avg_sq": zeros.clone().to(p.device),
            }


class PuzzleEmbeddingSGD:
    """signSGD (arXiv 1802.04434) on those rows of the puzzle embedding that are in the batch.

        p = p * (1 - lr * weight_decay) - lr * sign(g)

    g is the gradient, summed over all occurrences of the row in the global batch. Rows that do not
    occur stay as they are. weights: [N, E] float32, changed in place. A step costs O(N * E), so it
    is meant for tables of up to a few thousand rows.
    """

    def __init__(self, weights: torch.Tensor, weight_decay: float = 0.0):
        self.weights, self.weight_decay = weights, weight_decay

    @torch.no_grad()
    def row_sums(
        self, puzzle_identifiers: torch.Tensor, row_grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient of each row [N, E], occurrences of each row [N]), float32, of this worker's
        slots.

        The sums of these over all workers are what `step` takes. puzzle_identifiers: [B] integers;
        row_grads: [B, E] float32, the gradient of each slot's row.
        """
        ids = torch.arange(len(self.weights), device=self.weights.device)
        # [N, B], a one-hot matrix in place of a scatter
        occurs = (ids.unsqueeze(1) == puzzle_identifiers).to(row_grads.dtype)
        if row_grads.device.type == "xla":
            # A TPU rounds the operands of a matrix product to bfloat16, but not those of a sum.
            return (occurs.unsqueeze(2) * row_grads).sum(1), occurs.sum(1)
        return occurs @ row_grads, occurs.sum(1)

    @torch.no_grad()
    def step(
        self, grads: torch.Tensor, occurrences: torch.Tensor, lr: float | torch.Tensor
    ) -> None:
        """Update the table from sums of `row_sums` over all workers; lr as in `AdamATan2.step`."""
        updated = self.weights * (1 - lr * self.weight_decay) - lr * torch.sign(grads)
        self.weights.copy_(torch.where((occurrences > 0).unsqueeze(1), updated, self.weights))


def lr_at(step: int, base: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """The learning rate of `step`, where the first step is 1.

    It rises linearly to `base` during the warmup, then follows a cosine down to min_ratio * base at
    total_steps, and stays there.
    """
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
