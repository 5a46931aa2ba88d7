"""The Tiny Recursive Model (arXiv 2510.04871): network, one supervision step, carry, loss.

Shapes: B slots (examples), S grid cells, P prefix positions of the puzzle embedding, L = P + S,
D hidden size, V vocabulary (0 pad, 1 empty cell, 2.. the digits). Activations have the forward dtype
(bfloat16 or float32), weights are float32 and cast where they are used, so their gradients add up in float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils import STREAM_EXPLORATION, UserError, random_stream

RMS_NORM_EPS = 1e-5
PAD_ID = 0  # of inputs; as a label: a cell that is not scored
CHECKPOINT_PREFIX = "model.inner."  # of every weight's name in the original's files, and so in ours
METRIC_KEYS = (
    "count",
    "cell_accuracy",
    "exact_accuracy",
    "q_halt_accuracy",
    "steps",
    "lm_loss",
    "q_halt_loss",
)


class Carry(NamedTuple):
    """What a slot keeps between supervision steps."""

    z_H: torch.Tensor  # [B, L, D] forward dtype: the answer's state
    z_L: torch.Tensor  # [B, L, D] forward dtype: the latent state
    steps: torch.Tensor  # [B] int32: supervision steps done on this example
    halted: torch.Tensor  # [B] bool: the next step takes a new example
    inputs: torch.Tensor  # [B, S] int32
    labels: torch.Tensor  # [B, S] int32
    puzzle_identifiers: torch.Tensor  # [B] int32


# ---------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------
def truncated_normal(shape, std, generator):
    """float32 normal cut at two standard deviations, rescaled to have `std` after the cut (as JAX does)."""
    cut_std = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    tensor = torch.empty(shape)
    return nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0, generator=generator).mul_(
        std / cut_std
    )


def rms_norm(x, dtype, dim=-1):
    """x / rms(x) along `dim`, computed in float32 (eps 1e-5, no weight), returned in `dtype`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + RMS_NORM_EPS)).to(dtype)


def cast(weight, dtype):
    """`weight` in `dtype`, always as a tensor of its own: a view of a parameter (as products take) is traced
    differently on XLA once the parameter has been updated in place, and the second step would compile anew."""
    return weight.to(dtype, copy=True)


class Linear(nn.Module):
    """y = x W^T; weight [d_out, d_in] float32, truncated normal, std 1/sqrt(d_in)."""

    def __init__(self, d_in, d_out, generator):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((d_out, d_in), d_in**-0.5, generator))

    def forward(self, x):
        return F.linear(x, cast(self.weight, x.dtype))


class Table(nn.Module):
    """A table of vectors [rows, D], truncated normal, std 1/sqrt(D)."""

    def __init__(self, rows, dim, generator):
        super().__init__()
        self.embedding_weight = nn.Parameter(truncated_normal((rows, dim), dim**-0.5, generator))


