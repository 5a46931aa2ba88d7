"""What the TPU compiler knows about slices of the types argv[1:-1], of one generation: JSON of
their shapes, the cycles of a product, and the GiB that a program may use. argv[-1] is a folder.
"""

import json
import re
import sys

sys.path.insert(0, "analysis")
import tpu_compile

types, of = sys.argv[1:-1], sys.argv[-1]
tpu_compile.tpu_environment(of, types[0])
import jax
import jax.numpy as jnp

shapes = {}
for name in types:
    devices = tpu_compile.slice_devices(name)
    hosts = len({device.process_index for device in devices})
    shapes[name] = [len(devices), hosts, devices[0].num_cores, devices[0].device_kind]
here = jax.sharding.SingleDeviceSharding(tpu_compile.slice_devices(types[0])[0])
square = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=here)
text = jax.jit(jax.lax.dot).lower(square, square).compile().as_text()
cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text.split("ENTRY")[1])))
gib = jax.ShapeDtypeStruct((2**28,), jnp.float32, sharding=here)
try:
    jax.jit(lambda *arrays: [array + 1 for array in arrays]).lower(*[gib] * 97).compile()
except RuntimeError as error:
    said = str(error)
print(json.dumps([shapes, cycles, float(re.search(r"of ([\d.]+)G hbm", said)[1])]))
