"""Cloud TPU slices by the name that Google gives their type: v4-64, v5litepod-16, v5p-16, v6e-16.

Only the standard library is imported. Sources of the table:

- Google's pages on each TPU ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"): peak, memory, links, chips
  of a host, slice shapes. Also "TPU software versions" (images) and "TPU regions and zones".
- The TPU compiler (libtpu 0.0.21): how much memory a program may use, names of topologies, cores of
  a chip.
- jax: PCI ids (jax/_src/hardware_utils.py) and the memory of a core (jax/_src/tpu_info.py).

tests/test_tpu_types.py compares the table with the compiler, jax and torch_xla.
"""

import glob
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

GIB, MIB = 2**30, 2**20
GOOGLE_PCI_VENDOR = "0x1ae0"
EXAMPLES = "v4-32, v5litepod-16, v5p-16, v6e-16"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One kind of chip, and the slices that are made of it.

    name: as the compiler and Google's pages call it. prefix: of a slice's type.
    counts_cores: the number in a slice's type is that of TensorCores, otherwise that of chips.
    cores: TensorCores of a chip; two of them work as one device (megacore).
    axes: of the grid in which links connect the chips, 2 or 3. largest: chips of the largest slice.
    image: the runtime version of its hosts.
    zones: where the TPU Research Cloud lends it. It seldom lends v5p: there, the zones that have
        it. The first one is the default.
    pci_device: its PCI device id.
    peak_flops: dense bfloat16, FLOP/s of a chip.
    clock_hz, clock_source: of a TensorCore, and where the number comes from.
    hbm_bytes: the memory of a chip. usable_hbm_bytes: how much of it the compiler lets one program
        use.
    hbm_bytes_per_second: of a chip. link_bytes_per_second: of all links of a chip together, in each
        direction.
    vmem_bytes: the memory of a TensorCore.
    """

    name: str
    prefix: str
    counts_cores: bool
    cores: int
    axes: int
    largest: int
    image: str
    zones: tuple[str, ...]
    pci_device: str
    peak_flops: float
    clock_hz: float
    clock_source: str
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    vmem_bytes: int

    @property
    def rule(self) -> str:
        """Which numbers a slice's type may have, for error messages."""
        counted = f"TensorCores, {self.cores} a chip" if self.counts_cores else "chips"
        numbers = sorted(self.shapes())
        if self.axes == 3:
            cube = 64 * (self.cores if self.counts_cores else 1)
            small = ", ".join(map(str, numbers[:4]))
            text = f"{small}, or a multiple of {cube} up to {numbers[-1]}"
        else:
            text = f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
        return f"{self.prefix}-N has N {counted}: {text}"

    def shapes(self) -> dict[int, tuple[int, ...]]:
        """{number in the type: chips along each axis} of every slice that Google offers."""
        shapes = _flat(self.largest) if self.axes == 2 else _cubic(self.largest)
        factor = self.cores if self.counts_cores else 1
        return {math.prod(shape) * factor: shape for shape in shapes}


def _flat(largest: int) -> list[tuple[int, ...]]:
    """1x1, 2x2, 2x4, 4x4, 4x8 and so on, up to `largest` chips."""
    shapes: list[tuple[int, ...]] = [(1, 1), (2, 2)]
    while math.prod(shapes[-1]) < largest:
        a, b = shapes[-1]
        shapes.append((a, 2 * b) if a == b else (2 * a, b))
    return shapes


