"""Measures over the classes, against scikit-learn and SciPy."""

import numpy as np
import pytest
import torch
from scipy.stats import gmean, hmean
from sklearn.metrics import f1_score, recall_score, top_k_accuracy_score
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassF1Score

from imbsam.class_measures import ClassMeasures, among_top
from imbsam.errors import SettingError
from imbsam.group_names import CLASS_MEASURES

COUNTS = [5, 300, 100, 20, 101, 19, 50, 0]
CLASSES = len(COUNTS)
GROUPS = {"many": [1, 4], "medium": [2, 3, 6], "few": [0, 5, 7], "all": list(range(CLASSES))}


def sample(rows=400, seed=0, classes=range(CLASSES), skill=2.0, ties=False):
    """Scores of which a target's is higher, and targets among `classes`; with `ties` they are 0, 1, 2, 3 or so."""
    rng = np.random.default_rng(seed)
    target = rng.choice(list(classes), rows)
    scores = rng.normal(size=(rows, CLASSES)) + skill * np.eye(CLASSES)[target]
    scores = torch.from_numpy(scores.round() if ties else scores).float()
    return scores, torch.from_numpy(target)


def expected(scores, target):
    """All measures of scikit-learn and SciPy; a class without targets has no recall."""
    preds, present = scores.argmax(dim=1), sorted(set(target.tolist()))
    recalls = recall_score(target, preds, labels=present, average=None)
    means = {"lowest_recall": recalls.min(), "harmonic_mean": hmean(recalls), "geometric_mean": gmean(recalls)}
    means["macro_f1"] = f1_score(target, preds, average="macro")
    # scikit-learn ranks the higher index first among equals
    turned = scores.flip(1).double()
    top5 = {}
    for c in present:
        rows = target == c
        if rows.any():
            labels = range(CLASSES)
            top5[c] = top_k_accuracy_score(CLASSES - 1 - target[rows], turned[rows], k=5, labels=labels)
    for group, members in GROUPS.items():
        seen = [top5[c] for c in members if c in top5]
        means[f"top5_{group}"] = np.mean(seen) if seen else np.nan
    return means


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ties": True},
        {"classes": [0, 1, 2, 3, 5, 6]},  # two classes are absent, and predicted
        {"classes": [1, 4], "ties": True},
        {"classes": [3]},
        {"skill": 0.0},
        {"skill": -9.0},  # every recall is 0
        {"rows": 5, "skill": 1.0},
    ],
    ids=str,
)
def test_measures_are_those_of_scikit_learn(settings):
    scores, target = sample(**settings)
    metric = ClassMeasures(COUNTS)
    for rows in torch.arange(len(target)).split(37):
        metric.update(scores[rows], target[rows])
    found = {name: float(value) for name, value in metric.compute().items()}
    wanted = expected(scores, target)
    assert set(found) == {*GROUPS, *wanted}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6, nan_ok=True)
    macro = MulticlassF1Score(CLASSES, average="macro")(scores, target)
    assert found["macro_f1"] == pytest.approx(float(macro), abs=1e-6)


def test_one_recall_of_zero_makes_both_means_zero():
    target = torch.arange(CLASSES).repeat_interleave(10)
    scores = torch.eye(CLASSES)[target]
    scores[target == 5] = torch.eye(CLASSES)[0]
    found = ClassMeasures(COUNTS)(scores, target)
    assert [float(found[name]) for name in ("lowest_recall", "harmonic_mean", "geometric_mean")] == [0, 0, 0]
    assert float(found["all"]) == pytest.approx(7 / 8)


def test_without_any_target_every_measure_is_nan():
    metric = ClassMeasures(COUNTS)
    metric.update(torch.zeros(0, CLASSES), torch.zeros(0, dtype=torch.int64))
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_up_to_five_classes_have_no_top_5(classes):
    metric = ClassMeasures([10] * classes)
    metric.update(torch.zeros(3, classes), torch.zeros(3, dtype=torch.int64))
    found = metric.compute()
    assert set(found) == {*GROUPS, *CLASS_MEASURES}
    assert {name: float(found[name]) for name in CLASS_MEASURES} == dict.fromkeys(CLASS_MEASURES, 1.0)


def test_top_k_with_k_1_is_the_prediction():
    """Also for equal scores, infinities and nan."""
    scores, target = sample(ties=True)
    scores[:20] = torch.nan
    scores[20:40, 3] = torch.nan
    scores[40:60, 2:5] = torch.inf
    scores[60:80] = -torch.inf
    assert torch.equal(among_top(scores, target, k=1), scores.argmax(dim=1) == target)
    assert among_top(scores, target, k=CLASSES).all()


def test_targets_outside_are_not_counted():
    scores, target = sample()
    metric = ClassMeasures(COUNTS, validate_args=False)
    metric.update(torch.cat([scores, scores[:9]]), torch.cat([target, torch.tensor([-1, 8, 99] * 3)]))
    found, wanted = metric.compute(), ClassMeasures(COUNTS)(scores, target)
    assert {k: float(v) for k, v in found.items()} == {k: float(v) for k, v in wanted.items()}


def test_two_processes_with_uneven_shares_are_one():
    scores, target = sample()
    first, second, whole = (ClassMeasures(COUNTS) for _ in range(3))
    first.update(scores[:333], target[:333])
    second.update(scores[333:], target[333:])
    whole.update(scores, target)
    names = iter(list(first._reductions) * 9)
    first.dist_sync_fn = lambda state, group=None: [state, getattr(second, next(names))]
    first.distributed_available_fn = lambda: True
    wanted = {name: float(value) for name, value in whole.compute().items()}
    assert {name: float(value) for name, value in first.compute().items()} == wanted


class NoSync(TorchDispatchMode):
    """Fail on what waits for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2"), name
        return func(*args, **(kwargs or {}))


def test_an_update_never_waits_for_a_gpu():
    metric = ClassMeasures(COUNTS)
    scores, target = sample()
    with NoSync():
        metric.update(scores, target)


def test_class_indices_are_refused():
    with pytest.raises(SettingError, match="int64: give logits"):
        ClassMeasures(COUNTS).update(torch.tensor([1]), torch.tensor([1]))


def test_groups_may_be_those_of_other_counts():
    scores, target = sample()
    other = [20, 19, 101, 300, 0, 1, 2, 3]
    found = ClassMeasures(COUNTS, group_counts=other)(scores, target)
    recalls = recall_score(target, scores.argmax(dim=1), average=None)
    assert float(found["many"]) == pytest.approx(recalls[[2, 3]].mean())
    assert float(found["few"]) == pytest.approx(recalls[[1, 4, 5, 6, 7]].mean())
    with pytest.raises(SettingError, match="group_counts has 3 counts: give one for each of 8"):
        ClassMeasures(COUNTS, group_counts=[1, 2, 3])
