"""Measure, print and plot the sharpness of the many, medium, few and all classes."""

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
Results = dict[str, dict[str, Estimate]]
"""By group, by measure."""

COLUMNS = ("epoch", "split", "group", "measure", "value", "standard_error", "samples", "settings")


class GroupSamples:
    """Samples of each group of classes, without augmentation, and the losses of a model on them.

    Args:
        model: a classifier with ``loss`` (logits and targets to per-sample losses) and ``test_accuracy`` (the groups).
        datamodule: with ``train_eval_dataloader`` (for the split "train") and ``class_counts``.
        split: the training samples, for which sharpness is defined, or the test set.
        samples: at most this many samples of a group, drawn with ``seed``.
        chunk_size: samples in one backward pass; lower it to save memory. It does not change the results.
        seed: seed of the draw.

    Raises:
        SettingError: a setting is outside its range, or the model or the data lack an attribute.
    """

    def __init__(self, model: Any, datamodule: Any, split: Split, samples: int, chunk_size: int, seed: int) -> None:
        check_whole_numbers(samples=samples, chunk_size=chunk_size)
        if not hasattr(model, "test_accuracy") or not hasattr(model, "loss"):
            raise SettingError(f"model {type(model).__name__} has no loss or test_accuracy: use a LongTailedClassifier")
        if getattr(model, "multi_label", False):
            raise SettingError(
                f"model is {type(model).__name__}: sharpness is measured by groups of samples, and these have classes "
                "of several groups; use imbsam.sharpness on losses of your own"
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
        """Per-sample training losses of one chunk, which is moved to the model's device."""
        inputs, targets = move_data_to_device(batch, self.model.device)
        losses: Tensor = self.model.loss(self.model(inputs), targets)
        return losses

    def measure(
        self, measures: SharpnessMeasures, epoch: int, folder: Path, title: str, show_progress: bool
    ) -> Results:
        """All measures of every group that has samples, after `epoch` epochs.

        They are appended one by one to ``sharpness.csv`` in `folder`, so that an interrupted measurement keeps its
        results, and printed as a table.
        """
        results: Results = {}
        path, settings = folder / "sharpness.csv", " ".join(f"{k}={v}" for k, v in asdict(measures).items())
        folder.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with (
            path.open("a", newline="", buffering=1) as file,
            _progress(show_progress, len(self.chunks) * len(MEASURES)) as advance,
        ):
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            for group, chunks in self.chunks.items():
                results[group] = {}
                advance(f"{group}: {MEASURES[0]}", 0)
                for following, (measure, estimate) in zip(
                    [*MEASURES[1:], ""], measures.measure(self.model, self.losses, chunks), strict=True
                ):
                    results[group][measure] = estimate
                    numbers = ["" if number is None else f"{number:.6g}" for number in estimate]
                    writer.writerow([epoch, self.split, group, measure, *numbers, self.sizes[group], settings])
                    advance(f"{group}: {following}", 1)
        table = Table(
            title=f"sharpness on the {'training' if self.split == 'train' else 'test'} samples\n{title}",
            caption=f"rho {measures.rho:g}, sigma {measures.sigma:g}{', adaptive' if measures.adaptive else ''}, "
            f"seed {measures.seed}; standard errors of the random draws are in sharpness.csv",
        )
        table.add_column("group")
        for name in ("samples", *MEASURES):
            table.add_column(name.replace("_", "\n"), justify="right")
        for group, size in self.sizes.items():
            cells = [f"{results[group][measure].value:.3g}" if group in results else "–" for measure in MEASURES]
            table.add_row(group, str(size), *cells)
        console = Console()
        console.print(table)
        console.print(f"sharpness: {path}", soft_wrap=True, highlight=False)
        return results

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


def plot_slices(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Plot the slices of ``loss_slices.npz``: the lines of all groups in one plot, and the plane of each group.

    Raises:
        ModuleNotFoundError: matplotlib, of the extra `sharpness`, is missing.
    """
    from matplotlib.figure import Figure

    position = arrays["position"]
    groups = [name.removesuffix("_1d") for name in arrays if name.endswith("_1d")]
    figure = Figure(figsize=(3.4 * (1 + len(groups)), 3.4), layout="constrained")
    line, *planes = figure.subplots(1, 1 + len(groups))
    losses = np.concatenate([array.ravel() for name, array in arrays.items() if name != "position"])
    levels = np.geomspace(max(losses.min(), losses.max() * 1e-4), losses.max(), 13)
    for group, plane in zip(groups, planes, strict=True):
        line.semilogy(position, arrays[f"{group}_1d"], color=GROUP_COLOURS[group], label=group)
        values = np.clip(arrays[f"{group}_2d"].T, levels[0], levels[-1])
        contours = plane.contourf(position, position, values, levels, norm="log", cmap="viridis")
        plane.plot(0, 0, "+", color="white")
        plane.set(title=group, aspect="equal", xlabel="along direction 1")
    planes[0].set_ylabel("along direction 2")
    figure.colorbar(contours, ax=planes, label="loss", format="%.2g")
    line.set(xlabel="along direction 1 (1: each filter's length)", ylabel="loss")
    line.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _draw(loader: Any, groups: dict[str, Tensor], samples: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The samples of each group with the smallest random keys, in one pass: a uniform draw in little memory."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, tuple[Tensor, ...]] = {}
    for inputs, targets in loader:
        keys = torch.rand(len(targets), generator=generator, dtype=torch.float64)
        for group, classes in groups.items():
            members = classes[targets]
            new = (keys[members], inputs[members], targets[members])
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
