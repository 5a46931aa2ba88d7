#!/usr/bin/env python3
"""Find out what works on the hosts of a TPU slice and what does not, and write it into one file.

    bash scripts/tpu_host.sh diagnose --config configs/e1_1.yaml              # on every host of a slice at the same time
    python3 scripts/diagnose.py --config configs/quickstart.yaml                # this machine
    ... | python3 scripts/diagnose.py --collect trm_diagnose.txt --hosts 8      # the output of all hosts into one file

`scripts/setup_tpu.sh --diagnose` does the first and the third. Each host works through the same sections. A section runs in a
process of its own with a time limit, because the TPU runtime may hang or end its process; the next section comes anyway. A section
ends with PASS, FAIL and the reason, or SKIP where it does not apply. The exit status is 0 if nothing failed, otherwise 1.

This file needs the standard library alone, so that it reports from a host whose environment is missing, and collects on a machine
without PyTorch. What looks like a token, a key or a password is taken out of every line before it is printed.
"""
import argparse
import contextlib
import email.utils
import faulthandler
import glob
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# the environment of the kit on this host; without TRM_VENV the one that this runs in
VENV_PYTHON = Path(os.environ["TRM_VENV"], "bin", "python") if os.environ.get("TRM_VENV") else Path(sys.executable)
METADATA_HOST = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")     # the variable of Google's own libraries
SHOWN_VARIABLES = re.compile(r"(TPU|PJRT|XLA|PT_XLA|LIBTPU|CLOUD_TPU|JAX|TF_CPP|GLOO|NCCL|GCE|TRM|PIP|UV|OMP|STORAGE)_.*|MASTER_(ADDR|PORT)|"
                             r"(LOCAL_)?(RANK|WORLD_SIZE)|(HTTPS?|NO|ALL)_PROXY", re.IGNORECASE)
CLOCK_SECONDS = 30              # Google refuses requests whose time is minutes off; the Date header is exact to a second
FREE_BYTES = 2 * 2**30          # below it an environment, a dataset or a checkpoint soon does not fit


class Fault(Exception):
    """What is wrong, in words for the reader of the report."""


class NotHere(Exception):
    """Why a section does not apply to this machine or this configuration."""


# ---------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------
_NAME = r"[\w.-]*(?:token|secret|passwo?r?d|credential|api_?key|authorization|cookie|signature)[\w.-]*|[\w.-]*[_.-]key|key"
_SECRETS = [
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "(redacted)"),
    (rf"(?i)(?<![\w.-])({_NAME})([\"']?\s*[=:]\s*)(?:\"[^\"\n]*\"|'[^'\n]*'|(?:bearer |basic )?[^\s,;]+)", r"\1\2(redacted)"),
    (r"(?i)\b(bearer|basic) +[\w.~+/=-]{8,}", r"\1 (redacted)"),
    (r"(\w://)[^/\s@]+@", r"\1(redacted)@"),
    # Google's access, refresh and API keys, those of Hugging Face, GitHub, Amazon, Weights & Biases and others, JSON web tokens
    (r"\b(?:ya29\.|1//|AIza|GOOG1|hf_|gh[oprsu]_|github_pat_|sk-|xox[bp]-|glpat-|AKIA|GOCSPX-|eyJ)[\w.-]{12,}", "(redacted)"),
    # long, with small and capital letters and digits: no path, no commit, no checksum, no mangled name of C++
    (r"(?<![\w./+=-])(?!_Z)(?=[\w+=/-]*[a-z])(?=[\w+=/-]*[A-Z])(?=[\w+=/-]*\d)[\w+=-][\w+=/-]{39,}(?![\w./+=-])", "(redacted)"),
]
_SECRETS = [(re.compile(pattern, re.DOTALL), by) for pattern, by in _SECRETS]


def redact(text):
    """`text` with everything that looks like a token, a key, a password or a cookie replaced by "(redacted)"."""
    for pattern, by in _SECRETS:
        text = pattern.sub(by, text)
    return text


