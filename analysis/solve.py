"""Watch a trained model solve puzzles, supervision step by supervision step.

    # a held-out puzzle with the fewest clues
    python analysis/solve.py --checkpoint runs/quickstart
    python analysis/solve.py --checkpoint runs/quickstart --example 7 --gif solve.gif
    # a file of puzzles, one a line or as grids
    python analysis/solve.py --checkpoint gs://my-bucket/runs/e1_1 puzzles.txt
    python analysis/solve.py --checkpoint FILE.pt \\
        53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import startup

startup.require("torch")
import argparse
import os
import time
from typing import NamedTuple

import numpy as np
import torch

import sudoku
import trm_model
from checkpoint_manager import CheckpointManager, fetch_file, load_checkpoint
from config import Config, config_from_dict
from data_loader_tpu import SudokuDatasetTPU
from dataset_cache import local_dataset
from device import Device
from run_folder import working_folder
from storage import cache_folder, is_remote, join, open_folder
from train_state import settle_forward_dtype
from utils import UserError, run_cli, warn

# Colours that colour-blind readers tell apart (Okabe and Ito 2008). The marks also differ in shape:
# a frame and a filled square.
CHANGED, CONFLICT = "#0072B2", "#F2B84B"
FRAME_MS, FIRST_MS, LAST_MS = 1200, 2000, 4000


class Step(NamedTuple):
    """What one supervision step answered. S: cells of the grid."""

    grid: np.ndarray  # uint8 [S] of 0..size
    changed: np.ndarray  # bool [S], against the step before, or for the first against the puzzle
    conflicts: np.ndarray  # bool [S], see `conflicts`
    halting: float  # confidence of the halting head, 0 to 1; training stops at 0.5
    milliseconds: float  # wall time


def parse_args() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "cells in reading order, . or 0 for an empty one; or a file of puzzles, one a line or "
    add("puzzle", nargs="?", help=f"{text}as grids")
    text = "a checkpoint, or the folder of a run: its best checkpoint by exact accuracy"
    add("--checkpoint", required=True, metavar="FILE|RUN", help=text)
    text = "without a puzzle: number K of the dataset's test split, from 0 (default: one with the "
    add("--example", type=int, metavar="K", help=f"{text}fewest clues)")
    text = "also write the steps of one puzzle as an animation (needs requirements-analysis.txt)"
    add("--gif", metavar="FILE", help=text)
    args = parser.parse_args()
    if args.puzzle is not None and args.example is not None:
        raise UserError(f"--example {args.example}: not with a puzzle: give one or the other")
    if args.gif:
        check_gif(args.gif)
    return args


def main() -> None:
    """Print the steps of each puzzle, and write the animation if there is to be one."""
    args = parse_args()
    path = find_checkpoint(args.checkpoint)
    model, config = load_model(path)
    if args.puzzle is None:
        puzzles = [test_puzzle(config, args.example)]
    else:
        puzzles = read_puzzles(args.puzzle, model)
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


# --------------------------------------------------------------------------------------------------
# The model and the puzzles
# --------------------------------------------------------------------------------------------------
def find_checkpoint(name: str) -> Path:
    """Local path of a checkpoint file (.pt), or of the best checkpoint of a run's folder.

    Both may be gs://. If no checkpoint was evaluated, it is the newest. Raises UserError if there
    is none.
    """
    if name.endswith(".pt"):
        return fetch_file(name, cache_folder())
    folder = open_folder(join(name, "checkpoints"))
    manager = CheckpointManager(folder, 1, working_folder(name) / "checkpoints")
    if not manager.markers():
        if not is_remote(name) and not Path(name).is_dir():
            raise UserError(f"--checkpoint {name}: there is no such folder in {Path.cwd()}")
        runs = [] if is_remote(name) else sorted(Path(name).glob("*/checkpoints"))
        others = ", ".join(str(run.parent) for run in runs)
        there = f"give one of its runs: {others}" if others else "give the folder of a run"
        raise UserError(
            f"--checkpoint {name}: there is no checkpoint in {folder.url}: {there}, or a file"
        )
    return manager.resolve("best" if manager.best_marker() else "latest")


def load_model(path: Path) -> tuple[trm_model.TinyRecursiveModel, Config]:
    """The model of one of this kit's checkpoints, on the CPU, and its configuration.

    It has the averaged weights if there are any. Raises UserError for any other file.
    """
    content = load_checkpoint(path)
    if not isinstance(content, dict) or "config" not in content:
        raise UserError(
            f"{path}: there is no configuration in it, so train_tpu.py has not written it: start a "
            "run with --init_from, and use a checkpoint of that run"
        )
    config = settle_forward_dtype(config_from_dict(content["config"], str(path)), Device("cpu"))
    state = content["ema"] or content["model"]
    vocab_size = len(state[trm_model.CHECKPOINT_PREFIX + "lm_head.weight"])
    identifiers = len(state.get(trm_model.CHECKPOINT_PREFIX + "puzzle_emb.weights", [0]))
    seq_len = (vocab_size - 2) ** 2
    model = trm_model.TinyRecursiveModel(config.model, seq_len, vocab_size, identifiers)
    trm_model.load_named_state(model, state, str(path))
    return model.eval(), config


def read_puzzles(text: str, model: trm_model.TinyRecursiveModel) -> list[np.ndarray]:
    """Puzzles, each uint8 [S] of 0..size: `text` is one, or the name of a file of puzzles.

    For the format of the file see `sudoku.split_puzzles`. Raises UserError for the first bad one.
    """
    if os.path.isfile(text):
        lines = sudoku.split_puzzles(Path(text).read_text(errors="replace"))
        puzzles = [read_puzzle(cells, f"{text} line {line}", model) for line, cells in lines]
    elif set(text) - set(".0123456789 \n"):
        raise UserError(
            f"{text!r}: there is no such file in {Path.cwd()}, and it is no puzzle either, which "
            "has only digits, and . for an empty cell"
        )
    else:
        found = sudoku.split_puzzles(text)
        puzzles = [read_puzzle(cells, f"puzzle {cells!r}", model) for _, cells in found]
    if not puzzles:
        raise UserError(
            f"{text!r}: holds no puzzle: write one a line, its cells in reading order, . for an "
            "empty one"
        )
    return puzzles


def read_puzzle(text: str, source: str, model: trm_model.TinyRecursiveModel) -> np.ndarray:
    """One puzzle, uint8 [S]; raises UserError, which names `source`, if the model cannot take it or
    it has no solution."""
    try:
        puzzle = sudoku.parse(text)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if len(puzzle) != model.seq_len:
        size = model.vocab_size - 2
        raise UserError(
            f"{source}: it has {len(puzzle)} cells; this checkpoint solves {size}x{size} grids, "
            f"{model.seq_len} cells"
        )
    if sudoku.has_conflict(puzzle[None])[0]:
        raise UserError(
            f"{source}: two of its givens conflict (the same digit twice in a row, column or "
            "box): correct it"
        )
    if not sudoku.solve(puzzle, 1).solutions:
        raise UserError(f"{source}: it has no solution: correct a given")
    return puzzle


def test_puzzle(config: Config, example: int | None) -> np.ndarray:
    """Puzzle number `example` of the test split, uint8 [S]; None: one with the fewest clues."""
    dataset = SudokuDatasetTPU(local_dataset(config.data.dataset_path), "test")
    if example is None:
        example = int((dataset.inputs > 1).sum(1).argmin())
    if not 0 <= example < len(dataset):
        raise UserError(
            f"--example {example}: the test split of {dataset.path} has puzzles 0 to "
            f"{len(dataset) - 1}"
        )
    return dataset.inputs[example] - 1


def find_solution(puzzle: np.ndarray) -> np.ndarray | None:
    """The puzzle's only solution, [S]; None, and a warning, if it has more than one."""
    solutions = sudoku.solve(puzzle).solutions
    if len(solutions) == 1:
        return np.frombuffer(solutions[0], np.uint8)
    warn(
        f"puzzle {sudoku.format_grid(puzzle)} has more than one solution. The model was trained on "
        "puzzles with exactly one; here any grid that keeps the rules counts as solved"
    )
    return None


