import pickle
import sys
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score
from torch.testing import assert_close
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from imbsam.errors import SettingError
from imbsam.metrics import ClassGroupAccuracy
from tests.no_synchronisation import NoSynchronisation

mpl.use("agg")

COUNTS = [5, 300, 100, 20, 101, 19, 50, 0]
CLASSES = len(COUNTS)
GROUPS = {"many": [1, 4], "medium": [2, 3, 6], "few": [0, 5, 7], "all": list(range(CLASSES))}


def sample(rows=400, seed=0, classes=range(CLASSES)):
    """Targets among `classes`, and predictions among all, right about half of the time."""
    rng = np.random.default_rng(seed)
    target = rng.choice(list(classes), rows)
    preds = np.where(rng.random(rows) < 0.5, target, rng.integers(0, CLASSES, rows))
    return torch.from_numpy(preds), torch.from_numpy(target)


def expected_groups(preds, target):
    """Mean of scikit-learn's recalls over the classes of a group that occur in the targets."""
    present = set(target.tolist())
    recalls = recall_score(target, preds, labels=range(CLASSES), average=None, zero_division=0)
    means = {}
    for name, members in GROUPS.items():
        seen = [recalls[c] for c in members if c in present]
        means[name] = torch.tensor(np.mean(seen) if seen else np.nan, dtype=torch.float32)
    return means


def assert_same(result, expected):
    assert list(result) == list(expected)
    assert_close(result, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("absent", [[], [4], [0, 5, 7], [1, 4], [2, 3, 6, 7]])
def test_groups_are_means_of_sklearn_recalls(absent):
    preds, target = sample(classes=[c for c in range(CLASSES) if c not in absent])
    metric = ClassGroupAccuracy(COUNTS)
    for rows in torch.arange(len(target)).split(37):
        metric.update(preds[rows], target[rows])
    assert_same(metric.compute(), expected_groups(preds, target))


@pytest.mark.parametrize("absent", [[], [4], [0, 5, 7]])
def test_all_is_sklearns_balanced_accuracy_and_macro_accuracy_is_not(absent):
    preds, target = sample(classes=[c for c in range(CLASSES) if c not in absent])
    metric = ClassGroupAccuracy(COUNTS)
    metric.update(preds, target)
    macro = MulticlassAccuracy(CLASSES, average="macro")(preds, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes that have no target
        reference = torch.tensor(balanced_accuracy_score(target, preds), dtype=torch.float32)
    assert_close(metric.compute()["all"], reference)
    # Why there is a metric of our own: a class that is predicted but absent counts as a recall of 0 in
    # torchmetrics.
    assert bool(torch.isclose(macro, reference)) == (not absent)


def test_all_is_top_1_on_a_balanced_test_set():
    target = torch.arange(CLASSES).repeat(25)
    preds = torch.randint(CLASSES, target.shape, generator=torch.Generator().manual_seed(0))
    metric = ClassGroupAccuracy(COUNTS)
    assert_close(metric(preds, target)["all"], (preds == target).float().mean())


def test_empty_group_is_nan_and_not_0():
    metric = ClassGroupAccuracy([200, 300])
    result = metric(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert result["many"] == 1
    assert result["medium"].isnan()
    assert result["few"].isnan()
    assert result["all"] == 1


def test_per_class_is_sklearns_recall_with_nan_for_absent():
    preds, target = sample(classes=[0, 1, 2, 3, 4, 6])
    metric = ClassGroupAccuracy(COUNTS)
    metric.update(preds, target)
    expected = recall_score(target, preds, labels=range(CLASSES), average=None, zero_division=0)
    expected[[5, 7]] = np.nan
    assert_close(metric.per_class(), torch.from_numpy(expected).float(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_logits_are_their_argmax(dtype):
    preds, target = sample()
    logits = torch.rand(len(preds), CLASSES, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(len(preds)), preds] += 2
    metric = ClassGroupAccuracy(COUNTS)
    assert_same(metric(logits.to(dtype), target), expected_groups(preds, target))


def test_small_integer_labels_do_not_overflow():
    preds, target = sample(rows=1000)
    metric = ClassGroupAccuracy(COUNTS)
    assert_same(metric(preds.to(torch.uint8), target.to(torch.uint8)), expected_groups(preds, target))


def test_thresholds_choose_the_groups():
    preds, target = torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])
    result = ClassGroupAccuracy([60, 50, 9], many=50, few=10)(preds, target)
    assert [result[g].item() for g in ("many", "medium", "few")] == [1, 0, 0]
    result = ClassGroupAccuracy([60, 50, 9], many=100, few=60)(preds, target)
    assert result["many"].isnan()
    assert [result[g].item() for g in ("medium", "few")] == [1, 0]


def test_predicted_index_outside_the_classes_is_wrong():
    metric = ClassGroupAccuracy([10, 10])
    metric.update(torch.tensor([0, 2, -1, 1]), torch.tensor([0, 0, 1, 1]))
    assert metric.per_class().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [-1, CLASSES, -100, 255])
def test_target_outside_the_classes_is_refused_and_never_counted(bad):
    preds, target = sample()
    more = torch.full((3,), bad)
    strict = ClassGroupAccuracy(COUNTS)
    strict.update(torch.cat([preds, more]), torch.cat([target, more]))
    for method in (strict.compute, strict.per_class):
        with pytest.raises(SettingError, match=rf"3 of 403 targets.*0\.\.{CLASSES - 1}.*validate_args"):
            method()
    strict.reset()
    assert_same(strict(preds, target), expected_groups(preds, target))

    lax = ClassGroupAccuracy(COUNTS, validate_args=False)
    lax.update(torch.cat([preds, more]), torch.cat([target, more]))
    assert_same(lax.compute(), expected_groups(preds, target))


@pytest.mark.parametrize("as_logits", [False, True])
def test_update_does_not_wait_for_the_device(as_logits):
    preds, target = sample()
    if as_logits:
        preds = torch.nn.functional.one_hot(preds, CLASSES).float()
    metric = ClassGroupAccuracy(COUNTS)
    with NoSynchronisation():
        metric.update(preds, target)
    with pytest.raises(AssertionError, match="waits for the GPU"), NoSynchronisation():
        metric.compute()  # the check itself can fail
    assert not metric._is_synced


@pytest.mark.parametrize(
    ("preds", "target", "says"),
    [
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), r"\(4, 3\).*8 classes"),
        (torch.zeros(3, 8), torch.zeros(4, dtype=torch.long), r"\(3, 8\).*4 targets"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), "preds"),
        (torch.zeros(3, dtype=torch.long), torch.zeros(4, dtype=torch.long), "preds"),
        (torch.zeros(4, 8), torch.zeros(4, 8), "target"),
        (torch.zeros(4, 8), torch.zeros(4), "target"),
    ],
)
def test_inputs_of_other_shapes_are_refused(preds, target, says):
    metric = ClassGroupAccuracy(COUNTS)
    with pytest.raises(SettingError, match=says):
        metric.update(preds, target)
    assert metric.total.sum() == 0


