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
from plot_bars import ablation, ema, final_accuracy, throughput
from plot_compute import curriculum, early_stop, precision
from plot_curves import X_AXES, accuracy_by_rating, accuracy_by_step, learning_curves
from plot_data import augmentations, data_scaling
from plot_grid import learning_rate_and_batch, schedule
from plot_scaling import pareto, pareto_steps, scaling
from plot_style import Figure, Kind, NoData, save
from plot_weights import weight_averages
from results import load_runs
from run_groups import Group, group_runs

from utils import UserError, run_cli

FIGURES = {
    **{
        f"learning_curves_{x}": Kind(f"Learning curves over {X_AXES[x]}", learning_curves(x))
        for x in X_AXES
    },
    "final_accuracy": Kind("Final accuracy of every configuration", final_accuracy),
    "ablation_ema": Kind("Averaged weights against raw weights", ema),
    "ablation_mixer": Kind(
        "Token MLP against self-attention",
        ablation(
            ("model.mlp_t",),
            ("model.pos_encodings",),
            lambda settings: (
                "token MLP"
                if settings["model.mlp_t"]
                else f"self-attention, {settings['model.pos_encodings']}"
            ),
            "Token MLP against self-attention.",
        ),
    ),
    "ablation_schedule": Kind("Which recursion, T cycles of n updates", schedule),
    "ablation_supervision": Kind(
        "How many supervision steps",
        ablation(
            ("model.halt_max_steps",),
            (),
            lambda settings: f"N_sup {settings['model.halt_max_steps']}",
            "Exact accuracy by supervision steps in training and at test time (N_sup).",
        ),
    ),
    "scaling_batch": Kind(
        "Error against the batch",
        scaling(
            ("training.global_batch_size",),
            (
                "training.lr",
                "training.lr_warmup_steps",
                "training.epochs",
                "training.puzzle_emb_lr",
            ),
            lambda run: run.config.training.global_batch_size,
            "global batch",
        ),
    ),
    "scaling_parameters": Kind(
        "Error against the size of the model",
        scaling(
            ("model.hidden_size", "model.L_layers"),
            ("model.puzzle_emb_ndim", "model.puzzle_emb_len", "model.num_heads"),
            lambda run: run.parameters,
            "parameters",
        ),
    ),
    "scaling_data": Kind("How many training puzzles", data_scaling),
    "augmentations": Kind("How many symmetries of each training puzzle", augmentations),
    "scaling_learning_rate_and_batch": Kind(
        "Which learning rate for which batch", learning_rate_and_batch
    ),
    "pareto_hours": Kind(
        "Accuracy against hours", pareto("hours", "hours of training", "hours of training")
    ),
    "pareto_chip_hours": Kind(
        "Accuracy against chip-hours",
        pareto(
            "chip_hours",
            "chip-hours of training",
            "chip-hours: none was trained on TPU chips or GPUs and has a starts.jsonl",
        ),
    ),
    "pareto_flops": Kind(
        "Accuracy against training compute",
        pareto("flops", "FLOP of training", "train_flops in its records"),
    ),
    "pareto_supervision_steps": Kind(
        "Accuracy against supervision steps at test time", pareto_steps
    ),
    "accuracy_by_rating": Kind("Accuracy by difficulty", accuracy_by_rating),
    "accuracy_by_supervision_step": Kind("Accuracy after each supervision step", accuracy_by_step),
    "curriculum": Kind("Does a depth that grows during training pay", curriculum),
    "early_stop": Kind("What a price on supervision steps saves at test time", early_stop),
    "precision": Kind("bfloat16 against float32", precision),
    "weight_averages": Kind("Averages of checkpoints against the EMA", weight_averages),
    "throughput": Kind("Training speed", throughput),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="figures:\n"
        + "\n".join(f"  {name:33} {kind.title}" for name, kind in FIGURES.items()),
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
            print(f"{save(drawn, out)}: {drawn.caption} {drawn.finding}".rstrip())


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
    for kind_name, kind in FIGURES.items():
        try:
            drawings = kind.draw(groups)
        except NoData as reason:
            yield kind_name, str(reason)
            continue
        for number, drawing in enumerate(drawings, 1):
            name, title = kind_name, kind.title
            if number > 1:
                name, title = f"{name}_{number}", f"{title} ({number})"
            parts = drawing.fig, drawing.caption, drawing.data, name, kind_name, title
            yield name, Figure(*parts, finding=drawing.finding)


if __name__ == "__main__":
    run_cli(main)
