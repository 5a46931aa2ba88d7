"""What every command imports first: one message if a package is missing, and a quiet Ctrl-C.

A command that begins with `import torch` ends in a traceback if the environment is not active. It
also does if Ctrl-C comes during the seconds that this import takes.
"""

import importlib.util
import sys

PACKAGES = ("numpy", "yaml")


def require(*packages: str) -> None:
    """Exit with status 2 and a message if one of these packages (import names) is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {', '.join(missing)} not installed for {sys.executable}: activate the "
            "environment by `. .venv/bin/activate`; if there is none yet, "
            "`bash scripts/quickstart.sh` makes it",
            file=sys.stderr,
        )
        sys.exit(2)


def _quiet_on_interrupt(kind, error, trace):
    """A sys.excepthook that prints one line for Ctrl-C, and any other traceback as usual."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.stderr.flush()
        return
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_on_interrupt
require(*PACKAGES)
