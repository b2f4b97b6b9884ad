"""What sharpness brings to a classifier on cached features: the table of docs/fine_tuning.md.

python scripts/head_table.py WEIGHTS FEATURES [FEATURES ...]   # train what is missing, then print the table
python scripts/head_table.py --table                           # print the table of the finished fits

WEIGHTS are those of timm's tf_efficientnet_lite0, FEATURES the files of `imbsam features` for it, one for each seed of
the data. The learning rate of each loss is chosen for plain training, then rho or the tail's loss weight of each method
and loss, both by the mean over the seeds of the accuracy over all classes on a fifth of the training data. Then
everything is trained on all training data and tested. Results go to results/fine_tuning/heads.csv, one row per fit.
"""

import argparse
import csv
import logging
import math
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything

from datamodules import FeaturesDataModule
from imbsam import SAM, ImbSAM, Plain
from imbsam.losses import CrossEntropy, LogitAdjusted
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import Timm
from lightning_modules.callbacks.evaluation_files import EvaluationFiles
from lightning_modules.cosine_to_end import CosineToEnd

NETWORK = "tf_efficientnet_lite0"
EPOCHS, BATCH, ETA, VAL_SHARE = 20, 256, 20, 0.2
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
RHOS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
TAIL_WEIGHTS = (2.0, 5.0, 10.0, 20.0, 50.0)
LOSSES: dict[str, Any] = {
    "cross-entropy": CrossEntropy,
    "logit adjustment": partial(LogitAdjusted, tau=1.0),
    "logit adjustment, tau 1.5": partial(LogitAdjusted, tau=1.5),
}
METHODS: dict[str, Any] = {
    "SGD": Plain,
    "SGD, tail loss doubled": partial(Plain, eta=ETA, tail_weight=2.0),
    "SGD, tail loss weighted": partial(Plain, eta=ETA),
    "SAM": SAM,
    "ImbSAM": partial(ImbSAM, eta=ETA),
}
TUNED = {"SGD, tail loss weighted": "tail_weight", "SAM": "rho", "ImbSAM": "rho"}
"""The setting of a method that is chosen on the validation parts."""

MEASURES = ("many", "medium", "few", "all", "lowest_recall", "harmonic_mean", "macro_f1", "top5_all", "ece_all")
COLUMNS = ("part", "seed", "loss", "method", "lr", "chosen")
RESULTS = (*MEASURES, "train_loss", "seconds")
FILE = Path("results/fine_tuning/heads.csv")


@dataclass(frozen=True)
class Fit:
    """One training.

    Attributes:
        part: what it is judged on, ``val`` (a fifth of the training data, which is then left out) or ``test``.
        seed: of the data and of the run.
        loss: a name in LOSSES.
        method: a name in METHODS.
        lr: the learning rate.
        chosen: the method's setting in TUNED, 0 where it has none.
    """

    part: str
    seed: int
    loss: str
    method: str
    lr: float
    chosen: float


Results = Mapping[Fit, Mapping[str, float]]


