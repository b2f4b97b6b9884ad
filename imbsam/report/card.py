"""A model card (Mitchell et al., FAT* 2019) in Markdown: what a reviewer of a deployment asks, from a run's files."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from imbsam.group_names import GROUPS
from imbsam.report.card_limits import escaped, limits
from imbsam.report.card_measures import (
    classes_with_tests,
    counted,
    measures,
    percent,
    percents,
    recall_interval,
    samples_tested,
)
from imbsam.report.comparison import Group
from imbsam.report.method import PLAIN
from imbsam.report.runs import Run
from imbsam.report.task import CLASSIFIER, DETECTOR

MOST = 50
"""Classes in the table; of more those with the lowest recalls."""
SHOWN = (
    "backbone",
    "head",
    "detector",
    "loss",
    "optimizer",
    "lr_scheduler",
    "gradient_clip_val",
    "batch_size",
    "sampling",
)
"""Settings in the table of the training, besides the method's own."""
UNSAID = ("dampening", "maximize", "differentiable", "foreach", "capturable", "fused", "last_epoch")
"""Arguments of torch's optimizers and schedulers that say nothing of the model."""


def card(group: Group) -> str:
    """The card of one model: runs that differ only in their seeds."""
    run, only = group.runs[0], _only(group)
    sections = {
        "": _opening(group),
        "Measures": _measures(group),
        "Data": _data(run),
        "Training": _training(group),
        "Classes": _classes(group),
        "Calibration": _calibration(run, only),
        "Decisions": _decisions(run, only),
        "Drift": _drift(run),
        "Known limits": "\n".join(f"* {limit}" for limit in limits(group)),
        "To be added by hand": (
            "What the model is for and what not; who answers for it; how the data were collected and labelled, and "
            "whether they may be used so; groups of people whom its mistakes hit unequally; what happens after a wrong "
            "decision."
        ),
        "Files": _files(group),
    }
    body = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return (
        f"---\n{yaml.safe_dump(front_matter(group), sort_keys=False, allow_unicode=True)}---\n\n"
        + "\n\n".join(body)
        + "\n"
    )


def _only(group: Group) -> str:
    """Where several runs cannot be shown as one."""
    run = group.runs[0]
    return "" if len(group.runs) == 1 else f" Of the first run (seed {run.seeds[0] if run.seeds else 'unknown'}) alone."


def front_matter(group: Group) -> dict[str, Any]:
    """What Hugging Face's model cards have at their head: library, tags, and the results as a model-index."""
    run = group.runs[0]
    kind = {"LongTailedClassifier": "classification"}.get(run.settings.get("model", ""), run.task.model.rstrip("s"))
    data = str(run.data.get("path") or run.data.get("data set", "unknown"))
    results = [
        {"type": _metric_type(found.key), "name": found.name, "value": round(found.value, 4)}
        for found in measures(group)
    ]
    task = "image-classification" if run.task is CLASSIFIER else "tabular-classification"
    dataset = {"type": data, "name": data}
    result = {"task": {"type": task, "name": kind}, "dataset": dataset, "metrics": results}
    return {
        "library_name": "imbsam",
        "tags": ["imbalanced-data", "sharpness-aware-minimization", run.method.name.lower().replace(" ", "-")],
        "model-index": [{"name": group.name, "results": [result]}],
    }


def _metric_type(key: str) -> str:
    """The name of the hub's metric where it has one."""
    name = key.removeprefix("test/")
    if name in GROUPS or name.startswith(("plain_", "top5_")):
        return "accuracy"
    known = {"macro_f1": "f1", "auroc": "roc_auc", "budget_precision": "precision", "budget_recall": "recall"}
    return known.get(name, name)


def _opening(group: Group) -> str:
    run, runs = group.runs[0], len(group.runs)
    trained = run.training_samples or sum(run.facts.get("samples", {}).get("training", {}).values())
    tested = sum(samples_tested(run).values())
    what = (
        "anomaly detector"
        if run.task is DETECTOR
        else f"classifier of {len(run.classes)} classes"
        if run.classes
        else "classifier"
    )
    by = "plain training" if run.method.name == PLAIN else run.method.name
    sizes = [f"trained on {trained:,} samples by {by}" if trained else f"trained by {by}"]
    sizes += [f"tested on {tested:,}"] if tested else []
    date = " to ".join(sorted({min(r.date for r in group.runs), max(r.date for r in group.runs)}))
    files = "the files of one run" if runs == 1 else f"the files of {runs} runs, which differ in their seeds"
    return (
        f"# Model card: {escaped(group.name)}\n\n"
        f"{'An' if what[0] in 'aeiou' else 'A'} {what}, {' and '.join(sizes)}. `imbsam report --format card` wrote "
        f"this page from {files} ({date}); what they do not say is missing."
    )


