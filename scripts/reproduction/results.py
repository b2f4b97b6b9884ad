"""The table of the finished runs, in Markdown."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

from imbsam.group_names import GROUPS
from imbsam.report.runs import Run
from reproduction.runs import SeededRow, best_on_test_set, tested_epochs
from reproduction.tables import Row

ALL_GROUPS = " / ".join(GROUPS)
LAST_MIRRORED = f"mirrored: {ALL_GROUPS}"
CHOSEN = f"chosen on the test set, never for comparing methods: {ALL_GROUPS} (epochs)"
CHOSEN_MIRRORED = f"these epochs, mirrored: {ALL_GROUPS}"
NOTE = (
    "Accuracies are of the last epoch, without the mirrored image, unless the heading says otherwise. Chosen on the "
    "test set: each seed's epoch with the highest accuracy without the mirrored image, as in the ImbSAM authors' code, "
    "to be set beside their numbers."
)


def table(name: str, rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Mean and standard deviation over the finished seeds, and the published numbers if there are any, in Markdown.

    Where a run tested every epoch there are also the last epoch with the mirrored image, and the epoch chosen on the
    test set.
    """
    found = [[run for seed in seeds if (run := SeededRow(row, seed).tested())] for row in rows]
    every_epoch = [[epochs for run in runs if (epochs := tested_epochs(run))] for runs in found]
    further = [LAST_MIRRORED, CHOSEN, CHOSEN_MIRRORED] if any(every_epoch) else []
    published = [f"published: {ALL_GROUPS}"] if any(row.published for row in rows) else []
    heading = [name, "seeds", "epochs", *GROUPS, *further, *published]
    lines = [_line(heading), "| :-- " + "| --: " * (len(heading) - 1) + "|"]
    for row, runs, tested in zip(rows, found, every_epoch, strict=True):
        cells = [_cell([100 * run.final[f"test/{group}"] for run in runs]) for group in GROUPS]
        if further:
            cells += _every_epoch_cells(tested)
        if published:
            cells.append(_published(row))
        lines.append(_line([row.title, str(len(runs)), _epochs(runs), *cells]))
    return "\n".join(lines + (["", NOTE] if further else []))


def _every_epoch_cells(tested: Sequence[list[dict[str, float]]]) -> list[str]:
    """The columns of runs that tested every epoch: means over the seeds."""
    if not tested:
        return ["", "", ""]
    last, best = [epochs[-1] for epochs in tested], [best_on_test_set(epochs) for epochs in tested]
    chosen = ", ".join(f"{epoch['epoch']:.0f}" for epoch in best)
    return [_means(last, "mirrored_"), f"{_means(best, '')} ({chosen})", _means(best, "mirrored_")]


def _means(epochs: Sequence[dict[str, float]], prefix: str) -> str:
    """The groups in one cell."""
    # no number: the group has no class
    known = [[epoch.get(f"{prefix}{group}", math.nan) for epoch in epochs] for group in GROUPS]
    return " / ".join("-" if any(map(math.isnan, values)) else f"{100 * mean(values):.1f}" for values in known)


def _published(row: Row) -> str:
    """The groups in one cell; empty if there are no numbers of this row."""
    known = row.published
    return " / ".join(f"{known[group]:.1f}" if group in known else "" for group in GROUPS) if known else ""


def _epochs(runs: Sequence[Run]) -> str:
    """How long the runs were: a trial of one epoch counts as a run too."""
    return ", ".join(sorted({str(run.settings.get("trainer.max_epochs", "")) for run in runs}))


def _cell(values: Sequence[float]) -> str:
    if not values or not all(map(math.isfinite, values)):  # nan: the group has no class
        return "-" if values else ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
