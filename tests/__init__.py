"""Tests of the kit. They import what lies in scripts/ and analysis/ as the commands there do."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "analysis")]
