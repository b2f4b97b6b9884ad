import re
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.utils.estimator_checks import parametrize_with_checks

from imbsam import ClassAwareSAM, SettingError
from imbsam.batch import Plan
from imbsam.sklearn import ImbSAMClassifier, ImbSAMOutlierDetector

QUICK = ImbSAMClassifier(max_epochs=20, random_state=0)
QUICK_DETECTOR = ImbSAMOutlierDetector(max_epochs=3, random_state=0)
DOCS = Path(__file__).resolve().parents[2] / "docs/sklearn.md"

EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "a row of weight 2 is one row of a mini-batch, its repetition two",
}
"""Checks that cannot hold, and why."""


def expected_failures(estimator):
    return EXPECTED_FAILURES if isinstance(estimator, ImbSAMClassifier) else {}


@pytest.mark.filterwarnings("ignore:.*tail class:UserWarning", "ignore:.*labelled anomaly:UserWarning")
@parametrize_with_checks([QUICK, QUICK_DETECTOR], expected_failed_checks=expected_failures)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def rare():
    """300 samples, 29 of them of the rare class 1; the classes overlap."""
    return make_classification(300, 6, weights=[0.9], class_sep=0.7, flip_y=0, random_state=0)


@pytest.fixture(scope="module")
def outliers():
    """A blob of 200 rows, 20 outliers on one side of it, 5 of those known; and which are outliers."""
    random = np.random.default_rng(0)
    X = random.normal(size=(220, 4))
    X[200:] += 2.5
    outlier = np.arange(220) >= 200
    y = np.where(np.arange(220) >= 215, -1, 1)
    return X, y, outlier


# settings and what they do


def test_eta_none_takes_the_classes_below_the_mean_size():
    X = np.random.default_rng(0).normal(size=(60, 2))
    y = np.repeat(["a", "b", "c", "d"], [30, 15, 10, 5])  # mean 15: b is not below it
    model = clone(QUICK).set_params(max_epochs=1).fit(X, y)
    assert model.tail_classes_.tolist() == ["c", "d"]
    assert model.class_counts_.tolist() == [30, 15, 10, 5]
    assert clone(model).set_params(eta=6).fit(X, y).tail_classes_.tolist() == ["d"]


@pytest.fixture
def engines(monkeypatch):
    """Every engine that is built, with the targets and sharp rows of its steps."""
    made = []
    backward, batches = ClassAwareSAM.backward, Plan.batches

    def spy(self, losses, targets, **options):
        def planned(plan, *arguments):
            (batch,) = batches(plan, *arguments)
            made.append((self, targets, batch.c.nonzero().flatten().tolist()))
            return [batch]

        monkeypatch.setattr(Plan, "batches", planned)
        return backward(self, losses, targets, **options)

    monkeypatch.setattr(ClassAwareSAM, "backward", spy)
    return made


def test_imbsam_perturbs_along_tail_samples_only(rare, engines):
    clone(QUICK).set_params(max_epochs=1, rho=0.3).fit(*rare)
    assert {engine.rho for engine, _, _ in engines} == {0.3}
    assert sum(len(sharp) for _, _, sharp in engines) == rare[1].sum()
    for _, targets, sharp in engines:
        assert sharp == (targets == 1).nonzero().flatten().tolist()


def test_detector_perturbs_along_labelled_anomalies_only(outliers, engines):
    X, y, _ = outliers
    clone(QUICK_DETECTOR).set_params(max_epochs=1).fit(X, y)
    assert sum(len(sharp) for _, _, sharp in engines) == 5
    engines.clear()
    clone(QUICK_DETECTOR).set_params(max_epochs=1, method="sam").fit(X, y)
    assert sum(len(sharp) for _, _, sharp in engines) == 220


