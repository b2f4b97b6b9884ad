"""How the recipe of the anomaly configs was chosen, on validation parts: docs/anomaly.md has the tables.

python benchmarks/anomaly_recipe.py ADBENCH_FOLDER why        # what was wrong with DeepSAD in the first configs
python benchmarks/anomaly_recipe.py ADBENCH_FOLDER scaling    # how to scale the features
python benchmarks/anomaly_recipe.py ADBENCH_FOLDER stopping   # what early stopping should monitor
python benchmarks/anomaly_recipe.py ADBENCH_FOLDER boosting   # class weights and number of trees of the booster

The test part of each table (30 %) is set aside and never used. The rest is split again: 60 % for training, 15 % for
early stopping, 25 % for judging. Plain training, without Lightning; average precision on the judging part by all true
labels.
"""

import argparse
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler, QuantileTransformer, RobustScaler, StandardScaler
from torch import Tensor, nn

from datamodules.anomaly.batches import EpochBatches, Sampling
from imbsam.sklearn import ImbSAMOutlierDetector
from lightning_modules.detectors import DeepSAD, DevNet, PReNet, WeightedClassifier
from lightning_modules.detectors.autoencoder import pretrain
from lightning_modules.detectors.detector import Detector, mlp

TABLES = (
    "Classical/2_annthyroid",
    "Classical/6_cardio",
    "Classical/27_PageBlocks",
    "CV_by_ResNet18/CIFAR10_0",
    "NLP_by_BERT/20news_3",
)
SHARES = (0.1, 1.0)
MAX_ROWS = 6000
CHECK_EVERY = 50
SCALERS = {
    "standard": StandardScaler,
    "quantile": lambda: QuantileTransformer(output_distribution="normal", random_state=0),
    "min_max": MinMaxScaler,
    "robust": RobustScaler,
}
DETECTORS: dict[str, type[Detector]] = {
    "devnet": DevNet,
    "prenet": PReNet,
    "classifier": WeightedClassifier,
    "deep_sad": DeepSAD,
}
SAMPLING: dict[str, Sampling] = {
    "devnet": "balanced",
    "prenet": "pairs",
    "classifier": "natural",
    "deep_sad": "natural",
}


@dataclass(frozen=True)
class Part:
    """Samples, float32 (N, d), which of them are known anomalies, int64 (N,), and which are true ones, int64 (N,)."""

    x: Tensor
    known: Tensor
    truth: Any


def parts(path: Path, share: float, seed: int, scaling: str) -> dict[str, Part]:
    """The three parts, scaled by statistics of the first."""
    with np.load(path) as file:
        x, y = file["X"].astype(np.float64), file["y"].astype(int)
    random = np.random.RandomState(seed)
    rows = np.arange(len(y))
    if len(rows) > MAX_ROWS:
        rows = random.choice(rows, MAX_ROWS, replace=False)
    rest, _ = train_test_split(rows, test_size=0.3, stratify=y[rows], random_state=random)
    rest, judge = train_test_split(rest, test_size=0.25, stratify=y[rest], random_state=random)
    fit, stop = train_test_split(rest, test_size=0.2, stratify=y[rest], random_state=random)
    varying = x[fit].std(0) > 0
    scaler = SCALERS[scaling]().fit(x[fit][:, varying])
    scaled_parts = {}
    for name, part in (("fit", fit), ("stop", stop), ("judge", judge)):
        anomalies = np.flatnonzero(y[part])
        known = np.zeros(len(part), int)
        known[random.choice(anomalies, ceil(share * len(anomalies)), replace=False)] = 1
        scaled = torch.from_numpy(scaler.transform(x[part][:, varying])).float()
        scaled_parts[name] = Part(scaled, torch.from_numpy(known), y[part])
    return scaled_parts


@torch.no_grad()
def validation_loss(detector: Detector, sampling: Sampling, part: Part) -> float:
    """The training objective on the stopping part, with its known labels."""
    if sampling == "pairs":
        rows = next(iter(EpochBatches(part.known, "pairs", 512, 1, 0)))
        return float(detector.losses(part.x[rows], part.known[rows]).mean())
    losses = detector.losses(part.x, part.known)
    if sampling == "balanced":
        return float((losses[part.known == 1].mean() + losses[part.known == 0].mean()) / 2)
    return float(losses.mean())


