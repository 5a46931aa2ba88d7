"""analysis/tpu_children.py with the child argv[1]/child.py."""

import sys
from pathlib import Path

sys.path[:0] = [".", "analysis"]
import tpu_children

folder = Path(sys.argv[1])
tpu_children.run_child("compiling", [folder / "child.py"], folder, memory_gib=1, minutes=1)
