"""Images on the device: those that torchvision makes one by one, for every device, epoch, rank and first batch."""

import contextlib
import logging

import pytest
import torch
from lightning import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import functional as vision

from datamodules import CIFAR10LTDataModule, DigitsLTDataModule
from datamodules.image_arrays.packed_images import pack_images
from datamodules.sampling import train_loader
from datamodules.sampling.mixing import MixedBatches
from datamodules.sampling.sample_seeds import random_integers, sample_seeds
from imbsam import SettingError
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import SmallCNN
from tests.no_synchronisation import NoSynchronisation
from tests.training import quiet_trainer

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def trainer(device, **settings):
    return quiet_trainer(accelerator={"cpu": "cpu", "cuda": "gpu"}[device], **settings)


def one_by_one(samples, seeds, transform):
    """The augmentation of BatchTransform, an image at a time."""
    augmented = []
    p = transform.crop_padding
    ranges = (2 * p + 1, 2 * p + 1, 2)
    for image, seed in zip(samples[0], seeds.split(1), strict=True):
        down, right, mirrored = (int(random_integers(seed, high, k)) for k, high in enumerate(ranges))
        moved = vision.crop(vision.pad(image, [p] * 4), down, right, *image.shape[1:])
        moved = vision.horizontal_flip(moved) if transform.flip and mirrored else moved
        augmented.append((moved.float() - transform.mean.cpu()) / transform.std.cpu())
    return torch.stack(augmented), samples[1]


def wanted(data, keys, batch_size):
    """The batches of these (epoch, draw) keys, made one image at a time from a copy of the data on the host."""

    def collate(samples, seeds):
        return one_by_one(samples, seeds, data.train_collate)

    if data.mixup or data.cutmix:
        collate = MixedBatches(collate, len(data.class_names), data.mixup, data.cutmix)
    for first in range(0, len(keys), batch_size):
        epochs, draws = torch.tensor(keys[first : first + batch_size]).T
        samples = data._train.__getitems__((draws % len(data._train)).tolist())
        yield collate(samples, seeds=sample_seeds(0, epochs, draws))


def assert_same(found, wanted, device):
    for (images, targets), (others, theirs) in zip(found, wanted, strict=True):
        assert (images.device.type, targets.device.type) == (device, "cpu")
        assert torch.equal(targets, theirs)
        if device == "cpu":
            assert torch.equal(images, others)
        else:
            torch.testing.assert_close(images.cpu(), others, rtol=2e-7, atol=1e-7)


@pytest.fixture(scope="module")
def cifar10(cifar10_root, tmp_path_factory):
    """Makes CIFAR-10-LT from its folder, or from a packed file."""
    path = tmp_path_factory.mktemp("packed") / "cifar10_lt.npz"
    pack_images(path, CIFAR10LTDataModule(cifar10_root, ratio=5))

    def make(packed=False, **settings):
        data = CIFAR10LTDataModule(path if packed else cifar10_root, ratio=5, batch_size=64, **settings)
        data.setup()
        return data

    return make


@on_both
@pytest.mark.parametrize(
    "settings",
    [
        {"augment": False},
        {},
        {"packed": True, "val_share": 0.2},
        {"sampling": "class_balanced"},
        {"mixup": 0.2},
        {"cutmix": 1.0},
        {"mixup": 0.2, "cutmix": 1.0},
    ],
    ids=str,
)
def test_the_images_are_those_made_one_by_one(device, settings, cifar10):
    data, host = cifar10(images_on_device=True, **settings), cifar10(**settings)
    data.trainer = trainer(device)
    loader = data.train_dataloader()
    for epoch in (0, 3):
        loader.sampler.set_epoch(epoch)
        keys = list(loader.sampler)
        assert_same(loader, wanted(host, keys, 64), device)
    # resumed mid-epoch
    loader.load_state_dict({"seed": 0, "epoch": 3, "batch": 2, "joint_batch_size": 64})
    assert_same(loader, wanted(host, keys[128:], 64), device)
    # each of two ranks
    for rank in range(2):
        collate = loader.collate_fn.collate
        ranks = train_loader(loader.dataset.dataset, 32, collate, num_replicas=2, rank=rank, order=loader.sampler.order)
        ranks.sampler.set_epoch(3)
        assert_same(ranks, wanted(host, list(ranks.sampler), 32), device)
    # evaluation
    for found, others in zip(data.test_dataloader(), host.test_dataloader(), strict=True):
        assert_same([found], [others], device)


