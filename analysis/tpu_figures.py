"""What a TPU slice would do with a configuration, in numbers: from compiled programs to hours."""

import json
import math
from pathlib import Path
from typing import Any

import tpu_hlo

from config import Config
from schedule import evaluation_interval_steps, total_steps
from tpu_types import Generation, slice_type

ROOT = Path(__file__).resolve().parent.parent
MONTH_HOURS = 30 * 24  # of a grant of the TPU Research Cloud
MS_PER_HOUR = 3.6e6
# of a step, in each stage of a curriculum
STAGE_FIGURES = (
    "model_flops_per_chip_step",
    "flops_per_chip_step",
    "estimated_ms_per_step",
    "estimated_cycles_per_step",
)


def chip_of(report: dict[str, Any]) -> Generation:
    """The kind of chip that a report is for."""
    return slice_type(report["accelerator"]).generation


def program_figures(
    folder: Path, compiled: dict[str, Any], report: dict[str, Any], top: int
) -> dict[str, Any]:
    """What the compiled programs say: memory, FLOPs, estimated times, collectives.

    folder: with the optimised programs. compiled: the content of compile.json. report: with the
    content of trace.json. top: the number of operations in `where`, the most expensive ones.

    All figures are of one chip, except compile_seconds, which this machine took. A figure with a
    unit has it in its name (ms, bytes, cycles, flops); estimated_mfu is a fraction. With a
    curriculum, figures of a step are means over all steps; `stages` has those of each stage. The
    other figures without a program's name, and `where`, are of the last stage.
    """
    chip = chip_of(report)
    texts = {name: (folder / f"{name}.optimised.txt").read_text() for name in compiled}
    kernel_cycles = json.loads((folder / "kernels.json").read_text())
    costs = {name: tpu_hlo.read_cost(text, chip, kernel_cycles) for name, text in texts.items()}
    stages = stage_figures(report, costs)
    last = costs[stages[-1]["program"]]
    all_reduce = last.collectives["all-reduce"]
    all_reduce_seconds = tpu_hlo.all_reduce_seconds(all_reduce["bytes"], report["chips"], chip)
    total = sum(stage["steps"] for stage in stages)
    means = {
        name: sum(stage["steps"] * stage[name] for stage in stages) / total
        for name in STAGE_FIGURES
    }
    seconds = means["estimated_ms_per_step"] / 1e3
    return {
        **memory_figures(compiled, report["parameters"]),
        **means,
        "stages": stages,
        "estimated_mfu": means["model_flops_per_chip_step"] / (seconds * chip.peak_flops),
        "matrix_products": {name: tpu_hlo.product_precisions(text) for name, text in texts.items()},
        "custom_calls": {
            name: cost.custom_calls for name, cost in costs.items() if cost.custom_calls
        },
        "unestimated": {name: cost.unestimated for name, cost in costs.items()},
        "loops_of_unknown_length": sum(cost.loops_of_unknown_length for cost in costs.values()),
        "prefetch_bytes_per_step": last.prefetch_bytes,
        "all_reduce_bytes": all_reduce["bytes"],
        "all_reduce_count": all_reduce["count"],
        "all_reduce_ms_at_least": 1e3 * all_reduce_seconds,
        "other_collectives": {
            kind: figures
            for cost in costs.values()
            for kind, figures in cost.collectives.items()
            if kind != "all-reduce"
        },
        "evaluation_ms_per_step": 1e3 * costs["evaluation"].seconds,
        "compile_seconds": {name: result["compile_seconds"] for name, result in compiled.items()},
        "where": tpu_hlo.cycles_by_source(last, ROOT)[:top],
    }


def stage_figures(report: dict[str, Any], costs: dict[str, tpu_hlo.Cost]) -> list[dict[str, Any]]:
    """The stages of trace.json, each with STAGE_FIGURES. costs: of each program."""
    flops = {program["name"]: program["flops"] for program in report["programs_traced"]}
    return [
        stage
        | {
            "flops_per_chip_step": flops[stage["program"]],
            "estimated_ms_per_step": 1e3 * costs[stage["program"]].seconds,
            "estimated_cycles_per_step": costs[stage["program"]].cycles,
        }
        for stage in report["stages"]
    ]


