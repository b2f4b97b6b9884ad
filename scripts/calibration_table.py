"""What calibration and thresholds promise, against what they do: the tables of docs/decisions.md.

python scripts/calibration_table.py tables ADBENCH_FOLDER   # three tables of scikit-learn's, three of ADBench's
python scripts/calibration_table.py classes RUN [RUN ...]   # finished classifiers, such as logs/digits_lt/sgd/version_*

**tables**: a detector is trained on 40 % of each table and stopped by 10 %. The other half is split at random 200
times, a quarter of it to choose on and the rest to count on. Such a rest is three times as large and no more, and a
part of the same rows: of intervals that are exactly right for endless new rows, about 91 % would hold its share. So as
many rows are also drawn 200 times from that half with replacement, as from a population whose shares are known, to
choose on: there 95 % should.

**classes**: every run is calibrated by every method with ``imbsam decide``, for balanced classes as the test part's
are, and tested with ``imbsam test``; the means over the runs.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_breast_cancer, make_classification
from torch import Tensor

from datamodules import AnomalyDataModule
from imbsam import Plain, SettingError
from imbsam.calibration import fit_isotonic, fit_temperature, fit_vector_scaling
from imbsam.calibration_metrics import calibration_by_group
from imbsam.conformal import fit_conformal
from imbsam.costs import cheapest_decision, realised_costs
from imbsam.group_names import GROUPS
from imbsam.thresholds import Wanted, choose_threshold
from lightning_modules import AnomalyDetector, RestoringEarlyStopping
from lightning_modules.detectors import WeightedClassifier

ADBENCH = ("2_annthyroid", "23_mammography", "27_PageBlocks")
SPLITS = 200
COSTS = [[0.0, 1.0], [20.0, 0.0]]
LOOK = 0.5
GOALS: tuple[tuple[Wanted, float], ...] = (("recall", 0.9), ("false_alarms", 10), ("precision", 0.8))
MASKS = {"all": torch.tensor([True, True]), "anomaly": torch.tensor([False, True])}


def own_tables(folder: Path) -> list[Path | None]:
    """Scikit-learn's: the digits (null, a 0 is an anomaly), a drawn one with 3 % positives, and malignant tumours."""
    x, y = make_classification(6000, 20, n_informative=6, weights=[0.97], flip_y=0.005, class_sep=0.8, random_state=0)
    np.savez(folder / "drawn.npz", X=x, y=y)
    x, y = load_breast_cancer(return_X_y=True)
    np.savez(folder / "tumours.npz", X=x, y=1 - y)
    return [None, folder / "drawn.npz", folder / "tumours.npz"]


def held_out(path: Path | None) -> tuple[Tensor, Tensor]:
    """Scores (logits) and labels of the rows that a weighted classifier was neither trained on nor stopped by."""
    seed_everything(0, verbose=False)
    data = AnomalyDataModule(
        path, labelled_share=1.0, test_share=0.5, val_share=0.2, min_rows=1, batch_size=256, batches_per_epoch=50
    )
    model = AnomalyDetector(WeightedClassifier, sam=Plain, optimizer=partial(torch.optim.Adam, lr=0.002))
    trainer = Trainer(
        max_epochs=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RestoringEarlyStopping()],
    )
    trainer.fit(model, datamodule=data)
    with torch.no_grad():
        pairs = [(model.eval()(x), y) for x, y in data.test_dataloader()]
    scores, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return scores.double(), labels


