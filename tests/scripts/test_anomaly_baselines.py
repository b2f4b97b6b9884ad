"""The table of the baselines: means over whole seeds, the same samples for every method."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import average_precision_score
from sklearn.model_selection import train_test_split

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "anomaly_baselines.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("anomaly_baselines", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_unfinished_seed_does_not_count(script):
    rows = [
        dict(zip(script.COLUMNS, ("forest", data, str(share), seed, ap), strict=True))
        for seed, ap in (("0", "0.25"), ("1", "0.75"))
        for share in script.SHARES
        for data in script.TABLES
    ]
    assert "| forest | 2 | 50.0 (50 / 50 / 50 / 50 / 50) | 50.0 (" in script.table(rows)
    assert "| forest | 1 | 25.0 (25 / 25 / 25 / 25 / 25) | 25.0 (" in script.table(rows[:-1])


def test_an_estimator_trains_on_all_samples_but_the_test_part(script, tmp_path):
    random = np.random.default_rng(0)
    y = (np.arange(200) < 40).astype(int)
    x = (random.normal(size=(200, 3)) + y[:, None]).astype(np.float32)
    np.savez(tmp_path / "small.npz", X=x, y=y)
    found = script.estimator(RandomForestClassifier, tmp_path / "small.npz", 1.0, 0)
    kept, test = train_test_split(np.arange(200), test_size=0.3, stratify=y, random_state=np.random.RandomState(0))
    train, val = train_test_split(kept, test_size=0.2, stratify=y[kept], random_state=_after_the_first_split(y))
    rows = np.concatenate([train, val])
    forest = RandomForestClassifier(random_state=0).fit(x[rows], y[rows])
    assert found == pytest.approx(average_precision_score(y[test], forest.predict_proba(x[test])[:, 1]))


def _after_the_first_split(y):
    random = np.random.RandomState(0)
    train_test_split(np.arange(200), test_size=0.3, stratify=y, random_state=random)
    return random