class TwoDevices(TorchDispatchMode):
    """Fail where an operation meets tensors of two devices, or the host waits for a copy."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            assert kwargs.get("non_blocking"), "the host waits for a copy"
            self.copies += 1
        else:
            assert len(devices) < 2, f"{func} of {devices}"
        return func(*args, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"packed": True}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
def test_the_host_never_waits_for_the_images(settings, cifar10):
    """On the meta device, which refuses what needs a value, such as item() and nonzero()."""
    loader = cifar10(**settings).train_dataloader()
    loader.dataset.dataset.to(torch.device("meta"))
    with TwoDevices() as mode:
        batches = list(loader)
        with pytest.raises(AssertionError, match="waits for a copy"):
            torch.ones(2).to("meta")
    assert mode.copies == 3 * len(batches)  # indices, draws, mean and std
    assert all(images.is_meta and targets.device.type == "cpu" for images, targets in batches)


@contextlib.contextmanager
def no_gpu_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watched(Callback):
    """Forbid synchronisation after the first batch of each epoch, in the loader and in Lightning's own work too."""

    steps = 0

    def __init__(self, device):
        self.forbid = {"cpu": NoSynchronisation, "cuda": no_gpu_synchronisation}[device]
        self.open = contextlib.ExitStack()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += batch_idx > 0
        if batch_idx == 0:
            self.open.enter_context(self.forbid())
        elif trainer.is_last_batch:
            self.open.close()

    def on_exception(self, trainer, module, exception):
        self.open.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("device", "mixing"),
    [
        ("cpu", {}),
        pytest.param("cuda", {}, marks=pytest.mark.gpu),
        pytest.param("cuda", {"mixup": 0.2, "cutmix": 1.0}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_no_training_step_waits_for_the_gpu(device, mixing):
    data = DigitsLTDataModule(images_on_device=True, **mixing)
    watched = Watched(device)
    model = LongTailedClassifier(lambda num_classes: SmallCNN(num_classes, width=4))
    run = trainer(device, callbacks=watched, max_epochs=2, log_every_n_steps=1000)
    run.fit(model, datamodule=data)
    assert watched.steps == run.global_step - 2 > 10
    if device == "cuda":
        assert data._train.images.is_cuda


def test_auto_on_a_cpu_keeps_the_worker_processes():
    data = DigitsLTDataModule(num_workers=2)
    data.setup()
    data.trainer = trainer("cpu")
    assert data.train_dataloader().num_workers == data.test_dataloader().num_workers == 2


def test_images_on_another_device_need_no_worker_processes():
    data = DigitsLTDataModule()
    data.setup()
    assert train_loader(data._train.to(torch.device("meta")), 8, num_workers=2).num_workers == 0


BYTES = 64 * (336 + 540)


@pytest.mark.parametrize(
    ("choice", "free", "place"),
    [(True, 1, "cuda"), (False, 2**40, "cpu"), ("auto", 10 * BYTES, "cuda"), ("auto", 10 * BYTES - 1, "cpu")],
)
def test_auto_takes_a_tenth_of_the_free_memory(choice, free, place, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    data = DigitsLTDataModule(images_on_device=choice, val_share=0.2)
    data.setup()
    assert data.image_bytes() == BYTES
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        assert data._choose(torch.device("cuda")).type == place
    told = [record.getMessage() for record in caplog.records if "The images take" in record.getMessage()]
    assert len(told) == (choice == "auto" and place == "cpu")


class Rotated(DigitsLTDataModule):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.train_collate = rotated


def rotated(batch):
    return batch[0].rot90(dims=(2, 3)).float(), batch[1]


def test_augmentation_on_the_cpu_and_images_on_the_device_exclude_each_other(cifar10):
    with pytest.raises(SettingError) as caught:
        cifar10(images_on_device=True, autoaugment=True)
    end = "runs on the CPU: set data.images_on_device to auto"
    assert str(caught.value) == f"images_on_device is true, but AutoAugment {end}"
    with pytest.raises(SettingError, match=f"^images_on_device is true, but rotated {end}$"):
        Rotated(images_on_device=True).setup()
    for data in (cifar10(autoaugment=True), Rotated()):
        assert data._choose(torch.device("cuda")).type == "cpu"


def test_the_choice_is_true_false_or_auto():
    with pytest.raises(SettingError, match=r"^images_on_device is 'yes': choose true, false or auto$"):
        DigitsLTDataModule(images_on_device="yes")


@pytest.mark.gpu
def test_on_a_gpu_auto_puts_small_images_there(cifar10):
    for settings, place in (({}, "cuda"), ({"autoaugment": True}, "cpu"), ({"images_on_device": False}, "cpu")):
        data = cifar10(num_workers=1, **settings)
        data.trainer = trainer("cuda")
        loader = data.train_dataloader()
        assert loader.dataset.dataset.device.type == place
        assert loader.num_workers == (place == "cpu")


@pytest.mark.gpu
def test_too_little_memory_is_one_line(cifar10):
    data = cifar10(images_on_device=True)
    data.trainer = trainer("cuda")
    data._train.images = torch.zeros(2**16, 3, 32, 32, dtype=torch.uint8)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    try:
        with pytest.raises(SettingError, match=r"is true, but cuda:0 has no 0\.19 GiB free for the images: set data"):
            data.train_dataloader()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
