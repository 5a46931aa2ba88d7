"""How long the compiler's schedule of each Pallas kernel is, in cycles: the estimate of a program leaves its kernels out.

    python analysis/tpu_kernels.py FOLDER v4-64

analysis/tpu_report.py runs this in a process of its own, after analysis/tpu_compile.py. Reads FOLDER/NAME.optimised.txt, compiles
each distinct kernel in them by itself and counts the instruction bundles that the compiler has scheduled for it, one a cycle. They
wait for results that take longer, but not for memory. Writes FOLDER/kernels.json: {key of the kernel (tpu_hlo.kernel_key): cycles}.

A kernel is taken to be one loop over its grid, all in it unrolled; the cores of a chip share what is parallel in it.
"""

import base64
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tpu_hlo
from tpu_compile import compile_program, slice_devices, tpu_environment

import tpu_types


def main():
    folder, accelerator = Path(sys.argv[1]), sys.argv[2]
    calls = {}
    for text in folder.glob("*.optimised.txt"):
        for _, computation, instruction in tpu_hlo.executed(*tpu_hlo.parse(text.read_text())):
            if instruction.opcode == "custom-call" and tpu_hlo.kernel_key(instruction):
                calls.setdefault(tpu_hlo.kernel_key(instruction), (computation, instruction))
    if calls:
        with tempfile.TemporaryDirectory() as dump:
            tpu_environment(folder, accelerator)
            os.environ["LIBTPU_INIT_ARGS"] = (
                f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles"
            )
            device, cores = (
                slice_devices(accelerator)[:1],
                tpu_types.slice_type(accelerator).generation.cores,
            )
            calls = {key: cycles(*call, device, cores, Path(dump)) for key, call in calls.items()}
    (folder / "kernels.json").write_text(json.dumps(calls))


def cycles(computation, instruction, device, cores, dump):
    """Of one execution of a kernel on one chip."""
    for old in dump.iterdir():
        old.unlink()
    (operands, operand_layouts), (results, result_layouts) = (
        tensors(shape)
        for shape in (
            " ".join(computation[name].shape for name in instruction.operands),
            instruction.shape,
        )
    )
    config = json.loads(re.search(r"backend_config=(\{.*\})", instruction.rest)[1])[
        "custom_call_config"
    ]
    arguments = [f"%p{k}" for k in range(len(operands))]
    returned = [f"%kernel#{k}" for k in range(len(results))] if len(results) > 1 else ["%kernel"]
    module = f"""
        func.func public @main({", ".join(map(": ".join, zip(arguments, operands)))}) -> ({", ".join(results)}) {{
            %kernel{f":{len(results)}" if len(results) > 1 else ""} = stablehlo.custom_call @tpu_custom_call({", ".join(arguments)}) {{
                backend_config = {json.dumps(json.dumps({"custom_call_config": config}))},
                operand_layouts = [{", ".join(operand_layouts)}], result_layouts = [{", ".join(result_layouts)}]
            }} : ({", ".join(operands)}) -> ({", ".join(results)})
            return {", ".join(returned)} : {", ".join(results)}
        }}"""
    compile_program(module, device)
    (said,) = (
        text
        for path in dump.glob(
            "*schedule-analysis_final_bundles.txt"
        )  # TLP is the program around it
        if '"tpu_custom_call"' in (text := path.read_text()) and "-TLP-" not in path.name
    )
    return int(re.search(r"total scheduled bundles:\s*(\d+)", said)[1]) * passes(
        config["body"], cores
    )


def tensors(shape):
    """(MLIR types, row-major layouts) of the arrays in an HLO shape's text; a kernel takes them as they are, whatever the text says."""
    arrays = [
        (dtype, dims.split(",")) for dtype, dims in re.findall(r"\b(bf16|f32)\[([\d,]+)\]", shape)
    ]
    return (
        [f"tensor<{'x'.join(dims)}x{dtype}>" for dtype, dims in arrays],
        [
            f"dense<[{', '.join(map(str, reversed(range(len(dims)))))}]> : tensor<{len(dims)}xindex>"
            for _, dims in arrays
        ],
    )


def passes(body, cores):
    """Passes of a kernel's grid that one core does."""
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    with ir.Context() as context:
        tpu.register_dialect(context)
        context.allow_unregistered_dialects = True
        text = str(ir.Module.parse(base64.b64decode(body)))
    bounds = [
        int(bound)
        for bound in re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", text)[1].split(",")
    ]
    parallel = [
        bound
        for bound, kind in zip(bounds, re.findall(r"dimension_semantics<(\w+)>", text))
        if kind == "parallel"
    ]
    return math.prod(bounds) // (cores if math.prod(parallel) % cores == 0 else 1)


if __name__ == "__main__":
    main()
