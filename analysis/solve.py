"""Watch a trained model solve puzzles, supervision step by supervision step.

python analysis/solve.py --checkpoint runs/quickstart                 # a held-out puzzle with the fewest clues
python analysis/solve.py --checkpoint runs/quickstart --example 7 --gif solve.gif
python analysis/solve.py --checkpoint gs://my-bucket/runs/e1_1 puzzles.txt
python analysis/solve.py --checkpoint FILE.pt "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sudoku
import trm_model
from checkpoint_manager import CheckpointManager, fetch_file, load_checkpoint
from config import config_from_dict
from data_loader_tpu import SudokuDatasetTPU
from dataset_cache import local_dataset
from run_folder import working_folder
from storage import cache_folder, join, open_folder
from utils import UserError, run_cli

# colours that colour-blind readers tell apart (Okabe and Ito 2008); the marks differ in shape besides, a frame and a fill
CHANGED, CONFLICT = "#0072B2", "#F2B84B"
FRAME_MS, FIRST_MS, LAST_MS = 1200, 2000, 4000


class Step(NamedTuple):
    """What one supervision step answered, [S] each: grid uint8 of 0..size; changed, bool, against the step before (the first: against
    the puzzle); conflicts, bool, see `conflicts`. halting: the halting head's confidence, 0..1; training stops at 0.5. milliseconds: wall time."""

    grid: np.ndarray
    changed: np.ndarray
    conflicts: np.ndarray
    halting: float
    milliseconds: float


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "puzzle",
        nargs="?",
        help="the cells in reading order, . or 0 for an empty one; or a file with one puzzle a line",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE|RUN",
        help="a checkpoint, or a run's folder (its best one)",
    )
    parser.add_argument(
        "--example",
        type=int,
        metavar="K",
        help="without a puzzle: the K-th of the dataset's test split (from 0; default: one with the fewest clues)",
    )
    parser.add_argument(
        "--gif",
        metavar="FILE",
        help="also write the steps of one puzzle as an animation (needs requirements-analysis.txt)",
    )
    args = parser.parse_args()
    if args.puzzle and args.example is not None:
        raise UserError(f"--example {args.example}: not with a puzzle: give one or the other")
    if args.gif:
        check_gif(args.gif)
    return args


def main():
    args = parse_args()
    path = find_checkpoint(args.checkpoint)
    model, config = load_model(path)
    puzzles = (
        read_puzzles(args.puzzle, model) if args.puzzle else [test_puzzle(config, args.example)]
    )
    if args.gif and len(puzzles) > 1:
        raise UserError(
            f"--gif {args.gif}: shows one puzzle, and {args.puzzle} has {len(puzzles)}: give one"
        )
    solutions = [find_solution(puzzle) for puzzle in puzzles]
    print(f"checkpoint {path}")
    torch.set_num_threads(1)  # one puzzle is too little work to share
    solved = 0
    for puzzle, solution in zip(puzzles, solutions):
        print(f"puzzle     {sudoku.format_grid(puzzle)}  ({np.count_nonzero(puzzle)} clues)")
        steps = supervision_steps(model, puzzle)
        print_steps(puzzle, steps, solution)
        solved += not steps[-1].conflicts.any()
    if len(puzzles) > 1:
        print(f"{solved} of {len(puzzles)} puzzles solved")
    if args.gif:
        write_gif(args.gif, puzzles[0], steps)
        print(f"{args.gif}: {len(steps) + 1} frames, {os.path.getsize(args.gif) / 1000:.0f} kB")


def find_checkpoint(name):
    """Local path of a checkpoint file, or of the best one (the newest, if none was evaluated) of a run's folder; both may be gs://."""
    if name.endswith(".pt"):
        return fetch_file(name, cache_folder())
    manager = CheckpointManager(
        open_folder(join(name, "checkpoints")), 1, working_folder(name) / "checkpoints"
    )
    return manager.resolve("best" if manager.best_marker() else "latest")


