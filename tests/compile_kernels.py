"""Compile the kernels as torch_xla would be given them, for a v4 chip, with the libtpu that is installed: python -m tests.compile_kernels"""
import os
import sys
import tempfile

from tests.helpers import ROOT

sys.path.insert(0, str(ROOT / "analysis"))
os.environ.update(PJRT_DEVICE="CPU", XLA_FLAGS="")       # without the tests' for the CPU's compiler
import tpu_compile

tpu_compile.tpu_environment(tempfile.gettempdir(), "v4-8")
import jax
import jax.export
import jax.numpy as jnp

import pallas_kernels

BATCH, LENGTH = 24, 97


def bfloat16(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)


def main():
    chip = jax.sharding.SingleDeviceSharding(tpu_compile.slice_devices("v4-8")[0])
    token, channel = [(512, LENGTH), (512, LENGTH), (LENGTH, 512)], [(1536, 512), (1536, 512), (512, 1536)]
    wider = [(2048, 768), (2048, 768), (768, 2048)]
    x, x_wider, x_widest = ((BATCH, LENGTH, dim) for dim in (512, 768, 1024))
    for function, *shapes in ((pallas_kernels.token_mixing, x, *token), (pallas_kernels.token_mixing_gradient, x, x, *token),
                              (pallas_kernels.channel_mixing, x, *channel), (pallas_kernels.channel_mixing_kept, x, *channel),
                              (pallas_kernels.channel_mixing_kept, x_wider, *wider), (pallas_kernels.token_mixing_gradient, x_widest, x_widest, *token)):
        exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*(bfloat16(*shape) for shape in shapes))
        jax.jit(exported.call).lower(*(bfloat16(*shape, sharding=chip) for shape in shapes)).compile()
        print(function.__name__, shapes[0], "compiled", flush=True)


if __name__ == "__main__":
    main()
