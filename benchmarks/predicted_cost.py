"""Predict the cost of a step on large data sets and several GPUs, before renting any.

    python benchmarks/predicted_cost.py --ranks 8 --batches 64 128 256

The class counts of ImageNet-LT and iNaturalist 2018 are not in this repository, so they are estimated: the quantiles of
a Pareto distribution that starts at 0 (a Lomax distribution), rounded, clipped to the known sizes of the smallest and
largest class, and scaled to the number of images. ImageNet-LT was drawn from a Pareto with alpha 6; for iNaturalist no
alpha is published, so two are shown. For your own data set, `class_counts` of its DataModule gives the share of tail
samples t exactly: `n[n < eta].sum() / n.sum()`.

A step waits for the rank with the most tail samples, so the prediction is 1 + 2 E[samples in the longest extra pass] /
batch, from simulated batches of the ranks.
"""

import argparse

import torch
from torch import Tensor

from imbsam.extra_passes import AUTO_CONTEXT_ROWS, pass_size

DATA_SETS = (  # name, classes, alpha, largest class, smallest class, images
    ("ImageNet-LT", 1000, 6.0, 1280, 5, 115_846),
    ("iNaturalist 2018, alpha 2", 8142, 2.0, 1000, 2, 437_513),
    ("iNaturalist 2018, alpha 6", 8142, 6.0, 1000, 2, 437_513),
)


def pareto_counts(classes: int, alpha: float, largest: int, smallest: int, images: int) -> Tensor:
    """Class counts, float64 (classes,), which sum to `images` up to rounding."""
    quantiles = (torch.arange(classes, dtype=torch.float64) + 0.5) / classes
    shape: Tensor = (1 - quantiles) ** (-1 / alpha) - 1
    low, high = 1e-3, 1e7
    for _ in range(100):  # bisection for the scale, in the logarithm
        scale = (low * high) ** 0.5
        fewer = (shape * scale).round().clamp(smallest, largest).sum() < images
        low, high = (scale, high) if fewer else (low, scale)
    return (shape * low).round().clamp(smallest, largest)


def predicted_time(tail_share: float, batch: int, context_rows: int, ranks: int, steps: int = 10_000) -> float:
    """Time / SGD of a step in which every rank has `batch` rows."""
    trials = torch.full((steps, ranks), float(batch))
    most = torch.binomial(trials, torch.full_like(trials, tail_share)).max(dim=1).values.int().tolist()
    rows = [min(batch, pass_size(r + context_rows)) if r > 0 else 0 for r in most]
    return 1 + 2 * sum(rows) / steps / batch


def main() -> None:
    """Print one row for each data set and eta."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256], help="samples on each rank")
    parser.add_argument("--etas", nargs="+", type=int, default=[20, 100])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    settings = [(b, k) for k in (0, AUTO_CONTEXT_ROWS) for b in arguments.batches]
    names = [f"{b} rows, {'BatchNorm' if k else 'no BatchNorm'}" for b, k in settings]
    print("| data set | eta | tail share t | " + " | ".join(names) + " |")
    print("| --- | --- | --- |" + " --- |" * len(names))
    for name, classes, alpha, largest, smallest, images in DATA_SETS:
        counts = pareto_counts(classes, alpha, largest, smallest, images)
        for eta in arguments.etas:
            t = float(counts[counts < eta].sum() / counts.sum())
            times = [f"{predicted_time(t, b, k, arguments.ranks):.2f}" for b, k in settings]
            print(f"| {name} | {eta} | {100 * t:.1f} % | " + " | ".join(times) + " |")


if __name__ == "__main__":
    main()
