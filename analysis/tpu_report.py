"""What a TPU slice would do with a configuration, on a machine that has none.

    python analysis/tpu_report.py --config configs/e1_1.yaml --accelerator v4-64
    python analysis/tpu_report.py --config configs/e1_1.yaml --accelerator v6e-16 --json out.json model.hidden_size=1024
    python analysis/tpu_report.py --config configs/e*.yaml --accelerator v4-64      # the whole study, as one table

Traces the training step and the evaluation step as one of the slice's workers, compiles both with the compiler of a TPU VM
(about a minute each on one core) and says whether they compile and fit, what the compiler expects them to cost, and what
follows for the run. Needs no dataset. Exit status: 0, 1 where a configuration does not compile or does not fit, 2 for a
mistake in the command.
"""

import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tpu_hlo

import tpu_types
from config import config_yaml, evaluation_interval_steps, load_config, planned_workers, total_steps
from utils import UserError, check_output_file, replace_file, run_cli

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-tpu.txt"
MONTH_HOURS = 30 * 24  # a TPU Research Cloud grant
GIB = 2**30
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main():
    args = parse_args()
    configs = {path: load_config(path, args.overrides) for path in args.config}
    check_dependencies()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that no child outlives this process
    reports = []
    if len(configs) > 1:
        print(COLUMNS, flush=True)
    for path, config in configs.items():
        report = examine(path, config, args)
        reports.append(report)
        print(table_row(report) if len(configs) > 1 else full_text(report), flush=True)
    summary = reports[0]
    if len(configs) > 1:
        summary = {"reports": reports, **totals(reports)}
        print(totals_text(summary))
    if args.json:
        replace_file(args.json, json.dumps(summary, indent=1) + "\n")
    return 0 if all(report["compiles"] and report["fits"] for report in reports) else 1


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        nargs="+",
        metavar="FILE",
        help="YAML configurations; several give a table",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override the configurations"
    )
    parser.add_argument(
        "--accelerator",
        default="v4-64",
        metavar="TYPE",
        help=f"slice to compile for, as {tpu_types.EXAMPLES} (default: v4-64)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="keep the programs there: as traced (protobuf) and as optimised (text)",
    )
    parser.add_argument(
        "--top",
        type=int,
        default=12,
        metavar="N",
        help="of one configuration, the N most expensive operations (default: 12)",
    )
    parser.add_argument(
        "--memory_gib",
        type=float,
        metavar="GIB",
        help="memory for tracing and for the compiler (default: 80%% of what is free)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20,
        metavar="M",
        help="time for tracing and for the compiler, each (default: 20)",
    )
    args = parser.parse_intermixed_args()
    args.overrides += [
        text for text in args.config if "=" in text
    ]  # argparse takes all that follows --config for its own
    args.config = [text for text in args.config if "=" not in text]
    args.overrides += ["device=tpu", f"tpu.accelerator_type={args.accelerator}"]
    if not args.config:
        raise UserError("--config: names no file")
    for name in ("memory_gib", "minutes"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name):g}: must be > 0")
    if args.json:
        check_output_file("--json", args.json)
    if args.keep:
        check_output_file("--keep", Path(args.keep) / "config.yaml", make_folder=True)
    return args