def calibrations(scores: Tensor, labels: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Probabilities (N, 2) of scores by each method, fitted on these; the weights are undone but for "nothing"."""
    shares = labels.bincount(minlength=2).double().clamp(min=0.5)

    def logits(new: Tensor) -> Tensor:  # inverse-frequency weights: as trained on balanced classes
        return torch.stack([torch.zeros_like(new), new], dim=1) + (shares / shares.sum()).log()

    temperature = fit_temperature(logits(scores), labels)
    vector = fit_vector_scaling(logits(scores), labels)
    isotonic = fit_isotonic(scores, labels)
    return {
        "nothing": lambda new: torch.stack([torch.sigmoid(-new), torch.sigmoid(new)], dim=1),
        "prior": lambda new: logits(new).softmax(dim=1),
        "temperature": lambda new: temperature(logits(new)).exp(),
        "vector": lambda new: vector(logits(new)).exp(),
        "isotonic": lambda new: isotonic(new).exp(),
    }


def measure(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Means over the splits; a goal that no threshold meets leaves its split out."""
    random, found = np.random.default_rng(0), []
    for split in range(SPLITS):
        order = torch.from_numpy(random.permutation(len(scores)))
        val, new = order[: len(order) // 4], order[len(order) // 4 :]
        row: dict[str, float] = {}
        for name, calibrate in calibrations(scores[val], labels[val]).items():
            p = calibrate(scores[new])
            errors = calibration_by_group(p, labels[new], MASKS)
            row[f"{name} error"] = 100 * errors["all"]["ece"]
            row[f"{name} log-loss"] = errors["all"]["log_loss"]
            row[f"{name} log-loss of anomalies"] = errors["anomaly"]["log_loss"]
            for look in (None, LOOK):
                decided = cheapest_decision(p, COSTS, look)
                cost = float(realised_costs(decided, labels[new], COSTS, look).mean())
                row[f"{name} cost" + (" with a look" if look else "")] = cost
        drawn = torch.from_numpy(random.integers(0, len(scores), len(val)))
        everything = torch.arange(len(scores))
        for wanted, goal in GOALS:
            for name, chosen_on, counted_on in (("split", val, new), ("drawn", drawn, everything)):
                row.update(promise(wanted, goal, name, scores, labels, chosen_on, counted_on, split))
        positives = labels[new] == 1
        sets = fit_conformal(torch.stack([-scores, scores], 1)[val], labels[val], 0.9)
        members = sets(torch.stack([-scores, scores], 1)[new])
        row["covered anomalies"] = 100 * float(members[positives, 1].double().mean())
        row["covered others"] = 100 * float(members[~positives, 0].double().mean())
        row["looks"] = 100 * float((members.sum(1) != 1).double().mean())
        found.append(row)
    return {name: fmean(row[name] for row in found if name in row) for name in {n: None for row in found for n in row}}


def promise(
    wanted: Wanted,
    goal: float,
    name: str,
    scores: Tensor,
    labels: Tensor,
    chosen_on: Tensor,
    counted_on: Tensor,
    seed: int,
) -> dict[str, float]:
    """What a threshold promises on some rows and does on others, in % or per thousand; empty if none meets the goal."""
    try:
        chosen = choose_threshold(scores[chosen_on], labels[chosen_on], wanted, goal, seed=seed)
    except SettingError:
        return {}
    alarms, positives = scores[counted_on] >= chosen.value, labels[counted_on] == 1
    of = {"recall": alarms[positives], "false_alarms": alarms[~positives], "precision": positives[alarms]}[wanted]
    if not len(of):
        return {}
    unit = 1000 if wanted == "false_alarms" else 100
    realised = unit * float(of.double().mean())
    per_thousand = wanted == "false_alarms"
    low, high = (end * (1 if per_thousand else 100) for end in getattr(chosen, f"{wanted}_interval"))
    promised = chosen.false_alarms_per_thousand if per_thousand else 100 * float(getattr(chosen, wanted))
    return {
        f"{wanted} {name} promised": promised,
        f"{wanted} {name} realised": realised,
        f"{wanted} {name} inside": 100 * float(low <= realised <= high),
    }


def tables(adbench: Path) -> None:
    """Print the tables of tables, in Markdown."""
    measured: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [*own_tables(Path(folder)), *(adbench / "Classical" / f"{name}.npz" for name in ADBENCH)]
        for path in paths:
            scores, labels = held_out(path)
            name = "digits" if path is None else path.stem.partition("_")[2] or path.stem
            measured[f"{name} ({len(labels) // 4:,}, {int(labels.sum()) // 4})"] = measure(scores, labels)
            print(f"{name} is measured", file=sys.stderr, flush=True)
    methods = ("nothing", "prior", "temperature", "vector", "isotonic")
    for what, digits in (("error", 1), ("log-loss", 3), ("log-loss of anomalies", 2)):
        head = [f"{what}: rows to fit on, anomalies in them", *methods]
        print_table(head, [[t, *(f"{m[f'{n} {what}']:.{digits}f}" for n in methods)] for t, m in measured.items()])
    rows = [
        [t, *(f"{m[f'nothing {c}']:.3f} → {m[f'isotonic {c}']:.3f}" for c in ("cost", "cost with a look"))]
        for t, m in measured.items()
    ]
    print_table(["cost a row, nothing → isotonic", "without a look", "with a look"], rows)
    head = ["promised, realised; inside the interval, split / drawn", *(wanted for wanted, _ in GOALS)]
    rows = []
    for t, m in measured.items():
        cells = []
        for wanted, _ in GOALS:
            if f"{wanted} split inside" not in m:
                cells.append("cannot be met")
                continue
            numbers = [m[f"{wanted} split {part}"] for part in ("promised", "realised", "inside")]
            cells.append(
                "{:.1f}, {:.1f}; {:.1f} / {:.1f} %".format(*numbers, m.get(f"{wanted} drawn inside", float("nan")))
            )
        rows.append([t, *cells])
    print_table(head, rows)
    parts = ("covered anomalies", "covered others", "looks")
    print_table(["coverage 90 %, in %", *parts], [[t, *(f"{m[p]:.1f}" for p in parts)] for t, m in measured.items()])


def tested(checkpoint: Path, method: str, folder: Path) -> dict[str, float]:
    """What ``imbsam test`` logs after ``imbsam decide`` has calibrated a checkpoint by a method."""
    imbsam = [sys.executable, "-m", "lightning_modules.cli"]
    new, logs = folder / f"{method}.ckpt", folder / method
    quiet = ["--trainer.enable_progress_bar=false"]
    settings = [f"--calibration.method={method}", "--calibration.prior=balanced", f"--output={new}", *quiet]
    subprocess.run([*imbsam, "decide", f"--ckpt_path={checkpoint}", *settings], check=True, stdout=subprocess.DEVNULL)
    log = [f"--trainer.logger.init_args.save_dir={logs}", "--trainer.logger.init_args.name=tests"]
    subprocess.run([*imbsam, "test", f"--ckpt_path={new}", *log, *quiet], check=True, stdout=subprocess.DEVNULL)
    with (logs / "tests/test_0/metrics.csv").open(newline="") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def classes(runs: Sequence[Path]) -> None:
    """Print the table of classifiers, in Markdown."""
    rows: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            for method in ("prior", "temperature", "vector"):
                found = tested(run / "checkpoints/last.ckpt", method, Path(folder))
                rows.setdefault(method, []).append(
                    {f"{m} {g}": found[f"test/calibrated_{m}_{g}"] for m in ("ece", "log_loss") for g in GROUPS}
                )
                if method == "prior":
                    rows.setdefault("nothing", []).append(
                        {f"{m} {g}": found[f"test/{m}_{g}"] for m in ("ece", "log_loss") for g in GROUPS}
                    )
    cells = []
    for method in ("nothing", "prior", "temperature", "vector"):
        mean = {name: fmean(row[name] for row in rows[method]) for name in rows[method][0]}
        errors = " / ".join(f"{100 * mean[f'ece {g}']:.1f}" for g in GROUPS)
        cells.append([method, errors, " / ".join(f"{mean[f'log_loss {g}']:.2f}" for g in GROUPS)])
    groups = " / ".join(GROUPS)
    print_table(["calibrated by", f"calibration error in %, {groups}", f"log-loss, {groups}"], cells)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown."""
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    print(flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("tables").add_argument("adbench", type=Path)
    kinds.add_parser("classes").add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args(args)
    if given.kind == "tables":
        tables(given.adbench)
    else:
        classes(given.runs)


if __name__ == "__main__":
    main()
