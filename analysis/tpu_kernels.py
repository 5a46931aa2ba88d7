"""Count the cycles of the compiler's schedule for each Pallas kernel of compiled programs.

    python analysis/tpu_kernels.py FOLDER v4-64 CACHE

The compiler's estimate of a program leaves out its kernels. This script reads
FOLDER/NAME.optimised.txt, compiles each distinct kernel in them by itself, and counts the
instruction bundles that the compiler has scheduled for it. A core executes one bundle in each
cycle. The schedule contains the waits for results of slow instructions, but not those for memory.

It writes FOLDER/kernels.json: {key of the kernel (tpu_hlo.kernel_key): cycles}. As for
analysis/tpu_compile.py, kernels in CACHE/kernels.json are not compiled again.

A kernel is taken to be one loop over its grid, in which everything is unrolled. The cores of a chip
share the parallel axes of the grid. analysis/tpu_report.py runs this after analysis/tpu_compile.py,
in a process of its own.
"""

import base64
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tpu_hlo
from tpu_compile import compile_program, slice_devices, tpu_environment

import tpu_types

DUMP_FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles"
)


def main() -> None:
    folder, accelerator, cache = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3], "kernels.json")
    counted = json.loads(cache.read_text()) if cache.exists() else {}
    found = {key: kernel for key, kernel in kernels(folder).items() if key not in counted}
    if found:
        with tempfile.TemporaryDirectory() as dump:
            tpu_environment(folder, accelerator)
            os.environ["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(dump)
            device = slice_devices(accelerator)[0]
            cores = tpu_types.slice_type(accelerator).generation.cores
            counted |= {
                key: cycles(*kernel, device, cores, Path(dump)) for key, kernel in found.items()
            }
    for path in (cache, folder / "kernels.json"):
        path.write_text(json.dumps(counted))


def kernels(folder: Path) -> dict[str, tuple[tpu_hlo.Computation, tpu_hlo.Instruction]]:
    """{key: (computation, instruction)} of each distinct kernel in the optimised programs."""
    found: dict[str, tuple[tpu_hlo.Computation, tpu_hlo.Instruction]] = {}
    for path in folder.glob("*.optimised.txt"):
        for _, computation, instruction in tpu_hlo.executed(*tpu_hlo.parse(path.read_text())):
            key = tpu_hlo.kernel_key(instruction)
            if instruction.opcode == "custom-call" and key:
                found.setdefault(key, (computation, instruction))
    return found


def cycles(
    computation: tpu_hlo.Computation,
    instruction: tpu_hlo.Instruction,
    device: Any,
    cores: int,
    dump: Path,
) -> int:
    """The cycles of one execution of a kernel on one chip.

    dump: the folder in which the compiler writes its schedules.
    """
    for old in dump.iterdir():
        old.unlink()
    config = json.loads(tpu_hlo.search(r"backend_config=(\{.*\})", instruction.rest))
    kernel = config["custom_call_config"]
    compile_program(module_of_kernel(computation, instruction, kernel), [device])
    texts = [
        path.read_text()
        for path in dump.glob("*schedule-analysis_final_bundles.txt")
        if "-TLP-" not in path.name  # the program around the kernel
    ]
    (schedule,) = (text for text in texts if '"tpu_custom_call"' in text)
    bundles = int(tpu_hlo.search(r"total scheduled bundles:\s*(\d+)", schedule))
    return bundles * passes(kernel["body"], cores)


def module_of_kernel(
    computation: tpu_hlo.Computation, instruction: tpu_hlo.Instruction, kernel: dict[str, Any]
) -> str:
    """An MLIR module that does nothing but call the kernel. kernel: its custom_call_config."""
    shapes = " ".join(computation[name].shape for name in instruction.operands)
    operands, operand_layouts = tensors(shapes)
    results, result_layouts = tensors(instruction.shape)
    arguments = [f"%p{k}" for k in range(len(operands))]
    parameters = ", ".join(f"{name}: {kind}" for name, kind in zip(arguments, operands))
    operand_types, result_types = ", ".join(operands), ", ".join(results)
    call, returned = "%kernel", "%kernel"
    if len(results) > 1:
        call = f"%kernel:{len(results)}"
        returned = ", ".join(f"%kernel#{k}" for k in range(len(results)))
    # a string of MLIR, whose content is JSON
    backend_config = json.dumps(json.dumps({"custom_call_config": kernel}))
    return f"""
        func.func public @main({parameters}) -> ({result_types}) {{
            {call} = stablehlo.custom_call @tpu_custom_call({", ".join(arguments)}) {{
                backend_config = {backend_config},
                operand_layouts = [{", ".join(operand_layouts)}],
                result_layouts = [{", ".join(result_layouts)}]
            }} : ({operand_types}) -> ({result_types})
            return {returned} : {result_types}
        }}"""


def tensors(shape: str) -> tuple[list[str], list[str]]:
    """(MLIR types, row-major layouts) of the arrays in the text of an HLO shape.

    A kernel always takes row-major arrays, whatever layout the text says.
    """
    types, layouts = [], []
    for dtype, text in re.findall(r"\b(bf16|f32)\[([\d,]+)\]", shape):
        dims = text.split(",")
        axes = ", ".join(str(axis) for axis in reversed(range(len(dims))))
        types.append(f"tensor<{'x'.join(dims)}x{dtype}>")
        layouts.append(f"dense<[{axes}]> : tensor<{len(dims)}xindex>")
    return types, layouts


def passes(body: str, cores: int) -> int:
    """The passes of a kernel's grid that one core executes.

    body: the kernel's program (MLIR bytecode in base64). cores: of the chip.
    """
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    with ir.Context() as context:
        tpu.register_dialect(context)  # type: ignore[attr-defined]  # jax has no hint for it
        context.allow_unregistered_dialects = True
        text = str(ir.Module.parse(base64.b64decode(body)))
    grid = tpu_hlo.search(r"iteration_bounds = array<i64: ([\d, ]+)>", text)
    bounds = [int(bound) for bound in grid.split(",")]
    kinds = re.findall(r"dimension_semantics<(\w+)>", text)
    parallel = [bound for bound, kind in zip(bounds, kinds) if kind == "parallel"]
    shared = math.prod(parallel) % cores == 0
    return math.prod(bounds) // (cores if shared else 1)


if __name__ == "__main__":
    main()