class SwiGLU(nn.Module):
    """d -> d: down(silu(gate) * up), width round(expansion * d * 2/3) rounded up to a multiple of 256."""

    def __init__(self, dim, expansion, generator):
        super().__init__()
        width = -(-round(expansion * dim * 2 / 3) // 256) * 256
        self.gate_up_proj = Linear(dim, 2 * width, generator)
        self.down_proj = Linear(width, dim, generator)
        self.in_kernel = (
            None  # on a TPU, by pallas_kernels.py: the tpu_types.Generation of its chips
        )

    def weights(self):
        """(gate, up, down) for `forward`, asked for once a step: the gradients of the halves are put together once, not at each use."""
        return *self.gate_up_proj.weight.chunk(2), self.down_proj.weight

    def forward(self, x, weights, axis):
        """x [B, L, D] mixed along `axis`, added to x and normed along it: [B, L, D]."""
        if self.in_kernel:
            import pallas_kernels

            weights = *weights, self.in_kernel
            return (
                pallas_kernels.TokenMixing.apply(x, *weights)
                if axis == 1
                else pallas_kernels.ChannelMixing.apply(x, *weights, torch.is_grad_enabled())
            )
        return rms_norm(x + self.mixed(x, weights, axis).transpose(axis, 2), x.dtype, axis)

    def mixed(self, x, weights, axis):
        """`axis` comes last in the result. In x's dtype; on XLA float32, as the products add up."""
        if x.device.type == "xla":
            import xla_mixing

            return xla_mixing.SwiGLU.apply(x, *weights, axis, torch.is_grad_enabled())
        gate, up, down = (cast(weight, x.dtype) for weight in weights)
        x = x.transpose(axis, 2)
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class SelfAttention(nn.Module):
    """Multi-head attention over all positions (not causal), bias-free, [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, num_heads, generator):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = Linear(dim, 3 * dim, generator)
        self.o_proj = Linear(dim, dim, generator)

    def forward(self, x, rope):
        batch, length, dim = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, dim))


def rope_table(length, head_dim):
    """(cos, sin), each [length, head_dim] float32, of rotary positions (arXiv 2104.09864, base 10000)."""
    # angles by the original's operations in their order: a last digit of a frequency is the sixth of an angle of 90
    inverse = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
    # float32's own cosine has another last digit on another processor
    return torch.stack((angle.double().cos(), angle.double().sin())).float()


def rotate(x, rope):
    """Rotate the two halves of the last axis of x [..., L, head_dim]; in float32, back to x's dtype."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Block(nn.Module):
    """Token mixing then channel mixing, each with residual and RMS norm after it; [B, L, D] -> [B, L, D]."""

    def __init__(self, config, length, generator):
        super().__init__()
        if config.mlp_t:
            self.mlp_t = SwiGLU(length, config.expansion, generator)
        else:
            self.self_attn = SelfAttention(config.hidden_size, config.num_heads, generator)
        self.mlp = SwiGLU(config.hidden_size, config.expansion, generator)
        self.mixes_by_mlp = config.mlp_t

    def weights(self):
        """The weights of the MLPs for `forward`, asked for once a step."""
        return self.mlp_t.weights() if self.mixes_by_mlp else None, self.mlp.weights()

    def forward(self, h, weights, rope):
        token_weights, channel_weights = weights
        if self.mixes_by_mlp:
            h = self.mlp_t(h, token_weights, axis=1)
        else:
            h = rms_norm(h + self.self_attn(h, rope), h.dtype)
        return self.mlp(h, channel_weights, axis=2)


class Network(nn.Module):
    """net(h, injection): the L_layers blocks on h + injection. One network updates both z_L and z_H."""

    def __init__(self, config, length, generator):
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config, length, generator) for _ in range(config.L_layers)
        )
        self.activation_checkpointing = config.activation_checkpointing

    def forward(self, h, injection, weights, rope):
        """weights: of each layer, `Block.weights()`."""
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        h = h + injection
        for layer, layer_weights in zip(self.layers, weights, strict=True):
            h = (
                recomputed(layer, h, layer_weights, rope)
                if checkpointing
                else layer(h, layer_weights, rope)
            )
        return h


def recomputed(function, h, *rest):
    """function(h, *rest), keeping h and no intermediate results, which the backward computes anew (arXiv 1604.06174)."""
    # without arguments, as by theirs it would look for a torch.xla
    result = checkpoint(lambda: function(h, *rest), use_reentrant=False, preserve_rng_state=False)
    return _BarrierInBackward.apply(result, h) if h.device.type == "xla" else result


class _BarrierInBackward(torch.autograd.Function):
    """`result` as it is; h is the compiler's to use again when the gradient of `result` is there, and not before. Without this it would
    take what it has computed already, and keep that, or compute it anew too early."""

    @staticmethod
    def forward(ctx, result, h):
        ctx.h = h
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        from torch_xla.core.xla_model import optimization_barrier_

        optimization_barrier_([grad, ctx.h])
        return grad, None


class PuzzleEmbedding(nn.Module):
    """Table [num_puzzle_identifiers, puzzle_emb_ndim] float32, zero at the start, with an optimizer of its own.

    A buffer and not a parameter: the gradient is asked for by rows (see `puzzle_rows`), so that neither a
    leaf filled in place nor a scatter into the table stands between forward and backward.
    """

    def __init__(self, rows, dim):
        super().__init__()
        self.register_buffer("weights", torch.zeros(rows, dim))