def memory_figures(compiled: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Bytes of a chip's memory (HBM) that the programs take, as the compiler reports them.

    hbm_bytes: those of the largest training step, by kind; its `needed` is what the whole run
    needs.
    hbm_working_bytes: {program: bytes that are in use while it runs}.
    """
    by_program = {name: result["hbm_bytes"] for name, result in compiled.items()}
    training = [sizes for name, sizes in by_program.items() if name != "evaluation"]
    hbm = {kind: max(sizes[kind] for sizes in training) for kind in training[0]}
    working = {
        name: sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]
        for name, sizes in by_program.items()
    }
    # While an evaluation runs, the training state stays in memory. The weights (float32) are among
    # both programs' arguments.
    working["evaluation"] += hbm["arguments"] - 4 * parameters
    code = sum(sizes["generated_code"] for sizes in by_program.values())
    hbm["needed"] = max(working.values()) + code
    return {"hbm_bytes": hbm, "hbm_bytes_by_program": by_program, "hbm_working_bytes": working}


def run_figures(report: dict[str, Any], config: Config) -> dict[str, Any]:
    """Steps and hours of the whole run. A step takes as long as the slower of device and host.

    report: with the figures of trace.json and of `program_figures`.
    """
    total = total_steps(config, report["num_puzzles"])
    all_reduce_ms, host_ms = report["all_reduce_ms_at_least"], report["host_ms_per_step"]
    device_ms = report["estimated_ms_per_step"] + all_reduce_ms
    training_ms = sum(
        stage["steps"] * max(stage["estimated_ms_per_step"] + all_reduce_ms, host_ms)
        for stage in report["stages"]
    )
    training_hours = training_ms / MS_PER_HOUR
    evaluations = math.ceil(total / evaluation_interval_steps(config, report["num_puzzles"]))
    evaluation_hours, final_hours = _evaluation_hours(report, config, evaluations)
    hours = training_hours + evaluation_hours
    return {
        "total_steps": total,
        "device_ms_per_step": device_ms,
        "bound_by": "device" if device_ms >= host_ms else "host",
        "evaluations": evaluations,
        "training_hours": training_hours,
        "evaluation_hours": evaluation_hours,
        "final_evaluation_hours": final_hours,
        "estimated_hours": hours,
        "chip_hours": hours * report["chips"],
        "share_of_month": hours / MONTH_HOURS,
    }


def _evaluation_hours(
    report: dict[str, Any], config: Config, evaluations: int
) -> tuple[float, float]:
    """(hours of all evaluations, hours of the final one among them)."""
    # The host's time for a step of evaluation is taken to be that of tracing it, which is too long.
    step_ms = max(report["evaluation_ms_per_step"], report["evaluation_host_ms_per_step"])

    def hours(count):
        batches = math.ceil(math.ceil(count / report["chips"]) / config.evaluation.batch_size)
        return batches * config.model.halt_max_steps * step_ms / MS_PER_HOUR

    sizes, split = report["split_sizes"], config.evaluation.split
    examples = min(config.evaluation.max_examples or sizes[split], sizes[split])
    final = (1 + config.training.ema) * hours(sizes["test"])  # averaged and raw weights
    # Where the last evaluation is of the whole test split, it is a part of the final one.
    last_is_final = split == "test" and examples >= sizes["test"]
    return (evaluations - last_is_final) * hours(examples) + final, final


def totals(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Hours of all configurations one after the other, of those that have figures."""
    judged = [report for report in reports if report["estimated_hours"] is not None]
    hours = sum(report["estimated_hours"] for report in judged)
    return {
        "accelerator": reports[0]["accelerator"],
        "judged": len(judged),
        "estimated_hours": hours,
        "chip_hours": hours * reports[0]["chips"],
        "share_of_month": hours / MONTH_HOURS,
    }