# ---------------------------------------------------------------------------------------------------------
# Sections that need no environment. Each prints what it finds, returns a summary, and raises Fault or NotHere
# ---------------------------------------------------------------------------------------------------------
def chip_files():
    """The device files of TPU chips: /dev/accel* on v4, /dev/vfio/* on v5e and newer."""
    return sorted(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*"))


def check_host(args):
    """The machine: system, cores, memory, disk, device files."""
    with contextlib.suppress(OSError):
        print(re.search(r'PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text())[1])
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    gib = {name: int(memory[name]) / 2**20 for name in ("MemTotal", "MemAvailable")}
    print(f"kernel {platform.release()}, {platform.machine()}, up {float(Path('/proc/uptime').read_text().split()[0]) / 3600:.1f} h, "
          f"started as {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}")
    print(f"Python of the host: {platform.python_version()}, {sys.executable}; of the environment: {VENV_PYTHON}")
    print(f"code: {ROOT}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; memory {gib['MemTotal']:.0f} GiB, {gib['MemAvailable']:.0f} GiB of it available")
    for path in (Path.home(), Path("/tmp"), Path("/dev/shm")):
        print(f"disk {path}: {shutil.disk_usage(path).free / 2**30:.0f} of {shutil.disk_usage(path).total / 2**30:.0f} GiB free")
    for path in chip_files() + sorted(glob.glob("/dev/vfio/vfio")):
        print(f"{path}: {oct(os.stat(path).st_mode & 0o777)}, {'may' if os.access(path, os.R_OK | os.W_OK) else 'MAY NOT'} be read and written by this user")
    if not chip_files():
        print("no /dev/accel*, no /dev/vfio/*")
    free = shutil.disk_usage(Path.home()).free
    if free < FREE_BYTES:
        raise Fault(f"{Path.home()} has {free / 2**30:.1f} GiB free: delete what lies there, old folders in ~/trm/code first")
    return f"{os.cpu_count()} cores, {gib['MemTotal']:.0f} GiB memory, {len(chip_files())} chip files"


def check_environment(args):
    """The variables that torch_xla, libtpu, gloo and the kit read."""
    names = sorted(name for name in os.environ if SHOWN_VARIABLES.fullmatch(name))
    for name in names:
        print(f"{name}={os.environ[name]}")
    if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
        print("GOOGLE_APPLICATION_CREDENTIALS is set")
    return f"{len(names)} variables"


def ask_metadata(path):
    """The text of one entry of Google's metadata server, or None where it has none; OSError without a server. Never a token."""
    request = urllib.request.Request(f"http://{METADATA_HOST}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"})
    try:        # no proxy: it would ask its own server
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=2) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def check_metadata(args):
    """What Google says of this host."""
    found = {}
    for path in ("attributes/accelerator-type", "attributes/agent-worker-number", "attributes/worker-network-endpoints", "attributes/tpu-env", "zone",
                 "machine-type", "image", "scheduling/preemptible", "preempted", "maintenance-event", "service-accounts/default/scopes"):
        try:
            found[path] = ask_metadata(path)
        except OSError as error:
            if chip_files():
                raise Fault(f"{METADATA_HOST} does not answer ({error}), and this host has chips") from None
            raise NotHere(f"{METADATA_HOST} does not answer: not a host on Google Cloud") from None
        print(f"{path}: " + ("absent" if found[path] is None else "\n  ".join(["", *found[path].splitlines()]) if "\n" in found[path] else found[path]))
    missing = [key for key in ("ACCELERATOR_TYPE", "WORKER_ID", "TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS")
               if not re.search(rf"^{key}\s*:", found["attributes/tpu-env"] or "", re.MULTILINE)]
    if chip_files() and missing:
        raise Fault(f"tpu-env has no {', '.join(missing)}, from which torch_xla knows this slice: is the image the right one for this kind of chip?")
    if (found["preempted"] or "").strip() == "TRUE":
        raise Fault("the host is being preempted: it goes within seconds")
    if (found["maintenance-event"] or "NONE").strip() != "NONE":
        raise Fault(f"the host goes into maintenance ({found['maintenance-event']})")
    scopes = (found["service-accounts/default/scopes"] or "").split()
    if not any(scope.endswith(("/cloud-platform", "/devstorage.read_write", "/devstorage.full_control")) for scope in scopes):
        raise Fault("the host has no service account that may write to a bucket (its scopes are above): make the slice anew, with the default account")
    return f"{found['attributes/accelerator-type']}, host {found['attributes/agent-worker-number']}"


def check_clock(args):
    """This host's clock against that of a server."""
    servers = [f"http://{METADATA_HOST}/", os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com") + "/"]
    for server in servers:
        try:
            with urllib.request.urlopen(server, timeout=5) as answer:
                headers = answer.headers
        except urllib.error.HTTPError as error:
            headers = error.headers
        except OSError as error:
            print(f"{server}: {error}")
            continue
        off = time.time() - email.utils.parsedate_to_datetime(headers["Date"]).timestamp()
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} here, {headers['Date']} at {server}")
        if abs(off) > CLOCK_SECONDS:
            raise Fault(f"the clock is {off:+.0f} s off: Google refuses what this host signs, and times in records are wrong")
        return f"{off:+.0f} s off"
    raise NotHere("no server answers to compare with")


def check_network(args):
    """Interfaces, the route to rank 0's host, and the address that gloo will take."""
    import fcntl
    interfaces = {}
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):       # one without an IPv4 address
            interfaces[name] = socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24])     # SIOCGIFADDR
        print(f"{name}: {interfaces.get(name, 'no IPv4 address')}")
    others, master = [], os.environ.get("MASTER_ADDR")
    with contextlib.suppress(OSError):
        others = [entry.split(":")[-1] for entry in (ask_metadata("attributes/worker-network-endpoints") or "").split(",") if entry]
    master = master or (others[0] if others else "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))          # sends nothing
        source = probe.getsockname()[0]
    route = next((name for name, address in interfaces.items() if address == source), "?")
    print(f"hosts of the slice: {', '.join(others) or 'unknown'}; the way to {master} is by {route}, from {source}")
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    try:        # PyTorch lets gloo listen at the address of the host's name, and at 127.0.0.1 where that does not work
        address = interfaces.get(chosen) if chosen else socket.gethostbyname(socket.gethostname())
    except OSError as error:
        address = "127.0.0.1"
        print(f"the host's own name {socket.gethostname()} has no address: {error}")
    interface = chosen or next((name for name, own in interfaces.items() if own == address), "?")
    print(f"gloo will listen at {address}, {interface}" + (", as GLOO_SOCKET_IFNAME says" if chosen else ", the address of the host's name"))
    several = len(others) > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and source != address and not source.startswith("127."):
        raise Fault(f"gloo will listen at {address} ({interface}), and other hosts reach this one at {source} ({route}): export GLOO_SOCKET_IFNAME={route}")
    return f"gloo listens at {address}, {interface}"


# ---------------------------------------------------------------------------------------------------------
# Sections in the kit's environment
# ---------------------------------------------------------------------------------------------------------
def kit(args):
    """The configuration, once the kit's modules can be imported."""
    sys.path[:0] = [str(ROOT), str(ROOT / "analysis"), str(ROOT / "scripts")]
    import utils
    return utils.load_config(args.config, args.overrides)


def check_packages(args):
    """Versions against the requirements files."""
    import importlib.metadata

    from packaging.requirements import InvalidRequirement, Requirement
    config = kit(args)
    from device import resolve_device
    from run_folder import code_version
    commit, dirty = code_version()
    print(f"commit {commit}{', with uncommitted changes' if dirty else ''}; Python {platform.python_version()}, {sys.executable}")
    wrong, count = [], 0
    for file in ("requirements.txt", "requirements-tpu.txt"):
        for line in (ROOT / file).read_text().splitlines():
            try:
                wanted = Requirement(line.partition(" #")[0])
            except InvalidRequirement:
                continue            # a comment, or a flag of pip's
            if wanted.marker and not wanted.marker.evaluate():
                continue
            try:
                found = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                found = None
            print(f"{wanted.name} {found or 'is not installed'} ({file}: {wanted.specifier})")
            count += 1
            if (found is None or not wanted.specifier.contains(found, prereleases=True)) and (file == "requirements.txt" or resolve_device(config.device) == "tpu"):
                wrong.append(f"{wanted.name} {found or '(none)'} in place of {wanted.specifier}")
    if wrong:
        raise Fault(f"{'; '.join(wrong)}: run scripts/setup_tpu.sh again, after rm -r ~/trm/venv on the hosts if that does not help")
    return f"{count} packages as pinned, commit {(commit or 'unknown')[:12]}"


def check_chips(args):
    """What torch_xla sees of this host's chips and of the slice."""
    config = kit(args)
    import utils
    from device import resolve_device
    from torch_xla._internal import tpu
    held = {}
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):          # another user's process, or one that has ended
            if os.readlink(link) in chip_files():
                held[link.split("/")[2]] = Path(f"/proc/{link.split('/')[2]}/cmdline").read_text().replace("\0", " ")
    for pid, command in held.items():
        print(f"process {pid} has a chip open: {command}")
    if os.path.exists("/tmp/libtpu_lockfile"):
        print(f"/tmp/libtpu_lockfile is there, of user {os.stat('/tmp/libtpu_lockfile').st_uid}; this user is {os.getuid()}")
    chips = tpu.num_available_chips()
    print(f"chips on PCI: {chips}")
    if not chips and resolve_device(config.device) != "tpu":
        raise NotHere(f"no chip on this machine, and device = {config.device!r} does not ask for one")
    if not chips:
        raise Fault("device = 'tpu', and this host has no chip: is it a host of a TPU slice, and the image the right one for this kind of chip?")
    print(f"type {tpu.get_tpu_type()}, generation {tpu.version()}, host {tpu.worker_id()}, hosts {', '.join(tpu.get_worker_ips())}")
    print(f"processes on this host: {tpu.num_local_processes()}; tpu-env: "
          + json.dumps({key: value for key, value in tpu.get_tpu_env().items() if key.startswith(("TPU_", "ACCELERATOR", "WORKER"))}))
    here, planned = tpu.num_local_processes() * tpu.num_tpu_workers(), utils.planned_workers(config, "tpu")
    if held:
        raise Fault(f"process {', '.join(held)} has the chips, and one at a time can: stop it (its command is above)")
    if here != planned:
        raise Fault(f"tpu.accelerator_type = {config.tpu.accelerator_type!r} has {planned} chips, and {here} are here: name this slice")
    return f"{chips} of the slice's {here} chips"


