"""TPU kernels (Pallas): one SwiGLU with its residual and RMS norm, x -> rms_norm(x + swiglu(x)), without a trip to HBM between.

On a TPU the compiler writes gate, up and their product to memory, and that costs more than the products themselves (the figures:
docs/tpu_step.md). Here they stay in a core's VMEM: a pass of the grid takes a few examples through the whole of it. The cores of a chip
(two of v4 and v5p, one of v5e and v6e) share the passes. `chip` is its tpu_types.Generation.

Weights have torch's layout, gate and up [W, d], down [d, W]. `gate` comes halved: silu(2h) = h * tanh(h) + h, without a division.
jax is needed to trace a kernel, on any machine and for its CPU; it never sees the TPU.
"""

import copy
import functools
import json
import math
import os
import re

os.environ["JAX_PLATFORMS"] = (
    "cpu"  # before the import, and whatever the shell says: the TPU belongs to torch_xla
)
import jax
import jax.export
import jax.numpy as jnp
import torch
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from trm_model import RMS_NORM_EPS, cast

SMALL_VMEM_BYTES = (
    16 * 2**20
)  # what the compiler lets a kernel take of a core, if it is not told; on v4 all that there is
EXAMPLES_A_PASS = (
    4  # fewer, and the weights are pushed into the multiplier too often; more gain nothing
)
WIDTH_A_TIME = 1536  # of the channels' W, or float32 intermediates would not fit
TOLERANCE = 0.02  # relative, between two orders of bfloat16's roundings; about 0.004 is usual


# ---------------------------------------------------------------------------------------------------------
# The kernels. A *_ref is a block in VMEM: x [n, L, D] of n examples, weights whole
# ---------------------------------------------------------------------------------------------------------
def dot(a, b, contract_a=1, contract_b=0):
    return jax.lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32
    )


def wide(x):
    return x.astype(jnp.float32)


def swish_of_half(half):
    return half * jnp.tanh(half) + half


def inverse_rms(x, axis):
    return jax.lax.rsqrt(jnp.mean(x * x, axis=axis, keepdims=True) + RMS_NORM_EPS)


def token_kernel(x_ref, gate_ref, up_ref, down_ref, out_ref):
    """Mixes the L positions; [L, D] is the right-hand side of every product as it lies."""
    for k in range(x_ref.shape[0]):
        x = x_ref[k]
        inner = (swish_of_half(dot(gate_ref[...], x)) * dot(up_ref[...], x)).astype(x.dtype)
        mixed = dot(down_ref[...], inner) + wide(x)
        out_ref[k] = (mixed * inverse_rms(mixed, 0)).astype(x.dtype)


def token_gradient_kernel(
    x_ref,
    out_grad_ref,
    gate_ref,
    up_ref,
    down_ref,
    x_grad_ref,
    gate_grad_ref,
    up_grad_ref,
    down_grad_ref,
):
    """Computes the forward once more, so that nothing but x is kept for it. Weight gradients: each core's own sum, float32."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref in (gate_grad_ref, up_grad_ref, down_grad_ref):
            ref[...] = jnp.zeros_like(ref)

    for k in range(x_ref.shape[0]):
        x, gate, up_weight, down = x_ref[k], gate_ref[...], up_ref[...], down_ref[...]
        half, up = dot(gate, x), dot(up_weight, x)
        tanh = jnp.tanh(half)
        swish = half * tanh + half
        inner = (swish * up).astype(x.dtype)
        mixed = dot(down, inner) + wide(x)
        scale = inverse_rms(mixed, 0)
        out, out_grad = mixed * scale, wide(out_grad_ref[k])
        mixed_grad = scale * (out_grad - out * jnp.mean(out_grad * out, axis=0, keepdims=True))
        narrow_grad = mixed_grad.astype(x.dtype)
        inner_grad = dot(down, narrow_grad, 0, 0)
        sigmoid = 0.5 * tanh + 0.5
        gate_grad = (inner_grad * up * (sigmoid + swish * (1 - sigmoid))).astype(x.dtype)
        up_grad = (inner_grad * swish).astype(x.dtype)
        x_grad_ref[k] = (
            2 * dot(gate, gate_grad, 0, 0) + dot(up_weight, up_grad, 0, 0) + mixed_grad
        ).astype(x.dtype)
        gate_grad_ref[0] += dot(gate_grad, x, 1, 1)
        up_grad_ref[0] += dot(up_grad, x, 1, 1)
        down_grad_ref[0] += dot(narrow_grad, inner, 1, 1)


def channel_kernel(x_ref, gate_ref, up_ref, down_ref, out_ref, *kept_refs_and_rows):
    """Mixes the D channels of all examples' positions at once. kept_refs: gate, up [n, L, W] and 1 / rms [n, L, 1], for the backward."""
    *kept_refs, rows_ref = kept_refs_and_rows
    length, stride = x_ref.shape[1], rows_ref.shape[0] // x_ref.shape[0]

    def put(ref, rows, part=slice(None)):
        for k in range(x_ref.shape[0]):
            ref[k, :, part] = rows[k * stride : k * stride + length].astype(ref.dtype)

    for k in range(x_ref.shape[0]):
        rows_ref[k * stride : k * stride + length] = x_ref[k]
    x = rows_ref[...]
    mixed = wide(x)
    for first in range(0, up_ref.shape[0], WIDTH_A_TIME):
        part = slice(first, first + WIDTH_A_TIME)
        half, up = dot(x, gate_ref[part], 1, 1), dot(x, up_ref[part], 1, 1)
        for ref, value in zip(kept_refs[:2], (2 * half, up)):
            put(ref, value, part)
        mixed += dot((swish_of_half(half) * up).astype(x.dtype), down_ref[:, part], 1, 1)
    scale = inverse_rms(mixed, 1)
    put(out_ref, mixed * scale)
    for ref in kept_refs[2:]:
        put(ref, scale)


