"""Save the checkpoint of step 2 in the folder argv[1], with the staging folder argv[2]. Its files
may have at most argv[3] bytes, if that is given, as if the disk were full.
"""

import resource
import signal
import sys

import torch

from background_writer import BackgroundWriter
from checkpoint_manager import CheckpointManager
from storage import open_folder
from utils import run_cli


def main():
    folder = open_folder(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if sys.argv[3:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    manager = CheckpointManager(folder, 3, sys.argv[2], BackgroundWriter())
    manager.save(2, {"model": torch.ones(100_000)})
    manager.writer.finish()


run_cli(main)