@torch.no_grad()
def supervision_steps(model: trm_model.TinyRecursiveModel, puzzle: np.ndarray) -> list[Step]:
    """The model's answer to puzzle [S] after each of its halt_max_steps supervision steps."""
    carry = model.empty_carry(1)
    cells = torch.from_numpy(puzzle.astype(np.int32))[None] + 1
    batch = {
        "inputs": cells,
        "labels": torch.zeros_like(cells),
        "puzzle_identifiers": torch.zeros(1, dtype=torch.int32),
    }
    carry, before = model.admit(carry, batch), puzzle
    steps: list[Step] = []
    for _ in range(model.config.halt_max_steps):
        start = time.perf_counter()
        z_H, z_L, logits, q_halt = model.supervision_step(carry, model.puzzle_rows(carry))
        milliseconds = 1e3 * (time.perf_counter() - start)
        carry = carry._replace(z_H=z_H, z_L=z_L)
        grid = (logits[0].argmax(-1).clamp(min=1) - 1).numpy().astype(np.uint8)
        broken, halting = conflicts(grid, puzzle), torch.sigmoid(q_halt[0]).item()
        steps.append(Step(grid, grid != before, broken, halting, milliseconds))
        before = grid
    return steps


def conflicts(grid: np.ndarray, puzzle: np.ndarray) -> np.ndarray:
    """Which cells break a rule, bool [S]: the same digit again in the row, column or box, an empty
    cell, or a given that was overwritten. No cell does if, and only if, the puzzle is solved."""
    found = (grid == 0) | ((puzzle > 0) & (grid != puzzle))
    for unit in sudoku.units(sudoku.size_of(len(grid))):
        digits = grid[unit]
        found[unit] |= (digits[:, None] == digits).sum(1) > 1
    return found