def check_bucket(args):
    """Write, read and delete one small object where runs are written."""
    import secrets
    config = kit(args)
    import storage
    import tpu_settings
    bucket, place = tpu_settings.slice_settings(config, args.overrides, [])["TPU_BUCKET"], config.logging.output_dir
    if bucket and not storage.is_remote(place) and not os.path.isabs(place):
        place = tpu_settings.on_slice("logging.output_dir", place, bucket)      # as scripts/launch_experiment.sh does
    if not storage.is_remote(place):
        raise NotHere(f"logging.output_dir = {place!r} is no bucket; on a slice export TPU_BUCKET=gs://...")
    folder, name, data = storage.open_folder(storage.join(place, "diagnose"), deadline=30), f"{HOST}-{secrets.token_hex(4)}", os.urandom(1024)
    taken = []
    for operation in (lambda: folder.write(name, data), lambda: folder.read(name), lambda: folder.delete(name)):
        begun = time.monotonic()
        result = operation()
        taken.append(f"{time.monotonic() - begun:.2f} s")
        if isinstance(result, bytes) and result != data:
            raise Fault(f"{folder.url}/{name}: what is read is not what was written")
    print(f"{folder.url}/{name}: written in {taken[0]}, read in {taken[1]}, deleted in {taken[2]}")
    return f"an object in {folder.url} written, read and deleted"


