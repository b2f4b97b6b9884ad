"""Compare runs: one row a method, mean ± standard deviation over its runs.

    python scripts/compare_runs.py logs/digits_lt/sgd logs/digits_lt/imbsam
    python scripts/compare_runs.py --markdown logs/digits_lt/sgd/version_* logs/digits_lt/imbsam/version_*

A folder of runs stands for its newest run; name `version_*` to average over seeds.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

COLUMNS = ["test/many", "test/medium", "test/few", "test/all", "train/loss_epoch"]


def find_run(folder: Path) -> Path:
    """The folder itself where it holds a log, else its newest version that does."""
    runs = (
        [folder] if (folder / "metrics.csv").exists() else [log.parent for log in folder.glob("version_*/metrics.csv")]
    )
    if not runs:
        raise SystemExit(f"{folder}: no metrics.csv in it or in its version_* folders; is it a run's folder?")
    return max(runs, key=lambda run: int(run.name.rpartition("_")[2]) if run != folder else 0)


def last_values(run: Path) -> dict[str, float]:
    """The last value that the run logged for each column."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {c: float([row[c] for row in rows if row.get(c)][-1]) for c in COLUMNS if any(row.get(c) for row in rows)}


def markdown(runs: list[Path]) -> str:
    """The table."""
    methods: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in runs:
        values = last_values(run)
        if "test/all" not in values:
            raise SystemExit(f"{run}: not tested yet: let `imbsam fit` finish")
        methods["/".join(run.parts[-3:-1])].append(values)

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    lines = ["| run | many | medium | few | all | training loss |", "| :-- | --: | --: | --: | --: | --: |"]
    for method, found in methods.items():
        accuracies = [cell([100 * values[column] for values in found]) for column in COLUMNS[:4]]
        loss = statistics.mean(values["train/loss_epoch"] for values in found)
        seeds = f" ({len(found)} runs)" if len(found) > 1 else ""
        lines.append(f"| {method}{seeds} | {' | '.join(accuracies)} | {loss:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    args = parser.parse_args()
    table = markdown([find_run(run) for run in args.runs])
    if args.markdown:
        print(table)
    else:
        Console().print("test accuracy in %, last epoch", style="italic")
        Console().print(Markdown(table))
