"""One report of a study: what ran, on what, how it compares, all figures, and what is missing.

    python analysis/report.py --results_dir runs --out report
    python analysis/report.py --results_dir gs://my-bucket/runs --out report --baseline e1_1
    python analysis/report.py --results_dir analysis/sample_results --out report --configs 'configs/mini/*.yaml'

Writes report.md, report.html (one file, pictures inside), comparison.csv and figures/.
"""

import argparse
import base64
import collections
import glob
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare_experiments
import markdown
import pandas as pd
import plot_results
import results  # first: it says which package is missing, and puts the top level on the path

from config import config_yaml, load_config
from utils import UserError, replace_file, run_cli

MIN_SEEDS = 2
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; } th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: left; vertical-align: top; }
img { width: 420px; max-width: 100%; } pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }"""


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        default=str(results.ROOT / "configs" / "e*.yaml"),
        metavar="PATTERN",
        help="the study's configurations (default: configs/e*.yaml)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    configs = sorted(glob.glob(args.configs))
    if not configs:
        raise UserError(
            f"--configs {args.configs}: no such file: give the study's YAML files as one quoted pattern, such as 'configs/e*.yaml'"
        )
    groups = results.group_runs(results.load_runs(args.results_dir))
    baseline = results.find_group(groups, args.baseline) if args.baseline else groups[0]
    groups = [baseline, *(group for group in groups if group is not baseline)]
    out = plot_results.out_folder(args.out)
    pictures, missing = out / "figures", []
    plot_results.out_folder(pictures)
    figures = []
    for name, drawn in plot_results.draw_all(groups):
        if isinstance(drawn, str):
            missing.append((name, drawn))
        else:
            figures.append((drawn, plot_results.save(drawn, pictures)))
    table = compare_experiments.comparison(groups, baseline)
    table.to_csv(out / "comparison.csv", index=False)
    text = report(
        args.results_dir, groups, baseline, table, cells(configs, groups), figures, missing
    )
    replace_file(out / "report.md", text)
    replace_file(out / "report.html", as_html(text, out))
    print(
        f"{out / 'report.md'} and {out / 'report.html'}: {sum(len(group.runs) for group in groups)} runs, {len(figures)} figures"
    )


def report(results_dir, groups, baseline, table, study, figures, missing):
    """The report in Markdown. figures: [(Figure, path of its PNG)]; missing: [(name, why it is not drawn)]."""
    parts = [
        f"# Results in {results_dir}",
        "## What is missing",
        gaps(study, groups),
        "## The study's configurations",
        _table(study),
        "## Comparison",
        f"Baseline: {baseline.label}.",
        *(_table(part) for part in compare_experiments.readable_parts(table, 0.85)),
        *compare_experiments.NOTES.split("\n"),
        "## Figures",
    ]
    for figure, path in figures:
        parts += [f"### {figure.name}", f"![{figure.name}](figures/{path.name})", figure.caption]
    if missing:
        parts += ["Not drawn:", "\n".join(f"- {name}: {reason}" for name, reason in missing)]
    parts += [
        "## Provenance",
        _table(provenance(groups)),
        "## Configuration of the baseline",
        f"```yaml\n{config_yaml(baseline.first.config)}```",
        "## The paper's numbers",
        f"{results.paper()['source']}; {results.paper()['dataset']['name']}, exact accuracy in %.",
        _table(pd.DataFrame(results.paper()["results"])[["table", "setting", "exact_accuracy"]]),
    ]
    return "\n\n".join(parts) + "\n"


def cells(configs, groups):
    """One row for each configuration file of the study: config, runs, finished seeds, state."""
    rows = []
    for path in configs:
        config, name = load_config(path, settle=False), Path(path).stem
        same = [group for group in groups if not other_settings(group.first, config)]
        finished = sum(len(group.finished) for group in same)
        if finished >= MIN_SEEDS:
            state = "done"
        elif finished:
            state = f"{finished} seed: {MIN_SEEDS - finished} more for a spread"
        elif same:
            state = "; ".join(run.state for group in same for run in group.runs)
        elif named := next((group for group in groups if group.first.config_name == name), None):
            changed = other_settings(named.first, config)
            state = f"missing; {named.label} has other settings ({', '.join(changed[:4])}{f' and {len(changed) - 4} more' if len(changed) > 4 else ''})"
        else:
            state = "missing"
        rows.append(
            {
                "config": name,
                "runs": ", ".join(group.label for group in same) or "-",
                "finished seeds": finished,
                "state": state,
            }
        )
    return pd.DataFrame(rows)


def other_settings(run, wanted):
    """["key value", ...] of what makes a run none of the configuration `wanted`, whatever its seed."""
    changed = results.other_settings(run.config, wanted)
    if wanted.data.expected_puzzles not in (None, run.train_puzzles):
        changed.append(f"training puzzles {run.train_puzzles}")
    return changed


def gaps(study, groups):
    lines = [f"- {row.config}: {row.state}" for row in study.itertuples() if row.state != "done"]
    lines += [
        f"- {run.name}: {run.state}" for group in groups for run in group.runs if not run.finished
    ]
    runs = [run for group in groups for run in group.runs]
    for found, what in (
        (
            [run.name for run in runs if not run.starts],
            "no starts.jsonl, so code, device and chip-hours are unknown",
        ),
        (
            [
                run.name
                for run in runs
                if run.starts and not all(start.get("commit") for start in run.starts)
            ],
            "the commit of the code is unknown",
        ),
        (
            [run.name for run in runs if any(start.get("dirty") for start in run.starts)],
            "the code had changes that no commit holds",
        ),
    ):
        if found:
            lines.append(f"- {', '.join(found)}: {what}")
    return (
        "\n".join(lines) or f"Nothing: every configuration has {MIN_SEEDS} finished seeds or more."
    )


def provenance(groups):
    """One row for each run: what is in its starts.jsonl."""
    rows = []
    for run in (run for group in groups for run in group.runs):

        def seen(key, run=run):
            return (
                ", ".join(
                    str(value)
                    for value in collections.Counter(start.get(key) for start in run.starts)
                    if value is not None
                )
                or "-"
            )

        datasets = "; ".join(
            f"{split} {found['puzzles']:,} puzzles ({found['sha256'][:12]})"
            for split, found in run.datasets.items()
        )
        commit = (
            ", ".join(
                dict.fromkeys(
                    f"{start['commit'][:12]}{' and changes' if start.get('dirty') else ''}"
                    for start in run.starts
                    if start.get("commit")
                )
            )
            or "-"
        )
        rows.append(
            {
                "run": run.name,
                "state": run.state,
                "commit": commit,
                "device": run.device,
                "starts": len(run.starts),
                "host": seen("hostname"),
                "python": seen("python"),
                "torch": seen("torch"),
                "torch_xla": seen("torch_xla"),
                "numpy": seen("numpy"),
                "parameters": seen("parameters"),
                "init_from": seen("init_from"),
                "data": datasets or "-",
                "command": f"`{run.starts[0]['command']}`" if run.starts else "-",
            }
        )
    return pd.DataFrame(rows)


def _table(frame):
    text = (
        frame.astype(object)
        .where(frame.notna(), "-")
        .map(lambda cell: str(cell).replace("|", "\\|"))
    )
    return text.to_markdown(index=False, disable_numparse=True)


def as_html(text, folder):
    """Markdown to one HTML file: pictures, named relative to `folder`, are put inside."""
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    for path in sorted((folder / "figures").glob("*.png")):
        body = body.replace(
            f'src="figures/{path.name}"',
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"',
        )
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    return f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


if __name__ == "__main__":
    run_cli(main)
