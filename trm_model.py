"""The Tiny Recursive Model (arXiv 2510.04871): network, one supervision step, carry, halting and
loss.

Shapes: B slots (each works on one example), S grid cells, P prefix positions of the puzzle
embedding, L = P + S positions, D hidden size, V symbols (0 pad, 1 empty cell, 2 and more: the
digits). Activations have the forward dtype (bfloat16 or float32); weights are float32 (see
layers.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from layers import (
    Linear,
    SelfAttention,
    SwiGLU,
    SwiGLUWeights,
    Table,
    cast,
    on_xla,
    rms_norm,
    rope_table,
    truncated_normal,
)
from utils import STREAM_EXPLORATION, UserError, random_stream

PAD_ID = 0  # in the inputs: no cell; in the labels: a cell that is not scored
# In the files of the original, and therefore in ours, each weight's name begins with this.
CHECKPOINT_PREFIX = "model.inner."
# The sums that `act_step` returns, in this order.
METRIC_KEYS = (
    "count",
    "cell_accuracy",
    "exact_accuracy",
    "q_halt_accuracy",
    "steps",
    "lm_loss",
    "q_halt_loss",
)


class Cycles(NamedTuple):
    """How deep the recursion of a supervision step is."""

    H_cycles: int  # T: only the last one has a gradient
    L_cycles: int  # n: updates of z_L in each H cycle


class Objective(NamedTuple):
    """What a training step minimises, and with which recursion. The defaults are the paper's.

    cycles: None for the model's own. step_loss_decay, ponder_cost: see TrainingConfig and
    `act_step`.
    """

    cycles: Cycles | None = None
    step_loss_decay: float = 1.0
    ponder_cost: float = 0.0


PAPER_OBJECTIVE = Objective()


class Carry(NamedTuple):
    """What each slot keeps from one supervision step to the next."""

    z_H: torch.Tensor  # [B, L, D] forward dtype: the answer's embedding, y in the paper
    z_L: torch.Tensor  # [B, L, D] forward dtype: the latent state, z in the paper
    steps: torch.Tensor  # [B] int32: supervision steps done on this example
    halted: torch.Tensor  # [B] bool: the next step starts a new example
    inputs: torch.Tensor  # [B, S] int32
    labels: torch.Tensor  # [B, S] int32
    puzzle_identifiers: torch.Tensor  # [B] int32


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """Token mixing, then channel mixing, each with a residual connection and an RMS norm."""

    def __init__(self, config: ModelConfig, length: int, generator: torch.Generator):
        super().__init__()
        if config.mlp_t:
            self.mlp_t = SwiGLU(length, config.expansion, generator)
        else:
            self.self_attn = SelfAttention(config.hidden_size, config.num_heads, generator)
        self.mlp = SwiGLU(config.hidden_size, config.expansion, generator)
        self.mixes_tokens_by_mlp = config.mlp_t

    def swiglus(self) -> list[tuple[int, SwiGLU]]:
        """[(axis of [B, L, D] that it mixes, SwiGLU)] in the order in which they compute."""
        token_mixing = [(1, self.mlp_t)] if self.mixes_tokens_by_mlp else []
        return [*token_mixing, (2, self.mlp)]

    def weights(self) -> list[SwiGLUWeights]:
        """The weights of each SwiGLU, for `forward`. Call it once in a step."""
        return [swiglu.weights() for _, swiglu in self.swiglus()]

    def forward(
        self, h: torch.Tensor, weights: list[SwiGLUWeights], rope: torch.Tensor | None
    ) -> torch.Tensor:
        """h [B, L, D] -> [B, L, D]."""
        if not self.mixes_tokens_by_mlp:
            h = rms_norm(h + self.self_attn(h, rope), h.dtype)
        for (axis, swiglu), swiglu_weights in zip(self.swiglus(), weights, strict=True):
            h = swiglu(h, swiglu_weights, axis)
        return h


def recompute(function: Callable[..., torch.Tensor], h: torch.Tensor, *rest) -> torch.Tensor:
    """function(h, *rest), of which only h is kept for the backward pass.

    The backward pass computes everything else again (arXiv 1604.06174).
    """
    # The arguments are in a closure because checkpoint() looks up torch.<device type> for each
    # tensor that it gets, and there is no torch.xla.
    return checkpoint(lambda: function(h, *rest), use_reentrant=False, preserve_rng_state=False)


class Network(nn.Module):
    """The L_layers blocks. The same network updates both z_L and z_H.

    recompute: the function that calls a block under activation checkpointing. xla_mixing.py puts
    another one in its place on XLA.
    """

    def __init__(self, config: ModelConfig, length: int, generator: torch.Generator):
        super().__init__()
        blocks = [Block(config, length, generator) for _ in range(config.L_layers)]
        # a ModuleList is typed as a list of any modules
        self.layers: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.activation_checkpointing = config.activation_checkpointing
        self.recompute = recompute

    def weights(self) -> list[list[SwiGLUWeights]]:
        """`Block.weights()` of each layer, for `forward`. Call it once in a step."""
        return [layer.weights() for layer in self.layers]

    def forward(
        self,
        h: torch.Tensor,
        injection: torch.Tensor,
        weights: list[list[SwiGLUWeights]],
        rope: torch.Tensor | None,
    ) -> torch.Tensor:
        """The blocks applied to h + injection; h, injection and the result are [B, L, D]."""
        recomputing = self.activation_checkpointing and torch.is_grad_enabled()
        h = h + injection
        for layer, layer_weights in zip(self.layers, weights, strict=True):
            if recomputing:
                h = self.recompute(layer, h, layer_weights, rope)
            else:
                h = layer(h, layer_weights, rope)
        return h


class PuzzleEmbedding(nn.Module):
    """A table [num_puzzle_identifiers, puzzle_emb_ndim] float32, zero at the start.

    The table is a buffer, and has an optimizer of its own. A step computes the gradient of the rows
    that it reads (`puzzle_rows`) and not that of the table, which would need a scatter.
    """

    weights: torch.Tensor

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.register_buffer("weights", torch.zeros(rows, dim))


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------
class TinyRecursiveModel(nn.Module):
    """TRM for grids of `seq_len` cells over `vocab_size` symbols.

    The names of parameters and buffers are the original's without CHECKPOINT_PREFIX. The initial
    weights depend on `seed` alone. On an XLA device it needs mixing.choose_mixing() or
    xla_mixing.use().
    """

    rope: torch.Tensor | None
    H_init: torch.Tensor
    L_init: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        seq_len: int,
        vocab_size: int,
        num_puzzle_identifiers: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        dim = config.hidden_size
        self.config, self.seq_len, self.vocab_size = config, seq_len, vocab_size
        self.forward_dtype: torch.dtype = getattr(torch, config.forward_dtype)
        self.prefix_len = 0
        if config.puzzle_emb_ndim:
            self.prefix_len = config.puzzle_emb_len or -(-config.puzzle_emb_ndim // dim)
            self.puzzle_emb = PuzzleEmbedding(num_puzzle_identifiers, config.puzzle_emb_ndim)
        self.length = self.prefix_len + seq_len

        self.embed_tokens = Table(vocab_size, dim, generator)
        if config.pos_encodings == "learned":
            self.embed_pos = Table(self.length, dim, generator)
        rope = None
        if config.pos_encodings == "rope":
            rope = rope_table(self.length, dim // config.num_heads)
        self.register_buffer("rope", rope, persistent=False)
        self.L_level = Network(config, self.length, generator)
        self.lm_head = Linear(dim, vocab_size, generator)
        # There are two outputs, as in the original's checkpoints, and only the first is used. The
        # bias of -5 lets an untrained head continue (its probability of halting is 0.7%).
        self.q_head = nn.Linear(dim, 2)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)
        self.register_buffer("H_init", truncated_normal((dim,), 1.0, generator))
        self.register_buffer("L_init", truncated_normal((dim,), 1.0, generator))

    @property
    def cycles(self) -> Cycles:
        """The depth in every evaluation, and in a training without a curriculum."""
        return Cycles(self.config.H_cycles, self.config.L_cycles)

    def empty_carry(self, batch_size: int) -> Carry:
        """A carry on the CPU in which every slot is halted. Its other values are never read."""

        def zeros(*shape):
            return torch.zeros(batch_size, *shape, dtype=torch.int32)

        z = torch.zeros(batch_size, self.length, self.config.hidden_size, dtype=self.forward_dtype)
        return Carry(
            z_H=z,
            z_L=z.clone(),
            steps=zeros(),
            halted=torch.ones(batch_size, dtype=torch.bool),
            inputs=zeros(self.seq_len),
            labels=zeros(self.seq_len),
            puzzle_identifiers=zeros(),
        )

    def admit(self, carry: Carry, batch: dict[str, torch.Tensor]) -> Carry:
        """Start a new example in each halted slot; the other slots keep theirs.

        batch: {"inputs": [B, S], "labels": [B, S], "puzzle_identifiers": [B]}, integers: the
        example that each slot gets if it is halted.
        """
        new = carry.halted

        def choose(offered, kept):
            return torch.where(new.view(-1, *[1] * (kept.dim() - 1)), offered.to(kept.dtype), kept)

        return Carry(
            z_H=choose(self.H_init, carry.z_H),
            z_L=choose(self.L_init, carry.z_L),
            steps=torch.where(new, 0, carry.steps),
            halted=torch.zeros_like(new),
            inputs=choose(batch["inputs"], carry.inputs),
            labels=choose(batch["labels"], carry.labels),
            puzzle_identifiers=choose(batch["puzzle_identifiers"], carry.puzzle_identifiers),
        )

    def puzzle_rows(self, carry: Carry) -> torch.Tensor | None:
        """The puzzle embedding of each slot, [B, puzzle_emb_ndim] float32, or None without one."""
        return self.puzzle_emb.weights[carry.puzzle_identifiers] if self.prefix_len else None

    def input_embedding(
        self, inputs: torch.Tensor, puzzle_rows: torch.Tensor | None
    ) -> torch.Tensor:
        """x [B, L, D] in the forward dtype: prefix and cells, plus positions, times sqrt(D)."""
        dtype, dim = self.forward_dtype, self.config.hidden_size
        # A product with a one-hot matrix: on XLA the backward pass of F.embedding would run the
        # graph that has been traced so far.
        symbols = torch.arange(self.vocab_size, device=inputs.device)
        one_hot = (inputs.unsqueeze(-1) == symbols).to(dtype)
        x = one_hot @ cast(self.embed_tokens.embedding_weight, dtype)
        if puzzle_rows is not None:
            prefix = F.pad(puzzle_rows, (0, self.prefix_len * dim - puzzle_rows.shape[-1]))
            x = torch.cat((prefix.view(-1, self.prefix_len, dim).to(dtype), x), dim=1)
        if self.config.pos_encodings == "learned":
            # the sum of two embeddings, scaled back to the variance of one
            x = (x + cast(self.embed_pos.embedding_weight, dtype)) * 0.5**0.5
        return x * dim**0.5

    def supervision_step(
        self, carry: Carry, puzzle_rows: torch.Tensor | None, cycles: Cycles | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One supervision step: H_cycles - 1 cycles without gradient, then one with gradient.

        cycles: None for the model's own. Returns z_H and z_L [B, L, D] and the logits [B, S, V] in
        the forward dtype, and the halting logit [B] float32.
        """
        net, (H_cycles, L_cycles) = self.L_level, cycles or self.cycles

        def cycle(z_H, z_L):
            injection = z_H + x
            for _ in range(L_cycles):
                z_L = net(z_L, injection, weights, self.rope)
            return net(z_H, z_L, weights, self.rope), z_L

        weights = net.weights()
        x = self.input_embedding(carry.inputs, puzzle_rows)
        z_H, z_L = carry.z_H, carry.z_L
        with torch.no_grad():
            for _ in range(H_cycles - 1):
                z_H, z_L = cycle(z_H, z_L)
        z_H, z_L = cycle(z_H, z_L)
        logits = self.lm_head(z_H[:, self.prefix_len :])
        return z_H, z_L, logits, self.halting_logit(z_H[:, 0].float())

    def halting_logit(self, z: torch.Tensor) -> torch.Tensor:
        """The halting logit [B] of the first position's state z [B, D]; both float32."""
        weight = cast(self.q_head.weight, torch.float32)
        if on_xla(z):
            # A TPU rounds the operands of a matrix product to bfloat16, but not those of a sum.
            return (z * weight[0]).sum(-1) + cast(self.q_head.bias, torch.float32)[0]
        return F.linear(z, weight, self.q_head.bias)[:, 0]


