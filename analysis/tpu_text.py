"""The report of analysis/tpu_report.py as text: one configuration in full, several as a table."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpu_figures import MONTH_HOURS, chip_of

from config import Config
from tpu_types import GIB, MIB, Generation

COLUMNS = (
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
HEADER = f"{'configuration':<20}" + "".join(f"{title:>10}" for title in COLUMNS)
Line = tuple[str, str]  # (label, text)


# --------------------------------------------------------------------------------------------------
# What went wrong
# --------------------------------------------------------------------------------------------------
def way_out(step: str, config: Config) -> str:
    """What to do where a step ("train", "evaluation") of the configuration does not fit."""
    if step == "evaluation":
        return "take a smaller evaluation.batch_size"
    if config.model.activation_checkpointing:
        return "take a larger slice"
    return "set model.activation_checkpointing=true, or take a larger slice"


def compiler_error(text: str, if_large: str, chip: Generation) -> str:
    """An error of the TPU compiler in plain words, on one line.

    if_large: what to do where the program does not fit.
    """
    needs = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)G hbm", text) or re.search(
        r"total memory required for .*?\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)G\)",
        text,
    )
    capacity = f"{chip.hbm_bytes / GIB:.0f}"
    if needs:
        return (
            f"does not fit: needs {needs[1]} {needs[2]}iB of HBM, a program may use {needs[3]} GiB "
            f"of a chip's {capacity}: {if_large}"
        )
    one = re.search(r"Allocation \(size=(\d+)\) would exceed memory .*space=hbm", text, re.DOTALL)
    if one:
        return (
            f"does not fit: one tensor alone needs {int(one[1]) / GIB:.2f} GiB of HBM, "
            f"a chip has {capacity}: {if_large}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"the compiler refuses it: {' '.join(lines[:3])[:600]}"


def too_large(report: dict[str, Any], config: Config) -> str:
    """Why a configuration that compiles does not fit."""
    working, chip = report["hbm_working_bytes"], chip_of(report)
    largest = max(working, key=working.get)
    return (
        f"does not fit: with the {largest} step at work {report['hbm_bytes']['needed'] / GIB:.2f} "
        f"GiB of HBM are needed, programs may use {chip.usable_hbm_bytes / GIB:.2f} GiB of a "
        f"chip's {chip.hbm_bytes / GIB:.0f}: {way_out(largest, config)}"
    )


# --------------------------------------------------------------------------------------------------
# Several configurations
# --------------------------------------------------------------------------------------------------
def table_row(report: dict[str, Any]) -> str:
    """One line of the table below HEADER."""
    name = f"{Path(report['config']).stem:<20}"
    if report["estimated_hours"] is None:
        return f"{name}  NO: {report['error']}"
    cells = (
        f"{report['hbm_bytes']['needed'] / GIB:.2f}",
        f"{report['estimated_ms_per_step']:.2f}",
        f"{report['estimated_mfu']:.1%}",
        f"{report['host_ms_per_step']:.1f}",
        f"{report['all_reduce_bytes'] / 1e6:.1f}",
        f"{report['total_steps']:,}",
        f"{report['training_hours']:.2f}",
        f"{report['evaluation_hours']:.2f}",
        f"{report['estimated_hours']:.2f}",
        f"{report['share_of_month']:.2%}",
    )
    row = name + "".join(f"{cell:>10}" for cell in cells)
    return row if report["fits"] else f"{row}  NO: {report['error']}"


def totals_text(summary: dict[str, Any]) -> str:
    """The lines below the table. summary: tpu_figures.totals, with the `reports` themselves."""
    reports = summary["reports"]
    bad = sum(not (report["compiles"] and report["fits"]) for report in reports)
    hours = (
        f"{summary['judged']} configuration(s) one after the other on {summary['accelerator']}: "
        f"{summary['estimated_hours']:.1f} pod-hours, {summary['chip_hours']:,.0f} chip-hours, "
        f"{summary['share_of_month']:.1%} of 30 days of this slice"
    )
    lines = [
        f"{hours}; {bad} do not compile or do not fit" if bad else hours,
        "est. ms: the compiler's own estimate, without the all-reduce",
        "hours: by the slower of device and host, without checkpoints, compiles and waiting",
    ]
    elsewhere = [
        Path(report["config"]).stem
        for report in reports
        if report["compiles"] and not report["test_dataset"]
    ]
    if elsewhere:
        which = "all of them" if len(elsewhere) == len(reports) else ", ".join(elsewhere)
        lines.append(
            "the dataset is not on this machine, so evaluations are taken to be of "
            f"Sudoku-Extreme's test split: {which}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# One configuration
# --------------------------------------------------------------------------------------------------
def full_text(report: dict[str, Any]) -> str:
    """Everything about one configuration, a label and a text on each line."""
    lines = [f"{report['config']} on {report['accelerator']}, {report['chips']} chips"]
    if report["compiles"]:
        parts = (
            *_verdict(report),
            *_memory(report),
            *_products(report),
            *_device_time(report),
            *_outside_of_the_estimate(report),
            *_run(report),
        )
    else:
        parts = (("verdict", f"NO: {report['error']}"),)
        if report["host_ms_per_step"]:
            parts += (("host", f"{report['host_ms_per_step']:.1f} ms a step, on this machine"),)
    lines += [f"{label:<22} {text}" for label, text in parts]
    if report["compiles"]:
        lines += _where(report)
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> Iterator[Line]:
    yield (
        "verdict",
        "compiles and fits" if report["fits"] else f"compiles, but NO: {report['error']}",
    )
    seconds = ", ".join(f"{name} {s:.0f} s" for name, s in report["compile_seconds"].items())
    yield "programs", f"{report['programs']} ({seconds} to compile here)"
    yield (
        "model",
        f"{report['parameters']:,} parameters, {report['per_chip_batch']} examples a chip of "
        f"{report['sequence_length']} positions",
    )
    as_kernel = [name for name, is_kernel in report["in_kernel"].items() if is_kernel]
    by_xla = [name for name, is_kernel in report["in_kernel"].items() if not is_kernel]
    yield "kernels", ", ".join(as_kernel) or "none"
    if by_xla:
        yield (
            "  in XLA's form",
            f"{', '.join(by_xla)}: a hidden size that is no multiple of 128, or not bfloat16, or "
            f"more than a core's {chip_of(report).vmem_bytes / MIB:.0f} MiB of VMEM, or "
            "training.pallas_kernels=false",
        )


def _memory(report: dict[str, Any]) -> Iterator[Line]:
    for name, sizes in report["hbm_bytes_by_program"].items():
        kinds = [f"{kind.replace('_', ' ')} {size / MIB:,.0f}" for kind, size in sizes.items()]
        yield f"HBM, {name}", f"{', '.join(kinds)} MiB"
    yield (
        "HBM needed",
        f"{report['hbm_bytes']['needed'] / GIB:.2f} of {chip_of(report).hbm_bytes / GIB:.0f} GiB "
        "a chip (training state, the largest step, all programs)",
    )


def _products(report: dict[str, Any]) -> Iterator[Line]:
    yield (
        "FLOPs",
        f"{report['flops_per_chip_step']:.4g} a chip and step in matrix products; the share of the "
        f"peak counts those of the model's formula, {report['model_flops_per_chip_step']:.4g}",
    )
    for name, products in report["matrix_products"].items():
        text = (
            f"{name}: {products['bfloat16']} in bfloat16, {products['float32']} in float32 "
            "(highest precision)"
        )
        calls = report["custom_calls"].get(name, {})
        if kernels := calls.get("tpu_custom_call"):
            text += f", and those of {kernels['count']} kernels in bfloat16"
        yield "matrix products", text


def _device_time(report: dict[str, Any]) -> Iterator[Line]:
    chip = chip_of(report)
    yield (
        "device, estimated",
        f"{report['estimated_ms_per_step']:.2f} ms a step: {report['estimated_mfu']:.1%} of "
        f"{chip.peak_flops / 1e12:.0f} TFLOP/s. This is the compiler's own estimate "
        f"({report['estimated_cycles_per_step']:,.0f} cycles at {chip.clock_hz / 1e9} GHz), and "
        "not a measurement",
    )
    for stage in report["stages"] if len(report["stages"]) > 1 else ():
        yield (
            f"  {stage['program']}",
            f"{stage['estimated_ms_per_step']:.2f} ms a step, {stage['steps']:,} steps from step "
            f"{stage['begin']:,} on, with H_cycles {stage['H_cycles']} and L_cycles "
            f"{stage['L_cycles']}",
        )
    yield "  its clock", chip.clock_source
    rest = report["unestimated"][report["stages"][-1]["program"]]
    yield (
        "  in it",
        f"{rest['count']} small operations without an estimate, {1e3 * rest['seconds']:.2f} ms by "
        "their bytes",
    )
    for program, calls in report["custom_calls"].items():
        for target, call in calls.items():
            if call["seconds"] > 1e-6:
                yield "  in it", f"{program}: {_custom_call(target, call)}"


def _custom_call(target: str, call: dict[str, Any]) -> str:
    return (
        f"{call['count']} custom calls {target}, {1e3 * call['seconds']:.2f} ms by their schedules "
        f"and bytes, one after the other (at least {1e3 * call['bound_seconds']:.2f} ms): "
        f"{call['flops']:.3g} FLOPs, {call['bytes'] / 1e6:,.1f} MB"
    )


def _outside_of_the_estimate(report: dict[str, Any]) -> Iterator[Line]:
    label = "  not in it"
    if report["loops_of_unknown_length"]:
        yield (
            label,
            f"{report['loops_of_unknown_length']} loops whose number of passes is not known: each "
            "counts as one pass",
        )
    yield (
        label,
        f"{report['all_reduce_count']} all-reduce(s) of {report['all_reduce_bytes'] / 1e6:.1f} MB: "
        f"at least {report['all_reduce_ms_at_least']:.2f} ms on the chip's links, which the hours "
        "below do count",
    )
    for kind, figures in report["other_collectives"].items():
        yield label, f"{figures['count']} {kind} of {figures['bytes'] / 1e6:.1f} MB"
    prefetched = report["prefetch_bytes_per_step"]
    seconds = prefetched / chip_of(report).hbm_bytes_per_second
    yield (
        label,
        f"prefetches beside the computation: {prefetched / 1e9:.2f} GB, {1e3 * seconds:.2f} ms of "
        "HBM's time",
    )
    yield "evaluation, estimated", f"{report['evaluation_ms_per_step']:.2f} ms a step"


def _run(report: dict[str, Any]) -> Iterator[Line]:
    least, most = report["host_ms_range"]
    yield (
        "host",
        f"{report['host_ms_per_step']:.1f} ms a step of one core ({least:.1f} to {most:.1f}), "
        "measured on this machine: the batch, and the start of the program that the first step "
        "traced",
    )
    yield (
        "puzzles",
        f"{report['num_puzzles']:,} to train on ({report['dataset']}), "
        f"{report['split_sizes']['test']:,} to test on "
        f"({report['test_dataset'] or 'assumed: those of Sudoku-Extreme'})",
    )
    yield (
        "run",
        f"{report['total_steps']:,} steps, {report['training_hours']:.2f} h (bound by the "
        f"{report['bound_by']}); {report['evaluations']} evaluations, "
        f"{report['evaluation_hours']:.2f} h, of which the final one "
        f"{report['final_evaluation_hours']:.2f} h",
    )
    yield (
        "altogether",
        f"{report['estimated_hours']:.2f} h, {report['chip_hours']:,.0f} chip-hours: "
        f"{report['share_of_month']:.2%} of the {MONTH_HOURS * report['chips']:,} of 30 days of "
        "this slice; checkpoints, compiles and waiting come on top",
    )


def _where(report: dict[str, Any]) -> list[str]:
    """The most expensive operations of the (last stage's) training step, one on each line."""
    step_cycles = report["stages"][-1]["estimated_cycles_per_step"]
    lines = [
        f"{'where the cycles go':<22} (training step; operations without a line of code belong to "
        "the backward pass or are the compiler's)"
    ]
    for cycles, count, source, operation, shape in report["where"]:
        share = cycles / step_cycles
        ms = cycles / chip_of(report).clock_hz * 1e3
        lines.append(
            f"  {share:6.1%} {ms:7.3f} ms {count:5} x {operation:<14} {source:<24} {shape}"
        )
    return lines
