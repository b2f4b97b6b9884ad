"""Compare the command line on five held-out tables with our scikit-learn estimators and with scikit-learn's trees.

python scripts/anomaly_baselines.py ADBENCH_FOLDER    # run every fit, then print the table; run it again to resume

`imbsam fit` trains each config of CONFIGS unchanged, with 10 % and with all of the training anomalies labelled. The
estimators train on the same samples, including those of the command line's validation part, and with the same labels;
hidden anomalies count as normal there. All are tested on the same samples. No setting was chosen on these tables.
"""

import argparse
import csv
import itertools
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import average_precision_score

from imbsam.sklearn import ImbSAMClassifier, ImbSAMOutlierDetector

# every third, in alphabetical order, of the data sets on which nothing was tuned
TABLES = (
    "CV_by_ResNet18/CIFAR10_4",
    "CV_by_ResNet18/MVTec-AD_screw",
    "Classical/23_mammography",
    "Classical/26_optdigits",
    "Classical/38_thyroid",
)
SHARES = (0.1, 1.0)
CONFIGS = ("devnet_sgd", "devnet_imbsam", "deep_sad_sgd", "deep_sad_imbsam", "classifier_sgd", "classifier_imbsam")
ESTIMATORS = (
    ImbSAMOutlierDetector,
    ImbSAMClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
COLUMNS = ("method", "data", "labelled_share", "seed", "average_precision")


def command_line(config: str, path: Path, share: float, seed: int) -> float:
    """Average precision of `imbsam fit` on the test part; `config` is a detector and a method, such as "devnet_sgd"."""
    from lightning_modules.cli.run import main

    detector, _, method = config.rpartition("_")
    pieces = ("data/anomaly_table", f"detector/{detector}", f"method/{method}")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            *("imbsam", "fit", *(f"--config=configs/{piece}.yaml" for piece in pieces), f"--seed_everything={seed}"),
            *(f"--data.path={path}", f"--data.labelled_share={share}", f"--data.seed={seed}"),
            *("--trainer.accelerator=cpu", f"--trainer.logger.init_args.save_dir={folder}"),
        ]
        main()
        (log,) = Path(folder).rglob("metrics.csv")
        with log.open(newline="") as file:
            logged = [row["test/average_precision"] for row in csv.DictReader(file)]
    return float([value for value in logged if value][-1])


def estimator(kind: Any, path: Path, share: float, seed: int) -> float:
    """Average precision of an estimator with its default settings on the same test part."""
    from datamodules import AnomalyDataModule

    data = AnomalyDataModule(path=path, labelled_share=share, val_share=0.2, scaling="none", seed=seed)
    data.setup("fit")
    _, val = data.val_dataloader()  # with the labels that are known
    assert val.labels is not None
    rows = np.vstack([data.train_features.numpy(), val.features.numpy()])
    labels = np.concatenate([data.train_labels.numpy(), val.labels.numpy()])
    test = data.test_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind is ImbSAMOutlierDetector:
            scores = (
                -kind(random_state=seed).fit(rows, np.where(labels == 1, -1, 1)).score_samples(test.features.numpy())
            )
        else:
            scores = kind(random_state=seed).fit(rows, labels).predict_proba(test.features.numpy())[:, 1]
    return float(average_precision_score(test.labels, scores))


def table(rows: list[dict[str, str]]) -> str:
    """Mean average precision of each method over the tables and the finished seeds."""
    lines = ["| | seeds | 10 % labelled | all labelled |", "| --- | --- | --- | --- |"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        seeds = whole_seeds(rows, method)
        for share in SHARES:
            values = {
                (row["data"], row["seed"]): 100 * float(row["average_precision"])
                for row in rows
                if row["method"] == method and float(row["labelled_share"]) == share and row["seed"] in seeds
            }
            each = [mean(value for (data, _), value in values.items() if data == name) for name in TABLES if values]
            cells.append(f"{mean(each):.1f} ({' / '.join(f'{value:.0f}' for value in each)})" if each else "")
        lines.append(f"| {method} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole_seeds(rows: list[dict[str, str]], method: str) -> set[str]:
    """The seeds with which a method was trained on every table and with both shares."""
    finished = {(row["seed"], row["data"], float(row["labelled_share"])) for row in rows if row["method"] == method}
    return {
        seed
        for seed in {seed for seed, _, _ in finished}
        if all((seed, data, share) in finished for data, share in itertools.product(TABLES, SHARES))
    }


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ADBench's npz files")
    parser.add_argument("--out", type=Path, default=Path("results/anomaly/baselines.csv"))
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds from 0")
    settings = parser.parse_args()
    rows: list[dict[str, str]] = []
    if settings.out.exists():
        with settings.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {tuple(row[name] for name in COLUMNS[:-1]) for row in rows}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for seed, data, share, method in itertools.product(range(settings.seeds), TABLES, SHARES, (*ESTIMATORS, *CONFIGS)):
        name = method if isinstance(method, str) else method.__name__
        if (name, data, str(share), str(seed)) in done:
            continue
        run: Any = command_line if isinstance(method, str) else estimator
        precision = run(method, (settings.folder / f"{data}.npz").resolve(), share, seed)
        rows.append(dict(zip(COLUMNS, (name, data, str(share), str(seed), f"{precision:.6f}"), strict=True)))
        print(rows[-1], file=sys.stderr, flush=True)
        with settings.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
