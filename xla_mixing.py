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
    """Sum the products of a and b over the given axes, in float32 (as torch.tensordot does).

    a and b have the same dtype, float32 or bfloat16. The result, float32, has the other axes of a,
    then the other axes of b.
    """
    axes = [[axes] if isinstance(axes, int) else list(axes) for axes in (a_axes, b_axes)]
    if a.dtype == torch.float32:
        # and not _xla_dot_general, which on a TPU always rounds its operands to bfloat16
        return torch.tensordot(a, b, axes)
    # XLA's CPU device cannot multiply bfloat16 into float32, hence the conversion. A TPU multiplies
    # in bfloat16 all the same.
    a, b = a.float(), b.float()
    no_batch_axes: tuple[list[int], list[int]] = ([], [])
    return torch_xla._XLAC._xla_dot_general(
        a, b, (tuple(axes), no_batch_axes), preferred_element_type=torch.float32
    )


class SwiGLUFunction(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) of x [B, M, N] along `axis` (1 or 2), which comes last in the
    result.

    x is bfloat16 or float32, the result float32. The weights are float32, of layers.SwiGLUWeights.

    x is neither transposed nor reshaped, and the float32 results of the products are not rounded
    before they are used: otherwise the compiler chooses slow layouts. The exception is gate and up
    where a backward pass follows. They are kept for it in x's dtype, because in float32 they would
    not fit into memory, and the forward pass continues with the rounded values, too. If it used the
    float32 values, the compiler would keep these rather than round them a second time.

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

    axis: the axis of x that is mixed, 1 or 2. d is its size, M that of the other axis, W the width
    of the MLP. weights: gate and up [W, d], down [d, W]. grad: [B, M, d], the gradient of the
    result. gate and up: [B, M, W], the values of the forward pass. All have x's dtype.
    """
    gate_weight, up_weight, down_weight = weights
    dtype, rest = x.dtype, 3 - axis  # rest: the axis that is not mixed
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
    """`trm_model.recompute` for XLA: the backward pass computes `function` again, and not before
    the gradient of its result is there.

    h: the input of `function`. Without the barrier the compiler would see that the same values have
    been computed before, and keep them. Or it would compute them again too early. Both need the
    memory that was to be saved.
    """
    return BarrierInBackward.apply(trm_model.recompute(function, h, *rest), h)


class BarrierInBackward(torch.autograd.Function):
    """Returns `result`. In the backward pass, h can be used only once the gradient of `result` has
    been computed."""

    @staticmethod
    def forward(ctx, result, h):
        ctx.h = h
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        optimization_barrier_([grad, ctx.h])
        return grad, None
