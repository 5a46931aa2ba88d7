"""Compile traced programs with the real TPU compiler for a slice that is not there.

    python analysis/tpu_compile.py FOLDER v4-64 CACHE

analysis/tpu_report.py runs this after analysis/tpu_trace.py, in a process of its own, because the
compiler and torch_xla cannot share one. It reads FOLDER/trace.json and FOLDER/NAME.hlo.pb, and
writes FOLDER/NAME.optimised.txt (HLO) and FOLDER/compile.json.

Many configurations of a study have the same programs. What is compiled is kept in the folder CACHE,
which is for one kind of slice, and is not compiled again from there.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

import tpu_types


def main() -> None:
    folder, accelerator, cache = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    tpu_environment(folder, accelerator)
    devices = slice_devices(accelerator)
    results = {}
    for program in json.loads((folder / "trace.json").read_text())["programs"]:
        name, donated = program["name"], program["donated"]
        hlo = (folder / f"{name}.hlo.pb").read_bytes()
        key = hashlib.sha256(hlo + json.dumps(donated).encode()).hexdigest()
        result, optimised = cache / f"{key}.json", cache / f"{key}.txt"
        if not result.exists():
            compiled, text = compiled_program(hlo, donated, devices)
            optimised.write_text(text)
            result.write_text(json.dumps(compiled))
        results[name] = json.loads(result.read_text())
        if results[name]["error"]:
            break
        (folder / f"{name}.optimised.txt").write_text(optimised.read_text())
    (folder / "compile.json").write_text(json.dumps(results))


def compiled_program(
    hlo: bytes, donated: Sequence[int], devices: Sequence[Any]
) -> tuple[dict[str, Any], str]:
    """(an entry of compile.json, the optimised program as text) of an HLO protobuf.

    With an error of the compiler there is no text.
    """
    start = time.perf_counter()
    try:
        executable = compile_program(mlir_text(hlo), devices, donated)
    except RuntimeError as error:  # of the compiler; any other error is a bug of this script
        return {"error": str(error), "compile_seconds": time.perf_counter() - start}, ""
    text = executable.hlo_modules()[0].to_string()
    memory = executable.get_compiled_memory_stats()
    return {
        "error": None,
        "compile_seconds": time.perf_counter() - start,
        "hbm_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "generated_code": memory.generated_code_size_in_bytes,
        },
    }, text


def tpu_environment(folder: str | Path, accelerator: str) -> None:
    """Set the environment variables that the compiler reads when jax is imported.

    No chip is used, so that several processes may compile at the same time.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=accelerator,
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_LOG_DIR=str(folder),
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


def slice_devices(accelerator: str) -> list[Any]:
    """jax's device of each chip of a slice. (The two cores of a v4 or v5p work as one device.)"""
    from jax.experimental import topologies

    slice_ = tpu_types.slice_type(accelerator)
    cores = {"chip_config_name": "megacore"} if slice_.generation.cores == 2 else {}
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=slice_.topology_name,
        chips_per_host_bounds=slice_.host_bounds,
        **cores,
    ).devices


def mlir_text(hlo: bytes) -> str:
    """The MLIR module of an HLO protobuf."""
    from jax._src.lib import xla_client

    return xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(hlo))


def compile_program(text: str, devices: Sequence[Any], donated: Sequence[int] = ()) -> Any:
    """Compile an MLIR module with one replica on each device; returns jax's executable.

    donated: the arguments (by number) whose memory the results may take. Raises RuntimeError with
    the compiler's message.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id] for device in devices], np.int32)
    )
    with mlir.make_ir_context():
        module: Any = ir.Module.parse(text)  # jax's own hints lack what is used here
        main_function = next(op for op in module.body.operations if op.name.value == "main")
        donor = ir.DictAttr.get({"jax.buffer_donor": ir.BoolAttr.get(True)})
        plain = ir.DictAttr.get({})
        main_function.arg_attrs = ir.ArrayAttr.get(
            [donor if k in donated else plain for k in range(len(main_function.type.inputs))]
        )
        device_list = xla_client._xla.DeviceList(tuple(devices))
        return devices[0].client.compile(mlir.module_to_bytecode(module), device_list, options)


if __name__ == "__main__":
    main()