def train(fit: Fit, weights: str, features: Path) -> dict[str, float]:
    """Train a classifier, and measure it on the fit's part; ``seconds`` are the process's CPU time of the training."""
    seed_everything(fit.seed, verbose=False)
    share = VAL_SHARE if fit.part == "val" else 0.0
    data = FeaturesDataModule(features, batch_size=BATCH, val_share=share, seed=fit.seed)
    method = METHODS[fit.method]
    model = LongTailedClassifier(
        Timm(NETWORK),
        backbone_weights=weights,
        loss=LOSSES[fit.loss],
        sam=partial(method, **{TUNED[fit.method]: fit.chosen}) if fit.chosen else method,
        optimizer=partial(torch.optim.SGD, lr=fit.lr, momentum=0.9),
        lr_scheduler=CosineToEnd,  # type: ignore[arg-type]
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        check_val_every_n_epoch=EPOCHS,
        num_sanity_val_steps=0,
        callbacks=[EvaluationFiles()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    found = {"train_loss": float(trainer.callback_metrics["train/loss_epoch"]), "seconds": time.process_time() - start}
    if fit.part == "test":
        trainer.test(model, datamodule=data, verbose=False)
    values = trainer.callback_metrics
    # no calibration error of a validation part
    return found | {name: float(values.get(f"{fit.part}/{name}", math.nan)) for name in MEASURES}


class Fits:
    """The finished fits, and the training of those that are missing.

    Args:
        path: their file.
        weights: of the network.
        features: a file for each seed.
    """

    def __init__(self, path: Path, weights: str, features: Sequence[Path]) -> None:
        self.path, self.weights, self.features = path, weights, features
        self.done = dict(read(path))

    def of(self, fits: Iterable[Fit]) -> None:
        """Train those that are not finished."""
        for fit in fits:
            if fit not in self.done:
                self.done[fit] = train(fit, self.weights, self.features[fit.seed])
                append(self.path, fit, self.done[fit])
                print(fit, f"{100 * self.done[fit]['all']:.1f}", flush=True)

    def best(self, choices: Sequence[Sequence[Fit]]) -> Fit:
        """The choice (the same with every seed) of the highest mean accuracy over all classes."""
        for fits in choices:
            self.of(fits)
        return max(choices, key=lambda fits: mean(self.done[fit]["all"] for fit in fits))[0]

    def run(self) -> None:
        """Choose learning rates, rho and tail weights on the validation parts, then train on everything and test."""
        seeds = range(len(self.features))
        chosen = []
        for loss in LOSSES:
            rates = [[Fit("val", seed, loss, "SGD", lr, 0.0) for seed in seeds] for lr in LEARNING_RATES]
            lr = self.best(rates).lr
            for method in METHODS:
                value = 0.0
                if method in TUNED:
                    grid = RHOS if TUNED[method] == "rho" else TAIL_WEIGHTS
                    values = [[Fit("val", seed, loss, method, lr, value) for seed in seeds] for value in grid]
                    value = self.best(values).chosen
                chosen += [Fit("test", seed, loss, method, lr, value) for seed in seeds]
        self.of(chosen)


def read(path: Path) -> dict[Fit, dict[str, float]]:
    """The finished fits and their results."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            Fit(row["part"], int(row["seed"]), row["loss"], row["method"], float(row["lr"]), float(row["chosen"])): {
                name: float(row[name]) for name in RESULTS
            }
            for row in csv.DictReader(file)
        }


def append(path: Path, fit: Fit, results: Mapping[str, float]) -> None:
    """Add a row to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *RESULTS), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({**asdict(fit), **{name: f"{results[name]:.6g}" for name in RESULTS}})


def tables(fits: Results) -> str:
    """The results on the test part, and the paired differences to plain training with the same loss, in Markdown."""
    lines = [
        _line(["loss", "method", "lr", "rho, weight", *MEASURES, "CPU s"]),
        _line([":--"] * 2 + ["--:"] * (3 + len(MEASURES))),
    ]
    differences = ["", _line(["loss", "minus SGD", *MEASURES]), _line([":--"] * 2 + ["--:"] * len(MEASURES))]
    for loss in LOSSES:
        rows = {method: _tested(fits, loss, method) for method in METHODS}
        for method, found in rows.items():
            if not found:
                continue
            first = next(iter(found))
            by_seed = {fit.seed: results for fit, results in found.items()}
            cells = [_cell([100 * results[name] for results in by_seed.values()]) for name in MEASURES]
            seconds = f"{mean(results['seconds'] for results in by_seed.values()):.0f}"
            lines.append(
                _line([loss, method, f"{first.lr:g}", f"{first.chosen:g}" if first.chosen else "", *cells, seconds])
            )
            plain = {fit.seed: results for fit, results in rows["SGD"].items()}
            if method != "SGD" and (seeds := sorted(by_seed.keys() & plain.keys())):
                pairs = [[100 * (by_seed[s][name] - plain[s][name]) for s in seeds] for name in MEASURES]
                differences.append(_line([loss, method, *(_error(values) for values in pairs)]))
    return "\n".join(lines + differences)


def _tested(fits: Results, loss: str, method: str) -> Results:
    """Those of the settings chosen last: a longer grid may choose others."""
    found = {f: r for f, r in fits.items() if (f.part, f.loss, f.method) == ("test", loss, method)}
    last = next(reversed(found), None)
    return {f: r for f, r in found.items() if last is not None and (f.lr, f.chosen) == (last.lr, last.chosen)}


def _cell(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""  # of NaN too, unlike statistics.stdev
    return f"{mean(values):.1f}{deviation}"


def _error(values: Sequence[float]) -> str:
    """Mean and standard error of paired differences."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{mean(values):+.2f}{error}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", help="the network's weights, as the features were computed with")
    parser.add_argument("features", nargs="*", type=Path, help="a file of features for each seed, from seed 0")
    parser.add_argument("--table", action="store_true", help="print the tables without training")
    parser.add_argument("--file", type=Path, default=FILE, help="the file of the results")
    args = parser.parse_args()
    fits = Fits(args.file, args.weights, args.features)
    if not args.table:
        if not args.features:
            parser.error("give the weights and the files of features, or --table")
        torch.set_num_threads(1)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=re.escape("lightning.pytorch") + ".*")
        fits.run()
    print(tables(fits.done))


if __name__ == "__main__":
    main()
