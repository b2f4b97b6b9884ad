"""What ImbSAM adds to plain training and to simpler ways: the first table and figure of docs/results.md.

python scripts/summary.py add "digits" logs/digits_lt    # take finished runs into results/classification.csv
python scripts/summary.py                                # print the table, draw docs/summary.png

Each line of COMPARISONS is ImbSAM's test accuracy minus that of another method with the same loss, data and seed: mean
over the seeds, and half the width of its 95 % confidence interval (Student's t). A star marks a difference that remains
at a false discovery rate of 5 % (Benjamini and Hochberg 1995) over all cells of the table, its p-value being that of
Student's paired t-test.
"""

import argparse
import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from accuracy_against_cost import name
from head_table import FILE as HEADS
from head_table import read
from scipy.stats import false_discovery_control, ttest_1samp

from imbsam.report.runs import Run, read_runs
from imbsam.report.style import colour

mpl.use("agg")
import matplotlib.pyplot as plt

FILE = Path("results/classification.csv")
FIGURE = Path("docs/summary.png")
MEASURES = ("few", "all")
FALSE_DISCOVERY_RATE = 0.05

Accuracies = dict[tuple[str, str, int], dict[str, float]]
"""(data, method, seed) to the accuracies of its MEASURES in %."""


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        title: what it says.
        data: the runs' data, as they were added.
        imbsam: the method of ImbSAM's runs.
        others: the methods it is compared with, in the order of AGAINST.
    """

    title: str
    data: str
    imbsam: str
    others: tuple[str, str, str]


AGAINST = ("plain training", "tail loss up-weighted", "SAM")
DOUBLED = "tail loss doubled"
FROM_SCRATCH = ("SGD", f"SGD, {DOUBLED}")
HEADS_METHODS = ("SGD", "SGD, tail loss weighted", "SAM")  # the weight was chosen on validation data, as rho was
COMPARISONS = (
    *(
        Comparison(f"digits, rho {rho}", "digits", f"ImbSAM, rho {rho}", (*FROM_SCRATCH, f"SAM, rho {rho}"))
        for rho in ("0.05", "0.1")
    ),
    *(
        Comparison(
            f"CIFAR-100-LT, small network, rho {rho}",
            "CIFAR-100-LT, small network",
            f"ImbSAM, rho {rho}, {DOUBLED}",
            (*FROM_SCRATCH, f"SAM, rho 0.05, {DOUBLED}"),
        )
        for rho in ("0.05", "0.1")
    ),
    *(
        Comparison(f"pretrained features, {loss}", f"cached features, {loss}", "ImbSAM", HEADS_METHODS)
        for loss in ("cross-entropy", "logit adjustment", "logit adjustment, tau 1.5")
    ),
)


def method_of(run: Run) -> str:
    """The method, with what differs from the defaults."""
    words = [name(run)]
    if run.settings.get("sam.context_rows", "auto") == "batch":
        words.append("published gradient")
    if run.settings.get("sam.tail_weight", 1.0) != 1.0:
        words.append("tail loss doubled")
    return ", ".join(words)


def add(path: Path, data: str, folders: list[Path]) -> None:
    """Take the runs in these folders into the file, in place of the ones of the same data."""
    runs, skipped = read_runs(folders)
    for folder, reason in skipped.items():
        print(f"{folder} is left out: {reason}")
    kept = {key: values for key, values in accuracies(path).items() if key[0] != data}
    for run in runs:
        (seed,) = set(run.seeds)
        kept[data, method_of(run), seed] = {key: 100 * run.final[f"test/{key}"] for key in MEASURES}
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("data", "method", "seed", *MEASURES))
        writer.writerows(
            (*key, *(f"{values[measure]:.4g}" for measure in MEASURES)) for key, values in sorted(kept.items())
        )


def accuracies(path: Path) -> Accuracies:
    """What the file has."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            (row["data"], row["method"], int(row["seed"])): {key: float(row[key]) for key in MEASURES}
            for row in csv.DictReader(file)
        }


