"""The `imbsam` command, run in this process on the digits."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.training import csv_rows

REPOSITORY = Path(__file__).resolve().parents[3]
DIGITS = ["--config", "configs/data/digits_lt.yaml", "--trainer.enable_model_summary=false"]
SHORT = [
    *DIGITS,
    "--trainer.max_epochs=1",
    "--model.lr_scheduler.init_args.T_max=1",
    "--trainer.enable_progress_bar=false",
]


def test_fit_test_validate_predict(imbsam, tmp_path):
    """From an empty folder: the config is looked up beside the installed packages."""
    code, out, _ = imbsam("fit", *SHORT)
    assert code == 0
    run = tmp_path / "logs/digits_lt/imbsam/version_0"
    for text in ("many", "medium", "few", "all", "ImbSAM", "checkpoint: logs/digits_lt/imbsam/version_0", "log: logs/"):
        assert text in out
    logged = csv_rows(run / "metrics.csv")
    accuracy = next(row["test/all"] for row in logged if row.get("test/all"))
    assert f"{100 * float(accuracy):.1f}" in out
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["sam"]["class_path"] == "imbsam.ImbSAM"
    )

    last = run / "checkpoints/last.ckpt"
    assert last.exists()
    assert "weights: of the last epoch (1)" in out
    assert not (run / "checkpoints/best.ckpt").exists()  # nothing is chosen on the test set
    code, out, _ = imbsam("test", *SHORT, "--ckpt_path", last)
    assert code == 0
    assert f"{100 * float(accuracy):.1f}" in out
    assert str(last) in out

    code, out, _ = imbsam("predict", *SHORT, "--ckpt_path", last, "--predictions.path", "found.csv")
    assert code == 0
    assert "predictions: found.csv" in out
    found = csv_rows("found.csv")
    assert len(found) == 540
    assert list(found[0]) == ["row", "predicted", *"0123456789"]
    assert [row["row"] for row in found[:2]] == ["1", "2"]
    assert sum(float(found[0][name]) for name in "0123456789") == pytest.approx(1, abs=1e-4)
    assert max("0123456789", key=lambda name: float(found[0][name])) == found[0]["predicted"]

    code, _, _ = imbsam("validate", *SHORT, "--ckpt_path", last, "--data.val_share=0.3")
    assert code == 0
    code, _, err = imbsam("validate", *SHORT, "--ckpt_path", last)
    assert (code, "data.val_share is 0" in err) == (2, True)


def test_last_and_best_epoch_are_kept_apart_and_named(imbsam, tmp_path):
    """The best is chosen by val/all, over an interruption too; the table says which weights it is of."""
    run = tmp_path / "logs/digits_lt/imbsam/version_0"
    validated = [*SHORT, "--data.val_share=0.3"]
    code, out, _ = imbsam("fit", *validated)
    assert (code, "weights: of the last epoch (1)" in out) == (0, True)
    assert "best on validation: epoch 1, val/all 0." in out
    code, out, _ = imbsam("fit", *validated, "--trainer.max_epochs=4", "--ckpt_path", run / "checkpoints/last.ckpt")
    scores = [float(row["val/all"]) for row in csv_rows(run / "metrics.csv") if row["val/all"]]
    best = 1 + scores.index(max(scores))
    assert (code, len(scores), "weights: of the last epoch (4)" in out) == (0, 4, True)
    found = f"best on validation: epoch {best}, val/all {max(scores):.4g}: imbsam "
    assert found in out
    command = out.split(found)[1].splitlines()[0].split()
    assert command[0] == "test"
    code, out, _ = imbsam(*command)
    assert (code, f"weights: of epoch {best}, the best by val/all ({max(scores):.4g})" in out) == (0, True)
    assert sorted(file.name for file in (run / "checkpoints").glob("best*")) == ["best.ckpt"]
    code, out, _ = imbsam("test", *command[1:3], "--ckpt_path", run / "checkpoints/last.ckpt")
    assert (code, "weights: after epoch 4" in out, "calibration error" in out) == (0, True, True)
    tested = [command[2], "--ckpt_path", run / "checkpoints/last.ckpt", "--model.flip_tta", "true"]
    code, flipped, _ = imbsam("test", "--config", *tested)  # a setting of the evaluation, not of the checkpoint
    numbers = [next(line for line in text.splitlines() if "calibration error" in line) for text in (out, flipped)]
    assert (code, numbers[0] != numbers[1]) == (0, True)


def test_ckpt_path_last_resumes_the_newest_run(imbsam, tmp_path):
    run = tmp_path / "logs/digits_lt/imbsam/version_0"
    last = run / "checkpoints/last.ckpt"
    code, out, _ = imbsam("fit", *SHORT, "--ckpt_path=last", "--trainer.log_every_n_steps=5")
    assert (code, "no run in logs/digits_lt/imbsam has a checkpoint yet: starting a new run" in out) == (0, True)
    log, config = (run / "metrics.csv").read_bytes(), (run / "config.yaml").read_bytes()

    code, out, _ = imbsam("fit", *SHORT, "--ckpt_path=last", "--trainer.log_every_n_steps=5")
    assert code == 0
    assert "the run is finished: 1 epochs" in out
    assert "test accuracy" in out
    assert ((run / "metrics.csv").read_bytes(), (run / "config.yaml").read_bytes()) == (log, config)
    code, out, _ = imbsam("fit", *SHORT, "--ckpt_path=last", "--model.capture=auto")  # as where another GPU is
    assert (code, "the run is finished: 1 epochs" in out) == (0, True)
    code, _, err = imbsam("fit", *SHORT, "--ckpt_path=last", "--model.sam.rho=0.3")
    assert code == 2
    assert "version_0 was trained with model.sam.rho 0.05, not 0.3" in err.splitlines()[-1]
    other = "--trainer.logger.init_args.version=other"
    code, out, _ = imbsam("fit", *SHORT, "--ckpt_path=last", "--model.sam.rho=0.3", other)
    assert (code, "starting a new run" in out) == (0, True)
    assert "rho: 0.3" in (run.parent / "other/config.yaml").read_text()
    code, _, err = imbsam("test", *SHORT, "--ckpt_path=last", "--trainer.logger.init_args.version=nowhere")
    assert (code, "has a checkpoint yet" in err) == (2, True)
    code, out, _ = imbsam("test", *SHORT, "--ckpt_path=last")
    assert (code, str(last.relative_to(tmp_path)) in out) == (0, True)

    more = ["--trainer.max_epochs=2", "--model.lr_scheduler.init_args.T_max=2"]  # the longer run, by its path
    code, out, _ = imbsam("fit", *SHORT, *more, "--ckpt_path", last)
    assert (code, "resuming at epoch 1, batch 0" in out) == (0, True)
    assert "T_max 1, not 2" in out
    assert (run / "checkpoints/previous.ckpt").exists()
    assert {path.name for path in run.parent.iterdir() if (path / "checkpoints").exists()} == {"version_0", "other"}

    last.write_bytes(last.read_bytes()[:-100])
    for args in (["--ckpt_path=last"], ["--ckpt_path", last]):
        code, _, err = imbsam("fit", *SHORT, *args)
        assert code == 2
        assert "last.ckpt: it is cut off" in err.splitlines()[-1]
        assert err.splitlines()[-1].endswith("logs/digits_lt/imbsam/version_0/checkpoints/previous.ckpt")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_a_training_writes_to_the_folder_of_a_run(imbsam, tmp_path):
    """A run with a name of its own, evaluated by its own config, which has the name in it."""
    named = "--trainer.logger.init_args.version=mine"
    assert imbsam("fit", *SHORT, named, "--data.val_share=0.3", "--trainer.log_every_n_steps=1")[0] == 0
    runs = tmp_path / "logs/digits_lt/imbsam"
    before = files(runs / "mine")
    evaluation = ["--config", runs / "mine/config.yaml", "--ckpt_path=last"]
    for command in ("test", "validate", "predict", "test"):
        code, out, err = imbsam(command, *evaluation)
        assert (code, str((runs / "mine/checkpoints/last.ckpt").relative_to(tmp_path)) in out) == (0, True), err
    assert files(runs / "mine") == before
    assert {path.name for path in runs.iterdir()} == {"mine", "test_0", "test_1", "validate_0", "predict_0"}
    assert csv_rows(runs / "test_0/metrics.csv")[0]["test/all"] == csv_rows(runs / "test_1/metrics.csv")[0]["test/all"]
    assert len(csv_rows(runs / "predict_0/predictions.csv")) == 540

    code, _, err = imbsam("fit", *SHORT, named)
    assert code == 2
    assert "version is mine: logs/digits_lt/imbsam/mine holds another run; leave it out" in err.splitlines()[-1]
    Path("config.yaml").write_text("my own")
    for command, *more in (("test", "--ckpt_path", runs / "mine/checkpoints/last.ckpt"), ("fit",)):
        assert imbsam(command, *SHORT, *more, "--trainer.logger=false", "--trainer.limit_train_batches=1")[0] == 0
        assert (Path("config.yaml").read_text(), files(runs / "mine")) == ("my own", before)


def test_last_names_a_newer_run_that_has_no_checkpoint(imbsam, tmp_path):
    """Killed before its first one: the older run is not mistaken for it."""
    short = [*SHORT, "--trainer.limit_train_batches=1"]
    assert imbsam("fit", *short)[0] == 0
    assert imbsam("fit", *short, "--checkpoint.save_last=false")[0] == 0
    code, _, err = imbsam("fit", *short, "--ckpt_path=last")
    runs = "logs/digits_lt/imbsam"
    assert (code, err.splitlines()[-1]) == (
        2,
        f"imbsam: error: ckpt_path is last: the newest run, {runs}/version_1, ended before its first checkpoint; start "
        f"over without --ckpt_path, or resume an older run with --ckpt_path {runs}/version_0/checkpoints/last.ckpt",
    )
    code, out, _ = imbsam("test", *short, "--ckpt_path=last")
    said = f"imbsam: checkpoint: {runs}/version_0/checkpoints/last.ckpt, since the newer run version_1 has none"
    assert (code, said in out) == (0, True)


def test_a_run_restarted_before_its_first_checkpoint_keeps_its_folder(imbsam, tmp_path):
    """A job script that names its run restarts it with --ckpt_path last, but not with other settings."""
    short = [*SHORT, "--trainer.limit_train_batches=1", "--trainer.logger.init_args.version=job"]
    assert imbsam("fit", *short, "--checkpoint.save_last=false")[0] == 0
    code, _, err = imbsam("fit", *short, "--ckpt_path=last", "--model.sam.rho=0.3")
    assert (code, "imbsam/job holds another run" in err) == (2, True)
    assert imbsam("fit", *short, "--ckpt_path=last")[0] == 0
    assert (tmp_path / "logs/digits_lt/imbsam/job/checkpoints/last.ckpt").exists()


def test_a_finished_run_of_steps_logs_the_same_test_again(imbsam, tmp_path):
    steps = [*SHORT, "--trainer.max_epochs=-1", "--trainer.max_steps=3"]
    assert imbsam("fit", *steps)[0] == 0
    log = (tmp_path / "logs/digits_lt/imbsam/version_0/metrics.csv").read_bytes()
    code, out, _ = imbsam("fit", *steps, "--ckpt_path=last")
    assert (code, "the run is finished" in out) == (0, True)
    assert (tmp_path / "logs/digits_lt/imbsam/version_0/metrics.csv").read_bytes() == log


@pytest.mark.parametrize("setting", ["trainer.logger.init_args.save_dir", "checkpoint.dirpath", "predictions.path"])
def test_an_unwritable_folder_is_one_line(imbsam, tmp_path, setting):
    """Below a regular file, which stops root too."""
    Path("file").write_text("")
    command = ["fit", *SHORT, "--trainer.limit_train_batches=1"]
    if setting == "predictions.path":
        assert imbsam(*command)[0] == 0
        command = ["predict", *SHORT, "--ckpt_path=last"]
    code, _, err = imbsam(*command, f"--{setting}=file/folder")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("imbsam: error: ")]
    assert "file" in line.split(": ")[2]
    assert setting in line.split(": set ")[1]
    assert "Traceback" not in err


def test_loads_without_the_command_line(imbsam, tmp_path):
    from lightning_modules import LongTailedClassifier

    imbsam("fit", *SHORT)
    model = LongTailedClassifier.load_from_checkpoint(
        tmp_path / "logs/digits_lt/imbsam/version_0/checkpoints/last.ckpt"
    )
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert model.method == "ImbSAM"


def test_predict_takes_one_device_of_a_machine_with_several(imbsam):
    for command, devices in (("predict", 1), ("test", "auto")):
        _, out, _ = imbsam(command, *DIGITS, "--print_config")
        assert yaml.safe_load(out)["trainer"]["devices"] == devices


def test_short_names_print_config_and_overlays(imbsam, tmp_path):
    Path("overlay.yaml").write_text("trainer:\n  max_epochs: 7\n")
    short = ["--model=LongTailedClassifier", "--data=DigitsLTDataModule", "--model.sam=SAM"]
    code, out, _ = imbsam("fit", *short, "--config=overlay.yaml", "--print_config")
    assert code == 0
    config = yaml.safe_load(out)
    assert config["trainer"]["max_epochs"] == 7
    assert config["model"]["class_path"].endswith("LongTailedClassifier")
    assert config["model"]["init_args"]["sam"]["class_path"] == "imbsam.SAM"
    code, out, _ = imbsam("fit", *DIGITS, "--config", "overlay.yaml", "--print_config")
    assert yaml.safe_load(out)["trainer"]["max_epochs"] == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.rhoo=0.1"], "model.rhoo is no setting of LongTailedClassifier; did you mean model.sam.rho?"),
        (["--modell.rho=0.1"], "modell.rho is no setting; did you mean model?"),
        (["--model.sam=SAMM"], "SAMM"),
        (["--model.sam.rho=-1"], "rho is -1.0"),
        (["--model.sam.rho=.nan"], "rho is nan"),
        (["--model.backbone=resnet9000"], "resnet9000"),
        (["--data.ratio=0.01"], "ratio"),
        (["--config=configs/nope.yaml"], "nope.yaml"),
        (["--model.sam.tail_classes=[10]"], "tail_classes"),
        (["--trainer.accumulate_grad_batches=4"], "set model.accumulate_grad_batches"),
        (["--trainer.enable_checkpointing=false"], "set checkpoint.save_last to false"),
        (["--trainer.gradient_clip_val=1"], "set model.gradient_clip_val"),
        (["--ckpt_path=nope.ckpt"], "ckpt_path is nope.ckpt"),
        (
            ["--ckpt_path=last", "--trainer.logger=false"],
            "ckpt_path is last: runs are looked up",
        ),
        (["--checkpoint.every_seconds=-1"], "checkpoint.every_seconds is -1.0"),
        (["--checkpoint.every_n_steps=0"], "checkpoint.every_n_steps is 0"),
        (["--model.optimizer.init_args.lr=-1"], "Invalid learning rate"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(imbsam, tmp_path, args, message):
    code, _, err = imbsam("fit", *SHORT, *args)
    assert code == 2
    line = [line for line in err.splitlines() if line.startswith("imbsam: error:")]
    assert len(line) == 1
    assert err.rstrip().endswith(line[0])
    assert message in line[0]
    assert not list(tmp_path.rglob("version_*"))


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_an_untrained_model_is_not_evaluated(imbsam, command):
    code, _, err = imbsam(command, *SHORT)
    assert code == 2
    assert f"ckpt_path is null: name the checkpoint to {command}" in err


def test_a_config_in_the_current_folder(imbsam, tmp_path):
    Path("my.yaml").write_text((REPOSITORY / DIGITS[1]).read_text())
    code, _, _ = imbsam("fit", "--config", "my.yaml", *SHORT[2:], "--trainer.limit_train_batches=1")
    assert code == 0
    assert (tmp_path / "logs/my/version_0/metrics.csv").exists()


def test_missing_data_and_no_network(imbsam, tmp_path, monkeypatch):
    import urllib.request

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    code, _, err = imbsam("fit", "--config", "configs/data/cifar100_lt.yaml", "--data.root=nowhere")
    assert code == 2
    assert err.splitlines()[-1].startswith("imbsam: error: data.root is nowhere, which has no folder cifar-100-python")
    assert not list(tmp_path.rglob("version_*"))


@pytest.mark.parametrize(("eta", "message"), [(1, "this is plain training"), (1000, "this is SAM")])
def test_eta_without_effect_warns_and_trains(imbsam, eta, message):
    with pytest.warns(UserWarning, match=message):
        code, _, _ = imbsam("fit", *SHORT, f"--model.sam.eta={eta}", "--trainer.limit_train_batches=1")
    assert code == 0


def test_bugs_keep_their_traceback(imbsam, monkeypatch):
    from datamodules import DigitsLTDataModule

    def broken(self):
        raise ValueError("a bug")

    monkeypatch.setattr(DigitsLTDataModule, "load_datasets", broken)
    with pytest.raises(ValueError, match="a bug"):
        imbsam("fit", *SHORT)
