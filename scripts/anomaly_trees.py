"""Compare the detectors of anomaly_table.py with tree ensembles, on its data sets, splits and labels.

python scripts/anomaly_trees.py ADBENCH_FOLDER           # run every fit, then print the table; run it again to resume
python scripts/anomaly_trees.py ADBENCH_FOLDER --table   # only print the table of the finished fits
python scripts/anomaly_trees.py ADBENCH_FOLDER --plot docs/anomaly_trees.png

Each method is trained with 10 % and with all of the training anomalies labelled. The trees have their default settings
and train on the same rows as the detectors and on the rows by which those stop besides, with the labels that are known
there; hidden anomalies count as normal. The detectors have the settings of anomaly_table.py (rho from tuning.csv), and
their fits with 10 % labelled are those of fits.csv. XGBOD is PyOD's (pip install pyod xgboost) and is left out, with a
message, where that is not installed. All other fits go to results/anomaly/trees.csv.
"""

import argparse
import csv
import importlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import anomaly_table
import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.metrics import average_precision_score, roc_auc_score

SHARES = (0.1, 1.0)
COLUMNS = ("method", "data", "labelled_share", "seed")
RESULTS = ("auroc", "average_precision", "seconds")
"""The seconds are CPU seconds of training and, for the trees, of scoring the test part."""

CHOSEN_ON = {*anomaly_table.TUNING_SETS, "Classical/27_PageBlocks"}
"""The data sets on which rho, scaling, stopping or a learning rate of the detectors was chosen."""

Scores = Callable[[Any, Any, Any, int], Any]
"""From training rows (N, d), their labels (N,), test rows (M, d) and a seed to scores (M,)."""


def classifier(kind: Any, **settings: Any) -> Scores:
    """A scikit-learn classifier of the labelled anomalies against all other rows."""
    return lambda x, y, test, seed: kind(random_state=seed, **settings).fit(x, y).predict_proba(test)[:, 1]


def isolation_forest(x: Any, y: Any, test: Any, seed: int) -> Any:
    """Without any labels."""
    return -IsolationForest(random_state=seed).fit(x).score_samples(test)


def xgbod(x: Any, y: Any, test: Any, seed: int) -> Any:
    """XGBoost on the features and the scores of unsupervised detectors (Zhao and Hryniewicki, IJCNN 2018)."""
    from pyod.models.xgbod import XGBOD

    return XGBOD(random_state=seed, n_jobs=1).fit(x, y).decision_function(test)


TREES: dict[str, Scores] = {
    "HistGradientBoostingClassifier": classifier(HistGradientBoostingClassifier),
    "HistGradientBoostingClassifier, balanced": classifier(HistGradientBoostingClassifier, class_weight="balanced"),
    "RandomForestClassifier": classifier(RandomForestClassifier),
    "IsolationForest, no labels": isolation_forest,
    "XGBOD": xgbod,
}
DETECTORS = {
    f"{detector}, {method}": (detector, method)
    for detector, method in itertools.product(("devnet", "classifier"), ("sgd", "imbsam"))
}


def fit_trees(method: str, path: Path, share: float, seed: int) -> dict[str, Any]:
    """Train and test one of :data:`TREES`."""
    from datamodules import AnomalyDataModule

    data = AnomalyDataModule(
        path=path, labelled_share=share, val_share=anomaly_table.VAL_SHARE, min_rows=1000, max_rows=10000, seed=seed
    )
    data.setup("fit")
    in_order, *drawn = data.val_dataloader()  # the second has the known labels, and is left out where none is known
    labels = drawn[0].labels if drawn else np.zeros(len(in_order.features), dtype=int)
    x, y = np.vstack([data.train_features, in_order.features]), np.concatenate([data.train_labels, labels])
    test = data.test_dataloader()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = TREES[method](x, y, test.features.numpy(), seed)
    seconds = time.process_time() - start
    precision, auroc = average_precision_score(test.labels, scores), roc_auc_score(test.labels, scores)
    return {"auroc": f"{auroc:.6f}", "average_precision": f"{precision:.6f}", "seconds": f"{seconds:.3f}"}