# ---------------------------------------------------------------------------------------------------------
# Their calls, functions of jax arrays
# ---------------------------------------------------------------------------------------------------------
def token_mixing(x, gate, up, down, chip, interpret=False):
    """rms_norm(x + swiglu(x)) along the positions. x [B, L, D]; gate (halved), up [W, L], down [L, W]."""
    return _call(token_kernel, (x,), (gate, up, down), [x], chip, interpret)


def token_mixing_gradient(x, out_grad, gate, up, down, chip, interpret=False):
    """Gradients of x [B, L, D], and of gate (not of its half), up and down: float32 [1 or 2, ...], to be added up."""
    return _call(
        token_gradient_kernel,
        (x, out_grad),
        (gate, up, down),
        [x],
        chip,
        interpret,
        sums=(gate, up, down),
    )


def channel_mixing(x, gate, up, down, chip, interpret=False):
    """rms_norm(x + swiglu(x)) along the channels. x [B, L, D]; gate (halved), up [W, D], down [D, W]."""
    return _call(channel_kernel, (x,), (gate, up, down), [x], chip, interpret)


def channel_mixing_kept(x, gate, up, down, chip, interpret=False):
    """channel_mixing, and what its backward needs: gate, up [B, L, W] in x's dtype, 1 / rms [B, L, 1] float32."""
    inner = jax.ShapeDtypeStruct((*x.shape[:2], up.shape[0]), x.dtype)
    scale = jax.ShapeDtypeStruct((*x.shape[:2], 1), jnp.float32)
    return _call(channel_kernel, (x,), (gate, up, down), [x, inner, inner, scale], chip, interpret)


def _call(kernel, inputs, weights, outputs, chip, interpret, sums=()):
    """inputs and outputs [B, ...] are cut along B into the passes of the grid; weights are whole in each; sums: float32, of each core."""
    batch, length, dim = inputs[0].shape
    fitting = [
        k
        for k in range(EXAMPLES_A_PASS, 0, -1)
        if batch % k == 0
        and (k == 1 or vmem_bytes(kernel, k, (*inputs, *outputs), weights) <= vmem_limit(chip))
    ]
    # as many examples as fit, but rather fewer than that one core has nothing to do
    examples = next((k for k in fitting if batch // k % chip.cores == 0), fitting[0])
    cores = chip.cores if batch // examples % chip.cores == 0 else 1
    passes = batch // examples // cores
    needs = vmem_bytes(kernel, examples, (*inputs, *outputs), weights)

    def block(array):
        return pl.BlockSpec(
            (examples, *array.shape[1:]), lambda core, step: (core * passes + step, 0, 0)
        )

    def whole(array):  # fetched once, so one buffer
        return pl.BlockSpec(array.shape, lambda core, step: (0, 0), pipeline_mode=pl.Buffered(1))

    def own(array):
        return pl.BlockSpec((1, *array.shape), lambda core, step: (core, 0, 0))

    out_shape = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs]
    out_shape += [jax.ShapeDtypeStruct((cores, *array.shape), jnp.float32) for array in sums]
    mixed_with = length if kernel is channel_kernel else dim
    flops = 2 * batch * mixed_with * sum(weight.size for weight in weights) * (3 if sums else 1)
    moved = sum(
        array.size * array.dtype.itemsize for array in (*inputs, *out_shape, *weights * cores)
    )
    return pl.pallas_call(
        kernel,
        grid=(cores, passes),
        interpret=interpret,
        out_shape=out_shape,
        name=kernel.__name__,
        in_specs=[*map(block, inputs), *map(whole, weights)],
        out_specs=[*map(block, outputs), *map(own, sums)],
        scratch_shapes=[pltpu.VMEM((examples * padded(length, 8), dim), inputs[0].dtype)]
        if kernel is channel_kernel
        else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(chip) if needs > SMALL_VMEM_BYTES else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=batch * mixed_with * weights[0].shape[0],
            bytes_accessed=moved,
        ),
    )(*inputs, *weights)


