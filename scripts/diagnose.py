#!/usr/bin/env python3
"""Find out what works on the hosts of a TPU slice and what does not, and write it into one file.

    # on every host of a slice at the same time:
    bash scripts/tpu_host.sh diagnose --config configs/e1_1.yaml
    # this machine:
    python3 scripts/diagnose.py --config configs/quickstart.yaml
    # what all hosts print, into one file:
    ... | python3 scripts/diagnose.py --collect trm_diagnose.txt --hosts 8

Each host works through the same sections (scripts/diagnose_sections.py). A section runs in a
process of its own with a time limit, as the TPU runtime may hang or end its process; the next one
comes anyway. It ends with PASS, with FAIL and the reason, or with SKIP where it does not apply. The
exit status is 0 if nothing failed, otherwise 1.

It needs the standard library alone: it reports from a host whose environment is missing, and
collects on a machine without PyTorch. What looks like a token, a key or a password is taken out of
every line before it is printed.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from diagnose_sections import HOST, ROOT, SECTIONS, VENV_PYTHON

# At its time limit a section prints where it is, and ends. If it does not end, it is killed so many
# seconds later.
KILL_SECONDS = 15
MARK, END = "trm-diagnose", "end of the report"
MARKED = re.compile(rf"{MARK} (\S+) (\d+) (\d+): ")  # host, line, its length
DAMAGED, LOST = " (damaged on the way)", " (lost on the way)"
RESULT = re.compile(r"\[(PASS|FAIL|SKIP)\] ([\w-]+): (.*)")

# --------------------------------------------------------------------------------------------------
# Secrets
# --------------------------------------------------------------------------------------------------
_NAME = (
    r"[\w.-]*(?:token|secret|passwo?r?d|credential|api_?key|authorization|cookie|signature)[\w.-]*"
    r"|[\w.-]*[_.-]key|key"
)
_PATTERNS = (
    (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", "(redacted)"),
    # a name that sounds like a secret, and its value
    (
        rf"(?i)(?<![\w.-])({_NAME})([\"']?\s*[=:]\s*)"
        r"(?:\"[^\"\n]*\"|'[^'\n]*'|(?:bearer |basic )?[^\s,;]+)",
        r"\1\2(redacted)",
    ),
    (r"(?i)\b(bearer|basic) +[\w.~+/=-]{8,}", r"\1 (redacted)"),
    (r"(\w://)[^/\s@]+@", r"\1(redacted)@"),
    # the beginnings of keys of Google, Hugging Face, GitHub, GitLab, Amazon, Slack, and of JSON web
    # tokens
    (
        r"\b(?:ya29\.|1//|AIza|GOOG1|GOCSPX-|hf_|gh[oprsu]_|github_pat_|glpat-|AKIA|xox[bp]-|sk-|eyJ)[\w.-]{12,}",
        "(redacted)",
    ),
    # long, of small and capital letters and digits: not a path, a commit, a checksum or a mangled
    # name of C++
    (
        r"(?<![\w./+-])(?!_Z)(?=[\w+-]*[a-z])(?=[\w+-]*[A-Z])(?=[\w+-]*\d)[\w+-]{40,}={0,2}(?![\w./+-])",
        "(redacted)",
    ),
)
SECRETS = [(re.compile(pattern, re.DOTALL), instead) for pattern, instead in _PATTERNS]


def redact(text):
    """`text` with everything that looks like a token, a key, a password or a cookie replaced by
    "(redacted)"."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


# --------------------------------------------------------------------------------------------------
# The report of a host
# --------------------------------------------------------------------------------------------------
class Report:
    """Prints each line with its host, number and length, by which `collect` sorts and checks what
    hosts print."""

    def __init__(self):
        self.lines, self.failed = 0, False

    def say(self, text):
        for line in redact(text).splitlines():
            self.lines += 1
            sys.stdout.write(f"{MARK} {HOST} {self.lines} {len(line)}: {line}\n")
            sys.stdout.flush()

    def section(self, name, words):
        """Run one section, and say what came of it."""
        parts = SECTIONS[name].parts
        self.say(f"----- {name} -----")
        output, status = run_section(name, words)
        passed = {}
        for line in output.splitlines():
            result = RESULT.fullmatch(line)
            if result and result[2] in parts:
                passed[result[2]] = line
            else:
                self.say(f"  {line}")
        if status and len(passed) == len(parts):
            passed.popitem()  # it failed after its last part had passed
        failed = next((part for part in parts if part not in passed), None)
        for part, meaning in parts.items():
            if part in passed:
                self.say(passed[part])
            elif part == failed:
                self.failed = True
                self.say(f"[FAIL] {part}: {reason(output, status)}\n  what it means: {meaning}")
            else:
                self.say(f"[SKIP] {part}: not reached")


