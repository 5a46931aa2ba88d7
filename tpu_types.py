"""Cloud TPU slices by the name that Google gives their type: v4-64, v5litepod-16, v5p-16, v6e-16. Stdlib alone.

What stands in the table comes from Google's pages on each TPU ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e": peak,
memory, links, chips a host, slice shapes; "TPU software versions": images; "TPU regions and zones"), from the TPU
compiler (libtpu 0.0.21: how much memory a program may use, names of topologies, cores a chip), and from jax's
jax/_src/hardware_utils.py (PCI ids) and jax/_src/tpu_info.py (memory of a core). tests/test_tpu_types.py asks the
compiler, jax and torch_xla again.
"""

import glob
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

GIB, MIB = 2**30, 2**20
GOOGLE_PCI_VENDOR = "0x1ae0"


@dataclass(frozen=True)
class Generation:
    """Of one chip, if nothing else is said."""

    name: str  # as the compiler and the documentation call it
    prefix: str  # of a slice's type
    names_cores: bool  # whether the type's number counts TensorCores; else chips
    cores: int  # TensorCores; two work as one device (megacore)
    torus: int  # axes of the links between chips
    largest: int  # chips of the largest slice
    image: str  # runtime version of its hosts
    zones: tuple  # where TPU Research Cloud lends it (v5p, seldom lent: where it is); the first is the default
    pci_device: str
    peak_flops: float  # bfloat16, FLOP/s
    clock_hz: float  # of a TensorCore
    clock_known: str  # where from
    hbm_bytes: int
    usable_hbm_bytes: int  # what one program may use, by the compiler's own word
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # all links of a chip together, each direction
    vmem_bytes: int  # of a core

    @property
    def rule(self):
        counted = f"TensorCores, {self.cores} a chip" if self.names_cores else "chips"
        numbers = sorted(self.shapes())
        if self.torus == 3:
            cube = 64 * (self.cores if self.names_cores else 1)
            numbers = (
                f"{', '.join(map(str, numbers[:4]))}, or a multiple of {cube} up to {numbers[-1]}"
            )
        else:
            numbers = f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
        return f"{self.prefix}-N has N {counted}: {numbers}"

    def shapes(self):
        """{number in the type: chips along each axis} of every slice that there is."""
        shapes = _flat(self.largest) if self.torus == 2 else _cubic(self.largest)
        return {
            math.prod(shape) * (self.cores if self.names_cores else 1): shape for shape in shapes
        }


def _flat(largest):
    shapes = [(1, 1), (2, 2)]
    while math.prod(shapes[-1]) < largest:
        a, b = shapes[-1]
        shapes.append((a, 2 * b) if a == b else (2 * a, b))
    return shapes


def _cubic(largest):
    """Less than a cube of 4 x 4 x 4 chips, or whole cubes, as close to a cube of them as their number allows."""
    shapes = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    for count in range(1, largest // 64 + 1):
        pairs = itertools.combinations_with_replacement(range(1, math.isqrt(count) + 1), 2)
        sides = [
            (a, b, count // (a * b))
            for a, b in pairs
            if count % (a * b) == 0 and b <= count // (a * b)
        ]
        shapes.append(tuple(4 * side for side in min(sides, key=sum)))
    return shapes


# a clock that is not published is the peak over the FLOPs of a cycle, which the compiler's estimate of a large product
# tells: it comes near to 262,144 on v4 and v5p, 131,072 on v5e, 524,288 on v6e
_BY_PEAK = "not published: from the peak and the compiler's estimate of a large product"
GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation(
            "v4",
            "v4",
            True,
            2,
            3,
            4096,
            "tpu-ubuntu2204-base",
            ("us-central2-b",),
            "0x005e",
            275e12,
            1.05e9,
            "Jouppi et al. 2023, table 4",
            32 * GIB,
            int(30.75 * GIB),
            1.2e12,
            300e9,
            16 * MIB,
        ),
        Generation(
            "v5e",
            "v5litepod",
            False,
            1,
            2,
            256,
            "v2-alpha-tpuv5-lite",
            ("europe-west4-b", "us-central1-a"),
            "0x0063",
            197e12,
            1.5e9,
            "How to Scale Your Model, part 2",
            16 * GIB,
            int(15.75 * GIB),
            819e9,
            200e9,
            128 * MIB,
        ),
        Generation(
            "v5p",
            "v5p",
            True,
            2,
            3,
            6144,
            "v2-alpha-tpuv5",
            ("us-east5-a", "us-central1-a", "europe-west4-b"),
            "0x0062",
            459e12,
            1.75e9,
            _BY_PEAK,
            96 * GIB,
            int(95.74 * GIB),
            2765e9,
            600e9,
            64 * MIB,
        ),
        Generation(
            "v6e",
            "v6e",
            False,
            1,
            2,
            256,
            "v2-alpha-tpuv6e",
            ("europe-west4-a", "us-east1-d"),
            "0x006f",
            918e12,
            1.75e9,
            _BY_PEAK,
            32 * GIB,
            int(31.25 * GIB),
            1638e9,
            400e9,
            128 * MIB,
        ),
    )
}
EXAMPLES = "v4-32, v5litepod-16, v5p-16, v6e-16"


@dataclass(frozen=True)
class Slice:
    type: str
    generation: Generation
    chips: int
    hosts: int
    topology: tuple  # chips along each axis

    @property
    def chips_per_host(self):
        return self.chips // self.hosts

    @property
    def topology_name(self):
        """As the compiler calls it: v6e:4x4."""
        return f"{self.generation.name}:{'x'.join(map(str, self.topology))}"

    @property
    def host_bounds(self):
        """Chips of a host along three axes."""
        return {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[self.chips_per_host]


def slice_type(name):
    """The Slice of a type's name. Raises ValueError where Google has no such type: the rule, and the nearest ones."""
    prefix, _, number = name.rpartition("-")
    generation = next((g for g in GENERATIONS.values() if g.prefix == prefix), None)
    if generation is None and prefix in GENERATIONS:
        other = GENERATIONS[prefix]
        raise ValueError(f"{other.name} slices are called {other.prefix}-N: {other.rule}")
    if generation is None:
        raise ValueError(f"must be the type of a slice, such as {EXAMPLES}")
    if not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(generation.rule)
    shapes = generation.shapes()
    if int(number) not in shapes:
        below, above = (
            [n for n in shapes if n < int(number)],
            [n for n in shapes if n > int(number)],
        )
        nearest = " or ".join(f"{prefix}-{n}" for n in sorted(below)[-1:] + sorted(above)[:1])
        raise ValueError(f"there is no such slice ({generation.rule}): take {nearest}")
    topology = shapes[int(number)]
    chips = math.prod(topology)
    # up to 8 chips of v5e and v6e are one host; larger slices have hosts with 4, as those of v4 and v5p always do
    alone = chips <= (8 if generation.torus == 2 else 4)
    return Slice(name, generation, chips, 1 if alone else chips // 4, topology)


def chips_here(folder="/sys/bus/pci/devices"):
    """(number of TPU chips of this host, their Generation or None), by the PCI bus: /dev names them in several ways."""
    found = []
    for vendor in glob.glob(f"{folder}/*/vendor"):
        if _read(vendor) == GOOGLE_PCI_VENDOR:
            device = _read(Path(vendor).with_name("device"))
            found += [
                generation for generation in GENERATIONS.values() if generation.pci_device == device
            ]
    return len(found), found[0] if found else None


def _read(path):
    try:
        return Path(path).read_text().strip()
    except OSError:  # a device that has just gone, or one that others may not see
        return ""
