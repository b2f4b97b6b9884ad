"""The classes of the training data: training samples, groups, and which are tail classes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imbsam.class_groups import tail_mask

ENDS = 10
"""Classes shown at either end of a long list."""


@dataclass(frozen=True)
class ClassRow:
    """A class of the training data.

    Attributes:
        index: its label.
        name: its name.
        samples: its training samples, after any validation split.
        group: many, medium or few.
        tail: whether it is a tail class.
    """

    index: int
    name: str
    samples: int
    group: str
    tail: bool


def class_rows(model: Any) -> list[ClassRow]:
    """The classes of a :class:`~lightning_modules.LongTailedClassifier` that knows its data, in the labels' order."""
    tail = tail_mask(model.class_counts, *model.tail_settings).tolist()
    counts, groups = model.class_counts.tolist(), model.test_accuracy.group_of_class
    return [ClassRow(c, str(model.class_names[c]), counts[c], groups[c], tail[c]) for c in range(len(counts))]


def print_class_table(model: Any) -> None:
    """Print the classes by training samples, all of them or the first and the last ten, and a summary below."""
    rows = sorted(class_rows(model), key=lambda row: -row.samples)
    samples, tail = sum(row.samples for row in rows), [row for row in rows if row.tail]
    ratio = f", imbalance ratio {rows[0].samples / rows[-1].samples:.4g}" if rows[-1].samples else ""
    table = Table()
    table.add_column("class", overflow="fold")
    table.add_column("training samples", justify="right")
    table.add_column("group")
    table.add_column("tail")
    hidden = rows[ENDS:-ENDS]
    for i, row in enumerate(rows):
        if hidden and i == ENDS:
            between = sum(row.samples for row in hidden)
            table.add_row(f"… {len(hidden):,} classes", f"{between:,}", "", "", style="dim")
        if not hidden or not ENDS <= i < len(rows) - ENDS:
            table.add_row(Text(row.name), f"{row.samples:,}", row.group, "tail" if row.tail else "")
    sizes, share = Counter(row.group for row in rows), 100 * sum(row.samples for row in tail) / max(samples, 1)
    groups = ", ".join(f"{sizes[name]:,} {name} ({limit})" for name, limit in model.test_accuracy.limits.items())
    console = Console()
    counted = "training labels" if getattr(model, "multi_label", False) else "training samples"
    line = f"{samples:,} {counted} of {len(rows):,} classes{ratio}"
    console.print(line, soft_wrap=True, highlight=False)
    console.print(table)
    of_ratio = getattr(model.data, "groups_of_ratio", None)
    by = "training samples" + ("" if of_ratio is None else f" at ratio {of_ratio:g}")
    console.print(f"classes by {by}: {groups}", soft_wrap=True, highlight=False)
    line = f"tail: {len(tail):,} classes with {share:.1f} % of the {counted}"
    console.print(line, soft_wrap=True, highlight=False)


class ClassTable(Callback):
    """Print the classes before the first epoch, on rank zero, where the model is a LongTailedClassifier."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of a new run; a resumed one has printed it."""
        known = getattr(pl_module, "class_counts", None) is not None and hasattr(pl_module, "test_accuracy")
        if trainer.is_global_zero and known and trainer.ckpt_path is None:
            print_class_table(pl_module)
