"""Which weights features were computed by."""

from typing import Any

from torch import nn

from imbsam.errors import SettingError
from lightning_modules.weight_files import digest


def weights_digest(network: nn.Module, head: str) -> str:
    """The digest of a network's weights and buffers without those of its classifier.

    Args:
        network: the network.
        head: the classifier's name in it.
    """
    return digest({name: t for name, t in network.state_dict().items() if not name.startswith(f"{head}.")})


def check_features(model: Any, data: Any) -> None:
    """Refuse features of other weights than the model's, before anything is trained or tested on them.

    Args:
        model: a classifier with ``backbone`` and ``head_name``.
        data: a :class:`~datamodules.FeaturesDataModule`.

    Raises:
        SettingError: the weights differ, or the model averages views of images.
    """
    for name in ("flip_tta", "crop_tta"):
        if value := model.hparams.get(name):
            raise SettingError(
                f"model.{name} is {str(value).lower()}: features have no views of their images: leave it out here, and "
                "set it where the whole network predicts"
            )
    length, expected = data.num_features, getattr(model.head, "in_features", data.num_features)
    if length != expected or weights_digest(model.backbone, model.head_name) != data.description["weights"]:
        theirs = data.description["backbone"]
        theirs = theirs["class_path"] if isinstance(theirs, dict) else theirs
        raise SettingError(
            f"data.path is {data.path}: its features are of other weights ({theirs.rpartition('.')[2]}, {length} "
            "features) than the model's: set model.backbone and model.backbone_weights as in the .yaml beside the "
            "file, or run imbsam features again with this model"
        )
