"""The sections of scripts/diagnose.py, each in a process of its own:

    python3 scripts/diagnose_sections.py NAME --config configs/e1_1.yaml

A section prints what it finds, and last its result, `[PASS] name: ...` or `[SKIP] name: ...`; where
it fails it raises. Nothing but the standard library is imported outside of the functions that need
the kit's environment.
"""

import argparse
import contextlib
import email.utils
import faulthandler
import glob
import os
import platform
import re
import secrets
import shutil
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# the environment of the kit on this host; without TRM_VENV the one that this runs in
VENV_PYTHON = (
    Path(os.environ["TRM_VENV"], "bin", "python")
    if os.environ.get("TRM_VENV")
    else Path(sys.executable)
)
# unique in a slice; RANK is set where the hosts are processes of one machine
HOST = socket.gethostname() + (f".rank{os.environ['RANK']}" if "RANK" in os.environ else "")
METADATA_HOST = os.environ.get(
    "GCE_METADATA_HOST", "metadata.google.internal"
)  # as Google's own libraries have it
METADATA = (
    "attributes/accelerator-type",
    "attributes/agent-worker-number",
    "attributes/worker-network-endpoints",
    "attributes/tpu-env",
    "zone",
    "machine-type",
    "image",
    "scheduling/preemptible",
    "preempted",
    "maintenance-event",
    "service-accounts/default/scopes",
)  # never a token
WRITES = ("/cloud-platform", "/devstorage.read_write", "/devstorage.full_control")  # ends of scopes
VARIABLES = re.compile(
    r"(TPU|PJRT|XLA|PT_XLA|LIBTPU|CLOUD_TPU|JAX|TF_CPP|GLOO|NCCL|GCE|TRM|PIP|UV|OMP|STORAGE)_.*|MASTER_(ADDR|PORT)|"
    r"(LOCAL_)?(RANK|WORLD_SIZE)|(HTTPS?|NO|ALL)_PROXY",
    re.IGNORECASE,
)
CLOCK_SECONDS = (
    30  # Google refuses requests whose time is minutes off; a Date header is exact to a second
)
FREE_BYTES = 2 * 2**30  # with less an environment, a dataset or a checkpoint soon does not fit


class Fault(Exception):
    """What is wrong, in words for the reader of the report."""


class NotHere(Exception):
    """Why a section does not apply to this machine or this configuration."""


