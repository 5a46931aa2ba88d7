"""The paper's numbers (paper_results.yaml), and which of them a run can be compared with."""

import functools
from pathlib import Path
from typing import Any

import yaml
from results import ROOT, Run
from run_groups import config_settings

from config import Config, load_config


@functools.cache
def paper() -> dict[str, Any]:
    """The content of analysis/paper_results.yaml."""
    return yaml.safe_load((ROOT / "analysis" / "paper_results.yaml").read_text())


def claims(figure: str) -> list[str]:
    """What was published on the question of a kind of figure (a key of plot_results.FIGURES)."""
    return [
        f"{entry['claim']} ({entry['source']})"
        for entry in paper()["claims"]
        if entry["figure"] == figure
    ]


def paper_result(run: Run) -> tuple[dict[str, Any] | None, str | None]:
    """(the paper's entry for a run's configuration, why the two numbers cannot be compared).

    Either is None where there is nothing to say.
    """
    name, other_study = run.config_name, None
    for study in paper()["other_studies"]:
        if name.startswith(study["prefix"]):
            name, other_study = name.removeprefix(study["prefix"]), study["reason"]
            break
    entry = next((entry for entry in paper()["results"] if name in entry.get("configs", [])), None)
    if entry is None:
        return None, None
    return entry, other_study or _why_not_comparable(run, ROOT / "configs" / f"{name}.yaml")


def _why_not_comparable(run: Run, config_file: Path) -> str | None:
    dataset, final = paper()["dataset"], run.final()
    for key, value in (
        ("train_puzzles", run.train_puzzles),
        ("test_puzzles", final and final["count"]),
    ):
        if value is not None and value != dataset[key]:
            what = key.replace("_", " ")
            return f"{value:,} {what}, {dataset['name']} has {dataset[key]:,}"
    changed = other_settings(run.config, load_config(config_file))
    if changed:
        return f"other settings than configs/{config_file.name}: {', '.join(changed)}"
    return None if final else "no final evaluation"


def other_settings(config: Config, wanted: Config) -> list[str]:
    """["key value", ...] of what `config`, a run's, has otherwise than `wanted`, a file's.

    Only what makes the result counts. A forward_dtype that `wanted` leaves to the machine ("auto")
    is none of it.
    """
    expected = config_settings(wanted)
    if expected["model.forward_dtype"] == "auto":
        expected["model.forward_dtype"] = config.model.forward_dtype
    return [
        f"{key} {value}" for key, value in config_settings(config).items() if value != expected[key]
    ]
