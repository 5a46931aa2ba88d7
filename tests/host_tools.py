"""The programs of a host of tests/slice.py: those of this machine, but Python 3.10 as Ubuntu 22.04
has it, with pip and without venv, and a stand-in for the uv that this pip installs. Both know only
what the kit uses of the real ones, and log it in ~/installed.jsonl."""

import collections
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ.get("TRM_TEST_CLOUD", "."))  # no_pip in there: the hosts have none
NO_VENV = """The virtual environment was not created successfully because ensurepip is not
available.  On Debian/Ubuntu systems, you need to install the python3-venv
package using the following command.

    apt install python3.10-venv
"""
# {command: {flag: takes a value}}; that the real uv has them: tests/test_environment.py
UV = {
    "venv": {"--python": True},
    "pip install": {"--python": True, "--torch-backend": True, "--requirements": True},
}
NEEDS = {"jax": (3, 11), "jaxlib": (3, 11)}  # of their Requires-Python
# of the host's: everything but these names. A machine for tests has more Pythons than a TPU VM
MISSING = re.compile(r"(python|pip|pydoc|uv)x?[\d.]*(-config)?|gcloud|gsutil|bq|conda")


def make_programs(folder, environment_python):
    """The folder that is a host's PATH; environment_python: a file, the interpreter of environments
    by the stand-in for uv."""
    folder.mkdir(parents=True)
    for place in ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for path in Path(place).glob("*"):
            if not MISSING.fullmatch(path.name) and not os.path.lexists(folder / path.name):
                (folder / path.name).symlink_to(path)
    write_program(folder / "python3", "python3", environment_python)
    for name in ("apt-get", "apt"):  # a fresh host updates itself, and has apt's locks for minutes
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(
            "#!/bin/sh\necho 'E: Could not get lock /var/lib/apt/lists/lock. It is held by "
            "process 1 (apt-get)' >&2\nexit 100\n"
        )
        (folder / name).chmod(0o755)


def write_program(path, name, environment_python):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {environment_python} "
        f'{name} "$@"\n'
    )
    path.chmod(0o755)


def fail(text, status):
    print(text, file=sys.stderr)
    sys.exit(status)


def log(**what):
    settings = {name: value for name, value in os.environ.items() if re.match("(PIP|UV)_", name)}
    with open(Path.home() / "installed.jsonl", "a") as file:
        file.write(json.dumps({**what, "settings": settings}) + "\n")


def parse(words, known, otherwise):
    """({flag: its values}, the rest) of a command line, every flag of which is known."""
    flags, rest, words = collections.defaultdict(list), [], list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            rest.append(name + equals + value)
        elif name not in known or bool(equals) > known[name]:
            fail(otherwise.format(name), 2)
        else:
            flags[name].append((value if equals else words.pop(0)) if known[name] else True)
    return flags, rest


# ----- Python -----
def python3(environment_python, words):
    match words:
        case ["-m", "pip", *_] if (CLOUD / "no_pip").exists():
            fail("/usr/bin/python3: No module named pip", 1)
        case ["-m", "pip", "--version"]:
            print("pip 22.0.2 from /usr/lib/python3/dist-packages/pip (python 3.10)")
        case ["-m", "pip", "install", *rest]:
            known = {
                "--quiet": False,
                "--disable-pip-version-check": False,
                "--upgrade": False,
                "--target": True,
                "--user": False,
            }
            flags, packages = parse(rest, known, "no such option: {}")
            assert len(packages) == 1 and re.fullmatch(r"uv==[\d.]+", packages[0]), packages
            log(program="pip", flags=flags, packages=packages)
            place = Path(flags["--target"][0]) if flags["--target"] else Path.home() / ".local"
            write_program(place / "bin" / "uv", packages[0], environment_python)
        case ["-m", "venv", *_]:
            print(NO_VENV)
            sys.exit(1)
        case ["-m", "ensurepip", *_]:
            fail("/usr/bin/python3: No module named ensurepip", 1)
        case ["--version"]:
            print("Python 3.10.12")
        case ["-c", code, *rest]:
            pretend(["-c", *rest])
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *rest] if not script.startswith("-"):
            pretend([script, *rest])
            sys.path.insert(0, str(Path(script).resolve().parent))  # as an interpreter does
            runpy.run_path(script, run_name="__main__")
        case _:
            fail(f"the host's python3 does not know {words}", 2)


def pretend(argv):
    """What this interpreter says of itself is 3.10, without venv."""
    info = collections.namedtuple("version_info", "major minor micro releaselevel serial")
    sys.argv, sys.version_info, sys.version = argv, info(3, 10, 12, "final", 0), "3.10.12 (main)"
    sys.modules["venv"] = sys.modules["ensurepip"] = None


# ----- uv -----
def uv(version, environment_python, words):
    if words == ["--version"]:
        return print(f"uv {version} (x86_64-unknown-linux-gnu)")
    command = next((name for name in UV if words[: len(name.split())] == name.split()), None)
    if command is None:
        fail(f"error: unrecognized subcommand {words}", 2)
    flags, rest = parse(
        words[len(command.split()) :], UV[command], "error: unexpected argument '{}' found"
    )
    log(program="uv", command=command, flags=flags, rest=rest)
    if command == "venv":
        make_venv(flags["--python"][0], Path(*rest), environment_python)
    else:
        assert not rest, rest
        install(flags)


def make_venv(python, folder, environment_python):
    if folder.exists() and any(folder.iterdir()):
        fail(
            f"error: Failed to create virtual environment\n  cause: A directory already exists "
            f"at: {folder}",
            2,
        )
    if not re.fullmatch(r"3\.\d+", python):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        python = subprocess.run(
            [python, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(f"uv = stand-in\nversion_info = {python}\n")
    shutil.copy(environment_python, folder / "bin" / "python")


def install(flags):
    folder = Path(flags["--python"][0]).parent.parent
    version = tuple(
        int(part)
        for part in re.search(r"version_info = (\S+)", (folder / "pyvenv.cfg").read_text())[
            1
        ].split(".")
    )
    if flags["--torch-backend"] not in ([], ["cpu"]):
        fail(
            f"error: invalid value '{flags['--torch-backend'][0]}' for '--torch-backend "
            "<TORCH_BACKEND>'",
            2,
        )
    for path in flags["--requirements"]:
        for name in re.findall(r"^([\w.-]+)==", Path(path).read_text(), re.MULTILINE):
            if version < (needs := NEEDS.get(name, (3, 10))):
                fail(
                    "error: No solution found when resolving dependencies\n  cause: Because the "
                    "current Python version "
                    f"({'.'.join(map(str, version))}) does not satisfy "
                    f"Python>={'.'.join(map(str, needs))} ...",
                    1,
                )
        with open(
            folder / "files", "a"
        ) as file:  # for the check of the environment, by environment_python
            file.write(path + "\n")


if __name__ == "__main__":
    interpreter, program, *arguments = sys.argv[1:]
    if program == "python3":
        python3(interpreter, arguments)
    else:
        uv(program.removeprefix("uv=="), interpreter, arguments)
