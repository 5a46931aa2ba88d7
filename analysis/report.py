"""Write one report of a study: what ran, on what, how it compares, all figures, what is missing.

    python analysis/report.py --results_dir runs --out report
    python analysis/report.py --results_dir gs://my-bucket/runs --out report --baseline e1_1
    python analysis/report.py --results_dir analysis/sample_results --out report \
        --configs configs/mini/*.yaml

Writes report.md, report.html (one file, pictures inside), comparison.csv and figures/.
"""

import argparse
import base64
import glob
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import analysis_startup

analysis_startup.require("markdown", "matplotlib", "pandas", "scipy", "tabulate")
import compare_experiments
import markdown
import pandas as pd
import paper
from plot_results import draw_all, make_folder
from plot_style import Figure, save
from results import ROOT, Run, load_runs
from run_groups import Group, find_group, group_runs

from config import Config, config_yaml, load_config
from utils import UserError, replace_file, run_cli

MIN_SEEDS = 2
TARGET = 0.85  # the exact accuracy to which costs are counted
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: left; vertical-align: top; }
img { width: 420px; max-width: 100%; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }"""


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
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the report")
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="what the others are compared with (default: the first in the order of names)",
    )
    parser.add_argument(
        "--configs",
        nargs="+",
        default=[str(ROOT / "configs" / "e*.yaml")],
        metavar="FILE",
        help="the study's configurations: YAML files, or quoted patterns of them "
        "(default: configs/e*.yaml)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    configs = config_files(args.configs)
    groups = group_runs(load_runs(args.results_dir))
    baseline = find_group(groups, args.baseline) if args.baseline else groups[0]
    groups = [baseline, *(group for group in groups if group is not baseline)]
    out = make_folder(args.out)
    pictures = make_folder(out / "figures")
    figures, not_drawn = [], []
    for name, drawn in draw_all(groups):
        if isinstance(drawn, str):
            not_drawn.append((name, drawn))
        else:
            figures.append((drawn, save(drawn, pictures)))
    table = compare_experiments.comparison(groups, baseline, TARGET)
    table.to_csv(out / "comparison.csv", index=False)
    study = study_table(configs, groups)
    text = report(args.results_dir, groups, baseline, table, study, figures, not_drawn)
    replace_file(out / "report.md", text)
    replace_file(out / "report.html", as_html(text, out))
    runs = sum(len(group.runs) for group in groups)
    print(f"{out / 'report.md'} and {out / 'report.html'}: {runs} runs, {len(figures)} figures")


def config_files(names: Iterable[str]) -> list[str]:
    """The files that `names`, paths or patterns, stand for, each once, those of a pattern sorted.

    Raises UserError for a name without a file.
    """
    files: dict[str, None] = {}
    for name in names:
        found = [name] if Path(name).is_file() else sorted(glob.glob(name))
        if not found:
            raise UserError(
                f"--configs {name}: no such file: give the study's YAML files, or a quoted pattern "
                "of them such as 'configs/e*.yaml'"
            )
        files.update(dict.fromkeys(found))
    return list(files)


# ------------------------------------------------------------------------------
# Parts of the report
# ------------------------------------------------------------------------------
def report(
    results_dir: str,
    groups: Sequence[Group],
    baseline: Group,
    table: pd.DataFrame,
    study: pd.DataFrame,
    figures: Sequence[tuple[Figure, Path]],
    not_drawn: Sequence[tuple[str, str]],
) -> str:
    """The report in Markdown.

    table: compare_experiments.comparison. study: study_table. figures: each with the path of its
    PNG. not_drawn: (name, why it is not drawn).
    """
    parts = [
        f"# Results in {results_dir}",
        "## What is missing",
        gaps(study, groups),
        "## The study's configurations",
        _table(study),
        "## Comparison",
        f"Baseline: {baseline.label}.",
        *(_table(part) for part in compare_experiments.readable_parts(table, TARGET)),
        *compare_experiments.NOTES.split("\n"),
        "## Figures",
    ]
    for figure, path in figures:
        parts += _section(figure, path)
    if not_drawn:
        parts += ["Not drawn:", "\n".join(f"- {name}: {reason}" for name, reason in not_drawn)]
    published = paper.paper()
    parts += [
        "## Provenance",
        _table(provenance(groups)),
        "## Configuration of the baseline",
        f"```yaml\n{config_yaml(baseline.first.config)}```",
        "## The paper's numbers",
        f"{published['source']}; {published['dataset']['name']}, exact accuracy in %.",
        _table(pd.DataFrame(published["results"])[["table", "setting", "exact_accuracy"]]),
    ]
    return "\n\n".join(parts) + "\n"


def _section(figure: Figure, path: Path) -> list[str]:
    """The paragraphs of a figure: heading, picture, caption, result, and what others published."""
    picture = f"![{figure.name}](figures/{path.name})"
    published = [f"Published: {claim}" for claim in paper.claims(figure.kind_name)]
    found = [f"Result: {figure.finding}"] if figure.finding else []
    return [f"### {figure.title}", picture, figure.caption, *found, *published]


def study_table(configs: Iterable[str], groups: Sequence[Group]) -> pd.DataFrame:
    """One row for each configuration file of the study: config, runs, finished seeds, state."""
    rows = []
    for path in configs:
        config = load_config(path)
        same = [group for group in groups if not other_settings(group.first, config)]
        rows.append(
            {
                "config": Path(path).stem,
                "runs": ", ".join(group.label for group in same) or "-",
                "finished seeds": sum(len(group.finished) for group in same),
                "state": _state_of_config(Path(path).stem, config, same, groups),
            }
        )
    return pd.DataFrame(rows)


def _state_of_config(
    name: str, config: Config, same: Sequence[Group], groups: Sequence[Group]
) -> str:
    """What the study lacks of a configuration. same: the groups that were trained with it."""
    finished = sum(len(group.finished) for group in same)
    if finished >= MIN_SEEDS:
        return "done"
    if finished:
        return f"{finished} seed: {MIN_SEEDS - finished} more for a spread"
    if same:
        return "; ".join(run.state for group in same for run in group.runs)
    for group in groups:
        if group.first.config_name == name:
            changed = other_settings(group.first, config)
            shown = ", ".join(changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            return f"missing; {group.label} has other settings ({shown}{more})"
    return "missing"


def other_settings(run: Run, wanted: Config) -> list[str]:
    """["key value", ...] of a run that are not those of the configuration `wanted`."""
    changed = paper.other_settings(run.config, wanted)
    if wanted.data.expected_puzzles not in (None, run.train_puzzles):
        changed.append(f"training puzzles {run.train_puzzles}")
    return changed


def gaps(study: pd.DataFrame, groups: Sequence[Group]) -> str:
    """A list of what the study lacks, or one line that says it lacks nothing."""
    lines = [f"- {row.config}: {row.state}" for row in study.itertuples() if row.state != "done"]
    runs = [run for group in groups for run in group.runs]
    lines += [f"- {run.name}: {run.state}" for run in runs if not run.finished]
    for group in groups:
        lines += [f"- {run.name} is left out: {reason}" for run, reason in group.left_out]
    for lacks, what in (
        (lambda run: not run.starts, "no starts.jsonl, so code, device and chip-hours are unknown"),
        (
            lambda run: run.starts and not all(start.get("commit") for start in run.starts),
            "the commit of the code is unknown",
        ),
        (
            lambda run: any(start.get("dirty") for start in run.starts),
            "the code had changes that no commit holds",
        ),
    ):
        if found := [run.name for run in runs if lacks(run)]:
            lines.append(f"- {', '.join(found)}: {what}")
    nothing = f"Nothing: every configuration has {MIN_SEEDS} finished seeds or more."
    return "\n".join(lines) or nothing


def provenance(groups: Sequence[Group]) -> pd.DataFrame:
    """One row for each run: what is in its starts.jsonl."""
    return pd.DataFrame([_provenance_of(run) for group in groups for run in group.runs])


def _provenance_of(run: Run) -> dict[str, Any]:
    def values(key):
        return _each_once(start.get(key) for start in run.starts)

    commits = _each_once(
        f"{start['commit'][:12]}{' and changes' if start.get('dirty') else ''}"
        for start in run.starts
        if start.get("commit")
    )
    datasets = "; ".join(
        f"{split} {found['puzzles']:,} puzzles ({found['sha256'][:12]})"
        for split, found in run.datasets.items()
    )
    return {
        "run": run.name,
        "state": run.state,
        "commit": commits,
        "device": run.device,
        "starts": len(run.starts),
        "host": values("hostname"),
        **{key: values(key) for key in ("python", "torch", "torch_xla", "numpy")},
        **{key: values(key) for key in ("parameters", "init_from")},
        "data": datasets or "-",
        "command": f"`{run.starts[0]['command']}`" if run.starts else "-",
    }


def _each_once(values: Iterable[Any]) -> str:
    """The values but None, each once, as text; "-" if there are none."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "-"


# ------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------
def _table(frame: pd.DataFrame) -> str:
    """A Markdown table of text: numbers as they are, "-" for what is missing."""
    text = frame.astype(object).where(frame.notna(), "-")
    text = text.map(lambda cell: str(cell).replace("|", "\\|"))
    return text.to_markdown(index=False, disable_numparse=True)


def as_html(text: str, folder: Path) -> str:
    """Markdown as one HTML file: pictures, whose names are relative to `folder`, are put inside."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    for path in sorted((folder / "figures").glob("*.png")):
        content = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="figures/{path.name}"', f'src="data:image/png;base64,{content}"')
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


if __name__ == "__main__":
    run_cli(main)
