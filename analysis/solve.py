"""Watch a trained model solve one puzzle, supervision step by supervision step.

    python analysis/solve.py --checkpoint runs/quickstart                 # a held-out puzzle with the fewest clues
    python analysis/solve.py --checkpoint runs/quickstart --example 7
    python analysis/solve.py --checkpoint FILE.pt "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sudoku
import trm_model
import utils
from checkpoint_manager import CheckpointManager, fetch_file, load_checkpoint
from data_loader_tpu import SudokuDatasetTPU
from dataset_cache import local_dataset
from run_folder import working_folder
from storage import cache_folder, join, open_folder
from utils import UserError


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("puzzle", nargs="?", help="the cells in reading order, . or 0 for an empty one")
    parser.add_argument("--checkpoint", required=True, metavar="FILE|RUN", help="a checkpoint, or a run's folder (its best one)")
    parser.add_argument("--example", type=int, metavar="K", help="without a puzzle: the K-th of the dataset's test split (from 0; default: one with the fewest clues)")
    return parser.parse_args()


def main():
    args = parse_args()
    path = find_checkpoint(args.checkpoint)
    model, config = load_model(path)
    puzzle = read_puzzle(args.puzzle, model) if args.puzzle else test_puzzle(config, args.example)
    solution = check_puzzle(puzzle, model)
    print(f"checkpoint {path}\npuzzle     {sudoku.format_grid(puzzle)}  ({np.count_nonzero(puzzle)} clues)")
    torch.set_num_threads(1)        # one puzzle is too little work to share
    solve(model, puzzle, solution)


def find_checkpoint(name):
    """Local path of a checkpoint file, or of the best one (the newest, if none was evaluated) of a run's folder; both may be gs://."""
    if name.endswith(".pt"):
        return fetch_file(name, cache_folder())
    manager = CheckpointManager(open_folder(join(name, "checkpoints")), 1, working_folder(name) / "checkpoints")
    return manager.resolve("best" if manager.best_marker() else "latest")


def load_model(path):
    """The model of one of this kit's checkpoints, with its averaged weights if it has any, and its configuration."""
    content = load_checkpoint(path)
    if not isinstance(content, dict) or "config" not in content:
        raise UserError(f"{path}: has no configuration with it, so it is no checkpoint of train_tpu.py: "
                        "start a run with --init_from and use that run's checkpoint")
    config, state = utils.config_from_dict(content["config"], str(path)), content["ema"] or content["model"]
    vocab_size = len(state[trm_model.CHECKPOINT_PREFIX + "lm_head.weight"])
    identifiers = len(state.get(trm_model.CHECKPOINT_PREFIX + "puzzle_emb.weights", [0]))
    model = trm_model.TinyRecursiveModel(config.model, (vocab_size - 2) ** 2, vocab_size, identifiers)
    trm_model.load_named_state(model, state, path)
    return model.eval(), config


def read_puzzle(text, model):
    try:
        puzzle = sudoku.parse(text)
    except ValueError as error:
        raise UserError(f"puzzle {text!r}: {error}") from None
    if len(puzzle) != model.seq_len:
        size = model.vocab_size - 2
        raise UserError(f"puzzle {text!r}: it has {len(puzzle)} cells; this checkpoint solves {size}x{size} grids, {model.seq_len} cells")
    return puzzle


def test_puzzle(config, example):
    dataset = SudokuDatasetTPU(local_dataset(config.data.dataset_path), "test")
    if example is None:
        example = int((dataset.inputs > 1).sum(1).argmin())
    if not 0 <= example < len(dataset):
        raise UserError(f"--example {example}: the test split of {dataset.path} has puzzles 0 to {len(dataset) - 1}")
    return dataset.inputs[example] - 1


def check_puzzle(puzzle, model):
    """The puzzle's one solution [S]; raises UserError where it has none or several."""
    text = sudoku.format_grid(puzzle)
    if sudoku.has_conflict(puzzle[None])[0]:
        raise UserError(f"puzzle {text}: two of its givens conflict (the same digit twice in a row, column or box): correct it")
    solutions = sudoku.solve(puzzle).solutions
    if len(solutions) != 1:
        raise UserError(f"puzzle {text}: it has {'no solution' if not solutions else 'more than one solution'}; "
                        f"a Sudoku has exactly one: {'correct' if not solutions else 'add'} a given")
    return np.frombuffer(solutions[0], np.uint8)


@torch.no_grad()
def solve(model, puzzle, solution):
    """Print the grid after every supervision step, with the cells that changed, the rules and the halting head."""
    carry = model.empty_carry(1)
    cells = torch.from_numpy(puzzle.astype(np.int32))[None] + 1
    batch = {"inputs": cells, "labels": torch.zeros_like(cells), "puzzle_identifiers": torch.zeros(1, dtype=torch.int32)}
    carry, before = model.admit(carry, batch), puzzle
    for step in range(1, model.config.halt_max_steps + 1):
        start = time.perf_counter()
        z_H, z_L, logits, q_halt = model.supervision_step(carry, model.puzzle_rows(carry))
        milliseconds = 1e3 * (time.perf_counter() - start)
        carry = carry._replace(z_H=z_H, z_L=z_L)
        grid = (logits[0].argmax(-1).clamp(min=1) - 1).numpy().astype(np.uint8)
        changed = grid != before
        broken = [sudoku.format_grid(grid[unit]) for unit in sudoku.units(model.vocab_size - 2) if len(set(grid[unit])) < len(unit) or 0 in grid[unit]]
        print(f"\nsupervision step {step}: {changed.sum()} cells changed, {(grid == solution).sum()} of {len(grid)} right, "
              f"{len(broken)} rows, columns or boxes broken, halting head {torch.sigmoid(q_halt[0]):.1%} sure, {milliseconds:.0f} ms")
        if changed.any():
            print(picture(grid, puzzle, changed, solution))
        before = grid
    kept = (grid == puzzle)[puzzle > 0].all()
    print(f"\n{'solved' if (grid == solution).all() else 'not solved'}: {sudoku.format_grid(grid)}" + ("" if kept else " (a given was overwritten)"))


def picture(grid, puzzle, changed, solution):
    """The grid as text: [5] changed at this step, 5 a clue or an earlier cell, 5? not the solution's, _ empty."""
    size = round(len(grid) ** 0.5)
    height, width = sudoku.box_shape(size)
    lines = []
    for row in range(size):
        if row and row % height == 0:
            lines.append("+".join("-" * (4 * width) for _ in range(size // width)))
        texts = []
        for cell in range(row * size, (row + 1) * size):
            digit = str(grid[cell]) if grid[cell] else "_"
            wrong = "?" if grid[cell] != solution[cell] else " "
            texts.append(f"[{digit}]{wrong}" if changed[cell] else f" {digit} {wrong}")
        lines.append("|".join("".join(texts[k:k + width]) for k in range(0, size, width)))
    return "\n".join(lines)


if __name__ == "__main__":
    utils.run_cli(main)