def test_methods_differ_and_rho_0_is_plain_training(rare):
    X, y = rare

    def probabilities(**settings):
        return clone(QUICK).set_params(**settings).fit(X, y).predict_proba(X)

    sgd = probabilities(method="sgd")
    sam, imbsam = probabilities(method="sam"), probabilities(method="imbsam")
    assert abs(sgd - imbsam).max() > 1e-3
    assert abs(sam - imbsam).max() > 1e-3
    np.testing.assert_array_equal(sgd, probabilities(method="imbsam", rho=0))


def test_detector_methods_differ(outliers):
    X, y, _ = outliers
    sgd, sam, imbsam = (
        clone(QUICK_DETECTOR).set_params(method=method).fit(X, y).score_samples(X)
        for method in ("sgd", "sam", "imbsam")
    )
    assert abs(sgd - imbsam).max() > 1e-6
    assert abs(sam - imbsam).max() > 1e-6


def test_class_weights_and_adjusted_logits_favour_the_rare_class(rare):
    X, y = rare
    plain = clone(QUICK).fit(X, y).predict_proba(X)[:, 1].mean()
    for settings in ({"class_weight": "balanced"}, {"class_weight": {0: 1, 1: 9}}, {"loss": "logit_adjusted"}):
        assert clone(QUICK).set_params(**settings).fit(X, y).predict_proba(X)[:, 1].mean() > plain + 0.03, settings
    assert plain == pytest.approx(0.1, abs=0.03)  # the prior


def test_sample_weight(rare):
    X, y = rare
    plain = clone(QUICK).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(clone(QUICK).fit(X, y, np.full(300, 7.0)).predict_proba(X), plain)
    assert y.sum() == 29
    balanced = clone(QUICK).set_params(class_weight="balanced").fit(X, y).predict_proba(X)
    by_rows = clone(QUICK).fit(X, y, sample_weight=np.where(y == 1, 271 / 29, 1)).predict_proba(X)
    np.testing.assert_allclose(by_rows, balanced, atol=1e-4)
    half = np.arange(300) % 2
    left_out = clone(QUICK).fit(X[half == 1], y[half == 1]).predict_proba(X)
    np.testing.assert_array_equal(clone(QUICK).fit(X, y, sample_weight=half).predict_proba(X), left_out)


def test_columns_are_standardised(rare):
    X, y = rare
    plain = clone(QUICK).fit(X, y).predict_proba(X)
    stretched = clone(QUICK).fit(1e4 * X - 7, y).predict_proba(1e4 * X - 7)
    np.testing.assert_allclose(stretched, plain, atol=1e-3)


def test_detector_learns_from_the_labelled_anomalies(outliers):
    X, y, outlier = outliers
    detector = ImbSAMOutlierDetector(max_epochs=100, random_state=0).fit(X, y)
    unknown = y == 1
    auc = roc_auc_score(outlier[unknown], -detector.score_samples(X[unknown]))
    with pytest.warns(UserWarning, match="y is None: without a labelled anomaly this is one-class Deep SVDD"):
        one_class = ImbSAMOutlierDetector(max_epochs=100, random_state=0).fit(X)
    assert auc > 0.9
    assert auc > roc_auc_score(outlier[unknown], -one_class.score_samples(X[unknown])) + 0.2
    assert detector.n_anomalies_ == 5
    assert (detector.predict(X) == -1).mean() == pytest.approx(detector.contamination, abs=0.005)


# scikit-learn around it


def test_grid_search_over_rho(rare):
    search = GridSearchCV(clone(QUICK), {"rho": [0.0, 0.5]}, scoring="average_precision", cv=StratifiedKFold(3))
    search.fit(*rare)
    scores = search.cv_results_["mean_test_score"]
    assert search.best_params_["rho"] in (0.0, 0.5)
    assert scores[0] != scores[1]
    assert min(scores) > 0.3  # chance: 0.1


