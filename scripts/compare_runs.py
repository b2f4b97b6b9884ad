"""Compare runs: one row a method, mean ± standard deviation over its runs.

    python scripts/compare_runs.py logs/digits_lt/sgd logs/digits_lt/imbsam
    python scripts/compare_runs.py --markdown logs/digits_lt/sgd/version_* logs/digits_lt/imbsam/version_*

A folder of runs stands for its newest run; name `version_*` to average over seeds.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

COLUMNS = ["test/many", "test/medium", "test/few", "test/all", "train/loss_epoch"]


def find_run(folder: Path) -> Path:
    """The folder itself where it holds a training's log, else its newest version that does."""
    runs = [folder] if is_training(folder) else [run for run in folder.glob("version_*") if is_training(run)]
    if not runs:
        raise SystemExit(f"{folder}: no log of a training in it or in its version_* folders; is it a run's folder?")
    return max(runs, key=lambda run: int(run.name.rpartition("_")[2]) if run != folder else 0)


def is_training(run: Path) -> bool:
    """Whether the run was a training: `imbsam test` and `predict` leave version_* folders too."""
    log = run / "metrics.csv"
    return log.exists() and "train/loss_epoch" in log.read_text().partition("\n")[0]


def settings(run: Path) -> dict[str, Any]:
    """The model's and the data's settings, without the seed and the place of the data."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    found = {**config["data"].get("init_args", {}), **config["model"].get("init_args", {})}
    return {name: value for name, value in found.items() if name not in ("seed", "root")}


def last_values(run: Path) -> dict[str, float]:
    """The last value that the run logged for each column."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {c: float([row[c] for row in rows if row.get(c)][-1]) for c in COLUMNS if any(row.get(c) for row in rows)}


def names(groups: list[list[Path]]) -> list[str]:
    """The name of each group's folder, with the settings in which groups of one folder differ."""
    folders = ["/".join(group[0].resolve().parts[-3:-1]) for group in groups]
    found = []
    for folder, group in zip(folders, groups, strict=True):
        others = [settings(g[0]) for f, g in zip(folders, groups, strict=True) if f == folder]
        own = settings(group[0])
        different = [key for key in own if any(other.get(key) != own[key] for other in others)]
        found.append(" ".join([folder, *(f"{key}={own[key]}" for key in different)]))
    return found


def markdown(runs: list[Path]) -> str:
    """The table: one row for the runs of one folder with the same settings."""
    by_settings: dict[str, list[Path]] = defaultdict(list)
    for run in runs:
        by_settings[f"{run.resolve().parent} {json.dumps(settings(run), sort_keys=True)}"].append(run)
    groups = list(by_settings.values())

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    lines = ["| run | many | medium | few | all | training loss |", "| :-- | --: | --: | --: | --: | --: |"]
    for name, group in zip(names(groups), groups, strict=True):
        found = [last_values(run) for run in group]
        for run, values in zip(group, found, strict=True):
            if "test/all" not in values:
                raise SystemExit(f"{run}: not tested yet: let `imbsam fit` finish")
        accuracies = [cell([100 * values[column] for values in found]) for column in COLUMNS[:4]]
        loss = statistics.mean(values["train/loss_epoch"] for values in found)
        seeds = f" ({len(found)} runs)" if len(found) > 1 else ""
        lines.append(f"| {name}{seeds} | {' | '.join(accuracies)} | {loss:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    args = parser.parse_args()
    if len(args.runs) > 1:  # a pattern such as version_* also finds tests and predictions
        args.runs = [run for run in args.runs if is_training(run) or not (run / "config.yaml").exists()]
    table = markdown([find_run(run) for run in args.runs])
    if args.markdown:
        print(table)
    else:
        Console().print("test accuracy in %, last epoch", style="italic")
        Console().print(Markdown(table))