def run_section(name, words):
    """Run a section in a process of its own; returns (what it printed, its exit status).

    words: its command line after the name. All processes that it has started are killed at the end.
    """
    section = SECTIONS[name]
    python = str(VENV_PYTHON if section.environment else sys.executable)
    if not os.access(python, os.X_OK):
        return f"error: {python} is not there: scripts/setup_tpu.sh installs the environment", 2
    process = subprocess.Popen(
        [python, str(ROOT / "scripts" / "diagnose_sections.py"), name, *words],
        cwd=ROOT,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def end():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    try:
        return process.communicate(timeout=section.seconds + KILL_SECONDS)[0], process.returncode
    except subprocess.TimeoutExpired:
        end()
        return process.communicate()[
            0
        ] + f"\nerror: no end within {section.seconds} s, and it did not say where it was", 1
    finally:
        end()


def reason(output, status):
    """Why a section failed, in one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
    if errors:  # prefer the error of the worker that failed first: others report only that
        return next((line for line in errors if "another worker" not in line), errors[0])
    for line in lines:
        if line.startswith("Timeout ("):  # faulthandler's
            limit = line[9:].rstrip(")!")
            return f"no end within {limit} (hours:minutes:seconds); where it was is above"
    last = lines[-1] if lines else "nothing was printed"
    last = re.sub(r"^([\w.]+\.)?(UserError|RunFailure|StorageError): ", "", last)
    return f"signal {-status} ended it; before that: {last}" if status < 0 else last


def diagnose(words):
    """Work through the sections, each with the arguments `words`; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a section under way is ended, too
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    report = Report()
    report.say(
        f"===== {HOST}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}: {' '.join(words)}"
    )
    for name in SECTIONS:
        report.section(name, words)
    report.say(f"===== {HOST}: {END}, {'something' if report.failed else 'nothing'} failed")
    return 1 if report.failed else 0


# --------------------------------------------------------------------------------------------------
# All hosts' reports in one file
# --------------------------------------------------------------------------------------------------
def collect(path, hosts, stream):
    """Sort the lines of `hosts` hosts, as they come in from `stream`, into the file `path`; what
    passed and failed is printed at once. Returns the exit status."""
    try:
        file = open(path, "w")
    except OSError as error:
        print(
            f"error: --collect {path}: no file can be written there ({error.strerror})",
            file=sys.stderr,
        )
        return 2
    parts, others = {}, []
    with file:
        try:
            for line in stream:
                sort_in(redact(line.rstrip("\r\n")), parts, others)
        except KeyboardInterrupt:
            others.append("(interrupted)")
        # w-2 before w-10
        names = sorted(
            parts, key=lambda name: [(len(s) * s.isdigit(), s) for s in re.split(r"(\d+)", name)]
        )
        failures = [
            f"{name}: {'; '.join(failed)}" for name in names if (failed := failures_in(parts[name]))
        ]
        failures += ["a host has sent nothing"] * (hosts - len(names))
        what = f"{len(failures)} with a failure:" if failures else "nothing failed"
        summary = [f"{len(names)} of {hosts} host(s); {what}", *failures]
        reports = [line for name in names for line in ("", *in_order(parts[name]))]
        file.write(
            "".join(
                f"{line}\n"
                for line in (*summary, *reports, "", "===== what else was said", *others)
            )
        )
    print("\n".join(summary))
    advice = (
        ": read it (it names your project, bucket and hosts), and send it to us" if failures else ""
    )
    print(f"written: {path}{advice}")
    return 1 if failures else 0


def sort_in(line, parts, others):
    """Add one line of the stream to `parts`, {host: {line number: text}}, or to `others`.

    The lines of two hosts may run into each other. Then one line of the stream contains the marks
    of several lines, or only a part of a line.
    """
    first, *pieces = MARKED.split(line)
    if first:
        others.append(first)
        print(first, flush=True)
    for host, number, length, text in zip(*(pieces[k::4] for k in range(4))):
        damage = "" if len(text) == int(length) else DAMAGED
        parts.setdefault(host, {})[int(number)] = text + damage
        if RESULT.fullmatch(text):
            print(f"{host} {text}{damage}", flush=True)


def in_order(lines):
    """The texts of {line number: text}, with a note where one is missing."""
    return [lines.get(number, f"(line {number}){LOST}") for number in range(1, max(lines) + 1)]


def failures_in(lines):
    """What failed on a host, a text each."""
    texts = in_order(lines)
    failed = [
        f"{result[2]}: {result[3]}"
        for result in map(RESULT.fullmatch, texts)
        if result and result[1] == "FAIL"
    ]
    if broken := sum(text.endswith((DAMAGED, LOST)) for text in texts):
        failed.append(f"{broken} line(s) of its report were lost or damaged on the way")
    if END not in lines[max(lines)]:
        failed.append("its report is cut off: the host or the connection went")
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML configuration whose first steps are tried"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configuration"
    )
    parser.add_argument(
        "--collect",
        metavar="FILE",
        help="sort what hosts print, from standard input, into this file",
    )
    parser.add_argument(
        "--hosts",
        type=int,
        default=1,
        metavar="N",
        help="with --collect: how many hosts there are (default: 1)",
    )
    args = parser.parse_intermixed_args()
    if args.collect:
        return collect(Path(args.collect), args.hosts, sys.stdin)
    if not args.config:
        print("error: --config FILE is not given: name the configuration to try", file=sys.stderr)
        return 2
    return diagnose(["--config", os.path.abspath(args.config), *args.overrides])


if __name__ == "__main__":
    sys.exit(main())
