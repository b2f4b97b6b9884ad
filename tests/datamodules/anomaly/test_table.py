import logging
import os
from math import ceil
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, QuantileTransformer, RobustScaler, StandardScaler

from datamodules import AnomalyDataModule
from datamodules.anomaly.batches import EpochBatches
from datamodules.anomaly.split import split_rows
from datamodules.tables.encoding import DATE
from imbsam import SettingError
from tests.training import quiet_trainer


def frame(rows=200, frauds=20, seed=0):
    """Amount (heavy-tailed, some missing), hour, country, a constant, an identifier and the label."""
    random = np.random.default_rng(seed)
    fraud = np.zeros(rows, dtype=int)
    fraud[random.choice(rows, frauds, replace=False)] = 1
    return pd.DataFrame(
        {
            "amount": random.lognormal(3 + fraud, 1),
            "hour": random.integers(0, 24, rows),
            "country": random.choice(["AT", "DE", "FR"], rows),
            "currency": "EUR",
            "fraud": fraud,
        }
    )


def written(table, path):
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def data_of(path, stage="fit", **settings):
    data = AnomalyDataModule(path=path, **{"label": "fraud", **settings})
    data.setup(stage)
    return data


def features_of(loader):
    return torch.cat([batch if isinstance(batch, torch.Tensor) else batch[0] for batch in loader])


def labels_of(loader):
    return torch.cat([labels for _, labels in loader])


@pytest.fixture(scope="module")
def adbench():
    default = Path(__file__).resolve().parents[4] / "shared" / "data"
    folder = Path(os.environ.get("IMBSAM_DATA", default)) / "adbench"
    if not folder.is_dir():
        pytest.skip(f"no adbench in {folder.parent}; set IMBSAM_DATA to the folder that holds it")
    return folder


# ---- the split


@pytest.mark.parametrize("name", ["18_Ionosphere", "32_shuttle", "38_thyroid"])  # resampled, cut, neither
def test_the_parts_are_adbenchs_to_the_row(adbench, name):
    path = adbench / "Classical" / f"{name}.npz"
    ours = AnomalyDataModule(path=path, min_rows=1000, max_rows=10000, scaling="min_max", seed=2)
    ours.setup("fit")
    # ADBench's calls; it seeds numpy's global generator, which is a RandomState
    x, y = np.load(path)["X"], np.load(path)["y"]
    random = np.random.RandomState(2)
    if len(y) < 1000:
        rows = random.choice(np.arange(len(y)), 1000, replace=True)
        x, y = x[rows], y[rows]
    if len(y) > 10000:
        rows = random.choice(np.arange(len(y)), 10000, replace=False)
        x, y = x[rows], y[rows]
    train, test, train_y, test_y = train_test_split(x, y, test_size=0.3, stratify=y, random_state=random)
    scaler = MinMaxScaler().fit(train)
    anomalies = np.where(train_y == 1)[0]
    labelled = random.choice(anomalies, ceil(0.1 * len(anomalies)), replace=False)
    torch.testing.assert_close(ours.train_features, torch.from_numpy(scaler.transform(train)).float())
    torch.testing.assert_close(features_of(ours.test_dataloader()), torch.from_numpy(scaler.transform(test)).float())
    assert labels_of(ours.test_dataloader()).tolist() == test_y.tolist()
    assert ours.train_labels.nonzero().flatten().tolist() == sorted(labelled)
    assert ours.train_true_labels.tolist() == train_y.tolist()
    assert ours.class_counts.tolist() == [len(train) - len(labelled), len(labelled)]