def _measures(group: Group) -> str:
    several = len(group.runs) > 1
    head = ["", "mean over the seeds" if several else "test samples", "95 %, over test samples"]
    head += ["95 %, over the seeds"] if several else []
    rows = [
        [found.name, percent(found.value), percents(found.samples), *([percents(found.seeds)] if several else [])]
        for found in measures(group)
    ]
    note = (
        "A group's accuracy is the mean over its classes. Over test samples: Wilson's interval, conservative for a "
        "mean over classes"
        if group.task is CLASSIFIER
        else "Over test samples: Wilson's interval with the number of anomalies for average precision, Newcombe's for "
        "AUROC, Clopper-Pearson's for precision and recall"
    )
    return f"{_table(head, rows)}\n\n{note}{'. Over the seeds: Student’s.' if several else '.'}"


def _data(run: Run) -> str:
    names = {
        "data set": "data",
        "val_share": "validation share",
        "test_share": "test share",
        "ratio": "imbalance ratio",
    }
    known = {k: v for k, v in run.data.items() if v not in ([], None)}
    parts = [f"{names.get(key, key.replace('_', ' '))} `{_plain(value)}`" for key, value in known.items()]
    if run.seeds:
        parts.append(f"seed of the split `{run.settings.get('data.seed', run.seeds[-1])}`")
    samples = run.facts.get("samples", {})
    rows = []
    if run.classes:
        validation = samples.get("validation", {})
        for name in GROUPS:
            own = [row for row in run.classes if name in ("all", row["group"])]
            cells = [
                counted(row["training_samples"] for row in own),
                f"{sum(row['training_samples'] for row in own):,}",
            ]
            held = f"{sum(validation.get(row['class_name'], 0) for row in own):,}" if validation else "–"
            rows.append([name, f"{len(own):,}", *cells, held, f"{sum(row['test_samples'] for row in own):,}"])
        head = ["classes", "number", "training samples of each", "of all", "validation samples", "test samples"]
        many, few = run.settings.get("many"), run.settings.get("few")
        limits_of = (
            f"\n\nMany-shot: more than {many} training samples; few-shot: fewer than {few}." if many is not None else ""
        )
    else:
        for part in ("training", "validation", "test"):
            rows += [[part, name, f"{number:,}"] for name, number in samples.get(part, {}).items()]
        head, limits_of = ["part", "rows", "number"], ""
    return f"{'; '.join(parts)}.\n\n" + (
        _table(head, rows) + limits_of if rows else "The run did not record its samples."
    )


