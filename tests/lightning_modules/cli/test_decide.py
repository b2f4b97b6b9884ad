"""`imbsam decide`: thresholds, costs, coverage and calibration chosen again from a finished run."""

import csv
import shutil
import sys

import pytest
import torch

from lightning_modules.cli.run import main
from tests.pieces import anomaly, configs

FIT = {"thresholds": ["--calibration.method=isotonic", "--decisions.recall=0.6"], "plain": []}
DETECTOR = [*anomaly("devnet", "sgd"), "--trainer.max_epochs=2", "--data.batches_per_epoch=5"]
CLASSIFIER = [
    *configs("data/digits_lt", "method/sgd"),
    "--trainer.max_epochs=3",
    "--data.ratio=10",
    "--data.val_share=0.3",
    "--calibration.method=temperature",
    '--decisions.recall={"7": 0.5}',
]
MULTI_LABEL = [*configs("data/digits_multilabel", "method/sgd"), "--trainer.max_steps=1", "--data.val_share=0.2"]
WEIGHTED = [
    "--data.sampling=class_balanced",
    "--trainer.callbacks+=DeferredReweighting",
    "--trainer.callbacks.start_epoch=2",
]
"""What the prior's correction must undo: the sampling is a setting of the data, the weights are a callback's."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The last checkpoints of a detector with and without a fit, of a classifier, and of one without validation."""
    folder = tmp_path_factory.mktemp("runs")
    wanted = {name: [*DETECTOR, *more] for name, more in FIT.items()}
    wanted |= {
        "classifier": CLASSIFIER,
        "weighted": [*CLASSIFIER, *WEIGHTED],
        "unvalidated": [*DETECTOR, "--data.val_share=0"],
        "multi-label": MULTI_LABEL,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, args in wanted.items():
            logger = [f"--trainer.logger.init_args.{key}={name}" for key in ("name", "version")]
            patch.setattr(sys, "argv", ["imbsam", "fit", *args, *logger])
            main()
    return {name: folder / f"logs/{name}/{name}/checkpoints/last.ckpt" for name in wanted}


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run's checkpoint."""

    def copy(name):
        path = tmp_path / "checkpoints/last.ckpt"
        path.parent.mkdir()
        return shutil.copy(runs[name], path)

    return copy


def fits(path):
    saved = torch.load(path, weights_only=True)["callbacks"]
    return {name: saved[name]["fitted"] for name in ("Calibration", "Decisions") if saved.get(name)}


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_it_finds_what_the_training_found_and_predict_and_test_use_it(imbsam, run, runs):
    """With a user's defaults, in a run that was trained without calibration and decisions."""
    last = run("plain")
    before = last.read_bytes()
    code, out, err = imbsam("decide", "--ckpt_path", last, *FIT["thresholds"])
    assert code == 0, err
    assert "recall 0.6" in out
    assert "60 % [38.7" in out, "the interval of 15 in 25"
    new = last.with_name("decided.ckpt")
    assert f"imbsam: wrote {new}" in out
    assert same(fits(new), fits(runs["thresholds"]))
    assert last.read_bytes() == before
    kept, found = (torch.load(path, weights_only=True) for path in (last, new))
    assert kept.keys() == found.keys()
    assert same(kept["state_dict"], found["state_dict"])

    code, _, err = imbsam("predict", "--ckpt_path", new, "--predictions.path=p.csv")
    assert code == 0, err
    with open("p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "score", "alarm", "probability"]
    limit = fits(new)["Decisions"]["thresholds"][1]["value"]
    alarms = [float(row["score"]) for row in rows if row["alarm"] == "1"]
    assert min(alarms) == pytest.approx(limit, rel=1e-3)
    code, out, err = imbsam("test", "--ckpt_path", new)
    assert code == 0, err
    assert "what the validation part promised" in out
    assert not list(last.parents[1].glob("decide_*")), "it leaves no folder"


def test_what_is_not_set_is_as_in_the_checkpoint(imbsam, run):
    last = run("classifier")
    old = fits(last)
    code, _, err = imbsam("decide", "--ckpt_path", last, "--decisions.coverage=0.8")
    assert code == 0, err
    new = fits(last.with_name("decided.ckpt"))
    assert same(new["Calibration"], old["Calibration"])
    assert new["Decisions"]["settings"] == {"coverage": 0.8, "confidence": 0.95}

    code, _, err = imbsam("decide", "--ckpt_path", last, "--calibration.prior=balanced", "--decisions.confidence=0.9")
    assert code == 0, err
    new = fits(last.with_name("decided-v1.ckpt"))
    assert new["Calibration"]["settings"] == {"method": "temperature", "prior": "balanced", "penalty": 1.0}
    assert new["Decisions"]["settings"] == {"recall": {"7": 0.5}, "confidence": 0.9}
    old_limit, limit = (found["Decisions"]["thresholds"][7]["value"] for found in (old, new))
    assert limit != old_limit, "by the new probabilities"

    code, _, err = imbsam("decide", "--ckpt_path", last, "--calibration.method=vector", "--output=mine.ckpt")
    assert code == 0, err
    assert fits("mine.ckpt")["Calibration"]["method"] == "vector"


@pytest.mark.parametrize("name", ["classifier", "weighted"])
def test_a_checkpoint_of_before_the_end_gets_a_fit(imbsam, run, name):
    """best.ckpt has the settings, and nothing fitted; loss weights and sampling are undone as at the training's end."""
    last = run(name)
    early = torch.load(last, weights_only=True)
    for name in ("Calibration", "Decisions"):
        early["callbacks"][name]["fitted"] = None
    torch.save(early, last.with_name("best.ckpt"))
    code, _, err = imbsam("decide", "--ckpt_path", last.with_name("best.ckpt"))
    assert code == 0, err
    assert same(fits(last.with_name("decided.ckpt")), fits(last))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("plain", [], "it has neither calibration nor decisions: say what to fit, with --decisions.recall"),
        ("unvalidated", ["--decisions.recall=0.9"], "data.val_share is 0: the run has no validation part to decide by"),
        ("plain", ["--decisions.recall=0.9", "--data.val_share=0.4"], "data.val_share is 0.4 and the checkpoint was"),
        ("plain", ["--decisions.recall=0.9", "--data.seed=1"], "data.seed is 1 and the checkpoint was trained with 0"),
        ("classifier", ["--decisions.recall={cat: 0.9}"], "there is no class cat: choose of 0, 1"),
        ("plain", ["--decisions.costs=[[0, 1], [20, 0]]"], "needs probabilities, which a detector has none of"),
        ("plain", ["--decisions.recall=2"], "recall is 2"),
        ("multi-label", ["--calibration.method=temperature"], "not for MultiLabelClassifier: leave it out"),
        ("multi-label", ["--decisions.coverage=0.9"], "decisions is set, and it is for samples of one class each"),
        ("multi-label", ["--drift.alpha=0.05"], "drift is set, and it is for samples of one class each"),
        ("plain", ["--decisions.recall=0.9", "--output=checkpoints/last.ckpt"], "there is such a file, and decide"),
    ],
)
def test_what_cannot_be_decided_is_one_line_and_writes_nothing(name, settings, message, imbsam, run):
    last = run(name)
    code, _, err = imbsam("decide", "--ckpt_path", last, *settings)
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("imbsam: error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("sharpness", "plain", "whose model is AnomalyDetector: sharpness is measured by groups of classes"),
        ("sharpness", "multi-label", "model is MultiLabelClassifier: sharpness is measured by groups of samples"),
        ("features", "plain", "model is AnomalyDetector: features are computed by a LongTailedClassifier"),
    ],
)
def test_other_commands_refuse_the_model_in_one_line(command, name, message, imbsam, run):
    code, _, err = imbsam(command, "--ckpt_path", run(name), "--trainer.enable_progress_bar=false")
    assert code == 2, err
    assert message in err.splitlines()[-1]


def test_a_goal_that_cannot_be_met_names_the_best(imbsam, run):
    """The scores of an untrained detector: all equal."""
    last = run("plain")
    flat = torch.load(last, weights_only=True)
    for value in flat["state_dict"].values():
        value.zero_()
    torch.save(flat, last)
    code, _, err = imbsam("decide", "--ckpt_path", last, "--decisions.precision=0.9")
    assert code == 2
    assert "imbsam: error: no threshold for anomaly: precision is 0.9: the best on the validation part is 0.09" in err
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