def rules_text(step: Step) -> str:
    """In words, how many cells break a rule."""
    broken = int(step.conflicts.sum())
    return f"{broken} break{'s' if broken == 1 else ''} a rule" if broken else "the rules hold"


# --------------------------------------------------------------------------------------------------
# As text
# --------------------------------------------------------------------------------------------------
def print_steps(puzzle: np.ndarray, steps: list[Step], solution: np.ndarray | None) -> None:
    """Print the grid after each step, with marks. solution: None if there is more than one."""
    print("marks      [5] changed at this step   5! breaks a rule   _ empty")
    for number, step in enumerate(steps, 1):
        right = ""
        if solution is not None:
            right = f"{(step.grid == solution).sum()} of {len(puzzle)} right, "
        print(
            f"\nsupervision step {number}: {step.changed.sum()} cells changed, {right}"
            f"{rules_text(step)}, halting head {step.halting:.1%} sure, "
            f"{step.milliseconds:.0f} ms"
        )
        if step.changed.any():
            print(picture(step))
    grid = steps[-1].grid
    notes = []
    if (grid != puzzle)[puzzle > 0].any():
        notes.append("a given was overwritten")
    if solution is None:
        notes.append("the puzzle has many solutions")
    verdict = "not solved" if steps[-1].conflicts.any() else "solved"
    note = f" ({', '.join(notes)})" if notes else ""
    print(f"\n{verdict}: {sudoku.format_grid(grid)}{note}")


