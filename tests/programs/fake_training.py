"""A training that does what $TRM_TEST_PLAN, JSON {run name: [what, of each start]}, says, and then
finishes. argv: run name, its folder, the slice or "None", its configuration in JSON, the real
command.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import run_lock
from config import config_from_dict, config_yaml
from storage import open_folder

name, url, slot, config, *command = sys.argv[1:]
starts = os.environ["TRM_TEST_STARTS"]
home = open_folder(url)


def on_sigterm(*_):
    print("SIGTERM", flush=True)
    sys.exit(143)


def wait_while(condition):
    while condition():
        time.sleep(0.01)


signal.alarm(120)
signal.signal(signal.SIGTERM, on_sigterm)
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
with open(f"{starts}.commands", "a") as file:
    print(name, *command[2:], file=file)
with open(starts, "a") as file:
    file.write(f"{name} {os.getpid()} {slot}\n")
plan = json.loads(os.environ["TRM_TEST_PLAN"]).get(name, [])
count = Path(starts).read_text().split().count(name)
action = plan[count - 1] if count <= len(plan) else "finish"
home.write("config.yaml", config_yaml(config_from_dict(json.loads(config), "argv")).encode())
if action == "locked":  # it holds the run, as a real one does
    lock = run_lock.RunLock(home)
if action == "refused":  # once another one has got the run
    wait_while(lambda: "run.lock" not in home.list())
    print("error: another training holds this run", file=sys.stderr)
    sys.exit(2)
if action in ("wait", "locked"):
    wait_while(lambda: os.path.exists(f"{starts}.wait"))
if action == "attach":  # to a run that goes on on its slice
    wait_while(lambda: "run.lock" in home.list())
if slot != "None":  # one at a time on a slice
    os.close(os.open(f"{starts}.{slot}", os.O_CREAT | os.O_EXCL))
    time.sleep(0.5)
    os.unlink(f"{starts}.{slot}")
if action == "no quota":
    print("error: Google Cloud: p has no quota for v6e-16", file=sys.stderr)
    sys.exit(2)
if action == "mumble":
    print("error: the first attempt's", file=sys.stderr)
    sys.exit(1)
if action == "nothing":
    sys.exit()
if action == "mistake":
    print("step 3: as it should be\nerror: the loss is not finite", flush=True)
    sys.exit(2)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
record = {"step": 60, "split": "train", "epoch": 6.0, "train_seconds": 5400}
home.write("metrics.jsonl", json.dumps(record).encode() + b'\n{"ste')
results = [
    {"weights": weights, "step": 60, "exact_accuracy": accuracy}
    for weights, accuracy in (("ema", 0.875), ("raw", 0.5))
]
home.write("eval.json", json.dumps({"results": results}).encode())
if action == "locked":
    lock.release()