def fit_detector(
    method: str, folder: Path, data: str, share: float, seed: int, rhos: dict[tuple[str, str, str], float]
) -> dict[str, Any]:
    """Train and test one of :data:`DETECTORS`, as anomaly_table.py does."""
    detector, algorithm = DETECTORS[method]
    rho = rhos.get((detector, "own", algorithm), 0.0)
    fit = anomaly_table.Fit(data, detector, "own", algorithm, rho, seed, labelled_share=share)
    return anomaly_table.run(fit, folder)


def read(path: Path) -> list[dict[str, str]]:
    """The finished fits."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fits_of_the_table(out: Path, rhos: dict[tuple[str, str, str], float]) -> list[dict[str, str]]:
    """The detectors' fits by anomaly_table.py, with its tuned rho, as rows of this script."""
    fits = anomaly_table.select_max_epochs(anomaly_table.read(out / "fits.csv"))
    names = {choice: method for method, choice in DETECTORS.items()}
    return [
        {**row, "method": names[row["detector"], row["method"]], "labelled_share": "0.1"}
        for row in anomaly_table.select_rhos(fits, rhos)
        if row["sampling"] == "own" and (row["detector"], row["method"]) in names
    ]


def unavailable(method: str) -> str:
    """Why a method cannot be run here, or nothing."""
    try:
        if method == "XGBOD":
            importlib.import_module("pyod.models.xgbod")
    except ImportError as error:
        return f"{error}: pip install pyod xgboost"
    return ""


Cell = tuple[str, str, str]
"""A data set, the labelled share and the seed, as in the file."""


def by_method(rows: list[dict[str, str]], metric: str) -> dict[str, dict[Cell, float]]:
    """The metric of each method's fits, of the (data set, seed) pairs with both shares."""
    found: dict[str, dict[Cell, float]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["data"], row["labelled_share"], row["seed"]] = float(row[metric])
    return {
        method: {key: value for key, value in cells.items() if all((key[0], str(s), key[2]) in cells for s in SHARES)}
        for method, cells in found.items()
    }


def over_data_sets(cells: dict[Cell, float], share: float) -> dict[str, float]:
    """Mean over the seeds for each data set."""
    chosen = {(data, seed): value for (data, labelled, seed), value in cells.items() if float(labelled) == share}
    return {
        name: mean(value for (data, _), value in chosen.items() if data == name)
        for name in sorted({data for data, _ in chosen})
    }


def table(rows: list[dict[str, str]]) -> str:
    """Mean average precision and median seconds in Markdown, on the fits that every method has.

    A method that lacks fits is left out of the first table and has one of its own, with the others on its fits.
    """
    precision, seconds = by_method(rows, "average_precision"), by_method(rows, "seconds")
    everything = max(precision.values(), key=len).keys()
    whole = [method for method, cells in precision.items() if cells.keys() == everything]
    parts = [_table({method: precision[method] for method in whole}, seconds)]
    for method in [method for method, cells in precision.items() if cells and method not in whole]:
        keys = precision[method].keys() & everything
        shared = {other: {key: precision[other][key] for key in keys} for other in (*whole, method)}
        parts.append(_table(shared, seconds))
    return "\n\n".join(parts)


