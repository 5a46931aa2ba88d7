"""What the commands of this folder import first.

It puts the kit's own folder on the path, so that the commands run from any folder.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import startup


def require(*packages: str) -> None:
    """End with status 2 and one line unless torch and these packages are installed.

    packages: names to import, of requirements-analysis.txt. The environment that
    scripts/quickstart.sh makes does without them, so they have a message of their own.
    """
    startup.require("torch")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {', '.join(missing)} not installed for {sys.executable}: "
            f"{sys.executable} -m pip install -r requirements-analysis.txt",
            file=sys.stderr,
        )
        sys.exit(2)
