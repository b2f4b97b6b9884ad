"""Trainings that cannot work end in one line: optimizers, schedulers, metrics that are not logged, divergence."""

import pytest
import torch
import yaml

from lightning_modules.cli.run import main
from tests.pieces import configs

DIGITS = configs("data/digits_lt", "method/sgd")
SHORT = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model.optimizer=torch.optim.LBFGS"], "optimizer is LBFGS, which evaluates the loss itself: choose one"),
        (["--model.optimizer=torch.optim.SparseAdam"], "optimizer is SparseAdam, which takes only sparse gradients"),
        (
            [
                "--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping",
                "--trainer.callbacks.monitor=train/loss_epoc",
            ],
            "EarlyStopping's monitor is train/loss_epoc, which is not logged; did you mean train/loss_epoch?",
        ),
        (
            [
                "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR",
                "--model.lr_scheduler.max_lr=0.1",
                "--model.lr_scheduler.total_steps=5",
                "--model.lr_interval=step",
            ],
            "lr_scheduler OneCycleLR cannot step after step 6: Tried to step 6 times",
        ),
        (["--model.optimizer.lr=1e10"], "the training loss is nan in epoch 1, at a learning rate of 1e+10: lower it"),
        (["--model.sam.perturb=bias"], "model.sam.perturb is bias: choose all, norm, classifier"),
        (["--model.sam.perturb=[head]"], "perturb is ['head'] and module has no trained parameter of such a name"),
        (
            ["--model.capture=true"],
            "model.capture is true, and the step cannot be captured: CUDA graphs need a GPU, and the model is on cpu; "
            "set model.capture to auto, which then trains eagerly, or to false",
        ),
        (["--trainer.accelerator=gpu"], "trainer.accelerator is gpu, and PyTorch finds no GPU here"),
    ],
)
def test_one_line(args, line, monkeypatch, capsys, tmp_path):
    if "gpu" in args[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["imbsam", "fit", *DIGITS, *SHORT, *args],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    if "lr=1e10" in args[0]:  # NaN weights are not saved
        assert not list(tmp_path.rglob("last.ckpt"))


@pytest.mark.parametrize("perturb", ["norm", "classifier", "[fc]"])
def test_perturb_and_first_pass_from_the_command_line(perturb, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    own = ["--model.sam=ImbSAM", f"--model.sam.perturb={perturb}", "--model.sam.first_pass=split"]
    monkeypatch.setattr(
        "sys.argv", ["imbsam", "fit", *DIGITS, *own, "--trainer.accelerator=cpu", "--trainer.max_steps=2"]
    )
    main()
    (written,) = tmp_path.rglob("config.yaml")
    config = yaml.safe_load(written.read_text())
    settings = config["model"]["init_args"]["sam"]["init_args"]
    assert (settings["perturb"], settings["first_pass"]) == (yaml.safe_load(perturb), "split")


def test_summary_lists_only_the_network(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        ["imbsam", "fit", *DIGITS, *SHORT],
    )
    main()
    shown = capsys.readouterr().out
    assert "backbone" in shown
    assert "14,458 trained parameters, 0 frozen" in shown
    assert "Metric" not in shown
    assert "FLOPs" not in shown


def test_summary_can_be_disabled(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--config=configs/data/digits_lt.yaml",
        "--config=configs/method/sgd.yaml",
        *SHORT,
        "--trainer.enable_model_summary=false",
    ]
    monkeypatch.setattr("sys.argv", ["imbsam", "fit", *arguments])
    main()
    assert "trained parameters" not in capsys.readouterr().out