def picture(step: Step) -> str:
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
        boxes = ("".join(texts[k : k + width]) for k in range(0, size, width))
        lines.append("|".join(boxes).rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# As an animation
# --------------------------------------------------------------------------------------------------
def check_gif(path: str) -> None:
    """Raises UserError if no animation can be written to `path`."""
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


def write_gif(path: str, puzzle: np.ndarray, steps: list[Step]) -> None:
    """Write the puzzle and then its steps as an animated GIF, whole or not at all."""
    from PIL import Image

    nothing = np.zeros(len(puzzle), bool)
    start = Step(puzzle, nothing, nothing, 0.0, 0.0)
    frames = [draw_frame(puzzle, start, f"puzzle with {np.count_nonzero(puzzle)} givens", "")]
    for number, step in enumerate(steps, 1):
        title = f"supervision step {number} of {len(steps)}"
        remark = f"{step.changed.sum()} cells changed, {rules_text(step)}"
        frames.append(draw_frame(puzzle, step, title, remark))
    # one palette for all frames: with a palette each, parts that do not change would shimmer
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


def draw_frame(puzzle: np.ndarray, step: Step, title: str, remark: str) -> np.ndarray:
    """One picture, uint8 [height, width, 3].

    Givens are bold, cells that changed have a frame, and cells that break a rule are filled.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 4.7), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    _draw_grid(figure, puzzle, step)
    figure.text(0.06, 0.955, title, fontsize=11, weight="bold", va="center")
    figure.text(0.06, 0.915, remark, fontsize=9, va="center")
    bar = figure.add_axes((0.06, 0.115, 0.88, 0.03), xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    bar.barh(0.5, step.halting, 1, color="#555555")
    bar.axvline(0.5, color="black", linewidth=1, linestyle=":")
    confidence = f"halting confidence {step.halting:.1%}" if remark else "halting confidence"
    figure.text(0.06, 0.17, confidence, fontsize=9, va="center")
    figure.text(0.5, 0.1, "training stops here", fontsize=6.5, ha="center", va="top")
    _draw_legend(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_grid(figure, puzzle: np.ndarray, step: Step) -> None:
    size = sudoku.size_of(len(puzzle))
    height, width = sudoku.box_shape(size)
    limits = {"xlim": (-0.05, size + 0.05), "ylim": (size + 0.05, -0.05)}
    axes = figure.add_axes((0.05, 0.205, 0.9, 0.69), aspect="equal", **limits)
    axes.axis("off")
    for cell, digit in enumerate(step.grid):
        y, x = divmod(cell, size)
        _draw_square(axes, x, y, 1, step.changed[cell], step.conflicts[cell])
        given = puzzle[cell] > 0 and digit == puzzle[cell]
        axes.text(
            x + 0.5,
            y + 0.53,
            str(digit) if digit else "",
            fontsize=135 / size,
            ha="center",
            va="center",
            weight="bold" if given else "normal",
            color="black" if given else "#333333",
            zorder=4,
        )
    for line in range(size + 1):
        row_width, column_width = (1.8 if line % lines == 0 else 0.5 for lines in (height, width))
        axes.plot([0, size], [line, line], color="black", linewidth=row_width, zorder=2)
        axes.plot([line, line], [0, size], color="black", linewidth=column_width, zorder=2)


def _draw_square(axes, x: float, y: float, side: float, changed: bool, conflict: bool) -> None:
    """A cell with its left upper corner at (x, y), with the marks of what applies to it."""
    from matplotlib.patches import Rectangle

    fill = CONFLICT if conflict else "white"
    axes.add_patch(Rectangle((x, y), side, side, facecolor=fill, edgecolor="none", zorder=0))
    if changed:
        corner, inner = (x + 0.09 * side, y + 0.09 * side), 0.82 * side
        frame = Rectangle(corner, inner, inner, fill=False, edgecolor=CHANGED, linewidth=1.8)
        frame.set_zorder(3)
        axes.add_patch(frame)


def _draw_legend(figure) -> None:
    axes = figure.add_axes((0, 0, 1, 0.07), xlim=(0, 3.6), ylim=(0.329, 0))
    axes.axis("off")
    for x, text, changed, conflict in (
        (0.2, "given", False, False),
        (1.05, "changed now", True, False),
        (2.3, "breaks a rule", False, True),
    ):
        _draw_square(axes, x, 0.05, 0.2, changed, conflict)
        weight = "normal" if changed or conflict else "bold"
        axes.text(x + 0.1, 0.158, "5", fontsize=8, ha="center", va="center", weight=weight)
        axes.text(x + 0.27, 0.155, text, fontsize=8, va="center")


if __name__ == "__main__":
    run_cli(main)
