"""What a TPU program costs, read from its optimised HLO text.

The compiler notes on almost every instruction how many cycles it expects it to take ("estimated_cycles"). Their sum is
its estimate of the device time. What carries no such note is counted beside it, and never as nothing:

- custom calls (Pallas kernels): their schedule's cycles where analysis/tpu_kernels.py has counted them, and their operands' and
  results' bytes at HBM's bandwidth as if nothing of that ran beside it. Beside it their bound, and alone where there is no
  schedule: the larger of their FLOPs at the peak (if the kernel states a cost estimate) and those bytes;
- other instructions that run in line: their bytes at HBM's bandwidth;
- collectives: number and bytes, and the time that the bytes take on a chip's links;
- transfers that run beside the computation (prefetches): their bytes.

All but the first two are left out of the sum of seconds: `Cost.seconds`.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

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
FREE_CUSTOM_CALLS = {"ConcatBitcast", "AllocateBuffer"}  # a name for bytes that lie there already

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")


@dataclass
class Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def cycles(self):
        """The compiler's estimate, or None."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def operands(self):
        depth, end = 1, 0
        for end, sign in enumerate(self.rest):
            depth += (sign == "(") - (sign == ")")
            if not depth:
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    def attribute(self, name):
        """The computation that an attribute such as body=%name refers to, or None."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


@dataclass
class Cost:
    chip: object  # a tpu_types.Generation
    cycles: int = 0
    counts: Counter = field(
        default_factory=Counter
    )  # executed instructions that carry an estimate, by opcode
    by_instruction: list = field(
        default_factory=list
    )  # (cycles, times, Instruction) of each of them
    custom_calls: dict = field(
        default_factory=dict
    )  # target: {count, bytes, flops, bound_seconds, seconds}
    unestimated: dict = field(default_factory=lambda: {"count": 0, "bytes": 0, "seconds": 0.0})
    collectives: dict = field(default_factory=lambda: defaultdict(lambda: {"count": 0, "bytes": 0}))
    prefetch_bytes: int = 0
    loops_of_unknown_length: int = 0  # each counted as one pass

    @property
    def seconds(self):
        """Estimated device time of one execution, collectives left out."""
        return (
            self.cycles / self.chip.clock_hz
            + sum(call["seconds"] for call in self.custom_calls.values())
            + self.unestimated["seconds"]
        )


def read_cost(text, chip, kernel_cycles={}):
    """Cost of one execution of the module whose optimised HLO is `text`; raises ValueError where that has no entry.

    chip: the tpu_types.Generation that it was compiled for; kernel_cycles: {kernel_key: cycles of one execution}.
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
        elif base != opcode:  # source and destination; of a slice only the destination moves
            cost.prefetch_bytes += times * min(_sizes(instruction.shape)[:2])
        else:
            moved = _moved(computation, instruction)
            cost.unestimated["count"] += times
            cost.unestimated["bytes"] += times * moved
            cost.unestimated["seconds"] += times * moved / chip.hbm_bytes_per_second
    return cost


def product_flops(text):
    """FLOPs of the matrix products in a traced module (before its optimisation), and those that custom calls state."""
    flops = 0
    for times, computation, instruction in executed(*parse(text)):
        if instruction.opcode == "dot":
            left = _dims(computation[instruction.operands[0]].shape)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
            flops += (
                times
                * 2
                * math.prod(_dims(instruction.shape))
                * math.prod(left[int(k)] for k in contracted.split(",") if k)
            )
        elif instruction.opcode == "custom-call":
            flops += times * int(_stated_cost(instruction).get("flops", 0))
    return flops


def product_precisions(text):
    """{"bfloat16": number of matrix products, "float32": number} that one execution of an optimised module runs, fusions included and
    custom calls left out. A TPU multiplies bfloat16, whatever the operands' dtype, unless "highest" is asked for: then it takes several
    passes over a float32 operand."""
    computations, entry = parse(text)
    counts = {"bfloat16": 0, "float32": 0}

    def add(computation, instruction, times):
        if instruction.opcode == "fusion" and instruction.attribute("calls") in computations:
            inner = computations[instruction.attribute("calls")]
            for part in inner.values():
                add(inner, part, times)
        elif instruction.opcode in (
            "dot",
            "convolution",
        ):  # the TPU compiler makes every product a convolution
            operands = [computation[name].shape for name in instruction.operands]
            exact = "operand_precision={highest,highest}" in instruction.rest and any(
                shape.startswith("f32") for shape in operands
            )
            counts["float32" if exact else "bfloat16"] += times

    for times, computation, instruction in executed(computations, entry):
        add(computation, instruction, times)
    return counts