def check_dependencies():
    """Raises UserError unless the packages of requirements-tpu.txt, and torch_xla, are installed as pinned."""
    missing = []
    for name, pinned in [
        ("torch_xla", None),
        *re.findall(r"^([\w\-]+)==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE),
    ]:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or found != (pinned or found):
            missing.append(
                f"{name}{'==' + pinned if pinned else ''} ({'is ' + found if found else 'not installed'})"
            )
    if missing:
        raise UserError(
            f"the TPU compiler is not here as this report needs it: {', '.join(missing)}: "
            f"{sys.executable} -m pip install -r requirements.txt -r {REQUIREMENTS.name}"
        )


# ---------------------------------------------------------------------------------------------------------
# One configuration
# ---------------------------------------------------------------------------------------------------------
def examine(path, config, args):
    """The report of one configuration, a dict; its `error` says in words why there are no figures, or None."""
    report = {
        "config": str(path),
        "accelerator": args.accelerator,
        "chips": planned_workers(config),
        "compiles": False,
        "fits": False,
        "error": None,
        **dict.fromkeys(
            (
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
        ),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.keep:
            folder = Path(args.keep) / f"{Path(path).stem}_{args.accelerator}"
            folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config_yaml(config))
        for script, words in (
            ("tpu_trace.py", []),
            ("tpu_compile.py", [args.accelerator]),
            ("tpu_kernels.py", [args.accelerator]),
        ):
            report["error"] = run_child([script, str(folder), *words], folder, args)
            if report["error"]:
                return report
            if script == "tpu_trace.py":
                trace = json.loads((folder / "trace.json").read_text())
                report |= {
                    **trace,
                    "programs": len(trace["programs"]),
                    "programs_traced": trace["programs"],
                }
            if script == "tpu_compile.py":
                compiled = json.loads((folder / "compile.json").read_text())
                for name, result in compiled.items():
                    if result["error"]:
                        report["error"] = (
                            f"{name} step: {compiler_error(result['error'], way_out(name, config), chip_of(report))}"
                        )
                        return report
        report["compiles"] = True
        report |= program_figures(folder, compiled, report, args.top)
    chip = chip_of(report)
    report["fits"] = report["hbm_bytes"]["needed"] <= chip.usable_hbm_bytes
    if not report["fits"]:
        larger = max(report["hbm_working_bytes"], key=report["hbm_working_bytes"].get)
        report["error"] = (
            f"does not fit: with the {larger} step at work {report['hbm_bytes']['needed'] / GIB:.2f} GiB of HBM are needed, "
            f"programs may use {chip.usable_hbm_bytes / GIB:.2f} GiB of a chip's {chip.hbm_bytes / GIB:.0f}: {way_out(larger, config)}"
        )
    return report | run_figures(report, config)


def chip_of(report):
    return tpu_types.slice_type(report["accelerator"]).generation


def program_figures(folder, compiled, report, top):
    """What the compiled programs say. A training step may be several programs: their figures are summed."""
    chip = chip_of(report)
    texts = {name: (folder / f"{name}.optimised.txt").read_text() for name in compiled}
    kernel_cycles = json.loads((folder / "kernels.json").read_text())
    costs = {name: tpu_hlo.read_cost(text, chip, kernel_cycles) for name, text in texts.items()}
    training = [name for name in compiled if name != "evaluation"]
    ms = sum(1e3 * costs[name].seconds for name in training)
    all_reduce = {
        key: sum(costs[name].collectives["all-reduce"][key] for name in training)
        for key in ("count", "bytes")
    }
    by_program = {name: result["hbm_bytes"] for name, result in compiled.items()}
    hbm = {kind: max(by_program[name][kind] for name in training) for kind in by_program["train"]}
    # while an evaluation runs the training state stays where it is, the weights (float32) among it; and so do the programs
    working = {
        name: sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]
        for name, sizes in by_program.items()
    }
    working["evaluation"] += hbm["arguments"] - 4 * report["parameters"]
    hbm["needed"] = max(working.values()) + sum(
        sizes["generated_code"] for sizes in by_program.values()
    )
    return {
        "hbm_bytes": hbm,
        "hbm_bytes_by_program": by_program,
        "hbm_working_bytes": working,
        "flops_per_chip_step": sum(
            program["flops"] for program in report["programs_traced"] if program["name"] in training
        ),
        "estimated_ms_per_step": ms,
        "estimated_cycles_per_step": sum(costs[name].cycles for name in training),
        "estimated_mfu": report["model_flops_per_chip_step"] / (ms / 1e3 * chip.peak_flops),
        "matrix_products": {name: tpu_hlo.product_precisions(text) for name, text in texts.items()},
        "custom_calls": {
            name: costs[name].custom_calls for name in costs if costs[name].custom_calls
        },
        "unestimated": {name: costs[name].unestimated for name in costs},
        "loops_of_unknown_length": sum(cost.loops_of_unknown_length for cost in costs.values()),
        "prefetch_bytes_per_step": sum(costs[name].prefetch_bytes for name in training),
        "all_reduce_bytes": all_reduce["bytes"],
        "all_reduce_count": all_reduce["count"],
        "all_reduce_ms_at_least": 1e3
        * tpu_hlo.all_reduce_seconds(all_reduce["bytes"], report["chips"], chip),
        "other_collectives": {
            kind: figures
            for name in costs
            for kind, figures in costs[name].collectives.items()
            if kind != "all-reduce"
        },
        "evaluation_ms_per_step": 1e3 * costs["evaluation"].seconds,
        "compile_seconds": {name: result["compile_seconds"] for name, result in compiled.items()},
        "where": tpu_hlo.cycles_by_source(costs["train"], ROOT)[:top],
    }


def run_figures(report, config):
    """Steps and hours of the whole run. A step takes as long as the slower of device and host."""
    total = total_steps(config, report["num_puzzles"])
    interval = evaluation_interval_steps(config, report["num_puzzles"])
    device_ms = report["estimated_ms_per_step"] + report["all_reduce_ms_at_least"]
    training = total * max(device_ms, report["host_ms_per_step"]) / 3.6e6

    def evaluation(
        count,
    ):  # hours; a step of the host is taken to be as long as one of training, which is too long
        batches = math.ceil(math.ceil(count / report["chips"]) / config.evaluation.batch_size)
        return (
            batches
            * config.model.halt_max_steps
            * max(report["evaluation_ms_per_step"], report["evaluation_host_ms_per_step"])
            / 3.6e6
        )

    sizes, ema = report["split_sizes"], config.training.ema
    look = evaluation(
        min(
            config.evaluation.max_examples or sizes[config.evaluation.split],
            sizes[config.evaluation.split],
        )
    )
    final = (1 + ema) * evaluation(sizes["test"])  # averaged and raw weights
    looks = math.ceil(total / interval)
    # the last look is part of the final evaluation where both are of the whole test split
    last_is_final = (
        config.evaluation.split == "test"
        and (config.evaluation.max_examples or sizes["test"]) >= sizes["test"]
    )
    evaluating = (looks - last_is_final) * look + final
    hours = training + evaluating
    return {
        "total_steps": total,
        "device_ms_per_step": device_ms,
        "bound_by": "device" if device_ms >= report["host_ms_per_step"] else "host",
        "evaluations": looks,
        "training_hours": training,
        "evaluation_hours": evaluating,
        "final_evaluation_hours": final,
        "estimated_hours": hours,
        "chip_hours": hours * report["chips"],
        "share_of_month": hours / MONTH_HOURS,
    }


# ---------------------------------------------------------------------------------------------------------
# Child processes: too large a configuration ends one of them, never this process or the machine
# ---------------------------------------------------------------------------------------------------------
def run_child(command, folder, args):
    """Run one of the scripts beside this one within the limits of memory and time; returns what went wrong in words, or None."""
    limit = (args.memory_gib or 0.8 * free_memory() / GIB) * GIB
    end = time.monotonic() + 60 * args.minutes
    what = {
        "tpu_trace.py": "tracing",
        "tpu_compile.py": "compiling",
        "tpu_kernels.py": "scheduling",
    }[Path(command[0]).name]
    # flags for the XLA of another device, or for another slice, would be taken for this one's
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PJRT_", "XLA_", "TPU_", "LIBTPU_", "JAX_"))
    }
    log = folder / f"{what}.log"
    with open(log, "w") as output:
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / command[0]), *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=die_with_parent,
        )
        try:
            while child.poll() is None:
                if resident_bytes(child.pid) > limit:
                    return f"{what} it needs more than {limit / GIB:.1f} GiB of this machine's memory: too large to be judged here (--memory_gib sets the limit)"
                if time.monotonic() > end:
                    return f"{what} it takes more than {args.minutes:g} minutes on this machine: too large to be judged here (--minutes sets the limit)"
                time.sleep(0.05)
        finally:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return None
    said = log.read_text(errors="replace").strip().splitlines()
    mistakes = [line for line in said if line.startswith("error: ")]
    if child.returncode == 2 and mistakes:
        raise UserError(mistakes[-1].removeprefix("error: "))
    ended = (
        f"by signal {-child.returncode}"
        if child.returncode < 0
        else f"with status {child.returncode}"
    )
    return f"{what} ended {ended}: {' | '.join(said[-3:])[-600:] or 'it said nothing'}"


