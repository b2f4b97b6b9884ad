"""The speed of the anomaly data: ``setup`` and a batch of each sampling, one thread, CPU time.

python benchmarks/anomaly_data_speed.py ADBENCH_FOLDER
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from datamodules import AnomalyDataModule
from datamodules.anomaly.batches import Sampling

SAMPLINGS: tuple[Sampling, ...] = ("natural", "balanced", "pairs")


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def main(folder: Path) -> None:
    """Measure every data set and print a Markdown table."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "sampling is natural")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    AnomalyDataModule().setup()  # imports
    times: dict[str, list[float]] = {}
    for path in sorted(folder.rglob("*.npz")):
        data = AnomalyDataModule(path=path, min_rows=1000, max_rows=10000, batches_per_epoch=20)

        def setup(path: Path = path) -> None:
            AnomalyDataModule(path=path, min_rows=1000, max_rows=10000).setup("fit")

        times.setdefault("`setup`, ms", []).append(1e3 * cpu_seconds(setup, 5))
        data.setup("fit")
        for sampling in SAMPLINGS:
            data.sampling = sampling
            loader = data.train_dataloader()
            seconds = cpu_seconds(lambda loader=loader: list(loader), 10)  # type: ignore[misc]
            times.setdefault(f"a batch of 512, `{sampling}`, µs", []).append(1e6 * seconds / len(loader))
    print("| | median set | slowest set |", "| --- | --- | --- |", sep="\n")
    for name, values in times.items():
        print(f"| {name} | {median(values):.0f} | {max(values):.0f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/anomaly_data_speed.py ADBENCH_FOLDER")
    main(Path(sys.argv[1]))