def test_bad_settings_are_refused():
    with pytest.raises(SettingError, match=r"class_names has 2 names: give one for each of 3 classes"):
        ClassGroupAccuracy([1, 2, 3], class_names=["a", "b"])
    with pytest.raises(SettingError, match="class_counts"):
        ClassGroupAccuracy([])
    with pytest.raises(SettingError, match="few is"):
        ClassGroupAccuracy([1, 2], many=5, few=10)


def halves():
    preds, target = sample()
    parts = []
    for rows in (slice(None, 150), slice(150, None)):
        metric = ClassGroupAccuracy(COUNTS)
        metric.update(preds[rows], target[rows])
        parts.append(metric)
    return parts, expected_groups(preds, target)


def test_states_of_two_metrics_merge():
    (first, second), expected = halves()
    first.merge_state(second)
    assert_same(first.compute(), expected)


def as_two_processes(metric, other):
    """Let `metric` believe that `other` lives in a second process."""
    names = iter(list(metric._reductions) * 99)
    metric.dist_sync_fn = lambda state, group=None: [state, getattr(other, next(names))]
    metric.distributed_available_fn = lambda: True


def test_compute_and_per_class_reduce_over_processes_and_restore():
    (first, second), expected = halves()
    preds, target = sample()
    own = first.total.clone()
    as_two_processes(first, second)
    assert_same(first.compute(), expected)
    recalls = recall_score(target, preds, labels=range(CLASSES), average=None)
    assert_close(first.per_class(), torch.from_numpy(recalls).float())
    assert_close(first.total, own)


def test_refusing_targets_of_another_process_leaves_the_metric_usable():
    (first, second), _ = halves()
    for metric in (first, second):
        metric.update(torch.tensor([0]), torch.tensor([99]))
    as_two_processes(first, second)
    own = first.total.clone()
    for method in (first.compute, first.per_class):
        with pytest.raises(SettingError, match="2 of 402"):
            method()
        assert_close(first.total, own)
    first.update(torch.tensor([0]), torch.tensor([0]))
    assert first.total.sum() == own.sum() + 1


def test_forward_gives_the_batch_and_accumulates():
    preds, target = sample()
    metric = ClassGroupAccuracy(COUNTS)
    metric(preds[:100], target[:100])
    assert_same(metric(preds[100:], target[100:]), expected_groups(preds[100:], target[100:]))
    assert_same(metric.compute(), expected_groups(preds, target))


