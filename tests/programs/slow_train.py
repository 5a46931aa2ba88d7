"""The real command, that tells where it is and can pause there: for tests whose signals must meet
it in a given place.

    python tests/programs/slow_train.py --config ...

environment: TRM_TEST_PAUSES, JSON {place: seconds, or a path: the n-th time while there is a file
path.n}: places are train_step, evaluate, save, upload; TRM_TEST_ARRIVALS, a file to which each
arrival at one of them is appended as "place rank pid"; TRM_TEST_DAYS, JSON [days], if set: the wall
clock of worker k is wrong by so much, now ahead and now behind; TRM_TEST_GCS, if set: seconds of an
attempt; uploads are in sessions at almost any size; TRM_TEST_BEAT, if set: seconds between two
signs of life; the command's parent waits 2 s for the other workers once one has ended.
"""

import itertools
import json
import os
import sys
import time

import checkpoint_manager
import evaluation
import preemption
import run_folder
import train_state
import train_tpu
import workers
from utils import run_cli

PAUSES = json.loads(os.environ["TRM_TEST_PAUSES"])
# host_batch: what each step begins with; train_step itself is called once on XLA
PLACES = {
    "train_step": (train_state.TrainState, "host_batch"),
    "evaluate": (evaluation, "evaluate"),
    "save": (checkpoint_manager.torch, "save"),
    "upload": (run_folder.RunFolder, "_upload_records"),
}


class SlowWorker:
    """train_worker with the pauses: an object, so that workers of their own processes get it
    too."""

    def __call__(self, rank, config, args):
        for place, pause in PAUSES.items():
            owner, name = PLACES[place]
            setattr(owner, name, paused(place, pause, rank, getattr(owner, name)))
        if days := json.loads(os.environ.get("TRM_TEST_DAYS", "[]")):
            signs, right = itertools.cycle((1, -1)), time.time
            time.time = lambda: right() + 86400 * days[rank] * next(signs)
        if "TRM_TEST_GCS" in os.environ:
            import google.cloud.storage.blob

            google.cloud.storage.blob._MAX_MULTIPART_SIZE = 100_000
            run_folder.SAVE_SECONDS = float(os.environ["TRM_TEST_GCS"])
        if "TRM_TEST_BEAT" in os.environ:
            preemption.BEAT_SECONDS = float(os.environ["TRM_TEST_BEAT"])
        return train_worker(rank, config, args)


def paused(place, pause, rank, function):
    arrivals = itertools.count(1)

    def call(*args, **kwargs):
        hold = f"{pause}.{next(arrivals)}"
        with open(os.environ["TRM_TEST_ARRIVALS"], "a") as file:
            file.write(f"{place} {rank} {os.getpid()}\n")
        if isinstance(pause, str):
            while os.path.exists(hold):
                time.sleep(0.01)
        else:
            time.sleep(pause)
        return function(*args, **kwargs)

    return call


train_worker = train_tpu.train_worker
if __name__ == "__main__":
    sys.argv[0] = "train_tpu.py"
    if "TRM_TEST_BEAT" in os.environ:
        workers.END_TOGETHER_SECONDS = 2
    train_tpu.train_worker = SlowWorker()
    run_cli(train_tpu.main)