def _table(precision: dict[str, dict[Cell, float]], seconds: dict[str, dict[Cell, float]]) -> str:
    keys = next(iter(precision.values())).keys()
    names, seeds = {data for data, _, _ in keys}, {seed for _, _, seed in keys}
    held_out = names - CHOSEN_ON
    lines = [
        f"{len(names)} data sets, {len(seeds)} seeds, {len(keys)} fits a method; in brackets the {len(held_out)} data "
        "sets that nothing was chosen on",
        "",
        "| | 10 % labelled | all labelled | median CPU s |",
        "| --- | --- | --- | --- |",
    ]
    for method, cells in precision.items():
        means = []
        for share in SHARES:
            each = over_data_sets(cells, share)
            means.append(f"{100 * mean(each.values()):.1f} ({100 * mean(each[name] for name in held_out):.1f})")
        time_taken = median(seconds[method][key] for key in cells)
        lines.append(f"| {method} | " + " | ".join(means) + f" | {time_taken:.1f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Average precision of every method on each data set that nothing was chosen on, and their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    precision = by_method(rows, "average_precision")
    everything = max(precision.values(), key=len).keys()
    methods = [method for method, cells in reversed(precision.items()) if cells.keys() == everything]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.38 * len(methods)), sharey=True, layout="constrained")
    for ax, share, title in zip(axes, SHARES, ("10 % labelled", "all labelled"), strict=True):
        for y, method in enumerate(methods):
            each = over_data_sets(precision[method], share)
            values = [100 * value for name, value in each.items() if name not in CHOSEN_ON]
            colour = "tab:blue" if method in TREES else "tab:orange"
            ax.plot(values, [y] * len(values), "o", color=colour, alpha=0.3, markersize=4)
            ax.plot([mean(values)], [y], "|", color=colour, markersize=18, markeredgewidth=3)
            ax.annotate(f"{mean(values):.0f}", (mean(values), y), (0, 9), textcoords="offset points", ha="center")
        ax.set(title=title, xlabel="average precision in %: data sets, and their mean", xlim=(0, 103))
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(-0.5, len(methods) - 0.3)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ADBench's npz files")
    parser.add_argument("--table", action="store_true", help="only print the table of the finished fits")
    parser.add_argument("--plot", type=Path, help="draw the finished fits into this file")
    parser.add_argument("--out", type=Path, default=Path("results/anomaly"), help="folder of trees.csv and fits.csv")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds from 0")
    parser.add_argument("--only", default="", help="only data sets whose name contains this, for a short trial")
    parser.add_argument("--methods", nargs="+", default=[*TREES, *DETECTORS], choices=[*TREES, *DETECTORS])
    settings = parser.parse_args(arguments)
    path = settings.out / "trees.csv"
    rhos = anomaly_table.best_rhos(anomaly_table.select_max_epochs(anomaly_table.read(settings.out / "tuning.csv")))
    if any(algorithm != "sgd" and (name, "own", algorithm) not in rhos for name, algorithm in DETECTORS.values()):
        raise SystemExit(f"anomaly_trees: {settings.out}/tuning.csv has no rho: run anomaly_table.py --tune first")
    if not settings.table and settings.plot is None:
        methods = list(settings.methods)
        for method in settings.methods:
            if reason := unavailable(method):
                print(f"{method} is left out: {reason}", file=sys.stderr)
                methods.remove(method)
        run_missing(settings, methods, path, rhos)
    rows = [*read(path), *fits_of_the_table(settings.out, rhos)]
    rows.sort(key=lambda row: [*TREES, *DETECTORS].index(row["method"]))
    if settings.plot is not None:
        plot(rows, settings.plot)
    print(table(rows))


def run_missing(
    settings: argparse.Namespace, methods: list[str], path: Path, rhos: dict[tuple[str, str, str], float]
) -> None:
    """Run the fits that `path` lacks, appending a row as each finishes."""
    done = {tuple(row[name] for name in COLUMNS) for row in [*read(path), *fits_of_the_table(settings.out, rhos)]}
    names = [name for name in anomaly_table.data_sets(settings.folder) if settings.only in name]
    path.parent.mkdir(parents=True, exist_ok=True)
    anomaly_table.start_worker()
    for seed, data, share, method in itertools.product(range(settings.seeds), names, SHARES, methods):
        if (method, data, str(share), str(seed)) in done:
            continue
        if method in TREES:
            found = fit_trees(method, settings.folder / f"{data}.npz", share, seed)
        else:
            found = fit_detector(method, settings.folder, data, share, seed, rhos)
        key = dict(zip(COLUMNS, (method, data, str(share), str(seed)), strict=True))
        row = key | {name: found[name] for name in RESULTS}
        print(row, file=sys.stderr, flush=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, (*COLUMNS, *RESULTS))
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
