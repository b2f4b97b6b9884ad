"""What only a GPU can show of `model.capture`: trainings are captured, equal eager ones, resume, and never wait."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from datamodules import AnomalyDataModule, DigitsLTDataModule
from imbsam import SAM, FocalSAM, ImbSAM, Plain, SettingError
from lightning_modules import AnomalyDetector, LongTailedClassifier
from lightning_modules.backbones import SmallCNN, Timm
from tests.lightning_modules.resuming import test_resume
from tests.pieces import configs
from tests.pretrained import TIMM_VIT, TinyImages
from tests.training import csv_rows, quiet_trainer, sgd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA graphs run on no other"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may choose another algorithm for the same shape, and TF32 rounds by the kernel."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Synchronising(SmallCNN):
    """Waits for the GPU in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)
        return logits * (1 + 0 * logits.sum().item())


def classifier(cls: type[LongTailedClassifier] = LongTailedClassifier, **settings: Any) -> LongTailedClassifier:
    seed_everything(0)
    defaults = {"backbone": partial(SmallCNN, width=4, norm="batch", dropout=0.2), "optimizer": sgd, "many": 50}
    return cls(**{**defaults, "sam": partial(ImbSAM, rho=0.5, context_rows="batch"), "few": 10, **settings})


class Greedy(SmallCNN):
    """Wants more memory than any GPU has while it is captured."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, dtype=torch.uint8, device=x.device)
        logits: Tensor = super().forward(x)
        return logits


def fit(module: Any, data: Any = None, **settings: Any) -> Any:
    trainer = quiet_trainer(**{"accelerator": "gpu", "max_epochs": 3, **settings})
    trainer.fit(module, datamodule=data or DigitsLTDataModule())
    return module


METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"sam": Plain},
    "sam": {"sam": partial(SAM, rho=0.5)},
    "imbsam": {},
    "focal_sam": {"sam": partial(FocalSAM, rho=0.5)},
    "mixup": {"data": partial(DigitsLTDataModule, mixup=0.5)},
    "accumulation": {"accumulate_grad_batches": 2},
    "channels last": {"channels_last": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_training_is_the_eager_one(method):
    settings = {**METHODS[method]}
    data = settings.pop("data", DigitsLTDataModule)
    eager, captured = (
        fit(classifier(capture=capture, **settings), data(), precision="64-true") for capture in (False, True)
    )
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-8, atol=1e-10)


def test_a_pruned_network_is_captured_anew():
    """After each epoch ModelPruning puts a mask on the weights, by a hook."""
    found = []
    for capture in (False, True):
        pruning = ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)
        found.append(fit(classifier(capture=capture), precision="64-true", callbacks=[pruning]))
    eager, captured = found
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-8, atol=1e-10)


def test_a_captured_detector_is_the_eager_one():
    found = []
    for capture in (False, True):
        seed_everything(0)
        data = AnomalyDataModule(batch_size=64, batches_per_epoch=4, val_share=0.3)
        module = AnomalyDetector(sam=partial(ImbSAM, rho=0.5), capture=capture)
        found.append(fit(module, data, precision="64-true"))
    eager, captured = found
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-8, atol=1e-10)


def test_float16_skips_the_same_steps_and_learns_the_same():
    """The scale begins too high, so the first steps overflow. What is compared is the way that the weights took."""

    class Start(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.weights = weights(pl_module)

    def weights(module: LongTailedClassifier) -> Tensor:
        return torch.cat([p.detach().flatten().cpu() for p in module.backbone.parameters()])

    ways, scales = [], []
    for capture in (False, True):
        scaler, start = torch.amp.GradScaler("cuda", init_scale=2.0**30), Start()
        module = classifier(capture=capture, optimizer=partial(torch.optim.SGD, lr=0.01))
        fit(module, plugins=[MixedPrecision("16-mixed", "cuda", scaler=scaler)], callbacks=[start])
        ways.append(weights(module) - start.weights)
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] < 2.0**30
    assert torch.nn.functional.cosine_similarity(*ways, dim=0) > 0.99


def test_gradient_checkpointing_is_captured_where_no_block_draws():
    settings: dict[str, Any] = {"many": 8, "few": 4, "sam": partial(ImbSAM, eta=5, rho=0.5)}
    settings["gradient_checkpointing"] = True
    eager, captured = (
        fit(classifier(capture=capture, backbone=TIMM_VIT, **settings), TinyImages(), precision="64-true")
        for capture in (False, True)
    )
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-8, atol=1e-10)
    dropout = Timm(TIMM_VIT.name, {**TIMM_VIT.settings, "proj_drop_rate": 0.3})
    with pytest.raises(SettingError, match=r"gradient_checkpointing is true, and Block draws random numbers .* false$"):
        fit(classifier(capture=True, backbone=dropout, **settings), TinyImages())


def test_auto_trains_eagerly_where_the_memory_does_not_suffice_for_graphs():
    settings = {"backbone": partial(Greedy, width=4)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured = fit(classifier(capture="auto", **settings), precision="64-true")
    said = [str(w.message) for w in caught if "capture is auto" in str(w.message)]
    assert len(said) == 1
    assert "this run trains eagerly: the GPU is out of memory" in said[0]
    eager = fit(classifier(**settings), precision="64-true")
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_no_host_synchronisation_in_a_step(mixup):
    """From the third epoch on, when all shapes have been captured; the last batch of an epoch runs eagerly."""
    watched = []

    class Watched(LongTailedClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch < 2:
                return super().training_step(batch, batch_idx)
            watched.append(batch_idx)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return super().training_step(batch, batch_idx)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    module = classifier(Watched, capture=True, gradient_clip_val=1.0)
    fit(module, DigitsLTDataModule(mixup=mixup), precision="bf16-mixed", log_every_n_steps=1)
    assert watched == list(range(11))


def test_a_network_that_waits_is_refused_or_trained_eagerly():
    settings = {"backbone": partial(Synchronising, width=4)}
    with pytest.raises(SettingError, match=r"^model.capture is true, and the step cannot be captured: .* or to false$"):
        fit(classifier(capture=True, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        captured = fit(classifier(capture="auto", **settings), precision="64-true")
    assert len([w for w in caught if "model.capture is auto, and this run trains eagerly" in str(w.message)]) == 1
    eager = fit(classifier(**settings), precision="64-true")
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-8, atol=1e-10)


def test_a_compiled_network_is_captured():
    captured = fit(classifier(capture=True, compile=True), max_epochs=2)
    assert all(p.isfinite().all() for p in captured.parameters())


def test_graphs_of_an_earlier_training_hold_no_memory():
    module = fit(classifier(capture=True), max_epochs=1)
    module.cpu()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    again = fit(classifier(capture=True), max_epochs=1)
    again.cpu()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held


@pytest.mark.parametrize(("epoch", "batch"), [(0, 3), (1, 2)])
def test_resumes_as_if_nothing_had_happened(tmp_path: Path, epoch: int, batch: int):
    """At the last, smaller batch of an epoch, which runs eagerly, and in the middle of one."""
    settings: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
    settings["model"] = {"capture": True, "sam": partial(ImbSAM, rho=0.5, context_rows=3)}
    test_resume.fit(tmp_path / "whole", every_seconds=1e9, **settings)
    with pytest.raises(RuntimeError, match="killed"):
        test_resume.fit(
            tmp_path / "killed", callbacks=(test_resume.Stop(epoch, batch, test_resume.killed),), **settings
        )
    test_resume.fit(tmp_path / "killed", resume=True, **settings)
    test_resume.assert_same(test_resume.result(tmp_path / "killed"), test_resume.result(tmp_path / "whole"))


@pytest.mark.parametrize("method", ["sgd", "imbsam", "cc_sam"])
def test_fit_with_gpu_yaml(imbsam, tmp_path, method):
    pieces = configs("data/digits_lt", f"method/{method}", "trainer/gpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code, out, _ = imbsam("fit", *pieces, "--trainer.max_epochs=3")
    assert (code, "test accuracy" in out) == (0, True)
    eagerly = [w for w in caught if "this run trains eagerly" in str(w.message)]
    assert len(eagerly) == (1 if method == "cc_sam" else 0)
    (log,) = tmp_path.rglob("metrics.csv")
    losses = [float(row["train/loss_epoch"]) for row in csv_rows(log) if row["train/loss_epoch"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
