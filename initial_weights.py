"""Weights to start a training from, or to evaluate: of a checkpoint of this kit or of the
original."""

from typing import Any

import torch

import trm_model
from checkpoint_manager import fetch_file, load_checkpoint
from collectives import Workers
from config import Config
from data_loader_tpu import SudokuDatasetTPU
from storage import cache_folder
from train_state import create_model
from utils import UserError


def weights_in(content: Any, source: str) -> dict[str, dict[str, torch.Tensor]]:
    """{"ema": averaged weights, if there are any, "raw": weights} of the content of a checkpoint.

    Each is a state dict. source: a name for messages. Raises UserError if the file holds no
    weights.
    """
    ours = isinstance(content, dict) and isinstance(content.get("model"), dict)
    states = {"ema": content.get("ema"), "raw": content["model"]} if ours else {"raw": content}
    states = {name: state for name, state in states.items() if state is not None}
    for state in states.values():
        is_dict = isinstance(state, dict) and state
        if not is_dict or not all(hasattr(value, "shape") for value in state.values()):
            raise UserError(f"{source}: holds no state dict")
    return states


def initial_weights(
    config: Config, dataset: SudokuDatasetTPU, path: str, workers: Workers
) -> dict[str, torch.Tensor]:
    """The raw weights of the checkpoint at `path` (local or gs://), for a new run.

    Rank 0 prints which of them the model does not use. Raises UserError if there is no such file,
    if it holds no weights, or if they do not fit the model.
    """
    source = f"--init_from {path}"
    weights = weights_in(load_checkpoint(fetch_file(path, cache_folder())), source)["raw"]
    notes = trm_model.load_named_state(create_model(config, dataset), weights, source)
    if workers.rank == 0:
        left_out = "".join(f"\n  left out: {note}" for note in notes)
        print(f"initial weights: {path}{left_out}", flush=True)
    return weights