# --------------------------------------------------------------------------------------------------
# Loss, halting, metrics
# --------------------------------------------------------------------------------------------------
def stablemax_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Stablemax cross-entropy (arXiv 2501.04697), the mean over each example's labelled cells.

        s(a) = a + 1 if a >= 0, else 1 / (1 - a);   probability = s / (sum of s over the symbols)

    logits [..., S, V]; labels [..., S] integers, PAD_ID where a cell is not scored. Returns [...]
    float64, as in the original. On XLA it is float32, since a TPU has no float64; the README says
    how much that changes.
    """
    wide = logits.float() if on_xla(logits) else logits.double()
    # torch.where computes both branches, and also their gradients. The clamp keeps the branch that
    # is not chosen from contributing 0 * inf to the gradient. 1e-30 is the original's epsilon. A
    # pad gets 1 added, which keeps its logarithm finite; its loss is not counted.
    s = torch.where(wide >= 0, wide + 1, 1 / (1 - wide.clamp(max=0) + 1e-30))
    target = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    loss = torch.log(s.sum(-1)) - torch.log((s * target).sum(-1) + (labels == PAD_ID))
    scored = labels != PAD_ID
    return (loss * scored).sum(-1) / scored.sum(-1).clamp(min=1)


def exploration_min_steps(
    seed: int, step: int, batch_size: int, prob: float, halt_max_steps: int
) -> np.ndarray:
    """The least number of supervision steps of each slot at a training step, [batch_size] int32.

    With probability `prob` it is drawn uniformly from 2 to halt_max_steps, otherwise it is 0. The
    result depends on the arguments alone. step: from 1.
    """
    stream = random_stream(seed, STREAM_EXPLORATION, step)
    explores = stream.random(batch_size) < prob
    return (explores * stream.integers(2, max(2, halt_max_steps) + 1, batch_size)).astype("int32")


def act_step(
    model: TinyRecursiveModel,
    carry: Carry,
    puzzle_rows: torch.Tensor | None,
    min_halt_steps: torch.Tensor,
    objective: Objective = PAPER_OBJECTIVE,
) -> tuple[torch.Tensor, torch.Tensor, Carry]:
    """One training step of deep supervision with adaptive halting, without the backward pass.

    The loss is the sum over the slots of this, where t = 1, 2, ... is a slot's supervision step:

        step_loss_decay^(t - 1) * cell loss + 0.5 * halting loss
            + ponder_cost * (1 - sigmoid(halting logit))

    The last term is the cost of the further step that the halting head expects. carry: after
    `admit`. min_halt_steps: [B] integers from `exploration_min_steps`.

    Returns (loss, a scalar; sums [len(METRIC_KEYS)] float32; the next carry). Accuracies and steps
    are summed over the slots that halt at this step. lm_loss and q_halt_loss are summed over all
    slots, without step_loss_decay and ponder_cost, so that runs can be compared.
    """
    z_H, z_L, logits, q_halt = model.supervision_step(carry, puzzle_rows, objective.cycles)
    correct_cells, exact = score(logits, carry.labels)
    cell_losses = stablemax_loss(logits, carry.labels)
    lm_loss = cell_losses.sum()
    q_halt_loss = halting_loss(q_halt, exact, reduction="sum")
    weighted = lm_loss
    if objective.step_loss_decay != 1:
        weights = objective.step_loss_decay ** carry.steps.to(cell_losses.dtype)
        weighted = (weights * cell_losses).sum()
    loss = weighted + 0.5 * q_halt_loss
    if objective.ponder_cost:
        loss = loss + objective.ponder_cost * torch.sigmoid(-q_halt).sum()

    steps = carry.steps + 1
    max_steps = model.config.halt_max_steps
    halted = (steps >= max_steps) | ((q_halt > 0) & (steps >= min_halt_steps))
    counted = halted & (carry.labels != PAD_ID).any(-1)
    sums = [
        counted,
        counted * correct_cells,
        counted & exact,
        counted & ((q_halt >= 0) == exact),
        counted * steps,
    ]
    metrics = torch.stack(
        [value.sum().float() for value in sums] + [lm_loss.detach().float(), q_halt_loss.detach()]
    )
    examples = carry.inputs, carry.labels, carry.puzzle_identifiers
    next_carry = Carry(z_H.detach(), z_L.detach(), steps, halted, *examples)
    return loss, metrics, next_carry


def halting_loss(q_halt: torch.Tensor, exact: torch.Tensor, reduction: str) -> torch.Tensor:
    """Binary cross-entropy of the halting logit [B] against "every cell is right" [B]."""
    target = exact.to(q_halt.dtype)
    return F.binary_cross_entropy_with_logits(q_halt, target, reduction=reduction)


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of the labelled cells that are right [B] float32, whether all are [B] bool)."""
    scored = labels != PAD_ID
    right = ((logits.argmax(-1) == labels) & scored).sum(-1)
    total = scored.sum(-1)
    return right / total.clamp(min=1), right == total


