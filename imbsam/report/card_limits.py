"""The known limits of a model, as far as the files of its runs show them: a sentence each, with the numbers."""

from collections.abc import Iterable

from imbsam.messages import first_few
from imbsam.report.card_measures import percent, percents, recall_interval, samples_tested
from imbsam.report.comparison import Group
from imbsam.report.runs import Run
from imbsam.report.task import CLASSIFIER

FEW_SAMPLES = 30
"""Below this many samples the interval of a share of a half is wider than 36 points."""


def limits(group: Group) -> list[str]:
    """The sentences, the most specific first; Markdown."""
    run = group.runs[0]
    own = _of_classes(run) if group.task is CLASSIFIER else _of_detector(run)
    return [*own, *_of_decisions(run), *_of_probabilities(run), *_of_the_validation_part(run), *_of_seeds(group)]


def _of_classes(run: Run) -> Iterable[str]:
    rows = run.classes
    if not rows:
        yield "The run has no per_class.csv, so that nothing is known of its single classes."
        return
    untrained, untested = (
        [row["class_name"] for row in rows if not row[part]] for part in ("training_samples", "test_samples")
    )
    if untrained:
        yield f"No training sample: {_names(untrained)}. The model cannot know them."
    if untested:
        yield f"No test sample: {_names(untested)}. Nothing here says how well they are recognised."
    if empty := [name for name in ("many", "medium", "few") if name not in {row["group"] for row in rows}]:
        yield f"No class is in the {' and '.join(empty)}-shot group, which has no accuracy."
    few = [row for row in rows if row["group"] == "few" and 0 < row["test_samples"] < FEW_SAMPLES]
    if few:
        fewest = min(few, key=lambda row: row["test_samples"])
        name, known = _names([fewest["class_name"]]), percents(recall_interval(fewest))
        yield (
            f"Of {len(few)} few-shot {_plural(len(few), 'class', 'classes')} there are fewer than {FEW_SAMPLES} test "
            f"samples ({_names(row['class_name'] for row in few)}): their recalls are hardly known. That of "
            f"{name}, with {fewest['test_samples']}, may be {known}."
        )
    never = [row["class_name"] for row in rows if row["test_samples"] and not row["accuracy"]]
    if never:
        yield f"Never recognised in the test: {_names(never)}."
    trained, tested = ([row[part] for row in rows if row[part]] for part in ("training_samples", "test_samples"))
    if trained and tested:
        ratio, test_ratio = max(trained) / min(trained), max(tested) / min(tested)
        if test_ratio < 2 <= ratio / test_ratio:
            forward = run.final.get("test/forward_50")
            there = "" if forward is None else f" (with a test part of imbalance ratio 50: {percent(forward)})"
            yield (
                f"The test part is balanced (ratio {test_ratio:.3g}) and the training part is not (ratio {ratio:.3g}): "
                "accuracy and precision are for classes that are equally frequent. Where they are as frequent as in "
                f"training, the accuracy is that of the frequent ones{there}, and a prediction of a rare class is "
                "wrong more often than the precision in the table."
            )


def _of_detector(run: Run) -> Iterable[str]:
    training, test = run.facts.get("samples", {}).get("training", {}), samples_tested(run)
    labelled = training.get("labelled anomaly")
    if labelled is not None:
        anomalies_of = _plural(labelled, "anomaly", "anomalies")
        yield (
            f"Trained with {labelled:,} labelled {anomalies_of}. Kinds of anomalies that are not among them may not be "
            f"found; the {training['unlabelled']:,} unlabelled rows may hold more, which training took for normal."
        )
    if (anomalies := test.get("anomaly")) is not None and anomalies < FEW_SAMPLES:
        yield f"The test part has {anomalies} anomalies: its measures are hardly known, see their intervals."
    if test:
        rows = sum(test.values())
        share = percent(test["anomaly"] / rows, 2)
        yield (
            f"Precision and average precision are for rows of which {share} are anomalies; "
            "where they are rarer, more of the alarms are false."
        )


def _of_decisions(run: Run) -> Iterable[str]:
    decisions = run.facts.get("decisions")
    if not run.facts:
        return
    if decisions is None:
        by = (
            "the most probable class wins, whatever a mistake costs"
            if run.task is CLASSIFIER
            else "alarms are by the threshold of the best F1 on the validation part, whatever a mistake costs"
        )
        yield f"No decision was fitted: {by}."
        return
    for threshold in decisions["thresholds"]:
        promised = {row["what"]: row["promised"] for row in decisions["results"]}
        name, wanted, positives = threshold["class"], threshold["wanted"], threshold["positives"]
        interval = promised.get(f"{wanted} {name}") or promised.get(f"{wanted.replace('_', ' ')} per thousand {name}")
        few = " Fewer than 30 positives are too few to choose by." if positives < FEW_SAMPLES else ""
        said = (
            f"; what it promises, with its {100 * decisions['confidence']:g} % interval: {interval}" if interval else ""
        )
        yield (
            f"The threshold of {_names([name])} ({wanted.replace('_', ' ')} {threshold['goal']:g}) was chosen on "
            f"{positives:,} {_plural(positives, 'positive', 'positives')} and {threshold['negatives']:,} negatives of "
            f"the validation part{said}.{few}"
        )


def _of_probabilities(run: Run) -> Iterable[str]:
    if run.facts and run.facts.get("calibration") is None:
        if run.task is CLASSIFIER:
            error = run.final.get("test/ece_few")
            there = "" if error is None else f" (on the few-shot classes by {percent(error)} on average)"
            yield f"The probabilities are not calibrated{there}: do not read them as chances."
        else:
            yield "The scores are not calibrated: they rank, and are no probabilities."


def _of_the_validation_part(run: Run) -> Iterable[str]:
    if not run.data.get("val_share") and not run.facts.get("samples", {}).get("validation"):
        yield "There was no validation part that the files tell of: nothing was chosen on it."
        return
    counts = run.facts.get("samples", {}).get("validation", {})
    if "RestoringEarlyStopping" in str(run.settings.get("trainer.callbacks")):
        yield "The epoch was chosen on the validation part too: what was fitted on it promises a little too much."
    if few := [name for name, n in counts.items() if n < FEW_SAMPLES]:
        which = "every class" if len(few) == len(counts) > 2 else _names(f"{name} ({counts[name]})" for name in few)
        yield f"The validation part, on which is chosen and fitted, has fewer than {FEW_SAMPLES} samples of: {which}."


def _of_seeds(group: Group) -> Iterable[str]:
    if len(group.runs) == 1:
        yield "One run: how much another seed would change is not known."
    if group.runs[0].facts and group.runs[0].facts.get("drift") is None:
        yield (
            "Drift is not watched: `imbsam decide --ckpt_path last.ckpt --drift.alpha 0.01` adds the comparison of new "
            "rows with the validation part to a finished run."
        )
    yield (
        "The intervals over test samples are for samples drawn as these were. They know nothing of wrong labels, of "
        "rows that belong together (a patient, a customer, a camera), or of a world that has changed since."
    )


def escaped(text: str) -> str:
    """A name as Markdown shows it: nothing of it becomes HTML, a link or a cell's end."""
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), *((c, f"\\{c}") for c in "|[]*`")):
        text = text.replace(old, new)
    return " ".join(text.split())


def _names(names: Iterable[str]) -> str:
    return first_few([escaped(str(name)) for name in names], 10)


def _plural(number: int, one: str, more: str) -> str:
    return one if number == 1 else more
