"""The two optimizers: AdamATan2 for the network, sign descent for the puzzle embedding; and the schedule."""

import math

import torch


class AdamATan2(torch.optim.Optimizer):
    """Adam whose step is atan2(m_hat, sqrt(v_hat)): scale-free and without epsilon (arXiv 2407.05872, section 3).

        p *= 1 - lr * weight_decay
        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v) / sqrt(1 - beta2^t))

    lr: a float or a scalar tensor on the parameters' device. State is made in the constructor, in its final
    shape, and the step count is a tensor: on XLA a first step that differs from the second, or a Python number
    that changes, would be a compile of its own.
    """

    def __init__(self, params, lr, betas=(0.9, 0.95), weight_decay=0.0):
        # `capturable` makes load_state_dict put the step count on the parameter's device
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "capturable": True}
        )
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = new_state(p)

    @torch.no_grad()
    def step(self):
        """Update every parameter from its .grad (float32)."""
        for group in self.param_groups:
            params, lr, (beta1, beta2) = group["params"], group["lr"], group["betas"]
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


def bias_correction(beta, t):
    """1 - beta^t of a float32 tensor t >= 1, to float32's accuracy: a power of beta would be 2e-5 off at 0.999."""
    return -torch.expm1(t * (math.log(beta) if beta else -math.inf))


def new_state(p):
    """Adam's state for one parameter, under torch.optim's names."""
    # made on the CPU and moved, and the step count with one axis: zeros made on XLA, or a scalar 0 moved there, would
    # be constants of the first step's graph, and of no other's
    zeros = torch.zeros_like(p, device="cpu")
    return {
        "step": torch.zeros(1).to(p.device),
        "exp_avg": zeros.to(p.device),
        "exp_avg_sq": zeros.clone().to(p.device),
    }


class PuzzleEmbeddingSGD:
    """Sign descent on the rows of the puzzle embedding seen in the global batch:
    p = p * (1 - lr * weight_decay) - lr * sign(gradient summed over all occurrences). Other rows stay.

    weights: [N, E] float32, changed in place. Costs O(N * E) a step: meant for tables of up to some thousand rows.
    """

    def __init__(self, weights, weight_decay=0.0):
        self.weights, self.weight_decay = weights, weight_decay

    @torch.no_grad()
    def row_sums(self, puzzle_identifiers, row_grads):
        """(gradient of each row [N, E], occurrences of each row [N]), float32: what is summed over the workers.

        puzzle_identifiers: [B] integers; row_grads: [B, E] float32. With a one-hot matrix, no scatter.
        """
        ids = torch.arange(len(self.weights), device=self.weights.device)
        occurs = (ids.unsqueeze(1) == puzzle_identifiers).to(row_grads.dtype)  # [N, B]
        if (
            row_grads.device.type == "xla"
        ):  # no product: a TPU would round the gradients to bfloat16
            return (occurs.unsqueeze(2) * row_grads).sum(1), occurs.sum(1)
        return occurs @ row_grads, occurs.sum(1)

    @torch.no_grad()
    def step(self, grads, occurrences, lr):
        """grads, occurrences: sums of `row_sums` over the global batch; lr: float or scalar tensor."""
        updated = self.weights * (1 - lr * self.weight_decay) - lr * torch.sign(grads)
        self.weights.copy_(torch.where((occurrences > 0).unsqueeze(1), updated, self.weights))


def lr_at(step, base, warmup_steps, total_steps, min_ratio):
    """Learning rate of `step` (the first is 1): linear warmup, then a cosine to min_ratio * base at total_steps."""
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
