"""Drift by the command: what is kept when a training ends, and what predict says of new rows."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_modules.cli.run import main
from tests.pieces import anomaly, configs

DETECTOR = [*anomaly("devnet", "sgd"), "--trainer.max_epochs=3", "--data.batches_per_epoch=10"]
CLASSIFIER = [*configs("data/digits_lt", "method/sgd"), "--trainer.max_epochs=8", "--data.ratio=2"]
CLASSIFIER += ["--data.val_share=0.3", "--drift.alpha=0.01"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The last checkpoints of a detector with and without a reference, of a classifier, and of no validation part."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {
        "detector": [*DETECTOR, "--drift.alpha=0.01"],
        "plain": DETECTOR,
        "unvalidated": [*DETECTOR, "--data.val_share=0"],
        "classifier": CLASSIFIER,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, args in wanted.items():
            logger = [f"--trainer.logger.init_args.{key}={name}" for key in ("name", "version")]
            patch.setattr(sys, "argv", ["imbsam", "fit", *args, *logger])
            main()
    return {name: folder / f"logs/{name}/{name}/checkpoints/last.ckpt" for name in wanted}


def write(path, pixels, names=None):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names or [f"x{i}" for i in range(64)])
        writer.writerows(pixels.tolist())


def predict(imbsam, checkpoint, *more):
    code, out, err = imbsam("predict", "--ckpt_path", checkpoint, "--predictions.path=new.csv", *more)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("drift: ")]
    return line, json.loads(Path("new.drift.json").read_text())


def test_new_rows_of_a_detector(imbsam, runs):
    """The numbers are those of the scores in the predictions' file; noise and more anomalies are found."""
    pixels, digit = load_digits(return_X_y=True)
    write("same.csv", pixels)
    line, facts = predict(imbsam, runs["detector"], "--data.predict=same.csv")
    assert line.startswith("drift: none found: scores moved by 0.")
    assert "with 252 validation rows, no distance below 0.12 can be told from chance (new.drift.json)" in line
    assert not facts["drift"]
    kept = torch.load(runs["detector"], weights_only=True)["callbacks"]["Drift"]["fitted"]
    assert kept["scores"].dtype == torch.float32
    assert kept["scores"].shape == (252,)
    with open("new.csv", newline="") as file:
        scores = np.array([float(row["score"]) for row in csv.DictReader(file)])
    old = kept["scores"].numpy()
    distance = max(abs((old <= s).mean() - (scores <= s).mean()) for s in np.concatenate([old, scores]))
    assert facts["tests"][0]["effect"] == pytest.approx(distance, abs=0.005)
    assert facts["quantiles"]["0.5"]["now"] == pytest.approx(np.median(scores), abs=1e-3)

    write("noisy.csv", pixels + np.random.default_rng(0).normal(0, 6, pixels.shape))
    line, facts = predict(imbsam, runs["detector"], "--data.predict=noisy.csv")
    assert line.startswith("drift: these 1,797 rows are not like the validation part: ")
    assert facts["drift"]

    write("frauds.csv", np.concatenate([pixels, pixels[digit == 0], pixels[digit == 0]]))
    line, facts = predict(imbsam, runs["detector"], "--data.predict=frauds.csv")
    assert facts["tests"][1]["significant"]
    assert facts["tests"][1]["effect"] > 1.8


def test_new_images_of_a_classifier(imbsam, runs):
    """The class shares are those of the predictions' file and of the validation part."""
    _, facts = predict(imbsam, runs["classifier"])
    assert [test["quantity"] for test in facts["tests"]] == ["probability of the predicted class", "predicted classes"]
    with open("new.csv", newline="") as file:
        predicted = [row["predicted"] for row in csv.DictReader(file)]
    kept = torch.load(runs["classifier"], weights_only=True)["callbacks"]["Drift"]["fitted"]
    for index, (name, shares) in enumerate(facts["class_shares"].items()):
        assert shares["now"] == pytest.approx(predicted.count(name) / len(predicted), abs=1e-5)
        assert shares["validation"] == pytest.approx(float(kept["counts"][index] / kept["counts"].sum()), abs=1e-5)


def test_decide_adds_it_to_a_finished_run(imbsam, runs, tmp_path):
    last = Path(shutil.copy(runs["plain"], tmp_path / "last.ckpt"))
    code, _, err = imbsam("predict", "--ckpt_path", last, "--predictions.path=none.csv")
    assert code == 0, err
    assert not Path("none.drift.json").exists(), "nothing is compared that was not asked for"
    code, _, err = imbsam("decide", "--ckpt_path", last, "--drift.alpha=0.01")
    assert code == 0, err
    line, _ = predict(imbsam, last.with_name("decided.ckpt"))
    assert line.startswith("drift: none found")
    kept, trained = (torch.load(path, weights_only=True) for path in (last.with_name("decided.ckpt"), runs["detector"]))
    ours, theirs = (c["callbacks"]["Drift"]["fitted"]["scores"] for c in (kept, trained))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_validation_part_without_samples_of_a_class_will_do(imbsam, tmp_path):
    """Nothing is asked of its labels; a detector's data refuse such a split themselves."""
    code, _, err = imbsam("fit", *CLASSIFIER, "--data.ratio=100", "--data.val_share=0.05", "--trainer.max_epochs=1")
    assert code == 0, err
    kept = torch.load(tmp_path / "logs/digits_lt/sgd/version_0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert kept["Drift"]["fitted"]["rows"] < 25


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", *DETECTOR, "--data.val_share=0", "--drift.alpha=0.01"], "data.val_share is 0, and drift is fitted on"),
        (
            ["fit", *DETECTOR, "--data.path=few.csv", "--data.label=x0", "--data.val_share=0.1"],
            "validation part gets 0",
        ),
        (["fit", *DETECTOR, "--drift.alpha=5"], "alpha is 5"),
        (["fit", *DETECTOR, "--drift.alpha=0.01", "--drift.material=10"], "material is 10"),
        (["predict", "plain", "--drift.alpha=0.01"], "drift.alpha is 0.01, and the checkpoint has none: leave it out"),
        (["decide", "unvalidated", "--drift.alpha=0.01"], "data.val_share is 0: the run has no validation part"),
        (["predict", "detector", "--data.predict=other.csv"], "other.csv"),
    ],
)
def test_what_cannot_be_compared_is_one_line(args, message, imbsam, runs):
    write("few.csv", np.column_stack([np.arange(303) < 3, np.random.default_rng(0).random((303, 63))]))
    write("other.csv", np.ones((5, 2)), ["amount", "country"])
    if args[0] != "fit":
        args = [args[0], "--ckpt_path", runs[args[1]], *args[2:]]
    code, _, err = imbsam(*args)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("imbsam: error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(Path().glob("*.drift.json"))
