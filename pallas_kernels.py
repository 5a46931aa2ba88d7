"""TPU kernels (Pallas) for x -> rms_norm(x + swiglu(x)), as functions of jax arrays.

Without them the compiler writes gate, up and their product to the TPU's main memory (HBM), and that
costs more time than the matrix products (measurements: docs/tpu_step.md). A kernel keeps them in a
core's own memory (VMEM): each pass of its grid takes a few examples through the whole computation.
The cores of a chip (two of v4 and v5p, one of v5e and v6e) share the passes.

`chip` is the tpu_types.Generation that a kernel is compiled for. Weights have torch's layout, gate
and up [W, d], down [d, W]. The gate's weight is given halved, since silu(2h) = h * tanh(h) + h
needs no division.

jax traces the kernels, on any machine; it does not touch the TPU. pallas_mixing.py calls them with
torch tensors.
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable

# Before jax is imported, and whatever the shell's environment says: the TPU belongs to torch_xla.
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.export
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from layers import RMS_NORM_EPS
from tpu_types import Generation

# The part of a core's VMEM that the compiler gives to a kernel unless it is told otherwise; on a v4
# that is all there is.
SMALL_VMEM_BYTES = 16 * 2**20
# With fewer examples the weights are loaded into the matrix unit too often; more make it no faster.
EXAMPLES_A_PASS = 4
# Channel mixing computes so many of its W inner units at a time: the float32 intermediates of more
# units would not fit into VMEM.
WIDTH_A_TIME = 1536


# --------------------------------------------------------------------------------------------------
# The kernels. Each *_ref is an array in VMEM. x_ref and out_ref hold the n examples of one pass,
# [n, L, D] bfloat16. The weights are there as a whole.
# --------------------------------------------------------------------------------------------------
def dot(a, b, contract_a=1, contract_b=0):
    """The float32 product of two matrices over the given axes."""
    axes = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def wide(x):
    """x in float32."""
    return x.astype(jnp.float32)


def swish_of_half(half):
    """silu(2 * half)."""
    return half * jnp.tanh(half) + half


def inverse_rms(x, axis):
    """1 / sqrt(mean(x^2) + eps) of x float32 along `axis`, which stays with size 1."""
    return jax.lax.rsqrt(jnp.mean(x * x, axis=axis, keepdims=True) + RMS_NORM_EPS)


def token_kernel(x_ref, gate_ref, up_ref, down_ref, out_ref):
    """Mix the L positions of each example.

    Its [L, D] is the right operand of every product, without a transpose.
    """
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
    """The gradient of token_kernel. It computes the forward pass again, so that the forward pass
    has to keep nothing but x.

    Each core sums the gradients of the weights over its own examples, in float32.
    """

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
    """Mix the D channels of all positions of all n examples at once.

    kept_refs_and_rows: if a backward pass follows, its three inputs gate [n, L, W], up [n, L, W]
    and 1 / rms [n, L, 1]. Last in any case a scratch array [n * stride, D] for the positions of all
    examples, one below the other. Its stride is L rounded up to a multiple of 8. The rows between
    are never written and hold anything; no result is taken from them.
    """
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


# --------------------------------------------------------------------------------------------------
# The kernels as functions of jax arrays. interpret: for a CPU, in tests
# --------------------------------------------------------------------------------------------------
def token_mixing(x, gate, up, down, chip: Generation, interpret: bool = False):
    """[rms_norm(x + swiglu(x))] along the positions.

    x [B, L, D]; gate (halved) and up [W, L], down [L, W].
    """
    return _call(token_kernel, (x,), (gate, up, down), [x], chip, interpret)


def token_mixing_gradient(x, out_grad, gate, up, down, chip: Generation, interpret: bool = False):
    """Gradients of x [B, L, D], gate (not of its half), up and down.

    The gradient of x is in x's dtype. Those of the weights are float32 with one more axis in front:
    each core has a sum of its own there (1 or 2 in all), and the caller adds them up.
    """
    weights = gate, up, down
    inputs = x, out_grad
    return _call(token_gradient_kernel, inputs, weights, [x], chip, interpret, sums=weights)


def channel_mixing(x, gate, up, down, chip: Generation, interpret: bool = False):
    """[rms_norm(x + swiglu(x))] along the channels.

    x [B, L, D]; gate (halved) and up [W, D], down [D, W].
    """
    return _call(channel_kernel, (x,), (gate, up, down), [x], chip, interpret)


def channel_mixing_kept(x, gate, up, down, chip: Generation, interpret: bool = False):
    """`channel_mixing`, followed by what its backward pass needs.

    That is gate and up [B, L, W] in x's dtype and 1 / rms [B, L, 1] float32.
    """
    inner = jax.ShapeDtypeStruct((*x.shape[:2], up.shape[0]), x.dtype)
    scale = jax.ShapeDtypeStruct((*x.shape[:2], 1), jnp.float32)
    return _call(channel_kernel, (x,), (gate, up, down), [x, inner, inner, scale], chip, interpret)


def _call(kernel, inputs, weights, outputs, chip, interpret, sums=()):
    """Call a kernel over its grid of (cores, passes).

    inputs and outputs [B, ...] are divided among the passes along B; each pass has all of the
    weights. sums: for each of these arrays the kernel has one more result, after the outputs:
    float32 [cores, *its shape], into which each core adds over its passes.
    """
    batch, length, dim = inputs[0].shape
    examples = _examples_a_pass(kernel, (*inputs, *outputs), weights, chip)
    cores = chip.cores if batch // examples % chip.cores == 0 else 1
    passes = batch // examples // cores
    needs = vmem_bytes(kernel, examples, (*inputs, *outputs), weights)

    def block(array):
        shape = (examples, *array.shape[1:])
        return pl.BlockSpec(shape, lambda core, step: (core * passes + step, 0, 0))

    def whole(array):
        # fetched once, so that one buffer is enough
        return pl.BlockSpec(array.shape, lambda core, step: (0, 0), pipeline_mode=pl.Buffered(1))

    def one_for_each_core(array):
        return pl.BlockSpec((1, *array.shape), lambda core, step: (core, 0, 0))

    out_shape = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in outputs]
    out_shape += [jax.ShapeDtypeStruct((cores, *array.shape), jnp.float32) for array in sums]
    rows = pltpu.VMEM((examples * padded(length, 8), dim), inputs[0].dtype)
    # how many vectors of an example go through the MLP
    vectors = length if kernel is channel_kernel else dim
    flops = 2 * batch * vectors * sum(weight.size for weight in weights) * (3 if sums else 1)
    moved = (*inputs, *out_shape, *weights * cores)
    return pl.pallas_call(
        kernel,
        grid=(cores, passes),
        interpret=interpret,
        out_shape=out_shape,
        name=kernel.__name__,
        in_specs=[*map(block, inputs), *map(whole, weights)],
        out_specs=[*map(block, outputs), *map(one_for_each_core, sums)],
        scratch_shapes=[rows] if kernel is channel_kernel else [],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(chip) if needs > SMALL_VMEM_BYTES else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=batch * vectors * weights[0].shape[0],
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        ),
    )(*inputs, *weights)


def _examples_a_pass(kernel, arrays, weights, chip):
    """The number of examples in a pass, at most EXAMPLES_A_PASS: as many as fit into VMEM, or fewer
    if a core would have nothing to do otherwise. It divides the batch."""
    batch = arrays[0].shape[0]
    fitting = [
        count
        for count in range(EXAMPLES_A_PASS, 0, -1)
        if batch % count == 0
        and (count == 1 or vmem_bytes(kernel, count, arrays, weights) <= vmem_limit(chip))
    ]
    for_all_cores = [count for count in fitting if batch // count % chip.cores == 0]
    return (for_all_cores or fitting)[0]


# --------------------------------------------------------------------------------------------------
# What fits into a core's VMEM
# --------------------------------------------------------------------------------------------------
def padded(size: int, tile: int) -> int:
    """`size` rounded up to a multiple of `tile`."""
    return -(-size // tile) * tile


def vmem_limit(chip: Generation) -> int:
    """Bytes of a core's VMEM that a kernel may take.

    On a chip with more VMEM than a v4 the compiler needs a part for what runs beside the kernel.
    """
    if chip.vmem_bytes == SMALL_VMEM_BYTES:
        return SMALL_VMEM_BYTES
    return chip.vmem_bytes * 3 // 4


def vmem_bytes(kernel: Callable, examples: int, arrays, weights) -> int:
    """An upper bound of the bytes of VMEM that a kernel takes.

    arrays: its inputs and outputs, of which a block of `examples` is there at a time; the first one
    is x [B, L, D]. The kernel holds each block twice (one is computed while another one moves), the
    weights, and intermediate results in float32.
    """

    def in_vmem(*shape, bytes_each=2):
        return math.prod(shape[:-2]) * padded(shape[-2], 8) * padded(shape[-1], 128) * bytes_each

    (_, length, dim), width = arrays[0].shape, weights[0].shape[0]
    blocks = sum(
        2 * in_vmem(examples, *array.shape[1:], bytes_each=array.dtype.itemsize) for array in arrays
    )
    held = sum(in_vmem(*weight.shape) for weight in weights)
    if kernel is channel_kernel:
        rows = examples * padded(length, 8)
        intermediates = in_vmem(rows, min(width, WIDTH_A_TIME) + dim, bytes_each=4)
        return blocks + held + in_vmem(rows, dim) + intermediates
    if kernel is token_kernel:
        return blocks + held + in_vmem(2 * width + length, dim, bytes_each=4)
    return blocks + held + 4 * held + in_vmem(5 * width, dim, bytes_each=4)


def fits(length: int, dim: int, width: int, axis: int, chip: Generation) -> bool:
    """Whether a SwiGLU of this width that mixes `axis` of [B, length, dim] bfloat16 can be a
    kernel.

    One example and the weights have to fit into a core's VMEM, also for training, and dim must be
    a multiple of 128 (the lanes of a core's vector unit).
    """

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, inner, size = array(1, length, dim), array(1, length, width), (None, length, dim)[axis]
    weights = array(width, size), array(width, size), array(size, width)
    if axis == 1:
        needs = vmem_bytes(token_gradient_kernel, 1, (x, x, x), weights)
    else:
        scale = array(1, length, 1, dtype=jnp.float32)
        needs = vmem_bytes(channel_kernel, 1, (x, x, inner, inner, scale), weights)
    return dim % 128 == 0 and needs <= vmem_limit(chip)


# --------------------------------------------------------------------------------------------------
# The kernels as torch_xla takes them
# --------------------------------------------------------------------------------------------------
@functools.cache
def exported(
    function: Callable, chip: Generation, arguments: tuple[tuple[tuple[int, ...], str], ...]
) -> tuple[str, list[tuple[tuple[int, ...], str]]]:
    """(a kernel as the payload of a custom call, [(shape, dtype name) of each result]).

    function: one of the four above; arguments: (shape, dtype name) of each of its arrays.
    """
    # By jax.export, whose format is stable: a libtpu that is a few weeks older than jax cannot read
    # what jax traces for itself.
    kernel = jax.jit(functools.partial(function, chip=chip))
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    traced = jax.export.export(kernel, platforms=["tpu"])(*given)
    found = re.search(r'@tpu_custom_call\(.*backend_config = "(.*?)"', traced.mlir_module())
    assert found, "no custom call in what jax has exported"
    payload = re.sub(r"\\([0-9A-F]{2})", lambda code: chr(int(code[1], 16)), found[1])
    results = [(tuple(result.shape), str(result.dtype)) for result in traced.out_avals]
    return json.dumps(json.loads(payload)), results
