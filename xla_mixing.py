"""How a model computes on XLA: SwiGLU, forward and backward, in a form that suits a TPU's memory
layout.

It was written for a v4 first. The measurements behind it are in docs/tpu_step.md.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch_xla
from torch_xla.core.xla_model import optimization_barrier_

import trm_model
from layers import SwiGLUWeights, cast, rms_norm


def use(model: trm_model.TinyRecursiveModel) -> None:
    """Let the model compute in XLA's form. Call it before the first step, on any device."""
    network = model.L_level
    network.recompute = recompute_after_barrier
    for layer in network.layers:
        for _, swiglu in layer.swiglus():
            swiglu.mix = mix


def mix(x: torch.Tensor, weights: SwiGLUWeights, axis: int) -> torch.Tensor:
    """rms_norm(x + swiglu(x)) along `axis` of x [B, L, D]: `layers.mix` in XLA's form."""
    mixed = SwiGLUFunction.apply(x, *weights, axis, torch.is_grad_enabled())
    return rms_norm(x + mixed.transpose(axis, 2), x.dtype, axis)


Axes = int | tuple[int, ...]


def contract(a: torch.Tensor, a_axes: Axes, b: torch.Tensor, b_axes: Axes) -> torch.Tensor:
    """Sums of products over the given axes of a and b, in float32.

    The result has the other axes of a, then the other axes of b.
    """
    axes = [[axes] if isinstance(axes, int) else list(axes) for axes in (a_axes, b_axes)]
    if a.dtype == torch.float32:
        # On a TPU the function below always multiplies in bfloat16's precision.
        return torch.tensordot(a, b, axes)
    # XLA's CPU device cannot multiply bfloat16 into float32, hence the conversion. A TPU multiplies
    # in bfloat16 all the same.
    a, b = a.float(), b.float()
    no_batch_axes: tuple[list[int], list[int]] = ([], [])
    return torch_xla._XLAC._xla_dot_general(
        a, b, (tuple(axes), no_batch_axes), preferred_element_type=torch.float32
    )


class SwiGLUFunction(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of x [B, M, N] along `axis`, which comes last in the result.

    The result is float32. There is no transpose and no reshape of x, and what the TPU has added up
    in float32 is used before it is rounded: otherwise the compiler chooses slow layouts. Only what
    the backward pass needs is rounded, or it would not fit into memory: the compiler keeps the
    float32 values rather than round them a second time.

    keep: whether a backward pass will follow.
    """

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, axis, keep):
        weights = [cast(weight, x.dtype) for weight in (gate_weight, up_weight, down_weight)]
        gate, up = (contract(x, axis, weight, 1) for weight in weights[:2])
        if keep:
            gate, up = gate.to(x.dtype), up.to(x.dtype)
            ctx.save_for_backward(x, *weights, gate, up)
            ctx.axis = axis
        return contract((F.silu(gate.float()) * up.float()).to(x.dtype), 2, weights[2], 1)

    @staticmethod
    def backward(ctx, grad):
        x, *weights, gate, up = ctx.saved_tensors
        x_grad, *weight_grads = swiglu_gradient(grad.to(x.dtype), x, weights, gate, up, ctx.axis)
        return x_grad.to(x.dtype).transpose(ctx.axis, 2), *weight_grads, None, None


def swiglu_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: SwiGLUWeights,
    gate: torch.Tensor,
    up: torch.Tensor,
    axis: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (with `axis` last), gate, up and down weight, all float32.

    grad: [B, M, d], of the result; gate and up: [B, M, W], the forward pass's; all in x's dtype.
    """
    gate_weight, up_weight, down_weight = weights
    dtype, rest = x.dtype, 3 - axis
    gate, up = gate.float(), up.float()
    sigmoid = torch.sigmoid(gate)
    swish = gate * sigmoid
    inner = contract(grad, 2, down_weight, 0)
    gate_grad = (inner * up * (sigmoid + swish * (1 - sigmoid))).to(dtype)
    up_grad = (inner * swish).to(dtype)
    x_grad = contract(gate_grad, 2, gate_weight, 0) + contract(up_grad, 2, up_weight, 0)
    return (
        x_grad,
        contract(gate_grad, (0, 1), x, (0, rest)),
        contract(up_grad, (0, 1), x, (0, rest)),
        contract(grad, (0, 1), (swish * up).to(dtype), (0, 1)),
    )


def recompute_after_barrier(
    function: Callable[..., torch.Tensor], h: torch.Tensor, *rest
) -> torch.Tensor:
    """`trm_model.recompute` for XLA: the backward pass computes again when the gradient has
    arrived.

    Without the barrier the compiler would see that it has computed the same values before, and keep
    those, or it would compute them again too early. Both need the memory that was to be saved.
    """
    return BarrierInBackward.apply(trm_model.recompute(function, h, *rest), h)


class BarrierInBackward(torch.autograd.Function):
    """Returns `result`. In the backward pass h may be used only after the gradient of `result`."""

    @staticmethod
    def forward(ctx, result, h):
        ctx.h = h
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        optimization_barrier_([grad, ctx.h])
        return grad, None
