"""The training command where torch_xla is not installed."""

import importlib.util
import sys

sys.modules["torch_xla"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "torch_xla" else find_spec(name)
import train_tpu
import utils

sys.argv[0] = "train_tpu.py"
utils.run_cli(train_tpu.main)
