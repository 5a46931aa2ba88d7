"""One training step of TRM in float64, written from the paper's formulas and not from trm_model.py.

Also the tolerance for the same step in float32. It depends on the model, because the input of each
call of the network holds the rounding errors of the call before. A matrix product in float32 has an
error of ROUNDING times the size of its result. How this error grows is computed: the step is
repeated in float64, and a random error of EPSILON times the size is added at every product and norm
and in their gradients. `tolerances` returns ROUNDING times the growth. Figures: docs/tpu_step.md.
"""

import torch
import torch.nn.functional as F

UNIT = 2.0**-24  # the largest relative rounding error of float32
# Root of the mean square error: 2 to 5 units were measured for sums of up to 256 products, which is
# what these models have.
ROUNDING = 6 * UNIT
EPSILON = 1e-9  # its square is negligible, and it is large against the rounding of float64
DRAWS = 6  # repetitions with other random errors


class Network:
    """The network in float64. noise: a generator of the errors that are added, or None.

    config: ModelConfig. weights: {name: float64 tensor}. rope: (cos, sin) or None; like the
    weights, they are taken as exact.
    """

    def __init__(self, config, weights, rope, noise):
        self.config, self.weights, self.rope, self.noise = config, weights, rope, noise

    def with_error(self, h):
        size = h.detach().square().mean(-1, keepdim=True).sqrt()
        return h + EPSILON * size * torch.randn(h.shape, generator=self.noise, dtype=h.dtype)

    def rounded(self, h):
        if self.noise is None:
            return h
        if h.requires_grad:
            h.register_hook(self.with_error)
        return self.with_error(h)

    def times(self, h, name):
        return self.rounded(h @ self.weights[name].T)

    def normed(self, h, axis):
        return self.rounded(h / (h.square().mean(axis, keepdim=True) + 1e-5).sqrt())

    def swiglu(self, h, name):
        gate, up = self.times(h, f"{name}.gate_up_proj.weight").chunk(2, -1)
        return self.times(gate / (1 + torch.exp(-gate)) * up, f"{name}.down_proj.weight")

    def attention(self, h, name):
        heads = self.config.num_heads
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in self.times(h, f"{name}.qkv_proj.weight").chunk(3, -1)
        )
        if self.rope is not None:
            cos, sin = (table.double() for table in self.rope)
            halves = [part.chunk(2, -1) for part in (q, k)]
            q, k = (
                part * cos + torch.cat((-second, first), -1) * sin
                for part, (first, second) in zip((q, k), halves)
            )
        scale = (self.config.hidden_size // heads) ** 0.5
        shares = torch.softmax(self.rounded(q @ k.mT) / scale, -1)
        mixed = self.rounded(shares @ v).transpose(1, 2).flatten(2)
        return self.times(mixed, f"{name}.o_proj.weight")

    def call(self, h, injection):
        """The network once, on h + injection, [b, S, D]."""
        h = h + injection
        for layer in range(self.config.L_layers):
            name = f"L_level.layers.{layer}"
            if self.config.mlp_t:
                h = self.normed(h + self.swiglu(h.mT, f"{name}.mlp_t").mT, 1)
            else:
                h = self.normed(h + self.attention(h, f"{name}.self_attn"), 2)
            h = self.normed(h + self.swiglu(h, f"{name}.mlp"), 2)
        return h

    def embedding(self, inputs, rows, prefix):
        """The input of the recursion, [b, prefix + S, D]; rows: of the puzzle embedding."""
        dim = self.config.hidden_size
        puzzle = F.pad(rows, (0, prefix * dim - rows.shape[1])).unflatten(1, (prefix, dim))
        tokens = self.weights["embed_tokens.embedding_weight"][inputs.long()]
        x = torch.cat((puzzle, tokens), 1)
        if self.config.pos_encodings == "learned":
            x = (x + self.weights["embed_pos.embedding_weight"]) / 2**0.5
        return x * dim**0.5

    def recursion(self, z_H, z_L, x):
        """(z_H, z_L) after one supervision step; only the last cycle has gradients."""
        for cycle in range(self.config.H_cycles):
            with torch.set_grad_enabled(cycle == self.config.H_cycles - 1):
                for _ in range(self.config.L_cycles):
                    z_L = self.call(z_L, z_H + x)
                z_H = self.call(z_H, z_L)
        return z_H, z_L


def losses(logits, q_halt, labels):
    """(loss, lm_loss, q_halt_loss), summed over the batch.

    logits [b, S, V] and q_halt [b] float64; labels [b, S] int64, where 0 is not scored.
    """
    scored = labels != 0
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    share = (s / s.sum(-1, keepdim=True)).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    solved = ((logits.argmax(-1) == labels) | ~scored).all(-1)
    lm_loss = ((-share.log() * scored).sum(-1) / scored.sum(-1).clamp(min=1)).sum()
    q_halt_loss = F.binary_cross_entropy_with_logits(q_halt, solved.double(), reduction="sum")
    return lm_loss + 0.5 * q_halt_loss, lm_loss, q_halt_loss


def step(config, weights, carry, puzzle_rows, rope=None, noise=None):
    """{name: value} of one supervision step.

    The names are z_H, z_L, logits and q_halt; loss, lm_loss and q_halt_loss, which are summed over
    the batch; puzzle_rows and each weight's name, which are the gradients of loss / batch size.
    carry: a trm_model.Carry after `admit`. puzzle_rows: [b, puzzle_emb_ndim]. The other arguments:
    see Network.
    """
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in weights.items()}
    rows = puzzle_rows.detach().double().requires_grad_()
    network = Network(config, weights, rope, noise)
    prefix = config.puzzle_emb_len or -(-rows.shape[1] // config.hidden_size)
    x = network.embedding(carry.inputs, rows, prefix)
    z_H, z_L = network.recursion(carry.z_H.double(), carry.z_L.double(), x)
    logits = network.times(z_H[:, prefix:], "lm_head.weight")
    q_halt = (network.times(z_H[:, 0], "q_head.weight") + weights["q_head.bias"])[:, 0]
    labels = carry.labels.long()
    loss, lm_loss, q_halt_loss = losses(logits, q_halt, labels)
    grads = torch.autograd.grad(loss / len(labels), [*weights.values(), rows])
    values = {
        "z_H": z_H,
        "z_L": z_L,
        "logits": logits,
        "q_halt": q_halt,
        "loss": loss,
        "lm_loss": lm_loss,
        "q_halt_loss": q_halt_loss,
        **dict(zip([*weights, "puzzle_rows"], grads)),
    }
    return {name: value.detach() for name, value in values.items()}


def distance(ours, exact):
    """max |ours - exact| / max(1, max |exact|)."""
    return (
        (ours.detach().cpu().double() - exact).abs().max() / exact.abs().max().clamp(min=1)
    ).item()


def steps(count, config, weights, carry, puzzle_rows, rope=None, noise=None):
    """[the values of `step`] of `count` supervision steps one after the other on one carry."""
    values = []
    for _ in range(count):
        values.append(step(config, weights, carry, puzzle_rows, rope, noise))
        carry = carry._replace(z_H=values[-1]["z_H"], z_L=values[-1]["z_L"])
    return values


def tolerances(*given, count=1):
    """[(values, tolerances)] of `count` supervision steps, one after the other.

    values: of `step`, in float64. tolerances: {name: the largest allowed `distance` of a float32
    result}. given: the arguments of `step`.
    """
    exact = steps(count, *given)
    growth = [dict.fromkeys(values, 0.0) for values in exact]
    for draw in range(DRAWS):
        disturbed = steps(count, *given, noise=torch.Generator().manual_seed(draw))
        for grown, values, precise in zip(growth, disturbed, exact, strict=True):
            for name, value in precise.items():
                grown[name] = max(grown[name], distance(values[name], value) / EPSILON)
    # + 1: a product or a sum after the last layer rounds once more
    return [
        (values, {name: ROUNDING * (1 + factor) for name, factor in grown.items()})
        for values, grown in zip(exact, growth, strict=True)
    ]