def _cubic(largest: int) -> list[tuple[int, ...]]:
    """Parts of a cube of 4x4x4 chips, then whole cubes up to `largest` chips.

    The cubes of a slice are laid out as close to one large cube as their number allows.
    """
    shapes: list[tuple[int, ...]] = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    for count in range(1, largest // 64 + 1):
        pairs = itertools.combinations_with_replacement(range(1, math.isqrt(count) + 1), 2)
        sides = [
            (a, b, count // (a * b))
            for a, b in pairs
            if count % (a * b) == 0 and b <= count // (a * b)
        ]
        shapes.append(tuple(4 * side for side in min(sides, key=sum)))
    return shapes


# Where the clock is not published, it is the peak divided by the FLOPs that the matrix units of a
# chip can do in one cycle: 262,144 on v4 and v5p, 131,072 on v5e, 524,288 on v6e. These are the
# powers of two just above what the compiler estimates for a large product (docs/tpu_step.md).
_BY_PEAK = "not published: from the peak and the compiler's estimate of a large product"
_ALL = (
    Generation(
        name="v4",
        prefix="v4",
        counts_cores=True,
        cores=2,
        axes=3,
        largest=4096,
        image="tpu-ubuntu2204-base",
        zones=("us-central2-b",),
        pci_device="0x005e",
        peak_flops=275e12,
        clock_hz=1.05e9,
        clock_source="Jouppi et al. 2023, table 4",
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(30.75 * GIB),
        hbm_bytes_per_second=1.2e12,
        link_bytes_per_second=300e9,
        vmem_bytes=16 * MIB,
    ),
    Generation(
        name="v5e",
        prefix="v5litepod",
        counts_cores=False,
        cores=1,
        axes=2,
        largest=256,
        image="v2-alpha-tpuv5-lite",
        zones=("europe-west4-b", "us-central1-a"),
        pci_device="0x0063",
        peak_flops=197e12,
        clock_hz=1.5e9,
        clock_source="How to Scale Your Model, part 2",
        hbm_bytes=16 * GIB,
        usable_hbm_bytes=int(15.75 * GIB),
        hbm_bytes_per_second=819e9,
        link_bytes_per_second=200e9,
        vmem_bytes=128 * MIB,
    ),
    Generation(
        name="v5p",
        prefix="v5p",
        counts_cores=True,
        cores=2,
        axes=3,
        largest=6144,
        image="v2-alpha-tpuv5",
        zones=("us-east5-a", "us-central1-a", "europe-west4-b"),
        pci_device="0x0062",
        peak_flops=459e12,
        clock_hz=1.75e9,
        clock_source=_BY_PEAK,
        hbm_bytes=96 * GIB,
        usable_hbm_bytes=int(95.74 * GIB),
        hbm_bytes_per_second=2765e9,
        link_bytes_per_second=600e9,
        vmem_bytes=64 * MIB,
    ),
    Generation(
        name="v6e",
        prefix="v6e",
        counts_cores=False,
        cores=1,
        axes=2,
        largest=256,
        image="v2-alpha-tpuv6e",
        zones=("europe-west4-a", "us-east1-d"),
        pci_device="0x006f",
        peak_flops=918e12,
        clock_hz=1.75e9,
        clock_source=_BY_PEAK,
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(31.25 * GIB),
        hbm_bytes_per_second=1638e9,
        link_bytes_per_second=400e9,
        vmem_bytes=128 * MIB,
    ),
)
GENERATIONS = {generation.name: generation for generation in _ALL}


@dataclass(frozen=True)
class Slice:
    """A slice that Google offers. type: its name, such as "v4-64". chips and hosts: how many there
    are in it. topology: its chips along each axis of the generation."""

    type: str
    generation: Generation
    chips: int
    hosts: int
    topology: tuple[int, ...]

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def topology_name(self) -> str:
        """As the compiler calls it, such as v6e:4x4."""
        return f"{self.generation.name}:{'x'.join(map(str, self.topology))}"

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """The chips of one host along three axes, as the compiler wants them."""
        return {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[self.chips_per_host]


def slice_type(name: str) -> Slice:
    """The slice of this type, such as "v4-64".

    Raises ValueError if Google has no such type. The message says the rule and the nearest types.
    """
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
        below = [n for n in shapes if n < int(number)]
        above = [n for n in shapes if n > int(number)]
        nearest = " or ".join(f"{prefix}-{n}" for n in sorted(below)[-1:] + sorted(above)[:1])
        raise ValueError(f"there is no such slice ({generation.rule}): take {nearest}")
    topology = shapes[int(number)]
    chips = math.prod(topology)
    # Up to 8 chips of v5e and v6e are on one host. Larger slices have hosts with 4 chips, and
    # those of v4 and v5p always do.
    one_host = chips <= (8 if generation.axes == 2 else 4)
    return Slice(name, generation, chips, 1 if one_host else chips // 4, topology)


def chips_here(folder: str | Path = "/sys/bus/pci/devices") -> tuple[int, Generation | None]:
    """(number of TPU chips of this host, their Generation or None).

    From the PCI bus, because the names in /dev differ from one kind of host to another.
    """
    by_id = {generation.pci_device: generation for generation in GENERATIONS.values()}
    ids = [
        _read(Path(vendor).with_name("device"))
        for vendor in glob.glob(f"{folder}/*/vendor")
        if _read(vendor) == GOOGLE_PCI_VENDOR
    ]
    found = [by_id[device] for device in ids if device in by_id]
    return len(found), found[0] if found else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # a device that has just gone, or that this user may not see
        return ""