def check_workers(args):
    """All workers of the slice at once: join, all-reduce, and train a few steps without the TPU kernels and with them."""
    limit = SECTIONS["workers"].seconds - 20
    os.execv(VENV_PYTHON, [str(VENV_PYTHON), "scripts/check_devices.py", "--config", args.config, *args.overrides, "--steps", "--limit", str(limit)])


# ---------------------------------------------------------------------------------------------------------
# A host's report
# ---------------------------------------------------------------------------------------------------------
class Section(NamedTuple):
    check: Callable
    seconds: int            # after which it is ended
    environment: bool       # whether it needs the kit's
    parts: dict             # {what it passes, one after the other: what a failure means}


SECTIONS = {
    "host": Section(check_host, 30, False, {"host": "the machine itself is not as it should be"}),
    "environment": Section(check_environment, 30, False, {"environment": "the variables could not be read"}),
    "metadata": Section(check_metadata, 60, False, {"metadata": "torch_xla and the login to the bucket ask the metadata server: they would fail, too"}),
    "clock": Section(check_clock, 30, False, {"clock": "Google may refuse requests, and the times in records are wrong"}),
    "network": Section(check_network, 30, False, {"network": "the hosts of a slice may not find each other"}),
    "packages": Section(check_packages, 120, True, {"packages": "the environment is not the one that the kit was tested with"}),
    "chips": Section(check_chips, 180, True, {"chips": "torch_xla does not see what the slice should have"}),
    "bucket": Section(check_bucket, 180, True, {"bucket": "a run could not write its checkpoints"}),
    "workers": Section(check_workers, 900, True, {
        "all-reduce": "the workers of all hosts do not work together; where another host has failed its part of the report says why",
        "step": "training does not work on these chips, with or without the TPU kernels",
        "kernels": "training works, but not with the TPU kernels: training.pallas_kernels=false does without them, and a step takes longer"}),
}
KILL_SECONDS = 15           # beyond a section's limit, for it to say where it is
RESULT = re.compile(r"\[(PASS|FAIL|SKIP)\] ([\w-]+): (.*)")
HOST = socket.gethostname() + (f".rank{os.environ['RANK']}" if "RANK" in os.environ else "")     # unique in a slice