def test_pipeline_with_text_columns_and_cross_validation():
    random = np.random.default_rng(0)
    X = pd.DataFrame({"size": random.normal(size=120), "colour": random.choice(["red", "blue"], 120)})
    y = np.where((X["colour"] == "red") & (X["size"] > 0.6), "faulty", "fine")
    assert 5 < (y == "faulty").sum() < 40
    encode = ColumnTransformer([("text", OneHotEncoder(), ["colour"])], remainder="passthrough")
    pipeline = make_pipeline(encode, clone(QUICK))
    scores = cross_val_score(pipeline, X, y, cv=StratifiedKFold(3), scoring="balanced_accuracy")
    assert scores.mean() > 0.75
    assert set(pipeline.fit(X, y).predict(X)) == {"faulty", "fine"}


def test_joblib_round_trip(rare, outliers, tmp_path):
    X, y = rare
    for fitted in (clone(QUICK).fit(X, y), clone(QUICK_DETECTOR).fit(*outliers[:2])):
        rows = X if isinstance(fitted, ImbSAMClassifier) else outliers[0]
        method = "predict_proba" if isinstance(fitted, ImbSAMClassifier) else "decision_function"
        joblib.dump(fitted, tmp_path / "model.joblib")
        again = joblib.load(tmp_path / "model.joblib")
        np.testing.assert_array_equal(getattr(again, method)(rows), getattr(fitted, method)(rows))


def test_random_state_determines_the_result_and_global_generators_are_untouched(rare):
    X, y = rare
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = clone(QUICK).fit(X, y).predict_proba(X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    torch.manual_seed(2)
    np.testing.assert_array_equal(clone(QUICK).fit(X, y).predict_proba(X), first)
    other = clone(QUICK).set_params(random_state=1).fit(X, y).predict_proba(X)
    assert abs(other - first).max() > 1e-3


def test_feature_names_are_checked(rare):
    X, y = rare
    frame = pd.DataFrame(X, columns=list("abcdef"))
    model = clone(QUICK).fit(frame, y)
    assert model.feature_names_in_.tolist() == list("abcdef")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the detector scores its own training rows: no "X does not have feature names"
        clone(QUICK_DETECTOR).fit(frame, np.where(y == 1, -1, 1)).predict(frame)
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(frame[list("fedcba")])


def test_verbose_prints_the_loss_of_every_epoch(rare, capsys):
    model = clone(QUICK).set_params(max_epochs=2, verbose=True).fit(*rare)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"epoch 2/2: training loss {model.loss_curve_[1]:.4f}"
    assert len(lines) == 2
    assert model.loss_curve_[1] < model.loss_curve_[0]


# what is refused, in one line


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def table(rows=20):
    return pd.DataFrame({"size": np.arange(rows, dtype=float), "weight": np.ones(rows)}), np.arange(rows) % 2


@pytest.mark.parametrize("estimator", [QUICK, QUICK_DETECTOR], ids=["classifier", "detector"])
@pytest.mark.parametrize("as_array", [False, True], ids=["frame", "array"])
def test_text_columns(estimator, as_array):
    X, y = table()
    X["colour"] = "red"
    with pytest.raises(SettingError, match=r"X holds text .*: encode it first") as error:
        clone(estimator).fit(X.to_numpy() if as_array else X, y)
    assert ("'red'" if as_array else "columns ['colour']") in one_line(error)


@pytest.mark.parametrize("estimator", [QUICK, QUICK_DETECTOR], ids=["classifier", "detector"])
@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "Input X contains NaN"), (np.inf, "Input X contains infinity")]
)
def test_nan_and_infinity(estimator, value, message):
    X, y = table()
    X.loc[3, "weight"] = value
    with pytest.raises(ValueError, match=message):
        clone(estimator).fit(X, y)
    X, y = table()
    fitted = clone(estimator).fit(X, np.where(np.arange(20) < 4, -1, 1))
    X.loc[3, "weight"] = value
    with pytest.raises(ValueError, match=message):
        fitted.predict(X)