def _training(group: Group) -> str:
    run = group.runs[0]
    method = [
        f"{name} {_plain(value)}"
        for name, value in (("rho", run.method.rho), ("eta", run.method.eta))
        if value is not None
    ]
    rows = [["method", ", ".join([run.method.name, *method])]]
    if group.task is CLASSIFIER and "loss" not in run.settings:
        rows.append(["loss", "cross-entropy"])
    for name in SHOWN:
        if name in run.settings:
            arguments = {
                key.removeprefix(f"{name}."): value
                for key, value in run.settings.items()
                if key.startswith(f"{name}.") and value is not False and key.rpartition(".")[2] not in UNSAID
            }
            said = ", ".join(f"{key} {_plain(value)}" for key, value in arguments.items())
            rows.append([name.replace("_", " "), f"{_plain(run.settings[name])}{f' ({said})' if said else ''}"])
    epochs = _distinct(
        max(epoch for epoch, _ in r.curves[group.task.loss]) for r in group.runs if r.curves.get(group.task.loss)
    )
    rows.append(["epochs", epochs])
    rows.append(["seeds", _distinct(r.seeds[0] for r in group.runs if r.seeds)])
    rows.append(["date", _distinct(r.date for r in group.runs)])
    rows.append(["device", _distinct(r.hardware.get("device", "–") for r in group.runs)])
    versions = run.facts.get("versions")
    rows.append(["versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if versions else "not recorded"])
    return _table(["", ""], [[name, escaped(text)] for name, text in rows if text], words=True)


def _classes(group: Group) -> str:
    run = group.runs[0]
    if not run.classes:
        return ""
    shown = sorted(run.classes, key=lambda row: -row["training_samples"])
    note = "Recall with Clopper-Pearson's interval of 95 %."
    if len(shown) > MOST:
        shown = sorted(classes_with_tests(run, "all"), key=lambda row: (row["accuracy"], -row["test_samples"]))[:MOST]
        note += f" The {MOST} classes with the lowest recalls of {len(run.classes):,}; `per_class.csv` has all."
    if len(group.runs) > 1:
        note += _only(group)
    rows = [
        [
            escaped(row["class_name"]),
            row["group"],
            f"{row['training_samples']:,}",
            f"{row['test_samples']:,}",
            percent(row["accuracy"]),
            percents(recall_interval(row)) if row["test_samples"] else "–",
            percent(row.get("precision")),
        ]
        for row in shown
    ]
    head = ["class", "group", "training samples", "test samples", "recall", "95 %", "precision"]
    return f"{note}\n\n{_table(head, rows)}"


def _calibration(run: Run, only: str) -> str:
    def logged(measure: str, name: str, digits: int) -> str:
        value = run.final.get(f"test/{measure}_{name}", math.nan)
        return percent(value) if digits == 1 else f"{value:.{digits}f}" if math.isfinite(value) else "–"

    groups = GROUPS if run.task is CLASSIFIER else ("normal", "anomaly", "all")
    columns = {"calibration error": ("ece", 1), "log-loss": ("log_loss", 3)}
    settings = run.facts.get("calibration")
    head, before = ["classes"], run.task is CLASSIFIER
    for title in columns:
        head += [title, f"{title}, calibrated"] if before and settings else [title]
    rows = []
    for name in groups:
        cells = []
        for measure, digits in columns.values():
            cells += [logged(measure, name, digits)] if before else []
            cells += [logged(f"calibrated_{measure}", name, digits)] if settings or not before else []
        rows.append([name, *cells])
    if all(set(row[1:]) <= {"–"} for row in rows):
        return ""
    how = "Nothing was calibrated."
    if settings:
        how = (
            f"Calibrated by `{settings['method']}` on the validation part, for the prior `{_plain(settings['prior'])}`."
        )
    return f"{how}{only} On the test samples:\n\n{_table(head, rows)}"


def _decisions(run: Run, only: str) -> str:
    decisions = run.facts.get("decisions")
    if not decisions:
        return ""
    confidence = f"{100 * decisions['confidence']:g} %"
    text = f"By {decisions['kind']}, fitted on the validation part; in brackets intervals of {confidence}.{only}\n\n"
    if decisions["thresholds"]:
        head = ["class", "wanted", "alarm from", "positives", "negatives"]
        rows = [
            [
                escaped(t["class"]),
                f"{t['wanted'].replace('_', ' ')} {t['goal']:g}",
                f"{t['alarm_from']:.4g}",
                f"{t['positives']:,}",
                f"{t['negatives']:,}",
            ]
            for t in decisions["thresholds"]
        ]
        text += _table(head, rows) + "\n\nWhat they promise, and what came of it:\n\n"
    rows = [[escaped(row["what"]), row["promised"], row["test"]] for row in decisions["results"]]
    return text + _table(["", "promised by the validation part", "on the test samples"], rows)


def _drift(run: Run) -> str:
    settings, held = run.facts.get("drift"), run.facts.get("samples", {}).get("validation", {})
    if not settings:
        return ""
    return (
        f"`imbsam predict` compares new rows with the {sum(held.values()):,} validation samples, and reports what is "
        f"significant at {settings['alpha']:g} and moves at least {percent(settings['material'], 0)} of the rows."
    )


def _files(group: Group) -> str:
    lines = [f"`{run.folder}`: `config.yaml`, `metrics.csv`, `checkpoints/`" for run in group.runs]
    return "\n".join(f"* {line}" for line in lines) + "\n\n`imbsam fit --config config.yaml` repeats a run."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """Of numbers, to the right, or of words."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"| :-- |{(' :-- |' if words else ' --: |') * (len(head) - 1)}", *lines[1:]])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))
