"""What the training data hold: classes, training samples, groups, and which classes are the tail."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from imbsam.class_groups import tail_mask

ENDS = 10
"""Classes shown at either end of a long list."""


@dataclass(frozen=True)
class ClassRow:
    """A class of the training data.

    Attributes:
        name: its name.
        samples: its training samples, after any validation split.
        group: many, medium or few.
        tail: whether it is a tail class.
    """

    name: str
    samples: int
    group: str
    tail: bool


def tail_classes(model: Any) -> Tensor:
    """The tail classes of a :class:`~lightning_modules.LongTailedClassifier` that knows its data, bool (C,)."""
    return tail_mask(model.class_counts, *model.tail_settings)


def class_rows(model: Any) -> list[ClassRow]:
    """The classes of a LongTailedClassifier that knows its data, from the most to the fewest training samples."""
    accuracy = model.test_accuracy
    masks = dict(zip(accuracy.group_names, accuracy.groups.cpu(), strict=True))
    groups = {int(c): name for name, mask in masks.items() if name != "all" for c in mask.nonzero()}
    counts, tail = model.class_counts.tolist(), tail_classes(model).tolist()
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    return [ClassRow(str(model.class_names[c]), counts[c], groups[c], tail[c]) for c in order]


def print_class_table(model: Any) -> None:
    """Print the classes, all of them or the first and the last ten, and below them the groups and the tail."""
    rows = class_rows(model)
    samples, tail = sum(row.samples for row in rows), [row for row in rows if row.tail]
    ratio = f", imbalance ratio {rows[0].samples / rows[-1].samples:.4g}" if rows[-1].samples else ""
    table = Table()
    table.add_column("class", overflow="fold")
    table.add_column("training samples", justify="right")
    table.add_column("group")
    table.add_column("tail")
    hidden = len(rows) - 2 * ENDS
    for i, row in enumerate(rows):
        if hidden > 0 and i == ENDS:
            between = sum(r.samples for r in rows[ENDS:-ENDS])
            table.add_row(f"… {hidden:,} classes", f"{between:,}", "", "", style="dim")
        if hidden <= 0 or not ENDS <= i < len(rows) - ENDS:
            table.add_row(Text(row.name), f"{row.samples:,}", row.group, "tail" if row.tail else "")
    sizes, accuracy = Counter(row.group for row in rows), model.test_accuracy
    limits = {"many": f"> {accuracy.many}", "medium": f"{accuracy.few} to {accuracy.many}", "few": f"< {accuracy.few}"}
    share = 100 * sum(row.samples for row in tail) / max(samples, 1)
    console = Console()
    for line in (
        f"{samples:,} training samples of {len(rows):,} classes{ratio}",
        table,
        "classes by their training samples: "
        + ", ".join(f"{sizes[name]:,} {name} ({limit})" for name, limit in limits.items()),
        f"tail: {len(tail):,} classes with {share:.1f} % of the training samples",
    ):
        console.print(line, soft_wrap=not isinstance(line, Table), highlight=False, markup=False)


class ClassTable(Callback):
    """Print the classes before the first epoch, on rank zero, where the model is a LongTailedClassifier."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of a run that begins; a resumed one has printed it."""
        known = getattr(pl_module, "class_counts", None) is not None and hasattr(pl_module, "test_accuracy")
        if trainer.is_global_zero and known and trainer.ckpt_path is None:
            print_class_table(pl_module)
