"""Tree ensembles on the splits of anomaly_table.py, and the table of what every method has finished."""

import csv
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import average_precision_score

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))  # it imports anomaly_table
    try:
        spec = importlib.util.spec_from_file_location("anomaly_trees", ROOT / "scripts" / "anomaly_trees.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture
def folder(tmp_path):
    """A table with 1,000 rows, so that ADBench's protocol does not resample it, and the tuned rhos."""
    random = np.random.default_rng(0)
    y = (np.arange(1000) < 100).astype(int)
    np.savez(tmp_path / "small.npz", X=(random.normal(size=(1000, 3)) + y[:, None]).astype(np.float32), y=y)
    shutil.copy(ROOT / "results/anomaly/tuning.csv", tmp_path)
    return tmp_path


def test_the_forest_sees_the_splits_and_known_labels_of_the_table(script, folder, capsys):
    arguments = [str(folder), "--out", str(folder), "--seeds", "1", "--methods", "RandomForestClassifier"]
    script.main(arguments)
    with (folder / "trees.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["labelled_share"] for row in rows] == ["0.1", "1.0"]
    assert "| RandomForestClassifier |" in capsys.readouterr().out
    for row in rows:
        data = script.data_module(folder / "small.npz", float(row["labelled_share"]), 0)
        data.setup("fit")
        val, known = data.val_dataloader()
        x, y = np.vstack([data.train_features, val.features]), np.concatenate([data.train_labels, known.labels])
        assert y.sum() == (70 if row["labelled_share"] == "1.0" else 8), "of 56 and 14, a tenth of each rounded up"
        test = data.test_dataloader()
        forest = RandomForestClassifier(random_state=0).fit(x, y)
        expected = average_precision_score(test.labels, forest.predict_proba(test.features.numpy())[:, 1])
        assert float(row["average_precision"]) == pytest.approx(expected, abs=1e-6)
    before = (folder / "trees.csv").read_text()
    script.main(arguments)
    assert (folder / "trees.csv").read_text() == before, "finished fits are not repeated"


def test_the_table_compares_what_every_method_has(script):
    def row(method, data, share, precision):
        return {"method": method, "data": data, "labelled_share": share, "seed": "0", "average_precision": precision}

    rows = [row("RandomForestClassifier", data, "0.1", p) for data, p in (("a", "0.2"), ("b", "0.4"), ("c", "0.9"))]
    rows += [row("devnet, sgd", data, "0.1", p) for data, p in (("a", "0.5"), ("b", "0.7"))]
    rows += [row("RandomForestClassifier", "a", "1.0", "0.8"), row("XGBOD", "a", "0.1", "0.1")]
    table = script.table(rows)
    assert "| 10 % labelled, 2 data sets (2 that nothing was chosen on) | all labelled, 1 data sets" in table
    assert "| RandomForestClassifier | 30.0 (30.0) | 80.0 (80.0) |" in table
    assert "| devnet, sgd | 60.0 (60.0) |  |" in table
    assert "XGBOD" not in table, "it has fewer than half of the fits"


def test_a_package_that_is_not_installed_is_named(script, folder, capsys):
    if not script.unavailable("XGBOD"):
        pytest.skip("PyOD is installed")
    script.main([str(folder), "--out", str(folder), "--methods", "XGBOD", "IsolationForest, no labels", "--seeds", "1"])
    assert "XGBOD is left out: No module named 'pyod': pip install pyod xgboost" in capsys.readouterr().err


def test_without_tuned_rhos_it_says_what_to_run(script, tmp_path):
    with pytest.raises(SystemExit, match=r"has no rho: run anomaly_table.py --tune first"):
        script.main([str(tmp_path), "--out", str(tmp_path), "--table"])
