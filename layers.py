"""The building blocks of the model: linear maps, SwiGLU, self-attention, RMS norm, rotary
positions.

Shapes: B examples, L positions, D hidden size. Weights are float32. Each is cast to the dtype of
the activations where it is used, so that its gradients are summed in float32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

RMS_NORM_EPS = 1e-5


def truncated_normal(
    shape: tuple[int, ...], std: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw float32 values from a normal distribution cut off at two of its standard deviations.

    The values are rescaled so that their standard deviation after the cut is `std`, as in JAX.
    """
    cut_away = 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    std_after_cut = math.sqrt(1 - cut_away)
    tensor = torch.empty(shape)
    nn.init.trunc_normal_(tensor, std=1.0, a=-2.0, b=2.0, generator=generator)
    return tensor.mul_(std / std_after_cut)


def rms_norm(x: torch.Tensor, dtype: torch.dtype, dim: int = -1) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 1e-5) along `dim`, computed in float32 and returned in `dtype`.

    There is no learned weight.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim, keepdim=True) + RMS_NORM_EPS)).to(dtype)


def cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` in `dtype`, always as a copy.

    A matrix product takes a view of its weight. On XLA a view of a parameter is traced differently
    once the parameter has been updated in place, so that the second step would compile again.
    """
    return weight.to(dtype, copy=True)


def on_xla(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on an XLA device: a TPU, or torch_xla's own CPU device."""
    return tensor.device.type == "xla"


class Linear(nn.Module):
    """y = x W^T. The weight [d_out, d_in] starts as a truncated normal with std 1/sqrt(d_in)."""

    def __init__(self, d_in: int, d_out: int, generator: torch.Generator):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal((d_out, d_in), d_in**-0.5, generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., d_in] -> [..., d_out], in x's dtype."""
        return F.linear(x, cast(self.weight, x.dtype))


class Table(nn.Module):
    """A table of vectors [rows, D] that starts as a truncated normal with std 1/sqrt(D)."""

    def __init__(self, rows: int, dim: int, generator: torch.Generator):
        super().__init__()
        self.embedding_weight = nn.Parameter(truncated_normal((rows, dim), dim**-0.5, generator))


# --------------------------------------------------------------------------------------------------
# SwiGLU
# --------------------------------------------------------------------------------------------------
# (gate [W, d], up [W, d], down [d, W]), each float32; d is the size of the axis that is mixed
SwiGLUWeights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def swiglu(x: torch.Tensor, weights: SwiGLUWeights, axis: int) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) along `axis` of x [B, M, N].

    Returns [B, M, N] for axis 2, and [B, N, M] for axis 1: the mixed axis comes last.
    """
    gate, up, down = (cast(weight, x.dtype) for weight in weights)
    x = x.transpose(axis, 2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def mix(x: torch.Tensor, weights: SwiGLUWeights, axis: int) -> torch.Tensor:
    """The mixing step of a SwiGLU: rms_norm(x + swiglu(x)) along `axis` of x [B, L, D].

    This is the implementation in PyTorch, for CPU and CUDA. xla_mixing.py and pallas_mixing.py have
    others with the same arguments and result. Raises RuntimeError on an XLA device.
    """
    if on_xla(x):
        raise RuntimeError(
            "a model on an XLA device needs xla_mixing.use(model) before its first step"
        )
    return rms_norm(x + swiglu(x, weights, axis).transpose(axis, 2), x.dtype, axis)


class SwiGLU(nn.Module):
    """An MLP with a gate (arXiv 2002.05202), followed by its residual connection and RMS norm.

    Its width W is round(expansion * dim * 2/3), rounded up to a multiple of 256.
    mix: the function that `forward` calls. It is `layers.mix` unless mixing.py puts another one in
    its place.
    """

    mix: Callable[[torch.Tensor, SwiGLUWeights, int], torch.Tensor]

    def __init__(self, dim: int, expansion: float, generator: torch.Generator):
        super().__init__()
        width = -(-round(expansion * dim * 2 / 3) // 256) * 256
        self.gate_up_proj = Linear(dim, 2 * width, generator)
        self.down_proj = Linear(width, dim, generator)
        self.mix = mix

    def weights(self) -> SwiGLUWeights:
        """(gate, up, down) for `forward`. Call it once in a step.

        The backward pass then concatenates the gradients of gate and up once, and not at each use.
        """
        gate, up = self.gate_up_proj.weight.chunk(2)
        return gate, up, self.down_proj.weight

    def forward(self, x: torch.Tensor, weights: SwiGLUWeights, axis: int) -> torch.Tensor:
        """rms_norm(x + swiglu(x)) along `axis` of x [B, L, D], in x's shape and dtype."""
        return self.mix(x, weights, axis)


# --------------------------------------------------------------------------------------------------
# Self-attention
# --------------------------------------------------------------------------------------------------
class SelfAttention(nn.Module):
    """Multi-head attention over all positions (not causal), without biases."""

    def __init__(self, dim: int, num_heads: int, generator: torch.Generator):
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = Linear(dim, 3 * dim, generator)
        self.o_proj = Linear(dim, dim, generator)

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
        """x [B, L, D] -> [B, L, D]. rope: `rope_table`, or None for attention without positions."""
        batch, length, dim = x.shape
        qkv = self.qkv_proj(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, dim))


def rope_table(length: int, head_dim: int) -> torch.Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864, base 10000).

    Returns [2, length, head_dim] float32.
    """
    # The operations are in the original's order. Another order changes the last digit of a
    # frequency, and position 90 multiplies that error by 90.
    inverse = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
    # In float64, because the last digit of a float32 cosine depends on the processor.
    return torch.stack((angle.double().cos(), angle.double().sin())).float()


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of the last axis of x [..., L, head_dim], in float32; keeps x's dtype."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