class Report:
    """Prints a host's lines, each with a number and its length, so that `collect` can sort and check what several hosts print at once."""

    def __init__(self):
        self.lines, self.failed = 0, False

    def say(self, text):
        for line in redact(text).splitlines():
            self.lines += 1
            sys.stdout.write(f"{MARK} {HOST} {self.lines} {len(line)}: {line}\n")
            sys.stdout.flush()

    def section(self, name, words):
        """Run one section and say what came of it."""
        section = SECTIONS[name]
        self.say(f"----- {name} -----")
        output, status = run_section(name, section, words)
        passed = {}
        for line in output.splitlines():
            match = RESULT.fullmatch(line)
            if match and match[2] in section.parts and match[1] != "FAIL":
                passed[match[2]] = match[0]
        body = [line for line in output.splitlines() if line not in passed.values()]
        if body:
            self.say("\n".join(f"  {line}" for line in body))
        if status and len(passed) == len(section.parts):
            passed.popitem()            # it failed at its very end
        failed = next((part for part in section.parts if part not in passed), None)
        for part, meaning in section.parts.items():
            if part in passed:
                self.say(passed[part])
            elif part == failed:
                self.failed = True
                self.say(f"[FAIL] {part}: {reason(output, status)}\n  what it means: {meaning}")
            else:
                self.say(f"[SKIP] {part}: not reached")


def run_section(name, section, words):
    """(what a section prints, its exit status) of a process of its own, which is ended with all that it has started."""
    python = VENV_PYTHON if section.environment else Path(sys.executable)
    if not os.access(python, os.X_OK):
        return f"error: {python} is not there: run scripts/setup_tpu.sh without --diagnose first", 2
    process = subprocess.Popen([str(python), str(Path(__file__).resolve()), *words, "--section", name], cwd=ROOT, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    try:
        try:
            return process.communicate(timeout=section.seconds + KILL_SECONDS)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0] + f"\nerror: no end within {section.seconds} s, and no word where it is", 1
    finally:
        with contextlib.suppress(ProcessLookupError):       # what it has started goes with it
            os.killpg(process.pid, signal.SIGKILL)