def heads(path: Path) -> Accuracies:
    """Those of the classifiers on cached features."""
    return {
        (f"cached features, {fit.loss}", fit.method, fit.seed): {key: 100 * results[key] for key in MEASURES}
        for fit, results in read(path).items()  # of several choices of rho, the last one counts
        if fit.part == "test"
    }


@dataclass(frozen=True)
class Difference:
    """Of two methods, paired by seed.

    Attributes:
        mean: in points.
        half_width: of its 95 % confidence interval; NaN for one seed.
        p_value: of Student's t-test of no difference; 1 where it is not defined.
        seeds: the number of pairs.
    """

    mean: float
    half_width: float
    p_value: float
    seeds: int


def difference(found: Accuracies, data: str, first: str, second: str, measure: str) -> Difference | None:
    """Of the runs of two methods that share data and seed; None without a pair."""
    seeds = sorted({seed for of, method, seed in found if (of, method) == (data, first)})
    pairs = [
        found[data, first, seed][measure] - found[data, second, seed][measure]
        for seed in seeds
        if (data, second, seed) in found
    ]
    if not pairs:
        return None
    if len(pairs) == 1:
        return Difference(pairs[0], math.nan, 1.0, 1)
    test = ttest_1samp(pairs, 0)
    interval = test.confidence_interval(0.95)
    p_value = 1.0 if math.isnan(test.pvalue) else float(test.pvalue)  # all differences are 0
    return Difference(statistics.mean(pairs), float(interval.high - interval.low) / 2, p_value, len(pairs))


def table(found: Accuracies) -> str:
    """The differences, in Markdown."""
    columns = [(measure, i) for measure in MEASURES for i in range(len(AGAINST))]
    rows = [
        [difference(found, line.data, line.imbsam, line.others[i], measure) for measure, i in columns]
        for line in COMPARISONS
    ]
    corrected = iter(false_discovery_control([cell.p_value for row in rows for cell in row if cell]))
    titles = " | ".join(f"{measure}, over {AGAINST[i]}" for measure, i in columns)
    lines = [f"| ImbSAM on | {titles} | seeds |", "| :-- " + "| --: " * (len(columns) + 1) + "|"]
    for line, row in zip(COMPARISONS, rows, strict=True):
        words = []
        for cell in row:
            star = " *" if cell and next(corrected) <= FALSE_DISCOVERY_RATE else ""
            words.append(f"{cell.mean:+.1f} ± {cell.half_width:.1f}{star}" if cell else "")
        lines.append(f"| {line.title} | {' | '.join(words)} | {max(cell.seeds if cell else 0 for cell in row)} |")
    return "\n".join(lines)


def draw(found: Accuracies, path: Path) -> None:
    """The differences with their 95 % intervals, a panel for each measure."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(10, 1.5 + 0.4 * len(COMPARISONS)), sharey=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        for i, against in enumerate(AGAINST):
            places, means, errors = [], [], []
            for row, line in enumerate(COMPARISONS):
                if values := difference(found, line.data, line.imbsam, line.others[i], measure):
                    places.append(row + 0.22 * (i - 1))
                    means.append(values.mean)
                    errors.append(values.half_width)
            axis.errorbar(
                means, places, xerr=errors, fmt="osD"[i], color=colour(i), markersize=5, label=f"over {against}"
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(
            f"accuracy of {measure} classes" if measure == "all" else "accuracy of few-shot classes", size=10
        )
        axis.set_xlabel("points gained by ImbSAM")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(COMPARISONS)), [line.title for line in COMPARISONS])
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(AGAINST), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="the runs' accuracies")
    parser.add_argument("--heads", type=Path, default=HEADS, help="the accuracies of scripts/head_table.py")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    commands = parser.add_subparsers(dest="command")
    adding = commands.add_parser("add", help="take runs into the file, in place of those of the same data")
    adding.add_argument("data", help="what to call their data")
    adding.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "add":
        add(arguments.file, arguments.data, arguments.folders)
        return
    found = accuracies(arguments.file) | heads(arguments.heads)
    print(table(found))
    draw(found, arguments.figure)


if __name__ == "__main__":
    main()
