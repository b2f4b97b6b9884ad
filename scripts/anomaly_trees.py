"""Compare the detectors of anomaly_table.py with tree ensembles, on its data sets, splits and labels.

python scripts/anomaly_trees.py ADBENCH_FOLDER           # run every fit, then print the table; run it again to resume
python scripts/anomaly_trees.py ADBENCH_FOLDER --table   # only print the table of the finished fits (--only, --seeds)
python scripts/anomaly_trees.py ADBENCH_FOLDER --plot docs/anomaly_trees.png

Each method is trained with 10 % and with all of the training anomalies labelled. The trees have their default settings
and train on the same rows as the detectors and on the rows by which those stop besides, with the labels that are known
there; hidden anomalies count as normal. The detectors have the settings of anomaly_table.py (rho from tuning.csv), and
their fits with 10 % labelled are those of fits.csv. XGBOD is PyOD's (pip install pyod xgboost) and is left out, with a
message, where that is not installed. All other fits go to results/anomaly/trees.csv.
"""

import argparse
import csv
import functools
import importlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import anomaly_table
import numpy as np
import yaml
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
BOOSTING = "detector/boosting"
DETECTORS = {
    f"{detector}, {method}": (detector, method)
    for detector, method in itertools.product(("devnet", "classifier"), ("sgd", "imbsam"))
}
METHODS = (*TREES, BOOSTING, *DETECTORS)


def data_module(path: Path, share: float, seed: int) -> Any:
    """The splits and labels of anomaly_table.py."""
    from datamodules import AnomalyDataModule

    return AnomalyDataModule(
        path=path,
        batches_per_epoch=10,  # the trees do not look at batches
        labelled_share=share,
        val_share=anomaly_table.VAL_SHARE,
        min_rows=1000,
        max_rows=10000,
        seed=seed,
    )


def fit_trees(method: str, path: Path, share: float, seed: int) -> dict[str, Any]:
    """Train and test one of :data:`TREES`."""
    data = data_module(path, share, seed)
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


def fit_boosting(path: Path, share: float, seed: int) -> dict[str, Any]:
    """Train and test configs/detector/boosting.yaml, which leaves the validation rows out of the training."""
    from lightning.pytorch import Trainer, seed_everything

    from imbsam import Plain
    from lightning_modules import AnomalyDetector
    from lightning_modules.detectors import Boosting

    config = yaml.safe_load(Path("configs/detector/boosting.yaml").read_text())
    trees = functools.partial(Boosting, **config["model"]["init_args"]["detector"].get("init_args", {}))
    seed_everything(seed, verbose=False)
    detector, data = AnomalyDetector(trees, sam=Plain), data_module(path, share, seed)
    start = time.process_time()
    trainer = Trainer(
        max_epochs=1000,  # until all trees are in
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(detector, datamodule=data)
    seconds = time.process_time() - start
    found = trainer.test(detector, datamodule=data, verbose=False)[0]
    return {
        "auroc": f"{found['test/auroc']:.6f}",
        "average_precision": f"{found['test/average_precision']:.6f}",
        "seconds": f"{seconds:.3f}",
    }


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


def comparable(rows: list[dict[str, str]], share: float) -> dict[str, dict[str, float]]:
    """Average precision of each method on each data set in %, mean over the seeds.

    Only (data set, seed) pairs count that all methods have; a method with fewer than half of the fits of the one with
    the most is left out.
    """
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        if float(row["labelled_share"]) == share:
            found.setdefault(row["method"], {})[row["data"], row["seed"]] = 100 * float(row["average_precision"])
    most = max(map(len, found.values()), default=0)
    found = {method: cells for method, cells in found.items() if 2 * len(cells) > most}
    common = set.intersection(*map(set, found.values())) if found else set()
    return {
        method: {
            name: mean(cells[data, seed] for data, seed in common if data == name)
            for name in sorted({data for data, _ in common})
        }
        for method, cells in found.items()
    }


def held_out(each: dict[str, float]) -> list[float]:
    """The values of the data sets that nothing was chosen on."""
    return [value for name, value in each.items() if name not in CHOSEN_ON]


def table(rows: list[dict[str, str]]) -> str:
    """Mean average precision in Markdown, for each share on the fits that every method has."""
    columns = {share: comparable(rows, share) for share in SHARES}
    counts = [next(iter(found.values()), {}) for found in columns.values()]
    titles = [
        f"{'all' if share == 1 else f'{share:.0%}'.replace('%', ' %')} labelled, {len(each)} data sets "
        f"({len(held_out(each))} that nothing was chosen on)"
        for share, each in zip(SHARES, counts, strict=True)
    ]
    lines = [f"| average precision in % | {' | '.join(titles)} |", "| --- | --- | --- |"]
    for method in [method for method in METHODS if any(method in found for found in columns.values())]:
        cells = []
        for found in columns.values():
            each = found.get(method, {})
            cells.append(f"{mean(each.values()):.1f} ({mean(held_out(each)):.1f})" if held_out(each) else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Average precision of every method on each data set that nothing was chosen on, and their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = {share: comparable(rows, share) for share in SHARES}
    methods = [method for method in reversed(METHODS) if any(method in found for found in columns.values())]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.6 + 0.38 * len(methods)), sharey=True, layout="constrained")
    for ax, share, title in zip(axes, SHARES, ("10 % labelled", "all labelled"), strict=True):
        for y, method in enumerate(methods):
            values = held_out(columns[share].get(method, {}))
            if not values:
                continue
            colour = "tab:blue" if method in (*TREES, BOOSTING) else "tab:orange"
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
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
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
    rows = [
        row
        for row in [*read(path), *fits_of_the_table(settings.out, rhos)]
        if settings.only in row["data"] and int(row["seed"]) < settings.seeds
    ]
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
        path_of_data = settings.folder / f"{data}.npz"
        if method in TREES:
            found = fit_trees(method, path_of_data, share, seed)
        elif method == BOOSTING:
            found = fit_boosting(path_of_data, share, seed)
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
