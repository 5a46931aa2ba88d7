"""Check that each package that requirements files pin is installed in that version, and imports.

    python scripts/check_environment.py requirements.txt requirements-tpu.txt

It imports no part of the kit, because a package that the kit needs may be what is broken. On a TPU
host it does not take the chips.
"""

import importlib
import importlib.metadata
import os
import re
import sys

# Importing torch_xla and jax opens no device today. If a later version did, it would open the CPU
# with these settings, and leave the chips alone.
os.environ.update(JAX_PLATFORMS="cpu", PJRT_DEVICE="CPU")


def pinned(path):
    """The requirements (packaging.requirements.Requirement) of a file that hold on this machine."""
    from packaging.requirements import Requirement

    with open(path) as file:
        found = [Requirement(text) for line in file if (text := line.partition("#")[0].strip())]
    return [
        requirement
        for requirement in found
        if requirement.marker is None or requirement.marker.evaluate()
    ]


def modules_of(distribution):
    """The modules to import of an importlib.metadata.Distribution.

    These are the packages that lie in no other package; of google-cloud-storage this is
    google.cloud.storage. If one of them has the distribution's own name, it is the only one:
    torch_xla also installs others, which need more to be imported.
    """
    folders = {str(path.parent) for path in distribution.files if path.name == "__init__.py"}
    tops = sorted(
        folder for folder in folders if not any(folder.startswith(other + "/") for other in folders)
    )
    same = [
        top
        for top in tops
        if re.sub("[_./]", "-", top).lower() == re.sub("[-_.]+", "-", distribution.name).lower()
    ]
    return [top.replace("/", ".") for top in same or tops]


def problem(requirement):
    """What is wrong with the package, or None."""
    try:
        distribution = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
    if not requirement.specifier.contains(distribution.version, prereleases=True):
        return f"has version {distribution.version}"
    for module in modules_of(distribution):
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as reason:
            return f"does not import ({type(reason).__name__}: {' '.join(str(reason).split())})"
    return None


def main():
    problems = []
    try:
        # the name is printed before the import, so that it is known if the import kills Python
        print("environment: checking that each package imports:", end="", flush=True)
        for requirement in [requirement for path in sys.argv[1:] for requirement in pinned(path)]:
            print(f" {requirement.name}", end="", flush=True)
            if found := problem(requirement):
                problems.append(f"{requirement} {found}")
    except ImportError as reason:
        problems.append(f"packaging does not import ({reason})")
    print(flush=True)
    if problems:
        folders = [folder for folder in (sys.prefix, f"{sys.prefix}-uv") if os.path.exists(folder)]
        print(
            f"error: {sys.prefix}: {'; '.join(problems)}: rm -r {' '.join(folders)}, then the same "
            "command again",
            file=sys.stderr,
        )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
