"""Run folders as the real logger and the real callback write them, without the training."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from imbsam.class_measures import ClassMeasures
from lightning_modules import LongTailedClassifier
from lightning_modules.callbacks.evaluation_files import (
    _errors,
    evaluation_metrics,
    write_calibration,
    write_evaluation,
)
from lightning_modules.cli.run import main as train
from tests.pieces import anomaly

COUNTS = [120, 60, 20, 12, 6, 3]
NAMES = ["cat", "dog", "<img src=x onerror=alert(1)>", "</script><b>lynx", "%{x}", "eel | ray"]


CLASSES = {"sgd": "Plain", "sam": "SAM", "imbsam": "ImbSAM", "focal_sam": "FocalSAM"}
SETTINGS = {"sgd": (), "sam": ("rho",), "imbsam": ("rho", "eta"), "focal_sam": ("rho",)}


def sam(method: str, rho: float, eta: float, tail_weight: float) -> dict[str, object]:
    """The object of a method as LightningCLI writes it into config.yaml."""
    given = {"rho": rho, "eta": eta}
    init_args = {name: given[name] for name in SETTINGS[method]}
    if tail_weight != 1:
        init_args["tail_weight"] = tail_weight
    return {"class_path": f"imbsam.sam.{CLASSES[method]}", "init_args": init_args}


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """Write ``save_dir/name/version_N``: a loss that falls over the epochs, predictions right with chance `skill`."""

    def write(
        save_dir: Path,
        name: str,
        seed: int = 0,
        skill: float = 0.8,
        epochs: int = 3,
        counts: list[int] = COUNTS,
        names: list[str] = NAMES,
        files: bool = True,
        calibrated: bool = False,
        method: str = "sgd",
        rho: float = 0.05,
        eta: float = 20,
        tail_weight: float = 1,
        data: dict[str, object] | None = None,
        **settings: object,
    ) -> Path:
        random = torch.Generator().manual_seed(seed)
        logger = CSVLogger(save_dir, name)
        model = LongTailedClassifier(many=50, few=10)
        model._learn_classes(torch.tensor(counts), names)
        target = torch.arange(len(counts)).repeat_interleave(20)
        right = torch.rand(len(target), generator=random) < skill
        predicted = torch.where(right, target, (target + 1) % len(counts))
        confidence = torch.rand(len(target), generator=random)
        accuracy = ClassMeasures(torch.tensor(counts), many=50, few=10)
        accuracy.update(torch.eye(len(counts))[predicted], target)
        for epoch in range(epochs):
            logger.log_metrics({"train/loss_step": 1.0, "train/tail_rows": 2.0, "lr": 0.1, "epoch": epoch}, 2 * epoch)
            loss = (2.0 + seed) / (1 + epoch)
            logger.log_metrics({"train/loss_epoch": loss, "train/seconds": 1.5, "epoch": epoch}, 2 * epoch + 1)
        results = {f"test/{g}": v.item() for g, v in accuracy.compute().items()}
        if files:
            metrics = evaluation_metrics(model, target, predicted, confidence)
            results |= {name: value.item() for name, value in metrics.items()}
        if calibrated:
            errors = _errors(model, target, predicted, confidence.sqrt())
            results |= {f"test/calibrated_ece_{group}": error.item() for group, error in errors}
        logger.log_metrics({**results, "epoch": epochs}, 2 * epochs)
        logger.log_hyperparams({"device": "CPU", "processes": 1})
        logger.save()
        run = Path(logger.log_dir)
        config = {
            "seed_everything": seed,
            "trainer": {"accelerator": "auto", "max_epochs": epochs},
            "model": {
                "class_path": "lightning_modules.LongTailedClassifier",
                "init_args": {"sam": sam(method, rho, eta, tail_weight), "many": 50, "few": 10, **settings},
            },
            "data": {
                "class_path": "datamodules.DigitsLTDataModule",
                "init_args": {"ratio": 50.0, "seed": seed, "batch_size": 32, **(data or {})},
            },
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        if files:
            write_evaluation(run, model, target, predicted, confidence)
        if calibrated:
            correct, masks = predicted == target, model.test_accuracy.masks
            write_calibration(run / "calibrated.csv", confidence.sqrt(), correct, target, masks)
        return run

    return write


@pytest.fixture(scope="session")
def three_groups(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    """Two seeds of three methods, with hostile names; the first also has sharpness, the second is calibrated."""
    root = tmp_path_factory.mktemp("runs")
    for method, skill in (("sgd", 0.6), ("imbsam", 0.9), ("<i>sam", 0.7)):
        for seed in (0, 1):
            run = write_run(
                root,
                f"digits/{method}",
                seed,
                skill,
                method=method.removeprefix("<i>"),
                calibrated=method == "imbsam",
                note="<script>alert(2)</script>",
            )
            if method == "sgd":
                rows = [f"{epoch},{g},trace,{2.5 / (epoch + 1)},40" for epoch in range(3) for g in ("many", "few")]
                (run / "sharpness.csv").write_text("\n".join(["epoch,group,measure,value,samples", *rows]) + "\n")
    return root


@pytest.fixture(scope="session")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of DevNet with two methods, trained for three epochs by the real command."""
    root = tmp_path_factory.mktemp("detectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for method in ("imbsam", "sgd"):
            arguments = ["fit", *anomaly("devnet", method), "--trainer.max_epochs=3", "--seeds", "0", "1"]
            patch.setattr(sys, "argv", ["imbsam", *arguments])
            train()
    return root / "logs"
