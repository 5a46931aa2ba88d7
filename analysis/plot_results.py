"""Draw the figures of a study from its run folders.

    python analysis/plot_results.py --results_dir runs --out figures
    python analysis/plot_results.py --results_dir gs://my-bucket/runs --out figures

Each figure is written as NAME.png, NAME.pdf and NAME.csv (the numbers drawn), 3.3 inches wide. A
figure for which there are no numbers is not written; a line says which and why.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import analysis_startup

analysis_startup.require("matplotlib", "pandas", "scipy")
from plot_bars import ablation, ema, final_accuracy, learning_rate_and_batch, schedule, throughput
from plot_curves import X_AXES, accuracy_by_rating, accuracy_by_step, learning_curves
from plot_scaling import pareto, pareto_steps, scaling
from plot_style import Figure, NoData, save
from results import load_runs
from run_groups import Group, group_runs

from utils import UserError, run_cli

# {name: function of the groups, which returns [Drawing] or raises NoData}
FIGURES = {
    **{f"learning_curves_{x}": learning_curves(x) for x in X_AXES},
    "final_accuracy": final_accuracy,
    "ablation_ema": ema,
    "ablation_mixer": ablation(
        ("model.mlp_t",),
        ("model.pos_encodings",),
        lambda settings: (
            "token MLP"
            if settings["model.mlp_t"]
            else f"self-attention, {settings['model.pos_encodings']}"
        ),
        "Token MLP against self-attention.",
    ),
    "ablation_schedule": schedule,
    "ablation_supervision": ablation(
        ("model.halt_max_steps",),
        (),
        lambda settings: f"N_sup {settings['model.halt_max_steps']}",
        "Exact accuracy by supervision steps in training and at test time (N_sup).",
    ),
    "scaling_batch": scaling(
        ("training.global_batch_size",),
        ("training.lr", "training.lr_warmup_steps", "training.epochs", "training.puzzle_emb_lr"),
        lambda run: run.config.training.global_batch_size,
        "global batch",
    ),
    "scaling_parameters": scaling(
        ("model.hidden_size", "model.L_layers"),
        ("model.puzzle_emb_ndim", "model.puzzle_emb_len", "model.num_heads"),
        lambda run: run.parameters,
        "parameters",
    ),
    "scaling_data": scaling(
        ("dataset.train",), ("training.epochs",), lambda run: run.train_puzzles, "training puzzles"
    ),
    "scaling_learning_rate_and_batch": learning_rate_and_batch,
    "pareto_hours": pareto("hours", "hours of training", "hours of training"),
    "pareto_chip_hours": pareto(
        "chip_hours",
        "chip-hours of training",
        "chip-hours: none was trained on TPU chips or GPUs and has a starts.jsonl",
    ),
    "pareto_flops": pareto("flops", "FLOP of training", "model_flops_per_second in its records"),
    "pareto_supervision_steps": pareto_steps,
    "accuracy_by_rating": accuracy_by_rating,
    "accuracy_by_supervision_step": accuracy_by_step,
    "throughput": throughput,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--results_dir",
        required=True,
        metavar="DIR",
        help="folder with runs at any depth, local or gs://",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the figures")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    groups = group_runs(load_runs(args.results_dir))
    out = make_folder(args.out)
    for name, drawn in draw_all(groups):
        if isinstance(drawn, str):
            print(f"not drawn: {name}: {drawn}")
        else:
            print(f"{save(drawn, out)}: {drawn.caption}")


def make_folder(path: str | Path) -> Path:
    """The folder `path`, made if it is not there; raises UserError where that is not possible."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {path}: this folder cannot be made ({error.strerror}): name another"
        ) from None
    return Path(path)


def draw_all(groups: Sequence[Group]) -> Iterator[tuple[str, Figure | str]]:
    """(name, Figure) of every kind of figure, or (name, why there is none).

    A kind may have several figures: each of at most plot_style.MAX_LINES groups, or one for each
    set of comparable runs.
    """
    for kind, draw in FIGURES.items():
        try:
            drawings = draw(groups)
        except NoData as reason:
            yield kind, str(reason)
            continue
        for number, drawing in enumerate(drawings, 1):
            name = kind if number == 1 else f"{kind}_{number}"
            yield name, Figure(drawing.fig, drawing.caption, drawing.data, name)


if __name__ == "__main__":
    run_cli(main)
