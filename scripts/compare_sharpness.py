"""Compare the measures of `imbsam sharpness`: mean ± standard error over each folder's runs, and ratios to the first.

    python scripts/compare_sharpness.py logs/digits_lt/sgd logs/digits_lt/imbsam --group few

Reads the newest rows of each version_*/sharpness.csv. Measures range over decades, so they are compared by their
logarithms: means are geometric, with the standard error in %, and ratios are to the run with the same data.seed in the
first folder.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path

import yaml

PER_LOSS = ("sam_rise", "max_rise", "average_rise", "top_eigenvalue", "trace")


def read(folder: Path, group: str, split: str, adaptive: bool) -> dict[int, dict[str, float]]:
    """For each data.seed, the newest value of every measure, and of every measure divided by the loss."""
    by_seed: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("version_*/sharpness.csv")):
        seed = yaml.safe_load((path.parent / "config.yaml").read_text())["data"]["init_args"]["seed"]
        with path.open(newline="") as file:
            values = {
                row["measure"]: float(row["value"])
                for row in csv.DictReader(file)
                if (row["group"], row["split"]) == (group, split) and f"adaptive={adaptive} " in row["settings"]
            }
        if values:
            by_seed[seed] = values | {f"{name} / loss": values[name] / values["loss"] for name in PER_LOSS}
    return by_seed


def geometric(values: list[float]) -> str:
    """Geometric mean ± its standard error in %."""
    if min(values) <= 0:  # a negative rise or curvature has no logarithm
        return f"{statistics.mean(values):.3g} (arithmetic)"
    logs = [math.log(v) for v in values]
    error = f" ± {100 * statistics.stdev(logs) / len(logs) ** 0.5:.0f} %" if len(logs) > 1 else ""
    return f"{math.exp(statistics.mean(logs)):.3g}{error}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with version_* runs; the first is the reference")
    parser.add_argument("--group", default="few", choices=["many", "medium", "few", "all"])
    parser.add_argument("--split", default="train", choices=["train", "test"])
    parser.add_argument("--adaptive", action="store_true", help="use the rows measured with --adaptive true")
    args = parser.parse_args()
    runs = [read(folder, args.group, args.split, args.adaptive) for folder in args.folders]
    for folder, by_seed in zip(args.folders, runs, strict=True):
        if not by_seed:
            raise SystemExit(f"{folder}: no such rows in version_*/sharpness.csv; run `imbsam sharpness` first")
    measures = ["loss", *PER_LOSS, *(f"{name} / loss" for name in PER_LOSS)]
    heads = [f"{folder.resolve().name} ({len(by_seed)})" for folder, by_seed in zip(args.folders, runs, strict=True)]
    print(f"| {args.group}, {args.split} | " + " | ".join(heads) + " |\n| :-- |" + " --: |" * len(heads))
    for measure in measures:
        cells = []
        for by_seed in runs:
            cell = geometric([values[measure] for values in by_seed.values()])
            both = [seed for seed in by_seed if seed in runs[0]]
            if by_seed is not runs[0] and both and all(by_seed[s][measure] * runs[0][s][measure] > 0 for s in both):
                cell += f"; ratio {geometric([by_seed[s][measure] / runs[0][s][measure] for s in both])}"
            cells.append(cell)
        print(f"| {measure} | " + " | ".join(cells) + " |")
