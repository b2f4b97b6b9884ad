"""Sharpness of many, medium, few and all: measured, printed, plotted."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from imbsam import SettingError
from imbsam.checks import check_whole_numbers
from imbsam.group_names import GROUP_COLOURS
from imbsam.sharpness import MEASURES, Estimate, SharpnessMeasures, loss_slice

Split = Literal["train", "test"]
Found = dict[str, dict[str, Estimate]]
"""Per group, per measure."""

COLUMNS = ("epoch", "split", "group", "measure", "value", "standard_error", "samples", "settings")


class GroupSamples:
    """The samples of each group of classes, without augmentation, and a model's losses on them.

    Args:
        model: a classifier with ``loss`` (logits and targets to per-sample losses) and ``test_accuracy`` (the groups).
        datamodule: with ``train_eval_dataloader`` (for the split "train") and ``class_counts``.
        split: the samples the model was trained on, where its sharpness is defined, or the test set.
        samples: at most this many samples of a group, drawn with ``seed``.
        chunk_size: samples of one backward pass; lower it where memory is short. It does not change the numbers.
        seed: seed of the draw.

    Raises:
        SettingError: a setting is outside its range, or model or data lack what is needed.
    """

    def __init__(self, model: Any, datamodule: Any, split: Split, samples: int, chunk_size: int, seed: int) -> None:
        check_whole_numbers(samples=samples, chunk_size=chunk_size)
        if not hasattr(model, "test_accuracy") or not hasattr(model, "loss"):
            raise SettingError(
                f"model {type(model).__name__} has no loss or no test_accuracy: use a LongTailedClassifier"
            )
        name = "train_eval_dataloader" if split == "train" else "test_dataloader"
        if not hasattr(datamodule, name):
            raise SettingError(
                f"the data ({type(datamodule).__name__}) has no {name}: "
                "use a LongTailedDataModule, or give yours one that neither shuffles nor augments"
            )
        self.model = model
        self.split = split
        kept = _draw(getattr(datamodule, name)(), model.test_accuracy.masks, samples, seed)
        self.sizes = {group: len(targets) for group, (_, targets) in kept.items()}
        self.chunks = {
            group: list(zip(torch.split(inputs, chunk_size), torch.split(targets, chunk_size), strict=True))
            for group, (inputs, targets) in kept.items()
            if len(targets)
        }

    def losses(self, batch: Any) -> Tensor:
        """Per-sample training losses of one chunk, which comes to the model's device for it."""
        inputs, targets = move_data_to_device(batch, self.model.device)
        found: Tensor = self.model.loss(self.model(inputs), targets)
        return found

    def measure(self, measures: SharpnessMeasures, epoch: int, folder: Path, title: str, show_progress: bool) -> Found:
        """All measures of every group that has samples: into `folder`'s ``sharpness.csv``, and as a table."""
        found: Found = {}
        path = folder / "sharpness.csv"
        with _progress(show_progress, len(self.chunks) * len(MEASURES)) as advance:
            for group, chunks in self.chunks.items():
                measured: dict[str, Estimate] = {}
                advance(f"{group}: {MEASURES[0]}", 0)
                for measure, estimate in measures.measure(self.model, self.losses, chunks):
                    measured[measure] = estimate
                    following = MEASURES.index(measure) + 1
                    advance(f"{group}: {MEASURES[following]}" if following < len(MEASURES) else "", 1)
                found[group] = measured
                # group by group: a long measurement that is stopped keeps what it has
                _append(path, epoch, self.split, group, measured, self.sizes[group], measures)
        print_table(found, self.sizes, self.split, measures, title)
        Console().print(f"sharpness: {path}", soft_wrap=True, highlight=False)
        return found

    def slices(self, span: float, points: int, seed: int, show_progress: bool) -> dict[str, np.ndarray]:
        """Loss slices of every group, in the arrays of ``loss_slices.npz``."""
        arrays: dict[str, np.ndarray] = {}
        with _progress(show_progress, 2 * len(self.chunks)) as advance:
            for group, chunks in self.chunks.items():
                for dimensions in (1, 2):
                    advance(f"{group}: {dimensions}-dimensional slice", 0)
                    positions, losses = loss_slice(
                        self.model, self.losses, chunks, dimensions=dimensions, span=span, points=points, seed=seed
                    )
                    arrays |= {"position": positions.numpy(), f"{group}_{dimensions}d": losses.numpy()}
                    advance("", 1)
        return arrays