def padded(size, tile):
    return -(-size // tile) * tile


def vmem_limit(chip):
    """Bytes of a core's VMEM that a kernel may take. Where there is more than a v4 has, the compiler keeps a part for what runs beside."""
    return SMALL_VMEM_BYTES if chip.vmem_bytes == SMALL_VMEM_BYTES else chip.vmem_bytes * 3 // 4


def vmem_bytes(kernel, examples, arrays, weights):
    """A bound of what a kernel takes of a core's VMEM: blocks twice (one is computed, one moves), weights, intermediates in float32."""

    def in_vmem(*shape, bytes_each=2):
        return math.prod(shape[:-2]) * padded(shape[-2], 8) * padded(shape[-1], 128) * bytes_each

    (_, length, dim), width = arrays[0].shape, weights[0].shape[0]
    blocks = sum(
        2 * in_vmem(examples, *array.shape[1:], bytes_each=array.dtype.itemsize) for array in arrays
    )
    held = sum(in_vmem(*weight.shape) for weight in weights)
    if kernel is channel_kernel:
        rows = examples * padded(length, 8)
        return (
            blocks
            + held
            + in_vmem(rows, dim)
            + in_vmem(rows, min(width, WIDTH_A_TIME) + dim, bytes_each=4)
        )
    if kernel is token_kernel:
        return blocks + held + in_vmem(2 * width + length, dim, bytes_each=4)
    return blocks + held + 4 * held + in_vmem(5 * width, dim, bytes_each=4)


def fits(length, dim, width, axis, chip):
    """Whether one example of [length, dim] (mixed along `axis` of [B, length, dim] by a SwiGLU of this width) and the weights fit a core."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    x, inner, size = array(1, length, dim), array(1, length, width), (None, length, dim)[axis]
    weights = array(width, size), array(width, size), array(size, width)
    needs = (
        vmem_bytes(token_gradient_kernel, 1, (x, x, x), weights)
        if axis == 1
        else vmem_bytes(
            channel_kernel,
            1,
            (x, x, inner, inner, jax.ShapeDtypeStruct((1, length, 1), jnp.float32)),
            weights,
        )
    )
    return dim % 128 == 0 and needs <= vmem_limit(chip)


# ---------------------------------------------------------------------------------------------------------
# ... and of torch's
# ---------------------------------------------------------------------------------------------------------
class TokenMixing(torch.autograd.Function):
    """rms_norm(x + swiglu(x)) along the positions of x [B, L, D], forward and backward each one kernel."""

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, chip):
        gate, up, down = (cast(weight, x.dtype) for weight in (gate_weight, up_weight, down_weight))
        arguments = x, 0.5 * gate, up, down
        ctx.save_for_backward(*arguments)
        ctx.chip = chip
        return call(token_mixing, chip, *arguments)[0]

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        x_grad, *sums = call(token_mixing_gradient, ctx.chip, x, grad, *weights)
        return x_grad, *(of_cores.sum(0) for of_cores in sums), None


class ChannelMixing(torch.autograd.Function):
    """rms_norm(x + swiglu(x)) along the channels of x [B, L, D]; the forward is one kernel. keep: for the backward."""

    @staticmethod
    def forward(ctx, x, gate_weight, up_weight, down_weight, chip, keep):
        weights = gate, up, down = [
            cast(weight, x.dtype) for weight in (gate_weight, up_weight, down_weight)
        ]
        if not keep:
            return call(channel_mixing, chip, x, 0.5 * gate, up, down)[0]
        out, *kept = call(channel_mixing_kept, chip, x, 0.5 * gate, up, down)
        ctx.save_for_backward(x, *weights, out, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        import xla_mixing

        x, *weights, out, gate, up, scale = ctx.saved_tensors
        grad, out = grad.float(), out.float()
        mixed_grad = scale * (grad - out * (grad * out).mean(-1, keepdim=True))
        x_grad, *weight_grads = xla_mixing.swiglu_gradient(
            mixed_grad.to(x.dtype), x, weights, gate, up, 2
        )
        return (x_grad + mixed_grad).to(x.dtype), *weight_grads, None, None


def call(function, chip, *tensors):
    """One of the above on tensors of a TPU: a custom call in the program that torch_xla traces. Returns a list."""
    import torch_xla

    payload, shapes, dtypes = _traced(
        function, chip, tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    )
    return torch_xla._XLAC._xla_tpu_custom_call(list(tensors), payload, shapes, dtypes)


@functools.cache
def _traced(function, chip, given):
    """(the kernel as torch_xla takes it, its results' shapes, their torch dtypes)."""
    arguments = [
        jax.ShapeDtypeStruct(shape, str(dtype).removeprefix("torch.")) for shape, dtype in given
    ]
    # exported, for whatever TPU and compiler: what jax traces for itself, a libtpu of a few weeks before it does not read
    exported = jax.export.export(
        jax.jit(functools.partial(function, chip=chip)), platforms=["tpu"]
    )(*arguments)
    text = re.search(r'@tpu_custom_call\(.*backend_config = "(.*?)"', exported.mlir_module())[1]
    payload = re.sub(r"\\([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), text)
    results = exported.out_avals
    return (
        json.dumps(json.loads(payload)),
        [list(result.shape) for result in results],
        [getattr(torch, str(result.dtype)) for result in results],
    )


# ---------------------------------------------------------------------------------------------------------
# Which run uses them
# ---------------------------------------------------------------------------------------------------------
def swiglus(layer):
    """[(axis that it mixes, SwiGLU)] of a trm_model.Block."""
    return [(1, layer.mlp_t), (2, layer.mlp)] if layer.mixes_by_mlp else [(2, layer.mlp)]


def in_kernel(model, axis, swiglu, chip):
    """chip where this SwiGLU of a trm_model.TinyRecursiveModel can be a kernel on it: it computes in bfloat16 and fits a core. Else None."""
    width = swiglu.down_proj.weight.shape[1]
    return (
        chip
        if model.forward_dtype == torch.bfloat16
        and fits(model.length, model.config.hidden_size, width, axis, chip)
        else None
    )


def use(model, chip):
    """Let each SwiGLU of the model run as a kernel of this chip where it can."""
    for layer in model.L_level.layers:
        for axis, swiglu in swiglus(layer):
            swiglu.in_kernel = in_kernel(model, axis, swiglu, chip)


def fault(model, device, training_batch, evaluation_batch):
    """What is wrong with the kernels on this device (a text), or None where each computes what XLA's own operations do, to bfloat16's
    accuracy: forward and backward of `training_batch` examples (None: of none), forward alone of these and of `evaluation_batch`.
    One program. What the compiler raises is for the caller."""
    layer = copy.deepcopy(model.L_level.layers[0]).to(device.torch)
    cases = dict.fromkeys(
        [(training_batch, True), (training_batch, False), (evaluation_batch, False)]
        if training_batch
        else [(evaluation_batch, False)]
    )
    generator, off = torch.Generator().manual_seed(0), {}
    for axis, swiglu in swiglus(layer):
        for batch, backward in cases if in_kernel(model, axis, swiglu, device.generation) else ():
            x, *probe = (
                device.put(
                    torch.randn(
                        batch, model.length, model.config.hidden_size, generator=generator
                    ).bfloat16()
                )
                for _ in range(1 + backward)
            )
            results = []
            for swiglu.in_kernel in (None, device.generation):
                with torch.set_grad_enabled(backward):
                    x = x.detach().requires_grad_(backward)
                    out = swiglu(x, swiglu.weights(), axis)
                    results.append(
                        [
                            out,
                            *(
                                torch.autograd.grad(out, (x, *swiglu.parameters()), *probe)
                                if backward
                                else ()
                            ),
                        ]
                    )
            off[f"mixing along axis {axis}{', backward' * backward}, {batch} examples"] = (
                torch.stack(
                    [
                        (ours.float() - plain.float()).norm() / plain.float().norm()
                        for plain, ours in zip(*results)
                    ]
                ).detach()
            )
    device.end_step()
    for what, values in device.fetch(off).items():
        if not values.max() < TOLERANCE:
            return f"{what}: {values.max():.2g} (relative) off what XLA computes"