def checks(data: dict[str, Part], name: str, lr: float, seed: int) -> Iterator[tuple[float, float, float, float]]:
    """Train; every 50 steps, validation loss and average precision, for stopping (known, true labels) and judging."""
    fit, stop, judge = data["fit"], data["stop"], data["judge"]
    torch.manual_seed(seed)
    detector = DETECTORS[name]((fit.x.shape[1],))
    detector.prepare(fit.x, fit.known)
    optimizer = torch.optim.Adam(detector.parameters(), lr, fused=True)
    batches = EpochBatches(fit.known, SAMPLING[name], 256, CHECK_EVERY, seed)
    while True:
        for rows in batches:
            loss = detector.losses(fit.x[rows], fit.known[rows]).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            stopping, judging = (np.nan_to_num(detector.scores(part.x).numpy()) for part in (stop, judge))
        yield (
            validation_loss(detector, SAMPLING[name], stop),
            average_precision_score(stop.known, stopping),
            average_precision_score(stop.truth, stopping),
            average_precision_score(judge.truth, judging),
        )


def print_scaling(folder: Path) -> None:
    """Early stopping by the validation loss with a patience of 500 steps, at most 4,000; seeds 0 and 1."""
    for name, scaling, share in itertools.product(SAMPLING, SCALERS, SHARES):
        precisions = []
        for table, seed in itertools.product(TABLES, (0, 1)):
            best, judged, waited = inf, 0.0, 0
            lr = 1e-3 if name == "deep_sad" else 5e-3
            run = checks(parts(folder / f"{table}.npz", share, seed, scaling), name, lr, seed)
            for loss, _, _, score in itertools.islice(run, 80):
                best, judged, waited = (loss, score, 0) if loss < best else (best, judged, waited + 1)
                if waited == 10:
                    break
            precisions.append(100 * judged)
        print(f"{name:10s} {scaling:8s} labelled {share:3} average precision {np.mean(precisions):.1f}", flush=True)


def print_stopping(folder: Path) -> None:
    """Standard scaling, 3,000 steps at two learning rates, seed 0: the judged average precision by each criterion."""
    for share in SHARES:
        chosen: dict[str, list[float]] = {}
        for name, lr, table in itertools.product(("devnet", "prenet", "classifier"), (1e-3, 5e-3), TABLES):
            run = checks(parts(folder / f"{table}.npz", share, 0, "standard"), name, lr, 0)
            loss, known, true, judged = np.array(list(itertools.islice(run, 60))).T
            smooth = np.convolve(np.pad(loss, 2, mode="edge"), np.ones(5) / 5, "valid")
            for what, epoch in (
                ("500 steps", 9),
                ("3,000 steps", -1),
                ("validation loss", loss.argmin()),
                ("validation loss, mean of 5", smooth.argmin()),
                ("average precision, known labels", known.argmax()),
                ("average precision, true labels", true.argmax()),
                ("best for the judge", judged.argmax()),
            ):
                chosen.setdefault(what, []).append(100 * judged[epoch])
            for patience in (5, 10, 20):
                best, at, waited = inf, 0, 0
                for epoch, value in enumerate(loss):
                    best, at, waited = (value, epoch, 0) if value < best else (best, at, waited + 1)
                    if waited == patience:
                        break
                chosen.setdefault(f"validation loss, patience {patience}", []).append(100 * judged[at])
        for what, values in chosen.items():
            print(f"labelled {share:3} {what:32s} {np.mean(values):.1f}", flush=True)


@dataclass(frozen=True)
class FirstDeepSAD:
    """DeepSAD as in the first configs; the fields are what was varied."""

    scaling: str = "min_max"
    hidden: tuple[int, ...] = (100, 20)
    in_units_of_spread: bool = False
    pretrain_steps: int = 200
    lr: float = 1e-3
    steps: int = 500

    def score(self, data: dict[str, Part], seed: int) -> float:
        """Average precision on the judging part."""
        fit, judge = data["fit"], data["judge"]
        torch.manual_seed(seed)
        sizes = [fit.x.shape[1], *self.hidden]
        encoder: nn.Sequential = mlp(sizes, bias=False, activation=nn.LeakyReLU)
        pretrain(encoder, mlp(sizes[::-1], bias=False, activation=nn.LeakyReLU), fit.x, self.pretrain_steps)
        with torch.no_grad():
            codes = encoder(fit.x)
            centre = codes.mean(0)
            centre = torch.where(centre < 0, centre.clamp(max=-0.1), centre.clamp(min=0.1))
            spread = (codes - centre).square().sum(1).mean() if self.in_units_of_spread else 1.0

        def distance(x: Tensor) -> Tensor:
            return (encoder(x) - centre).square().sum(1) / spread  # type: ignore[no-any-return]

        optimizer = torch.optim.Adam(encoder.parameters(), self.lr, weight_decay=1e-6, fused=True)
        for rows in EpochBatches(fit.known, "natural", 256, self.steps, seed):
            d = distance(fit.x[rows])
            loss = torch.where(fit.known[rows] == 1, 1 / (d + 1e-6), d).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            return float(average_precision_score(judge.truth, distance(judge.x).numpy()))