def die_with_parent():
    """In a child: SIGKILL when its parent is gone, however it went. Nobody would watch its memory then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def resident_bytes(pid):
    try:
        return (
            int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
        )
    except (OSError, TypeError):  # it has just ended
        return 0


def free_memory():
    """Bytes that this machine, or its container, has left."""
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        return min(
            free,
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()),
        )
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def way_out(step, config):
    """What to do about a step of `config` that does not fit."""
    if step == "evaluation":
        return "take a smaller evaluation.batch_size"
    return (
        ""
        if config.model.activation_checkpointing
        else "set model.activation_checkpointing=true, or "
    ) + "take a larger slice"


def compiler_error(text, if_large, chip):
    """The compiler's error in plain words, with what it says itself. if_large: what to do about a program that does not fit."""
    needs = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)G hbm", text) or re.search(
        r"total memory required for .*?\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)G\)",
        text,
    )
    if needs:
        return f"does not fit: needs {needs[1]} {needs[2]}iB of HBM, a program may use {needs[3]} GiB of a chip's {chip.hbm_bytes / GIB:.0f}: {if_large}"
    if one := re.search(
        r"Allocation \(size=(\d+)\) would exceed memory .*space=hbm", text, re.DOTALL
    ):
        return f"does not fit: one tensor alone needs {int(one[1]) / GIB:.2f} GiB of HBM, a chip has {chip.hbm_bytes / GIB:.0f}: {if_large}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the compiler refuses it: {' '.join(lines[:3])[:600]}"