def test_every_adbench_set_loads(adbench):
    files = sorted(adbench.rglob("*.npz"))
    assert len(files) == 19
    for path in files:
        data = AnomalyDataModule(path=path, min_rows=1000, max_rows=10000, val_share=0.2)
        data.setup("fit")
        x = data.train_features
        assert x.isfinite().all(), path
        assert x.double().mean(0).abs().max() < 1e-5, path
        assert (x.double().std(0, correction=0) - 1).abs().max() < 1e-5, path
        assert features_of(data.test_dataloader()).isfinite().all(), path
        assert all(labels_of(loader).sum() > 0 for loader in (data.val_dataloader()[0], data.test_dataloader())), path
        assert data.class_counts[1] >= 1, path


def test_digits_are_the_default():
    data = AnomalyDataModule()
    data.setup("fit")
    assert data.class_counts.tolist() == [1244, 13]  # 10 % of 125 anomalies, rounded up
    assert (data.num_features, data.class_names) == (61, ["unlabelled", "anomaly"])
    assert (data.train_features.dtype, data.train_labels.dtype) == (torch.float32, torch.int64)
    assert data.val_dataloader() == []
    x, labels = next(iter(data.test_dataloader()))
    assert (len(x), labels.sum(), labels.dtype) == (540, 53, torch.int64)


def test_own_tables_keep_their_rows_and_every_known_label(tmp_path):
    path = written(frame(), tmp_path / "mine.csv")
    data = data_of(path, val_share=0.2)
    val, _ = data.val_dataloader()
    parts = [len(data.train_features), len(labels_of(val)), len(labels_of(data.test_dataloader()))]
    assert parts == [112, 28, 60]
    assert data.class_counts[1] == 11  # of 20 frauds, all that are not held out
    assert labels_of(val).sum() == 3
    fewer = data_of(path, val_share=0.2, labelled_share=0.01)
    assert fewer.class_counts.tolist() == [111, 1]  # at least one
    assert torch.equal(fewer.train_features, data.train_features)


def test_the_seed_alone_decides(tmp_path):
    path = written(frame(), tmp_path / "mine.csv")
    torch.manual_seed(1)
    one = data_of(path)
    torch.manual_seed(2)
    assert torch.equal(one.train_features, data_of(path).train_features)
    assert not torch.equal(one.train_features, data_of(path, seed=1).train_features)


# ---- the columns


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_become_features(tmp_path, suffix):
    table = frame()
    table.loc[[3, 5, 8, 13], "amount"] = np.nan
    table.loc[[0, 1, 2, 3, 4], "country"] = None
    data = data_of(written(table, tmp_path / f"mine{suffix}"))
    names = ["amount", "hour", "amount missing", "country=(missing)", "country=AT", "country=DE", "country=FR"]
    assert data.feature_names == names
    x = torch.cat([data.train_features, features_of(data.test_dataloader())])
    assert x.shape == (200, 7)
    assert x[:, 2].sum() == 4
    assert x[:, 3].sum() == 5
    assert (x[:, 3:].sum(dim=1) == 1).all()
    # a missing amount has the training median's place
    gaps = x[:, 2] == 1
    train_amounts = data.train_features[data.train_features[:, 2] == 0, 0]
    np.testing.assert_allclose(x[gaps, 0], np.median(train_amounts.numpy()), rtol=1e-6)
    np.testing.assert_allclose(data.train_features[:, 1].std(correction=0), 1, rtol=1e-6)  # hour


def test_one_line_says_what_was_left_out_and_filled_in(tmp_path, caplog):
    table = frame()
    table.loc[range(50), "amount"] = np.nan
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        data_of(written(table, tmp_path / "mine.csv"))
    left_out, filled, text, summary = caplog.messages
    assert text == "mine.csv: text becomes one feature per value: country (3)"
    assert left_out == "mine.csv: left out, a single value in training: currency"
    assert filled.startswith("mine.csv: missing numbers are filled with the training median, in training in: amount (")
    assert summary == (
        "mine.csv: anomalies have fraud = 1; training 140 rows, 14 labelled anomalies; test 60 rows with 6 anomalies; "
        "6 features"
    )


