"""The test modules side by side, each in a process of its own: what scripts/run_tests.sh calls.

    python -m tests.suite [--fast] [--jobs N]

It needs nothing but Python's standard library, and prints one line for each module as it ends, the
whole output of each that fails, and at the end the tests that took longest.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the seconds that a module takes on an idle machine, if more than 10: what takes longest begins
# first, so that the last process to end is a short one
SECONDS = {
    "test_faults": 290,
    "test_preemption": 267,
    "test_scripts": 194,
    "test_tpu_report": 194,
    "test_cloud_faults": 179,
    "test_xla": 152,
    "test_workers": 142,
    "test_sweep_slices": 133,
    "test_keep_alive": 131,
    "test_sweep": 128,
    "test_gcs_runs": 113,
    "test_diagnose": 98,
    "test_rehearsal": 98,
    "test_parity": 95,
    "test_pallas_kernels": 78,
    "test_resume": 45,
    "test_docs": 72,
    "test_environment": 72,
    "test_sweep_grid": 42,
    "test_commands": 39,
    "test_analysis_figures": 38,
    "test_checkpoint_manager": 38,
    "test_analysis": 27,
    "test_solve": 23,
    "test_tpu_types": 20,
    "test_benchmark": 19,
    "test_storage": 16,
    "test_model": 16,
    "test_run_lock": 15,
    "test_sudoku_dataset": 14,
    "test_end_to_end": 12,
    "test_parity.ParityTest": 40,
}
# what is tested without the cloud, a TPU's compiler or figures, with requirements.txt alone:
# modules, or classes of a module, which share a process
FAST = [
    "test_architecture",
    "test_checkpoint_manager.LocalBeforeTheMarker,LocalDamage,LocalSavingAndFinding",
    "test_commands",
    "test_config",
    "test_data_loader",
    "test_docs.Messages,Names",
    "test_end_to_end",
    "test_metrics_logger",
    "test_model",
    "test_old_run",
    "test_optimizers",
    "test_parity.ParityTest",
    "test_processes",
    "test_resume",
    "test_run_lock.Judgements,LocalLocks,Renewals",
    "test_storage.LocalFolders",
    "test_study.Curriculum,EarlyStop,Loss",
    "test_sudoku",
    "test_workers.Statuses",
]
SLOWEST_SHOWN = 20
MODULE_MINUTES = 15


class TimedResult(unittest.TextTestResult):
    """Also writes the seconds of each test to the file that $TRM_TEST_TIMES names."""

    def startTest(self, test):
        self.began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        super().stopTest(test)
        with open(os.environ["TRM_TEST_TIMES"], "a") as file:
            file.write(f"{time.monotonic() - self.began:.3f} {test.id()}\n")


def run_here(name):
    """Run one module, or some of its classes, in this process."""
    runner = unittest.TextTestRunner(resultclass=TimedResult)
    module, _, classes = name.partition(".")
    names = [f"tests.{module}.{one}".rstrip(".") for one in classes.split(",")]
    unittest.main(None, argv=["unittest", *names], testRunner=runner)


def run_module(name, times):
    """Run one module in a process; returns (whether it passed, its seconds, its output)."""
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.suite", "--module", name]
    environment = {**os.environ, "TRM_TEST_TIMES": str(times)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60 * MODULE_MINUTES,
        )
        output, passed = done.stdout, done.returncode == 0
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"") + f"\nended after {MODULE_MINUTES} minutes\n".encode()
        passed = False
    text = output.decode(errors="replace")
    if passed and not re.search("^Ran [1-9]", text, re.MULTILINE):
        return False, time.monotonic() - began, text + "no test ran\n"
    return passed, time.monotonic() - began, text


def summary(output, passed):
    """unittest's last lines as counts: tests that passed, failed and were skipped.

    A module that ended before unittest could count has one failure.
    """

    ran = re.findall(r"^Ran (\d+) tests?", output, re.MULTILINE)
    last_line = output.splitlines()[-1] if output else ""
    of = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", last_line)}
    failed = of.get("failures", 0) + of.get("errors", 0) or int(not passed)
    skipped = of.get("skipped", 0)
    count = int(ran[-1]) if ran else 0
    return Counter(passed=max(0, count - failed - skipped), failed=failed, skipped=skipped)


def run_modules(names, jobs):
    """Run the modules, `jobs` of them at a time; returns how many tests passed, failed and were
    skipped, and the names of the modules that failed."""
    began = time.monotonic()
    names = sorted(names, key=lambda name: (-SECONDS.get(name, 10), name))
    failed, total = [], Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        times = Path(folder) / "times"
        times.touch()
        running = {pool.submit(run_module, name, times): name for name in names}
        for future in concurrent.futures.as_completed(running):
            name, (passed, seconds, output) = running[future], future.result()
            if not passed:
                failed.append(name)
                print(f"----- {name}\n{output}-----")
            counts = summary(output, passed)
            total += counts
            word = "passed" if passed else "FAILED"
            print(f"{word} {seconds:6.1f} s  {name} ({in_words(counts)})", flush=True)
        lines = sorted(times.read_text().splitlines(), key=lambda line: -float(line.split()[0]))
    print("the tests that took longest:", *lines[:SLOWEST_SHOWN], sep="\n  ")
    print(f"{len(names)} modules in {time.monotonic() - began:.0f} s")
    return total, sorted(failed)


def in_words(counts):
    """ "12 passed, 0 failed, 1 skipped"; the skipped ones only where there are any."""
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    return f"{counts['passed']} passed, {counts['failed']} failed{skipped}"


def main():
    parser = argparse.ArgumentParser(prog="tests.suite", allow_abbrev=False)
    parser.add_argument("--fast", action="store_true", help="only the modules of FAST")
    parser.add_argument(
        "--jobs",
        type=int,
        help="modules at a time (default: one more than there are cores, at most 4)",
    )
    parser.add_argument("--module", help="run this one here (used by the suite itself)")
    args = parser.parse_args()
    if args.module:
        return run_here(args.module)
    # one more than there are cores: many tests wait
    jobs = args.jobs or min(4, len(os.sched_getaffinity(0)) + 1)
    names = FAST if args.fast else [path.stem for path in (ROOT / "tests").glob("test_*.py")]
    total, failed = run_modules(names, jobs)
    print(in_words(total))
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
