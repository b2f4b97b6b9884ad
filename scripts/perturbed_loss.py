"""How high the loss stands at w + e, by rho: is rho too large for a trained network?

    python scripts/perturbed_loss.py logs/cifar100_lt/sgd/version_0/checkpoints/last.ckpt --rho 0.005 0.02 0.05

Mean over training batches in which some samples, but not most, are of tail classes: the loss of all samples and of the
tail samples at w, at SAM's w + e, and at ImbSAM's. Nothing is trained; BatchNorm and dropout are as in training.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

import datamodules  # noqa: F401  a checkpoint's DataModule is found among the classes that are loaded
from imbsam import SAM, ClassAwareSAM, ImbSAM
from lightning_modules import LongTailedClassifier


def loss_after_ascent(module: LongTailedClassifier, sam: ClassAwareSAM, x: Tensor, y: Tensor, tail: Tensor) -> Tensor:
    """The mean loss at w + e of all samples of the last pass, and of its tail samples."""
    passes: list[tuple[Tensor, Tensor]] = []

    def losses(rows: Tensor) -> Tensor:
        found: Tensor = module.loss(module(x[rows]), y[rows])
        passes.append((rows, found.detach()))
        return found

    sam.backward(losses, y)
    module.zero_grad()
    rows, found = passes[-1]  # the passes at w come before the one at w + e
    return torch.stack([found.mean(), found[tail[y[rows]]].mean()])


def table(checkpoint: Path, rhos: Sequence[float], batches: int, eta: float) -> str:
    """The table, in Markdown; a rho near 0 gives the losses at w."""
    torch.manual_seed(0)
    module = LongTailedClassifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    data = LightningDataModule.load_from_checkpoint(checkpoint, weights_only=True)
    data.prepare_data()
    data.setup("fit")
    module.train()
    assert module.class_counts is not None
    tail = module.class_counts < eta
    found = (batch for batch in data.train_dataloader() if 0 < tail[batch[1]].sum() <= len(batch[1]) // 2)
    taken = [(batch[0], batch[1]) for batch in itertools.islice(found, batches)]
    lines = ["| rho | all, SAM | tail, SAM | tail, ImbSAM |", "| --: | --: | --: | --: |"]
    sam, imbsam = SAM(module.backbone), ImbSAM(module.backbone, module.class_counts, eta=eta)
    for rho in rhos:
        sam.rho = imbsam.rho = rho
        of_sam = torch.stack([loss_after_ascent(module, sam, x, y, tail) for x, y in taken]).mean(dim=0)
        of_imbsam = torch.stack([loss_after_ascent(module, imbsam, x, y, tail) for x, y in taken]).mean(dim=0)
        lines.append(f"| {rho:g} | {of_sam[0]:.2f} | {of_sam[1]:.2f} | {of_imbsam[1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rho", type=float, nargs="+", default=[1e-6, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--eta", type=float, default=20)
    arguments = parser.parse_args()
    print(table(arguments.checkpoint, arguments.rho, arguments.batches, arguments.eta))