def reason(output, status):
    """Why a section failed, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("Timeout ("):        # faulthandler's
            return f"no end within {line[9:].rstrip(')!')} (hours:minutes:seconds); where it was is above"
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:      # the worker that was first; what others say is that another has failed
        return next((line for line in errors if "another worker" not in line), errors[0])[len("error: "):]
    last = re.sub(r"^([\w.]+\.)?(UserError|RunFailure|StorageError): ", "", lines[-1]) if lines else "nothing was printed"
    return f"signal {-status} ended it; before that: {last}" if status < 0 else last


def run_one(name, args):
    """This process is one section."""
    section = SECTIONS[name]
    faulthandler.dump_traceback_later(section.seconds, exit=True)
    try:
        result = section.check(args)
        print(f"[PASS] {name}: {result}")
    except NotHere as why:
        print(f"[SKIP] {name}: {why}")
    except Fault as fault:
        sys.exit(f"error: {fault}")


def diagnose(words):
    """Work through the sections; the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):      # so that a section under way is ended
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    report = Report()
    report.say(f"===== {HOST}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}: {' '.join(words)}")
    for name in SECTIONS:
        report.section(name, words)
    report.say(f"===== {HOST}: {END}, {'something failed' if report.failed else 'nothing failed'}")
    return 1 if report.failed else 0


# ---------------------------------------------------------------------------------------------------------
# All hosts' reports in one file
# ---------------------------------------------------------------------------------------------------------
MARK, END = "trm-diagnose", "end of the report"
MARKED = re.compile(rf"{MARK} (\S+) (\d+) (\d+): ")


def collect(path, hosts, stream):
    """Sort the lines of `hosts` hosts, as they come in from `stream`, into the file `path`; results are shown at once. The exit status."""
    try:
        file = open(path, "w")
    except OSError as error:
        print(f"error: --collect {path}: no file can be written there ({error.strerror})", file=sys.stderr)
        return 2
    parts, others = {}, []
    with file:
        try:
            for line in stream:
                take(redact(line.rstrip("\r\n")), parts, others)
        except KeyboardInterrupt:
            others.append("(interrupted here)")
        finally:
            names = sorted(parts, key=lambda name: [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)])
            results = [verdict(name, parts[name]) for name in names] + ["a host has sent nothing"] * (hosts - len(names))
            failures = [text for text in results if text]
            summary = [f"{len(names)} of {hosts} host(s); " + ("nothing failed" if not failures else f"{len(failures)} with a failure:"), *failures]
            for text in [*summary, ""] + [line for name in names for line in (*whole(parts[name]), "")] + ["===== what else was said", *others]:
                file.write(f"{text}\n")
    print("\n".join(summary))
    print(f"written: {path}" + (": send us this file; read it first, it names your project, bucket and hosts" if failures else ""))
    return 1 if failures else 0


def take(line, parts, others):
    """Put one line of the stream where it belongs. Hosts may break each other's lines: then it holds several marks, or a part of a line."""
    pieces = MARKED.split(line)
    if pieces[0]:
        others.append(pieces[0])
        print(pieces[0], flush=True)
    for host, number, length, text in zip(*(pieces[k::4] for k in range(1, 5))):
        parts.setdefault(host, {})[int(number)] = text if len(text) == int(length) else f"{text} (damaged on the way)"
        if RESULT.fullmatch(text):
            print(f"{host} {text}", flush=True)


def whole(lines):
    """A host's lines in order, with a note where some are missing."""
    return [lines.get(number, f"(line {number} was lost on the way)") for number in range(1, max(lines) + 1)]


def verdict(name, lines):
    """What failed on this host, or None."""
    texts = whole(lines)
    failed = [f"{match[2]}: {match[3]}" for match in map(RESULT.fullmatch, texts) if match and match[1] == "FAIL"]
    if len(lines) < max(lines) or END not in texts[-1]:
        failed.append("its report is cut off: it ended, or the connection broke")
    return f"{name}: {'; '.join(failed)}" if failed else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML configuration whose first steps are tried")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    parser.add_argument("--collect", metavar="FILE", help="sort what the hosts print, from the standard input, into this file")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="of so many hosts (default: 1)")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.collect:
        return collect(args.collect, args.hosts, sys.stdin)
    if not args.config:
        print("error: --config FILE: say which configuration is to be tried", file=sys.stderr)
        return 2
    if args.section:
        return run_one(args.section, args)
    return diagnose(["--config", os.path.abspath(args.config), *args.overrides])


if __name__ == "__main__":
    sys.exit(main())
