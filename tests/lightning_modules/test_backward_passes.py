"""`model.capture`: a training with captured steps is the eager one. The stand-in for CUDA graphs calls the passes."""

import warnings
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, ModelPruning
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_modules.backward_passes
from datamodules import AnomalyDataModule, DigitsLTDataModule
from imbsam import CCSAM, GSAM, SAM, SSESAM, FocalSAM, ImbSAM, Plain, SettingError
from imbsam.capture.captured_step import CapturedStep
from imbsam.capture.graphs import CaptureError, DirectCalls
from lightning_modules import AnomalyDetector, LongTailedClassifier, SecondStageClassifier
from lightning_modules.backbones import SmallCNN
from lightning_modules.callbacks.plain_weights import PlainWeights
from lightning_modules.callbacks.schedules import DeferredReweighting, RhoSchedule
from lightning_modules.detectors import FEAWAD, DeepSAD, DevNet, PReNet, WeightedClassifier
from tests.no_synchronisation import NoSynchronisation
from tests.training import quiet_trainer, sgd

pytestmark = pytest.mark.filterwarnings("ignore")
FULL = 10
"""Full batches in an epoch of the digits; an eleventh is smaller."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[CapturedStep]:
    """Puts the stand-in in the place of CUDA graphs, and counts the calls of each captured step."""
    calls: Counter[CapturedStep] = Counter()
    call = CapturedStep.__call__

    def counted(step: CapturedStep, *batches: Any, **settings: Any) -> Tensor:
        assert {t.device.type for t in settings["targets"]} == {"cpu"}  # those of the host: a GPU's have to be awaited
        loss = call(step, *batches, **settings)
        calls[step] += 1
        return loss

    monkeypatch.setattr(lightning_modules.backward_passes, "graphs_on", DirectCalls)
    monkeypatch.setattr(CapturedStep, "__call__", counted)
    return calls


def classifier(cls: type[LongTailedClassifier] = LongTailedClassifier, **settings: Any) -> LongTailedClassifier:
    seed_everything(0)
    defaults = {"backbone": partial(SmallCNN, width=4, norm="batch", dropout=0.2), "optimizer": sgd, "many": 50}
    return cls(**{**defaults, "sam": partial(ImbSAM, rho=0.5), "few": 10, **settings})


def fit(module: Any, data: Any = None, **settings: Any) -> dict[str, Any]:
    """Three epochs; what the training leaves."""
    trainer = quiet_trainer(**{"max_epochs": 3, **settings})
    trainer.fit(module, datamodule=data or DigitsLTDataModule())
    logged = {name: value.clone() for name, value in trainer.callback_metrics.items()}
    return {**module.state_dict(), **logged, "generator": torch.get_rng_state()}


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


class Alternating(DigitsLTDataModule):
    """Every second batch has smoothed targets: probabilities instead of labels."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, targets = batch
        soft = 0.9 * nn.functional.one_hot(targets, 10).to(images.dtype) + 0.01
        return images, soft if self.trainer.training and self.trainer.fit_loop.batch_idx % 2 else targets


def scaled() -> MixedPrecision:
    """On the CPU, Lightning's own 16-mixed is bf16 without a scaler. The first steps overflow."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**24))


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"sam": Plain},
    "sam": {"sam": partial(SAM, rho=0.5)},
    "imbsam": {},
    "imbsam, float32": {"precision": "32-true"},
    "imbsam, rows of their own": {
        "backbone": partial(SmallCNN, width=4, norm="group"),
        "sam": partial(ImbSAM, rho=0.5, first_pass="whole"),  # a captured step splits it into other numbers of rows
    },
    "norm alone": {"sam": partial(ImbSAM, rho=0.5, perturb="norm")},
    "focal_sam": {"sam": partial(FocalSAM, rho=0.5)},
    "mixup": {"data": partial(DigitsLTDataModule, mixup=0.5)},
    "labels and probabilities": {"data": Alternating, "forms": 2},
    "accumulation": {"accumulate_grad_batches": 2, "captured": 15},  # not the eleventh batch, alone and smaller
    "accumulation, the last of a full and a smaller batch": {
        "accumulate_grad_batches": 2,
        "data": partial(DigitsLTDataModule, batch_size=30),
        "captured": 15,
    },
    "clipping": {"gradient_clip_val": 0.1},
    "channels last": {"channels_last": True},
    "schedules": {
        "sam": partial(ImbSAM, tail_weight=2.0),
        "callbacks": lambda: [
            RhoSchedule(start_epoch=1, end=0.5, every_n_steps=2),
            DeferredReweighting(0.99, start_epoch=1),
        ],
    },
    "average": {"callbacks": lambda: [EMAWeightAveraging(decay=0.9), PlainWeights()]},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"plugins": scaled, "precision": None},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_the_eager_one_to_the_last_bit(steps, case):
    settings = {"precision": "64-true", "captured": 3 * FULL, "forms": 1, "data": DigitsLTDataModule, **CASES[case]}
    captured, forms, data, precision = (settings.pop(name) for name in ("captured", "forms", "data", "precision"))
    made = {name: settings.pop(name) for name in ("plugins", "callbacks") if name in settings}
    found = []
    for capture in (False, True):
        module = classifier(capture=capture, **settings)
        found.append(fit(module, data(), precision=precision, **{name: make() for name, make in made.items()}))
        assert bool(steps) is capture
    assert_same(found[1], found[0])
    assert (sum(steps.values()), len(steps)) == (captured, forms)


class Features(BackboneFinetuning):
    """Freeze the features alone: the classifier is part of the backbone here."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone.features)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.unfreeze_backbone_at_epoch:
            self.unfreeze_and_add_param_group(pl_module.backbone.features, optimizer, lr=0.01)