def print_table(found: Found, sizes: dict[str, int], split: Split, measures: SharpnessMeasures, title: str) -> None:
    """Print one row for each group, and what the columns mean."""
    table = Table(
        title=f"sharpness on the {split} samples\n{title}",
        caption=f"rho {measures.rho:g}, sigma {measures.sigma:g}{', adaptive' if measures.adaptive else ''}, "
        f"seed {measures.seed}; standard errors of the random draws are in sharpness.csv",
    )
    table.add_column("group")
    table.add_column("samples", justify="right")
    for measure in MEASURES:
        table.add_column(measure.replace("_", "\n"), justify="right")
    for group, size in sizes.items():
        cells = [f"{found[group][measure].value:.3g}" if group in found else "–" for measure in MEASURES]
        table.add_row(group, str(size), *cells)
    Console().print(table)


def plot_slices(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Draw the slices of ``loss_slices.npz``: the groups' lines in one plot, and a plane for each.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra `sharpness`, is missing.
    """
    from matplotlib.figure import Figure

    position = arrays["position"]
    groups = [name.removesuffix("_1d") for name in arrays if name.endswith("_1d")]
    figure = Figure(figsize=(3.4 * (1 + len(groups)), 3.4), layout="constrained")
    line, *planes = figure.subplots(1, 1 + len(groups))
    low, high = (
        min(a.min() for n, a in arrays.items() if n != "position"),
        max(a.max() for n, a in arrays.items() if n != "position"),
    )
    levels = np.geomspace(max(low, high * 1e-4), high, 13)
    for group, plane in zip(groups, planes, strict=True):
        line.semilogy(position, arrays[f"{group}_1d"], color=GROUP_COLOURS[group], label=group)
        losses = np.clip(arrays[f"{group}_2d"].T, levels[0], levels[-1])
        shown = plane.contourf(position, position, losses, levels, norm="log", cmap="viridis")
        plane.plot(0, 0, "+", color="white")
        plane.set(title=group, aspect="equal", xlabel="along direction 1")
    planes[0].set_ylabel("along direction 2")
    figure.colorbar(shown, ax=planes, label="loss", format="%.2g")
    line.set(xlabel="along direction 1 (1: each filter's length)", ylabel="loss")
    line.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _append(
    path: Path,
    epoch: int,
    split: Split,
    group: str,
    measured: dict[str, Estimate],
    samples: int,
    measures: SharpnessMeasures,
) -> None:
    """One row for each measure; `epoch` is the number of epochs trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = " ".join(f"{name}={value}" for name, value in asdict(measures).items())
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for measure, (value, error) in measured.items():
            error_text = "" if error is None else f"{error:.6g}"
            writer.writerow([epoch, split, group, measure, f"{value:.6g}", error_text, samples, settings])


def _draw(loader: Any, groups: dict[str, Tensor], samples: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """In one pass, the samples of each group with the smallest random keys: each equally likely, in little memory."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, tuple[Tensor, ...]] = {}
    for inputs, targets in loader:
        keys = torch.rand(len(targets), generator=generator, dtype=torch.float64)
        for group, classes in groups.items():
            rows = classes[targets]
            new = (keys[rows], inputs[rows], targets[rows])
            held = tuple(map(torch.cat, zip(kept[group], new, strict=True))) if group in kept else new
            if len(held[0]) > samples:
                smallest = held[0].topk(samples, largest=False).indices.sort().values
                held = tuple(t[smallest] for t in held)
            kept[group] = held
    return {group: (held[1], held[2]) for group, held in kept.items()}


@contextmanager
def _progress(show: bool, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda description, done: bar.update(task, description=description, advance=done)
