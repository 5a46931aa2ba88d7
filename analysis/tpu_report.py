"""What a TPU slice would do with a configuration, on a machine that has none.

    python analysis/tpu_report.py --config configs/e1_1.yaml --accelerator v4-64
    python analysis/tpu_report.py --config configs/e1_1.yaml --accelerator v6e-16 --json out.json \
        model.hidden_size=1024
    python analysis/tpu_report.py --config configs/e*.yaml --accelerator v4-64

The last command prints the whole study as one table.

The report traces the training step and the evaluation step as one worker of the slice, and compiles
both with the compiler of a TPU VM (about a minute each on one core). It says whether they compile
and fit, what the compiler expects them to cost, and what follows for the run. It needs no dataset.
A program that several of the configurations have is compiled once.

Exit status: 0; 1 where a configuration does not compile or does not fit; 2 for a mistake in the
command.
"""

import argparse
import importlib.metadata
import json
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import analysis_startup

analysis_startup.require()
import tpu_text
from tpu_children import run_child
from tpu_figures import ROOT, chip_of, program_figures, run_figures, totals

import tpu_types
from config import Config, config_yaml, load_config, planned_workers
from utils import UserError, check_output_file, replace_file, run_cli

REQUIREMENTS = ROOT / "requirements-tpu.txt"
# the keys of a report that has no figures
FIGURES = (
    "programs",
    "hbm_bytes",
    "flops_per_chip_step",
    "estimated_ms_per_step",
    "estimated_mfu",
    "all_reduce_bytes",
    "all_reduce_count",
    "host_ms_per_step",
    "total_steps",
    "estimated_hours",
)


def main() -> int:
    args = parse_args()
    configs = {path: load_config(path, args.overrides) for path in args.config}
    check_dependencies()
    # SIGTERM becomes an exception, so that run_child ends its child, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    several = len(configs) > 1
    if several:
        print(tpu_text.HEADER, flush=True)
    reports = []
    with tempfile.TemporaryDirectory() as cache:
        for path, config in configs.items():
            report = examine(path, config, args, Path(cache))
            reports.append(report)
            text = tpu_text.table_row(report) if several else tpu_text.full_text(report)
            print(text, flush=True)
    summary = reports[0]
    if several:
        summary = {"reports": reports, **totals(reports)}
        print(tpu_text.totals_text(summary))
    if args.json:
        replace_file(args.json, json.dumps(summary, indent=1) + "\n")
    return 0 if all(report["compiles"] and report["fits"] for report in reports) else 1


def parse_args() -> argparse.Namespace:
    """The command line. Raises UserError for a value that makes no sense."""
    args = parser().parse_intermixed_args()
    # argparse takes all that follows --config for file names
    args.overrides += [text for text in args.config if "=" in text]
    args.overrides += ["device=tpu", f"tpu.accelerator_type={args.accelerator}"]
    args.config = [text for text in args.config if "=" not in text]
    if not args.config:
        raise UserError("--config: give at least one file, such as configs/e1_1.yaml")
    for name in ("memory_gib", "minutes"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name):g}: must be > 0")
    if args.json:
        check_output_file("--json", args.json)
    if args.keep:
        check_output_file("--keep", Path(args.keep) / "config.yaml", make_folder=True)
    return args


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, nargs="+", metavar="FILE", help="one or more configurations")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="override a value in all configurations",
    )
    add(
        "--accelerator",
        default="v4-64",
        metavar="TYPE",
        help=f"slice to compile for, such as {tpu_types.EXAMPLES} (default: v4-64)",
    )
    add("--json", metavar="FILE", help="also write the figures to FILE")
    add(
        "--keep",
        metavar="FOLDER",
        help="keep the programs there: as traced (protobuf) and as optimised (text)",
    )
    add(
        "--top",
        type=int,
        default=12,
        metavar="N",
        help="for one configuration, print the N most expensive operations (default: 12)",
    )
    add(
        "--memory_gib",
        type=float,
        metavar="GIB",
        help="memory for tracing and for the compiler (default: 80%% of what is free)",
    )
    add(
        "--minutes",
        type=float,
        default=20,
        metavar="M",
        help="time for tracing and for the compiler, each (default: 20)",
    )
    return parser


def check_dependencies() -> None:
    """Raise UserError unless torch_xla, and requirements-tpu.txt as pinned there, are installed."""
    pins = re.findall(r"^([\w\-]+)==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)
    missing = []
    for name, pinned in [("torch_xla", None), *pins]:
        wanted = f"{name}=={pinned}" if pinned else name
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{wanted} (not installed)")
            continue
        if pinned and found != pinned:
            missing.append(f"{wanted} (is {found})")
    if missing:
        raise UserError(
            f"the TPU compiler that this report needs is not installed: {', '.join(missing)}: "
            f"{sys.executable} -m pip install -r requirements.txt -r {REQUIREMENTS.name}"
        )


def examine(path: str, config: Config, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """The report of one configuration. cache: a folder for what is compiled.

    Its `error` says in words why there are no figures, or why they do not fit; otherwise it is
    None.
    """
    report: dict[str, Any] = {
        "config": str(path),
        "accelerator": args.accelerator,
        "chips": planned_workers(config),
        "compiles": False,
        "fits": False,
        "error": None,
        **dict.fromkeys(FIGURES),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.keep:
            folder = Path(args.keep) / f"{Path(path).stem}_{args.accelerator}"
            folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config_yaml(config))
        report["error"] = compile_programs(folder, config, report, args, cache)
        if report["error"]:
            return report
        compiled = json.loads((folder / "compile.json").read_text())
        report["compiles"] = True
        report |= program_figures(folder, compiled, report, args.top)
    report["fits"] = report["hbm_bytes"]["needed"] <= chip_of(report).usable_hbm_bytes
    if not report["fits"]:
        report["error"] = tpu_text.too_large(report, config)
    return report | run_figures(report, config)


def compile_programs(
    folder: Path, config: Config, report: dict[str, Any], args: argparse.Namespace, cache: Path
) -> str | None:
    """Trace and compile the configuration in `folder`; returns what went wrong, or None.

    Adds the content of trace.json to the report.
    """

    def run(doing, script, *words):
        command = [Path(__file__).with_name(script), folder, *words]
        return run_child(doing, command, folder, args.memory_gib, args.minutes)

    if error := run("tracing", "tpu_trace.py"):
        return error
    trace = json.loads((folder / "trace.json").read_text())
    programs = trace["programs"]
    report |= {**trace, "programs": len(programs), "programs_traced": programs}
    if error := run("compiling", "tpu_compile.py", args.accelerator, cache):
        return error
    for name, result in json.loads((folder / "compile.json").read_text()).items():
        if result["error"]:
            if_large = tpu_text.way_out(name, config)
            reason = tpu_text.compiler_error(result["error"], if_large, chip_of(report))
            return f"{name} step: {reason}"
    return run("scheduling", "tpu_kernels.py", args.accelerator, cache)


if __name__ == "__main__":
    run_cli(main)