# --------------------------------------------------------------------------------------------------
# Without the kit's environment
# --------------------------------------------------------------------------------------------------
def chip_files():
    """The device files of TPU chips: /dev/accel* on v4, /dev/vfio/* on v5e and v6e."""
    return sorted(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def check_host(args):
    """The machine: system, cores, memory, disk, device files."""

    def gib(count):
        return f"{count / 2**30:.1f} GiB"

    with contextlib.suppress(OSError):
        print(re.search(r'PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text())[1])
    memory = {
        name: 1024 * int(count)
        for name, count in re.findall(
            r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE
        )
    }
    up = time.clock_gettime(time.CLOCK_BOOTTIME)
    print(f"kernel {platform.release()}, {platform.machine()}, up {up / 3600:.1f} h")
    print(
        f"Python of the host: {platform.python_version()}, {sys.executable}; of the environment: "
        f"{VENV_PYTHON}"
    )
    print(f"code: {ROOT}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"memory {gib(memory['MemTotal'])}, available {gib(memory['MemAvailable'])}")
    for path in (Path.home(), Path("/tmp"), Path("/dev/shm")):
        disk = shutil.disk_usage(path)
        print(f"disk of {path}: {gib(disk.total)}, free {gib(disk.free)}")
    for path in chip_files():
        may = "may" if os.access(path, os.R_OK | os.W_OK) else "MAY NOT"
        print(f"{path}: mode {os.stat(path).st_mode & 0o777:o}, this user {may} read and write it")
    print(f"{len(chip_files())} device files of chips (/dev/accel*, /dev/vfio/*)")
    free = shutil.disk_usage(Path.home()).free
    if free < FREE_BYTES:
        raise Fault(
            f"{Path.home()} has {gib(free)} free: delete what lies there, first old folders in "
            "~/trm/code"
        )
    return (
        f"{os.cpu_count()} cores, {gib(memory['MemTotal'])} memory, {len(chip_files())} device "
        "files of chips"
    )


def check_variables(args):
    """The environment variables that torch_xla, libtpu, gloo and the kit read."""
    names = sorted(name for name in os.environ if VARIABLES.fullmatch(name))
    for name in names:
        print(f"{name}={os.environ[name]}")
    if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
        print("GOOGLE_APPLICATION_CREDENTIALS is set")
    return f"{len(names)} are set"


def ask_metadata(path):
    """The text of an entry of Google's metadata server, or None. Raises OSError where no server
    answers."""
    url = f"http://{METADATA_HOST}/computeMetadata/v1/instance/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:  # without a proxy, which would ask the metadata server of its own host
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=2
        ) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def check_metadata(args):
    """What Google says of this host."""
    found = {}
    for path in METADATA:
        try:
            found[path] = ask_metadata(path)
        except OSError as error:
            if chip_files():
                raise Fault(
                    f"{METADATA_HOST} does not answer ({error}), and this host has chips"
                ) from None
            raise NotHere(
                f"{METADATA_HOST} does not answer: this is no host on Google Cloud"
            ) from None
        lines = ["absent"] if found[path] is None else found[path].splitlines()
        print(f"{path}: {lines[0] if len(lines) == 1 else ''}")
        for line in lines if len(lines) > 1 else ():
            print(f"  {line}")
    # what torch_xla reads there
    keys = ("ACCELERATOR_TYPE", "WORKER_ID", "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS")
    missing = [
        key
        for key in keys
        if not re.search(rf"^{key}\s*:", found["attributes/tpu-env"] or "", re.MULTILINE)
    ]
    if chip_files() and missing:
        raise Fault(
            f"tpu-env has no {', '.join(missing)}: is the image the right one for this kind of "
            "chip?"
        )
    if (found["preempted"] or "").strip() == "TRUE":
        raise Fault("the host is being preempted: it goes within seconds")
    if (found["maintenance-event"] or "NONE").strip() != "NONE":
        raise Fault(f"the host goes into maintenance ({found['maintenance-event'].strip()})")
    if not any(
        scope.endswith(WRITES) for scope in (found["service-accounts/default/scopes"] or "").split()
    ):
        raise Fault(
            "the host has no service account that may write to a bucket: its scopes are above"
        )
    return f"{found['attributes/accelerator-type']}, host {found['attributes/agent-worker-number']}"


def check_clock(args):
    """This host's clock against that of a server."""
    storage = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
    for server in (f"http://{METADATA_HOST}/", f"{storage}/"):
        try:
            with urllib.request.urlopen(server, timeout=5) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:
            headers = error.headers
        except OSError as error:
            print(f"{server}: {error}")
            continue
        off = time.time() - email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
        print(
            f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} here; {headers['Date']} at "
            f"{server}"
        )
        if abs(off) > CLOCK_SECONDS:
            raise Fault(f"the clock is {off:+.0f} s off")
        return f"{off:+.0f} s off"
    raise NotHere("no server answers to compare it with")


def check_network(args):
    """Interfaces, the way to the first host, and the address that gloo takes."""
    import fcntl

    interfaces = {}
    for _, name in socket.if_nameindex():
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
            contextlib.suppress(OSError),
        ):
            request = struct.pack("256s", name.encode())
            interfaces[name] = socket.inet_ntoa(
                fcntl.ioctl(probe, 0x8915, request)[20:24]
            )  # SIOCGIFADDR
        print(f"{name}: {interfaces.get(name, 'no IPv4 address')}")
    hosts = []
    with contextlib.suppress(OSError):
        entries = ask_metadata("attributes/worker-network-endpoints") or ""
        hosts = [entry.split(":")[-1] for entry in entries.split(",") if entry]
    master = os.environ.get("MASTER_ADDR") or (hosts[0] if hosts else "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing
        source = probe.getsockname()[0]
    route = next((name for name, address in interfaces.items() if address == source), "?")
    print(
        f"hosts of the slice: {', '.join(hosts) or 'unknown'}; the way to {master} is by {route}, "
        f"from {source}"
    )
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    # PyTorch lets gloo listen at the address of the host's name, or at 127.0.0.1 if that has none.
    try:
        address = interfaces.get(chosen) if chosen else socket.gethostbyname(socket.gethostname())
    except OSError as error:
        address = "127.0.0.1"
        print(f"{socket.gethostname()}, the host's own name, has no address: {error}")
    interface = chosen or next((name for name, own in interfaces.items() if own == address), "?")
    several = len(hosts) > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and source != address and not source.startswith("127."):
        raise Fault(
            f"gloo listens at {address} ({interface}), and the other hosts reach this one at "
            f"{source}: export GLOO_SOCKET_IFNAME={route}"
        )
    reason = "GLOO_SOCKET_IFNAME" if chosen else "the name of the host"
    return f"gloo listens at {address} ({interface}, by {reason})"


# --------------------------------------------------------------------------------------------------
# In the kit's environment
# --------------------------------------------------------------------------------------------------
def read_config(args):
    """The configuration; from here on the kit's modules can be imported."""
    sys.path[:0] = [str(ROOT)]
    from config import load_config

    return load_config(args.config, args.overrides)


def check_packages(args):
    """Versions of the packages that the requirements files pin."""
    import importlib.metadata

    from packaging.requirements import Requirement

    config = read_config(args)
    from device import resolve_device
    from provenance import code_version

    commit, dirty = code_version()
    print(
        f"commit {commit}{', with uncommitted changes' if dirty else ''}; Python "
        f"{platform.python_version()}"
    )
    files = ["requirements.txt"] + ["requirements-tpu.txt"] * (
        resolve_device(config.device) == "tpu"
    )
    wrong = []
    for line in [
        line
        for file in files
        for line in (ROOT / file).read_text().splitlines()
        if re.match(r"\w", line)
    ]:
        wanted, found = Requirement(line.partition(" #")[0]), "none"
        if wanted.marker and not wanted.marker.evaluate():
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(wanted.name)
        print(f"{wanted.name} {found} ({wanted.specifier})")
        if found == "none" or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} in place of {wanted.specifier}")
    if wrong:
        raise Fault(
            f"{'; '.join(wrong)}: delete {VENV_PYTHON.parent.parent}, then run "
            "scripts/setup_tpu.sh again"
        )
    return f"all of {' and '.join(files)} as pinned, commit {(commit or 'unknown')[:12]}"


def holders():
    """{process id: command} of the processes that have a chip open, as far as this user may see."""
    found, files = {}, chip_files()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # another user's process, or one that has ended
            if os.readlink(link) in files:
                process = link.split("/")[2]
                found[process] = Path("/proc", process, "cmdline").read_text().replace("\0", " ")
    return found


def check_chips(args):
    """What torch_xla sees of this host's chips and of the slice."""
    config = read_config(args)
    from torch_xla._internal import tpu

    from device import resolve_device

    for process, command in holders().items():
        print(f"process {process} has a chip open: {command}")
    # libtpu makes this file, and does not start if the file belongs to another user
    with contextlib.suppress(FileNotFoundError):
        print(
            f"/tmp/libtpu_lockfile is of user {os.stat('/tmp/libtpu_lockfile').st_uid}; this is "
            f"user {os.getuid()}"
        )
    chips = tpu.num_available_chips()
    print(f"chips on PCI: {chips}")
    if not chips and resolve_device(config.device) != "tpu":
        raise NotHere(f"there is no chip here, and device = {config.device!r} asks for none")
    if not chips:
        raise Fault(
            "there is no chip here: this is no host of a TPU slice, or its image is not the one "
            "for its chips"
        )
    print(f"{tpu.get_tpu_type()}, generation {tpu.version()}")
    print(
        f"host {tpu.worker_id()} of {', '.join(tpu.get_worker_ips())}; processes here: "
        f"{tpu.num_local_processes()}"
    )
    if holders():
        raise Fault(f"process {', '.join(holders())} has the chips: stop it (its command is above)")
    from config import planned_workers

    here, planned = (
        tpu.num_local_processes() * tpu.num_tpu_workers(),
        planned_workers(config, "tpu"),
    )
    if here != planned:
        raise Fault(
            f"tpu.accelerator_type = {config.tpu.accelerator_type!r} has {planned} chips, and "
            f"{here} are here: name this slice"
        )
    return f"{chips} here, {here} in the slice"


def check_bucket(args):
    """Write, read and delete one small object where runs are written."""
    config = read_config(args)
    import tpu_settings

    import storage

    bucket = tpu_settings.slice_settings(config, args.overrides, [])["TPU_BUCKET"]
    place = config.logging.output_dir
    if bucket and not storage.is_remote(place) and not os.path.isabs(place):
        place = tpu_settings.on_slice(
            "logging.output_dir", place, bucket
        )  # as scripts/launch_experiment.sh has it
    if not storage.is_remote(place):
        raise NotHere(
            f"logging.output_dir = {place!r} is no bucket; for a slice export TPU_BUCKET=gs://..."
        )
    folder, data = (
        storage.open_folder(storage.join(place, "diagnose"), deadline=30),
        os.urandom(1024),
    )
    name = f"{HOST}-{secrets.token_hex(4)}"
    for what, operation in (
        ("written", lambda: folder.write(name, data)),
        ("read", lambda: folder.read(name)),
        ("deleted", lambda: folder.delete(name)),
    ):
        begun = time.monotonic()
        result = operation()
        print(f"{folder.url}/{name} {what} in {time.monotonic() - begun:.2f} s", flush=True)
        if what == "read" and result != data:
            raise Fault(f"{folder.url}/{name}: what is read is not what was written")
    return f"an object in {folder.url} was written, read and deleted"


def check_workers(args):
    """All workers of the slice at once: all-reduce, and a few steps of training, without the TPU
    kernels and with."""
    limit = SECTIONS["workers"].seconds - 60  # the rest is for the imports, which come before
    words = ["--config", args.config, *args.overrides, "--steps", "--limit", str(limit)]
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), "scripts/check_devices.py", *words])