CHANGES = {
    "unfrozen": lambda: Features(unfreeze_backbone_at_epoch=1),
    "pruned": lambda: ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_change_are_captured_anew(steps, change):
    def optimizer(params: Any) -> torch.optim.Optimizer:
        return sgd([p for p in params if p.requires_grad])

    found = [
        fit(classifier(capture=capture, optimizer=optimizer), callbacks=[CHANGES[change]()])
        for capture in (False, True)
    ]
    assert_same(found[1], found[0])
    assert list(steps.values()) == ([FULL, 2 * FULL] if change == "unfrozen" else [FULL, FULL, FULL])


def test_a_detector_and_a_second_stage_are_captured_too(steps, tmp_path):
    data = partial(AnomalyDataModule, batch_size=64, batches_per_epoch=4, val_share=0.3)
    detectors = []
    for capture in (False, True):
        seed_everything(0)
        module = AnomalyDetector(sam=partial(ImbSAM, rho=0.5), capture=capture)
        detectors.append(fit(module, data(), precision="64-true"))
    # the extra passes are padded to more rows, and the rounding of a matrix product depends on them
    torch.testing.assert_close(detectors[1], detectors[0], rtol=1e-12, atol=1e-13)
    assert sum(steps.values()) == 3 * 4

    first, trainer = classifier(), quiet_trainer()
    trainer.fit(first, datamodule=DigitsLTDataModule())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    stages = []
    for capture in (False, True):
        seed_everything(0)
        settings: dict[str, Any] = {"optimizer": sgd, "capture": capture, "sam": partial(ImbSAM, first_pass="whole")}
        stages.append(fit(SecondStageClassifier(str(tmp_path / "first.ckpt"), **settings)))
    assert_same(stages[1], stages[0])
    assert sum(steps.values()) == 3 * 4 + 3 * FULL


def test_graphs_are_released_after_a_training_and_the_next_one_has_its_own_full_batch(steps):
    module = classifier(capture=True)
    fit(module, max_epochs=1)
    assert not module.backward_passes._steps
    fit(module, DigitsLTDataModule(batch_size=16), max_epochs=1)
    assert list(steps.values()) == [FULL, 2 * FULL + 1]


def test_a_batch_larger_than_the_first_is_captured_anew(steps):
    class Growing(DigitsLTDataModule):
        def train_dataloader(self) -> Any:
            whole = next(iter(super().train_dataloader()))
            sizes = [8, 8, 12, 8, 12]
            return DataLoader([tuple(t[:size] for t in whole) for size in sizes], batch_size=None)

    found = [fit(classifier(capture=capture), Growing(), max_epochs=1) for capture in (False, True)]
    assert_same(found[1], found[0])
    assert list(steps.values()) == [2, 2]


class Hook(LongTailedClassifier):
    def on_after_backward(self) -> None:
        pass


class HookOfACallback(Callback):
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        pass


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "CC-SAM": ({"sam": CCSAM}, r"PartitionedSAM has a step of its own \(_plan\)"),
    "SSE-SAM": ({"sam": partial(SSESAM, eta=20)}, "has a step of its own"),
    "GSAM": ({"sam": GSAM}, "GSAM has a step of its own"),
    "a hook": ({"cls": Hook}, "Hook has the hook on_after_backward, which a graph does not call"),
    "a callback's": ({"callbacks": [HookOfACallback()]}, "HookOfACallback has the hook on_before_backward"),
    "bf16 weights": ({"precision": "bf16-true"}, "the weights are in torch.bfloat16, and train/perturbed_fraction"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_refused_in_one_line(steps, case):
    settings, reason = REFUSED[case]
    run = {name: value for name, value in settings.items() if name in ("callbacks", "precision")}
    module = classifier(capture=True, **{name: value for name, value in settings.items() if name not in run})
    message = (
        f"^model.capture is true, and the step cannot be captured: .*{reason}.*; set model.capture to auto, .* false$"
    )
    with pytest.raises(SettingError, match=message) as caught:
        fit(module, **run)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_needed():
    with pytest.raises(SettingError, match=r"cannot be captured: CUDA graphs need a GPU, and the model is on cpu; set"):
        fit(classifier(capture=True))
    with pytest.raises(SettingError, match="capture is 'always': give true, false or auto"):
        classifier(capture="always")


class Failing(DirectCalls):
    """A GPU on which the passes with a perturbation cannot be captured."""

    error: BaseException = CaptureError("operation not permitted when stream is capturing")

    def record(self, passes: Any) -> Any:
        if passes.perturbs:
            raise self.error
        return super().record(passes)


class NoMemory(Failing):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


AUTO = {
    "no GPU": (lambda device: None, "CUDA graphs need a GPU, and the model is on cpu"),
    "synchronisation": (Failing, "operation not permitted when stream is capturing"),
    "memory": (NoMemory, "the GPU is out of memory"),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_trains_eagerly_and_says_so_once(monkeypatch, case):
    graphs, reason = AUTO[case]
    monkeypatch.setattr(lightning_modules.backward_passes, "graphs_on", graphs)
    callbacks = lambda: [RhoSchedule(start_epoch=1)]  # noqa: E731  the first epoch is captured
    wanted = fit(classifier(), callbacks=callbacks())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(fit(classifier(capture="auto"), callbacks=callbacks()), wanted)
    said = [str(w.message) for w in caught if "capture" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith(f"model.capture is auto, and this run trains eagerly: {reason}")


@pytest.mark.slow
def test_a_compiled_network_is_captured(steps):
    """Without dropout: what a compiled one draws depends on what has been compiled before."""
    found = []
    for capture in (False, True):
        torch.compiler.reset()
        module = classifier(backbone=partial(SmallCNN, width=4, norm="batch"), compile=True, capture=capture)
        found.append(fit(module, max_epochs=2))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert sum(steps.values()) == 2 * FULL


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_training_step_never_waits_for_the_gpu(steps, capture, mixup):
    class Watched(LongTailedClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with NoSynchronisation():
                return super().training_step(batch, batch_idx)

    module = classifier(Watched, capture=capture, gradient_clip_val=1.0, accumulate_grad_batches=2)
    fit(module, DigitsLTDataModule(mixup=mixup), max_epochs=1, log_every_n_steps=1)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("detector", [DevNet, DeepSAD, PReNet, FEAWAD, WeightedClassifier])
def test_a_detectors_training_step_never_waits_for_the_gpu(steps, detector, capture):
    sampling = {PReNet: "pairs", DevNet: "balanced", FEAWAD: "balanced"}.get(detector, "natural")
    of_loader, of_engine = [], []

    class Watched(AnomalyDetector):
        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            if self.trainer.training:
                of_loader.append(batch[1].clone())
            return batch[0].clone(), batch[1].clone()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            passes = self.backward_passes

            def watched(module: Any, losses_of: Any, batches: Any, targets: Any) -> Tensor:
                of_engine.extend(targets)
                return passes(module, losses_of, batches, targets)

            self.backward_passes = watched  # type: ignore[assignment]
            batch[1].zero_()  # what a GPU would have
            with NoSynchronisation():
                loss = super().training_step(batch, batch_idx)
            self.backward_passes = passes
            return loss

    data = AnomalyDataModule(batch_size=64, batches_per_epoch=4, val_share=0.3, sampling=sampling)
    fit(Watched(detector, sam=partial(ImbSAM, rho=0.5), optimizer=sgd, capture=capture), data, max_epochs=1)
    tail = [labels.amax(dim=1) if labels.dim() == 2 else labels for labels in of_loader]
    assert len(tail) == 4
    assert all(map(torch.equal, of_engine, tail))


def test_the_mean_loss_counts_samples_and_not_steps():
    class Losses(Callback):
        total, samples = 0.0, 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.total += float(outputs["loss"]) * len(batch[1])
            self.samples += len(batch[1])

    losses = Losses()
    found = fit(classifier(), DigitsLTDataModule(batch_size=200), callbacks=[losses], max_epochs=1)
    assert float(found["train/loss_epoch"]) == pytest.approx(losses.total / losses.samples, rel=1e-6)


class Listens(LongTailedClassifier):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        COUNTED["backward"] += 1
        super().backward(loss, *args, **kwargs)


class ListeningCallback(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        COUNTED["callback"] += 1


COUNTED: Counter[str] = Counter()
LISTENERS: dict[str, dict[str, Any]] = {
    "no one": {},
    "module": {"cls": Listens},
    "callback": {"callbacks": [ListeningCallback()]},
    "scaler": {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]},
    "profiler": {"profiler": "simple"},
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_lightning_runs_the_backward_passes_where_something_listens(monkeypatch, listener):
    """Its own part of one takes as long as the backward pass of a small net, and is left out where it does nothing."""
    COUNTED.clear()
    run = dict(LISTENERS[listener])
    module = classifier(sam=SAM, **{"cls": run.pop("cls")} if "cls" in run else {})
    manual_backward = type(module).manual_backward

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        COUNTED["Lightning"] += 1
        manual_backward(self, *args, **kwargs)

    monkeypatch.setattr(LightningModule, "manual_backward", counted)
    fit(module, max_epochs=1, limit_train_batches=2, limit_val_batches=0, **run)
    passes = 0 if listener == "no one" else 4  # two steps of SAM
    assert COUNTED["Lightning"] == passes
    assert sum(COUNTED.values()) == (2 * passes if listener in ("module", "callback") else passes)
