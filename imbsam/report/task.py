"""The metrics that runs are compared by: group accuracies of classifiers, ranking metrics of anomaly detectors."""

from collections.abc import Mapping
from dataclasses import dataclass

from imbsam.group_names import GROUPS


@dataclass(frozen=True)
class Task:
    """The logged quantities of one kind of model.

    Attributes:
        model: what the model is called, in the plural.
        loss: the epoch's training loss.
        results: logged quantity to its heading, for those in [0, 1] that every test logs; shown in percent.
        optional: the same, for those that only some tests log.
        highlights: the quantities of the page's first sentences, and how the sentence on each begins.
        curves: what is plotted over the epochs beside the losses, in percent.
        title: heading of the results.
    """

    model: str
    loss: str
    results: Mapping[str, str]
    optional: Mapping[str, str]
    highlights: Mapping[str, str]
    curves: Mapping[str, str]
    title: str

    @property
    def columns(self) -> dict[str, str]:
        """The table's columns and their headings."""
        return {**self.results, **self.optional, self.loss: "training loss"}


CLASSIFIER = Task(
    model="classifiers",
    loss="train/loss_epoch",
    results={f"test/{group}": group for group in GROUPS},
    optional={},
    highlights={"test/all": "Over all classes", "test/few": "On the few-shot classes"},
    curves={f"val/{group}": f"validation accuracy in %, {group}" for group in GROUPS},
    title="test accuracy in %",
)

DETECTOR = Task(
    model="anomaly detectors",
    loss="train/loss",
    results={
        "test/average_precision": "average precision",
        "test/auroc": "AUROC",
        "test/budget_precision": "precision of the alarms",
        "test/budget_recall": "recall of the alarms",
    },
    optional={"test/f1": "F1 at the threshold"},
    highlights={"test/average_precision": "By average precision", "test/auroc": "By AUROC"},
    curves={"val/average_precision": "validation average precision in %", "val/auroc": "validation AUROC in %"},
    title="test results in %",
)