def load_model(path):
    """The model of one of this kit's checkpoints, with its averaged weights if it has any, and its configuration."""
    content = load_checkpoint(path)
    if not isinstance(content, dict) or "config" not in content:
        raise UserError(
            f"{path}: has no configuration with it, so it is no checkpoint of train_tpu.py: "
            "start a run with --init_from and use that run's checkpoint"
        )
    config, state = (
        config_from_dict(content["config"], str(path)),
        content["ema"] or content["model"],
    )
    vocab_size = len(state[trm_model.CHECKPOINT_PREFIX + "lm_head.weight"])
    identifiers = len(state.get(trm_model.CHECKPOINT_PREFIX + "puzzle_emb.weights", [0]))
    model = trm_model.TinyRecursiveModel(
        config.model, (vocab_size - 2) ** 2, vocab_size, identifiers
    )
    trm_model.load_named_state(model, state, path)
    return model.eval(), config


def read_puzzles(text, model):
    """[S] uint8 of 0..size for each puzzle: `text` is one, or a file with one a line. Raises UserError naming the first bad one."""
    if not os.path.isfile(text):
        return [read_puzzle(text, f"puzzle {text!r}", model, "; and no file has this name")]
    lines = enumerate(Path(text).read_text(errors="replace").splitlines(), 1)
    puzzles = [
        read_puzzle(line.strip(), f"{text} line {number}", model)
        for number, line in lines
        if line.strip()
    ]
    if not puzzles:
        raise UserError(
            f"{text}: holds no puzzle: write one a line, its cells in reading order, . for an empty one"
        )
    return puzzles


def read_puzzle(text, source, model, hint=""):
    try:
        puzzle = sudoku.parse(text)
    except ValueError as error:
        raise UserError(f"{source}: {error}{hint}") from None
    if len(puzzle) != model.seq_len:
        size = model.vocab_size - 2
        raise UserError(
            f"{source}: it has {len(puzzle)} cells; this checkpoint solves {size}x{size} grids, {model.seq_len} cells"
        )
    if sudoku.has_conflict(puzzle[None])[0]:
        raise UserError(
            f"{source}: two of its givens conflict (the same digit twice in a row, column or box): correct it"
        )
    if not sudoku.solve(puzzle, 1).solutions:
        raise UserError(f"{source}: it has no solution: correct a given")
    return puzzle


def test_puzzle(config, example):
    dataset = SudokuDatasetTPU(local_dataset(config.data.dataset_path), "test")
    if example is None:
        example = int((dataset.inputs > 1).sum(1).argmin())
    if not 0 <= example < len(dataset):
        raise UserError(
            f"--example {example}: the test split of {dataset.path} has puzzles 0 to {len(dataset) - 1}"
        )
    return dataset.inputs[example] - 1


def find_solution(puzzle):
    """The puzzle's one solution [S]; where it has several, None and a warning."""
    solutions = sudoku.solve(puzzle).solutions
    if len(solutions) == 1:
        return np.frombuffer(solutions[0], np.uint8)
    print(
        f"warning: puzzle {sudoku.format_grid(puzzle)} has more than one solution; a Sudoku has one, and the model was trained on such: "
        "any grid that keeps the rules counts here",
        file=sys.stderr,
        flush=True,
    )


@torch.no_grad()
def supervision_steps(model, puzzle):
    """The model's answer to puzzle [S] after each of its halt_max_steps supervision steps: list of Step."""
    carry = model.empty_carry(1)
    cells = torch.from_numpy(puzzle.astype(np.int32))[None] + 1
    batch = {
        "inputs": cells,
        "labels": torch.zeros_like(cells),
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32),
    }
    carry, before, steps = model.admit(carry, batch), puzzle, []
    for _ in range(model.config.halt_max_steps):
        start = time.perf_counter()
        z_H, z_L, logits, q_halt = model.supervision_step(carry, model.puzzle_rows(carry))
        milliseconds = 1e3 * (time.perf_counter() - start)
        carry = carry._replace(z_H=z_H, z_L=z_L)
        grid = (logits[0].argmax(-1).clamp(min=1) - 1).numpy().astype(np.uint8)
        steps.append(
            Step(
                grid,
                grid != before,
                conflicts(grid, puzzle),
                torch.sigmoid(q_halt[0]).item(),
                milliseconds,
            )
        )
        before = grid
    return steps


