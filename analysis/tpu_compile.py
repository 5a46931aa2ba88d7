"""Compile traced programs with the real TPU compiler for a slice that is not there.

    python analysis/tpu_compile.py FOLDER v4-64

analysis/tpu_report.py runs this in a process of its own (the compiler and torch_xla do not share one), after
analysis/tpu_trace.py. Reads FOLDER/trace.json and FOLDER/NAME.hlo.pb; writes FOLDER/NAME.optimised.txt (HLO) and
FOLDER/compile.json.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tpu_types


def main():
    folder, accelerator = Path(sys.argv[1]), sys.argv[2]
    tpu_environment(folder, accelerator)
    devices = slice_devices(accelerator)
    results = {}
    for program in json.loads((folder / "trace.json").read_text())["programs"]:
        name, start = program["name"], time.perf_counter()
        try:
            executable = compile_program(
                mlir_text((folder / f"{name}.hlo.pb").read_bytes()), devices, program["donated"]
            )
        except RuntimeError as error:  # what the compiler says; anything else is a bug here
            results[name] = {"error": str(error), "compile_seconds": time.perf_counter() - start}
            break
        memory = executable.get_compiled_memory_stats()
        (folder / f"{name}.optimised.txt").write_text(executable.hlo_modules()[0].to_string())
        results[name] = {
            "error": None,
            "compile_seconds": time.perf_counter() - start,
            "hbm_bytes": {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "generated_code": memory.generated_code_size_in_bytes,
            },
        }
    (folder / "compile.json").write_text(json.dumps(results))


def tpu_environment(folder, accelerator):
    """What the compiler wants to know before jax is imported. No chip is touched: several may compile at once."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=accelerator,
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_LOG_DIR=str(folder),
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def slice_devices(accelerator):
    """The slice's chips, each one device (megacore: its two TensorCores work as one)."""
    from jax.experimental import topologies

    slice_ = tpu_types.slice_type(accelerator)
    cores = {"chip_config_name": "megacore"} if slice_.generation.cores == 2 else {}
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=slice_.topology_name,
        chips_per_host_bounds=slice_.host_bounds,
        **cores,
    ).devices


def mlir_text(hlo):
    """The MLIR module of an HLO protobuf."""
    from jax._src.lib import xla_client

    return xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))


def compile_program(text, devices, donated=()):
    """The executable of an MLIR module, one replica a device. donated: arguments whose memory results may take."""
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.int32([[device.id] for device in devices])
    )
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        main_function = next(op for op in module.body.operations if op.name.value == "main")
        donor, plain = (
            ir.DictAttr.get({"jax.buffer_donor": ir.BoolAttr.get(True)}),
            ir.DictAttr.get({}),
        )
        main_function.arg_attrs = ir.ArrayAttr.get(
            [donor if k in donated else plain for k in range(len(main_function.type.inputs))]
        )
        return devices[0].client.compile(
            mlir.module_to_bytecode(module), xla_client._xla.DeviceList(tuple(devices)), options
        )


if __name__ == "__main__":
    main()
