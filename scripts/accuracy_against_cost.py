"""Draw the accuracy of digits runs against what a step of them costs: the figure and the table of docs/cost.md.

    python scripts/accuracy_against_cost.py logs/digits_lt --out docs/accuracy_against_cost.png

Reads runs of `imbsam fit --config configs/data/digits_lt.yaml ...`, plain training (configs/method/sgd.yaml) among
them. Those that differ only in the seed are one point: mean ± standard error, and that of the paired difference of
"all" to SGD. The cost is measured here, in CPU time, with the runs' network, batch size and class counts: the methods
take turns on the same batch, and a step's time is divided by plain training's in the same round (median). Under
`RhoSchedule` it is the mean over the steps of the run, perturbed and plain.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules import DigitsLTDataModule
from imbsam import ImbSAM, Plain, sam
from imbsam.report.runs import Run, read_runs
from imbsam.report.style import colour
from lightning_modules.backbones import SmallCNN

mpl.use("agg")
import matplotlib.pyplot as plt

PLAIN = "Plain"
SGD = "SGD"
MARKERS = "osD^vP*X"
SETTINGS = ("rho", "perturb", "first_pass")
"""The settings of a method by which runs differ here."""


def schedule(run: Run) -> dict[str, Any]:
    """The settings of the run's RhoSchedule; empty where it has none."""
    callbacks = run.settings.get("trainer.callbacks") or []
    found = [c["init_args"] for c in callbacks if c["class_path"].endswith("RhoSchedule")]
    return dict(found[0]) if found else {}


def name(run: Run) -> str:
    """What the run is called in the figure."""
    method = run.settings["sam"]
    if method == PLAIN:
        return SGD
    words = [f"{method}, rho {run.settings['sam.rho']:g}"]
    perturb = run.settings.get("sam.perturb", "all")
    if perturb != "all":
        words.append(f"{perturb} alone")
    if run.settings.get("sam.first_pass") == "whole":
        words.append("whole first pass")
    every, start = schedule(run).get("every_n_steps", 1), schedule(run).get("start_epoch", 0)
    if every > 1:
        words.append(f"every {every} steps")
    if start:
        epochs = run.settings["trainer.max_epochs"]
        words.append(f"last {100 * (epochs - start) / epochs:g} % of the epochs")
    return ", ".join(words)


def key_of(run: Run) -> str:
    """What the cost of a perturbed step depends on."""
    settings = run.settings
    if settings["sam"] == PLAIN:
        return PLAIN
    return f"{settings['sam']} {settings.get('sam.perturb', 'all')} {settings.get('sam.first_pass', 'split')}"


def perturbed_share(run: Run) -> float:
    """The share of the run's steps that are perturbed."""
    settings, epochs = schedule(run), run.settings["trainer.max_epochs"]
    return float((1 - settings.get("start_epoch", 0) / epochs) / settings.get("every_n_steps", 1))


def step_costs(
    methods: dict[str, Callable[..., Any]], width: int, batch: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Samples forward in a step, and its median CPU time, over plain training's; the methods take turns."""
    data = DigitsLTDataModule(batch_size=batch)
    data.setup("fit")
    counts = torch.as_tensor(data.class_counts)
    torch.manual_seed(0)
    net = SmallCNN(len(counts), width=width)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    engines = {key: make(net, counts) for key, make in methods.items()}
    for engine in engines.values():
        if getattr(engine, "first_pass", "whole") is None:
            engine.first_pass = "split"  # as in the LightningModules
    seconds: dict[str, list[float]] = {key: [] for key in engines}
    samples = dict.fromkeys(engines, 0)
    for round_ in range(-5, rounds):
        y = torch.multinomial(counts.double(), batch, replacement=True)
        x = torch.rand(batch, 1, 8, 8)
        keys = list(engines)[round_ % len(engines) :] + list(engines)[: round_ % len(engines)]
        for key in keys:
            start = time.process_time()

            def losses(rows: Tensor, x: Tensor = x, y: Tensor = y, key: str = key) -> Tensor:
                samples[key] += len(rows)
                return F.cross_entropy(net(x[rows]), y[rows], reduction="none")

            engines[key].backward(losses, y)
            optimizer.step()
            optimizer.zero_grad()
            if round_ >= 0:  # the first ones warm up
                seconds[key].append(time.process_time() - start)
    plain = seconds[PLAIN]
    times = {key: statistics.median(a / b for a, b in zip(of, plain, strict=True)) for key, of in seconds.items()}
    return {key: (samples[key] / samples[PLAIN], times[key]) for key in engines}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """In %, the mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return 100 * statistics.mean(values), 100 * error


def main() -> None:
    """Read, measure, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("accuracy_against_cost.png"))
    parser.add_argument("--rounds", type=int, default=300, help="of the measurement of a step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs, skipped = read_runs(arguments.folders)
    for folder, reason in skipped.items():
        print(f"{folder} is left out: {reason}")
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[name(run)].append(run)
    methods: dict[str, Callable[..., Any]] = {PLAIN: Plain}
    for group in groups.values():
        settings = group[0].settings
        chosen = {key: settings[f"sam.{key}"] for key in SETTINGS if f"sam.{key}" in settings}
        if settings["sam"] != PLAIN:
            methods[key_of(group[0])] = partial(getattr(sam, settings["sam"], ImbSAM), **chosen)
    first = runs[0].settings
    costs = step_costs(methods, first["backbone.width"], first["batch_size"], arguments.rounds)
    plain = {run.seeds: run.final["test/all"] for run in groups[SGD]}
    points: list[tuple[float, float, str, int, tuple[float, float], tuple[float, float], str]] = []
    for label, group in groups.items():
        samples, cost = (1 + perturbed_share(group[0]) * (of - 1) for of in costs[key_of(group[0])])
        few, all_ = (mean_and_error([run.final[f"test/{part}"] for run in group]) for part in ("few", "all"))
        over = [run.final["test/all"] - plain[run.seeds] for run in group if run.seeds in plain]
        gain = "" if label == SGD or not over else "{:+.1f} ± {:.1f}".format(*mean_and_error(over))
        points.append((cost, samples, label, len(group), few, all_, gain))
    points.sort()
    print("| run | samples / SGD | time / SGD | few | all | over SGD | seeds |\n| :-- |" + " --: |" * 6)
    for cost, samples, label, seeds, few, all_, gain in points:
        scores = f"{few[0]:.1f} ± {few[1]:.1f} | {all_[0]:.1f} ± {all_[1]:.1f} | {gain}"
        print(f"| {label} | {samples:.2f} | {cost:.2f} | {scores} | {seeds} |")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (cost, _, label, _, _, (mean, error), _) in enumerate(points):
        axes.errorbar(
            cost, mean, error, fmt=MARKERS[i % len(MARKERS)], color=colour(i), capsize=2, markersize=6, label=label
        )
    axes.set(xlabel="time of a step / SGD", ylabel="test accuracy, all classes, in %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(arguments.out, dpi=90)


if __name__ == "__main__":
    main()