def conflicts(grid, puzzle):
    """Which cells break a rule, bool [S]: the same digit again in the row, column or box, an empty cell, or a given overwritten.
    None does where, and only where, the puzzle is solved."""
    found = (grid == 0) | ((puzzle > 0) & (grid != puzzle))
    for unit in sudoku.units(sudoku.size_of(len(grid))):
        digits = grid[unit]
        found[unit] |= (digits[:, None] == digits).sum(1) > 1
    return found


def rules(step):
    broken = int(step.conflicts.sum())
    return f"{broken} break{'s' if broken == 1 else ''} a rule" if broken else "the rules hold"


# ---------------------------------------------------------------------------------------------------------
# As text
# ---------------------------------------------------------------------------------------------------------
def print_steps(puzzle, steps, solution):
    print("marks      [5] changed at this step   5! breaks a rule   _ empty")
    for number, step in enumerate(steps, 1):
        right = (
            "" if solution is None else f"{(step.grid == solution).sum()} of {len(puzzle)} right, "
        )
        print(
            f"\nsupervision step {number}: {step.changed.sum()} cells changed, {right}{rules(step)}, "
            f"halting head {step.halting:.1%} sure, {step.milliseconds:.0f} ms"
        )
        if step.changed.any():
            print(picture(step))
    grid = steps[-1].grid
    kept = (grid == puzzle)[puzzle > 0].all()
    print(
        f"\n{'not solved' if steps[-1].conflicts.any() else 'solved'}: {sudoku.format_grid(grid)}"
        + ("" if kept else " (a given was overwritten)")
    )