# --------------------------------------------------------------------------------------------------
class Section(NamedTuple):
    """check: called with the arguments; returns the text of its PASS line. seconds: its time limit.
    environment: whether it runs with the Python of the kit's environment. parts: {name of each part
    that it passes, in order: what a FAIL of this part means}."""

    check: Callable
    seconds: int
    environment: bool
    parts: dict


SECTIONS = {
    "host": Section(check_host, 30, False, {"host": "the machine itself is not as it should be"}),
    "variables": Section(
        check_variables, 30, False, {"variables": "the environment variables could not be read"}
    ),
    "metadata": Section(
        check_metadata,
        60,
        False,
        {
            "metadata": "torch_xla and the login to the bucket ask the same server: they would "
            "fail, too"
        },
    ),
    "clock": Section(
        check_clock,
        30,
        False,
        {"clock": "Google may refuse requests, and the times in records are wrong"},
    ),
    "network": Section(
        check_network, 30, False, {"network": "the hosts of a slice may not find each other"}
    ),
    "packages": Section(
        check_packages,
        120,
        True,
        {"packages": "the environment is not the one that the kit was tested with"},
    ),
    "chips": Section(
        check_chips, 180, True, {"chips": "torch_xla does not see what the slice should have"}
    ),
    "bucket": Section(check_bucket, 180, True, {"bucket": "a run could not write its checkpoints"}),
    "workers": Section(
        check_workers,
        900,
        True,
        {
            "all-reduce": "the workers do not work together; a host that failed first says why "
            "in its part of the report",
            "step": "training does not work on these chips, with or without the TPU kernels",
            "kernels": "training works, not with the TPU kernels: training.pallas_kernels=false "
            "does without, slower",
        },
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config", required=True)
    args = parser.parse_intermixed_args()
    section = SECTIONS[args.section]
    faulthandler.dump_traceback_later(section.seconds, exit=True)
    try:
        print(f"[PASS] {args.section}: {section.check(args)}")
    except NotHere as why:
        print(f"[SKIP] {args.section}: {why}")
    except Fault as fault:
        sys.exit(f"error: {fault}")


if __name__ == "__main__":
    main()
