"""For the tests of sweeps: real launchers, with a training that does what a test says in place of the real one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from storage import join, open_folder
from tests.helpers import ROOT, TINY, FolderTest, write_config

# the launcher with another training, without its looks at datasets, and with short times. argv: host, training, then its own
LAUNCHER = """
import os, sys
host, training = sys.argv[1:3]
sys.argv = ["sweep.py", *sys.argv[3:]]
sys.path.insert(0, "scripts")
import run_lock, sweep, sweep_ledger, utils
# what is watched for whether it is alive renews more often than that: a busy machine may be late
sweep_ledger.BEAT_SECONDS, sweep.LOOK_SECONDS, run_lock.GRACE_SECONDS = 0.2 if host else 1.0, 0.1, 0.2
sweep_ledger.DEADLINE_SECONDS = float(os.environ.get("TRM_TEST_DEADLINE", 10))
if host:
    run_lock.socket.gethostname = lambda: host
    sweep.now = lambda: "2222-02-22 22:22:22 UTC"       # its clock is wrong
if training != "slow":
    sweep.check_datasets, sweep.check_slices, real = lambda cells: None, lambda cells, slices, flags: None, sweep.command

    def fake(cell, slot, flags):
        own = [cell.name, cell.url, slot.name if slot else "None"]
        return [sys.executable, training, *own, *real(cell, slot, flags)]
    sweep.command = fake
else:
    slow = [sys.executable, "tests/slow_train.py", "--config"]
    sweep.command = lambda cell, slot, flags: [*slow, cell.path, "--run_name", cell.name, *cell.overrides, *flags]
utils.run_cli(sweep.main)
"""

# a training that does what $TRM_TEST_PLAN, JSON {run name: [what, of each start]}, says, and then finishes
FAKE = """
import json, os, signal, sys, time
sys.path.insert(0, os.getcwd())
from storage import join, open_folder
name, url, slot, *command = sys.argv[1:]
signal.alarm(120)
home, starts, plan = open_folder(url), os.environ["TRM_TEST_STARTS"], json.loads(os.environ["TRM_TEST_PLAN"]).get(name, [])

def told(*_):
    print("SIGTERM", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, told)
print("threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
with open(f"{starts}.commands", "a") as file:
    print(name, *command[2:], file=file)
with open(starts, "a") as file:
    file.write(f"{name} {os.getpid()} {slot}\\n")
count = open(starts).read().split().count(name)
action = plan[count - 1] if count <= len(plan) else "finish"
if action == "locked":          # holds the run, as a real one
    import run_lock
    lock = run_lock.RunLock(home)
if action == "refused":         # when another has got the run
    while "run.lock" not in home.list():
        time.sleep(0.01)
    print("error: another training holds this run", file=sys.stderr)
    sys.exit(2)
if action in ("wait", "locked"):
    while os.path.exists(f"{starts}.wait"):
        time.sleep(0.01)
if action == "attach":          # to a run that goes on on its slice
    while "run.lock" in home.list():
        time.sleep(0.01)
if slot != "None":              # one at a time on a slice
    os.close(os.open(f"{starts}.{slot}", os.O_CREAT | os.O_EXCL))
    time.sleep(1)
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
    print("step 3: as it should be\\nerror: the loss is not finite", flush=True)
    sys.exit(2)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
home.write("metrics.jsonl", b'{"step": 60, "train_seconds": 5400}\\n{"ste')
home.write("eval.json", json.dumps({"results": [{"weights": "ema", "exact_accuracy": 0.875}, {"weights": "raw", "exact_accuracy": 0.5}]}).encode())
if action == "locked":
    lock.release()
"""


class SweepTest(FolderTest):
    """Sweeps over configs a, b, ... in self.folder, with the fake training; the runs and the ledger are in self.out."""

    def setUp(self):
        super().setUp()
        self.out = str(self.folder / "runs")
        self.starts_file, self.wait_file = self.folder / "starts", self.folder / "starts.wait"
        self.commands_file = self.folder / "starts.commands"
        self.starts_file.touch(), self.wait_file.touch()
        self.fake, self.plan = self.folder / "fake.py", {}
        self.fake.write_text(FAKE)

    def configs(self, names="ab"):
        return [
            str(
                write_config(
                    self.folder / f"{name}.yaml", TINY.format(data="nowhere", out=self.out)
                )
            )
            for name in names
        ]

    def begin(self, *arguments, host="", training=None, **environment):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TRM_TEST_STARTS": str(self.starts_file),
            "TRM_TEST_PLAN": json.dumps(self.plan),
            **environment,
        }
        command = [sys.executable, "-c", LAUNCHER, host, training or str(self.fake), *arguments]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.communicate()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def ends(self, process, status=0):
        output, _ = process.communicate(timeout=60)
        self.assertEqual(process.returncode, status, output)
        self.assertNotIn("Traceback", output)
        return output

    def sweep(self, *arguments, status=0, **options):
        return self.ends(self.begin(*arguments, **options), status)

    def pids(self, name=""):
        return [
            int(line.split()[1])
            for line in self.starts_file.read_text().splitlines()
            if line.startswith(name)
        ]

    def starts(self):
        names = [line.split()[0] for line in self.starts_file.read_text().splitlines()]
        return {name: names.count(name) for name in sorted(names)}

    def state(self, name):
        return json.loads(open_folder(join(self.out, "sweep")).read(f"{name}/state.json"))

    def states(self, *names):
        return [self.state(name)["state"] for name in names]

    def log(self, name):
        return (self.folder / "runs" / "sweep" / name / "output.log").read_text()

    def commands(self, name):
        """The real command of each of its attempts, from the configuration on."""
        lines = self.commands_file.read_text().splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def lock_owner(self, run):
        try:
            return json.loads(run.read("run.lock"))["pid"]
        except FileNotFoundError:
            return None

    def until(self, condition, process=None):
        end = time.monotonic() + 60
        while not condition():
            if time.monotonic() > end or (process and process.poll() is not None):
                self.fail(f"this did not come about: {process and process.communicate()[0]}")
            time.sleep(0.01)

    def row(self, output, name):
        return next(line.split() for line in output.splitlines() if line.split()[:1] == [name])
