"""The anomaly table: a short grid on two small data sets, resumed, and its table."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pieces import merged

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "anomaly_table.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("anomaly_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "anomaly_table", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adbench(tmp_path):
    """Two tables in ADBench's format."""
    random = np.random.default_rng(0)
    for name, d in (("Classical/1_small", 3), ("NLP_by_BERT/other_0", 5)):
        path = tmp_path / f"adbench/{name}.npz"
        path.parent.mkdir(parents=True)
        y = (np.arange(300) < 60).astype(int)
        np.savez(path, X=random.normal(size=(300, d)) + y[:, None], y=y)
    return tmp_path / "adbench"


def row(
    script, data, detector, sampling, method, seed, ap, rho=0.0, seconds=1.0, max_epochs=200, learned=1.0, constant=0
):
    values = dict(zip(script.COLUMNS, (data, detector, sampling, method, rho, seed, max_epochs), strict=True))
    return {name: str(value) for name, value in values.items()} | {
        "auroc": str(ap),
        "average_precision": str(ap),
        "train_auroc": "0.9",
        "train_loss": "1",
        "learned": str(learned),
        "constant": str(constant),
        "steps": "750",
        "seconds": str(seconds),
    }


def test_finished_fits_are_not_repeated(script, adbench, tmp_path, monkeypatch):
    """The fits run in this process here; `run_missing` starts others."""
    ran = []

    class InThisProcess:
        def __init__(self, workers, initializer):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def imap_unordered(self, work, tasks):
            for task in tasks:
                ran.append(task[0])
                yield work(task)

    monkeypatch.setattr(
        script.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": InThisProcess})
    )
    fits = [
        script.Fit("Classical/1_small", "devnet", "own", "sgd", 0.0, 0, 1),
        script.Fit("NLP_by_BERT/other_0", "prenet", "own", "imbsam", 0.1, 0, 1),
    ]
    path = tmp_path / "fits.csv"
    script.run_missing(fits, path, adbench, workers=1)
    assert ran == fits
    rows = script.read(path)
    assert {tuple(r[c] for c in script.COLUMNS) for r in rows} == {fit.key() for fit in fits}
    assert all(0 <= float(r["auroc"]) <= 1 and float(r["seconds"]) > 0 for r in rows)
    assert all(0 <= float(r["learned"]) <= 1 and r["constant"] == "0" for r in rows)
    assert all(0 <= float(r["train_auroc"]) <= 1 for r in rows)

    # a crash mid-line: that fit alone is run again
    path.write_text(path.read_text()[:-20])
    script.run_missing(fits, path, adbench, workers=1)
    assert ran == [*fits, fits[1]]
    assert len(script.read(path)) == 2
    assert len(list(csv.reader(path.open()))) == 3

    # a tuning fit is the same training, judged on the validation part
    tuning = script.run(script.Fit("Classical/1_small", "devnet", "own", "sgd", 0.0, 0, 1, True), adbench)
    assert tuning["steps"] == 50
    assert tuning["train_loss"] == rows[0]["train_loss"]
    assert tuning["auroc"] != rows[0]["auroc"]


def test_auroc_of_labelled_leaves_out_hidden_anomalies(script):
    scores, labels, truth = map(torch.tensor, ([0.7, 0.9, 0.8, 0.1, 0.6], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]))
    assert script.auroc_of_labelled(scores, labels, truth) == pytest.approx(2 / 3)


def test_grid_is_seed_major_and_whole(script):
    variants = script.detector_variants(["classifier", "devnet"])
    assert variants == [("devnet", "own"), ("classifier", "own"), ("classifier", "natural")]
    fits = list(script.grid_fits(["a", "b"], range(2), variants, {}))
    assert len(fits) == len({fit.key() for fit in fits}) == 2 * 2 * 3 * 3
    assert [fit.seed for fit in fits] == sorted(fit.seed for fit in fits)


def test_best_rho_compares_like_with_like(script):
    """A data set that lacks a rho does not count, however good it is at the others."""
    score = dict.fromkeys(script.RHOS, 0.2) | {0.5: 0.4}
    assert len(score) == len(script.RHOS)
    rows = [row(script, "a", "devnet", "own", "imbsam", 0, ap, rho) for rho, ap in score.items()]
    rows += [row(script, "b", "devnet", "own", "imbsam", 0, 0.99, script.RHOS[0])]
    rows += [row(script, "a", "devnet", "own", "sgd", 0, 0.9)]
    assert script.best_rhos(rows) == {("devnet", "own", "imbsam"): 0.5}
    assert "**40.0**" in script.tuning_table(rows)


def test_table(script):
    values = {"a": (0.5, 0.6, 0.8), "b": (0.5, 0.4, 0.4), "c": (0.5, 0.5, 0.5)}
    rows = [
        row(script, data, "devnet", "own", method, seed, ap, seconds=1 + n)
        for data, three in values.items()
        for n, (method, ap) in enumerate(zip(script.METHODS, three, strict=True))
        for seed in (0, 1)
    ]
    rows.append(row(script, "a", "devnet", "own", "sgd", 2, 0.0))  # a seed that the other methods lack
    text = script.table(rows)
    assert "| devnet | own | 3 x 2 | 0.0 / 0.0 | 50.0 | 50.0 | 56.7 | 1 / 1 / 1, " in text
    assert " | 100 / 100 / 100 | 0 / 0 / 0 of 6 |" in text
    assert "| devnet | own | 750 / 750 / 750 | 1.00 (1.00) | 2.00 (2.00) | 3.00 (3.00) |" in text
    assert "| devnet | own | 3 x 2 | 90.0 | 90.0 | 90.0 | 40.0 | 40.0 | 33.3 | 1 / 1 / 1, " in text
    assert "| a | 50.0 / 60.0 / 80.0 |" in text