# ---------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------
COLUMNS = f"{'configuration':<20}" + "".join(
    f"{title:>10}"
    for title in (
        "HBM GiB",
        "est. ms",
        "MFU",
        "host ms",
        "reduce MB",
        "steps",
        "train h",
        "eval h",
        "pod h",
        "month",
    )
)


def table_row(report):
    name = f"{Path(report['config']).stem:<20}"
    if report["estimated_hours"] is None:
        return f"{name}  NO: {report['error']}"
    r = report
    cells = (
        f"{r['hbm_bytes']['needed'] / GIB:.2f}",
        f"{r['estimated_ms_per_step']:.2f}",
        f"{r['estimated_mfu']:.1%}",
        f"{r['host_ms_per_step']:.1f}",
        f"{r['all_reduce_bytes'] / 1e6:.1f}",
        f"{r['total_steps']:,}",
        f"{r['training_hours']:.2f}",
        f"{r['evaluation_hours']:.2f}",
        f"{r['estimated_hours']:.2f}",
        f"{r['share_of_month']:.2%}",
    )
    return (
        name
        + "".join(f"{cell:>10}" for cell in cells)
        + ("" if r["fits"] else f"  NO: {r['error']}")
    )


def totals(reports):
    done = [report for report in reports if report["estimated_hours"] is not None]
    hours = sum(report["estimated_hours"] for report in done)
    return {
        "accelerator": reports[0]["accelerator"],
        "judged": len(done),
        "estimated_hours": hours,
        "chip_hours": hours * reports[0]["chips"],
        "share_of_month": hours / MONTH_HOURS,
    }


def totals_text(summary):
    reports = summary["reports"]
    bad = sum(not (report["compiles"] and report["fits"]) for report in reports)
    lines = [
        f"{summary['judged']} configuration(s) one after the other on {summary['accelerator']}: {summary['estimated_hours']:.1f} pod-hours, "
        f"{summary['chip_hours']:,.0f} chip-hours, {summary['share_of_month']:.1%} of 30 days of it"
        + (f"; {bad} do not compile or fit" if bad else ""),
        "est. ms: the compiler's own estimate, without the all-reduce; hours: the slower of device and host, without checkpoints, compiles and waiting",
    ]
    elsewhere = [
        Path(report["config"]).stem
        for report in reports
        if report["compiles"] and not report["test_dataset"]
    ]
    if elsewhere:
        which = "all of them" if len(elsewhere) == len(reports) else ", ".join(elsewhere)
        lines.append(
            f"evaluations as of Sudoku-Extreme's test split, where the dataset is not on this machine: {which}"
        )
    return "\n".join(lines)