def evaluation_step(
    model: TinyRecursiveModel, carry: Carry, batch: dict[str, torch.Tensor]
) -> tuple[Carry, torch.Tensor]:
    """Start new examples, then one supervision step. Each example gets exactly halt_max_steps
    steps.

    batch: as for `TinyRecursiveModel.admit`. Returns the next carry and [6, B] float32: cell
    accuracy, exact (0 or 1), whether the halting logit is right (0 or 1), loss of the cells, loss
    of the halting logit, the halting logit.
    """
    carry = model.admit(carry, batch)
    z_H, z_L, logits, q_halt = model.supervision_step(carry, model.puzzle_rows(carry))
    correct_cells, exact = score(logits, carry.labels)
    q_halt_loss = halting_loss(q_halt, exact, reduction="none")
    values = [
        correct_cells,
        exact,
        (q_halt >= 0) == exact,
        stablemax_loss(logits, carry.labels),
        q_halt_loss,
        q_halt,
    ]
    result = torch.stack([value.float() for value in values])
    steps = carry.steps + 1
    halted = steps >= model.config.halt_max_steps
    examples = carry.inputs, carry.labels, carry.puzzle_identifiers
    return Carry(z_H, z_L, steps, halted, *examples), result


# --------------------------------------------------------------------------------------------------
# Weights by name, and the cost of a step
# --------------------------------------------------------------------------------------------------
def named_state(model: TinyRecursiveModel) -> dict[str, torch.Tensor]:
    """The state dict under the original's names (CHECKPOINT_PREFIX + name)."""
    return {CHECKPOINT_PREFIX + name: tensor for name, tensor in model.state_dict().items()}