def test_gap_between_training_and_test(script):
    aps = zip(script.METHODS, (0.5, 0.6, 0.8), strict=True)
    rows = [row(script, data, "devnet", "own", method, 0, ap) for method, ap in aps for data in "ab"]
    assert "| devnet | own | 2 x 1 | 90.0 | 90.0 | 90.0 | 40.0 | 30.0 | 10.0 | 2 / 0 / 0, " in script.table(rows)


def test_table_without_the_tuning_sets_marks_what_was_not_learned(script):
    tuned = script.TUNING_SETS[0]
    rows = [row(script, tuned, "devnet", "own", method, 0, 0.9) for method in script.METHODS]
    rows += [row(script, "other", "devnet", "own", m, 0, 0.5, learned=0.2, constant=1) for m in script.METHODS]
    overall, without = script.table(rows).split("without the 4 data sets")[:2]
    assert "| devnet | own, not learned | 2 x 1 | 0.0 / 0.0 | 70.0 |" in overall
    assert "| devnet | own, not learned | 1 x 1 | 0.0 / 0.0 | 50.0 |" in without
    assert " | 20 / 20 / 20 | 1 / 1 / 1 of 1 |" in without


def test_short_trials_and_other_rhos_stay_out_of_the_table(script):
    rows = [
        row(script, "a", "devnet", "own", "imbsam", 0, 0.1, rho, max_epochs=n) for rho in (0.05, 0.2) for n in (5, 200)
    ]
    rows += [row(script, "a", "devnet", "own", "sgd", 0, 0.1)]
    kept = script.select_rhos(script.select_max_epochs(rows), {("devnet", "own", "imbsam"): 0.05})
    assert [(r["method"], r["rho"], r["max_epochs"]) for r in kept] == [
        ("imbsam", "0.05", "200"),
        ("sgd", "0.0", "200"),
    ]
    assert len(script.select_max_epochs(rows, 5)) == 2
    one, other = (script.Fit("a", "devnet", "own", "sgd", 0.0, 0, n).key() for n in (5, 200))
    assert one != other


def test_the_table_has_the_requested_seeds(script, adbench, tmp_path, monkeypatch, capsys):
    rho = script.RHOS[1]
    rows = [
        row(script, "a", "devnet", "own", method, seed, 0.5, 0.0 if method == "sgd" else rho)
        for method in script.METHODS
        for seed in range(3)
    ]
    tuning = [
        row(script, "a", "devnet", "own", m, 0, 0.9 if r == rho else 0.5, r)
        for m in ("sam", "imbsam")
        for r in script.RHOS
    ]
    for name, lines in (("fits", rows), ("tuning", tuning)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    for seeds in (2, 5):
        monkeypatch.setattr(sys, "argv", ["x", str(adbench), "--table", "--seeds", str(seeds), "--out", str(tmp_path)])
        with pytest.raises(SystemExit, match="0"):
            script.main()
        assert f"| devnet | own | 1 x {min(seeds, 3)} |" in capsys.readouterr().out


@pytest.mark.parametrize("detector", ["devnet", "deep_sad", "prenet", "feawad", "classifier"])
def test_the_recipe_matches_the_configs(script, detector):
    config = merged("data/anomaly_table", f"detector/{detector}")
    recipe = script.RECIPES[detector, "own"]
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert model["optimizer"]["class_path"] == "torch.optim.Adam"
    assert model["optimizer"]["init_args"] == {"lr": recipe.lr, "fused": True} | (
        {"weight_decay": recipe.weight_decay} if recipe.weight_decay else {}
    )
    assert model["detector"].get("init_args", {}) == recipe.args
    assert data == {
        "sampling": recipe.sampling,
        "batch_size": recipe.batch_size,
        "batches_per_epoch": script.BATCHES_PER_EPOCH,
        "val_share": script.VAL_SHARE,
    }
    assert trainer["max_epochs"] >= script.MAX_EPOCHS
    (stopping,) = trainer["callbacks"]
    assert stopping["class_path"] == "RestoringEarlyStopping"
    assert stopping["init_args"]["patience"] == script.PATIENCE


def test_a_failed_fit_exits_with_1(script, adbench, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TUNING_SETS", ("Classical/1_small",))
    monkeypatch.setattr(script, "run_missing", lambda *args: 1)
    with pytest.raises(SystemExit) as stop:
        script.main([str(adbench), "--out", str(tmp_path), "--tune"])
    assert stop.value.code == 1


def test_command_line_names_what_is_missing(script, adbench, tmp_path):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="run --tune first"):
        script.main([str(adbench), *out])
    with pytest.raises(SystemExit, match="lacks data sets to tune rho on: CV_by_ResNet18/CIFAR10_0"):
        script.main([str(adbench), *out, "--tune"])
    with pytest.raises(SystemExit, match="no npz file"):
        script.main([str(tmp_path / "none"), *out])
