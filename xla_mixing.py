"""SwiGLU on XLA, forward and backward, written for how a TPU (first a v4) lays things out. The figures behind it: docs/tpu_step.md."""

import torch
import torch.nn.functional as F
import torch_xla

from trm_model import cast


def contract(a, a_axes, b, b_axes):
    """Sums of products over axes of a and b, float32; what is left are the other axes of a, then those of b."""
    axes = [[axes] if isinstance(axes, int) else list(axes) for axes in (a_axes, b_axes)]
    if a.dtype == torch.float32:
        return torch.tensordot(
            a, b, axes
        )  # for a TPU the function below has no other precision than bfloat16's
    # XLA's CPU device has no products of bfloat16 in float32; a TPU's multiplier takes bfloat16 whatever these say
    a, b = a.float(), b.float()
    return torch_xla._XLAC._xla_dot_general(
        a, b, (tuple(axes), ([], [])), preferred_element_type=torch.float32
    )


class SwiGLU(torch.autograd.Function):
    """down(silu(gate) * up) of x [B, M, N] along `axis`, which comes last in the result: float32, as the products add up.

    Without a transpose or a reshape of x, and without rounding what the TPU's multiplier has added up in float32 before it is
    used: the compiler lays both out badly. What the backward needs is rounded (keep), or it would not fit: the compiler would
    rather keep the float32 than round it a second time.
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


def swiglu_gradient(grad, x, weights, gate, up, axis):
    """Float32 gradients of x (with `axis` last), gate, up and down weight. grad [B, M, d], gate and up [B, M, W] in x's dtype."""
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
        *(contract(part, (0, 1), x, (0, rest)) for part in (gate_grad, up_grad)),
        contract(grad, (0, 1), (swish * up).to(dtype), (0, 1)),
    )
