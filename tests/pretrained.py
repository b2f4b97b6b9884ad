"""Small networks of the real architectures, for tests of pretrained ones: random weights, saved as the libraries do."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from datamodules import LongTailedDataModule
from datamodules.base.preprocessing import Preprocessing, PreprocessingSettings
from datamodules.image_arrays.augmentation import BatchTransform
from datamodules.image_arrays.dataset import ImageArrays
from lightning_modules.backbones import Timm
from lightning_modules.backbones.network import BackboneCallable
from lightning_modules.backbones.weights import copy_weights, read_weights

TIMM_VIT = Timm("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2})
HF_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}


def load_weights(network: nn.Module, source: str | Path, backbone: BackboneCallable | None = None) -> list[str]:
    """Read weights and copy them into a network; returns the names of those that stay as initialised."""
    return copy_weights(network, read_weights(source, backbone))


class TinyImages(LongTailedDataModule):
    """Images of 16 pixels, 3 classes of 12, 6 and 3, that differ in their channels' brightness."""

    shuffle_classes = False

    def __init__(self, batch_size=7, image_size=None, mean=None, std=None, **settings):
        super().__init__(profile="none", batch_size=batch_size, **settings)
        self.class_names = ["red", "green", "sky_blue"]
        self._preprocessing = PreprocessingSettings(image_size, mean, std, Preprocessing(16, (0.5,) * 3, (0.5,) * 3))
        self.train_collate, self.eval_collate = BatchTransform([127.5], [127.5]), BatchTransform([127.5], [127.5])

    def use_preprocessing(self, **of_model):
        self.used = found = self._preprocessing.resolve(**of_model)
        for transform in (self.train_collate, self.eval_collate):
            transform.set_input([255 * v for v in found.mean], [255 * v for v in found.std], found.image_size)

    @property
    def used_preprocessing(self):
        return asdict(self._preprocessing.used)

    def load_datasets(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 3)
        images = torch.randint(128, (len(labels), 3, 16, 16), generator=generator)
        images[torch.arange(len(labels)), labels] += 100
        data = ImageArrays(images.to(torch.uint8), labels)
        return data, labels, data


def hf_vit_folder(folder, num_labels=7, **settings):
    """A folder of save_pretrained with a ViT and its preprocessor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    ViTForImageClassification(ViTConfig(**HF_VIT, num_labels=num_labels, **settings)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        folder
    )
    return folder


def randomize(network: nn.Module) -> nn.Module:
    """Let no weight or buffer be at a value that another network starts with too."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return network
