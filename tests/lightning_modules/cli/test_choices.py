"""The choices of a training are objects, and what cannot work is one line before anything is trained."""

from pathlib import Path

import pytest
import torch
import yaml

from datamodules import AnomalyDataModule, DigitsLTDataModule
from imbsam import ImbSAM
from lightning_modules import AnomalyDetector, LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from tests.training import quiet_trainer, sgd

CONFIG = str(Path(__file__).resolve().parents[3] / "configs/data/digits_lt.yaml")
SHORT = [f"--config={CONFIG}", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]


def test_your_own_method_and_loss_are_class_paths(imbsam, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from imbsam import ClassAwareSAM\n"
        "class HalfSAM(ClassAwareSAM):\n"
        "    def __init__(self, module, class_counts=None, *, share: float = 0.5, **settings):\n"
        "        super().__init__(module, class_counts, sharpness_weight=share, **settings)\n"
        "class Squares(torch.nn.Module):\n"
        "    def __init__(self, factor: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.factor = factor\n"
        "    def forward(self, logits, target):\n"
        "        return self.factor * (logits - torch.eye(logits.shape[1])[target]).square().mean(dim=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--model.sam=mine.HalfSAM", "--model.sam.share=0.3", "--model.loss=mine.Squares", "--model.loss.factor=2"]
    code, out, err = imbsam("fit", *SHORT, *own, "--trainer.enable_progress_bar=false")
    assert code == 0, err
    assert "HalfSAM" in out
    last = next(tmp_path.glob("logs/**/last.ckpt"))
    settings = yaml.safe_load((last.parents[1] / "config.yaml").read_text())["model"]["init_args"]
    assert settings["sam"]["init_args"]["share"] == 0.3
    code, _, _ = imbsam("test", *SHORT, *own, "--ckpt_path", last)
    assert code == 0
    model = LongTailedClassifier.load_from_checkpoint(last)
    assert (model.method, type(model.loss).__name__, model.loss.factor) == ("HalfSAM", "Squares", 2)
    assert torch.isfinite(model(torch.zeros(2, 1, 8, 8))).all()


def test_a_custom_class_keeps_its_own_defaults(imbsam, tmp_path, monkeypatch):
    (tmp_path / "mine2.py").write_text(
        "from imbsam import ImbSAM\n"
        "from imbsam.losses import CrossEntropy\n"
        "class Far(ImbSAM):\n"
        "    def __init__(self, module, class_counts=None, *, rho: float = 0.3, **settings):\n"
        "        super().__init__(module, class_counts, rho=rho, **settings)\n"
        "class Smooth(CrossEntropy):\n"
        "    def __init__(self, label_smoothing: float = 0.2):\n"
        "        super().__init__(label_smoothing)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--model.sam=mine2.Far", "--model.loss=mine2.Smooth", "--model.backbone=CifarResNet34"]
    plain = ["--model=LongTailedClassifier", "--data=DigitsLTDataModule", "--model.optimizer=torch.optim.AdamW"]
    _, out, _ = imbsam("fit", *plain, *own, "--print_config")
    model = yaml.safe_load(out)["model"]["init_args"]
    assert model["sam"]["init_args"]["rho"] == 0.3
    assert model["loss"]["init_args"]["label_smoothing"] == 0.2
    assert model["backbone"]["init_args"]["width"] == 64
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.01  # SGD's is 0
    _, out, _ = imbsam("fit", f"--config={CONFIG}", *own, "--print_config")
    sam = yaml.safe_load(out)["model"]["init_args"]["sam"]["init_args"]
    assert (sam["rho"], sam["eta"]) == (0.3, 20)  # eta is what the config says
    _, out, _ = imbsam(
        "fit", "--model=AnomalyDetector", "--model.detector=DeepSAD", "--data=AnomalyDataModule", "--print_config"
    )
    assert yaml.safe_load(out)["model"]["init_args"]["detector"]["init_args"]["hidden"] is None


def test_a_method_may_be_a_function(tmp_path):
    def half(module, class_counts, **settings):
        return ImbSAM(module, class_counts, rho=0.025, **settings)

    classifier = LongTailedClassifier(SmallCNN, sam=half, optimizer=sgd)
    quiet_trainer(default_root_dir=tmp_path, max_steps=1).fit(classifier, datamodule=DigitsLTDataModule())
    assert classifier.sam.rho == 0.025
    detector = AnomalyDetector(sam=half, optimizer=sgd)
    data = AnomalyDataModule(sampling="balanced", batch_size=32, batches_per_epoch=1, val_share=0.2)
    run = quiet_trainer(default_root_dir=tmp_path)
    run.fit(detector, datamodule=data)
    assert torch.isfinite(run.callback_metrics["val/loss"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.optimizer.lr=1e10"], "the training loss is nan in epoch 1, at a learning rate of 1e+10"),
        (["--model.optimizer=LBFGS"], "optimizer is LBFGS"),
        (["--model.optimizer=SparseAdam"], "optimizer is SparseAdam"),
        (["--model.sam.etta=50"], "did you mean eta?"),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/al"], "val/al"),
        (
            [
                "--model.lr_scheduler=OneCycleLR",
                "--model.lr_scheduler.max_lr=0.1",
                "--model.lr_scheduler.total_steps=5",
                "--model.lr_interval=step",
            ],
            "lr_scheduler OneCycleLR cannot step after step 6",
        ),
    ],
)
def test_one_line_instead_of_a_traceback(imbsam, args, message):
    code, _, err = imbsam("fit", *SHORT, *args, "--trainer.logger=false", "--trainer.enable_progress_bar=false")
    assert code == 2
    assert message in err.splitlines()[-1]


def test_rho_is_refused_before_the_model_summary(imbsam):
    code, out, err = imbsam("fit", *SHORT, "--model.sam.rho=-1")
    assert (code, "rho is -1.0" in err) == (2, True)
    assert "trained parameters" not in out + err


def test_a_cosine_follows_the_epochs_and_the_extended_run(imbsam, tmp_path):
    lrs = {}
    for name, epochs in (("whole", [4]), ("extended", [2, 4])):
        for length in epochs:
            run = [f"--trainer.max_epochs={length}", f"--trainer.logger.init_args.name={name}", "--ckpt_path=last"]
            code, out, err = imbsam(
                "fit", f"--config={CONFIG}", *run, *SHORT[1:2], "--trainer.enable_progress_bar=false"
            )
            assert code == 0, err
            assert "T_max" not in out + err
        last = torch.load(tmp_path / f"logs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
        assert last["lr_schedulers"][0]["T_max"] == 4
        lrs[name] = last["optimizer_states"][0]["param_groups"][0]["lr"]
    assert lrs["whole"] == pytest.approx(0, abs=1e-9)