def picture(step):
    """The grid as text, with the marks of `print_steps`."""
    size = sudoku.size_of(len(step.grid))
    height, width = sudoku.box_shape(size)
    lines = []
    for row in range(size):
        if row and row % height == 0:
            lines.append("+".join("-" * (4 * width) for _ in range(size // width)))
        texts = []
        for cell in range(row * size, (row + 1) * size):
            digit, mark = step.grid[cell] or "_", "!" if step.conflicts[cell] else " "
            texts.append(f"[{digit}]{mark}" if step.changed[cell] else f" {digit}{mark} ")
        lines.append(
            "|".join("".join(texts[k : k + width]) for k in range(0, size, width)).rstrip()
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# As an animation
# ---------------------------------------------------------------------------------------------------------
def check_gif(path):
    """Raises UserError where `path` cannot become an animation."""
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--gif {path}: {error.name} is not installed: pip install -r requirements-analysis.txt"
        ) from None
    folder = Path(path).parent
    if not path.endswith(".gif") or not folder.is_dir() or Path(path).is_dir():
        raise UserError(
            f"--gif {path}: must be a file NAME.gif in a folder that exists on this machine"
            + ("" if folder.is_dir() else f"; there is no folder {folder}")
        )


def write_gif(path, puzzle, steps):
    """Write the puzzle and then its steps (list of Step) as an animated GIF, whole or not at all."""
    from PIL import Image

    nothing = np.zeros(len(puzzle), bool)
    start = Step(puzzle, nothing, nothing, 0.0, 0.0)
    frames = [draw_frame(puzzle, start, f"puzzle with {np.count_nonzero(puzzle)} givens", "")]
    for number, step in enumerate(steps, 1):
        frames.append(
            draw_frame(
                puzzle,
                step,
                f"supervision step {number} of {len(steps)}",
                f"{step.changed.sum()} cells changed, {rules(step)}",
            )
        )
    # one palette for all: with its own each, a still part would shimmer
    palette = Image.fromarray(np.concatenate(frames)).quantize(64, Image.Quantize.FASTOCTREE)
    images = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    temporary = f"{path}.tmp"
    try:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            loop=0,
            optimize=True,
            duration=[FIRST_MS] + [FRAME_MS] * (len(steps) - 1) + [LAST_MS],
        )
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def draw_frame(puzzle, step, title, remark):
    """One picture, uint8 [height, width, 3]: givens bold, a frame round what changed, a fill behind what breaks a rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    size = sudoku.size_of(len(puzzle))
    height, width = sudoku.box_shape(size)
    figure = Figure(figsize=(3.6, 4.7), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes(
        (0.05, 0.205, 0.9, 0.69),
        xlim=(-0.05, size + 0.05),
        ylim=(size + 0.05, -0.05),
        aspect="equal",
    )
    ax.axis("off")
    digit_points = 135 / size

    def square(place, x, y, side, changed, conflict):
        place.add_patch(
            Rectangle(
                (x, y),
                side,
                side,
                facecolor=CONFLICT if conflict else "white",
                edgecolor="none",
                zorder=0,
            )
        )
        if changed:
            place.add_patch(
                Rectangle(
                    (x + 0.09 * side, y + 0.09 * side),
                    0.82 * side,
                    0.82 * side,
                    fill=False,
                    edgecolor=CHANGED,
                    linewidth=1.8,
                    zorder=3,
                )
            )

    for cell, digit in enumerate(step.grid):
        y, x = divmod(cell, size)
        square(ax, x, y, 1, step.changed[cell], step.conflicts[cell])
        given = puzzle[cell] > 0 and digit == puzzle[cell]
        ax.text(
            x + 0.5,
            y + 0.53,
            str(digit) if digit else "",
            fontsize=digit_points,
            ha="center",
            va="center",
            weight="bold" if given else "normal",
            color="black" if given else "#333333",
            zorder=4,
        )
    for line in range(size + 1):
        ax.plot(
            [0, size],
            [line, line],
            color="black",
            linewidth=1.8 if line % height == 0 else 0.5,
            zorder=2,
        )
        ax.plot(
            [line, line],
            [0, size],
            color="black",
            linewidth=1.8 if line % width == 0 else 0.5,
            zorder=2,
        )

    figure.text(0.06, 0.955, title, fontsize=11, weight="bold", va="center")
    figure.text(0.06, 0.915, remark, fontsize=9, va="center")
    bar = figure.add_axes((0.06, 0.115, 0.88, 0.03), xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    bar.barh(0.5, step.halting, 1, color="#555555")
    bar.axvline(0.5, color="black", linewidth=1, linestyle=":")
    figure.text(
        0.06,
        0.17,
        f"halting confidence {step.halting:.1%}" if remark else "halting confidence",
        fontsize=9,
        va="center",
    )
    figure.text(0.5, 0.1, "training stops here", fontsize=6.5, ha="center", va="top")
    legend = figure.add_axes((0, 0, 1, 0.07), xlim=(0, 3.6), ylim=(0.329, 0))
    legend.axis("off")
    for x, text, marks in (
        (0.2, "given", ()),
        (1.05, "changed now", ("changed",)),
        (2.3, "breaks a rule", ("conflict",)),
    ):
        square(legend, x, 0.05, 0.2, "changed" in marks, "conflict" in marks)
        legend.text(
            x + 0.1,
            0.158,
            "5",
            fontsize=8,
            ha="center",
            va="center",
            weight="normal" if marks else "bold",
            zorder=4,
        )
        legend.text(x + 0.27, 0.155, text, fontsize=8, va="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


if __name__ == "__main__":
    run_cli(main)