def test_scaling_never_sees_the_test_part(tmp_path):
    table = frame()
    data = data_of(written(table, tmp_path / "mine.csv"), scaling="min_max")
    assert data.train_features[:, 0].max() == 1
    extreme = table.assign(amount=table.amount * 1000)
    scored = AnomalyDataModule(path=written(extreme, tmp_path / "extreme.csv"))
    scored.load_state_dict(data.state_dict())
    scored.setup("predict")
    assert features_of(scored.predict_dataloader())[:, 0].max() > 100  # not clipped


@pytest.mark.parametrize(
    ("scaling", "transformer"),
    [
        ("standard", StandardScaler()),
        ("robust", RobustScaler()),
        ("min_max", MinMaxScaler()),
        ("quantile", QuantileTransformer(n_quantiles=140, output_distribution="normal")),
        ("none", FunctionTransformer()),
    ],
)
def test_scaling_is_scikit_learns_in_training_and_from_a_checkpoint(tmp_path, scaling, transformer):
    """Quantiles of all 140 training rows; the checkpoint passes through a file of plain data."""
    table = frame()[["amount", "hour", "fraud"]].astype(float)
    data = data_of(written(table, tmp_path / "mine.csv"), scaling=scaling)
    rows = _train_rows(table)
    transformer.fit(table.iloc[rows][["amount", "hour"]].to_numpy())
    expected = transformer.transform(table[["amount", "hour"]].to_numpy())
    np.testing.assert_allclose(data.train_features, expected[rows], rtol=1e-5, atol=1e-6)
    torch.save(data.state_dict(), tmp_path / "state.pt")
    scored = AnomalyDataModule(path=tmp_path / "mine.csv", scaling="robust")  # the checkpoint's scaling counts
    scored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_allclose(features_of(scored.predict_dataloader()), expected, rtol=1e-5, atol=1e-6)


def _train_rows(table):
    """The rows that the default settings train on."""
    parts = {"labelled_share": 1.0, "test_share": 0.3, "val_share": 0.0, "min_rows": 0, "max_rows": None, "seed": 0}
    return split_rows(table.fraud.to_numpy() == 1, "mine", **parts).train


def test_the_standard_scaling_is_the_default(tmp_path):
    table = frame()
    default, standard = (data_of(written(table, tmp_path / "mine.csv"), **s) for s in ({}, {"scaling": "standard"}))
    assert torch.equal(default.train_features, standard.train_features)


def test_booleans_categories_and_decimals_are_read(tmp_path):
    from decimal import Decimal

    table = frame()
    table["online"] = table.hour > 12
    table["kind"] = pd.Categorical(table.country)
    table["price"] = [Decimal(row) / 4 for row in range(len(table))]
    table["grade"] = pd.array([None if row % 7 == 0 else row % 7 for row in range(len(table))], dtype="Int64")
    data = data_of(written(table, tmp_path / "mine.parquet"), drop_columns=["country"])
    assert data.feature_names == [
        *("amount", "hour", "online", "price", "grade", "grade missing"),
        *("kind=AT", "kind=DE", "kind=FR"),
    ]


def test_the_row_numbers_that_pandas_writes_are_no_feature(tmp_path):
    frame().to_csv(tmp_path / "mine.csv")
    assert data_of(tmp_path / "mine.csv").feature_names[0] == "amount"


# ---- the labels


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ((False, True), {}),
        ((0, 1), {}),
        (("ok", "fraud"), {}),  # the rarer one
        ((1, -1), {}),
        (("ok", "fraud"), {"anomaly_value": "fraud"}),
        ((0, 2), {"anomaly_value": 2}),
        ((1, 0), {"anomaly_value": 0}),
    ],
)
def test_labels(tmp_path, values, settings):
    table = frame()
    table["fraud"] = table.fraud.map(dict(enumerate(values)))
    data = data_of(written(table, tmp_path / "mine.csv"), **settings)
    assert data.class_counts.tolist() == [126, 14]


