"""Choose rho for long-tailed digits on images that are neither trained nor tested on.

    python scripts/choose_digits_settings.py

The long tail leaves most of the digits' training part unused; those images validate. Seeds 10 to 14, which no reported
run uses; the test part is never looked at. Prints the mean accuracy of each group over the seeds.
"""

import argparse

import torch
import torch.nn.functional as F

from datamodules import DigitsLTDataModule
from imbsam import SAM, ClassAwareSAM, ImbSAM
from imbsam.metrics import ClassGroupAccuracy
from lightning_modules.backbones import create_backbone

CANDIDATES = [("sgd", 0.0), *((method, rho) for method in ("sam", "imbsam") for rho in (0.05, 0.1, 0.2))]


def train(method: str, rho: float, seed: int, width: int, epochs: int) -> tuple[list[float], float]:
    """Group accuracies on the unused training images, and the last epoch's training loss."""
    torch.manual_seed(seed)
    data = DigitsLTDataModule(seed=seed)
    data.setup()
    full, labels, _ = data.load_datasets()
    used = {int(i) for i in data._train.indices}
    unused = [i for i in range(len(labels)) if i not in used]
    model = create_backbone("small_cnn", num_classes=10, width=width)
    sam = {
        "sgd": lambda: ClassAwareSAM(model, 0.0),
        "sam": lambda: SAM(model, rho),
        "imbsam": lambda: ImbSAM(model, data.class_counts, eta=20, rho=rho),
    }[method]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        total = 0.0
        for x, y in data.train_dataloader():
            loss = sam.backward(lambda rows, x=x, y=y: F.cross_entropy(model(x[rows]), y[rows], reduction="none"), y)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss) * len(y)
        schedule.step()
    accuracy = ClassGroupAccuracy(data.class_counts, many=50, few=10)
    images, targets = data.eval_collate(full.__getitems__(unused))
    with torch.no_grad():
        accuracy.update(model.eval()(images), targets)
    return [float(a) for a in accuracy.compute().values()], total / len(used)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10, 15))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()
    print("| method | rho | many | medium | few | all | training loss |\n| :-- | --: | --: | --: | --: | --: | --: |")
    for method, rho in CANDIDATES:
        runs = [train(method, rho, seed, args.width, args.epochs) for seed in args.seeds]
        groups = torch.tensor([groups for groups, _ in runs]).mean(dim=0) * 100
        loss = sum(loss for _, loss in runs) / len(runs)
        print(f"| {method} | {rho} | {' | '.join(f'{g:.1f}' for g in groups.tolist())} | {loss:.4f} |", flush=True)
