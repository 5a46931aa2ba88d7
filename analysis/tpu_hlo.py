"""What a TPU program costs, read from the text of its optimised HLO.

The compiler notes on almost every instruction how many cycles it expects it to take
("estimated_cycles"). Their sum is its estimate of the device time. An instruction without such a
note never counts as nothing:

- Custom calls (Pallas kernels). Where analysis/tpu_kernels.py has counted the cycles of the
  schedule, the time is that of these cycles plus that of moving all operands and results through
  HBM, as if the two never overlapped. Beside it stands a lower bound: the larger of the FLOPs at
  the peak (if the kernel states its cost) and of these bytes at HBM's bandwidth. Without a schedule
  the bound itself is the time.
- Other instructions that compute: their bytes at HBM's bandwidth.
- Collectives: their number and bytes, and the time that the bytes take on a chip's links.
- Transfers that run beside the computation (prefetches): their bytes.

`Cost.seconds` contains the first two of these and the compiler's estimate, and not the last two.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_types import Generation

COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
}
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
# these only give a name to bytes that are in memory already
FREE_CUSTOM_CALLS = {"ConcatBitcast", "AllocateBuffer"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")


def search(pattern: str, text: str) -> str:
    """The first group of the first match. Raises ValueError without a match."""
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern!r} in {text[:200]!r}")
    return found[1]


# --------------------------------------------------------------------------------------------------
# Programs
# --------------------------------------------------------------------------------------------------
@dataclass
class Instruction:
    """One line of a program. shape: of the result. rest: operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        depth = 1  # of brackets; the first one is before `rest`
        for end, sign in enumerate(self.rest):
            depth += (sign == "(") - (sign == ")")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:end])
        raise ValueError(f"{self.name} has no closing bracket")

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as body=%name refers to, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


Computation = dict[str, Instruction]
Computations = dict[str, Computation]
Arguments = Sequence[int | None]


def parse(text: str) -> tuple[Computations, str]:
    """({name of a computation: {name: Instruction}}, name of the entry computation).

    Raises ValueError if there is no entry computation.
    """
    computations: Computations = {}
    entry, current = None, None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations.setdefault(begins[2], {})
            entry = begins[2] if begins[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[1]] = Instruction(*found.groups())
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return computations, entry


def executed(
    computations: Computations, name: str, times: int = 1, given: Arguments = ()
) -> Iterator[tuple[int, Computation, Instruction]]:
    """Every instruction that an execution of a computation runs.

    Yields (how often, its computation, Instruction). What a fusion calls stays inside the fusion. A
    loop is yielded itself only if its number of passes is unknown, and then counts as one pass. Of
    a conditional every branch counts: too much rather than too little.

    given: the computation's arguments, each a known integer or None.
    """
    computation = computations[name]
    for instruction in computation.values():
        if instruction.opcode == "while":
            passes = loop_passes(computations, computation, instruction, given)
            if passes is None:
                yield times, computation, instruction
            for part in ("condition", "body"):
                called = _called(instruction, part)
                yield from executed(computations, called, times * (passes or 1))
        elif instruction.opcode == "conditional":
            for branch in _branches(instruction):
                yield from executed(computations, branch, times)
        elif instruction.opcode in ("call", "async-start"):
            values = [known_integer(computation, name, given) for name in instruction.operands]
            called = _called(instruction, "to_apply" if instruction.opcode == "call" else "calls")
            yield from executed(computations, called, times, values)
        else:
            yield times, computation, instruction


def _called(instruction: Instruction, attribute: str) -> str:
    name = instruction.attribute(attribute)
    assert name, f"{instruction.name} has no {attribute}"
    return name