def test_anomaly_value_chooses_among_many(tmp_path):
    table = frame()
    table["kind"] = np.where(table.fraud == 1, "stolen", np.where(table.hour > 12, "pm", "am"))
    data = data_of(written(table, tmp_path / "mine.csv"), label="kind", anomaly_value="stolen", drop_columns=["fraud"])
    assert data.class_counts.tolist() == [126, 14]
    assert "fraud" not in data.feature_names


# ---- the batches


@pytest.fixture(scope="module")
def digits():
    data = AnomalyDataModule(batch_size=64)
    data.setup("fit")
    return data


def batches(data, sampling, batches_per_epoch=None, epoch=0):
    data.sampling, data.batches_per_epoch = sampling, batches_per_epoch
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def test_natural_batches_are_every_row_once(digits):
    found = batches(digits, "natural")
    assert [len(labels) for _, labels in found] == [64] * 19 + [41]
    x, labels = torch.cat([x for x, _ in found]), torch.cat([labels for _, labels in found])
    assert labels.sum() == 13
    assert torch.equal(x.unique(dim=0), digits.train_features.unique(dim=0))
    assert not torch.equal(x, digits.train_features)


def test_natural_batches_continue_after_the_samples_run_out():
    labels = torch.zeros(10, dtype=torch.int64)
    rows = torch.cat(list(EpochBatches(labels, "natural", 4, 6, seed=0)))
    assert len(rows) == 24
    assert sorted(rows[:10].tolist()) == sorted(rows[10:20].tolist()) == list(range(10))


def test_half_of_a_balanced_batch_is_anomalies(digits):
    found = batches(digits, "balanced", 5)
    assert [(x.shape, int(labels.sum())) for x, labels in found] == [((64, 61), 32)] * 5


def test_pairs_have_prenets_proportions(digits):
    found = batches(digits, "pairs", 5)
    for x, labels in found:
        assert (x.shape, labels.shape) == ((64, 2, 61), (64, 2))
        assert torch.bincount(labels.sum(dim=1)).tolist() == [32, 16, 16]
        assert (labels[:, 0] >= labels[:, 1]).all()  # the anomaly first


def test_natural_pairs_are_two_draws(digits):
    labels = torch.cat([labels for _, labels in batches(digits, "natural_pairs", 200)])
    share = 13 / 1257
    assert labels.float().mean(dim=0).sub(share).abs().max() < 0.003
    assert (labels[:, 0] != labels[:, 1]).any()


@pytest.mark.parametrize("sampling", ["natural", "balanced", "pairs", "natural_pairs"])
def test_a_batch_depends_on_seed_and_epoch_only(digits, sampling):
    one, other = batches(digits, sampling, 3, epoch=4), batches(digits, sampling, 3, epoch=4)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0][0], batches(digits, sampling, 3, epoch=5)[0][0])
    loader = digits.train_dataloader()
    (first, *_), (second, *_) = list(loader), list(loader)  # a new epoch without set_epoch
    assert not torch.equal(first[0], second[0])
    rows = [list(EpochBatches(digits.train_labels, sampling, 8, 3, seed)) for seed in (0, 1)]
    assert not torch.equal(rows[0][0], rows[1][0])


