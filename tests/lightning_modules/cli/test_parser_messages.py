"""What the user sees of a wrong setting: from the command line and from a config, through the real parser."""

import pytest

from lightning_modules.cli.run import main


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model.optimizer.lr=0.1x"], "model.optimizer.lr is 0.1x: give a number"),
        (["--model.eta=1"], "model.eta is no setting of LongTailedClassifier; did you mean model.sam.eta?"),
        (["--model.backbone=CifarResnet32"], "there is no such class; did you mean CifarResNet32?"),
        (["--model.backbone=resnet50"], "there is no such class; did you mean Torchvision with name resnet50?"),
        (["--model.backbone=Timm"], "model.backbone needs name: set model.backbone.name"),
        (["--model.backbone.widht=3"], "model.backbone.widht is no setting of SmallCNN; did you mean width?"),
        (["--model.backbone.num_classes=3"], "model.backbone.num_classes is no setting of SmallCNN"),
        (["--model.sam=Imbsam"], "did you mean ImbSAM?"),
        (["--model.loss=LDAN"], "did you mean LDAM?"),
        (["--model.sam.etaa=1"], "model.sam.etaa is no setting of ImbSAM; did you mean eta?"),
        (["--data.ratioo=3"], "data.ratioo is no setting of DigitsLTDataModule; did you mean ratio?"),
        (["--data.ratio=x"], "data.ratio is x: give a number"),
        (["--trainer.max_epochz=3"], "trainer.max_epochz is no setting; did you mean trainer.max_epochs?"),
        (["--model.lr_interval=steps"], "model.lr_interval is steps: choose epoch, step; did you mean step?"),
        (["--model.optimizer=torch.optim.SDG"], "torch.optim has no SDG; did you mean SGD?"),
        (["--model=LongTailedClasifier"], "there is no such class; did you mean LongTailedClassifier?"),
        (["--data=Mine"], "data is Mine: there is no such class; a class of your own is a dotted path"),
        (["--config=nope.yaml"], "nope.yaml: there is no such file"),
    ],
)
def test_command_line(args, line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["imbsam", "fit", "--config=configs/data/digits_lt.yaml", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("imbsam: error: ")
    assert line in error


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{model: {class_path: LongTailedClassifier, init_args: {fewer: 1}}}", "did you mean few?"),
        ("{trainer: {max_epochz: 1}}", "trainer.max_epochz is no setting; did you mean trainer.max_epochs?"),
        ("{modell: {class_path: LongTailedClassifier}}", "modell.class_path is no setting; did you mean model?"),
        (
            "{model: {class_path: LongTailedClassifier, init_args: {optimizer: "
            "{class_path: torch.optim.SGD, init_args: {momentun: 1}}}}}",
            "model.optimizer.momentun is no setting of SGD; did you mean momentum?",
        ),
    ],
)
def test_config(text, line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    configs = ["--config=configs/data/digits_lt.yaml", "--config=mine.yaml"]
    monkeypatch.setattr("sys.argv", ["imbsam", "fit", *configs])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