@pytest.mark.parametrize("estimator", [QUICK, QUICK_DETECTOR], ids=["classifier", "detector"])
def test_three_rows(estimator):
    X, y = table(3)
    with pytest.raises(
        ValueError, match=r"Found array with 3 sample\(s\).*minimum of 5 is required by ImbSAM"
    ) as error:
        clone(estimator).fit(X, y)
    one_line(error)


def test_a_single_class():
    X, _ = table()
    with pytest.raises(SettingError, match="y has a single class, 'fine': give samples of at least two classes"):
        clone(QUICK).fit(X, ["fine"] * 20)
    with pytest.raises(SettingError, match=r"y is -1 \(anomaly\) for every sample: give unlabelled or normal ones too"):
        clone(QUICK_DETECTOR).fit(X, -np.ones(20))


def test_no_labelled_anomaly_warns_at_the_callers_line():
    X, y = table()
    message = r"y has no -1 \(it has 0, 1\): without a labelled anomaly .*; mark known anomalies with -1"
    with pytest.warns(UserWarning, match=message) as caught:
        clone(QUICK_DETECTOR).fit(X, y)
    assert [warning.filename for warning in caught] == [__file__]


def test_no_tail_warns():
    X, y = table()
    with pytest.warns(UserWarning, match="leaves no tail class .*10 training samples"):
        clone(QUICK).fit(X, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adam"}, "method is 'adam': give sgd, sam or imbsam"),
        ({"loss": "hinge"}, "loss is 'hinge': give cross_entropy or logit_adjusted"),
        ({"rho": -1}, "rho is -1"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes is (8, 0): give whole numbers from 1"),
        ({"hidden_layer_sizes": 8}, "hidden_layer_sizes is 8: give a tuple"),
        ({"learning_rate": 0}, "learning_rate is 0: give a finite number above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: give a finite number from 0"),
        ({"max_epochs": 2.5}, "max_epochs is 2.5: give a whole number from 1"),
        ({"batch_size": 0}, "batch_size is 0: give a whole number from 1"),
        ({"device": "abacus"}, "device is 'abacus': torch cannot use it here"),
        ({"learning_rate": 1e9}, "learning_rate is 1000000000.0: the training loss became"),
    ],
)
def test_wrong_settings_of_the_classifier(settings, message, rare):
    with pytest.raises(SettingError, match=re.escape(message)) as error:
        clone(QUICK).set_params(**settings).fit(*rare)
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contamination": 0.0}, "contamination is 0.0: give a finite number above 0"),
        ({"contamination": "auto"}, "contamination is 'auto'"),
        ({"contamination": 0.6}, "contamination is 0.6: give a fraction above 0, up to 0.5"),
        ({"anomaly_weight": 0}, "anomaly_weight is 0"),
        ({"hidden_layer_sizes": ()}, "hidden_layer_sizes is empty"),
    ],
)
def test_wrong_settings_of_the_detector(settings, message, outliers):
    with pytest.raises(SettingError, match=re.escape(message)):
        clone(QUICK_DETECTOR).set_params(**settings).fit(*outliers[:2])


def test_sample_weights_that_cannot_work(rare):
    X, y = rare
    with pytest.raises(SettingError, match="sample_weight has -1"):
        clone(QUICK).fit(X, y, sample_weight=-np.ones(300))
    with pytest.raises(ValueError, match="zero"):  # scikit-learn's own line from some release on
        clone(QUICK).fit(X, y, sample_weight=np.zeros(300))
    with pytest.raises(SettingError, match="y has a single class, 0"):
        clone(QUICK).fit(X, y, sample_weight=y == 0)


def test_not_fitted(rare):
    for estimator, method in ((QUICK, "predict"), (QUICK, "predict_proba"), (QUICK_DETECTOR, "score_samples")):
        with pytest.raises(NotFittedError):
            getattr(clone(estimator), method)(rare[0])


# the page


def test_programs_of_the_page_run_unchanged(capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL):
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert re.search(r"balanced accuracy \d\.\d+", printed)
