"""What calibration and thresholds promise on tables of ADBench, against what they do: docs/decisions.md.

python benchmarks/decisions.py ADBENCH_FOLDER

A detector is trained on 40 % of each table and stopped by 10 %. The other half is split at random 200 times, a quarter
of it to choose on and the rest to count on. Such a rest is three times as large and no more, and a part of the same
rows: of intervals that are exactly right for endless new rows, about 91 % would hold its share. So as many rows are
also drawn 200 times from that half with replacement, as from a population whose shares are known, to choose on:
there 95 % should.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from datamodules import AnomalyDataModule
from imbsam import Plain, SettingError
from imbsam.calibration import fit_isotonic
from imbsam.calibration_metrics import calibration_by_group
from imbsam.conformal import fit_conformal
from imbsam.costs import cheapest_decision, realised_costs
from imbsam.thresholds import Wanted, choose_threshold
from lightning_modules import AnomalyDetector, RestoringEarlyStopping
from lightning_modules.detectors import WeightedClassifier

TABLES = ("2_annthyroid", "23_mammography", "27_PageBlocks")
SPLITS = 200
COSTS = [[0.0, 1.0], [20.0, 0.0]]
LOOK = 0.5


def held_out(path: Path) -> tuple[Tensor, Tensor]:
    """Scores (logits) and labels of the rows that a weighted classifier was neither trained on nor stopped by."""
    seed_everything(0, verbose=False)
    data = AnomalyDataModule(
        path, labelled_share=1.0, test_share=0.5, val_share=0.2, batch_size=256, batches_per_epoch=50
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
    return scores, labels


def measure(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Means over the splits."""
    random, found = np.random.default_rng(0), []
    masks = {"all": torch.tensor([True, True]), "anomaly": torch.tensor([False, True])}
    sigmoid = torch.stack([torch.sigmoid(-scores), torch.sigmoid(scores)], dim=1)
    for split in range(SPLITS):
        order = torch.from_numpy(random.permutation(len(scores)))
        val, new = order[: len(order) // 4], order[len(order) // 4 :]
        row: dict[str, float] = {}
        calibrated = fit_isotonic(scores[val], labels[val])(scores[new]).exp()
        for name, p in (("sigmoid", sigmoid[new].double()), ("isotonic", calibrated)):
            errors = calibration_by_group(p, labels[new], masks)
            row[f"{name} error"] = errors["all"]["ece"]
            row[f"{name} log-loss"] = errors["all"]["log_loss"]
            row[f"{name} log-loss of anomalies"] = errors["anomaly"]["log_loss"]
            for look in (None, LOOK):
                decided = cheapest_decision(p, COSTS, look)
                cost = float(realised_costs(decided, labels[new], COSTS, look).mean())
                row[f"{name} cost" + (" with a look" if look else "")] = cost
        drawn = torch.from_numpy(random.integers(0, len(scores), len(val)))
        everything = torch.arange(len(scores))
        for wanted, goal in (("recall", 0.9), ("false_alarms", 10), ("precision", 0.8)):
            for name, chosen_on, counted_on in (("split", val, new), ("drawn", drawn, everything)):
                row.update(promise(wanted, goal, name, scores, labels, chosen_on, counted_on, split))  # type: ignore[arg-type]
        positives = labels[new] == 1
        sets = fit_conformal(torch.stack([-scores, scores], 1)[val], labels[val], 0.9)
        members = sets(torch.stack([-scores, scores], 1)[new])
        row["coverage of anomalies"] = float(members[positives, 1].double().mean())
        row["coverage of normal rows"] = float(members[~positives, 0].double().mean())
        row["share of looks"] = float((members.sum(1) != 1).double().mean())
        found.append(row)
    names = {name: None for row in found for name in row}
    return {
        n: sum(r.get(n, 0.0) for r in found) / (SPLITS if "unmet" in n else max(1, sum(n in r for r in found)))
        for n in names
    }


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
    """What a threshold promises on some rows and does on others."""
    try:
        chosen = choose_threshold(scores[chosen_on], labels[chosen_on], wanted, goal, seed=seed)
    except SettingError:
        return {f"{wanted} {name} unmet": 1.0}
    alarms, positives = scores[counted_on] >= chosen.value, labels[counted_on] == 1
    of = {"recall": alarms[positives], "false_alarms": alarms[~positives], "precision": positives[alarms]}[wanted]
    if not len(of):
        return {}
    realised = float(of.double().mean()) * (1000 if wanted == "false_alarms" else 1)
    low, high = getattr(chosen, f"{wanted}_interval")
    promised = chosen.false_alarms_per_thousand if wanted == "false_alarms" else float(getattr(chosen, wanted))
    return {
        f"{wanted} {name} promised": promised,
        f"{wanted} {name} realised": realised,
        f"{wanted} {name} inside": float(low <= realised <= high),
    }


def main() -> None:
    """Print the table."""
    for name in TABLES:
        scores, labels = held_out(Path(sys.argv[1]) / "Classical" / f"{name}.npz")
        quarter = len(labels) // 4
        print(
            f"{name}: {quarter} rows with about {int(labels.sum()) // 4} anomalies to choose on, the rest to count on"
        )
        for measure_name, value in measure(scores, labels).items():
            print(f"    {measure_name:32} {value:.4g}")


if __name__ == "__main__":
    main()
