"""The metrics that runs are compared by: accuracies or average precisions by class group, a detector's ranking."""

from collections.abc import Mapping
from dataclasses import dataclass

from imbsam.group_names import CLASS_MEASURES, GROUPS, TEST_DISTRIBUTIONS


@dataclass(frozen=True)
class Task:
    """The logged quantities of one kind of model.

    Attributes:
        model: what the model is called, in the plural.
        loss: the epoch's training loss.
        results: logged quantity to its heading, for those in [0, 1] that every test logs; shown in percent.
        optional: the same, for those that only some tests log.
        measures: the same, for a table of their own.
        details: the same, for the page and the CSV alone: on a terminal they are too many columns.
        distributions: logged quantity to the class distribution of its test set, from the most forward to the most
            backward long tail.
        highlights: the quantities of the page's first sentences, and how the sentence on each begins.
        curves: what is plotted over the epochs beside the losses, in percent.
        title: heading of the results.
    """

    model: str
    loss: str
    results: Mapping[str, str]
    optional: Mapping[str, str]
    measures: Mapping[str, str]
    details: Mapping[str, str]
    distributions: Mapping[str, str]
    highlights: Mapping[str, str]
    curves: Mapping[str, str]
    title: str

    @property
    def columns(self) -> dict[str, str]:
        """The table's columns and their headings."""
        return {**self.results, **self.optional, self.loss: "training loss"}


_SHIFTED = {f"test/{name}": name.replace("_", " ") for name in TEST_DISTRIBUTIONS}

CLASSIFIER = Task(
    model="classifiers",
    loss="train/loss_epoch",
    results={f"test/{group}": group for group in GROUPS},
    optional={"test/plain_few": "few, not averaged", "test/plain_all": "all, not averaged"},
    measures={f"test/{name}": title for name, title in CLASS_MEASURES.items()},
    details={"test/top5_all": "top-5 accuracy", "test/ece_all": "calibration error"},
    distributions={
        **{name: title for name, title in _SHIFTED.items() if "forward" in name},
        "test/all": "balanced",
        **{name: title for name, title in _SHIFTED.items() if "backward" in name},
    },
    highlights={"test/all": "Over all classes", "test/few": "On the few-shot classes"},
    curves={f"val/{group}": f"validation accuracy in %, {group}" for group in GROUPS},
    title="test accuracy in %",
)

MULTI_LABEL = Task(
    model="multi-label classifiers",
    loss="train/loss_epoch",
    results={f"test/map_{group}": f"mAP {group}" for group in GROUPS},
    optional={"test/plain_map_few": "mAP few, not averaged", "test/plain_map_all": "mAP all, not averaged"},
    measures={},
    details={},
    distributions={},
    highlights={"test/map_all": "Over all classes", "test/map_few": "On the few-shot classes"},
    curves={f"val/map_{group}": f"validation mAP in %, {group}" for group in GROUPS},
    title="mean average precision in %",
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
    measures={},
    details={},
    distributions={},
    highlights={"test/average_precision": "By average precision", "test/auroc": "By AUROC"},
    curves={"val/average_precision": "validation average precision in %", "val/auroc": "validation AUROC in %"},
    title="test results in %",
)

TASKS = (CLASSIFIER, MULTI_LABEL, DETECTOR)


def task_of(logged: Mapping[str, float]) -> Task | None:
    """The task of a run by what it logged; None without a training loss. One that was not tested may be of another."""
    trained = [task for task in TASKS if task.loss in logged]
    tested = [task for task in trained if all(name in logged for name in task.results)]
    return next(iter([*tested, *trained]), None)