def parse(text):
    """({computation: {name: Instruction}}, name of the entry computation)."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations.setdefault(begins[2], {})
            entry = begins[2] if begins[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found[1]] = Instruction(*found.groups())
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation")
    return computations, entry


def executed(computations, name, times=1, given=()):
    """Every instruction that an execution of a computation runs: (how often, its computation, Instruction). What a fusion
    calls is left inside the fusion. A loop itself is among them only where its number of passes is unknown, and then
    counts as one pass; of a conditional every branch counts: too much rather than too little.

    given: the computation's arguments where they are known integers, else None.
    """
    for instruction in computations[name].values():
        opcode, inner = instruction.opcode, []
        if opcode == "while":
            passes = loop_passes(computations, computations[name], instruction, given)
            if passes is None:
                yield times, computations[name], instruction
            inner = [
                (instruction.attribute(part), times * (passes or 1), ())
                for part in ("condition", "body")
            ]
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)
            inner = [
                (branch, times, ())
                for branch in (
                    re.findall(r"%([\w.\-]+)", branches[1])
                    if branches
                    else [
                        instruction.attribute(f"{side}_computation") for side in ("true", "false")
                    ]
                )
            ]
        elif opcode in ("call", "async-start"):
            values = [
                known_integer(computations[name], operand, given)
                for operand in instruction.operands
            ]
            inner = [
                (instruction.attribute("to_apply" if opcode == "call" else "calls"), times, values)
            ]
        else:
            yield times, computations[name], instruction
        for part, often, values in inner:
            yield from executed(computations, part, often, values)


def loop_passes(computations, computation, loop, given):
    """Passes of a loop that counts up by one to a constant, or None. The TPU compiler does not say it; a counter of 64 bits
    is two of 32 in its text."""
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if said:
        return int(said[1])
    condition, bounds = computations[loop.attribute("condition")], []
    for compare in condition.values():
        if compare.opcode == "compare" and "direction=LT" in compare.rest:
            counter, bound = compare.operands
            limit, counter = known_integer(condition, bound, ()), condition[counter]
            if (
                limit and counter.opcode == "get-tuple-element"
            ):  # a limit of 0: the sign of a counter's upper half
                bounds.append((limit, int(re.search(r"\), index=(\d+)", counter.rest)[1])))
    start = computation[loop.operands[0]]
    if len(bounds) != 1 or start.opcode != "tuple":
        return None
    first = known_integer(computation, start.operands[bounds[0][1]], given)
    return None if first is None else bounds[0][0] - first


def known_integer(computation, name, given):
    """The value of an instruction that is an integer constant, or a copy of one or an argument that is; otherwise None."""
    instruction = computation[name]
    if instruction.opcode in ("copy", "bitcast", "convert"):
        return known_integer(computation, instruction.operands[0], given)
    found = re.match(r"(-?\d+)\)", instruction.rest)
    if instruction.opcode == "parameter":
        return given[int(found[1])] if given else None
    return int(found[1]) if found and instruction.opcode == "constant" else None


def _add_custom_call(cost, computation, instruction, times, kernel_cycles):
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)[1]
    if target in FREE_CUSTOM_CALLS:
        return
    stated = _stated_cost(instruction)
    moved = max(_moved(computation, instruction), int(stated.get("bytes_accessed", 0)))
    flops, cycles, chip = (
        int(stated.get("flops", 0)),
        kernel_cycles.get(kernel_key(instruction)),
        cost.chip,
    )
    bound = max(flops / chip.peak_flops, moved / chip.hbm_bytes_per_second)
    seconds = (
        bound
        if cycles is None
        else max(bound, cycles / chip.clock_hz + moved / chip.hbm_bytes_per_second)
    )
    call = cost.custom_calls.setdefault(
        target, {"count": 0, "bytes": 0, "flops": 0, "bound_seconds": 0.0, "seconds": 0.0}
    )
    for key, value in (
        ("count", 1),
        ("bytes", moved),
        ("flops", flops),
        ("bound_seconds", bound),
        ("seconds", seconds),
    ):
        call[key] += times * value


def kernel_key(instruction):
    """What tells one Pallas kernel from another, whatever its operands are called; None for another custom call."""
    body = re.search(r'"body":\s*"([^"]*)"', instruction.rest)
    return hashlib.sha256(body[1].encode()).hexdigest() if body else None


def _stated_cost(instruction):
    """What a Pallas kernel's author says of its cost (pallas_call's cost_estimate); {} where nothing is said."""
    stated = re.search(
        r'"cost_estimate":\s*(\{[^{}]*\})', instruction.rest.replace('\\"', '"')
    )  # escaped before optimisation
    return json.loads(stated[1]) if stated else {}


def all_reduce_seconds(num_bytes, chips, chip):
    """The least time that an all-reduce of `num_bytes` over `chips` of a tpu_types.Generation takes on their links."""
    return 2 * num_bytes * (chips - 1) / chips / chip.link_bytes_per_second


def cycles_by_source(cost, folder):
    """[(cycles, executed instructions, source, operation, result shape)], the most expensive first.

    source: file:line that an operation was called at, if that is a file in `folder` and the trace kept it. A fusion has that of its
    last operation.
    """
    groups = defaultdict(lambda: [0, 0])
    for cycles, times, instruction in cost.by_instruction:
        called, name = (
            re.search(pattern, instruction.rest)
            for pattern in (
                rf'source_file="{re.escape(str(folder))}/([^/"]+)" source_line=(\d+)',
                r'op_name="([^"]*?)(?:\.\d+)?[/"]',
            )
        )
        shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.shape)
        group = groups[
            ":".join(called.groups()) if called else "",
            name[1] if name else instruction.opcode,
            shape,
        ]
        group[0] += cycles * times
        group[1] += times
    return sorted(((cycles, count, *key) for key, (cycles, count) in groups.items()), reverse=True)


def array_bytes(shape):
    """Bytes of the arrays in a shape's text, such as (f32[3,4]{1,0:T(8,128)}, u32[])."""
    return math.ceil(sum(_sizes(shape)))


def _sizes(shape):
    return [
        math.prod(_numbers(dims)) * (1 if dtype == "pred" else int(bits) / 8)
        for dtype, bits, dims in _ARRAY.findall(shape)
    ]


def _dims(shape):
    """Dimensions of the first array in a shape's text."""
    return _numbers(_ARRAY.search(shape)[3])


def _numbers(text):
    return [int(number) for number in text.split(",") if number]


def _moved(computation, instruction):
    """Bytes of an instruction's operands and results."""
    return array_bytes(instruction.shape) + sum(
        array_bytes(computation[name].shape) for name in instruction.operands if name in computation
    )