def _branches(conditional: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{(.*?)\}", conditional.rest)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    return [_called(conditional, f"{side}_computation") for side in ("true", "false")]


def loop_passes(
    computations: Computations, computation: Computation, loop: Instruction, given: Arguments
) -> int | None:
    """The number of passes of a loop that counts up by one to a constant, otherwise None.

    The TPU compiler does not always note this number. In its text a counter of 64 bits is two of
    32 bits.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if noted:
        return int(noted[1])
    condition, bounds = computations[_called(loop, "condition")], []
    for compare in condition.values():
        if compare.opcode == "compare" and "direction=LT" in compare.rest:
            counter_name, bound = compare.operands
            limit, counter = known_integer(condition, bound, ()), condition[counter_name]
            # skip a comparison with 0: it tests the sign of the upper half of a 64-bit counter
            if limit and counter.opcode == "get-tuple-element":
                bounds.append((limit, int(search(r"\), index=(\d+)", counter.rest))))
    start = computation[loop.operands[0]]
    if len(bounds) != 1 or start.opcode != "tuple":
        return None
    ((limit, place),) = bounds
    first = known_integer(computation, start.operands[place], given)
    return None if first is None else limit - first


def known_integer(computation: Computation, name: str, given: Arguments) -> int | None:
    """The value of an integer constant, of a known argument, or of a copy of these; else None."""
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return known_integer(computation, instruction.operands[0], given)
    found = re.match(r"(-?\d+)\)", instruction.rest)
    if not found:
        return None
    if instruction.opcode == "parameter":
        return given[int(found[1])] if given else None
    return int(found[1]) if instruction.opcode == "constant" else None


# --------------------------------------------------------------------------------------------------
# Costs
# --------------------------------------------------------------------------------------------------
def _nothing() -> dict[str, Any]:
    return {"count": 0, "bytes": 0}


@dataclass
class Cost:
    """The cost of one execution of a program on one chip.

    chip: the kind of chip that the program was compiled for.
    cycles: the sum of the compiler's estimates. counts: the executed instructions that have one, by
        opcode. by_instruction: (cycles of one execution, executions, Instruction) of each of them.
    custom_calls: {target: {count, bytes, flops, bound_seconds, seconds}}.
    unestimated: {count, bytes, seconds} of the other instructions without an estimate.
    collectives: {opcode: {count, bytes}}. prefetch_bytes: moved beside the computation.
    loops_of_unknown_length: each of them counts as one pass.
    """

    chip: Generation
    cycles: int = 0
    counts: Counter = field(default_factory=Counter)
    by_instruction: list[tuple[int, int, Instruction]] = field(default_factory=list)
    custom_calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    unestimated: dict[str, Any] = field(default_factory=lambda: {**_nothing(), "seconds": 0.0})
    collectives: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(_nothing))
    prefetch_bytes: float = 0
    loops_of_unknown_length: int = 0

    @property
    def seconds(self) -> float:
        """The estimated device time, without collectives and prefetches."""
        return (
            self.cycles / self.chip.clock_hz
            + sum(call["seconds"] for call in self.custom_calls.values())
            + self.unestimated["seconds"]
        )


def read_cost(text: str, chip: Generation, kernel_cycles: Mapping[str, int]) -> Cost:
    """The cost of one execution of the module whose optimised HLO is `text`.

    kernel_cycles: {kernel_key: cycles of one execution}. Raises ValueError for text that has no
    entry computation.
    """
    cost = Cost(chip)
    for times, computation, instruction in executed(*parse(text)):
        opcode, base = instruction.opcode, instruction.opcode.removesuffix("-start")
        if opcode == "while":
            cost.loops_of_unknown_length += 1
        elif base in COLLECTIVES:
            cost.collectives[base]["count"] += times
            cost.collectives[base]["bytes"] += times * array_bytes(instruction.shape)
        elif opcode in FREE or opcode.endswith(("-done", "-update")):
            pass
        elif instruction.cycles is not None:
            cost.cycles += times * instruction.cycles
            cost.counts[opcode] += times
            cost.by_instruction.append((instruction.cycles, times, instruction))
        elif opcode == "custom-call":
            _add_custom_call(cost, computation, instruction, times, kernel_cycles)
        elif base != opcode:
            # The shape has the source and the destination. If only a slice is copied, what moves is
            # the smaller of the two, the destination.
            cost.prefetch_bytes += times * min(_sizes(instruction.shape)[:2])
        else:
            moved = _moved(computation, instruction)
            cost.unestimated["count"] += times
            cost.unestimated["bytes"] += times * moved
            cost.unestimated["seconds"] += times * moved / chip.hbm_bytes_per_second
    return cost


def _add_custom_call(
    cost: Cost,
    computation: Computation,
    instruction: Instruction,
    times: int,
    kernel_cycles: Mapping[str, int],
) -> None:
    target = search(r'custom_call_target="([^"]*)"', instruction.rest)
    if target in FREE_CUSTOM_CALLS:
        return
    chip, stated = cost.chip, _stated_cost(instruction)
    flops = int(stated.get("flops", 0))
    moved = max(_moved(computation, instruction), int(stated.get("bytes_accessed", 0)))
    bound = seconds = max(flops / chip.peak_flops, moved / chip.hbm_bytes_per_second)
    cycles = kernel_cycles.get(kernel_key(instruction) or "")
    if cycles is not None:
        scheduled = cycles / chip.clock_hz + moved / chip.hbm_bytes_per_second
        seconds = max(bound, scheduled)
    values = {
        "count": 1,
        "bytes": moved,
        "flops": flops,
        "bound_seconds": bound,
        "seconds": seconds,
    }
    call = cost.custom_calls.setdefault(target, dict.fromkeys(values, 0))
    for key, value in values.items():
        call[key] += times * value


def kernel_key(instruction: Instruction) -> str | None:
    """A digest by which a Pallas kernel is known, whatever its operands are called.

    None for any other custom call.
    """
    body = re.search(r'"body":\s*"([^"]*)"', instruction.rest)
    return hashlib.sha256(body[1].encode()).hexdigest() if body else None


def _stated_cost(instruction: Instruction) -> dict[str, Any]:
    """The cost that a Pallas kernel states (pallas_call's cost_estimate); {} if it states none."""
    unescaped = instruction.rest.replace('\\"', '"')  # it is escaped before optimisation
    stated = re.search(r'"cost_estimate":\s*(\{[^{}]*\})', unescaped)
    return json.loads(stated[1]) if stated else {}


def all_reduce_seconds(num_bytes: int, chips: int, chip: Generation) -> float:
    """The least time that an all-reduce of `num_bytes` over `chips` chips takes on their links."""
    return 2 * num_bytes * (chips - 1) / chips / chip.link_bytes_per_second


def product_flops(text: str) -> int:
    """FLOPs of the matrix products in a traced module (before its optimisation).

    It includes the FLOPs that custom calls state.
    """
    flops = 0
    for times, computation, instruction in executed(*parse(text)):
        if instruction.opcode == "dot":
            left = _dims(computation[instruction.operands[0]].shape)
            contracted = _numbers(search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest))
            sums = math.prod(left[axis] for axis in contracted)
            flops += times * 2 * math.prod(_dims(instruction.shape)) * sums
        elif instruction.opcode == "custom-call":
            flops += times * int(_stated_cost(instruction).get("flops", 0))
    return flops


def product_precisions(text: str) -> dict[str, int]:
    """The matrix products that one execution of an optimised module runs, by their precision.

    Returns {"bfloat16": number, "float32": number}. Products inside fusions count, those of custom
    calls do not. A TPU multiplies in bfloat16 whatever the operands' dtype is. It does so in
    float32, in several passes, only where the precision "highest" is asked for and an operand is
    float32.
    """
    computations, entry = parse(text)
    counts = {"bfloat16": 0, "float32": 0}

    def add(computation, instruction, times):
        inner = instruction.attribute("calls")
        if instruction.opcode == "fusion" and inner in computations:
            for part in computations[inner].values():
                add(computations[inner], part, times)
        # the TPU compiler makes a convolution of every product
        elif instruction.opcode in ("dot", "convolution"):
            shapes = [computation[name].shape for name in instruction.operands]
            highest = "operand_precision={highest,highest}" in instruction.rest
            exact = highest and any(shape.startswith("f32") for shape in shapes)
            counts["float32" if exact else "bfloat16"] += times

    for times, computation, instruction in executed(computations, entry):
        add(computation, instruction, times)
    return counts


def cycles_by_source(cost: Cost, folder: str | Path) -> list[tuple[int, int, str, str, str]]:
    """[(cycles, executed instructions, source, operation, result shape)], the most expensive first.

    source: file:line of the call of the operation, if that is a file in `folder` and the trace has
    recorded it. A fusion has that of its last operation.
    """
    where = rf'source_file="{re.escape(str(folder))}/([^/"]+)" source_line=(\d+)'
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for cycles, times, instruction in cost.by_instruction:
        called = re.search(where, instruction.rest)
        name = re.search(r'op_name="([^"]*?)(?:\.\d+)?[/"]', instruction.rest)
        group = groups[
            ":".join(called.groups()) if called else "",
            name[1] if name else instruction.opcode,
            re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.shape),
        ]
        group[0] += cycles * times
        group[1] += times
    return sorted(((cycles, count, *key) for key, (cycles, count) in groups.items()), reverse=True)


# --------------------------------------------------------------------------------------------------
# Shapes
# --------------------------------------------------------------------------------------------------
def array_bytes(shape: str) -> int:
    """Bytes of the arrays in the text of a shape, such as (f32[3,4]{1,0:T(8,128)}, u32[])."""
    return math.ceil(sum(_sizes(shape)))


def _sizes(shape: str) -> list[float]:
    """Bytes of each array in the text of a shape."""
    return [
        math.prod(_numbers(dims)) * (1 if dtype == "pred" else int(bits) / 8)
        for dtype, bits, dims in _ARRAY.findall(shape)
    ]


def _dims(shape: str) -> list[int]:
    """Dimensions of the first array in the text of a shape."""
    found = _ARRAY.search(shape)
    assert found, shape
    return _numbers(found[3])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _moved(computation: Computation, instruction: Instruction) -> int:
    """Bytes of an instruction's operands and results."""
    operands = [computation[name] for name in instruction.operands if name in computation]
    return array_bytes(instruction.shape) + sum(array_bytes(one.shape) for one in operands)
