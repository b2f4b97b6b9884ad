"""Compare what `imbsam sharpness` found: mean ± standard error over the runs of a folder, and differences to the first.

    python scripts/compare_sharpness.py logs/digits_lt/sgd logs/digits_lt/imbsam --group few

Reads the newest rows of each version_*/sharpness.csv. Measures are compared by their logarithms, since they range over
decades: the mean is the geometric one, with its standard error in %, and a run stands beside the run with the same
data.seed in the first folder, as the ratio of the two.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path

import yaml

PER_LOSS = ("sam_rise", "max_rise", "average_rise", "top_eigenvalue", "trace")


def read(folder: Path, group: str, split: str, adaptive: bool) -> dict[int, dict[str, float]]:
    """Per data.seed, the newest value of every measure, and each measure per loss."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("version_*/sharpness.csv")):
        seed = yaml.safe_load((path.parent / "config.yaml").read_text())["data"]["init_args"]["seed"]
        with path.open(newline="") as file:
            values = {
                row["measure"]: float(row["value"])
                for row in csv.DictReader(file)
                if (row["group"], row["split"]) == (group, split) and f"adaptive={adaptive} " in row["settings"]
            }
        if values:
            found[seed] = values | {f"{name} / loss": values[name] / values["loss"] for name in PER_LOSS}
    return found


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
    parser.add_argument("--adaptive", action="store_true", help="the rows measured with --adaptive true")
    args = parser.parse_args()
    runs = [read(folder, args.group, args.split, args.adaptive) for folder in args.folders]
    for folder, found in zip(args.folders, runs, strict=True):
        if not found:
            raise SystemExit(f"{folder}: no such rows in version_*/sharpness.csv; run `imbsam sharpness` first")
    measures = ["loss", *PER_LOSS, *(f"{name} / loss" for name in PER_LOSS)]
    heads = [f"{folder.resolve().name} ({len(found)})" for folder, found in zip(args.folders, runs, strict=True)]
    print(f"| {args.group}, {args.split} | " + " | ".join(heads) + " |\n| :-- |" + " --: |" * len(heads))
    for measure in measures:
        cells = []
        for found in runs:
            cell = geometric([values[measure] for values in found.values()])
            both = [seed for seed in found if seed in runs[0]]
            if found is not runs[0] and both and all(found[s][measure] * runs[0][s][measure] > 0 for s in both):
                cell += f"; ratio {geometric([found[s][measure] / runs[0][s][measure] for s in both])}"
            cells.append(cell)
        print(f"| {measure} | " + " | ".join(cells) + " |")