def full_text(report):
    lines = [f"{report['config']} on {report['accelerator']}, {report['chips']} chips"]

    def say(label, text):
        lines.append(f"{label:<22} {text}")

    if not report["compiles"]:
        say("verdict", f"NO: {report['error']}")
        if report["host_ms_per_step"]:
            say("host", f"{report['host_ms_per_step']:.1f} ms a step, on this machine")
        return "\n".join(lines)
    r, hbm, chip = report, report["hbm_bytes"], chip_of(report)
    say("verdict", "compiles and fits" if r["fits"] else f"compiles, but NO: {r['error']}")
    say(
        "programs",
        f"{r['programs']} ({', '.join(f'{name} {seconds:.0f} s' for name, seconds in r['compile_seconds'].items())} to compile here)",
    )
    say(
        "model",
        f"{r['parameters']:,} parameters, {r['per_chip_batch']} examples a chip of {r['sequence_length']} positions",
    )
    by_xla = [what for what, as_kernel in r["in_kernel"].items() if not as_kernel]
    say(
        "kernels",
        ", ".join(what for what, as_kernel in r["in_kernel"].items() if as_kernel) or "none",
    )
    if by_xla:
        say(
            "  in XLA's form",
            f"{', '.join(by_xla)}: not bfloat16, or more than a core's {chip.vmem_bytes / 2**20:.0f} MiB of VMEM, or "
            "training.pallas_kernels=false",
        )
    for name, sizes in r["hbm_bytes_by_program"].items():
        say(
            f"HBM, {name}",
            ", ".join(
                f"{kind.replace('_', ' ')} {size / 2**20:,.0f}" for kind, size in sizes.items()
            )
            + " MiB",
        )
    say(
        "HBM needed",
        f"{hbm['needed'] / GIB:.2f} of {chip.hbm_bytes / GIB:.0f} GiB a chip (training state, the larger step, both programs)",
    )
    say(
        "FLOPs",
        f"{r['flops_per_chip_step']:.4g} a chip and step in matrix products; the model's own, which the share of peak counts: "
        f"{r['model_flops_per_chip_step']:.4g}",
    )
    for name, products in r["matrix_products"].items():
        kernels = r["custom_calls"].get(name, {}).get("tpu_custom_call", {"count": 0})["count"]
        say(
            "matrix products",
            f"{name}: {products['bfloat16']} in bfloat16, {products['float32']} in float32 (highest precision)"
            + f", and those of {kernels} kernels in bfloat16" * bool(kernels),
        )
    say(
        "device, estimated",
        f"{r['estimated_ms_per_step']:.2f} ms a step: {r['estimated_mfu']:.1%} of {chip.peak_flops / 1e12:.0f} TFLOP/s. "
        f"The compiler's own estimate ({r['estimated_cycles_per_step']:,} cycles at {chip.clock_hz / 1e9} GHz), not a measurement",
    )
    say("  its clock", chip.clock_known)
    rest = [figures for name, figures in r["unestimated"].items() if name != "evaluation"]
    say(
        "  in it",
        f"{sum(u['count'] for u in rest)} small operations without an estimate, {1e3 * sum(u['seconds'] for u in rest):.2f} ms by their bytes",
    )
    for program, calls in r["custom_calls"].items():
        for target, call in calls.items():
            if call["seconds"] > 1e-6:
                say(
                    "  in it",
                    f"{program}: {call['count']} custom calls {target}, {1e3 * call['seconds']:.2f} ms by their schedules and "
                    f"bytes, one after the other (their bound: {1e3 * call['bound_seconds']:.2f} ms): {call['flops']:.3g} FLOPs, {call['bytes'] / 1e6:,.1f} MB",
                )
    if r["loops_of_unknown_length"]:
        say(
            "  not in it",
            f"{r['loops_of_unknown_length']} loops whose number of passes is not known: each counts as one pass",
        )
    say(
        "  not in it",
        f"{r['all_reduce_count']} all-reduce(s) of {r['all_reduce_bytes'] / 1e6:.1f} MB: "
        f"at least {r['all_reduce_ms_at_least']:.2f} ms on the chip's links, which the hours below do count",
    )
    for kind, figures in r["other_collectives"].items():
        say("  not in it", f"{figures['count']} {kind} of {figures['bytes'] / 1e6:.1f} MB")
    prefetch = r["prefetch_bytes_per_step"]
    say(
        "  not in it",
        f"prefetches beside the computation: {prefetch / 1e9:.2f} GB, {1e3 * prefetch / chip.hbm_bytes_per_second:.2f} ms of HBM's time",
    )
    say("evaluation, estimated", f"{r['evaluation_ms_per_step']:.2f} ms a step")
    say(
        "host",
        f"{r['host_ms_per_step']:.1f} ms a step of one core ({r['host_ms_range'][0]:.1f} to {r['host_ms_range'][1]:.1f}), measured on this machine: "
        "batch, and start of the program that was traced at the first step",
    )
    assumed = "assumed: Sudoku-Extreme's"
    say(
        "puzzles",
        f"{r['num_puzzles']:,} to train on ({r['dataset']}), {r['split_sizes']['test']:,} to test on "
        f"({r['test_dataset'] or assumed})",
    )
    say(
        "run",
        f"{r['total_steps']:,} steps, {r['training_hours']:.2f} h (bound by the {r['bound_by']}); {r['evaluations']} evaluations, "
        f"{r['evaluation_hours']:.2f} h, of which the final one {r['final_evaluation_hours']:.2f} h",
    )
    say(
        "altogether",
        f"{r['estimated_hours']:.2f} h, {r['chip_hours']:,.0f} chip-hours: {r['share_of_month']:.2%} of the {MONTH_HOURS * r['chips']:,} "
        "of 30 days of this slice; checkpoints, compiles and waiting come on top",
    )
    say(
        "where the cycles go",
        "(training step; operations without a line are the backward pass's or the compiler's)",
    )
    lines += [
        f"  {cycles / r['estimated_cycles_per_step']:6.1%} {cycles / chip.clock_hz * 1e3:7.3f} ms {count:5} x {operation:<14} {source:<24} {shape}"
        for cycles, count, source, operation, shape in r["where"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