def print_why(folder: Path) -> None:
    """One change at a time, then several together; seeds 0 and 1."""
    first = FirstDeepSAD()
    for what, variant in {
        "as it was": first,
        "3,000 steps": replace(first, steps=3000),
        "learning rate 0.005": replace(first, lr=5e-3),
        "network (64, 32)": replace(first, hidden=(64, 32)),
        "no pretraining": replace(first, pretrain_steps=0),
        "distances in units of their mean": replace(first, in_units_of_spread=True),
        "standard scaling": replace(first, scaling="standard"),
        "both": replace(first, in_units_of_spread=True, scaling="standard"),
        "both, 3,000 steps": replace(first, in_units_of_spread=True, scaling="standard", steps=3000),
    }.items():
        means = [
            np.mean(
                [
                    100 * variant.score(parts(folder / f"{table}.npz", share, seed, variant.scaling), seed)
                    for table, seed in itertools.product(TABLES, (0, 1))
                ]
            )
            for share in SHARES
        ]
        print(f"{what:36s} 10 % labelled {means[0]:.1f}, all {means[1]:.1f}", flush=True)
    means = [
        np.mean(
            [
                100 * estimator_score(parts(folder / f"{table}.npz", share, seed, "standard"), seed)
                for table, seed in itertools.product(TABLES, (0, 1))
            ]
        )
        for share in SHARES
    ]
    print(f"{'the estimator of today':36s} 10 % labelled {means[0]:.1f}, all {means[1]:.1f}", flush=True)


def estimator_score(data: dict[str, Part], seed: int) -> float:
    """Average precision on the judging part of ImbSAMOutlierDetector, trained plainly."""
    fit, judge = data["fit"], data["judge"]
    model = ImbSAMOutlierDetector("sgd", random_state=seed)
    model.fit(fit.x.numpy(), np.where(fit.known == 1, -1, 1))
    return float(average_precision_score(judge.truth, -model.score_samples(judge.x.numpy())))


def print_boosting(folder: Path) -> None:
    """The judged average precision after so many trees, and after the fewest for the least loss; seeds 0 and 1."""
    for class_weight, lr, share in itertools.product((None, "balanced"), (0.1, 0.03), SHARES):
        chosen: dict[str, list[float]] = {}
        for table, seed in itertools.product(TABLES, (0, 1)):
            data = parts(folder / f"{table}.npz", share, seed, "standard")
            fit, stop, judge = data["fit"], data["stop"], data["judge"]
            booster = HistGradientBoostingClassifier(
                learning_rate=lr, max_iter=300, class_weight=class_weight, early_stopping=False, random_state=seed
            ).fit(fit.x.numpy(), fit.known.numpy())
            weight = len(fit.known) / (2 * fit.known.bincount()) if class_weight else torch.ones(2)
            losses = [
                log_loss(stop.known, p, sample_weight=weight[stop.known])
                for p in booster.staged_predict_proba(stop.x.numpy())
            ]
            judged = [
                average_precision_score(judge.truth, s) for s in booster.staged_decision_function(judge.x.numpy())
            ]
            for trees in (30, 100, 300):
                chosen.setdefault(f"{trees} trees", []).append(100 * judged[trees - 1])
            for patience in (10, 30):
                best, at = inf, 0
                for tree, loss in enumerate(losses):
                    best, at = (loss, tree) if loss < best else (best, at)
                    if tree - at == patience:
                        break
                chosen.setdefault(f"patience {patience}", []).append(100 * judged[at])
        means = ", ".join(f"{what} {np.mean(values):.1f}" for what, values in chosen.items())
        print(f"class_weight {class_weight}, learning rate {lr}, labelled {share:3}: {means}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ADBench's npz files")
    parser.add_argument("what", choices=["why", "scaling", "stopping", "boosting"])
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    {"why": print_why, "scaling": print_scaling, "stopping": print_stopping, "boosting": print_boosting}[settings.what](
        settings.folder
    )