def test_pickle_clone_and_reset():
    preds, target = sample()
    metric = ClassGroupAccuracy(COUNTS, class_names=list("abcdefgh"))
    metric.update(preds, target)
    expected = expected_groups(preds, target)
    for copied in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert copied.class_names == list("abcdefgh")
        assert_same(copied.compute(), expected)
        copied.reset()
        copied.update(target, target)
        assert copied.compute()["all"] == 1
    assert_same(metric.compute(), expected)


def test_state_dict_holds_the_states_alone_and_only_when_persistent():
    preds, target = sample()
    metric = ClassGroupAccuracy(COUNTS)
    assert metric.state_dict() == {}
    metric.persistent(True)
    metric.update(preds[:200], target[:200])
    saved = metric.state_dict()
    assert set(saved) == {"correct", "total", "outside"}
    resumed = ClassGroupAccuracy(COUNTS)
    resumed.persistent(True)
    resumed.load_state_dict(saved)
    resumed.update(preds[200:], target[200:])
    assert_same(resumed.compute(), expected_groups(preds, target))


def test_collection_shares_states_but_not_thresholds():
    preds, target = sample()
    metrics = MetricCollection(
        {
            "a": ClassGroupAccuracy(COUNTS),
            "b": ClassGroupAccuracy(COUNTS, many=40, few=10),
            "top1": MulticlassAccuracy(CLASSES, average="micro"),
        },
        prefix="val/",
    )
    for rows in torch.arange(len(target)).split(100):
        metrics.update(preds[rows], target[rows])
    result = metrics.compute()
    expected = expected_groups(preds, target)
    other = ClassGroupAccuracy(COUNTS, many=40, few=10)(preds, target)
    for group in GROUPS:
        assert_close(result[f"val/a_{group}"], expected[group])
        assert_close(result[f"val/b_{group}"], other[group])
    assert_close(result["val/top1"], (preds == target).float().mean())
    assert_close(result["val/a_all"], result["val/b_all"])
    assert not torch.isclose(result["val/a_many"], result["val/b_many"])


def test_collection_of_one_keeps_the_group_names():
    result = MetricCollection([ClassGroupAccuracy(COUNTS)], prefix="val/")(*sample())
    assert set(result) == {"val/many", "val/medium", "val/few", "val/all"}


def test_moving_and_casting_keeps_the_counts_whole():
    metric = ClassGroupAccuracy(COUNTS).half().set_dtype(torch.float16)
    assert metric.class_counts.dtype == torch.int64
    moved = ClassGroupAccuracy(COUNTS).to("meta")
    assert {moved.groups.device.type, moved.class_counts.device.type, moved.correct.device.type} == {"meta"}


@pytest.fixture
def plt():
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def test_plot_draws_recalls_from_the_most_frequent_class(plt):
    preds, target = sample(classes=[0, 1, 2, 3, 4, 6, 7])
    metric = ClassGroupAccuracy(COUNTS, class_names=list("abcdefgh"))
    metric.update(preds, target)
    figure, axes = metric.plot()
    figure.canvas.draw()
    order = sorted(range(CLASSES), key=lambda c: -COUNTS[c])
    assert [tick.get_text()[0] for tick in axes.get_xticklabels()] == ["abcdefgh"[c] for c in order]
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for c in axes.containers for bar in c}
    recalls = metric.per_class()
    assert set(heights) == {place for place, c in enumerate(order) if c != 5}
    for place, height in heights.items():
        assert height == pytest.approx(recalls[order[place]].item())
    labels = " ".join(axes.get_legend_handles_labels()[1])
    for group, accuracy in metric.compute().items():
        assert group in labels
        assert f"{accuracy:.3f}" in labels
    assert "no test samples" in labels


def test_plot_into_axes_and_of_results(plt):
    metric = ClassGroupAccuracy(COUNTS)
    results = [metric(*sample(seed=seed)) for seed in range(3)]
    _, axes = plt.subplots()
    assert metric.plot(ax=axes)[1] is axes
    assert metric.plot(metric.per_class(), ax=axes)[1] is axes
    for value in (results[0], results):
        _, drawn = metric.plot(value)
        assert set(drawn.get_legend_handles_labels()[1]) == set(GROUPS)
    with pytest.raises(SettingError, match="val"):
        metric.plot(torch.zeros(3))


def test_plot_of_many_classes_shows_counts_on_the_axis(plt):
    counts = [1000 - i for i in range(200)]
    metric = ClassGroupAccuracy(counts)
    metric.update(torch.arange(200), torch.arange(200))
    _, axes = metric.plot()
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert len(labels) <= 10
    assert (labels[0], labels[-1]) == ("1000", "801")


def test_plot_without_matplotlib_says_so(monkeypatch):
    import torchmetrics.utilities.plot

    monkeypatch.setattr(torchmetrics.utilities.plot, "_MATPLOTLIB_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="Plot function expects"):
        ClassGroupAccuracy(COUNTS).plot()
