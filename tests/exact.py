"""One training step of TRM in float64, and how far a step in float32 may be from it.

The step is written from its formulas and does not use trm_model.py.

The distance follows from the model, since each call of the network gets the rounding errors of the
call before as a part of its input. A matrix product in float32 has an error of ROUNDING times the
size of its result. How these errors grow is computed: the step runs again in float64, and an error
of EPSILON, in place of ROUNDING, is added to every product, to every norm and to their gradients.
`tolerances` is ROUNDING times the growth. Figures are in docs/tpu_step.md.
"""

import torch
import torch.nn.functional as F

UNIT = 2.0**-24  # float32's largest relative rounding error
# Root of the mean square. 2 to 5 units were measured for sums of up to 256 products, as these
# models have.
ROUNDING = 6 * UNIT
EPSILON = 1e-9  # small enough that its square is nothing, and large enough for float64
DRAWS = 6


def step(config, weights, carry, puzzle_rows, rope=None, noise=None):
    """{name: value} of one supervision step, all in float64.

    These are z_H, z_L, logits and q_halt; loss, lm_loss and q_halt_loss, summed over the batch; and
    the gradients of loss / batch size by puzzle_rows and by each weight, under its name.

    config: ModelConfig. weights: {name: tensor}. carry: an admitted trm_model.Carry. rope: (cos,
    sin), which are given here, as the weights are. noise: a generator of the errors that are added,
    or None.
    """
    weights = {name: tensor.detach().double().requires_grad_() for name, tensor in weights.items()}
    rows = puzzle_rows.detach().double().requires_grad_()
    z_H, z_L, labels = carry.z_H.double(), carry.z_L.double(), carry.labels.long()
    dim = config.hidden_size

    def with_error(h):
        size = h.detach().square().mean(-1, keepdim=True).sqrt()
        return h + EPSILON * size * torch.randn(h.shape, generator=noise, dtype=h.dtype)

    def rounded(h):
        if noise is None:
            return h
        if h.requires_grad:
            h.register_hook(with_error)
        return with_error(h)

    def times(h, name):
        return rounded(h @ weights[name].T)

    def normed(h, axis):
        return rounded(h / (h.square().mean(axis, keepdim=True) + 1e-5).sqrt())

    def swiglu(h, name):
        gate, up = times(h, f"{name}.gate_up_proj.weight").chunk(2, -1)
        return times(gate / (1 + torch.exp(-gate)) * up, f"{name}.down_proj.weight")

    def attention(h, name):
        q, k, v = (
            part.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
            for part in times(h, f"{name}.qkv_proj.weight").chunk(3, -1)
        )
        if rope is not None:
            cos, sin = (table.double() for table in rope)
            halves = [part.chunk(2, -1) for part in (q, k)]
            q, k = (
                part * cos + torch.cat((-second, first), -1) * sin
                for part, (first, second) in zip((q, k), halves)
            )
        shares = torch.softmax(rounded(q @ k.mT) / (dim // config.num_heads) ** 0.5, -1)
        return times(rounded(shares @ v).transpose(1, 2).flatten(2), f"{name}.o_proj.weight")

    def net(h, injection):
        h = h + injection
        for layer in range(config.L_layers):
            name = f"L_level.layers.{layer}"
            if config.mlp_t:
                h = normed(h + swiglu(h.mT, f"{name}.mlp_t").mT, 1)
            else:
                h = normed(h + attention(h, f"{name}.self_attn"), 2)
            h = normed(h + swiglu(h, f"{name}.mlp"), 2)
        return h

    prefix = config.puzzle_emb_len or -(-rows.shape[1] // dim)
    x = torch.cat(
        (
            F.pad(rows, (0, prefix * dim - rows.shape[1])).unflatten(1, (prefix, dim)),
            weights["embed_tokens.embedding_weight"][carry.inputs.long()],
        ),
        1,
    )
    if config.pos_encodings == "learned":
        x = (x + weights["embed_pos.embedding_weight"]) / 2**0.5
    x = x * dim**0.5
    for cycle in range(config.H_cycles):
        with torch.set_grad_enabled(cycle == config.H_cycles - 1):
            for _ in range(config.L_cycles):
                z_L = net(z_L, z_H + x)
            z_H = net(z_H, z_L)

    logits = times(z_H[:, prefix:], "lm_head.weight")
    q_halt = (times(z_H[:, 0], "q_head.weight") + weights["q_head.bias"])[:, 0]
    scored = labels != 0
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits.clamp(max=0)))
    share = (s / s.sum(-1, keepdim=True)).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    solved = ((logits.argmax(-1) == labels) | ~scored).all(-1)
    lm_loss = ((-share.log() * scored).sum(-1) / scored.sum(-1).clamp(min=1)).sum()
    q_halt_loss = F.binary_cross_entropy_with_logits(q_halt, solved.double(), reduction="sum")
    loss = lm_loss + 0.5 * q_halt_loss
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


def tolerances(*given):
    """(step(*given), {name: how far float32's result may be from it, as a `distance`})."""
    exact, growth = step(*given), {}
    for draw in range(DRAWS):
        disturbed = step(*given, noise=torch.Generator().manual_seed(draw))
        for name, value in exact.items():
            growth[name] = max(growth.get(name, 0.0), distance(disturbed[name], value) / EPSILON)
    # what follows the last mixing, a product or a sum, rounds once more
    return exact, {name: ROUNDING * (1 + factor) for name, factor in growth.items()}