def test_the_batches_leave_the_global_generator_alone(digits):
    state = torch.get_rng_state()
    batches(digits, "pairs", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_features_and_labels_stay_together(digits):
    lookup = {tuple(row): label for row, label in zip(digits.train_features.tolist(), digits.train_labels, strict=True)}
    x, labels = batches(digits, "pairs", 1)[0]
    for pair, of_pair in zip(x.tolist(), labels.tolist(), strict=True):
        assert [int(lookup[tuple(row)]) for row in pair] == of_pair


# ---- scoring a new file


class Mean(L.LightningModule):
    """Scores a row by its mean feature."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.epochs = []

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.epochs.append(batch[0])
        return (self.weight * batch[0].mean()).square()

    def predict_step(self, batch, batch_idx):
        return batch.mean(dim=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_checkpoint_scores_a_new_file_with_the_training_scaling(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    old = data_of(written(frame(), Path("old.csv")), batch_size=16)
    fit = quiet_trainer(max_epochs=2, enable_checkpointing=False)
    model = Mean()
    fit.fit(model, datamodule=old)
    assert not torch.equal(model.epochs[0], model.epochs[1])  # Lightning sets the epoch
    fit.save_checkpoint("last.ckpt")
    # other rows, another order of columns, a country that training never saw, a new column, no label
    new = frame(rows=30, frauds=3, seed=5).drop(columns="fraud")[["country", "currency", "hour", "amount"]]
    new.loc[7, "country"] = "IT"
    new["comment"] = [f"text {row}" for row in range(30)]
    settings = {"label": "fraud", "drop_columns": ["id"]}  # of the training run; the new file has neither
    fresh = AnomalyDataModule(path=written(new, Path("new.csv")), eval_batch_size=8, **settings)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        scores = torch.cat(quiet_trainer().predict(Mean(), datamodule=fresh, ckpt_path="last.ckpt", weights_only=True))
    assert "new.csv: values that training did not see in: country (1 rows)" in caplog.messages
    # by hand, from the training rows of the old file
    rows = _train_rows(frame())
    numbers = ["amount", "hour"]
    train = frame().iloc[rows][numbers]
    standard = (new[numbers] - train.mean()) / train.std(ddof=0)
    expected = (standard.amount + standard.hour + (new.country != "IT")) / 5
    torch.testing.assert_close(scores, torch.tensor(expected.to_numpy()).float())


def test_the_same_data_predicts_every_row_of_its_file(tmp_path):
    path = written(frame(), tmp_path / "mine.csv")
    data = data_of(path)
    data.setup("predict")
    x = features_of(data.predict_dataloader())
    assert len(x) == 200
    by_amount = torch.tensor(frame().amount.to_numpy()).argsort()
    assert torch.equal(x[:, 0].argsort(stable=True), by_amount)  # the order of the file


def test_a_test_of_another_file_uses_the_checkpoints_scaling(tmp_path):
    old = data_of(written(frame(), tmp_path / "old.csv"))
    other = data_of(written(frame(seed=3), tmp_path / "other.csv"))
    before, labels = features_of(other.test_dataloader()), labels_of(other.test_dataloader())
    other.load_state_dict(old.state_dict())
    after = features_of(other.test_dataloader())
    assert not torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(labels_of(other.test_dataloader()), labels)


def test_prediction_reads_only_the_columns_of_the_training(tmp_path):
    """Neither its label nor what training left out; a feature named y is a feature."""
    old = data_of(written(frame().assign(y=np.arange(200) % 5), tmp_path / "old.csv"), drop_columns=["hour"])
    new = frame().assign(hour=np.inf, currency=np.inf, fraud=pd.Timestamp("2026-11-24"), y=1)
    scored = AnomalyDataModule(path=written(new, tmp_path / "new.parquet"))
    scored.setup("predict")
    scored.load_state_dict(old.state_dict())
    assert features_of(scored.predict_dataloader()).shape == (200, 5)
    bad = AnomalyDataModule(path=written(new.assign(amount=np.inf), tmp_path / "bad.parquet"))
    bad.load_state_dict(old.state_dict())
    with pytest.raises(SettingError, match=r"bad\.parquet: columns that the model was trained on: amount is infinite"):
        bad.predict_dataloader()


def test_a_gap_in_a_column_without_gaps_in_training_is_the_median(tmp_path):
    old = data_of(written(frame(), tmp_path / "old.csv"))
    gaps = AnomalyDataModule(path=written(frame().assign(amount=np.nan), tmp_path / "new.csv"))
    gaps.load_state_dict(old.state_dict())
    expected = np.median(old.train_features[:, 0].double().numpy())
    np.testing.assert_allclose(features_of(gaps.predict_dataloader())[:, 0], expected, rtol=1e-5)


def test_gzipped(tmp_path):
    frame().to_csv(tmp_path / "mine.csv.gz", index=False)
    assert torch.equal(
        data_of(tmp_path / "mine.csv.gz").train_features,
        data_of(written(frame(), tmp_path / "mine.csv")).train_features,
    )


@pytest.mark.parametrize(
    "text",
    ["2026-11-24", "24.11.2026", "11/24/26", "2026-11-24T10:00:00Z", "24 Nov 2026", "Nov 24, 2026", "2026-11", "10:30"],
)
def test_dates(text):
    assert DATE.fullmatch(text)


@pytest.mark.parametrize("text", ["1.2.3", "10.0.0.1", "A-12", "555-1234", "size 10", "2026", "AT"])
def test_no_dates(text):
    assert not DATE.fullmatch(text)


@pytest.mark.parametrize("sampling", ["natural", "balanced", "pairs", "natural_pairs"])
def test_the_validation_loss_has_the_labels_that_training_has(sampling):
    """Of 25 validation anomalies 10 % are known, rounded up; the draws are those of training, every time the same."""
    data = AnomalyDataModule(sampling=sampling, val_share=0.2, eval_batch_size=100)
    data.setup("fit")
    scored, drawn = data.val_dataloader()
    x, truth = features_of(scored), labels_of(scored)
    assert (len(x), truth.sum()) == (252, 25)
    batches, again = list(drawn), list(drawn)
    assert all(
        torch.equal(a, b) for one, two in zip(batches, again, strict=True) for a, b in zip(one, two, strict=True)
    )
    rows, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    known = {tuple(row.tolist()) for row in rows.flatten(0, -2)[labels.flatten() == 1]}
    assert len(known) == 3
    assert known <= {tuple(row.tolist()) for row in x[truth == 1]}
    if sampling == "natural":
        assert torch.equal(rows.sum(0), x[torch.cat(list(drawn.sampler))].sum(0))
        assert (len(rows), labels.sum()) == (252, 3)
    elif sampling == "balanced":
        assert labels.double().mean() == 0.5
    elif sampling == "pairs":
        assert labels.sum(dim=1).bincount().div(len(labels)).tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_natural_batches_without_anomalies_are_told(tmp_path):
    path = written(frame(), tmp_path / "mine.csv")
    with pytest.warns(UserWarning, match=r"a batch of 5 samples holds 0.5 labelled .*raise batch_size to 10$"):
        data_of(path, batch_size=5)


def test_training_batches_start_anywhere(digits):
    digits.sampling, digits.batches_per_epoch = "balanced", 4
    whole = digits.train_dataloader()
    whole.sampler.set_epoch(3)
    batches = iter(whole)
    first = [next(batches), next(batches)]
    state = whole.state_dict()
    assert (state["epoch"], state["batch"]) == (3, 2)
    other = digits.train_dataloader()
    other.load_state_dict(state)
    rest = list(other)
    assert len(first) + len(rest) == 4
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, rest, strict=True))
    digits.batch_size = 8
    with pytest.raises(SettingError, match=r"batch_size gives 8 samples .* saved mid-epoch with 64: keep"):
        digits.train_dataloader().load_state_dict(state)


# ---- what is refused, one line each


def broken(change):
    def make(path):
        table = frame()
        return written(change(table), path / "mine.csv")

    return make


def text_file(text, name="mine.csv"):
    def make(path):
        (path / name).write_text(text)
        return path / name

    return make


def with_column(name, values):
    return broken(lambda table: table.assign(**{name: values}))


def _infinite(table):
    table.loc[[9, 11], "amount"] = np.inf
    return table


REFUSED = {
    "text": (
        with_column("note", [f"note {row}" for row in range(200)]),
        {},
        "mine.csv: column note is text with 140 values in the training part (note 0, note 10, note 100 and 137 more), "
        "more than 100: group them; fix it, or leave it out: --data.drop_columns '[\"note\"]'",
    ),
    "numbers with something else": (
        with_column("price", [*["3", "4", "?", "n/k"] * 5, *[f"{row % 7}" for row in range(180)]]),
        {},
        "first '?': leave them empty where missing; fix it, or leave it out: --data.drop_columns '[\"price\"]'",
    ),
    "dates of few days": (
        with_column("day", [f"2026-11-{1 + row % 24:02}" for row in range(200)]),
        {},
        "mine.csv: column day holds dates (2026-11-",
    ),
    "several at once": (
        broken(
            lambda table: _infinite(table).assign(
                **{
                    "transaction id": [f"t{row}" for row in range(200)],
                    "date": [f"{1 + row % 9}.11.2026" for row in range(200)],
                }
            )
        ),
        {"drop_columns": ["hour"]},
        '--data.drop_columns \'["hour", "amount", "transaction id", "date"]\'',
    ),
    "infinite": (
        broken(_infinite),
        {},
        "mine.csv: column amount is infinite in 2 rows, first in data row 10: write a number there, or nothing where "
        "the value is missing",
    ),
    "one class": (
        broken(lambda table: table.assign(fraud=0)),
        {},
        "mine.csv: label fraud is 0 in every row: add rows with another value",
    ),
    "no label known": (
        broken(lambda table: table),
        {"labelled_share": 0.0},
        "labelled_share is 0.0: give a number in (0, 1]",
    ),
    "3 rows": (
        broken(lambda table: pd.concat([table[table.fraud == 1][:1], table[table.fraud == 0][:2]])),
        {},
        "mine.csv has 3 rows, 1 of them anomalies: training and test need at least one anomaly and one other row each",
    ),
    "too few for validation": (
        broken(lambda table: table[(table.fraud == 0) | (table.fraud.cumsum() < 3)]),
        {"val_share": 0.2},
        "rows, 2 of them anomalies: training, validation and test need",
    ),
    "header only": (text_file("amount,fraud\n"), {}, "mine.csv has 0 rows and 1 columns beside the label"),
    "empty": (text_file(""), {}, "mine.csv, which is no table (No columns to parse from file)"),
    "ragged": (text_file("a,fraud\n1,0\n1,2,3,4\n"), {}, "mine.csv, which is no table (Error tokenizing data."),
    "twice": (text_file("a,a,fraud\n1,2,0\n"), {}, "mine.csv has more than one column a: rename all but one"),
    "no such label": (
        broken(lambda table: table),
        {"label": "is_fraud"},
        "label is is_fraud, which mine.csv does not have: it has amount, hour, country, currency, fraud",
    ),
    "label not named": (
        broken(lambda table: table),
        {"label": None},
        "label is null: name the column of mine.csv that says which rows are anomalies",
    ),
    "three values": (
        broken(lambda table: table.assign(fraud=table.hour % 3)),
        {},
        "mine.csv: label fraud has 3 values (0, 1, 2): set anomaly_value to the anomalies'",
    ),
    "as often": (
        broken(lambda table: table.assign(fraud=["yes", "no"] * 100)),
        {},
        "mine.csv: label fraud is no as often as yes: set anomaly_value to the anomalies'",
    ),
    "no such value": (
        broken(lambda table: table),
        {"anomaly_value": "yes"},
        "anomaly_value is yes: give a value of fraud in mine.csv: 0, 1",
    ),
    "label with gaps": (
        broken(lambda table: table.assign(fraud=table.fraud.where(table.hour > 0))),
        {},
        "mine.csv: label fraud is missing in",
    ),
    "no such column": (
        broken(lambda table: table),
        {"drop_columns": ["id"]},
        "drop_columns has id, which mine.csv does not have: it has amount, hour, country, currency",
    ),
    "nothing varies": (
        broken(lambda table: table[["currency", "fraud"]]),
        {},
        "mine.csv has no column that varies in the training part: add one",
    ),
    "no file": (lambda path: path / "none.csv", {}, "none.csv: there is no such file"),
    "suffix": (
        text_file("", "mine.xlsx"),
        {},
        "mine.xlsx: give a file that ends in .npz, .csv, .csv.gz, .tsv, .tsv.gz, .parquet",
    ),
    "no parquet": (text_file("amount", "mine.parquet"), {}, "mine.parquet, which is no table ("),
    "no npz": (text_file("amount", "mine.npz"), {}, "mine.npz, which is no npz file ("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    make, settings, message = REFUSED[case]
    with pytest.raises(SettingError) as error:
        data_of(make(tmp_path), **settings)
    line = str(error.value)
    assert message in line
    assert "\n" not in line


def test_dates_and_lists_are_refused_by_name(tmp_path):
    table = frame()
    dated = table.assign(day=pd.Timestamp("2026-11-24"))
    with pytest.raises(
        SettingError, match=r"mine.parquet: column day holds dates \(2026-11-24 00:00:00\): make numbers of"
    ):
        data_of(written(dated, tmp_path / "mine.parquet"))
    lists = table.assign(items=[[1, 2]] * len(table))
    with pytest.raises(SettingError, match=r"mine.parquet: column items holds ndarray: make numbers or text of it"):
        data_of(written(lists, tmp_path / "mine.parquet"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((9, 2))}, "mine.npz has no array X: it has x"),
        ({"X": np.zeros((9, 2))}, "label is y, which mine.npz does not have: it has x0, x1"),
        ({"X": np.zeros(9), "y": np.zeros(9)}, r"mine.npz has X \(9,\), y \(9,\): give X of shape"),
        ({"X": np.zeros((9, 2)), "y": np.zeros(8)}, r"mine.npz has X \(9, 2\), y \(8,\): give X of shape"),
        ({"X": np.array([[{}]]), "y": np.zeros(1)}, "mine.npz, which is no npz file .*: give one of plain arrays"),
        (
            {"X": np.zeros((9, 2), dtype=complex), "y": np.arange(9) % 2},
            "mine.npz: column x0 holds complex128: make numbers or text of it; column x1",
        ),
    ],
)
def test_npz_files_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(SettingError, match=message):
        data_of(tmp_path / "mine.npz", label=None)


def test_new_files_that_are_refused(tmp_path):
    old = data_of(written(frame(), tmp_path / "old.csv"))

    def scored(table, load=True):
        new = AnomalyDataModule(path=written(table, tmp_path / "new.csv"))
        new.setup("predict")
        if load:
            new.load_state_dict(old.state_dict())
        return new.predict_dataloader()

    with pytest.raises(SettingError, match="ckpt_path is null: give the checkpoint"):
        scored(frame(), load=False)
    with pytest.raises(SettingError, match=r"new.csv lacks columns that the model was trained on: hour, country"):
        scored(frame().drop(columns=["hour", "country"]))
    with pytest.raises(SettingError, match=r"new.csv holds text where the training part held numbers: hour \('noon'\)"):
        scored(frame().assign(hour=["noon", *["3"] * 199]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "half"}, "sampling is 'half': choose one of natural, balanced, pairs, natural_pairs"),
        ({"sampling": "pairs", "batch_size": 3}, "batch_size is 3: give a whole number from 4"),
        ({"batches_per_epoch": 0}, "batches_per_epoch is 0: give"),
        ({"test_share": 1.0}, r"test_share is 1.0: give a number in \(0, 1\)"),
        ({"test_share": 0.0}, "test_share is 0.0: give"),
        ({"val_share": 1.0}, "val_share is 1.0: give"),
        ({"min_rows": 1000, "max_rows": 10}, "max_rows is 10: give a whole number from 1000"),
        ({"seed": -1}, "seed is -1: give"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        AnomalyDataModule(**settings)