def load_named_state(
    model: TinyRecursiveModel, state: dict[str, torch.Tensor], source: str
) -> list[str]:
    """Load weights that the original (compiled or not) or this kit has saved.

    Returns a note on everything that was left out: names that the model does not have, and a puzzle
    embedding of another shape (the model's own then keeps its zeros). Raises UserError, which names
    each weight of the network that is missing or has another shape. source: the file's name, for
    messages.
    """
    given = {
        name.removeprefix("_orig_mod.").removeprefix(CHECKPOINT_PREFIX): tensor
        for name, tensor in state.items()
    }
    own = model.state_dict()
    notes: list[str] = []
    wrong: list[str] = []
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
    fitting = {name: given[name] for name in own if given[name].shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return notes


def num_parameters(model: TinyRecursiveModel) -> int:
    """The number of trained weights without the puzzle embedding, as the paper counts them."""
    return sum(p.numel() for p in model.parameters())


def forward_flops_per_example(model: TinyRecursiveModel) -> int:
    """FLOPs of the matrix products in one call of the network on one example."""
    config, length = model.config, model.length
    flops = 0
    for name, weight in model.L_level.named_parameters():
        # token mixing multiplies D columns of length L, everything else L rows of length D
        rows = config.hidden_size if "mlp_t" in name else length
        flops += 2 * weight.numel() * rows
    if not config.mlp_t:
        flops += config.L_layers * 4 * length * length * config.hidden_size
    return flops


def step_flops_per_example(
    model: TinyRecursiveModel, train: bool, cycles: Cycles | None = None
) -> int:
    """FLOPs of the matrix products in one supervision step on one example.

    train: with the backward pass, which is taken to cost twice as much as the forward pass.
    cycles: None for the model's own.
    """
    config, (H_cycles, L_cycles) = model.config, cycles or model.cycles
    calls = L_cycles + 1
    net_calls = H_cycles * calls + (2 * calls if train else 0)
    # the product with a one-hot matrix in input_embedding, and lm_head
    ends = 2 * config.hidden_size * model.vocab_size * model.seq_len * 2
    return net_calls * forward_flops_per_example(model) + ends * (3 if train else 1)
