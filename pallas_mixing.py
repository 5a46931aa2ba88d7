"""The TPU kernels of pallas_kernels.py for torch tensors, and which SwiGLUs use them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch_xla

import pallas_kernels
import trm_model
import xla_mixing
from device import Device
from layers import SwiGLU, SwiGLUWeights, cast
from tpu_types import Generation

# The largest distance that is accepted between a kernel's result and XLA's: the L2 norm of their
# difference, over the norm of XLA's result. Both round to bfloat16, in different places. A usual
# distance is 0.004.
TOLERANCE = 0.02


@dataclass(frozen=True)
class KernelMix:
    """The `mix` of a SwiGLU that runs as a kernel: `layers.mix` on a TPU of this generation."""

    chip: Generation

    def __call__(self, x: torch.Tensor, weights: SwiGLUWeights, axis: int) -> torch.Tensor:
        """rms_norm(x + swiglu(x)) along `axis` of x [B, L, D] bfloat16."""
        if axis == 1:
            return TokenMixing.apply(x, *weights, self.chip)
        return ChannelMixing.apply(x, *weights, self.chip, torch.is_grad_enabled())


def use(model: trm_model.TinyRecursiveModel, chip: Generation) -> None:
    """Let each SwiGLU of the model run as a kernel on this generation of TPU, where it can.

    Call it after xla_mixing.use(model), which is for all that cannot.
    """
    for layer in model.L_level.layers:
        for axis, swiglu in layer.swiglus():
            if can_be_kernel(model, axis, swiglu, chip):
                swiglu.mix = KernelMix(chip)


def can_be_kernel(
    model: trm_model.TinyRecursiveModel, axis: int, swiglu: SwiGLU, chip: Generation
) -> bool:
    """Whether a SwiGLU of the model can run as a kernel: the model computes in bfloat16, and the
    kernel fits into a core's VMEM.
    """
    width = swiglu.down_proj.weight.shape[1]
    return model.forward_dtype == torch.bfloat16 and pallas_kernels.fits(
        model.length, model.config.hidden_size, width, axis, chip
    )


# --------------------------------------------------------------------------------------------------
# Whether the kernels compute the right numbers on this device
# --------------------------------------------------------------------------------------------------
def find_error(
    model: trm_model.TinyRecursiveModel,
    device: Device,
    training_batch: int | None,
    evaluation_batch: int,
) -> str | None:
    """Compare the kernels with XLA's own operations on this device; returns what is wrong, or None.

    Each kind of SwiGLU is computed with random input, at the two batch sizes of one worker: forward
    and backward of `training_batch` examples (None: no training), and forward alone of as many and
    of `evaluation_batch` examples. All of it is one program. Errors of the compiler are not caught
    here.
    """
    chip = device.generation
    assert chip, "only a TPU runs kernels"
    layer = copy.deepcopy(model.L_level.layers[0]).to(device.torch)
    cases = [(evaluation_batch, False)]
    if training_batch:
        cases = [(training_batch, True), (training_batch, False), *cases]
    generator, distances = torch.Generator().manual_seed(0), {}
    for axis, swiglu in layer.swiglus():
        if not can_be_kernel(model, axis, swiglu, chip):
            continue
        for batch, backward in dict.fromkeys(cases):
            shape = (batch, model.length, model.config.hidden_size)
            x, *grad = (
                device.put(torch.randn(shape, generator=generator).bfloat16())
                for _ in range(1 + backward)
            )
            case = f"mixing along axis {axis}{', backward' * backward}, {batch} examples"
            distances[case] = _distances(swiglu, axis, x, grad, chip)
    device.end_step()
    for case, values in device.fetch(distances).items():
        # "not <": also for a value that is not a number
        if not values.max() < TOLERANCE:
            return f"{case}: {values.max():.2g} (relative) off what XLA computes"
    return None


def _distances(swiglu, axis, x, grad, chip):
    """Relative distances between a kernel's results and XLA's: of the output, and of all gradients
    if `grad` holds the output's gradient ([] for none).
    """
    results = []
    for mix in (xla_mixing.mix, KernelMix(chip)):
        with torch.set_grad_enabled(bool(grad)):
            x = x.detach().requires_grad_(bool(grad))
            out = mix(x, swiglu.weights(), axis)
            gradients = torch.autograd.grad(out, (x, *swiglu.parameters()), *grad) if grad else ()
            results.append([out, *gradients])
    distances = [
        (ours.float() - plain.float()).norm() / plain.float().norm()
        for plain, ours in zip(*results)
    ]
    return torch.stack(distances).detach()


# --------------------------------------------------------------------------------------------------
# Kernels as operations of autograd
# --------------------------------------------------------------------------------------------------
class TokenMixing(torch.autograd.Function):
    """rms_norm(x + swiglu(x)) along the positions of x [B, L, D] bfloat16.

    Forward and backward are one kernel each. Both take the gate's weights halved.
    """

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, chip):
        gate, up, down = (cast(weight, x.dtype) for weight in (gate_weight, up_weight, down_weight))
        arguments = x, 0.5 * gate, up, down
        ctx.save_for_backward(*arguments)
        ctx.chip = chip
        return call(pallas_kernels.token_mixing, chip, *arguments)[0]

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        x_grad, *sums = call(pallas_kernels.token_mixing_gradient, ctx.chip, x, grad, *weights)
        return x_grad, *(of_each_core.sum(0) for of_each_core in sums), None


class ChannelMixing(torch.autograd.Function):
    """rms_norm(x + swiglu(x)) along the channels of x [B, L, D] bfloat16.

    The forward pass is one kernel; the backward pass is XLA's. keep: whether a backward pass
    follows.
    """

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, chip, keep):
        weights = [cast(weight, x.dtype) for weight in (gate_weight, up_weight, down_weight)]
        gate, up, down = weights
        if not keep:
            return call(pallas_kernels.channel_mixing, chip, x, 0.5 * gate, up, down)[0]
        out, *kept = call(pallas_kernels.channel_mixing_kept, chip, x, 0.5 * gate, up, down)
        ctx.save_for_backward(x, *weights, out, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, *weights, out, gate, up, scale = ctx.saved_tensors
        grad, out = grad.float(), out.float()
        # the gradient of x + swiglu(x), which the norm has multiplied by scale = 1 / rms
        mixed_grad = scale * (grad - out * (grad * out).mean(-1, keepdim=True))
        x_grad, *weight_grads = xla_mixing.swiglu_gradient(
            mixed_grad.to(x.dtype), x, weights, gate, up, 2
        )
        return (x_grad + mixed_grad).to(x.dtype), *weight_grads, None, None


def call(function: Callable, chip: Generation, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Call a function of pallas_kernels.py on tensors of a TPU.

    It becomes a custom call in the program that torch_xla traces.
    """
    types = tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in tensors)
    payload, results = pallas_kernels.exported(function, chip, types)
    shapes = [list(shape) for shape, _ in results]
    dtypes = [getattr(torch, dtype) for _, dtype in results]
    return torch_xla._XLAC._xla_tpu_custom_call(list(tensors), payload, shapes, dtypes)