class TinyRecursiveModel(nn.Module):
    """TRM for grids of `seq_len` cells over `vocab_size` symbols.

    config: ModelConfig. Parameters and buffers have the original's names without CHECKPOINT_PREFIX.
    Initial weights depend on `seed` alone.
    """

    def __init__(self, config, seq_len, vocab_size, num_puzzle_identifiers=1, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        dim = config.hidden_size
        self.config, self.seq_len, self.vocab_size = config, seq_len, vocab_size
        self.forward_dtype = getattr(torch, config.forward_dtype)
        self.prefix_len = 0
        if config.puzzle_emb_ndim:
            self.prefix_len = config.puzzle_emb_len or -(-config.puzzle_emb_ndim // dim)
            self.puzzle_emb = PuzzleEmbedding(num_puzzle_identifiers, config.puzzle_emb_ndim)
        self.length = self.prefix_len + seq_len

        self.embed_tokens = Table(vocab_size, dim, generator)
        if config.pos_encodings == "learned":
            self.embed_pos = Table(self.length, dim, generator)
        rope = (
            rope_table(self.length, dim // config.num_heads)
            if config.pos_encodings == "rope"
            else None
        )
        self.register_buffer("rope", rope, persistent=False)
        self.L_level = Network(config, self.length, generator)
        self.lm_head = Linear(dim, vocab_size, generator)
        self.q_head = nn.Linear(dim, 2)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)
        self.register_buffer("H_init", truncated_normal((dim,), 1.0, generator))
        self.register_buffer("L_init", truncated_normal((dim,), 1.0, generator))

    def empty_carry(self, batch_size):
        """A carry on the CPU in which every slot is halted; its other values are never read."""

        def ints(*shape):
            return torch.zeros(batch_size, *shape, dtype=torch.int32)

        z = torch.zeros(batch_size, self.length, self.config.hidden_size, dtype=self.forward_dtype)
        return Carry(
            z,
            z.clone(),
            ints(),
            torch.ones(batch_size, dtype=torch.bool),
            ints(self.seq_len),
            ints(self.seq_len),
            ints(),
        )

    def admit(self, carry, batch):
        """Give each halted slot the example that `batch` offers it and the initial states; keep the others.

        batch: {"inputs", "labels": [B, S], "puzzle_identifiers": [B]}, integers.
        """
        new = carry.halted

        def take(offered, kept):
            return torch.where(new.view(-1, *[1] * (kept.dim() - 1)), offered.to(kept.dtype), kept)

        return Carry(
            take(self.H_init, carry.z_H),
            take(self.L_init, carry.z_L),
            torch.where(new, 0, carry.steps),
            torch.zeros_like(new),
            *(
                take(batch[name], getattr(carry, name))
                for name in ("inputs", "labels", "puzzle_identifiers")
            ),
        )

    def puzzle_rows(self, carry):
        """The slots' rows of the puzzle embedding, [B, puzzle_emb_ndim] float32, or None without one."""
        return self.puzzle_emb.weights[carry.puzzle_identifiers] if self.prefix_len else None

    def input_embedding(self, inputs, puzzle_rows):
        """x [B, L, D]: prefix and cells, positions added, times sqrt(D)."""
        dtype, dim = self.forward_dtype, self.config.hidden_size
        # a product with a one-hot matrix: the backward of F.embedding would run the pending XLA graph
        one_hot = (inputs.unsqueeze(-1) == torch.arange(self.vocab_size, device=inputs.device)).to(
            dtype
        )
        x = one_hot @ cast(self.embed_tokens.embedding_weight, dtype)
        if self.prefix_len:
            prefix = F.pad(puzzle_rows, (0, self.prefix_len * dim - puzzle_rows.shape[-1]))
            x = torch.cat((prefix.view(-1, self.prefix_len, dim).to(dtype), x), dim=1)
        if self.config.pos_encodings == "learned":
            x = (x + cast(self.embed_pos.embedding_weight, dtype)) * 0.5**0.5
        return x * dim**0.5

    def supervision_step(self, carry, puzzle_rows):
        """One supervision step: H_cycles - 1 cycles without gradient, one with.

        Returns z_H, z_L [B, L, D], logits [B, S, V] in the forward dtype, q_halt [B] float32.
        """
        config, net = self.config, self.L_level

        def cycle(z_H, z_L):
            injection = z_H + x
            for _ in range(config.L_cycles):
                z_L = net(z_L, injection, weights, self.rope)
            return net(z_H, z_L, weights, self.rope), z_L

        weights = [layer.weights() for layer in net.layers]
        x = self.input_embedding(carry.inputs, puzzle_rows)
        z_H, z_L = carry.z_H, carry.z_L
        with torch.no_grad():
            for _ in range(config.H_cycles - 1):
                z_H, z_L = cycle(z_H, z_L)
        z_H, z_L = cycle(z_H, z_L)
        logits = self.lm_head(z_H[:, self.prefix_len :])
        return z_H, z_L, logits, self.halting_logit(z_H[:, 0].float())

    def halting_logit(self, z):
        """q_halt [B] of z [B, D], float32."""
        weight = cast(self.q_head.weight, torch.float32)
        if z.device.type != "xla":
            return F.linear(z, weight, self.q_head.bias)[:, 0]
        # no product: with the rest in bfloat16 a TPU would round the weight to it
        return (z * weight[0]).sum(-1) + cast(self.q_head.bias, torch.float32)[0]


# ---------------------------------------------------------------------------------------------------------
# Loss, halting, metrics
# ---------------------------------------------------------------------------------------------------------
def stablemax_loss(logits, labels):
    """Stablemax cross-entropy (arXiv 2501.04697), mean over each example's labelled cells: [B].

    s(a) = a + 1 for a >= 0, 1/(1 - a) below; probability = s / sum of s. float64, as the original; float32 on
    XLA, since a TPU has no float64 (the difference is in the README).
    """
    wide = logits.float() if logits.device.type == "xla" else logits.double()
    # both branches of `where` get a safe argument: the discarded one must not give 0 * inf in the backward
    s = torch.where(wide >= 0, wide + 1, 1 / (1 - wide.clamp(max=0) + 1e-30))
    target = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    loss = torch.log(s.sum(-1)) - torch.log((s * target).sum(-1) + (labels == PAD_ID))
    scored = labels != PAD_ID
    return (loss * scored).sum(-1) / scored.sum(-1).clamp(min=1)


def exploration_min_steps(seed, step, batch_size, prob, halt_max_steps):
    """Minimum supervision steps of each slot at this training step, [batch_size] int32; 0 where none.

    With probability `prob` a slot draws uniformly from 2..halt_max_steps. Depends on (seed, step) alone.
    """
    stream = random_stream(seed, STREAM_EXPLORATION, step)
    explores = stream.random(batch_size) < prob
    return (explores * stream.integers(2, max(2, halt_max_steps) + 1, batch_size)).astype("int32")


def act_step(model, carry, puzzle_rows, min_halt_steps):
    """One step of deep supervision with adaptive halting, on an admitted carry.

    min_halt_steps: [B] integers (`exploration_min_steps`).
    Returns the loss summed over the batch (scalar), METRIC_KEYS sums (one vector, float32), the next carry.
    Accuracies and steps are summed over the slots that halt at this step, losses over all.
    """
    z_H, z_L, logits, q_halt = model.supervision_step(carry, puzzle_rows)
    correct_cells, exact = score(logits, carry.labels)
    lm_loss = stablemax_loss(logits, carry.labels).sum()
    q_halt_loss = F.binary_cross_entropy_with_logits(
        q_halt, exact.to(q_halt.dtype), reduction="sum"
    )

    steps = carry.steps + 1
    max_steps = model.config.halt_max_steps
    halted = (steps >= max_steps) | ((q_halt > 0) & (steps >= min_halt_steps))
    counted = halted & (carry.labels != PAD_ID).any(-1)
    metrics = torch.stack(
        [
            value.sum().float()
            for value in (
                counted,
                counted * correct_cells,
                counted & exact,
                counted & ((q_halt >= 0) == exact),
                counted * steps,
            )
        ]
        + [lm_loss.detach().float(), q_halt_loss.detach()]
    )
    carry = Carry(
        z_H.detach(),
        z_L.detach(),
        steps,
        halted,
        carry.inputs,
        carry.labels,
        carry.puzzle_identifiers,
    )
    return lm_loss + 0.5 * q_halt_loss, metrics, carry


def score(logits, labels):
    """(share of labelled cells that are right [B] float32, all of them right [B] bool)."""
    scored = labels != PAD_ID
    right = ((logits.argmax(-1) == labels) & scored).sum(-1)
    total = scored.sum(-1)
    return right / total.clamp(min=1), right == total


def evaluation_step(model, carry, batch):
    """One supervision step in evaluation: admit, step, score; every slot runs exactly halt_max_steps steps.

    Returns the next carry and [5, B] float32: cell accuracy, exact (0/1), halting head right (0/1),
    cell loss, halting loss.
    """
    carry = model.admit(carry, batch)
    z_H, z_L, logits, q_halt = model.supervision_step(carry, model.puzzle_rows(carry))
    correct_cells, exact = score(logits, carry.labels)
    q_halt_loss = F.binary_cross_entropy_with_logits(
        q_halt, exact.to(q_halt.dtype), reduction="none"
    )
    result = torch.stack(
        [
            value.float()
            for value in (
                correct_cells,
                exact,
                (q_halt >= 0) == exact,
                stablemax_loss(logits, carry.labels),
                q_halt_loss,
            )
        ]
    )
    steps = carry.steps + 1
    halted = steps >= model.config.halt_max_steps
    return Carry(
        z_H, z_L, steps, halted, carry.inputs, carry.labels, carry.puzzle_identifiers
    ), result


# ---------------------------------------------------------------------------------------------------------
# Weights by name, and what a step costs
# ---------------------------------------------------------------------------------------------------------
def named_state(model):
    """State dict under the original's names (CHECKPOINT_PREFIX + name)."""
    return {CHECKPOINT_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def load_named_state(model, state, source):
    """Load weights saved by the original (compiled or not) or by this kit.

    Returns notes on what was left out: keys the model has no use for, and a puzzle embedding of another shape
    (which starts from zero). Raises UserError naming each network weight that is missing or has another shape.
    """
    given = {}
    for name, tensor in state.items():
        given[name.removeprefix("_orig_mod.").removeprefix(CHECKPOINT_PREFIX)] = tensor
    own, notes, wrong = model.state_dict(), [], []
    for name, tensor in own.items():
        if name not in given:
            wrong.append(f"{name} is missing")
        elif given[name].shape != tensor.shape:
            text = f"{name} is {list(given[name].shape)}, here {list(tensor.shape)}"
            (notes if name == "puzzle_emb.weights" else wrong).append(text)
    notes += [f"{name} has no place here" for name in given if name not in own]
    if wrong:
        raise UserError(
            f"{source}: these weights do not fit the model: {'; '.join(wrong + notes)}. "
            "Use the model section (and dataset) that the checkpoint was trained with"
        )
    model.load_state_dict(
        {name: given[name] for name in own if given[name].shape == own[name].shape}, strict=False
    )
    return notes


def num_parameters(model):
    """Trained numbers outside the puzzle embedding (the paper's count)."""
    return sum(p.numel() for p in model.parameters())


def forward_flops_per_example(model):
    """Floating-point operations of matrix products in one call of the network on one example."""
    config, length = model.config, model.length
    flops = 0
    for name, weight in model.L_level.named_parameters():
        rows = config.hidden_size if "mlp_t" in name else length
        flops += 2 * weight.numel() * rows
    if not config.mlp_t:
        flops += config.L_layers * 4 * length * length * config.hidden_size
    return flops


def step_flops_per_example(model, train):
    """Matrix-product FLOPs of one supervision step on one example; a gradient costs twice its forward."""
    config = model.config
    calls = config.L_cycles + 1
    net_calls = config.H_cycles * calls + (2 * calls if train else 0)
    heads = 2 * config.hidden_size * model.vocab_size * model.seq_len * 2
    return net_calls * forward_flops_per_example(model) + heads * (3 if train else 1)
