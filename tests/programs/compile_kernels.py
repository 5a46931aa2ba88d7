"""Compile the kernels, in the form that torch_xla gets, with the libtpu that is installed.

python -m tests.programs.compile_kernels v6e-8
"""

import functools
import os
import sys
import tempfile

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "analysis"))
os.environ.update(PJRT_DEVICE="CPU", XLA_FLAGS="")  # without the tests' for the CPU's compiler
import tpu_compile

import tpu_types

tpu_compile.tpu_environment(tempfile.gettempdir(), sys.argv[1])
import jax
import jax.export
import jax.numpy as jnp

import pallas_kernels

BATCH, LENGTH = 24, 97


def bfloat16(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def main():
    sharding = jax.sharding.SingleDeviceSharding(tpu_compile.slice_devices(sys.argv[1])[0])
    chip = tpu_types.slice_type(sys.argv[1]).generation
    token, channel = (
        [(512, LENGTH), (512, LENGTH), (LENGTH, 512)],
        [(1536, 512), (1536, 512), (512, 1536)],
    )
    wider = [(2048, 768), (2048, 768), (768, 2048)]
    widest = [(2816, 1024), (2816, 1024), (1024, 2816)]
    x, x_wider, x_widest = ((BATCH, LENGTH, dim) for dim in (512, 768, 1024))
    cases = (
        (pallas_kernels.token_mixing, x, *token),
        (pallas_kernels.token_mixing_gradient, x, x, *token),
        (pallas_kernels.channel_mixing, x, *channel),
        (pallas_kernels.channel_mixing_kept, x, *channel),
        (pallas_kernels.channel_mixing_kept, x_wider, *wider),
        (pallas_kernels.token_mixing_gradient, x_widest, x_widest, *token),
    )
    if pallas_kernels.fits(LENGTH, 1024, 2816, 2, chip):
        cases += ((pallas_kernels.channel_mixing_kept, x_widest, *widest),)
    for function, *shapes in cases[-1:] if "--last" in sys.argv else cases:
        exported = jax.export.export(
            jax.jit(functools.partial(function, chip=chip)), platforms=["tpu"]
        )(*(bfloat16(*shape) for shape in shapes))
        jax.jit(exported.call).lower(
            *(bfloat16(*shape, sharding=sharding) for shape in shapes)
        ).compile()
        print(function.__name__, shapes[0], "compiled", flush=True)


if __name__ == "__main__":
    main()
